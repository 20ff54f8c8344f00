"""Distillation: a network learns from the outputs of a teacher too.

Hinton et al. 2015, Distilling the knowledge in a neural network, arXiv 1503.02531: the loss is
(1 − weight) · task loss + weight · distillation loss, and the task says what the latter is, with
temperature T: T² · KL(softmax(teacher / T) ‖ softmax(outputs / T)) for logits (section 2), the mean
squared difference for numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from slimfront.trainables.data import Dataset, Split
from slimfront.trainables.data.cache import outputs_once
from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.gpu import gpus_among
from slimfront.trainables.inputs import Several
from slimfront.trainables.models import MODELS, Model, built
from slimfront.trainables.options import Options, suggest
from slimfront.trainables.penalties.features import Features, Shapes, output_shapes
from slimfront.trainables.precision import to_float32
from slimfront.trainables.shipping.network_file import load_tensors, restore
from slimfront.trainables.tasks.active import ActiveTask

if TYPE_CHECKING:
    from slimfront.trainables.candidate import Candidate

TARGETS, TEACHER = "targets", "teacher"
BASELINE = "baseline"


def _named_or_built(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MODELS.parse_named(value)
    return value


class Distill(Options):
    """Who teaches, and how much of the loss it is.

    `teacher` is `baseline`, the network that candidates are compared with; the file of weights of
    the same network; or a network of its own with its `weights`, such as
    `{factory: "my:net", weights: PATH}`. Outputs count at `temperature`, with the share `weight` of
    the loss. `features` are weights by the name of a layer that both networks have: the outputs of
    these layers are compared too (see `FeatureMatching`).
    """

    teacher: str | SerializeAsAny[Annotated[Model, BeforeValidator(_named_or_built)]] = Field(
        BASELINE, union_mode="left_to_right"
    )
    temperature: float = Field(2.0, gt=0)
    weight: float = Field(0.5, ge=0, le=1)
    features: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _a_network_of_its_own_is_trained(self) -> Self:
        teacher = self.teacher
        if isinstance(teacher, Model) and teacher.weights is None:
            raise ValueError("distill.teacher: the network has no weights; give its 'weights'")
        return self

    @property
    def on(self) -> bool:
        """Whether the teacher has any share of the loss."""
        return self.weight > 0 or any(self.features.values())

    def waits(self, model: Model) -> bool:
        """Whether the teacher is a baseline that is trained first."""
        return self.on and self.teacher == BASELINE and model.weights is None

    def untrained(self, model: Model) -> "Distill":
        """The same with a teacher of random weights, for a rehearsal."""
        plain = model.model_copy(update={"weights": None})
        return self.model_copy(update={"teacher": plain})


@dataclass(frozen=True)
class DistilledTask(ActiveTask):
    """A task whose targets have the outputs of a teacher beside them: `Several` of `targets` and
    `teacher` (N, …), both of which count in the loss; other targets are as ever."""

    temperature: float = 1.0
    share: float = 0.0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As of the task, with the teacher's share."""
        if not isinstance(targets, Several):
            return super().loss(outputs, targets)
        own_targets = targets.named[TARGETS]
        task_loss = super().loss(outputs, own_targets)
        taught = self._from_teacher(outputs, targets)
        return torch.lerp(task_loss, taught, self.share)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As of the task, with the teacher's share."""
        if not isinstance(targets, Several):
            return super().losses(outputs, targets)
        own_targets = targets.named[TARGETS]
        task_losses = super().losses(outputs, own_targets)
        from_teacher = torch.func.vmap(self._from_teacher)
        taught = from_teacher(outputs, targets)
        return torch.lerp(task_losses, taught, self.share)

    def _from_teacher(self, outputs: Tensor, targets: Several) -> Tensor:
        options = self.options
        own_targets = targets.named[TARGETS]
        teachers_outputs = targets.named[TEACHER]
        made = options.arrange(to_float32(outputs))
        wanted = options.arrange(to_float32(teachers_outputs))
        if made.shape != wanted.shape:
            of_teacher = tuple(wanted.shape[1:])
            of_network = tuple(made.shape[1:])
            raise UserError(
                f"distill: the teacher gives {of_teacher} for an example, and the "
                f"network {of_network}; take a teacher of the same task"
            )
        return options.distillation(made, wanted, own_targets, self.temperature)


class Teacher:
    """A teacher at work on a data set."""

    def __init__(self, network: nn.Module, data: Dataset, options: Distill) -> None:
        """`network` takes what `data.prepare` makes, on the data's device."""
        network.eval()
        network.requires_grad_(False)
        self.network = network
        self.options = options
        own = {}
        for field in fields(ActiveTask):
            own[field.name] = getattr(data.task, field.name)
        task = DistilledTask(
            **own,
            temperature=options.temperature,
            share=options.weight,
        )
        self.data = replace(data, attached=task)
        """The data to train on: where inputs are always the same, with the teacher's outputs beside
        the targets."""
        inputs_vary = data.augment.active or data.streamed
        # Features of all examples would fill a memory.
        self.cached = not inputs_vary and not options.features
        if self.cached:
            inputs, targets = data.train

            def made(some: Tensor) -> Tensor:
                return data.task.outputs_of(network, some, data.prepare)

            outputs = outputs_once(network, inputs, made).to(targets.device)
            taught = Several({TARGETS: targets, TEACHER: outputs})
            train = Split(inputs, taught)
            self.data = replace(self.data, train=train)

    @torch.no_grad()
    def beside(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The targets of a batch with what the teacher makes of `inputs`, which are as networks see
        them."""
        if isinstance(targets, Several):
            return targets
        outputs = self.network(inputs)
        return Several({TARGETS: targets, TEACHER: outputs})


class FeatureMatching:
    """Σ weight · ‖f − f_T‖² / ‖f_T‖² over layers of a network and its teacher, of the batch that
    both have just seen (Romero et al. 2015, FitNets, arXiv 1412.6550, eq. 3, relative to the
    teacher's features)."""

    def __init__(self, network: nn.Module, teacher: Teacher, sample: Tensor) -> None:
        """`sample` (N, …) is what both take.

        Raises:
            UserError: if one of them has no such layer, or its outputs have another shape there.
        """
        self.weights: dict[str, float] = {}
        for name, weight in teacher.options.features.items():
            if weight > 0:
                self.weights[name] = weight
        own_shapes = self._shapes_in("network", network, sample)
        teachers_shapes = self._shapes_in("teacher", teacher.network, sample)
        for name, shape in own_shapes.items():
            other = teachers_shapes[name]
            if shape != other:
                raise UserError(
                    f"distill.features: '{name}' gives {shape} for an example, and "
                    f"{other} in the teacher; name layers of one shape"
                )
        self.own = Features(network, self.weights)
        self.taught = Features(teacher.network, self.weights, any_pass=True)

    def _shapes_in(self, which: str, network: nn.Module, sample: Tensor) -> Shapes:
        """The shapes of what the layers give for an example, by name."""
        known = output_shapes(network, sample)
        found = {}
        for name in self.weights:
            if name not in known:
                hint = suggest(name, known)
                raise UserError(
                    f"distill.features: the {which} has no layer '{name}' with one output; {hint}"
                )
            found[name] = known[name]
        return found

    def watch(self) -> None:
        """Looks at the coming batch."""
        self.own.watch(True)
        self.taught.watch(True)

    def loss(self) -> Tensor | None:
        """Of the batch just seen, a scalar; None if it was not watched."""
        mine = self.own.take()
        wanted = self.taught.take()
        if not mine or not wanted:
            return None
        terms = []
        for name, weight in self.weights.items():
            own = to_float32(mine[name])
            target = to_float32(wanted[name])
            difference = own - target
            apart = difference.square().sum()
            length = target.square().sum()
            size = length.clamp_min(1e-12)
            term = weight * apart / size
            terms.append(term)
        return torch.stack(terms).sum()

    def close(self) -> None:
        """Takes its hooks off both networks."""
        self.own.close()
        self.taught.close()


def teacher_of(candidate: "Candidate", data: Dataset) -> Teacher | None:
    """The teacher of a candidate, if it has one; what it makes of the data is kept for the next
    candidate.

    Raises:
        UserError: if it cannot be had, or is not of this task.
    """
    options = candidate.distill
    if options is None or not options.on:
        return None
    given = options.teacher
    if given == BASELINE:
        if candidate.model.weights is None:
            raise UserError(
                "distill.teacher: the baseline is trained by a search, and here is none; give "
                "model.weights, or a teacher with weights"
            )
        given = candidate.model
    if isinstance(given, str):
        changes = {"weights": given, "strict": True}
        given = candidate.model.model_copy(update=changes)
    changed = 0
    if given.weights is not None:
        file = Path(given.weights)
        if file.is_file():
            changed = file.stat().st_mtime_ns
    key = _Key(given, data, options, changed)
    return _teacher(key)


@dataclass(frozen=True)
class _Key:
    """What a teacher is known by."""

    model: Model
    data: Dataset
    options: Distill
    changed: int

    def __hash__(self) -> int:
        model = self.model.model_dump_json()
        return hash((model, id(self.data), self.changed))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Key):
            return False
        if self.data is not other.data:
            return False
        if self.changed != other.changed:
            return False
        return self.model == other.model and self.options == other.options


@lru_cache(maxsize=2)
def _teacher(key: _Key) -> Teacher:
    data = key.data
    gpus = gpus_among(data.device)
    with torch.random.fork_rng(devices=gpus):
        network = _network(key.model, data)
    network.to(data.device)
    return Teacher(network, data, key.options)


def _network(model: Model, data: Dataset) -> nn.Module:
    """The teacher's network: what a search stored, or the model with its weights."""
    stored = _stored(model.weights)
    if stored is None:
        try:
            return built(model, data)
        except UserError as error:
            message = str(error)
            for own in ("weights", "strict"):
                message = message.replace(f"model.{own}", f"distill.teacher.{own}")
            raise UserError(message) from None
    try:
        return restore(stored, model)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"distill.teacher: {model.weights} cannot be used: {first_line(error)}"
        ) from None


def _stored(path: str | None) -> dict[str, Any] | None:
    """What `shipping.network_file` stored there, if it is such a file."""
    if path is None:
        return None
    file = Path(path)
    if file.suffix != ".pt" or not file.is_file():
        return None
    try:
        found = load_tensors(file)
    except UserError:
        return None
    if "format" not in found:
        return None
    return found
