"""The parts of a config that are about the search and not about its candidates."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from optuna.samplers import BaseSampler
from pydantic import BeforeValidator, Field, field_validator, model_validator

from slimfront.search.config.samplers import SAMPLERS, build_sampler
from slimfront.trainables.options import Options
from slimfront.trainables.redaction import without_secrets

_SEEDS = 2**32
"""How many seeds there are: torch's generators on the CPU tell no more apart."""


class EarlyStopping(Options):
    """Multi-objective successive halving (see `scheduler.MultiObjectiveASHA`).

    No trial is stopped before `grace` epochs (auto: three tenths of them); then, and at each
    `reduction`-fold of it, the top 1 / `reduction` of the trials that came so far go on.
    """

    grace: int | Literal["auto"] = "auto"
    reduction: float = Field(3.0, gt=1)
    brackets: int = Field(1, ge=1, le=10)
    tie_break: Literal["epsilon_net", "crowding"] = "epsilon_net"

    @field_validator("grace")
    @classmethod
    def _at_least_one(cls, grace: int | str) -> int | str:
        if isinstance(grace, int) and grace < 1:
            raise ValueError(f"it must be at least 1 epoch, and it is {grace}")
        return grace


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_S = 1000 * _UNITS["d"]
"""No search takes longer, and Python cannot wait for much longer."""


class SearchOptions(Options):
    """How the space is searched.

    `trials` candidates are trained, `concurrency` of them at a time (auto: as many as the resources
    allow). The `sampler`, a name or a mapping of its name and options, proposes them; with
    `concurrency: 1` the same `seed` gives the same proposals. Checkpoints and the journal go to
    `storage_path`; Optuna's study there too, or to the database at `storage`.

    `early_stopping` stops trials that fall behind. `time` ends the search (seconds, or such as 30m,
    2h), and so do `patience` trials in a row without a gain of hypervolume. `retries`: how often a
    trial whose process is lost goes on from its last checkpoint. `repeats`: after the last trial,
    the baseline and what somebody may ship of the front are trained anew with so many other seeds,
    on top of `trials` and `time`, and what is recommended is judged by the means.
    `start_from`: what is tried first, a list of values by path, or the name of an earlier search
    for its front.
    """

    trials: int = Field(32, ge=1)
    concurrency: int | Literal["auto"] = "auto"
    sampler: str | dict[str, Any] = "tpe"
    seed: int = Field(0, ge=0, lt=_SEEDS)
    storage_path: str = "runs"
    storage: str | None = None
    early_stopping: EarlyStopping | None = None
    time: float | str | None = None
    patience: int | None = Field(None, ge=1)
    retries: int = Field(2, ge=0)
    repeats: int | None = Field(None, ge=2)
    start_from: Annotated[tuple[dict[str, Any], ...], Field(max_length=1000)] | str = ()

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, sampler: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(sampler, dict):
            name = sampler.get("name")
            if not isinstance(name, str):
                known = ", ".join(sorted(SAMPLERS))
                raise ValueError(f"the sampler has no 'name'; known: {known}")
        name, options = cls._name_and_options(sampler)
        build_sampler(name, 0, options)
        return sampler

    @staticmethod
    def _name_and_options(sampler: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if isinstance(sampler, str):
            return sampler, {}
        options = dict(sampler)
        name = options.pop("name")
        return name, options

    @property
    def sampler_options(self) -> dict[str, Any]:
        """What the config sets of its sampler."""
        _, options = self._name_and_options(self.sampler)
        return options

    def build_sampler(self, *, conditional: bool = False, session: int = 1) -> BaseSampler:
        """Optuna's sampler; TPE begins later where trials are stopped early, since there are more
        of them.

        Args:
            conditional: whether some values vary only beside certain others.
            session: of the search, 1 for the first: in a later one the same random numbers would
                propose again what was trained already. QMC goes on in its sequence by itself.
        """
        name, options = self._name_and_options(self.sampler)
        if name == "tpe" and self.early_stopping is not None:
            options.setdefault("n_startup_trials", 20)
        seed = self.seed
        if name != "qmc":
            earlier_sessions = session - 1
            seed += 1_000_003 * earlier_sessions
            seed %= _SEEDS
        return build_sampler(name, seed, options, conditional=conditional)

    def seed_of_training(self, place: int) -> int:
        """The seed of a training of this search: of the baseline, at place 0, and of trial n at
        place n + 1."""
        return 1_000_003 * self.seed + place

    def seed_of_replica(self, place: int) -> int:
        """The seed of a training that repeats others with another seed.

        torch's generators on the CPU take a seed modulo 2³²: half of that lies between it and the
        seeds of this search's trainings.
        """
        return (self.seed_of_training(place) + _SEEDS // 2) % _SEEDS

    @field_validator("early_stopping", mode="before")
    @classmethod
    def _on_or_off(cls, value: object) -> object:
        if value is True:
            return {}
        if value is False:
            return None
        return value

    @field_validator("time")
    @classmethod
    def _a_duration(cls, value: float | str | None) -> float | None:
        if isinstance(value, str):
            match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)", value.strip())
            if match is None:
                raise ValueError(
                    f"{value!r} is not a time; it needs the form 90, 90s, 30m, 2h or 1d"
                )
            number, unit = match.groups()
            value = float(number) * _UNITS[unit or "s"]
        if value is None or 0 < value <= _LONGEST_S:
            return value
        if value <= 0:
            raise ValueError("it must be above 0")
        raise ValueError(f"it must be at most {_LONGEST_S // _UNITS['d']} days")

    @field_validator("concurrency")
    @classmethod
    def _at_least_one(cls, concurrency: int | str) -> int | str:
        if isinstance(concurrency, int) and concurrency < 1:
            raise ValueError(f"it must be at least 1, and it is {concurrency}")
        return concurrency


_BYTES = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("", 1000), ("B", 1000), ("iB", 1024))
}


def _bytes(amount: object) -> object:
    """`4GB` as a whole number of bytes; what is not text is left to pydantic."""
    if not isinstance(amount, str):
        return amount
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B?)", amount.strip())
    if match is None or match[2] not in _BYTES:
        raise ValueError(
            f"{amount!r} is not an amount of memory; it needs the form 4000000000, 4GB or 1.5GiB"
        )
    number, unit = match.groups()
    size = float(number) * _BYTES[unit]
    # What is far too much is said to be.
    return int(min(size, 2.0**63))


_NAMED_OTHERWISE = {"CPU": "cpu", "GPU": "gpu", "memory": "memory"}


class Resources(Options):
    """What one trial takes, all of it on one node: `cpu` cores and `gpu`s, where a fraction shares
    one with other trials.

    `memory` (bytes, or such as 4GB, 1.5GiB) and `custom`, amounts by the names that nodes were
    started with, decide on which nodes trials run. A trial on several GPUs trains in a process for
    each; `processes` has trials without GPUs train in several, which share their cores.

    `pack` trials are trained together in one process, which then has these resources for all of
    them (auto: as many as a short measurement finds fastest, but not so many that the search could
    learn little from one trial for the next).
    """

    cpu: float = Field(1.0, gt=0)
    gpu: float = Field(0.0, ge=0)
    memory: Annotated[int, BeforeValidator(_bytes), Field(gt=0, lt=2**53)] | None = None
    custom: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    processes: int | Literal["auto"] = "auto"
    pack: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"

    @field_validator("gpu")
    @classmethod
    def _whole_if_several(cls, gpu: float) -> float:
        if gpu > 1 and gpu != int(gpu):
            raise ValueError(
                f"several GPUs must be a whole number, and it is {gpu:g}; only one GPU can be "
                "shared, by a fraction"
            )
        return gpu

    @field_validator("custom")
    @classmethod
    def _not_known_to_ray(cls, custom: dict[str, float]) -> dict[str, float]:
        for name in custom:
            if name in _NAMED_OTHERWISE:
                raise ValueError(
                    f"'{name}' is not a resource of yours; set resources.{_NAMED_OTHERWISE[name]}"
                )
            if name == "object_store_memory" or not name:
                raise ValueError(f"'{name}' cannot name a resource of yours; Ray has it for itself")
        return custom

    @model_validator(mode="after")
    def _pack_or_processes(self) -> Self:
        if self.pack == "auto" or self.pack == 1:
            return self
        processes = self.processes_of_a_trial()
        if processes > 1:
            raise ValueError(
                f"a trial in {processes} processes cannot be one of a pack of {self.pack}; set "
                "pack to 1"
            )
        return self

    @model_validator(mode="after")
    def _a_process_per_gpu(self) -> Self:
        asked = self.processes
        if asked == "auto":
            return self
        if asked < 1:
            raise ValueError(f"processes must be at least 1, and it is {asked}")
        gpus = max(1, self.gpu)
        if self.gpu and asked != gpus:
            raise ValueError(
                f"processes ({asked}) must be the number of GPUs ({gpus:g}), one each; leave it out"
            )
        if not self.gpu and asked > max(1, self.cpu):
            raise ValueError(
                f"processes ({asked}) must not be more than the cores of a trial; set cpu to "
                f"{asked} or more"
            )
        return self

    def processes_of_a_trial(self) -> int:
        """In how many processes a trial trains."""
        if self.processes == "auto":
            return max(1, int(self.gpu))
        return self.processes

    def for_ray(self) -> dict[str, float]:
        """The resources by Ray's names, without those that a trial does not need."""
        needed = {"CPU": self.cpu}
        if self.gpu:
            needed["GPU"] = self.gpu
        if self.memory:
            needed["memory"] = self.memory
        return needed | self.custom


STORE_VARIABLE = "MLFLOW_TRACKING_URI"
"""MLflow's own variable: where a config says nothing, it says which store is meant."""

OWN_STORE = "sqlite:///slimfront.db"
"""The store where neither does."""


class Tracking(Options):
    """Where MLflow records: any tracking URI (left out: `MLFLOW_TRACKING_URI` of the environment,
    or else a file here), and an experiment (left out: the config's name).

    `system_metrics` adds the use of the driver's machine, its GPUs too, to the search's run.
    """

    uri: str = Field(default_factory=lambda: os.environ.get(STORE_VARIABLE) or OWN_STORE)
    experiment: str | None = None
    system_metrics: bool = False

    @property
    def from_environment(self) -> bool:
        """Whether the environment says which store is meant."""
        if "uri" in self.model_fields_set:
            return False
        return self.uri == os.environ.get(STORE_VARIABLE)

    def shown_uri(self) -> str:
        """The absolute URI without its secrets: what may be recorded and printed."""
        return without_secrets(self.absolute_uri())

    def absolute_uri(self) -> str:
        """The URI with the path of an SQLite file made absolute, so that it means the same from
        every directory."""
        scheme = "sqlite:///"
        file = self.uri.removeprefix(scheme)
        if not file or not self.uri.startswith(scheme):
            return self.uri
        absolute = Path(file).absolute()
        return f"{scheme}{absolute}"
