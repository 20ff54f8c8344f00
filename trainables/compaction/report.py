"""What compaction did, step by step, and what came out."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

Action = Literal[
    "folded",
    "inactive",
    "merged",
    "merged approximately",
    "kept apart",
    "units removed",
    "heads removed",
    "removed",
    "block removed",
    "zeros stay",
    "pruned",
    "fitted",
]
Step = tuple[str, Action, str]
"""A layer, what became of it, and a detail; what was `pruned` and `fitted`
before is told by who did."""


@dataclass(frozen=True)
class Report:
    """What compaction did.

    `steps` are (layer, action, detail) in the order of doing; `difference` is the largest
    difference of an output, relative to its spread over the inputs; `after` are the measures of the
    compact network (see `measures.measure`).
    """

    steps: tuple[Step, ...]
    difference: float
    after: dict[str, float]

    def count(self, action: Action) -> int:
        """How many steps were of this kind."""
        count = 0
        for _, done, _ in self.steps:
            if done == action:
                count += 1
        return count


@dataclass(frozen=True)
class Compacted:
    """A compact network and how it came about."""

    network: nn.Module
    """A traced graph (`torch.GraphModule`), or a copy of the model as it was if compaction is
    off."""
    report: Report

    @property
    def measures(self) -> dict[str, float]:
        """Of the compact network; see `measures.measure`."""
        return self.report.after
