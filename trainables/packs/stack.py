"""What the members of a pack hold, as rows of stacked tensors, of which the members' own tensors
become views.

So all that happens rarely to one member (a sparsifier's update, compaction, saving) is done by its
`Training` as ever, and all that happens in each step is done to the rows together. One row holds
all parameters of a member, one behind the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimfront.trainables.packs.optimizers import MOMENTS, Update
from slimfront.trainables.packs.plan import Plan
from slimfront.trainables.packs.step import Step, Tensors
from slimfront.trainables.sparsifiers import ActiveSparsifier
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.losses import TwoLosses

Moments = list[list[Tensor]]
"""What an optimiser remembers, by kind and parameter."""


class Stack:
    """K trainings of one architecture as tensors; P is the number of entries of all parameters of
    one of them."""

    def __init__(self, members: Sequence[Training]) -> None:
        self.members = list(members)
        self.whole = True
        """Whether all members' tensors are still views of these."""
        self.shapes = {}
        self.sizes = []
        first = members[0].model
        for name, parameter in first.named_parameters():
            self.shapes[name] = parameter.shape
            size = parameter.numel()
            self.sizes.append(size)
        rows = [_row(member) for member in members]
        weights = torch.stack(rows)
        self.weights = weights
        """(K, P)"""
        kinds = len(MOMENTS)
        self.moments = weights.new_zeros(kinds, *weights.shape)
        """(moments, K, P)"""
        count = len(self.sizes)
        self.steps = weights.new_zeros(len(rows), count, dtype=torch.float32)
        """(K, parameters)"""
        self.kept: Tensor | None = None
        """(K, P), 0 where a sparsifier dropped a weight; None where there is no sparsifier."""
        sparsifiers = [member.sparsifier for member in members]
        if any(sparsifiers):
            self.kept = torch.ones_like(weights)
        self.buffers = _stacked_buffers(members)
        """(K, …)"""
        for row in range(len(members)):
            self._take_over(row)
        self.leaves = self._leaves()
        """The weights as the parameters by name, (K, …) each: what a step is differentiated by,
        without putting it together."""
        self.rows = []
        """The same of each member alone."""
        self.updates = []
        for row, of_member in enumerate(weights):
            by_name = self._by_name(of_member)
            self.rows.append(by_name)
            update = self._update(row)
            self.updates.append(update)

    def _leaves(self) -> Tensors:
        leaves = {}
        named = self.named(self.weights)
        for name, tensor in named.items():
            leaf = tensor.detach()
            leaf.requires_grad_()
            leaves[name] = leaf
        return leaves

    def _take_over(self, row: int) -> None:
        """Makes the member's tensors views of its row, and takes over what its optimiser and its
        sparsifier remember."""
        model = self.members[row].model
        weights = self.weights[row]
        views = self._split(weights)
        parameters = model.parameters()
        for parameter, view in zip(parameters, views, strict=True):
            parameter.data = view
            parameter.grad = None
        for name, buffer in model.named_buffers():
            of_members = self.buffers[name]
            buffer.data = of_members[row]
        self._take_moments(row)
        self.refresh(row)

    def _update(self, row: int) -> Update:
        member = self.members[row]
        by_name = self.rows[row]
        weights = list(by_name.values())
        moments = self._moments_of(row)
        steps = self.steps[row]
        of_parameters = steps.unbind()
        return Update(member.optimizer, weights, moments, of_parameters)

    def _moments_of(self, row: int) -> Moments:
        """The moments of a member."""
        moments = []
        of_member = self.moments[:, row]
        for moment in of_member:
            parts = self._split(moment)
            moments.append(parts)
        return moments

    def _split(self, row: Tensor) -> list[Tensor]:
        """A row (P,) as the parameters of its member."""
        parts = row.split(self.sizes)
        shapes = self.shapes.values()
        views = []
        for part, shape in zip(parts, shapes, strict=True):
            view = part.view(shape)
            views.append(view)
        return views

    def _by_name(self, row: Tensor) -> Tensors:
        """The same by name."""
        views = self._split(row)
        pairs = zip(self.shapes, views, strict=True)
        return dict(pairs)

    def named(self, weights: Tensor) -> Tensors:
        """Rows (K, P) as the parameters by name, (K, …) each."""
        named = {}
        shapes = self.shapes.items()
        parts = weights.split(self.sizes, 1)
        for part, shape_of in zip(parts, shapes, strict=True):
            name, shape = shape_of
            named[name] = part.view(-1, *shape)
        return named

    def _take_moments(self, row: int) -> None:
        """Takes over what the member's optimiser remembers, zeros where it is nothing yet, and
        makes that a view."""
        member = self.members[row]
        remembered = Update.remembers(member.optimizer)
        self.moments[:, row] = 0
        self.steps[row] = 0
        if not remembered:
            return
        moments = self._moments_of(row)
        steps = self.steps[row]
        parameters = member.model.parameters()
        states = member.optimizer.state
        for number, parameter in enumerate(parameters):
            views = {"step": steps[number]}
            for name, moment in zip(MOMENTS, moments, strict=True):
                views[name] = moment[number]
            views["momentum_buffer"] = views["exp_avg"]
            state = states[parameter]
            for name in remembered:
                view = views[name]
                _replace(state, name, view)

    def lend_gradients(self, row: int, gradients: Sequence[Tensor]) -> None:
        """Gives the member its row of `gradients` (K, …) as the gradients of its parameters, until
        `refresh`."""
        member = self.members[row]
        parameters = member.model.parameters()
        for parameter, of_members in zip(parameters, gradients, strict=True):
            parameter.grad = of_members[row]

    def refresh(self, row: int) -> None:
        """Takes over what the member's sparsifier changed: masks, and an optimiser that forgot
        everything."""
        member = self.members[row]
        for parameter in member.model.parameters():
            parameter.grad = None
        if not member.optimizer.state:
            self._take_moments(row)
        sparsifier = member.sparsifier
        if self.kept is None or not sparsifier:
            return
        kept = self._by_name(self.kept[row])
        for name, mask in sparsifier.masks.items():
            kept[name].copy_(mask)

    def release(self, row: int) -> None:
        """Gives the member tensors of its own, with the values of its row; the stack no longer sees
        what becomes of them."""
        self.whole = False
        member = self.members[row]
        model = member.model
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        states = member.optimizer.state
        for state in states.values():
            for name, value in state.items():
                state[name] = value.clone()

    def train_step(
        self, step: Step, inputs: Tensor, targets: Tensor, plan: Plan, number: int
    ) -> TwoLosses:
        """Step `number` of the plan's epoch, on inputs (K, B, …) with targets (K, B, …); task and
        penalty losses (K,)."""
        strengths = plan.strengths[number]
        task, extra = step.losses(self.leaves, self.buffers, inputs, targets, strengths)
        of_members = task + extra
        loss = of_members.sum()
        gradients = self._gradients(loss)
        with torch.no_grad():
            due = self._due()
            for row, sparsifier in due.items():
                member = self.members[row]
                self.lend_gradients(row, gradients)
                sparsifier.before_step(member.step)
            self._update_weights(step, gradients, plan, number)
            for row, sparsifier in due.items():
                member = self.members[row]
                sparsifier.after_step(member.step)
                self.refresh(row)
            if self.kept is not None:
                self.weights *= self.kept
        for member in self.members:
            member.step += 1
        return task.detach(), extra.detach()

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        """Those of a loss by the parameters, (K, …) each.

        Contiguous, as the fused optimisers want them: vmap's rules give some transposed.
        """
        leaves = list(self.leaves.values())
        gradients = torch.autograd.grad(loss, leaves)
        return [gradient.contiguous() for gradient in gradients]

    def _update_weights(self, step: Step, gradients: list[Tensor], plan: Plan, number: int) -> None:
        """The steps of the optimisers along `gradients` (K, …), and the proximal steps."""
        if self.kept is not None:
            gradients = self._masked(gradients, self.kept)
        self.steps += 1
        rates = plan.rates[number]
        entries = plan.entries[number]
        thresholds = plan.thresholds[number]
        by_parameter = [gradient.unbind() for gradient in gradients]
        by_member = zip(*by_parameter, strict=True)
        for row, own in enumerate(by_member):
            update = self.updates[row]
            rate = rates[row]
            update(own, rate)
            if entries is not None:
                weights = self.rows[row]
                step.shrink_entries(weights, entries[row])
        if thresholds:
            stacked = self.named(self.weights)
            step.proximal(stacked, self.buffers, thresholds)

    def _masked(self, gradients: list[Tensor], kept: Tensor) -> list[Tensor]:
        """Gradients that are 0 where a weight was dropped."""
        named = self.named(kept)
        masked = []
        for gradient, mask in zip(gradients, named.values(), strict=True):
            # Not in place: two may be one tensor.
            product = gradient * mask
            masked.append(product)
        return masked

    def _due(self) -> dict[int, ActiveSparsifier]:
        """The sparsifiers that act in this step, by the row of their member."""
        due = {}
        for row, member in enumerate(self.members):
            sparsifier = member.sparsifier
            if sparsifier and sparsifier.due(member.step):
                due[row] = sparsifier
        return due


def _row(member: Training) -> Tensor:
    """All parameters of the member, one behind the other (P,)."""
    parameters = []
    for parameter in member.model.parameters():
        weights = parameter.detach()
        parameters.append(weights.flatten())
    return torch.cat(parameters)


def _replace(state: dict[str, Any], name: str, view: Tensor) -> None:
    """Puts a view in the place of what an optimiser remembers, with its values; zeros where it is
    nothing yet."""
    old = state.get(name)
    if old is None:
        view.zero_()
    else:
        view.copy_(old)
    state[name] = view


def _stacked_buffers(members: Sequence[Training]) -> Tensors:
    """The buffers of all members by name, (K, …) each."""
    buffers = []
    for member in members:
        named = member.model.named_buffers()
        buffers.append(dict(named))
    stacked = {}
    for name in buffers[0]:
        of_members = [each[name] for each in buffers]
        stacked[name] = torch.stack(of_members)
    return stacked
