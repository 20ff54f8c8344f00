"""Sparsifiers by name. A new one is one file here with a class under `@SPARSIFIERS.register`."""

from slimfront.trainables.sparsifiers.base import SPARSIFIERS, ActiveSparsifier, Setting, Sparsifier
from slimfront.trainables.sparsifiers.channels import Channels
from slimfront.trainables.sparsifiers.granet import GraNet
from slimfront.trainables.sparsifiers.lottery import LotteryTicket
from slimfront.trainables.sparsifiers.magnitude import Magnitude
from slimfront.trainables.sparsifiers.nm import NM
from slimfront.trainables.sparsifiers.random_mask import RandomMask
from slimfront.trainables.sparsifiers.rigl import RigL
from slimfront.trainables.sparsifiers.set import SET
from slimfront.trainables.sparsifiers.snip import SNIP

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
