"""Sparsifiers by name. A new one is one file here with a class under `@SPARSIFIERS.register`."""

from trainables.sparsifiers.base import SPARSIFIERS, ActiveSparsifier, Setting, Sparsifier
from trainables.sparsifiers.channels import Channels
from trainables.sparsifiers.granet import GraNet
from trainables.sparsifiers.lottery import LotteryTicket
from trainables.sparsifiers.magnitude import Magnitude
from trainables.sparsifiers.nm import NM
from trainables.sparsifiers.random_mask import RandomMask
from trainables.sparsifiers.rigl import RigL
from trainables.sparsifiers.set import SET
from trainables.sparsifiers.snip import SNIP

__all__ = [
    "NM",
    "SET",
    "SNIP",
    "SPARSIFIERS",
    "ActiveSparsifier",
    "Channels",
    "GraNet",
    "LotteryTicket",
    "Magnitude",
    "RandomMask",
    "RigL",
    "Setting",
    "Sparsifier",
]
