"""What may vary: parameters by dotted path, and their translation to Optuna's distributions."""

import math
from collections.abc import Mapping
from random import Random
from typing import Annotated, Any, Self

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from slimfront.search.config.paths import joined, parts, spelt
from slimfront.search.config.yaml_files import write_value
from slimfront.trainables.errors import shorten
from slimfront.trainables.options import Options
from slimfront.trainables.penalties import PENALTIES

Scalar = bool | int | float | str
Tree = Mapping[str, Any]
"""A config, or a section of one, as YAML has it: mappings within mappings."""

_MOST_STEPS = 1_000_000_000
"""A range with more steps is as good as one without; Optuna's arithmetic of steps breaks far
beyond."""


Choice = Scalar | None | dict[str, JsonValue] | list[JsonValue]
"""One of several choices: a value, or a whole section of the config."""


def _as_list(value: object) -> object:
    """A single value as a list of one; a mapping is left to pydantic."""
    if isinstance(value, list | tuple | Mapping):
        return value
    return (value,)


Allowed = Annotated[tuple[Scalar | None, ...], BeforeValidator(_as_list)]
"""The values of a condition: a list, or just one."""


OWN_RANGE = "auto"
"""In place of a range: that which the option has of its own."""
_HAVE_ONE = "penalties.NAME.strength and sparsifier.sparsity"


class Parameter(Options):
    """One value that varies: a range `low` … `high` (both included), optionally `log` or in steps
    of `step`; or `choices`, of values or of whole sections; or `same_as` the value at another path,
    times `factor`.

    With `when` it varies only where each path that is named there has one of the values.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    step: int | float | None = None
    choices: tuple[Choice, ...] | None = None
    same_as: Annotated[str, AfterValidator(spelt)] | None = None
    factor: int | float = 1
    when: dict[Annotated[str, AfterValidator(spelt)], Allowed] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.same_as is not None:
            self._refuse_same_as()
        elif self.factor != 1:
            raise ValueError("'factor' goes together with 'same_as' alone")
        elif self.choices is not None:
            self._refuse_choices(self.choices)
        elif self.low is None or self.high is None:
            raise ValueError("it needs 'low' and 'high', or 'choices'")
        else:
            self._refuse_range(self.low, self.high)
        return self

    def _refuse_same_as(self) -> None:
        others = (self.low, self.high, self.step, self.choices)
        if self.log or any(other is not None for other in others):
            raise ValueError(
                "'same_as' does not go together with 'low', 'high', 'log', 'step' or 'choices'"
            )
        if self.factor == 0:
            raise ValueError("with factor: 0 it would always be 0; set it in its own section")

    def _refuse_choices(self, choices: tuple[Choice, ...]) -> None:
        if not choices:
            raise ValueError("'choices' is empty; it needs at least one value")
        others = (self.low, self.high, self.step)
        if self.log or any(other is not None for other in others):
            raise ValueError("'choices' does not go together with 'low', 'high', 'log' or 'step'")

    def _refuse_range(self, low: float, high: float) -> None:
        if low > high:
            raise ValueError(f"low ({low}) is greater than high ({high})")
        if self.log and low <= 0:
            raise ValueError(f"with log: true, low must be above 0, and it is {low}")
        if self.step is None:
            return
        if self.log:
            raise ValueError("'log' and 'step' do not go together")
        if self.step <= 0:
            raise ValueError(f"step must be above 0, and it is {self.step}")
        steps = (high - low) / self.step
        if steps > _MOST_STEPS:
            raise ValueError(
                f"step ({self.step}) is too small: the range has more than {_MOST_STEPS:,} of "
                "them; leave it out"
            )
        if not math.isclose(steps, round(steps), abs_tol=1e-9):
            raise ValueError(f"steps of {self.step} from low ({low}) do not end at high ({high})")

    def ends(self) -> tuple[Choice, ...]:
        """The values to check against the config's schema: both ends of a range, or all choices;
        none of its own where it is the same as another."""
        if self.same_as is not None:
            return ()
        if self.choices is not None:
            return self.choices
        return (self.low, self.high)

    def recorded(self, value: Any) -> Any:
        """A value as a trial has it: Optuna and MLflow take no sections, so that one is written as
        text, in YAML on one line."""
        if isinstance(value, Mapping | list | tuple):
            return write_value(value)
        return value

    def meant(self, recorded: Any) -> Any:
        """What goes into the config for a value that `recorded` gave."""
        for choice in self.choices or ():
            if not isinstance(choice, dict | list):
                continue
            if write_value(choice) == recorded:
                return choice
        return recorded

    def following(self, value: Any) -> Any:
        """Its value where the one that it is the same as has this one; raises ValueError if that is
        no number and there is a factor."""
        if self.factor == 1:
            return value
        is_truth = isinstance(value, bool)
        is_number = isinstance(value, int | float)
        if is_truth or not is_number:
            shown = shorten(repr(value))
            raise ValueError(f"has a factor, and {shown} is no number")
        product = value * self.factor
        if isinstance(value, int) and product == int(product):
            return int(product)
        return product

    def draw(self, random: Random, *, integer: bool) -> Any:
        """A value from anywhere in the parameter, for checking."""
        if self.choices is not None:
            choice = random.choice(self.choices)
            return self.recorded(choice)
        low, high = self._bounds()
        if self.log:
            least = math.log(low)
            most = math.log(high)
            exponent = random.uniform(least, most)
            value = math.exp(exponent)
            if integer:
                return round(value)
            return min(max(value, low), high)
        if not integer and self.step is None:
            return random.uniform(low, high)
        step = self.step or 1
        span = high - low
        steps = int(span / step + 1e-9)
        chosen = random.randint(0, steps)
        value = low + step * chosen
        if integer:
            return int(value)
        return value

    def distribution(self, *, integer: bool) -> BaseDistribution:
        """Optuna's distribution; `integer` says that the value lands in an integer field."""
        if self.choices is not None:
            choices = list(map(self.recorded, self.choices))
            return CategoricalDistribution(choices)
        low, high = self._bounds()
        log = self.log
        if integer:
            step = self.step or 1
            return IntDistribution(int(low), int(high), log=log, step=int(step))
        return FloatDistribution(float(low), float(high), log=log, step=self.step)

    def _bounds(self) -> tuple[float, float]:
        """Both ends of a range."""
        # _consistent checked.
        assert self.low is not None and self.high is not None
        return self.low, self.high


def set_path(tree: Tree, path: str, value: object) -> dict[str, Any]:
    """A copy of nested mappings with `value` at a dotted path; missing or empty levels are made on
    the way.

    Raises:
        KeyError: if it is no path, or leads through something that is not a mapping.
    """
    keys = parts(path)
    return _set(tree, keys, value)


def _set(tree: Tree, keys: tuple[str, ...], value: object) -> dict[str, Any]:
    head, *others = keys
    rest = tuple(others)
    copy = dict(tree)
    if not rest:
        copy[head] = value
        return copy
    inside = copy.get(head)
    if inside is None:
        inside = {}
    if not isinstance(inside, Mapping):
        shown = shorten(repr(inside))
        raise KeyError(f"'{head}' is {shown}, which has no '{joined(rest)}'")
    copy[head] = _set(inside, rest, value)
    return copy


def set_paths(tree: Tree, values: Mapping[str, object]) -> dict[str, Any]:
    """`set_path` for several paths, whole sections before what is in them."""

    result = dict(tree)
    for path in sorted(values, key=_depth):
        value = values[path]
        result = set_path(result, path, value)
    return result


def _depth(path: str) -> int:
    keys = parts(path)
    return len(keys)


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested mappings as one, keyed by dotted path; an empty mapping is a value."""
    return _flatten(tree, ())


def _flatten(tree: Tree, above: tuple[str, ...]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        keys = (*above, str(name))
        if isinstance(value, Mapping) and value:
            inside = _flatten(value, keys)
            flat |= inside
        else:
            path = joined(keys)
            flat[path] = value
    return flat


def with_own_ranges(space: Mapping[Any, Any], sections: Tree) -> dict[Any, Any]:
    """A space as it is written, with the range of each option that is `auto`.

    Args:
        sections: of the config, read before.

    Raises:
        ValueError: for a path without such a range.
    """
    found = dict(space)
    for path, parameter in space.items():
        if parameter == OWN_RANGE and isinstance(path, str):
            try:
                _refuse_varied_units(path, space)
                found[path] = _own_range(path, sections)
            except ValueError as error:
                raise ValueError(f"'{path}' is auto, and {error}") from None
    return found


def _refuse_varied_units(path: str, space: Mapping[Any, Any]) -> None:
    """Raises ValueError where what the range depends on varies itself."""
    outer, _, _ = path.rpartition(".")
    unit = f"{outer}.relative"
    if unit in space:
        raise ValueError(
            f"its range depends on {unit}, which varies too; set that outside of space"
        )


def _own_range(path: str, sections: Tree) -> dict[str, float | bool]:
    """That of the option at a path. Raises ValueError if there is none."""
    *outer, name = parts(path)
    holder: Any = sections
    if outer[:1] == ["penalties"] and len(outer) > 1:
        penalty = outer[1]
        if penalty not in sections.get("penalties", {}):
            holder = {"penalties": {penalty: PENALTIES.find(penalty)()}}
    for key in outer:
        if isinstance(holder, Options):
            holder = getattr(holder, key, None)
        elif isinstance(holder, Mapping):
            holder = holder.get(key)
    if holder is None:
        missing = joined(tuple(outer))
        raise ValueError(f"the config has no {missing}, which would say that range; add it")
    own = None
    if isinstance(holder, Options):
        own = holder.range_of(name)
    if own is None:
        raise ValueError(
            f"it has no range of its own; give low and high. What has one: {_HAVE_ONE}"
        )
    return own
