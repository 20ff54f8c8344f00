"""Choosing a network of a front that was read back: by what it is, or by its trial."""

from collections.abc import Sequence
from typing import Any

from trainables.errors import UserError

Member = dict[str, Any]
"""A member of a front, as in front.json (see `report.as_json`)."""
PICKS = ("knee", "smallest", "most-accurate")


def member_name(member: Member) -> str:
    """trial-007@30, and /3 where it was pruned: what `pick` takes."""
    step = member.get("one_shot", 0)
    return f"{member['trial']}@{member['epoch']}" + (f"/{step}" if step else "")


def pick(front: Sequence[Member], wanted: str, min_accuracy: float | None = None) -> Member:
    """The member that `wanted` names: knee, smallest, most-accurate, or a trial, which may have @EPOCH and /STEP behind it.

    Args:
        min_accuracy: only networks with this validation accuracy or more are looked at.

    Raises:
        UserError: if there is none.
    """
    able = [m for m in front if min_accuracy is None or m["val_accuracy"] >= min_accuracy]
    if not able:
        best = max((m["val_accuracy"] for m in front), default=None)
        raise UserError(
            "the front is empty"
            if best is None
            else f"no network of the front has validation accuracy {min_accuracy}; the best has {best:.4f}"
        )
    if wanted == "knee":
        knees = [m for m in able if m["knee"]]
        return knees[0] if knees else min(able, key=lambda m: m["nonzero_params"])
    if wanted == "smallest":
        return min(able, key=lambda m: (m["nonzero_params"], -m["val_accuracy"]))
    if wanted == "most-accurate":
        return max(able, key=lambda m: (m["val_accuracy"], -m["nonzero_params"]))
    named = [m for m in able if wanted in (m["trial"], member_name(m))]
    if not named:
        known = ", ".join(member_name(m) for m in able[:8]) + (", …" if len(able) > 8 else "")
        raise UserError(f"--pick {wanted}: it is not on the front; choose {', '.join(PICKS)}, or one of {known}")
    return max(named, key=lambda m: (m["epoch"], -m.get("one_shot", 0)))
