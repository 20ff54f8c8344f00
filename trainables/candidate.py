"""One candidate: everything that decides how one network is trained, and nothing about
searching."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from slimfront.trainables.compaction import Compaction
from slimfront.trainables.data import DATA, Data, Digits
from slimfront.trainables.depth import LEAST_EPOCHS, Depth
from slimfront.trainables.measures.latency import SPEEDS, Latency
from slimfront.trainables.measures.own import OwnMeasure, check_measures, parse_measures
from slimfront.trainables.models import MLP, MODELS, Model
from slimfront.trainables.options import Options
from slimfront.trainables.penalties import PENALTIES, Penalty
from slimfront.trainables.plugins import load_plugins
from slimfront.trainables.precision import Precision
from slimfront.trainables.sparsifiers import SPARSIFIERS, Sparsifier
from slimfront.trainables.tasks import TASKS, Classification, Task
from slimfront.trainables.training.acceleration.compiled import Compile
from slimfront.trainables.training.acceleration.step_graphs import CudaGraphs
from slimfront.trainables.training.distillation import Distill
from slimfront.trainables.training.one_shot import OneShot
from slimfront.trainables.training.optimizers import OptimizerName, Schedule
from slimfront.trainables.training.refit import Refit


class LatencyOptions(Latency):
    """How latency is measured, and against which model; left out: the candidate's own, before it
    was made compact."""

    against: SerializeAsAny[Annotated[Model, BeforeValidator(MODELS.parse_named)]] | None = None


class TrainingOptions(Options):
    """How the weights are trained: by the loss of the task, on shuffled batches.

    `lr` is the learning rate, constant or with `schedule: cosine` falling to 0 at the end;
    `momentum` is for sgd; `weight_decay` as the optimiser defines it. `seed` decides initial
    weights and the order of batches; left out, a search gives every trial its own. `report_every`:
    epochs between two reports to the search (auto: as many as have 2,000 steps), beside those at
    rungs and at the end. `out_of_memory: halve` takes a batch in two halves, or more, where the
    GPU's memory is too small, and accumulates gradients. `precision: bf16` has the network compute
    in bfloat16 in training steps; auto is float32, so that results never change by themselves.
    `channels_last` lays images and the weights of convolutions out as many GPUs like them; nothing
    else changes. `compile: true` has `torch.compile` compile the network for training steps; `auto`
    does where that is measured to pay back. `cuda_graphs` records steps on a GPU and replays them,
    which saves the time of launching kernels: `auto` where it can be. `freeze` names parameters
    that stay as they are, with `*` for any characters: `backbone.*`; `lr_factors` those that are
    trained at so many times the learning rate, the refit's too: `{"backbone.*": 0.1}`, of which the
    first that a name fits counts. `epochs: 0` does not train:
    the network is pruned as it is. `factory` is a function of the user's that trains instead,
    called with a `Trial` and the keyword arguments `args`.
    """

    epochs: int = Field(30, ge=0)
    batch_size: int = Field(64, ge=1)
    optimizer: OptimizerName = "adam"
    lr: float = Field(1e-3, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Schedule = "constant"
    seed: int | None = Field(None, ge=0, lt=2**63)
    report_every: int | Literal["auto"] = "auto"
    out_of_memory: Literal["fail", "halve"] = "fail"
    precision: Precision = "auto"
    channels_last: bool = False
    compile: Compile = False
    cuda_graphs: CudaGraphs = "auto"
    freeze: tuple[str, ...] = ()
    lr_factors: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    factory: str | None = None
    args: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def bf16(self) -> bool:
        """Whether the forward pass of a step is in bfloat16."""
        return self.precision == "bf16"

    @field_validator("report_every")
    @classmethod
    def _at_least_one(cls, epochs: int | str) -> int | str:
        if isinstance(epochs, int) and epochs < 1:
            raise ValueError(f"it must be at least 1 epoch, and it is {epochs}")
        return epochs


class Candidate(Options):
    """A candidate network and its training: task, data → model → training under penalties and a
    sparsifier → whole layers taken out (`depth`) → compaction → refit, and one-shot pruning for
    further candidates; with `distill`, a teacher's outputs count in the loss; with `int8`, each is
    quantised and measured as such.
    `measures` names what is measured beyond what always is: bytes_compressed, latency_ms, speedup,
    and functions of the user's (see `OwnMeasure`).
    `plugins` are modules that register penalties, sparsifiers, tasks, models and data sets.
    """

    plugins: tuple[str, ...] = ()
    task: SerializeAsAny[Annotated[Task, BeforeValidator(TASKS.parse_named)]] = Classification()
    data: SerializeAsAny[Annotated[Data, BeforeValidator(DATA.parse_named)]] = Digits()
    model: SerializeAsAny[Annotated[Model, BeforeValidator(MODELS.parse_named)]] = MLP()
    training: TrainingOptions = TrainingOptions()
    penalties: Annotated[
        dict[str, SerializeAsAny[Penalty]], BeforeValidator(PENALTIES.parse_mapping)
    ] = Field(default_factory=dict)
    sparsifier: (
        SerializeAsAny[Annotated[Sparsifier, BeforeValidator(SPARSIFIERS.parse_named)]] | None
    ) = None
    depth: Depth = Depth()
    compaction: Compaction = Compaction()
    refit: Refit = Refit()
    one_shot: OneShot = OneShot()
    tolerance: float = Field(0.01, ge=0, le=1)
    """How much worse than the baseline, or than what it is made of, a network may be to count as
    about as good: in the unit of a metric in [0, 1], relative for others."""
    distill: Distill | None = None
    int8: bool = False
    measures: Annotated[tuple[str | OwnMeasure, ...], BeforeValidator(parse_measures)] = ()
    latency: LatencyOptions = LatencyOptions()

    @model_validator(mode="before")
    @classmethod
    def _plug_in(cls, given: Any) -> Any:
        """Before names of what they register are looked up."""
        named = None
        if isinstance(given, Mapping):
            named = given.get("plugins")
        names = [named] if isinstance(named, str) else named if isinstance(named, list) else ()
        load_plugins(name for name in names if isinstance(name, str))
        if isinstance(named, str):
            return {**given, "plugins": names}
        return given

    @field_validator("measures")
    @classmethod
    def _known_measures(
        cls, measures: tuple[str | OwnMeasure, ...]
    ) -> tuple[str | OwnMeasure, ...]:
        check_measures(measures)
        return measures

    @model_validator(mode="after")
    def _approximate_merging_is_refitted(self) -> Self:
        if self.compaction.approximate and self.refit.epochs == 0:
            raise ValueError(
                "compaction.approximate changes the outputs, so it needs a refit; set refit.epochs "
                "to 1 or more"
            )
        return self

    @model_validator(mode="after")
    def _layers_can_close(self) -> Self:
        if not self.depth.closes:
            return self
        epochs = self.training.epochs
        advice = "set depth.when to trained, which takes them out before the refit"
        if self.training.factory is not None:
            raise ValueError(
                "depth.when: training closes layers in slimfront's own loop, and training.factory "
                f"has one of its own; {advice}"
            )
        if epochs < LEAST_EPOCHS:
            raise ValueError(
                f"depth.when: training closes layers over {LEAST_EPOCHS} epochs or more, and "
                f"training.epochs is {epochs}; {advice}, or train longer"
            )
        if self.distill is not None and self.distill.features:
            raise ValueError(
                "distill.features are of layers that depth.when: training may close; leave them "
                f"out, or {advice}"
            )
        return self

    @model_validator(mode="after")
    def _removal_of_layers_is_refitted(self) -> Self:
        if self.depth.cuts and self.refit.epochs == 0:
            raise ValueError(
                "depth.when: trained changes the outputs, so it needs a refit; set refit.epochs to "
                "1 or more"
            )
        if self.depth.cuts and self.compaction.approximate:
            raise ValueError(
                "compaction.approximate needs a refit after compaction, and with depth.when: "
                "trained the refit is before it; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _depth_is_timed_in_torch(self) -> Self:
        target = self.depth.target
        if target is not None and target.of_time and self.latency.of_file:
            raise ValueError(
                "depth.target: latency_ms and speedup are taken in torch while training, and "
                f"latency is taken {self.latency.taken}; give the target in flops or params"
            )
        return self

    @model_validator(mode="after")
    def _int8_fits_the_measures(self) -> Self:
        timed = any(name in SPEEDS for name in self.asked_measures())
        if self.int8 and timed and not self.latency.of_file:
            raise ValueError(
                "int8: an int8 network is an ONNX file, which torch does not time; set "
                "latency.runtime to onnx, or leave out latency_ms and speedup, or int8"
            )
        seen = next((one.name for one in self.own_measures() if one.on == "network"), None)
        if self.int8 and seen is not None:
            raise ValueError(
                f"int8: the measure '{seen}' is of a network in torch, and an int8 network is an "
                "ONNX file; give it 'on: onnx', or leave out int8"
            )
        return self

    @model_validator(mode="after")
    def _penalties_can_act(self) -> Self:
        for name, options in self.penalties.items():
            if options.on and self.training.epochs == 0:
                raise ValueError(
                    f"penalties.{name} acts while training, and training.epochs is 0; set it to 1 "
                    "or more, or leave the penalty out"
                )
            if options.on and options.warmup >= self.training.epochs:
                raise ValueError(
                    f"penalties.{name}.warmup ({options.warmup:g}) is not shorter than "
                    "training.epochs "
                    f"({self.training.epochs}), so it would never act"
                )
            if options.on and self.training.batch_size < options.least_batch:
                raise ValueError(
                    f"penalties.{name} looks at {options.least_batch} samples of a batch or more; "
                    "set training.batch_size to "
                    f"{options.least_batch} or more"
                )
        return self

    @model_validator(mode="after")
    def _the_sparsifier_can_act(self) -> Self:
        sparsifier = self.sparsifier
        if sparsifier is None or not sparsifier.on or self.training.epochs:
            return self
        if sparsifier.needs_training:
            raise ValueError(
                f"the sparsifier '{sparsifier.name}' acts while training, and training.epochs is "
                "0; set it to 1 or more, or take one that chooses by the network as it is, such as "
                "magnitude or channels"
            )
        return self

    @model_validator(mode="after")
    def _a_function_has_epochs(self) -> Self:
        if self.training.factory is not None and self.training.epochs == 0:
            raise ValueError(
                "training.factory trains, and training.epochs is 0; set it to 1 or more"
            )
        if self.training.factory is not None and self.distill and self.distill.features:
            raise ValueError(
                "distill.features are compared in slimfront's own loop, and training.factory has "
                "one of its own; leave them out"
            )
        if self.training.factory is not None and self.training.lr_factors:
            raise ValueError(
                "training.lr_factors are of the optimiser of slimfront's own loop, and "
                "training.factory has one of its own; give that parameter groups, and leave these "
                "out"
            )
        if self.training.factory is None and self.training.args:
            raise ValueError("training.args are for the function of training.factory; name it")
        return self

    @model_validator(mode="after")
    def _what_the_weights_give_is_said(self) -> Self:
        unsaid = self.task.unsaid_of_weights()
        if self.model.weights is not None and unsaid is not None:
            raise ValueError(f"model.weights needs {unsaid}")
        return self

    def asked_measures(self) -> list[str]:
        """The names of slimfront's own measures that are taken where they are asked for."""
        return [measure for measure in self.measures if isinstance(measure, str)]

    def own_measures(self) -> list[OwnMeasure]:
        """The measures of the user's."""
        return [measure for measure in self.measures if isinstance(measure, OwnMeasure)]

    def with_a_teacher(self) -> "Candidate":
        """The same, with a teacher of random weights in the place of a baseline that is trained
        first: for what is tried before that."""
        distill = self.distill
        if distill is None or not distill.waits(self.model):
            return self
        return self.model_copy(update={"distill": distill.untrained(self.model)})

    def dense(self, *, trained: bool = True) -> "Candidate":
        """The same network without penalties, sparsifier and what follows, what compact ones are
        compared with: `trained` as they are, for as many epochs, or as it is given."""
        training = self.training
        refit = self.refit
        if not trained:
            refit = Refit()
            training = training.model_copy(update={"epochs": 0, "factory": None, "args": {}})
        plain: dict[str, object] = {
            "training": training,
            "penalties": {},
            "sparsifier": None,
            "depth": Depth(),
            "compaction": Compaction(enabled=False),
            "refit": refit,
            "one_shot": OneShot(steps=0),
            "distill": None,
            "int8": False,
        }
        return self.model_copy(update=plain)
