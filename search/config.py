"""The typed schema of a config; loads it, checks it, and explains in one sentence what is wrong."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Self

import yaml
from optuna.distributions import BaseDistribution
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from search.objectives import OBJECTIVES, Constraint, Objective
from search.settings import Resources, SearchOptions, Tracking, without_password
from search.space import Parameter, set_path, set_paths
from search.storage import is_bucket
from trainables.candidate import Candidate
from trainables.errors import UserError
from trainables.measures import EXTRA_MEASURES
from trainables.options import Options, suggest
from trainables.penalties import Penalty

if TYPE_CHECKING:
    from search.records import TrialRecord

_COMBINATIONS = 100
"""How many combinations of a space are checked before a search."""


class Config(Candidate):
    """A search: a candidate, what varies in it, what is judged, and how the search is run."""

    name: str
    space: dict[str, Parameter]
    objectives: tuple[str, ...]
    constraints: dict[str, str] = Field(default_factory=dict)
    search: SearchOptions = SearchOptions()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()

    @field_validator("name")
    @classmethod
    def _name_fits_a_directory(cls, name: str) -> str:
        if not re.fullmatch(_NAME, name):
            raise ValueError(_BAD_NAME.format(name=name))
        return name

    @field_validator("space")
    @classmethod
    def _something_varies(cls, space: dict[str, Parameter]) -> dict[str, Parameter]:
        if not space:
            raise ValueError("nothing varies; give at least one path with 'low' and 'high', or 'choices'")
        return space

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in OBJECTIVES:
                raise ValueError(f"unknown objective '{name}'; {suggest(name, OBJECTIVES)}")
        if len(set(names)) < len(names):
            raise ValueError(f"an objective is named twice in {list(names)}")
        if len(names) < 2:
            raise ValueError(f"a front needs two or more objectives, and there is {len(names)}; known: {', '.join(OBJECTIVES)}")
        return names

    @field_validator("constraints")
    @classmethod
    def _bounds_on_measures(cls, constraints: dict[str, str]) -> dict[str, str]:
        for name, text in constraints.items():
            Constraint.parse(name, text)
        return constraints

    @model_validator(mode="after")
    def _databases_are_two(self) -> Self:
        if self.search.storage is not None and without_password(self.search.storage) == self.tracking.shown_uri():
            raise ValueError(
                "search.storage and tracking.uri are the same database; give each one of its own, since Optuna and MLflow keep "
                "their versions in a table of the same name"
            )
        return self

    @model_validator(mode="after")
    def _a_bucket_needs_a_database(self) -> Self:
        if is_bucket(self.search.storage_path) and self.search.storage is None:
            raise ValueError(
                "search.storage_path is a bucket, which cannot keep Optuna's study; set search.storage to a database, such as "
                "postgresql+psycopg://USER@HOST/optuna"
            )
        return self

    @model_validator(mode="after")
    def _starts_are_in_the_space(self) -> Self:
        if isinstance(self.search.start_from, str):
            return self
        for number, values in enumerate(self.search.start_from):
            for path, value in values.items():
                if path not in self.space:
                    raise ValueError(f"search.start_from[{number}]: '{path}' does not vary; {suggest(path, self.space)}")
                if not self.distributions()[path]._contains(_internal(self.distributions()[path], value)):
                    raise ValueError(f"search.start_from[{number}]: {value!r} is outside of what '{path}' varies in")
        return self

    @model_validator(mode="after")
    def _space_fits_the_candidate(self) -> Self:
        for path, parameter in self.space.items():
            if path.startswith("data") and not path.startswith("data.augment."):
                raise _space_error(path, "would give trials data that cannot be compared; of 'data' only 'data.augment' may vary")
            inside = next((other for other in self.space if other.startswith(f"{path}.")), None)
            if inside:
                raise _space_error(path, f"also holds '{inside}', which varies too; vary one of the two")
            for value in parameter.ends():
                try:
                    self.candidate({path: value})
                except KeyError as error:
                    raise _space_error(path, f"names nothing: {error.args[0]}") from None
                except ValidationError as error:
                    raise _space_error(path, explain_first(error, inside=path)) from None
        for path, parameter in self.space.items():
            kind = self._field_type(path)
            if parameter.choices is None and kind not in (int, float):
                raise _space_error(path, "is not a number, so it cannot have a range; give 'choices'")
            if parameter.choices is None and kind is int and any(v != int(v or 0) for v in (parameter.low, parameter.step or 1)):
                raise _space_error(path, "is a whole number, so 'low', 'high' and 'step' must be whole too")
        self._refuse_invalid_combinations()
        return self

    def _refuse_invalid_combinations(self) -> None:
        """Draws combinations of values from anywhere in the space: each value alone may be right and two of them not."""
        random = Random(0)  # noqa: S311 (nothing secret)
        integer = {path: self._field_type(path) is int for path in self.space}
        for _ in range(_COMBINATIONS):
            values = {path: p.draw(random, integer=integer[path]) for path, p in self.space.items()}
            try:
                self.candidate(values)
            except KeyError as error:
                raise _space_error(", ".join(values), f"do not go together: {error.args[0]}") from None
            except ValidationError as error:
                shown = ", ".join(f"{path} = {value}" for path, value in values.items())
                raise _space_error(shown, f"is not a valid combination: {explain_first(error)}") from None

    def candidate(self, values: Mapping[str, object]) -> Candidate:
        """The candidate with these values by dotted path put in.

        Raises:
            KeyError: a path leads through something without parts.
            ValidationError: a path names nothing, or its value is out of range.
        """
        base = {name: getattr(self, name) for name in Candidate.model_fields}
        plain = Candidate.model_construct(**base).model_dump(mode="json")
        for path in values:
            if path.partition(".")[0] not in Candidate.model_fields:
                raise KeyError(f"it is not part of the candidate; {suggest(path.partition('.')[0], Candidate.model_fields)}")
        plain["measures"] = [name for name in EXTRA_MEASURES if name in {*self.measures, *self.objectives, *self.constraints}]
        if any(path.partition(".")[0] == "model" for path in self.space) and plain["latency"]["against"] is None:
            plain["latency"]["against"] = plain["model"]  # every trial's speed-up is against the same network
        return Candidate.model_validate(set_paths(plain, values))

    def varied_penalties(self) -> dict[str, Penalty]:
        """The penalties of the candidate and those that the space switches on."""
        found: dict[str, Penalty] = {}
        for path, parameter in self.space.items():
            if path.startswith("penalties."):
                found |= self.candidate({path: parameter.ends()[-1]}).penalties
        return found | self.penalties

    def varied_sparsifiers(self) -> list[Candidate]:
        """The candidate at its highest sparsity, and it with each end of the range of each other value of its sparsifier."""
        ranges = {path: p.ends() for path, p in self.space.items() if path.startswith("sparsifier.")}
        sparsest = {path: ends[-1] for path, ends in ranges.items() if path == "sparsifier.sparsity"}
        return [self.candidate(sparsest)] + [self.candidate(sparsest | {p: end}) for p, ends in ranges.items() for end in ends]

    def rehearsed(self) -> list[Candidate]:
        """What is tried before a search: `varied_sparsifiers`, every architecture, and the ends of batch sizes."""
        found = self.varied_sparsifiers()
        for path, parameter in self.space.items():
            if path == "model" or path.startswith("model.") or path == "training.batch_size":
                values = parameter.choices if parameter.choices is not None else parameter.ends()
                found += [self.candidate({path: value}) for value in values]
        return list({candidate.model_dump_json(): candidate for candidate in found}.values())

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions of the space, by dotted path."""
        return {path: p.distribution(integer=self._field_type(path) is int) for path, p in self.space.items()}

    def chosen_objectives(self) -> list[Objective]:
        """The objectives, in the order of the config."""
        return [OBJECTIVES[name] for name in self.objectives]

    def chosen_constraints(self) -> list[Constraint]:
        """The constraints, in the order of the config."""
        return [Constraint.parse(name, text) for name, text in self.constraints.items()]

    def ships_int8(self, trial: "TrialRecord") -> bool:
        """Whether a trial's networks ship, and were measured, as int8; the dense reference never does."""
        return trial.number is not None and bool(trial.values.get("int8", self.int8))

    def grace(self) -> float:
        """Epochs before the first rung."""
        stopping = self.search.early_stopping
        return max(3 * self.training.epochs // 10, 1) if stopping is None or stopping.grace == "auto" else stopping.grace

    def _field_type(self, path: str) -> object:
        """int or float for the field at a dotted path, None for another type.

        As the field is annotated, or, among the free arguments of a factory, as the ends of its range are written.
        """
        target: Any = self.candidate({path: self.space[path].ends()[0]})
        *parents, last = path.split(".")
        for name in parents:
            target = target[name] if isinstance(target, Mapping) else getattr(target, name)
        if not isinstance(target, Options):
            return int if all(isinstance(end, int) for end in self.space[path].ends()) else float
        annotation = type(target).model_fields[last].annotation
        options = getattr(annotation, "__args__", (annotation,))  # int | None counts as int
        return next((kind for kind in (int, float) if kind in options), None)


_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_BAD_NAME = "'{name}' cannot name a directory; use up to 100 letters, digits, '.', '_' and '-'"


def check_name(name: str) -> None:
    """Raises UserError if a search cannot be called so."""
    if not re.fullmatch(_NAME, name):
        raise UserError(f"--name: {_BAD_NAME.format(name=name)}")


def _internal(distribution: BaseDistribution, value: Any) -> float:
    try:
        return float(distribution.to_internal_repr(value))
    except (TypeError, ValueError):
        return math.nan


def _space_error(path: str, problem: str) -> PydanticCustomError:
    return PydanticCustomError("space", "space '{path}': {problem}", {"path": path, "problem": problem})


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where it matters: 1e-3 is a number, and a key may not stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a config.

    Args:
        path: a YAML file.
        overrides: `dotted.path=value` each, the value as YAML; they replace what the file says.

    Raises:
        UserError: one sentence that says what is wrong, where, and what would be right.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the config {path}: {reason}") from None
    raw = _parse_yaml(text, str(path))
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}: a config is a mapping of keys to values, and this is {type(raw).__name__}")
    tree: dict[str, Any] = dict(raw)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override}: it needs the form path=value, such as training.epochs=5")
        try:
            tree = _override(tree, key, _parse_yaml(value, f"--set {override}"))
        except KeyError as error:
            raise UserError(f"--set {override}: {error.args[0]}") from None
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None


def _override(tree: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """`set_path`, where what follows `space.` is first looked for among the paths that the space already has."""
    space = tree.get("space")
    if key.startswith("space.") and isinstance(space, Mapping):
        for path in space:
            if key == f"space.{path}":
                return tree | {"space": {**space, path: value}}
            if key.startswith(f"space.{path}."):
                return tree | {"space": {**space, path: set_path(space[path], key.removeprefix(f"space.{path}."), value)}}
        return tree | {"space": {**space, key.removeprefix("space."): value}}
    return set_path(tree, key, value)


def as_plain(config: Config) -> dict[str, Any]:
    """The resolved config as plain data, without the passwords in its URIs: what may be recorded and printed."""
    plain = config.model_dump(mode="json")
    for section, key in (("tracking", "uri"), ("search", "storage")):
        uri = plain[section][key]
        if uri and "@" in uri:
            plain[section][key] = without_password(uri)
    return plain


def dump(config: Config) -> str:
    """The resolved config as YAML that `load` reads back to an equal config, but for passwords in URIs."""
    plain = as_plain(config)
    plain["space"] = {path: p.model_dump(mode="json", exclude_unset=True) for path, p in config.space.items()}
    order = ["name", *Candidate.model_fields, "space", "objectives", "constraints", "search", "resources", "tracking"]
    return yaml.safe_dump({key: plain[key] for key in order}, sort_keys=False, allow_unicode=True)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: this is not YAML: {getattr(error, 'problem', None) or error}") from None


def _explain(error: ValidationError) -> str:
    more = error.error_count() - 1
    return explain_first(error) + (f" (and {more} more)" if more else "")


def explain_first(error: ValidationError | KeyError, inside: str = "") -> str:
    """The first problem as a clause: where, what, and what would be right. Where is left out if it is `inside`."""
    if isinstance(error, KeyError):
        return str(error.args[0])
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    if len(parts) > 1 and (parts[-1] in _UNION_TAGS or parts[-1].startswith("literal[")):
        parts.pop()
    where = ".".join(parts)
    message = first["msg"].removeprefix("Value error, ").replace("valid dictionary", "mapping of keys to values")
    message = re.sub(r" or instance of \w+", "", message)
    message = message[:1].lower() + message[1:]
    if first["type"] == "missing":
        return f"'{where}' is missing"
    if first["type"] not in _COMPLETE:
        message = re.sub("^input should", "it should", message)
        got = first["input"]
        message += f", and it is {got!r}" if isinstance(got, str | int | float | bool | None) else ""
    if where in ("", inside) or first["type"] == "space":
        return message
    return f"in '{where}': {message}" if first["type"].startswith("unknown_") else f"'{where}': {message}"


_UNION_TAGS = ("int", "float", "bool", "str")
"""What pydantic adds to the location of a value that fits no member of a union."""

_COMPLETE = ("unknown_key", "unknown_name", "no_name", "space", "value_error")
"""Our own messages, which name the value where that helps."""
