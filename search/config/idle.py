"""Finds what a space varies to no effect: values of something that is switched off wherever they
are tried."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from slimfront.trainables.candidate import Candidate

Ends = Mapping[str, tuple[Any, ...]]
"""By path: the ends of a range, or all choices."""
Acts = Callable[[Candidate], bool]
"""Says whether something acts in a candidate."""
MakeCandidate = Callable[[Mapping[str, object]], Candidate]
"""Makes the candidate in which some paths have other values, as `Config.candidate`."""


def idle(ends: Ends, candidate: MakeCandidate) -> Iterator[tuple[str, str]]:
    """Paths that change nothing, each with the reason and what would be right."""
    for choice in ends.get("sparsifier", ()):
        if "sparsifier.sparsity" not in ends and _is_off_unsaid(choice, candidate):
            name = choice["name"] if isinstance(choice, Mapping) else choice
            yield (
                "sparsifier",
                f"'{name}' alone has sparsity 0 and does nothing; set sparsity in each choice: "
                f"{{name: {name}, sparsity: 0.9}}",
            )
    yield from _idle_momentum(ends, candidate)
    for part, acts, right in _parts(ends):
        section = f"{part}."
        inside = {}
        for path, own in ends.items():
            if own and path.startswith(section):
                inside[path] = own
        if inside and not _ever(acts, inside, candidate):
            first = next(iter(inside))
            yield first, f"changes nothing, since {right}"


def _idle_momentum(ends: Ends, candidate: MakeCandidate) -> Iterator[tuple[str, str]]:
    """The momentum of an optimiser that has none to set. What a function of the user's trains by is
    its own affair."""
    path, of = "training.momentum", "training.optimizer"
    inside = {name: ends[name] for name in (path, of) if name in ends}

    def acts(made: Candidate) -> bool:
        return made.training.optimizer == "sgd" or made.training.factory is not None

    if path in inside and not _ever(acts, inside, candidate):
        used = candidate({}).training.optimizer
        right = f"set {of}: sgd, or let it vary"
        yield path, f"changes nothing, since it is for sgd, and {of} is {used}; {right}"


def _ever(acts: Acts, ends: Ends, candidate: MakeCandidate) -> bool:
    """Whether something acts in any of the candidates with one of these ends."""
    for path, own in ends.items():
        for end in own:
            tried = candidate({path: end})
            if acts(tried):
                return True
    return False


def _is_off_unsaid(choice: Any, candidate: MakeCandidate) -> bool:
    """Whether a choice of a sparsifier does nothing, and does not say so itself."""
    if isinstance(choice, Mapping) and "sparsity" in choice:
        return False
    sparsifier = candidate({"sparsifier": choice}).sparsifier
    return sparsifier is not None and not sparsifier.on


def _parts(ends: Ends) -> Iterator[tuple[str, Acts, str]]:
    """What can be off: where it stands, whether it acts in a candidate, and what switches it on."""
    yield (
        "sparsifier",
        lambda candidate: candidate.sparsifier is not None and candidate.sparsifier.on,
        "sparsifier.sparsity is 0; set it, or let it vary",
    )
    yield (
        "refit",
        lambda candidate: candidate.refit.epochs > 0,
        "refit.epochs is 0; set it, or let it vary",
    )
    yield (
        "depth",
        lambda candidate: candidate.depth.on,
        "depth.layers is 0; set it, or let it vary",
    )
    yield (
        "one_shot",
        lambda candidate: candidate.one_shot.steps > 0,
        "one_shot.steps is 0; set it, or let it vary",
    )
    penalties = [path.split(".")[1] for path in ends if path.startswith("penalties.")]
    for name in dict.fromkeys(penalties):
        yield (
            f"penalties.{name}",
            partial(_penalty_acts, name),
            f"penalties.{name}.strength is 0; set it, or let it vary",
        )


def _penalty_acts(name: str, candidate: Candidate) -> bool:
    return candidate.penalties[name].on
