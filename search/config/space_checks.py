"""What the space of a config must be: its values, and their combinations, make candidates, and
nothing secret varies."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from optuna.distributions import BaseDistribution
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from slimfront.search.config.idle import idle
from slimfront.search.config.space import Parameter
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import shorten
from slimfront.trainables.options import explain_first, suggest
from slimfront.trainables.redaction import redact_values

Space = Mapping[str, Parameter]
"""What varies, by dotted path."""

MakeCandidate = Callable[[Mapping[str, object]], Candidate]
"""Makes the candidate with other values by dotted path, as `Config.candidate`."""

_COMBINATIONS = 100
"""How many combinations of a space are checked before a search."""


def check_space(
    space: Space, candidate: MakeCandidate, field_type: Callable[[str], object]
) -> None:
    """Raises an error for a path that may not vary, values that make no candidate, and what varies
    to no effect.

    Args:
        field_type: int or float for the field at a path, None for another type.
    """
    for path, parameter in space.items():
        _refuse_path(path, space)
        _refuse_ends(path, parameter, candidate)
    for path, parameter in space.items():
        if parameter.choices is None:
            _refuse_range(path, parameter, field_type(path))
    _refuse_invalid_combinations(space, candidate, field_type)
    ends = {path: parameter.ends() for path, parameter in space.items()}
    for path, problem in idle(ends, candidate):
        raise _space_error(path, problem)


def check_nothing_secret(space: Space, starts: Sequence[Mapping[str, Any]]) -> None:
    """Raises an error for a value that is a secret, of the space or of what a search starts
    from."""
    varied: list[tuple[str, Any]] = []
    for path, parameter in space.items():
        for value in parameter.ends():
            varied.append((path, value))
    for start in starts:
        varied += start.items()
    for path, value in varied:
        key = path.rpartition(".")[2]
        shown = redact_values(value, key)
        # Not as values: NaN is not equal to itself.
        if repr(shown) != repr(value):
            raise _space_error(
                path,
                "varies in secrets, and all values of a trial are recorded; name them without "
                "a secret",
            )


def check_starts(
    starts: Sequence[Mapping[str, Any]], distributions: Mapping[str, BaseDistribution]
) -> None:
    """Raises ValueError for a value to start from that is not in the space."""
    for number, values in enumerate(starts):
        where = f"search.start_from[{number}]"
        for path, value in values.items():
            if path not in distributions:
                raise ValueError(f"{where}: '{path}' does not vary; {suggest(path, distributions)}")
            if not _inside(distributions[path], value):
                shown = shorten(repr(value))
                raise ValueError(f"{where}: {shown} is outside of what '{path}' varies in")


def _refuse_path(path: str, space: Space) -> None:
    """Raises an error for a path that may not vary, whatever its values are."""
    if path == "task" or path.startswith("task."):
        raise _space_error(path, "would give trials that cannot be compared: all are of one task")
    if path.startswith("data") and not path.startswith("data.augment."):
        raise _space_error(
            path,
            "would give trials data that cannot be compared; of 'data' only 'data.augment' "
            "may vary",
        )
    if path == "training.seed":
        raise _space_error(
            path,
            "would have the search pick lucky seeds; leave it out: each trial has a seed of "
            "its own",
        )
    for other in space:
        if other.startswith(f"{path}."):
            raise _space_error(path, f"also holds '{other}', which varies too; vary one of the two")


def _refuse_ends(path: str, parameter: Parameter, candidate: MakeCandidate) -> None:
    """Raises an error for an end of a range or a choice that makes no candidate."""
    for value in parameter.ends():
        try:
            candidate({path: value})
        except KeyError as error:
            raise _space_error(path, f"names nothing: {error.args[0]}") from None
        except ValidationError as error:
            raise _space_error(path, explain_first(error, inside=path)) from None


def _refuse_range(path: str, parameter: Parameter, kind: object) -> None:
    """Raises an error for a range of what is no number, or in parts of what is a whole one."""
    if kind not in (int, float):
        raise _space_error(path, "is not a number, so it cannot have a range; give 'choices'")
    if kind is not int:
        return
    for value in (parameter.low, parameter.step or 1):
        if value != int(value or 0):
            raise _space_error(
                path, "is a whole number, so 'low', 'high' and 'step' must be whole too"
            )


def _refuse_invalid_combinations(
    space: Space, candidate: MakeCandidate, field_type: Callable[[str], object]
) -> None:
    """Draws combinations of values from anywhere in the space: each value alone may be right
    and two of them not."""
    random = Random(0)  # noqa: S311 (nothing secret)
    integer = {path: field_type(path) is int for path in space}
    for _ in range(_COMBINATIONS):
        values = {}
        for path, parameter in space.items():
            values[path] = parameter.draw(random, integer=integer[path])
        try:
            candidate(values)
        except KeyError as error:
            paths = ", ".join(values)
            raise _space_error(paths, f"do not go together: {error.args[0]}") from None
        except ValidationError as error:
            shown = ", ".join(f"{path} = {shorten(value)}" for path, value in values.items())
            problem = f"is not a valid combination: {explain_first(error)}"
            raise _space_error(shown, problem) from None


def _inside(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a value is one that the distribution can give."""
    try:
        return distribution._contains(float(distribution.to_internal_repr(value)))
    except (TypeError, ValueError, OverflowError):
        return False


def _space_error(path: str, problem: str) -> PydanticCustomError:
    return PydanticCustomError(
        "space", "space '{path}': {problem}", {"path": path, "problem": problem}
    )
