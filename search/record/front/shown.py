"""Which members of a front people are shown first: those that somebody may ship, each once."""

from collections.abc import Sequence
from dataclasses import dataclass

from slimfront.search.record.ledger import Ledger
from slimfront.search.record.trials import MeasuredNetwork
from slimfront.trainables.measures.latency import SPEEDS

SIZES = ("nonzero_params", "params", "layers", "flops")
"""What tables always have a column for. Networks are equal that agree in these, in the quality and
in the objectives."""


@dataclass(frozen=True)
class Shown:
    """What is shown of a front, best first, and how many of its members are not."""

    members: list[MeasuredNetwork]
    equal: int = 0
    """How many are equal to one that is shown."""
    outside: int = 0
    """How many lie below the region that matters (see `Region.holds`)."""

    def left_out(self, ledger: Ledger) -> str:
        """What is not shown, in words; empty if nothing is."""
        parts = []
        if self.outside:
            parts.append(f"{self.outside} more than {ledger.region.text()} below dense")
        if self.equal:
            parts.append(f"{self.equal} equal to one above")
        return " and ".join(parts)


def shown(ledger: Ledger, front: Sequence[MeasuredNetwork], *, everything: bool = False) -> Shown:
    """The members of a front, best first, that are in the region that matters, equal ones once; all
    of them for `everything`, and all that differ where none is in the region."""
    whole = list(front)
    if everything:
        return Shown(whole)
    inside = list(filter(ledger.region.holds, whole))
    members = inside or whole
    outside = len(whole) - len(members)
    names = _compared(ledger)
    seen = set()
    distinct = []
    for point in members:
        values = tuple(map(point.measures.get, names))
        if values in seen:
            continue
        seen.add(values)
        distinct.append(point)
    equal = len(members) - len(distinct)
    return Shown(distinct, equal, outside)


def _compared(ledger: Ledger) -> list[str]:
    """The measures in which networks are equal that count as one."""
    names = [ledger.quality.name]
    for objective in ledger.objectives:
        # Times of equal networks differ by noise alone.
        if objective.name not in SPEEDS:
            names.append(objective.name)
    return [*names, *SIZES]
