"""Trains many candidates of one architecture at once, in one process."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.packs import streams
from slimfront.trainables.packs.packable import (
    check_together,
    packable_training,
    unpackable_setting,
)
from slimfront.trainables.packs.plan import Plan
from slimfront.trainables.packs.stack import Stack
from slimfront.trainables.packs.step import Step, step_of
from slimfront.trainables.training.finishing import Trained
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.optimizers import set_lr
from slimfront.trainables.training.refit import Refit

_OUTPUTS = {"cpu": 2_048, "cuda": 16_384}
"""Validation examples times members that are taken at once: more would not be faster, and fill a
cache or a memory."""

_NUMBERS = 2**24
"""At most so many numbers of inputs are taken at once, times members."""


State = dict[str, Any]
"""What a training continues from."""


class Pack:
    """Candidates that are trained together: each result is that of `Training` alone, up to
    rounding.

    They share data, architecture, batch size, and kinds of penalties; strengths, targets,
    sparsifiers, optimisers, learning rates, schedules, seeds and epochs are each one's own. Members
    are `Training` objects, always up to date: their tensors are views of the pack's. What is not
    done by the pack itself is done with `alone`.
    """

    def __init__(
        self, candidates: Iterable[Candidate | Training] = (), device: torch.device | str = "cpu"
    ) -> None:
        """Raises UserError for a candidate that does not pack, or not with the others; see
        `packable` and `pack_key`."""
        self.device = torch.device(device)
        self.members: list[Training] = []
        self.first: Candidate | None = None
        self.stack: Stack | None = None
        self.step: Step | None = None
        for candidate in candidates:
            self.join(candidate)

    def join(self, candidate: Candidate | Training, state: State | None = None) -> Training:
        """Takes in a candidate, or a training in progress, from the next epoch on; `state` is what
        it continues from.

        Raises:
            UserError: if it does not pack, or not with the others.
        """
        if isinstance(candidate, Training):
            training = candidate
        else:
            training = Training(candidate, self.device)
        if state is not None:
            training.load_state_dict(state)
        candidate = training.candidate
        first = self.first
        check = packable_training if first is None else unpackable_setting
        reason = check(training)
        if reason:
            raise UserError(reason)
        if first is None:
            first = candidate
        self.first = first
        check_together(first, candidate)
        self.members.append(training)
        return training

    def leave(self, member: Training) -> Training:
        """Lets go of a member, which can go on alone or in another pack."""
        self.members.remove(member)
        stack = self.stack
        if not stack or member not in stack.members:
            return member
        row = stack.members.index(member)
        stack.release(row)
        if not self.members:
            self.stack = None
        return member

    @contextmanager
    def alone(self, member: Training) -> Iterator[Training]:
        """Within, the member has tensors of its own, as if it had left: what is made of them may be
        kept."""
        place = self.members.index(member)
        self.leave(member)
        try:
            yield member
        finally:
            self.members.insert(place, member)

    def state_dict(self, member: Training) -> State:
        """The state of a member, as `Training.state_dict` gives it; it does not change when
        training goes on."""
        with self.alone(member):
            state = member.state_dict()
            return copy.deepcopy(state)

    def finish(
        self, member: Training, refit_options: Refit | None = None, *, one_shot: bool = True
    ) -> Trained:
        """`Training.finish` of a member, which stays."""
        with self.alone(member):
            return member.finish(refit_options, one_shot=one_shot)

    def close(self) -> None:
        """Lets go of all members."""
        for member in list(self.members):
            self.leave(member).close()

    def run_epoch(self) -> streams.Results:
        """Trains each member one epoch; those that are done then, and those that failed, leave.

        Returns:
            The metrics of each, as `Training.run_epoch` gives them, or why it cannot go on.
        """
        members = list(self.members)
        if not members:
            return {}
        if len(members) == 1:
            (member,) = members
            return {member: self._epoch_alone(member)}
        if streams.can_stream(members):
            results = streams.run_epoch(members)
        else:
            results = self._stacked_epoch(members)
        for member, result in results.items():
            if member.done or isinstance(result, TrialFailure):
                self.leave(member)
        return results

    def _stacked_epoch(self, members: list[Training]) -> streams.Results:
        """The epoch as one vectorised step after the other."""
        stack = self._stack_of(members)
        if self.step is None:
            self.step = self._new_step(members[0])
        means = self._steps(stack, self.step)
        counts_of_each = [member.counts() for member in members]
        counts = torch.stack(counts_of_each)
        scores = self._scores(stack, self.step)
        numbers = torch.cat([means, counts, scores], 1)
        return streams.end_epochs(members, numbers.tolist())

    def _stack_of(self, members: list[Training]) -> Stack:
        stack = self.stack
        if stack is not None and stack.whole and stack.members == members:
            return stack
        self.stack = Stack(members)
        return self.stack

    def _epoch_alone(self, member: Training) -> streams.Result:
        """The epoch of a member that has no epoch_runner: it is faster without a stack."""
        self.leave(member)
        try:
            metrics = member.run_epoch()
        except TrialFailure as failure:
            return failure
        if not member.done:
            self.members.append(member)
        return metrics

    def _new_step(self, member: Training) -> Step:
        data = member.data
        sample = data.prepare(data.train.inputs[:8])
        return step_of(member, sample)

    def _steps(self, stack: Stack, step: Step) -> Tensor:
        """Trains an epoch; the mean task loss and the mean penalty loss of each member, (K, 2)."""
        members = stack.members
        train = members[0].taught.train
        all_targets = train.targets
        count = len(all_targets)
        batches = _shuffled_batches(members, all_targets)
        plan = Plan(members, step, len(batches), stack.weights)
        task_losses = []
        penalty_losses = []
        for number, batch in enumerate(batches):
            inputs = self._inputs(members, batch)
            chosen = all_targets[batch]
            targets = chosen.to(self.device)
            task_loss, penalty_loss = stack.train_step(step, inputs, targets, plan, number)
            _, examples = batch.shape
            of_batch = task_loss * examples
            task_losses.append(of_batch)
            penalty_losses.append(penalty_loss)
        last_rates = plan.rates[-1]
        for member, rate in zip(members, last_rates, strict=True):
            set_lr(member.optimizer, rate)
        task_totals = torch.stack(task_losses).sum(0)
        task_means = task_totals / count
        penalty_means = torch.stack(penalty_losses).mean(0)
        return torch.stack([task_means, penalty_means], 1)

    def _inputs(self, members: Sequence[Training], batch: Tensor) -> Tensor:
        """The examples at `batch` (K, B), each row augmented by its member's own generator: (K, B,
        *input_shape)."""
        data = members[0].data
        inputs = data.train.inputs[batch]
        if not data.augment.active:
            return data.prepare(inputs)
        augmenters = [member.augmenter for member in members]
        # At once: it takes few kernels.
        together = inputs.flatten(0, 1)
        varied = data.augmented(together, *augmenters)
        shape_of_input = varied.shape[1:]
        return varied.view(*batch.shape, *shape_of_input)

    def _scores(self, stack: Stack, step: Step) -> Tensor:
        """What the metrics of each member's validation split are made of (`ActiveTask.state`),
        (K, n), float64."""
        members = stack.members
        count = len(members)
        data = members[0].data
        task = data.task
        inputs, targets = data.validation
        parameters = stack.named(stack.weights)
        first = inputs[0]
        size = self._validation_batch(first.numel(), count)
        tally = task.tally(count)
        inputs_of_batches = inputs.split(size)
        targets_of_batches = targets.split(size)
        for stored, wanted in zip(inputs_of_batches, targets_of_batches, strict=True):
            prepared = data.prepare(stored)
            outputs = step.outputs(parameters, stack.buffers, prepared)
            task.count(tally, outputs, wanted)
        return tally.state()

    def _validation_batch(self, numbers: int, members: int) -> int:
        """How many validation examples of so many `numbers` are taken at once."""
        kind = self.device.type
        most = _OUTPUTS[kind]
        fitting = _NUMBERS // max(numbers, 1)
        at_once = min(most, fitting)
        of_each = at_once // members
        return max(1, of_each)


def _shuffled_batches(members: Sequence[Training], targets: Tensor) -> Sequence[Tensor]:
    """The batches of an epoch: the places of examples, (K, B), in each member's own order."""
    count = len(targets)
    size = members[0].options.batch_size
    orders = []
    for member in members:
        order = torch.randperm(count, generator=member.shuffler)
        orders.append(order)
    together = torch.stack(orders)  # (K, N)
    beside_targets = together.to(targets.device)
    batches: Sequence[Tensor] = beside_targets.split(size, 1)
    return batches
