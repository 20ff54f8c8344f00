"""The typed schema of a config; loads it, checks it, and explains in one sentence what is wrong."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Self

from optuna.distributions import BaseDistribution
from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from slimfront.search.config.explain import explain, explain_first
from slimfront.search.config.idle import idle
from slimfront.search.config.names import BAD_NAME, is_bucket, is_name
from slimfront.search.config.objectives import Constraint, Objective, known_objectives
from slimfront.search.config.settings import Resources, SearchOptions, Tracking
from slimfront.search.config.space import Parameter, flatten, set_path, set_paths
from slimfront.search.config.yaml_files import GIVEN, RECORDED, Limits, parse, read_text, write
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import UserError, one_line, shorten
from slimfront.trainables.measures.measure import EXTRA_MEASURES
from slimfront.trainables.measures.own import OwnMeasure
from slimfront.trainables.models import Model
from slimfront.trainables.options import Options, suggest
from slimfront.trainables.penalties import Penalty
from slimfront.trainables.redaction import redact_values, without_secrets
from slimfront.trainables.tasks import Classification

_COMBINATIONS = 100
"""How many combinations of a space are checked before a search."""

_MOST_ENDS = 1000
"""Each end of a range and each choice is checked, in about half a millisecond."""


class Config(Candidate):
    """A search: a candidate, what varies in it, what is judged, and how the search is run."""

    name: str
    space: dict[str, Parameter]
    objectives: tuple[str, ...] = Field(None, validate_default=True)
    """Left out: the quality of the task, and the non-zero parameters."""
    constraints: dict[str, str] = Field(default_factory=dict)
    search: SearchOptions = SearchOptions()
    resources: Resources = Resources()
    tracking: Tracking = Field(default_factory=Tracking)

    @field_validator("name")
    @classmethod
    def _name_fits_a_directory(cls, name: str) -> str:
        if not is_name(name):
            raise ValueError(BAD_NAME.format(name=shorten(name)))
        return name

    @field_validator("space")
    @classmethod
    def _something_varies(cls, space: dict[str, Parameter]) -> dict[str, Parameter]:
        if not space:
            raise ValueError(
                "nothing varies; give at least one path with 'low' and 'high', or 'choices'"
            )
        ends = sum(len(parameter.ends()) for parameter in space.values())
        if ends > _MOST_ENDS:
            raise ValueError(
                f"it has {ends:,} choices and ends of ranges, each of which is checked; at most "
                f"{_MOST_ENDS:,} can be"
            )
        return space

    @field_validator("objectives", mode="before")
    @classmethod
    def _quality_and_size(cls, names: Any, info: ValidationInfo) -> Any:
        if names is not None or "task" not in info.data:
            return names
        return (f"val_{info.data['task'].described()[0].name}", "nonzero_params")

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known = _known(info.data)
        for name in names:
            if name not in known:
                raise ValueError(f"unknown objective '{name}'; {suggest(name, known)}")
        if len(set(names)) < len(names):
            raise ValueError(f"an objective is named twice in {list(names)}")
        if len(names) < 2:
            raise ValueError(
                f"a front needs two or more objectives, and there is {len(names)}; known: "
                f"{', '.join(known)}"
            )
        return names

    @field_validator("constraints")
    @classmethod
    def _bounds_on_measures(
        cls, constraints: dict[str, str], info: ValidationInfo
    ) -> dict[str, str]:
        for name, text in constraints.items():
            Constraint.parse(name, text, _known(info.data))
        return constraints

    @model_validator(mode="after")
    def _databases_are_two(self) -> Self:
        storage = self.search.storage
        if storage is not None and without_secrets(storage) == self.tracking.shown_uri():
            raise ValueError(
                "search.storage and tracking.uri are the same database; give each one of its own, "
                "since Optuna and MLflow keep their versions in a table of the same name"
            )
        return self

    @model_validator(mode="after")
    def _a_bucket_needs_a_database(self) -> Self:
        if is_bucket(self.search.storage_path) and self.search.storage is None:
            raise ValueError(
                "search.storage_path is a bucket, which cannot keep Optuna's study; set "
                "search.storage to a database, such as postgresql+psycopg://USER@HOST/optuna"
            )
        return self

    @model_validator(mode="after")
    def _space_fits_the_candidate(self) -> Self:
        for path, parameter in self.space.items():
            self._refuse_path(path)
            self._refuse_ends(path, parameter)
        for path, parameter in self.space.items():
            if parameter.choices is None:
                self._refuse_range(path, parameter)
        self._refuse_invalid_combinations()
        ends = {path: parameter.ends() for path, parameter in self.space.items()}
        for path, problem in idle(ends, self.candidate):
            raise _space_error(path, problem)
        return self

    def _refuse_path(self, path: str) -> None:
        """Raises an error for a path that may not vary, whatever its values are."""
        if path == "task" or path.startswith("task."):
            raise _space_error(
                path, "would give trials that cannot be compared: all are of one task"
            )
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
        for other in self.space:
            if other.startswith(f"{path}."):
                raise _space_error(
                    path, f"also holds '{other}', which varies too; vary one of the two"
                )

    def _refuse_ends(self, path: str, parameter: Parameter) -> None:
        """Raises an error for an end of a range or a choice that makes no candidate."""
        for value in parameter.ends():
            try:
                self.candidate({path: value})
            except KeyError as error:
                raise _space_error(path, f"names nothing: {error.args[0]}") from None
            except ValidationError as error:
                raise _space_error(path, explain_first(error, inside=path)) from None

    def _refuse_range(self, path: str, parameter: Parameter) -> None:
        """Raises an error for a range of what is no number, or in parts of what is a whole one."""
        kind = self._field_type(path)
        if kind not in (int, float):
            raise _space_error(path, "is not a number, so it cannot have a range; give 'choices'")
        if kind is not int:
            return
        for value in (parameter.low, parameter.step or 1):
            if value != int(value or 0):
                raise _space_error(
                    path, "is a whole number, so 'low', 'high' and 'step' must be whole too"
                )

    @model_validator(mode="after")
    def _nothing_secret_varies(self) -> Self:
        varied = [
            (path, value) for path, parameter in self.space.items() for value in parameter.ends()
        ]
        if not isinstance(self.search.start_from, str):
            for start in self.search.start_from:
                varied += start.items()
        for path, value in varied:
            shown = redact_values(value, path.rpartition(".")[2])
            # Not as values: NaN is not equal to itself.
            if repr(shown) != repr(value):
                raise _space_error(
                    path,
                    "varies in secrets, and all values of a trial are recorded; name them without "
                    "a secret",
                )
        return self

    @model_validator(mode="after")
    def _starts_are_in_the_space(self) -> Self:
        """After the space was found right: its distributions are asked for."""
        if isinstance(self.search.start_from, str) or not self.search.start_from:
            return self
        distributions = self.distributions()
        for number, values in enumerate(self.search.start_from):
            for path, value in values.items():
                if path not in self.space:
                    raise ValueError(
                        f"search.start_from[{number}]: '{path}' does not vary; "
                        f"{suggest(path, self.space)}"
                    )
                if not _inside(distributions[path], value):
                    shown = shorten(repr(value))
                    raise ValueError(
                        f"search.start_from[{number}]: {shown} is outside of what "
                        f"'{path}' varies in"
                    )
        return self

    def _refuse_invalid_combinations(self) -> None:
        """Draws combinations of values from anywhere in the space: each value alone may be right
        and two of them not."""
        random = Random(0)  # noqa: S311 (nothing secret)
        integer = {path: self._field_type(path) is int for path in self.space}
        for _ in range(_COMBINATIONS):
            values = {path: p.draw(random, integer=integer[path]) for path, p in self.space.items()}
            try:
                self.candidate(values)
            except KeyError as error:
                raise _space_error(
                    ", ".join(values), f"do not go together: {error.args[0]}"
                ) from None
            except ValidationError as error:
                shown = ", ".join(f"{path} = {shorten(value)}" for path, value in values.items())
                raise _space_error(
                    shown, f"is not a valid combination: {explain_first(error)}"
                ) from None

    def model_of(self, values: Mapping[str, object]) -> Model:
        """The model of the candidate with these values, which builds networks that were stored as
        weights alone."""
        return self.candidate(values).model

    def candidate(self, values: Mapping[str, object]) -> Candidate:
        """The candidate with these values by dotted path put in.

        Raises:
            KeyError: a path leads through something without parts.
            ValidationError: a path names nothing, or its value is out of range.
        """
        base = {name: getattr(self, name) for name in Candidate.model_fields}
        plain = Candidate.model_construct(**base).model_dump(mode="json")
        for path in values:
            part = path.partition(".")[0]
            if part not in Candidate.model_fields:
                known = suggest(part, Candidate.model_fields)
                raise KeyError(f"it is not part of the candidate; {known}")
        wanted = {*self.asked_measures(), *self.objectives, *self.constraints}
        own = [measure.model_dump(mode="json") for measure in self.own_measures()]
        plain["measures"] = [*(name for name in EXTRA_MEASURES if name in wanted), *own]
        model_varies = any(path.partition(".")[0] == "model" for path in self.space)
        if model_varies and plain["latency"]["against"] is None:
            # Every trial's speed-up is against the same network.
            plain["latency"]["against"] = plain["model"]
        sparsifier = self.sparsifier
        if sparsifier and values.get("sparsifier.name", sparsifier.name) != sparsifier.name:
            # Defaults are each sparsifier's own: those of another name may be none of its options.
            plain["sparsifier"] = sparsifier.model_dump(mode="json", exclude_defaults=True)
        return Candidate.model_validate(set_paths(plain, values))

    def varied_penalties(self) -> dict[str, Penalty]:
        """The penalties of the candidate and those that the space switches on."""
        found: dict[str, Penalty] = {}
        for path, parameter in self.space.items():
            if path.startswith("penalties."):
                found |= self.candidate({path: parameter.ends()[-1]}).penalties
        return found | self.penalties

    def varied_sparsifiers(self) -> list[Candidate]:
        """The candidate at its highest sparsity, and it with each end of the range of each other
        value of its sparsifier."""
        ranges = {
            path: p.ends() for path, p in self.space.items() if path.startswith("sparsifier.")
        }
        sparsest = {
            path: ends[-1] for path, ends in ranges.items() if path == "sparsifier.sparsity"
        }
        return [self.candidate(sparsest)] + [
            self.candidate(sparsest | {p: end}) for p, ends in ranges.items() for end in ends
        ]

    def rehearsed(self) -> list[Candidate]:
        """What is tried before a search: `varied_sparsifiers`, every architecture, int8, and the
        ends of batch sizes."""
        found = self.varied_sparsifiers()
        for path, parameter in self.space.items():
            if path.partition(".")[0] in ("model", "int8") or path == "training.batch_size":
                values = parameter.choices or parameter.ends()
                found += [self.candidate({path: value}) for value in values]
        return list({candidate.model_dump_json(): candidate for candidate in found}.values())

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions of the space, by dotted path."""
        return {
            path: p.distribution(integer=self._field_type(path) is int)
            for path, p in self.space.items()
        }

    def chosen_objectives(self) -> list[Objective]:
        """The objectives, in the order of the config."""
        known = self.known_objectives()
        return [known[name] for name in self.objectives]

    def known_objectives(self) -> dict[str, Objective]:
        """What `objectives` and `constraints` may name."""
        return _known({"task": self.task, "measures": self.measures})

    def quality(self) -> Objective:
        """The first metric of the task, by which networks are judged."""
        return self.known_objectives()[f"val_{self.task.described()[0].name}"]

    def chosen_constraints(self) -> list[Constraint]:
        """The constraints, in the order of the config."""
        known = self.known_objectives()
        return [Constraint.parse(name, text, known) for name, text in self.constraints.items()]

    def ships_int8(self, number: int | None, values: Mapping[str, object]) -> bool:
        """Whether networks of a trial ship, and were measured, as int8; the dense one never does.

        Args:
            number: of the trial; None for the dense reference.
            values: of the trial, by dotted path.
        """
        return number is not None and bool(values.get("int8", self.int8))

    def grace(self) -> float:
        """Epochs before the first rung."""
        stopping = self.search.early_stopping
        if stopping is None or stopping.grace == "auto":
            return max(3 * self.training.epochs // 10, 1)
        return stopping.grace

    def _field_type(self, path: str) -> object:
        """int or float for the field at a dotted path, None for another type.

        As the field is annotated, or, among the free arguments of a factory, as the ends of its
        range are written.
        """
        target: Any = self.candidate({path: self.space[path].ends()[0]})
        *parents, last = path.split(".")
        for name in parents:
            target = target[name] if isinstance(target, Mapping) else getattr(target, name)
        if not isinstance(target, Options):
            if all(isinstance(end, int) for end in self.space[path].ends()):
                return int
            return float
        annotation = type(target).model_fields[last].annotation
        options = getattr(annotation, "__args__", (annotation,))  # int | None counts as int
        return next((kind for kind in (int, float) if kind in options), None)


def _known(data: Mapping[str, Any]) -> dict[str, Objective]:
    """What objectives and constraints may name, by the task and measures of a config that is being
    read; those of classification where they are wrong, which is told instead."""
    measures = [one for one in data.get("measures", ()) if isinstance(one, OwnMeasure)]
    own = {measure.name: measure.described() for measure in measures}
    return known_objectives(data.get("task") or Classification(), own)


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


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a config.

    Args:
        path: a YAML file.
        overrides: `dotted.path=value` each, the value as YAML; they replace what the file says.

    Raises:
        UserError: one sentence of one line that says what is wrong, where, and what would be right.
    """
    return _explained(lambda: read_text(path), str(path), overrides, GIVEN)


def from_mapping(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The config that a YAML file with this content would be. Raises UserError as `load`."""
    return _explained(lambda: write(dict(tree)), "the config", overrides, GIVEN)


def load_recorded(text: str, overrides: Sequence[str] = ()) -> Config:
    """The config that `dump` wrote down as `text`, with overrides. Raises UserError as `load`."""
    return _explained(lambda: text, "the config as it was recorded", overrides, RECORDED)


def _explained(
    read: Callable[[], str], where: str, overrides: Sequence[str], limits: Limits
) -> Config:
    """The config, or one sentence: whatever a text makes YAML, Optuna or pydantic raise, it is a
    mistake in the text."""
    try:
        return _loaded(read(), where, overrides, limits)
    except UserError as error:
        message = str(error)
    except ValidationError as error:
        message = f"{where}: {explain(error)}"
    except Exception as error:  # RecursionError and MemoryError too
        message = f"{where}: this config cannot be used ({type(error).__name__}: {error})"
    raise UserError(one_line(message))


def _loaded(text: str, where: str, overrides: Sequence[str], limits: Limits) -> Config:
    raw = parse(text, where, limits)
    if not isinstance(raw, Mapping):
        raise UserError(
            f"{where}: a config is a mapping of keys to values, and this is {type(raw).__name__}"
        )
    tree: dict[str, Any] = dict(raw)
    for override in overrides:
        key, equals, value = override.partition("=")
        shown = f"--set {shorten(override, 100)}"
        if not equals or not key:
            raise UserError(f"{shown}: it needs the form path=value, such as training.epochs=5")
        if len(key) > limits.key or key.count(".") >= limits.levels:
            raise UserError(
                f"{shown}: a path has at most {limits.key} characters and {limits.levels} parts"
            )
        try:
            tree = _override(tree, key, parse(value, shown, limits))
        except KeyError as error:
            raise UserError(f"{shown}: {error.args[0]}") from None
    return Config.model_validate(tree)


def _override(tree: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """`set_path`, where what follows `space.` is first looked for among the paths that the space
    already has."""
    space = tree.get("space")
    if key.startswith("space.") and isinstance(space, Mapping):
        for path in space:
            if key == f"space.{path}":
                return tree | {"space": {**space, path: value}}
            if key.startswith(f"space.{path}."):
                inside = key.removeprefix(f"space.{path}.")
                if not isinstance(space[path], Mapping):
                    raise KeyError(
                        f"'space.{path}' is {shorten(repr(space[path]))}, which has no '{inside}'"
                    )
                return tree | {"space": {**space, path: set_path(space[path], inside, value)}}
        return tree | {"space": {**space, key.removeprefix("space."): value}}
    return set_path(tree, key, value)


def own_code(config: Config) -> list[str]:
    """The import paths of all code of the user's that a config names: factories and plug-ins."""
    factories = _factories(config.model_dump(mode="json"))
    return [*dict.fromkeys([*factories, *config.plugins])]


def _factories(value: object) -> list[str]:
    """The values of all keys `factory` in plain data."""
    if isinstance(value, Mapping):
        found = [str(one) for key, one in value.items() if key == "factory" and one]
        return found + [path for one in value.values() for path in _factories(one)]
    if isinstance(value, list):
        return [path for one in value for path in _factories(one)]
    return []


def as_plain(config: Config) -> dict[str, Any]:
    """The resolved config as plain data, without its secrets: what may be recorded and printed.

    URIs of stores stay usable, where their passwords come from the environment; elsewhere `***`
    stands for a secret.
    """
    plain = config.model_dump(mode="json")
    shown: dict[str, Any] = redact_values(plain)
    for section, key in _STORES:
        uri = plain[section][key]
        shown[section][key] = uri and without_secrets(uri)
    return shown


_STORES = (("tracking", "uri"), ("search", "storage"), ("search", "storage_path"))


def secret_paths(config: Config) -> list[str]:
    """Where a config holds a secret, by dotted path."""
    shown = flatten(as_plain(config))
    return [
        path
        for path, value in flatten(config.model_dump(mode="json")).items()
        if repr(shown[path]) != repr(value)
    ]


def dump(config: Config) -> str:
    """The resolved config as YAML that `load` reads back to an equal config, but for secrets."""
    plain = as_plain(config)
    plain["space"] = {
        path: p.model_dump(mode="json", exclude_unset=True) for path, p in config.space.items()
    }
    order = [
        "name",
        *Candidate.model_fields,
        "space",
        "objectives",
        "constraints",
        "search",
        "resources",
        "tracking",
    ]
    return write({key: plain[key] for key in order})
