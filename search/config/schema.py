"""The typed schema of a config, and what must be true of its parts together."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self, get_args, get_origin

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from slimfront.search.config.names import BAD_NAME, is_bucket, is_name
from slimfront.search.config.objectives import Constraint, Objective, known_objectives
from slimfront.search.config.paths import parts, spelt
from slimfront.search.config.search_space import SearchSpace
from slimfront.search.config.settings import Resources, SearchOptions, Tracking
from slimfront.search.config.space import Parameter, set_paths, with_own_ranges
from slimfront.search.config.space_checks import check_nothing_secret, check_space, check_starts
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import shorten
from slimfront.trainables.measures.latency import SPEEDS, Latency
from slimfront.trainables.measures.measure import EXTRA_MEASURES
from slimfront.trainables.measures.own import OwnMeasure
from slimfront.trainables.models import Model
from slimfront.trainables.options import Options, suggest
from slimfront.trainables.penalties import Penalty
from slimfront.trainables.redaction import without_secrets
from slimfront.trainables.tasks import Classification
from slimfront.trainables.training.distillation import BASELINE, Distill

_MOST_ENDS = 1000
"""Each end of a range and each choice is checked, in about half a millisecond."""


class Config(Candidate):
    """A search: a candidate, what varies in it, what is judged, and how the search is run."""

    name: str
    space: dict[str, Parameter]
    objectives: tuple[str, ...] = Field(None, validate_default=True)
    """Left out: the quality of the task, and the non-zero parameters."""
    constraints: dict[str, str] = Field(default_factory=dict)
    baseline: Literal["given", "trained"] | None = None
    """What candidates are compared with: the network with its weights as it is given, or trained
    without penalties and sparsifier. Left out: given, where the model has weights."""
    search: SearchOptions = SearchOptions()
    resources: Resources = Resources()
    tracking: Tracking = Field(default_factory=Tracking)

    @field_validator("name")
    @classmethod
    def _name_fits_a_directory(cls, name: str) -> str:
        if not is_name(name):
            raise ValueError(BAD_NAME.format(name=shorten(name)))
        return name

    @field_validator("space", mode="before")
    @classmethod
    def _paths_are_spelt_alike(cls, space: Any, info: ValidationInfo) -> Any:
        """Quotes stand only where a key needs them, so that a path has one spelling; and what is
        `auto` becomes the range that the option at the path has of its own."""
        if not isinstance(space, Mapping):
            return space
        found: dict[Any, Any] = {}
        for path, parameter in space.items():
            name = spelt(path)
            if name in found:
                raise ValueError(f"the path {shorten(str(name))} stands twice")
            found[name] = parameter
        return with_own_ranges(found, info.data)

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
        task = info.data.get("task")
        if names is not None or task is None:
            return names
        quality = task.described()[0].name
        return (f"val_{quality}", "nonzero_params")

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
    def _a_given_baseline_has_weights(self) -> Self:
        if self.baseline == "given" and self.model.weights is None:
            raise ValueError(
                "baseline: given is the network with the weights of model.weights, which are left "
                "out; give them, or set baseline to trained"
            )
        if self.baseline_is_trained and self.training.epochs == 0:
            raise ValueError(
                "training.epochs is 0, so that the baseline would have random weights; give "
                "model.weights with baseline: given, or set training.epochs to 1 or more"
            )
        return self

    @model_validator(mode="after")
    def _a_function_trains_in_one_process(self) -> Self:
        if self.training.factory is not None and self.resources.processes_of_a_trial() > 1:
            raise ValueError(
                "training.factory is called in one process; set resources.processes to 1"
            )
        return self

    @model_validator(mode="after")
    def _times_are_taken_in_one_way(self) -> Self:
        for path in self._varied("latency"):
            raise ValueError(
                f"space: '{path}' would have networks timed in several ways, which cannot be "
                "compared; set it outside of the space"
            )
        return self

    @model_validator(mode="after")
    def _something_is_timed(self) -> Self:
        if not self.latency.of_file:
            return self
        if self._named_measures().isdisjoint(SPEEDS):
            key = "command" if self.latency.command is not None else "runtime"
            raise ValueError(
                f"latency.{key} is for latency_ms and speedup, and neither is among objectives, "
                "constraints or measures; name one there, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _databases_are_two(self) -> Self:
        storage = self.search.storage
        if storage is None:
            return self
        if without_secrets(storage) == self.tracking.shown_uri():
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
        check_space(self.search_space, self.candidate, self._field_type)
        return self

    @model_validator(mode="after")
    def _repeats_can_be_made(self) -> Self:
        if self.search.repeats is None:
            return self
        found = [self.candidate({})]
        for path in self.space:
            if parts(path)[0] in ("distill", "one_shot", "int8"):
                found += [self._tried({path: end}) for end in self.search_space.ends(path)]
        for candidate in found:
            reason = self.why_not_replicated(candidate)
            if reason is not None:
                raise ValueError(
                    f"search.repeats trains a network anew apart from the search, and {reason}"
                )
        return self

    @model_validator(mode="after")
    def _nothing_secret_varies(self) -> Self:
        check_nothing_secret(self.space, self._starts())
        return self

    @model_validator(mode="after")
    def _starts_are_in_the_space(self) -> Self:
        """After the space was found right: its distributions are asked for."""
        starts = self._starts()
        if starts:
            check_starts(starts, self.search_space, self.distributions())
        return self

    def _starts(self) -> Sequence[Mapping[str, Any]]:
        """The values that the search starts from, as far as the config has them itself."""
        if isinstance(self.search.start_from, str):
            return ()
        return self.search.start_from

    @cached_property
    def search_space(self) -> SearchSpace:
        """What depends on what in `space`."""
        return SearchSpace(self.space)

    def build_sampler(self, session: int = 1) -> BaseSampler:
        """Optuna's sampler for this space, in a session of the search."""
        return self.search.build_sampler(conditional=self.search_space.conditional, session=session)

    def model_of(self, values: Mapping[str, object]) -> Model:
        """The model of the candidate with these values, which builds networks that were stored as
        weights alone."""
        return self.candidate(values).model

    def candidate(self, values: Mapping[str, object]) -> Candidate:
        """The candidate with these values by dotted path put in, as a trial records them or as they
        stand in a config.

        Raises:
            KeyError: a path leads through something without parts.
            ValidationError: a path names nothing, or its value is out of range.
        """
        for path in values:
            part = _section(path)
            if part not in Candidate.model_fields:
                known = suggest(part, Candidate.model_fields)
                raise KeyError(f"it is not part of the candidate; {known}")
        plain = self._plain_candidate()
        plain |= self._sections_of_other_names(values)
        meant = {}
        for path, value in values.items():
            parameter = self.space.get(path)
            meant[path] = value if parameter is None else parameter.meant(value)
        changed = set_paths(plain, meant)
        return Candidate.model_validate(changed)

    def _plain_candidate(self) -> dict[str, Any]:
        """The candidate of the config itself as plain data, in which all is said that must be the
        same for every trial."""
        base = {name: getattr(self, name) for name in Candidate.model_fields}
        plain = Candidate.model_construct(**base).model_dump(mode="json")
        plain["measures"] = self._wanted_measures()
        if not self._varied("model"):
            return plain
        if plain["latency"]["against"] is None:
            # Every trial's speed-up is against the same network.
            plain["latency"]["against"] = plain["model"]
        teacher = self._teacher_of_the_config()
        if teacher is not None:
            plain["distill"]["teacher"] = teacher
        return plain

    def _varied(self, section: str) -> list[str]:
        """The paths of the space that lie in a section of the config, or are it."""
        return [path for path in self.space if _section(path) == section]

    def _sections_of_other_names(self, values: Mapping[str, object]) -> dict[str, Any]:
        """The sections whose name the values change, without defaults: those are each name's own,
        and may be none of another one's options."""
        found = {}
        for section, options in (("sparsifier", self.sparsifier), ("model", self.model)):
            if options is None:
                continue
            name = getattr(options, "name", None)
            wanted = values.get(f"{section}.name", name)
            if wanted != name:
                found[section] = options.model_dump(mode="json", exclude_defaults=True)
        return found

    def _tried(self, values: Mapping[str, object]) -> Candidate:
        """The candidate with these values, and such of others that all of them apply; what else
        varies of its sparsifier has a value of the space too."""
        applying = self.search_space.beside(values, self._varied("sparsifier"))
        return self.candidate(applying)

    def _named_measures(self) -> set[str]:
        """What measures, objectives and constraints name."""
        return {*self.asked_measures(), *self.objectives, *self.constraints}

    def _wanted_measures(self) -> list[Any]:
        """What a candidate is asked to measure beyond what always is, as plain data."""
        wanted = self._named_measures()
        measures: list[Any] = [name for name in EXTRA_MEASURES if name in wanted]
        for own in self.own_measures():
            measures.append(own.model_dump(mode="json"))
        return measures

    def varied_penalties(self) -> dict[str, Penalty]:
        """The penalties of the candidate and those that the space switches on."""
        found: dict[str, Penalty] = {}
        for path in self._varied("penalties"):
            for end in reversed(self.search_space.ends(path)):
                candidate = self._tried({path: end})
                found = candidate.penalties | found
        return found | self.penalties

    def varied_sparsifiers(self) -> list[Candidate]:
        """The candidate at its highest sparsity, and it with each end of the range of each other
        value of its sparsifier."""
        varied = self._varied("sparsifier")
        sparsest: dict[str, object] = {}
        sparsity = "sparsifier.sparsity"
        if sparsity in varied:
            sparsest[sparsity] = self.search_space.ends(sparsity)[-1]
        found = [self._tried(sparsest)]
        for path in varied:
            for end in self.search_space.ends(path):
                found.append(self._tried(sparsest | {path: end}))
        return found

    def rehearsed(self) -> list[Candidate]:
        """What is tried before a search: `varied_sparsifiers`, every architecture, the most layers
        that go, int8, and the ends of batch sizes."""
        found = self.varied_sparsifiers()
        for path in self.space:
            is_structure = _section(path) in ("model", "depth", "int8")
            if not is_structure and path != "training.batch_size":
                continue
            for value in self.search_space.ends(path):
                found.append(self._tried({path: value}))
        distinct = {candidate.model_dump_json(): candidate for candidate in found}
        return list(distinct.values())

    def looked_at(self) -> list[Candidate]:
        """What is built before a search beside `rehearsed`, since values may name what a network
        has not: every choice, and one of numbers, which name nothing."""
        found = []
        for path in self.space:
            ends = self.search_space.ends(path)
            if all(isinstance(end, int | float) for end in ends):
                ends = ends[-1:]
            for end in ends:
                found.append(self._tried({path: end}))
        rehearsed = {candidate.model_dump_json() for candidate in self.rehearsed()}
        distinct = {candidate.model_dump_json(): candidate for candidate in found}
        return [one for shown, one in distinct.items() if shown not in rehearsed]

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions of what the sampler is asked for, by dotted path."""
        found = {}
        for path in self.search_space.asked:
            integer = self._field_type(path) is int
            found[path] = self.space[path].distribution(integer=integer)
        return found

    def chosen_objectives(self) -> list[Objective]:
        """The objectives, in the order of the config."""
        known = self.known_objectives()
        return [known[name] for name in self.objectives]

    def known_objectives(self) -> dict[str, Objective]:
        """What `objectives` and `constraints` may name."""
        data = {"task": self.task, "measures": self.measures, "latency": self.latency}
        return _known(data)

    def quality(self) -> Objective:
        """The first metric of the task, by which networks are judged."""
        name = self.task.described()[0].name
        return self.known_objectives()[f"val_{name}"]

    def chosen_constraints(self) -> list[Constraint]:
        """The constraints, in the order of the config."""
        known = self.known_objectives()
        found = []
        for name, text in self.constraints.items():
            found.append(Constraint.parse(name, text, known))
        return found

    def reference(self) -> Candidate:
        """The baseline as a candidate."""
        own = self.candidate({})
        return own.dense(trained=self.baseline_is_trained)

    def teaches_by_baseline(self, distill: Distill) -> bool:
        """Whether the teacher is the baseline that this search trains."""
        if not distill.on or distill.teacher != BASELINE:
            return False
        return self.baseline_is_trained

    @cached_property
    def waits_for_baseline(self) -> bool:
        """Whether any candidate's teacher is the baseline that this search trains."""
        candidates: list[Candidate] = [self]
        for path in self._varied("distill"):
            for end in self.search_space.ends(path):
                candidates.append(self._tried({path: end}))
        for candidate in candidates:
            distill = candidate.distill
            if distill is not None and self.teaches_by_baseline(distill):
                return True
        return False

    def why_not_replicated(self, candidate: Candidate, *, pruned: bool = True) -> str | None:
        """Why networks of a candidate cannot be trained anew apart from this search; None if they
        can.

        Args:
            pruned: whether by one-shot pruning.
        """
        if candidate.distill is not None and self.teaches_by_baseline(candidate.distill):
            return (
                "its teacher is the baseline that this search trains; give distill.teacher a file"
            )
        if pruned and candidate.one_shot.recover:
            return "it is trained further after one-shot pruning; set one_shot.recover to 0"
        if candidate.int8:
            return "it ships as int8; set int8 to false"
        return None

    def _teacher_of_the_config(self) -> dict[str, Any] | None:
        """Where the model varies, the teacher is the config's all the same: its model with the
        weights; None where it says itself what it is, or is trained by this search."""
        if self.distill is None:
            return None
        weights = self.distill.teacher
        if not isinstance(weights, str):
            return None
        if weights == BASELINE:
            if self.baseline_is_trained or self.model.weights is None:
                return None
            weights = self.model.weights
        model = self.model.model_dump(mode="json")
        return model | {"weights": weights}

    @property
    def baseline_is_trained(self) -> bool:
        """Whether the baseline is trained, and not taken as it is given."""
        if self.baseline is None:
            return self.model.weights is None
        return self.baseline == "trained"

    def ships_int8(self, number: int | None, values: Mapping[str, object]) -> bool:
        """Whether networks of a trial ship, and were measured, as int8; the dense one never does.

        Args:
            number: of the trial; None for the dense reference.
            values: of the trial, by dotted path.
        """
        if number is None:
            return False
        return bool(values.get("int8", self.int8))

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
        ends = self.search_space.ends(path)
        target: Any = self._tried({path: ends[0]})
        *parents, last = parts(path)
        annotation: Any = None
        for name in parents:
            if isinstance(target, Mapping):
                target = target[name]
                annotation = None
            else:
                annotation = _annotation(target, name)
                target = getattr(target, name)
        if isinstance(target, Options):
            return _number_in(_annotation(target, last))
        if get_origin(annotation) is dict:
            _, of_values = get_args(annotation)
            kind = _number_in(of_values)
            if kind:
                return kind
        if all(isinstance(end, int) for end in ends):
            return int
        return float


def _section(path: str) -> str:
    """The section of a config that a path begins with."""
    return parts(path)[0]


def _annotation(options: Any, name: str) -> Any:
    """How a field of options is annotated."""
    fields = type(options).model_fields
    return fields[name].annotation


def _number_in(annotation: Any) -> type[int] | type[float] | None:
    """Which kind of number a field takes: int | None counts as int, a bounded float as float; None
    for what is no number."""
    options = get_args(annotation) or (annotation,)
    for kind in (int, float):
        if kind in options:
            return kind
    return None


def _known(data: Mapping[str, Any]) -> dict[str, Objective]:
    """What objectives and constraints may name, by the task and measures of a config that is being
    read; those of classification where they are wrong, which is told instead."""
    task = data.get("task") or Classification()
    own = {}
    for measure in data.get("measures", ()):
        if isinstance(measure, OwnMeasure):
            own[measure.name] = measure.described()
    latency = data.get("latency")
    if isinstance(latency, Latency):
        own |= latency.described()
    return known_objectives(task, own)
