"""Penalties by name. A new one is one file here with a class under `@PENALTIES.register`."""

from trainables.penalties.aug_cka import AugCKA
from trainables.penalties.base import PENALTIES, ActivePenalty, Penalty
from trainables.penalties.block import BlockSparsity
from trainables.penalties.channel import ChannelSparsity
from trainables.penalties.cka import CKA
from trainables.penalties.connection import ConnectionSparsity
from trainables.penalties.layer import LayerSparsity
from trainables.penalties.node import NodeSparsity

__all__ = [
    "CKA",
    "PENALTIES",
    "ActivePenalty",
    "AugCKA",
    "BlockSparsity",
    "ChannelSparsity",
    "ConnectionSparsity",
    "LayerSparsity",
    "NodeSparsity",
    "Penalty",
]
