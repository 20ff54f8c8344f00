"""What a candidate is trained with: its network, data and optimiser, and the penalties and the
sparsifier that act on it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import Split, load_once
from slimfront.trainables.depth import Closing, prepared
from slimfront.trainables.errors import UserError
from slimfront.trainables.gpu import gpus_among
from slimfront.trainables.models import built
from slimfront.trainables.penalties import ActivePenalty, Penalty
from slimfront.trainables.penalties.relative import absolute
from slimfront.trainables.precision import check_bf16
from slimfront.trainables.sparsifiers import ActiveSparsifier, Setting
from slimfront.trainables.sparsifiers.base import computed_weights, prunable_weights
from slimfront.trainables.structure.graph import Layer
from slimfront.trainables.structure.targets.layers import inner_layers
from slimfront.trainables.structure.tracing.trace import trace
from slimfront.trainables.training.acceleration.layout import (
    ambiguous_strides,
)
from slimfront.trainables.training.distillation import FeatureMatching, teacher_of
from slimfront.trainables.training.freezing import check_names, freeze, frozen_names
from slimfront.trainables.training.optimizers import (
    build_optimizer,
    scheduled,
    trained_parameters,
)
from slimfront.trainables.training.ranks import Solo
from slimfront.trainables.training.slimming import Acting, Asked

_AUGMENTATION_STREAM = 0x9E3779B97F4A7C15
"""Added to a training's seed for its augmentation, which must not repeat the numbers that shuffle
the batches."""

_EXAMPLES_STREAM = 0xBB67AE8584CAA73B
"""The same for the examples that a sparsifier looks at before training."""


class CandidateSetup:
    """A candidate's network with its data, teacher, optimiser, penalties and sparsifier.

    Nothing of it is global: the seed decides the initial weights, augmentation and the numbers of
    layers that draw some, through generators of its own.
    """

    def __init__(self, candidate: Candidate, device: torch.device | str, ranks: Solo) -> None:
        """Raises UserError as `Training`."""
        self.candidate = candidate
        options = candidate.training
        self.options = options
        self.device = torch.device(device)
        if options.bf16:
            check_bf16(self.device)
        self.ranks = ranks
        self.data = load_once(candidate.data, self.device, candidate.task)
        self.teacher = teacher_of(candidate, self.data)
        self.taught = self.data
        """The data to train on, with the teacher's outputs beside the targets."""
        if self.teacher is not None:
            self.taught = self.teacher.data
        self.step = 0
        self.parts = 1
        self.seed = options.seed or 0
        self.augmenter = self._generator(_AUGMENTATION_STREAM)
        gpus = gpus_among(self.device)
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(self.seed)  # torch's initialisers know only the global generator
            self.model = built(candidate.model, self.data)
            self.rng_state = self._rng_state()
        self._prepare_network()
        self.frozen = frozen_names(self.model)
        """The parameters that are not trained, by all of their names."""
        sample = self.sample()
        self.closing = self._closing(sample)
        self.parameters = list(self.model.parameters())
        self.ambiguous: list[nn.Parameter] = []
        if options.channels_last:
            self.ambiguous = ambiguous_strides(self.parameters)
        # With strengths as the steps take them.
        penalties = absolute(candidate.penalties, self.model, sample, self._total_step)
        self.candidate = candidate.model_copy(update={"penalties": penalties})
        self.optimizer = self._build_optimizer()
        self.acting = self._acting(sample)
        self.matching = self._matching(sample)
        self._count_in_network()
        self.statistics = []
        for buffer in self.model.buffers():
            if buffer.is_floating_point():
                self.statistics.append(buffer)

    def _prepare_network(self) -> None:
        """Refuses a network that cannot be trained as asked, freezes what is to stay, and puts it
        on the device."""
        model = self.model
        _refuse_computed_weights(self.candidate, model)
        freeze(model, self.options.freeze)
        model.to(self.device)
        if self.options.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _closing(self, sample: Tensor) -> Closing | None:
        """What closes layers, if any are to go while training: of the network as it is traced,
        which is trained then."""
        depth = self.candidate.depth
        if not depth.closes:
            return None
        network = prepared(self.model, sample)
        self.model = network
        return Closing(
            network,
            self.data,
            depth,
            self.candidate.latency,
            epochs=self.options.epochs,
            steps_per_epoch=self.steps_per_epoch(),
            compaction=self.candidate.compaction,
            agree=self._agreed,
        )

    def _agreed(self, numbers: list[float]) -> list[float]:
        """Those of rank 0."""
        shared = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.ranks.broadcast_from_rank0([shared])
        found: list[float] = shared.tolist()
        return found

    @property
    def network(self) -> nn.Module:
        """The network as it is trained now: without layers that have gone."""
        if self.closing is None:
            return self.model
        return self.closing.view

    def _count_in_network(self) -> None:
        """Has its layers and weights be those that metrics count."""
        self.inner = _inner_layers(self.network, self.sample())
        prunable = prunable_weights(self.network)
        self.weights = list(prunable.values())

    def _build_optimizer(self) -> torch.optim.Optimizer:
        options = self.options
        factors = options.lr_factors
        names = list(factors)
        check_names(self.model, "training.lr_factors", names)
        trained = trained_parameters(self.model, factors)
        return build_optimizer(
            name=options.optimizer,
            parameters=trained,
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )

    def _matching(self, sample: Tensor) -> FeatureMatching | None:
        """What compares features with the teacher's, if they count."""
        if self.teacher is None:
            return None
        if not self.teacher.options.features:
            return None
        return FeatureMatching(self.model, self.teacher, sample)

    def _generator(self, stream: int) -> torch.Generator:
        """A generator whose numbers repeat none of another stream's."""
        seed = self.seed + stream
        generator = torch.Generator()
        generator.manual_seed(seed % 2**63)
        return generator

    def sample(self) -> Tensor:
        """A few inputs as the network sees them."""
        stored = self.data.train.inputs[:8]
        return self.data.prepare(stored)

    @property
    def penalties(self) -> list[ActivePenalty]:
        """The penalties that are on."""
        return self.acting.penalties

    @property
    def penalty_options(self) -> list[Penalty]:
        """Their options."""
        return self.acting.penalty_options

    @property
    def sparsifier(self) -> ActiveSparsifier | None:
        """The sparsifier, if there is one that is on."""
        return self.acting.sparsifier

    def _total_step(self, penalty: Penalty) -> float:
        """The sum of a penalty's proximal steps in the whole training, for each unit of
        strength."""
        steps = self.total_steps()
        per_epoch = self.steps_per_epoch()
        options = self.options
        total = 0.0
        for step in range(steps):
            progress = step / steps
            lr = scheduled(options.lr, options.schedule, progress)
            size = self.proximal_step(lr)
            epoch = step / per_epoch
            scale = penalty.scale(epoch)
            total += size * scale
        return total

    def _acting(self, sample: Tensor) -> Acting:
        asked = Asked(
            penalties=self.candidate.penalties,
            sparsifier=self.candidate.sparsifier,
        )
        setting = Setting(
            model=self.model,
            optimizer=self.optimizer,
            total_steps=self.total_steps(),
            seed=self.seed,
            examples=self._examples,
            loss=self.taught.task.loss,
            broadcast_from_rank0=self.ranks.broadcast_from_rank0,
            trained=self.candidate.model.weights is not None,
        )
        return Acting(asked, self.model, sample, setting)

    def _examples(self, count: int) -> Split:
        """So many training examples, as they are without augmentation, drawn by the seed."""
        train = self.taught.train
        examples = len(train.targets)
        generator = self._generator(_EXAMPLES_STREAM)
        order = torch.randperm(examples, generator=generator)
        first = order[:count]
        drawn = first.to(train.targets.device)
        stored = train.inputs[drawn]
        inputs = self.data.prepare(stored)
        targets = train.targets[drawn]
        on_device = targets.to(self.device)
        return Split(inputs, on_device)

    def _rng_state(self) -> dict[str, Tensor]:
        """The state of torch's global generators, by kind of device."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    @contextmanager
    def own_rng_state(self) -> Iterator[None]:
        """Lends torch's global generators the state of this training: dropout knows no other. They
        get theirs back."""
        gpus = gpus_among(self.device)
        own = self.rng_state
        with torch.random.fork_rng(devices=gpus):
            torch.set_rng_state(own["cpu"])
            if "cuda" in own:
                torch.cuda.set_rng_state(own["cuda"], self.device)
            yield
            self.rng_state = self._rng_state()

    def steps_per_epoch(self) -> int:
        """How many steps an epoch has."""
        examples = len(self.data.train.targets)
        return math.ceil(examples / self.options.batch_size)

    def total_steps(self) -> int:
        """How many steps the whole training has; a network that is not trained is pruned in one."""
        steps = self.steps_per_epoch() * self.options.epochs
        return max(steps, 1)

    def learning_rate(self, step: int) -> float:
        """The learning rate of training step `step` (from 0)."""
        progress = step / self.total_steps()
        sparsifier = self.sparsifier
        if sparsifier:
            progress = sparsifier.progress(step)
        options = self.options
        return scheduled(options.lr, options.schedule, progress)

    def proximal_step(self, lr: float) -> float:
        """The step size of proximal steps: lr, and lr / (1 − momentum) for SGD, whose gradients act
        that much longer."""
        if self.options.optimizer == "sgd":
            return lr / (1 - self.options.momentum)
        return lr


def _refuse_computed_weights(candidate: Candidate, model: nn.Module) -> None:
    computed = computed_weights(model)
    if not computed:
        return
    acts = []
    for name, options in candidate.penalties.items():
        if options.on:
            acts.append(f"penalties.{name}")
    if candidate.sparsifier and candidate.sparsifier.on:
        acts.append("the sparsifier")
    if candidate.compaction.enabled:
        acts.append("compaction")
    if not acts:
        return
    shown = " and ".join(acts)
    raise UserError(
        f"the weight of '{computed[0]}' is computed anew in every forward pass (weight_norm or "
        "another parametrisation), so "
        f"that {shown} cannot act on it; build the network without it, or take it "
        "away by "
        "torch.nn.utils.parametrize.remove_parametrizations"
    )


def _inner_layers(model: nn.Module, sample: Tensor) -> list[Layer]:
    """The layers whose activity is reported; none for a network that cannot be traced, which may
    train all the same."""
    try:
        graph = trace(model, sample)
        return inner_layers(graph)
    except UserError:
        return []
