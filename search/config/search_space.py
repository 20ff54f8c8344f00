"""What depends on what in a space: values that vary only under a condition, and values that are the
same as another one's."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pydantic_core import PydanticCustomError

from slimfront.search.config.paths import is_inside, parts, spelt
from slimfront.search.config.space import Parameter
from slimfront.trainables.errors import shorten
from slimfront.trainables.options import suggest

Conditions = dict[str, tuple[Any, ...]]
"""By path: the values, as a trial records them, of which it must have one."""
Values = Mapping[str, Any]
"""The values of a candidate by path, as a trial records them."""
Parameters = Mapping[str, Parameter]
"""A space: what varies, by path."""
Choices = Mapping[str, Sequence[Any] | None]
"""All values of each path; None where they are without number."""


class SearchSpace:
    """The parameters of a space in an order in which each can be given its value.

    Values here are as a trial records them (see `Parameter.recorded`).

    Raises:
        PydanticCustomError: for a `when` or `same_as` over what does not vary, a `when` that can
            never hold, and a circle of them.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.conditions: dict[str, Conditions] = {}
        for path in parameters:
            self.conditions[path] = _conditions(path, parameters)
        self.order = _order(parameters, self.conditions)
        self._needs: dict[str, Conditions] = {}
        for path in self.order:
            self._needs[path] = self._all_conditions(path)

    @property
    def conditional(self) -> bool:
        """Whether some values vary only under a condition."""
        return any(self.conditions.values())

    @property
    def asked(self) -> list[str]:
        """The paths whose values the sampler proposes, in the order in which it is asked."""
        found = []
        for path in self.order:
            parameter = self.parameters[path]
            if parameter.same_as is None:
                found.append(path)
        return found

    def applies(self, path: str, values: Values) -> bool:
        """Whether a path varies beside these values of others."""
        followed = self.parameters[path].same_as
        if followed is not None and followed not in values:
            return False
        return self.allows(path, values)

    def allows(self, path: str, values: Values) -> bool:
        """Whether the conditions of a path hold."""
        conditions = self.conditions[path]
        for source, allowed in conditions.items():
            if source not in values:
                return False
            if not _among(values[source], allowed):
                return False
        return True

    def values(self, choose: Callable[[str], Any]) -> dict[str, Any]:
        """The values of one candidate, in the order of the config: `choose` gives that of each path
        which is asked for, and others follow."""
        found: dict[str, Any] = {}
        for path in self.order:
            if not self.applies(path, found):
                continue
            parameter = self.parameters[path]
            followed = parameter.same_as
            if followed is None:
                found[path] = choose(path)
                continue
            value = found[followed]
            found[path] = parameter.following(value)
        in_order = {}
        for path in self.parameters:
            if path in found:
                in_order[path] = found[path]
        return in_order

    def combinations(self, options: Choices, most: int) -> list[dict[str, Any]] | None:
        """The values of all candidates that there are; None if they are more than `most`."""
        found: list[dict[str, Any]] = [{}]
        for path in self.order:
            longer: list[dict[str, Any]] = []
            for values in found:
                for added in self._next(path, values, options):
                    if added is None:
                        return None
                    if len(longer) == most:
                        return None
                    longer.append(values | added)
            found = longer
        return found

    def _next(self, path: str, values: Values, options: Choices) -> Iterator[dict[str, Any] | None]:
        """What a path adds to values of those before it: each of its own, or nothing where it does
        not apply; None where they are without number."""
        if not self.applies(path, values):
            yield {}
            return
        parameter = self.parameters[path]
        followed = parameter.same_as
        if followed is not None:
            yield {path: parameter.following(values[followed])}
            return
        known = options[path]
        if known is None:
            yield None
            return
        for value in known:
            yield {path: value}

    def ends(self, path: str) -> tuple[Any, ...]:
        """The values of a path to check, as they stand in a config."""
        parameter = self.parameters[path]
        if parameter.same_as is None:
            return parameter.ends()
        followed = self.ends(parameter.same_as)
        own = map(parameter.following, followed)
        return tuple(own)

    def where(self, values: Values) -> dict[str, Any]:
        """These values beside such of others that all of them apply; of two that exclude each
        other, the later one stays."""
        whole: dict[str, Any] = {}
        for path, value in values.items():
            needs = self._needs[path]
            for source, allowed in needs.items():
                whole[source] = allowed[0]
            parameter = self.parameters[path]
            whole[path] = parameter.recorded(value)
        allowed_together = {}
        for path, value in whole.items():
            if self.allows(path, whole):
                allowed_together[path] = value
        return allowed_together

    def beside(self, values: Values, paths: Iterable[str]) -> dict[str, Any]:
        """`where`, with a value of each other of these paths that applies then: no trial is without
        one."""
        whole = self.where(values)
        wanted = set(paths)
        for path in self.order:
            if path in whole or path not in wanted or not self.applies(path, whole):
                continue
            parameter = self.parameters[path]
            followed = parameter.same_as
            if followed is not None:
                whole[path] = parameter.following(whole[followed])
            else:
                whole[path] = parameter.recorded(parameter.ends()[0])
        return whole

    def wheres(self, path: str, value: Any) -> Iterator[dict[str, Any]]:
        """`where`, for each value of the others under which the path varies."""
        first = self.where({path: value})
        yield first
        needs = self._needs[path]
        for source, allowed in needs.items():
            _, *others = allowed
            for other in others:
                yield first | {source: other}

    def recorded(self, values: Values) -> dict[str, Any]:
        """Values that a person wrote, as a trial records them. Raises ValueError for what is no
        path."""
        found = {}
        for given, value in values.items():
            path = spelt(given)
            parameter = self.parameters.get(path)
            if parameter is not None:
                value = parameter.recorded(value)
            found[path] = value
        return found

    def _all_conditions(self, path: str) -> Conditions:
        """Its conditions and those of all that they are over; called in order, so that theirs are
        known."""
        found = dict(self.conditions[path])
        over = list(found)
        followed = self.parameters[path].same_as
        if followed is not None:
            over.append(followed)
        for other in over:
            for source, allowed in self._needs[other].items():
                both = _narrowed(found, source, allowed)
                if not both:
                    raise space_error(
                        path,
                        f"can never vary: its 'when' and that of '{other}' need different values "
                        f"of '{source}'",
                    )
                found[source] = both
        return found


def _narrowed(found: Conditions, source: str, allowed: Sequence[Any]) -> tuple[Any, ...]:
    """The allowed values that what is known of a path allows as well."""
    before = found.get(source, allowed)
    both = [value for value in before if _among(value, allowed)]
    return tuple(both)


def _order(parameters: Parameters, conditions: Mapping[str, Conditions]) -> list[str]:
    """The paths, each behind those that it follows or has a condition over."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for path, parameter in parameters.items():
        sorter.add(path, *conditions[path])
        followed = parameter.same_as
        if followed is None:
            continue
        if followed not in parameters:
            raise space_error(
                path,
                f"is the same as '{shorten(followed)}', which does not vary; "
                f"{suggest(followed, parameters)}",
            )
        sorter.add(path, followed)
    try:
        return list(sorter.static_order())
    except CycleError as error:
        _, circle = error.args
        backwards = [str(path) for path in reversed(circle)]
        way = " -> ".join(backwards)
        raise space_error(
            backwards[0],
            f"depends on itself, by 'same_as' or 'when': {way}; give one of them "
            "a range or choices without a condition",
        ) from None


def _conditions(path: str, parameters: Parameters) -> Conditions:
    """The conditions of a path, over paths of the space."""
    found: Conditions = {}
    for on, values in parameters[path].when.items():
        source = _source(path, on, parameters)
        if not values:
            raise space_error(path, f"can never vary: its 'when' lists no value of '{on}'")
        parameter = parameters[source]
        allowed = []
        for value in values:
            allowed += _giving(path, (on, source), value, parameter)
        both = _narrowed(found, source, allowed)
        if not both:
            raise space_error(
                path, f"can never vary: no choice of '{source}' is all that its 'when' says"
            )
        found[source] = both
    return found


def _source(path: str, on: str, parameters: Parameters) -> str:
    """The path of the space that decides on the value at `on`: itself, or a section around it."""
    if on in parameters:
        followed = parameters[on].same_as
        if followed is not None:
            raise space_error(
                path, f"has a 'when' over '{on}', which is the same as '{followed}'; name that"
            )
        return on
    for other, parameter in parameters.items():
        if parameter.choices is not None and is_inside(on, other):
            return other
    raise space_error(
        path, f"has a 'when' over '{shorten(on)}', which does not vary; {suggest(on, parameters)}"
    )


def _giving(path: str, over: tuple[str, str], value: Any, parameter: Parameter) -> list[Any]:
    """The values of a parameter, as recorded, that give `value` at the path of a condition, which
    is the parameter's own or one inside of its sections."""
    on, source = over
    if parameter.choices is None:
        _refuse_outside(path, on, value, parameter)
        return [value]
    above = len(parts(source))
    keys = parts(on)[above:]
    found = []
    given: dict[str, None] = {}
    for choice in parameter.choices:
        inside = _value_in(choice, keys)
        shown = shorten(repr(inside))
        given[shown] = None
        if _among(inside, (value,)):
            recorded = parameter.recorded(choice)
            found.append(recorded)
    if not found:
        what_it_can_be = ", ".join(given)
        raise _never(path, on, value, what_it_can_be)
    return found


def _refuse_outside(path: str, on: str, value: Any, parameter: Parameter) -> None:
    """Raises an error for a value that a range never has."""
    low = parameter.low
    high = parameter.high
    assert low is not None and high is not None
    is_truth = isinstance(value, bool)
    is_number = isinstance(value, int | float) and not is_truth
    if is_number and low <= value <= high:
        return
    raise _never(path, on, value, f"{low} to {high}")


def _never(path: str, on: str, value: Any, what_it_can_be: str) -> PydanticCustomError:
    never = shorten(repr(value))
    return space_error(
        path,
        f"has a 'when' that can never hold: '{on}' is never {never}, only {what_it_can_be}",
    )


def _value_in(choice: Any, keys: tuple[str, ...]) -> Any:
    """The value within a chosen section; None if there is none. A section that is only named is
    `{name: …}`."""
    if keys and isinstance(choice, str):
        choice = {"name": choice}
    for key in keys:
        if not isinstance(choice, Mapping):
            return None
        choice = choice.get(key)
    return choice


def _among(value: Any, allowed: Sequence[Any]) -> bool:
    """Whether a value is one of those; true is not 1."""
    is_truth = isinstance(value, bool)
    same_kind = []
    for other in allowed:
        if isinstance(other, bool) == is_truth:
            same_kind.append(other)
    return value in same_kind


def space_error(path: str, problem: str) -> PydanticCustomError:
    """An error about a path of the space, which `explain` tells as it is."""
    context = {"path": path, "problem": problem}
    return PydanticCustomError("space", "space '{path}': {problem}", context)
