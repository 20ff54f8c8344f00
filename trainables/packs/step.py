"""The step of a pack: losses, gradients and proximal steps of all members at once, by
`torch.func.vmap`.

A copy of the network runs under vmap with the stacked parameters in place of its own, so that any
forward that vmap takes can be packed: linear layers become batched matrix products, and
convolutions grouped ones. Batch norm in training, which writes its running statistics, is taken by
vmap as soon as these are stacked too: it becomes one batch norm over K · C channels, in place.
Replacing it by a functional one of ours was not needed. CKA-SR's hooks catch features within vmap,
where its loss is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.measures.measure import plain_attention
from slimfront.trainables.packs.modules import replace_layers
from slimfront.trainables.penalties.base import ActiveGroups, ActivePenalty, Penalty
from slimfront.trainables.penalties.cka import ActiveFeatures
from slimfront.trainables.penalties.features import remove_hooks
from slimfront.trainables.precision import forward_pass
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.tasks import ActiveTask
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.training.loop import Training

Tensors = dict[str, Tensor]
Place = tuple[dict[str, Any], str, str]
"""Where a module holds a tensor: a dictionary and a key, and the name of what belongs there."""


class Step:
    """What the members of a pack compute together: on tensors with a row for each of the K of
    them."""

    def __init__(
        self,
        model: nn.Module,
        penalties: dict[str, Penalty],
        sample: Tensor,
        task: ActiveTask,
        *,
        bf16: bool = False,
    ) -> None:
        """`model` is copied; `penalties` act on the copy, their strengths are given in each step.
        `sample` as for `attach`.

        With `bf16` the network computes in bfloat16 in `losses`.
        """
        self.bf16 = bf16
        self.task = task
        self.model = copied(model)
        remove_hooks(self.model)
        self.penalties: dict[str, ActivePenalty] = {}
        for name, options in penalties.items():
            self.penalties[name] = options.attach(self.model, sample)
        self.model.train()
        modules = self.model.modules()
        self.attends = any(isinstance(module, nn.MultiheadAttention) for module in modules)
        self.places = _places(self.model)
        self.entries = self._entries()
        replace_layers(self.model, bf16=bf16)  # after `attach`, which traces the network

    def _entries(self) -> tuple[str, list[str]] | None:
        """The penalty whose proximal step comes first, and its parameters, if it takes each entry
        by itself.

        On a CPU that step is taken for each member behind that of the optimiser, while the weights
        are at hand.
        """
        for parameter in self.model.parameters():
            if parameter.device.type != "cpu":
                return None
        proximal = [name for name in self.penalties if self.by_proximal(name)]
        if not proximal:
            return None
        first = proximal[0]
        penalty = self.penalties[first]
        if not isinstance(penalty, ActiveGroups):
            return None
        if penalty.shrink_entries is None:
            return None
        names = _names_by_id(self.model)
        acted_on = []
        for group in penalty.groups.values():
            identity = id(group.tensor)
            acted_on.append(names[identity])
        return first, acted_on

    def shrink_entries(self, weights: Tensors, thresholds: Sequence[float]) -> None:
        """The proximal step of `entries` on one member's weights, in place; a threshold for each of
        its parameters."""
        assert self.entries is not None
        name, parameters = self.entries
        penalty = self.penalties[name]
        assert isinstance(penalty, ActiveGroups)
        shrink = penalty.shrink_entries
        assert shrink is not None
        for parameter, threshold in zip(parameters, thresholds, strict=True):
            if threshold > 0:
                shrink(weights[parameter], threshold)

    def losses(
        self,
        parameters: Tensors,
        buffers: Tensors,
        inputs: Tensor,
        targets: Tensor,
        strengths: Tensors,
    ) -> tuple[Tensor, ...]:
        """Task and penalty losses (K,) of inputs (K, B, …) with targets (K, B, …); buffers are
        written in place.

        Args:
            strengths: (K, groups) by the name of the penalty, of those that add to the loss in this
                step.
        """
        for name, penalty in self.penalties.items():
            if isinstance(penalty, ActiveFeatures):
                penalty.features.watch(name in strengths)

        def of_one(inputs: Tensor, strengths: Tensors) -> tuple[Tensor, list[Tensor]]:
            with forward_pass(inputs.device, self.bf16):
                outputs = self.model(inputs)
            found = []
            for name, strength in strengths.items():
                loss = _loss(self.penalties[name], strength)
                if loss is not None:
                    found.append(loss)
            return outputs, found

        outputs, extra = self._together(of_one, parameters, buffers, inputs, strengths)
        task_losses = self.task.losses(outputs, targets)
        if not extra:
            return task_losses, torch.zeros_like(task_losses)
        return task_losses, torch.stack(extra).sum(0)

    def proximal(self, parameters: Tensors, buffers: Tensors, thresholds: Tensors) -> None:
        """The proximal steps of the group penalties, in place; `thresholds` (K, groups) by the name
        of the penalty."""

        def of_one(thresholds: Tensors) -> Tensors:
            for name, threshold in thresholds.items():
                penalty = self.penalties[name]
                assert isinstance(penalty, ActiveGroups)
                groups = penalty.groups.values()
                of_groups = threshold.unbind()
                for group, own in zip(groups, of_groups, strict=True):
                    penalty.shrink(group, own)
            return thresholds

        with torch.no_grad():
            self._together(of_one, parameters, buffers, thresholds)

    @torch.no_grad()
    def outputs(self, parameters: Tensors, buffers: Tensors, inputs: Tensor) -> Tensor:
        """What the members make of the same inputs (N, …), in evaluation mode: (K, N, outputs)."""

        def of_one() -> Any:
            return self.model(inputs)

        with evaluating(self.model):
            made: Tensor = self._together(of_one, parameters, buffers)
        return made

    def _together(
        self, function: Callable[..., Any], parameters: Tensors, buffers: Tensors, *stacked: Any
    ) -> Any:
        """`function` of each row of `stacked`, with the same rows of parameters and buffers in the
        network."""

        def of_one(tensors: Tensors, *rows: Any) -> Any:
            for kept, leaf, name in self.places:
                kept[leaf] = tensors[name]
            return function(*rows)

        attention = plain_attention() if self.attends else nullcontext()
        all_tensors = {**parameters, **buffers}
        own = [kept[leaf] for kept, leaf, _ in self.places]
        try:
            with _told_plainly(), attention:
                return vmap(of_one)(all_tensors, *stacked)
        finally:
            for (kept, leaf, _), tensor in zip(self.places, own, strict=True):
                kept[leaf] = tensor

    def strengths(self, name: str, options: Penalty) -> list[float]:
        """The full strengths that a member's options of the penalty give its groups; a features
        penalty is one group."""
        penalty = self.penalties[name]
        if isinstance(penalty, ActiveGroups):
            return penalty.strengths(options)  # type: ignore[arg-type]
        return [options.strength]

    def by_proximal(self, name: str) -> bool:
        """Whether the penalty acts by its proximal step, and not by the loss."""
        penalty = self.penalties[name]
        if not isinstance(penalty, ActiveGroups):
            return False
        return penalty.options.form == "proximal"


def step_of(member: Training, sample: Tensor) -> Step:
    """The step of packs of a member's kind; `sample` (N, *input_shape) are prepared inputs."""
    return Step(
        member.model,
        member.candidate.penalties,
        sample,
        member.taught.task,
        bf16=member.options.bf16,
    )


def _loss(penalty: ActivePenalty, strengths: Tensor) -> Tensor | None:
    """strength · penalty of one member; None if it adds nothing in this step."""
    if isinstance(penalty, ActiveGroups):
        return penalty.weighted(strengths.unbind())
    assert isinstance(penalty, ActiveFeatures)
    value = penalty.value()
    if value is None:
        return None
    return strengths[0] * value


def _places(model: nn.Module) -> list[Place]:
    """Where a network holds its parameters and buffers.

    `torch.func.functional_call` looks for them anew in each call, which takes longer than the
    layers of a small network.
    """
    names = _names_by_id(model)
    places = []
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for leaf, held in kept.items():
                if held is None:
                    continue
                name = names[id(held)]
                places.append((kept, leaf, name))
    return places


def _names_by_id(model: nn.Module) -> dict[int, str]:
    """The names of parameters and buffers, by identity."""
    names = {}
    named = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in named:
        identity = id(tensor)
        names[identity] = name
    return names


@contextmanager
def _told_plainly() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise UserError(
            "this network cannot be trained in a pack, because torch.func.vmap refuses it "
            f"({first_line(error)}); set resources.pack to 1"
        ) from error
