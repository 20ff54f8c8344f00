"""The training step of one candidate: its network with the optimiser, penalties and sparsifier that
act on it."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import Split, load_once
from slimfront.trainables.depth import Closing, prepared
from slimfront.trainables.errors import UserError
from slimfront.trainables.gpu import gpus_among, to_device
from slimfront.trainables.models import built
from slimfront.trainables.penalties import ActivePenalty, Penalty
from slimfront.trainables.penalties.base import StepSizes
from slimfront.trainables.penalties.relative import absolute
from slimfront.trainables.precision import check_bf16
from slimfront.trainables.sparsifiers import ActiveSparsifier, Setting
from slimfront.trainables.sparsifiers.base import computed_weights, prunable_weights
from slimfront.trainables.structure.graph import Layer, trace
from slimfront.trainables.structure.targets.layers import inner_layers
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.training.acceleration.compiled import Compiled, pays_back
from slimfront.trainables.training.acceleration.layout import (
    align_gradients,
    ambiguous_strides,
    channels_last,
)
from slimfront.trainables.training.distillation import FeatureMatching, teacher_of
from slimfront.trainables.training.freezing import check_names, freeze, frozen_names
from slimfront.trainables.training.losses import Losses, TwoLosses
from slimfront.trainables.training.optimizers import (
    LR_FACTOR,
    build_optimizer,
    scheduled,
    set_lr,
    take_step,
    trained_parameters,
)
from slimfront.trainables.training.ranks import Solo
from slimfront.trainables.training.slimming import Acting, Asked

_AUGMENTATION_STREAM = 0x9E3779B97F4A7C15
"""Added to a training's seed for its augmentation, which must not repeat the numbers that shuffle
the batches."""

_SEEN = 1024
"""A network that is not trained is pruned by the gradients of so many examples."""

_EXAMPLES_STREAM = 0xBB67AE8584CAA73B
"""The same for the examples that a sparsifier looks at before training."""


class BatchStep:
    """A candidate's network with its optimiser, penalties and sparsifier, and the step that trains
    it on one batch.

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
        self.losses: nn.Module | None = None
        self.compiles: bool | None = None
        """Whether steps are compiled; None while that is not decided."""
        if options.compile != "auto":
            self.compiles = options.compile
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

    def shared_losses(self) -> nn.Module:
        """The losses, wrapped so that all ranks step alike; made late, when the state of training
        is loaded."""
        # Where memory may run out on one rank alone, the others must not wait for its gradients in
        # their backward pass.
        overlap = self.options.out_of_memory == "fail"
        sample = self.sample()
        compiled = None
        if self._compiles():
            compiled = Compiled(self.network, self._share_of_batch())
        losses = Losses(
            self.network,
            self.acting,
            self.taught.task,
            bf16=self.options.bf16,
            compiled=compiled,
            matching=self.matching,
        )
        wrapped = self.ranks.wrap(losses, sample, overlap=overlap)
        masks: Iterable[Tensor] = ()
        if self.sparsifier:
            masks = self.sparsifier.masks.values()
        self.ranks.broadcast_from_rank0(masks)
        return wrapped

    def _share_of_batch(self) -> int:
        """How many examples of a full batch are this rank's."""
        size = self.options.batch_size
        batch = torch.arange(size)
        mine, _ = self.ranks.share(batch)
        return len(mine)

    def _compiles(self) -> bool:
        """Whether steps are compiled; decided once, so that a training which is resumed goes on as
        it was."""
        if self.compiles is None:
            self.compiles = self._pays_back()
        return self.compiles

    def _pays_back(self) -> bool:
        """Whether most ranks find that it pays back to compile."""
        train = self.taught.train
        count = self._share_of_batch()
        if len(train.targets) < self.options.batch_size:
            return False
        inputs = self.data.prepare(train.inputs[:count])
        if self.options.channels_last:
            inputs = channels_last(inputs)
        pays = pays_back(
            model=self.network,
            inputs=inputs,
            targets=train.targets[:count].to(self.device),
            loss=self.taught.task.loss,
            steps=self.total_steps() - self.step,
            bf16=self.options.bf16,
        )
        share = torch.tensor(float(pays), device=self.device)
        self.ranks.average([share])
        return bool(share > 0.5)

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

    def train_batch(self, batch: Split, weight: float) -> TwoLosses:
        """One step on the examples of `batch`, as they are stored; returns task and penalty loss,
        scalars, times `weight`."""
        lr = self.learning_rate(self.step)
        set_lr(self.optimizer, lr)
        if self.closing is not None:
            self.closing.at(self.step)
        losses = self._gradients(batch, weight)
        self.ranks.average(self.statistics)
        step_size = self.proximal_step(lr)
        self._update(None, step_size)
        self.step += 1
        return losses

    def take_prepared_step(
        self, inputs: Tensor, targets: Tensor, lr: Tensor, step_size: Tensor
    ) -> TwoLosses:
        """One step of a single process that reads nothing but tensors; `step` is not counted.

        Args:
            inputs: (N, *input_shape), what the network sees, on the device.
            targets: (N, …), there too.
            lr: the learning rate, a float32 scalar there.
            step_size: that of proximal steps, likewise.

        Returns:
            Task and penalty loss, scalars.
        """
        rate = self.learning_rate(self.step)
        set_lr(self.optimizer, rate)
        self.clear_gradients()
        losses = self._part_gradients(inputs, targets, 1.0)
        self._update(lr, step_size)
        return losses

    def _update(self, lr: Tensor | None, step_size: float | Tensor) -> None:
        """What follows the backward pass; `lr` is that of the optimiser if None."""
        acting = self.acting
        acting.before_step(self.step)
        align_gradients(self.ambiguous)
        take_step(self.optimizer, lr)
        sizes = self._step_sizes(step_size)
        acting.after_step(self.step, sizes)

    def _step_sizes(self, size: float | Tensor) -> StepSizes:
        """The same for all parameters but those that are frozen, or have a factor of their own."""
        if not self.frozen and not self.options.lr_factors:
            return StepSizes(size)
        sizes = {}
        for group in self.optimizer.param_groups:
            factor = group.get(LR_FACTOR, 1.0)
            own = size * factor
            for parameter in group["params"]:
                sizes[id(parameter)] = own
        return StepSizes(sizes)

    def prune_untrained(self) -> None:
        """Has the sparsifier act at once, on the network as it is, with the gradients of the first
        training examples."""
        if self.sparsifier is None:
            return
        self.clear_gradients()
        inputs, targets = self._examples(_SEEN)
        size = self.options.batch_size
        parts = zip(inputs.split(size), targets.split(size), strict=True)
        task = self.taught.task
        with evaluating(self.model):
            for part, wanted in parts:
                outputs = self.model(part)
                share = len(wanted) / len(targets)
                loss = share * task.loss(outputs, wanted)
                loss.backward()
        self.acting.before_step(0)
        self.sparsifier.after_step(0)
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """As the optimiser's `zero_grad`, which takes longer than some backward passes."""
        for parameter in self.parameters:
            parameter.grad = None

    def _gradients(self, batch: Split, weight: float) -> TwoLosses:
        """Accumulates the gradients of the examples of `batch`, in `parts` parts; gives task and
        penalty loss, scalars.

        Where memory runs out and `training.out_of_memory` is `halve`, the batch is taken in twice
        as many parts from then on, by all ranks. The gradient is the same mean over the batch;
        batch norm and CKA-SR see the parts.
        """
        halve = self.options.out_of_memory == "halve"
        in_parts = halve or self.parts > 1
        if not in_parts:
            self.clear_gradients()
            inputs, targets = self._prepared(batch)
            return self._part_gradients(inputs, targets, weight)
        while True:
            self.clear_gradients()
            losses = None
            try:
                losses = self._gradients_in_parts(batch, weight)
            except torch.OutOfMemoryError:
                if not halve:
                    raise
                if self.parts >= len(batch.targets):
                    raise
            # Outside of the handler, whose traceback keeps the tensors of the failed pass alive.
            short = halve and self.ranks.reduce(self.parameters, losses is None)
            if losses is not None and not short:
                return losses
            self.parts *= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _gradients_in_parts(self, batch: Split, weight: float) -> TwoLosses:
        """As `_gradients`, in as many parts as memory was found to allow."""
        count = len(batch.targets)
        parts = min(self.parts, count)
        inputs_of_parts = batch.inputs.tensor_split(parts)
        targets_of_parts = batch.targets.tensor_split(parts)
        task_total = torch.zeros((), device=self.device)
        penalty_total = torch.zeros_like(task_total)
        for part in map(Split, inputs_of_parts, targets_of_parts):
            part_of_batch = len(part.targets) / count
            share = weight * part_of_batch
            inputs, targets = self._prepared(part)
            task_loss, penalty_loss = self._part_gradients(inputs, targets, share)
            task_total += task_loss
            penalty_total += penalty_loss
        return task_total, penalty_total

    def _prepared(self, part: Split) -> Split:
        """What the network sees of some examples, and their targets on the device."""
        inputs = self.data.augmented(part.inputs, self.augmenter)
        targets = to_device(part.targets, self.device)
        teacher = self.teacher
        if teacher is None:
            return Split(inputs, targets)
        if self.matching is not None:
            self.matching.watch()
        taught = teacher.beside(inputs, targets)
        return Split(inputs, taught)

    def _part_gradients(self, inputs: Tensor, targets: Tensor, share: float) -> TwoLosses:
        epoch = self.step / self.steps_per_epoch()
        self.acting.watch(self.step, epoch)
        if self.matching is not None:
            # The teacher has seen the batch already, and its features with it.
            own_features = self.matching.own
            own_features.watch(True)
        if self.options.channels_last:
            inputs = channels_last(inputs)
        assert self.losses is not None
        task_loss, penalty_loss = self.losses(inputs, targets)
        loss = task_loss
        if penalty_loss.requires_grad:
            loss = task_loss + penalty_loss
        task_loss = task_loss.detach()
        penalty_loss = penalty_loss.detach()
        if share == 1:
            loss.backward()
            return task_loss, penalty_loss
        shared = loss * share
        shared.backward()
        return task_loss * share, penalty_loss * share


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
