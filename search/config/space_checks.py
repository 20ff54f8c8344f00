"""What the space of a config must be: its values, and their combinations, make candidates, and
nothing secret varies."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import ValidationError

from slimfront.search.config.idle import MakeCandidate, idle
from slimfront.search.config.paths import is_inside
from slimfront.search.config.search_space import SearchSpace, space_error
from slimfront.search.config.space import Parameter
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import shorten
from slimfront.trainables.options import explain_first, suggest
from slimfront.trainables.redaction import redact_values

Space = Mapping[str, Parameter]
"""What varies, by dotted path."""

FieldType = Callable[[str], object]
"""int or float for the field at a path, None for another type."""

_COMBINATIONS = 100
"""How many combinations of a space are checked before a search."""


def check_space(space: SearchSpace, candidate: MakeCandidate, field_type: FieldType) -> None:
    """Raises an error for a path that may not vary, values that make no candidate, and what varies
    to no effect."""
    for path in space.parameters:
        _refuse_path(path, space)
        _refuse_ends(path, space, candidate)
    for path in space.asked:
        parameter = space.parameters[path]
        if parameter.choices is None:
            _refuse_range(path, parameter, field_type(path))
    for path in space.parameters:
        _refuse_condition_on_points(path, space, field_type)
    _refuse_invalid_combinations(space, candidate, field_type)

    def where_all_apply(values: Mapping[str, object]) -> Candidate:
        return candidate(space.where(values))

    ends = {path: space.ends(path) for path in space.parameters}
    for path, problem in idle(ends, where_all_apply):
        raise space_error(path, problem)


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
        _, _, key = path.rpartition(".")
        shown = redact_values(value, key)
        # Not as values: NaN is not equal to itself.
        if repr(shown) != repr(value):
            raise space_error(
                path,
                "varies in secrets, and all values of a trial are recorded; name them without "
                "a secret",
            )


def check_starts(
    starts: Sequence[Mapping[str, Any]],
    space: SearchSpace,
    distributions: Mapping[str, BaseDistribution],
) -> None:
    """Raises ValueError for a value to start from that is not in the space."""
    for number, given in enumerate(starts):
        where = f"search.start_from[{number}]"
        values = space.recorded(given)
        for path, value in values.items():
            known = space.parameters.get(path)
            if known is not None and known.same_as is not None:
                raise ValueError(
                    f"{where}: '{path}' is the same as '{known.same_as}'; give that alone"
                )
            if path not in distributions:
                raise ValueError(f"{where}: '{path}' does not vary; {suggest(path, distributions)}")
            if not is_in(distributions[path], value):
                shown = shorten(repr(value))
                raise ValueError(f"{where}: {shown} is outside of what '{path}' varies in")
            decided = set(space.conditions[path]) <= set(values)
            if decided and not space.allows(path, values):
                raise ValueError(
                    f"{where}: '{path}' does not vary beside the other values, by its 'when'; "
                    "leave it out"
                )


def _refuse_path(path: str, space: SearchSpace) -> None:
    """Raises an error for a path that may not vary, whatever its values are."""
    if path == "task" or path.startswith("task."):
        raise space_error(path, "would give trials that cannot be compared: all are of one task")
    if path.startswith("data") and not path.startswith("data.augment."):
        raise space_error(
            path,
            "would give trials data that cannot be compared; of 'data' only 'data.augment' "
            "may vary",
        )
    if path == "training.seed":
        raise space_error(
            path,
            "would have the search pick lucky seeds; leave it out: each trial has a seed of "
            "its own",
        )
    for other in space.parameters:
        # A condition on the section says which of its choices have the other.
        if is_inside(other, path) and path not in space.conditions[other]:
            raise space_error(path, f"also holds '{other}', which varies too; vary one of the two")


def _refuse_ends(path: str, space: SearchSpace, candidate: MakeCandidate) -> None:
    """Raises an error for an end of a range or a choice that makes no candidate, beside any of the
    values under which it varies."""
    try:
        ends = space.ends(path)
    except ValueError as error:
        raise space_error(path, str(error)) from None
    for end in ends:
        for values in space.wheres(path, end):
            try:
                candidate(values)
            except KeyError as error:
                raise space_error(path, f"names nothing: {error.args[0]}") from None
            except ValidationError as error:
                raise space_error(path, explain_first(error, inside=path)) from None


def _refuse_condition_on_points(path: str, space: SearchSpace, field_type: FieldType) -> None:
    """Raises an error for a condition on single values of a range that has no steps: it would as
    good as never hold."""
    for source in space.conditions[path]:
        over = space.parameters[source]
        if over.choices is None and over.step is None and field_type(source) is not int:
            raise space_error(
                path,
                f"has a 'when' over '{source}', which is a range without steps and as good as "
                "never has one certain value; give it choices or a step",
            )


def _refuse_range(path: str, parameter: Parameter, kind: object) -> None:
    """Raises an error for a range of what is no number, or in parts of what is a whole one."""
    if kind not in (int, float):
        raise space_error(path, "is not a number, so it cannot have a range; give 'choices'")
    if kind is not int:
        return
    for value in (parameter.low, parameter.step or 1):
        if value != int(value or 0):
            raise space_error(
                path, "is a whole number, so 'low', 'high' and 'step' must be whole too"
            )


def _refuse_invalid_combinations(
    space: SearchSpace, candidate: MakeCandidate, field_type: FieldType
) -> None:
    """Draws combinations of values from anywhere in the space: each value alone may be right
    and two of them not."""
    random = Random(0)  # noqa: S311 (nothing secret)
    integer = {path: field_type(path) is int for path in space.asked}

    def draw(path: str) -> Any:
        return space.parameters[path].draw(random, integer=integer[path])

    for _ in range(_COMBINATIONS):
        values = space.values(draw)
        try:
            candidate(values)
        except KeyError as error:
            paths = ", ".join(values)
            raise space_error(paths, f"do not go together: {error.args[0]}") from None
        except ValidationError as error:
            shown = ", ".join(f"{path} = {shorten(value)}" for path, value in values.items())
            problem = f"is not a valid combination: {explain_first(error)}"
            raise space_error(shown, problem) from None


def is_in(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a value is one that the distribution can give."""
    try:
        return distribution._contains(float(distribution.to_internal_repr(value)))
    except (TypeError, ValueError, OverflowError):
        return False


def shown(distribution: BaseDistribution) -> str:
    """What a distribution can give, for people."""
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(shorten(str(choice)) for choice in distribution.choices)
    if isinstance(distribution, IntDistribution | FloatDistribution):
        return f"{distribution.low:g} to {distribution.high:g}"
    return repr(distribution)
