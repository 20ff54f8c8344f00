"""Penalties by name. A new one is one file here with a class under `@PENALTIES.register`."""

from slimfront.trainables.penalties.aug_cka import AugCKA
from slimfront.trainables.penalties.base import PENALTIES, ActivePenalty, Penalty
from slimfront.trainables.penalties.block import BlockSparsity
from slimfront.trainables.penalties.channel import ChannelSparsity
from slimfront.trainables.penalties.cka import CKA
from slimfront.trainables.penalties.connection import ConnectionSparsity
from slimfront.trainables.penalties.layer import LayerSparsity
from slimfront.trainables.penalties.node import NodeSparsity

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
