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
            self.sizes.append(parameter.numel())
        rows = [_row(member) for member in members]
        self.weights = torch.stack(rows)
        """(K, P)"""
        device = self.weights.device
        self.moments = self.weights.new_zeros(len(MOMENTS), *self.weights.shape)
        """(moments, K, P)"""
        count = len(self.sizes)
        self.steps = torch.zeros(len(members), count, dtype=torch.float32, device=device)
        """(K, parameters)"""
        self.kept: Tensor | None = None
        """(K, P), 0 where a sparsifier dropped a weight; None where there is no sparsifier."""
        if any(member.sparsifier for member in members):
            self.kept = torch.ones_like(self.weights)
        self.buffers = _stacked_buffers(members)
        """(K, …)"""
        for row in range(len(members)):
            self._take_over(row)
        self.leaves = {}
        """The weights as the parameters by name, (K, …) each: what a step is differentiated by,
        without putting it together."""
        for name, tensor in self.named(self.weights).items():
            leaf = tensor.detach()
            self.leaves[name] = leaf.requires_grad_()
        self.rows = []
        """The same of each member alone."""
        self.updates = []
        for row, weights in enumerate(self.weights):
            self.rows.append(self._by_name(weights))
            self.updates.append(self._update(row))

    def _take_over(self, row: int) -> None:
        """Makes the member's tensors views of its row, and takes over what its optimiser and its
        sparsifier remember."""
        model = self.members[row].model
        views = self._split(self.weights[row])
        for parameter, view in zip(model.parameters(), views, strict=True):
            parameter.data = view
            parameter.grad = None
        for name, buffer in model.named_buffers():
            of_members = self.buffers[name]
            buffer.data = of_members[row]
        self._take_moments(row)
        self.refresh(row)

    def _update(self, row: int) -> Update:
        optimizer = self.members[row].optimizer
        weights = list(self.rows[row].values())
        moments = self._moments_of(row)
        steps = self.steps[row].unbind()
        return Update(optimizer, weights, moments, steps)

    def _moments_of(self, row: int) -> list[list[Tensor]]:
        """The moments of a member, by kind and parameter."""
        moments = self.moments[:, row]
        return [self._split(moment) for moment in moments]

    def _split(self, row: Tensor) -> list[Tensor]:
        """A row (P,) as the parameters of its member."""
        parts = row.split(self.sizes)
        shapes = self.shapes.values()
        views = []
        for part, shape in zip(parts, shapes, strict=True):
            views.append(part.view(shape))
        return views

    def _by_name(self, row: Tensor) -> Tensors:
        """The same by name."""
        views = self._split(row)
        return dict(zip(self.shapes, views, strict=True))

    def named(self, weights: Tensor) -> Tensors:
        """Rows (K, P) as the parameters by name, (K, …) each."""
        named = {}
        shapes = self.shapes.items()
        parts = weights.split(self.sizes, 1)
        for part, (name, shape) in zip(parts, shapes, strict=True):
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
        for number, parameter in enumerate(member.model.parameters()):
            views = {"step": self.steps[row, number]}
            for name, moment in zip(MOMENTS, moments, strict=True):
                views[name] = moment[number]
            views["momentum_buffer"] = views["exp_avg"]
            state = member.optimizer.state[parameter]
            for name in remembered:
                _replace(state, name, views[name])

    def lend_gradients(self, row: int, gradients: Sequence[Tensor]) -> None:
        """Gives the member its row of `gradients` (K, …) as the gradients of its parameters, until
        `refresh`."""
        model = self.members[row].model
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient[row]

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
        for state in member.optimizer.state.values():
            for name, value in state.items():
                state[name] = value.clone()

    def train_step(
        self, step: Step, inputs: Tensor, targets: Tensor, plan: Plan, number: int
    ) -> tuple[Tensor, Tensor]:
        """Step `number` of the plan's epoch, on inputs (K, B, …) with targets (K, B, …); task and
        penalty losses (K,)."""
        strengths = plan.strengths[number]
        task, extra = step.losses(self.leaves, self.buffers, inputs, targets, strengths)
        of_members = task + extra
        loss = of_members.sum()
        leaves = list(self.leaves.values())
        gradients: Sequence[Tensor] = torch.autograd.grad(loss, leaves)
        # Contiguous, as the fused optimisers want them: vmap's rules give some transposed.
        gradients = [gradient.contiguous() for gradient in gradients]
        with torch.no_grad():
            due = self._due()
            for row, sparsifier in due.items():
                self.lend_gradients(row, gradients)
                sparsifier.before_step(self.members[row].step)
            self._update_weights(step, gradients, plan, number)
            for row, sparsifier in due.items():
                sparsifier.after_step(self.members[row].step)
                self.refresh(row)
            if self.kept is not None:
                self.weights *= self.kept
        for member in self.members:
            member.step += 1
        return task.detach(), extra.detach()

    def _update_weights(
        self, step: Step, gradients: Sequence[Tensor], plan: Plan, number: int
    ) -> None:
        """The steps of the optimisers along `gradients` (K, …), and the proximal steps."""
        if self.kept is not None:
            masks = self.named(self.kept).values()
            # Not in place: two may be one tensor.
            gradients = [gradient * mask for gradient, mask in zip(gradients, masks, strict=True)]
        self.steps += 1
        rates = plan.rates[number]
        entries = plan.entries[number]
        thresholds = plan.thresholds[number]
        by_parameter = [gradient.unbind() for gradient in gradients]
        by_member = zip(*by_parameter, strict=True)
        for row, own in enumerate(by_member):
            self.updates[row](own, rates[row])
            if entries is not None:
                step.shrink_entries(self.rows[row], entries[row])
        if thresholds:
            step.proximal(self.named(self.weights), self.buffers, thresholds)

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
        parameters.append(parameter.detach().flatten())
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
    buffers = [dict(member.model.named_buffers()) for member in members]
    stacked = {}
    for name in buffers[0]:
        of_members = [each[name] for each in buffers]
        stacked[name] = torch.stack(of_members)
    return stacked
