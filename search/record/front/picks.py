"""Choosing a network of a front that was read back: by what it is, or by its trial."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slimfront.search.config.objectives import OBJECTIVES, Objective, first_size, losses
from slimfront.search.record.front.pareto import knee
from slimfront.trainables.errors import UserError

Report = Mapping[str, Any]
"""What a search found, as in front.json (see `report.as_json`)."""
Member = dict[str, Any]
"""A member of its front."""
PICKS = ("recommended", "knee", "smallest", "best")
_BEST = ("best", "most-accurate")
"""The second is the name of version 0.1."""


def member_name(member: Member) -> str:
    """trial-007@30, and /3 where it was pruned: what `pick` takes."""
    name = f"{member['trial']}@{member['epoch']}"
    step = member.get("one_shot", 0)
    if step:
        name += f"/{step}"
    return name


def sizes(member: Member) -> dict[str, float]:
    """The measures of a member; `params` there are the searched values, and the number of
    parameters is `total_params`."""
    params = member.get("total_params", math.nan)
    return member | {"params": params}


def pick(
    report: Report,
    wanted: str,
    min_quality: float | None = None,
    *,
    option: str = "--pick {wanted}",
) -> Member:
    """The member that `wanted` names: recommended, knee, smallest, best, or a trial, which may have
    @EPOCH and /STEP behind it.

    Args:
        report: `front` and `objectives`, as in front.json (see `report.as_json`).
        min_quality: only networks of this quality or better are looked at; where that leaves the
            front's knee out, knee is that of the networks that are left.
        option: how it was asked for, to begin a message with.

    Raises:
        UserError: if there is none.
    """
    front: Sequence[Member] = report["front"]
    if not front:
        raise UserError("the front is empty")
    quality = quality_of(report)
    name = quality.name

    def goodness(member: Member) -> float:
        value = member[name]
        if value is None:
            return -math.inf
        return quality.goodness(value)

    size = first_size(described(report))

    def smallest_first(member: Member) -> tuple[float, float, float]:
        smallness = size.goodness(sizes(member)[size.name])
        return -smallness, member["nonzero_params"], -goodness(member)

    def best_last(member: Member) -> tuple[float, float]:
        return goodness(member), -member["nonzero_params"]

    able = _able(front, quality, min_quality)
    if not able:
        best = max(front, key=goodness)[name]
        raise UserError(_none_is_able(quality, min_quality, best))
    if wanted == "recommended":
        for member in able:
            if member.get("recommended"):
                return member
        # It is not good enough, or the report is of version 0.1, which recommended the knee.
        wanted = "knee" if min_quality is None else "smallest"
    if wanted == "knee":
        return _knee(able, described(report))
    if wanted == "smallest":
        return min(able, key=smallest_first)
    if wanted in _BEST:
        return max(able, key=best_last)
    return _named(able, wanted, option)


def _named(able: Sequence[Member], wanted: str, option: str) -> Member:
    """The member of that name, or the last one of that trial; raises UserError if there is none."""
    named = []
    for member in able:
        if wanted in (member["trial"], member_name(member)):
            named.append(member)
    if not named:
        asked = option.format(wanted=wanted)
        choices = ", ".join(PICKS)
        few = able[:8]
        names = list(map(member_name, few))
        if len(able) > len(few):
            names.append("…")
        known = ", ".join(names)
        raise UserError(f"{asked}: it is not on the front; choose {choices}, or one of {known}")
    return max(named, key=_last)


def _last(member: Member) -> tuple[int, int]:
    """Ranks the networks of a trial: the latest epoch, and there the one that was pruned least."""
    return member["epoch"], -member.get("one_shot", 0)


def _able(
    front: Sequence[Member], quality: Objective, min_quality: float | None
) -> Sequence[Member]:
    """The members whose quality is as good as wanted; one without a number is not."""
    if min_quality is None:
        return front
    able = []
    for member in front:
        value = member[quality.name]
        if value is not None and quality.as_good(value, min_quality):
            able.append(member)
    return able


def _none_is_able(quality: Objective, min_quality: float | None, best: float | None) -> str:
    reached = "no number" if best is None else f"{best:.6g}"
    return (
        f"no network of the front has {quality.measure.axis} {min_quality:g} or "
        f"{quality.measure.better}; the best has {reached}"
    )


def quality_of(report: Report) -> Objective:
    """The quality of the networks of a front.json; in those of version 0.1 the default task's."""
    name = report.get("quality")
    if name is None:
        return next(iter(OBJECTIVES.values()))
    plain = report["described"][name]
    return Objective.from_plain(plain)


def described(report: Report) -> list[Objective]:
    """The objectives of a front.json."""
    known = dict(OBJECTIVES)
    described_there = report.get("described", {})
    for name, plain in described_there.items():
        objective = Objective.from_plain(plain)
        known.setdefault(name, objective)
    names = report["objectives"]
    return [known[name] for name in names]


def _knee(members: Sequence[Member], objectives: Sequence[Objective]) -> Member:
    """The front's knee where it is among these members; else their own, by the same losses as
    `Front.knee`.

    Those are relative to the dense network's sizes, but a knee is the same whatever they are
    relative to.
    """
    for member in members:
        if member["knee"]:
            return member
    measures = [sizes(member) for member in members]
    scale = {}
    for objective in objectives:
        values = [own[objective.name] for own in measures]
        scale[objective.name] = max(1.0, *values)
    points = losses(measures, objectives, scale)
    return members[knee(points)]
