"""The training step of one candidate: what happens to its network on one batch."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import Split
from slimfront.trainables.gpu import to_device
from slimfront.trainables.penalties.base import StepSizes
from slimfront.trainables.reconstruction import reconstruct
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.training.acceleration.compiled import Compiled, pays_back
from slimfront.trainables.training.acceleration.layout import (
    align_gradients,
    channels_last,
)
from slimfront.trainables.training.candidate_setup import CandidateSetup
from slimfront.trainables.training.losses import Losses, TwoLosses
from slimfront.trainables.training.optimizers import (
    LR_FACTOR,
    set_lr,
    take_step,
)
from slimfront.trainables.training.ranks import Solo

_SEEN = 1024
"""A network that is not trained is pruned by the gradients of so many examples."""


class BatchStep(CandidateSetup):
    """The step that trains a candidate's network on one batch."""

    def __init__(self, candidate: Candidate, device: torch.device | str, ranks: Solo) -> None:
        """Raises UserError as `Training`."""
        super().__init__(candidate, device, ranks)
        self.losses: nn.Module | None = None
        """The losses as all ranks take them; None until the first step."""
        self.compiles: bool | None = None
        """Whether steps are compiled; None while that is not decided."""
        if self.options.compile != "auto":
            self.compiles = self.options.compile

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
        """Has the sparsifier act at once, on the network as it is, with the gradients of some
        training examples; what is left is fitted to what the layers gave of these, but for what is
        frozen."""
        if self.sparsifier is None:
            return
        self.clear_gradients()
        whole = copied(self.model)
        inputs, targets = self._examples(_SEEN)
        size = self.options.batch_size
        parts = zip(inputs.split(size), targets.split(size), strict=True)
        task = self.taught.task
        self.sparsifier.before_batch(0)
        with evaluating(self.model):
            for part, wanted in parts:
                outputs = self.model(part)
                share = len(wanted) / len(targets)
                loss = share * task.loss(outputs, wanted)
                loss.backward()
        self.acting.before_step(0)
        self.sparsifier.after_step(0)
        self.clear_gradients()
        reconstruct(whole, self.model, [inputs], self.frozen)

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
