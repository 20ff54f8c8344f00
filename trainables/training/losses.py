"""The losses of a training, as one module: DistributedDataParallel must see every parameter that
either of them reads."""

import torch
from torch import Tensor, nn

from slimfront.trainables.penalties.cka import ActiveFeatures
from slimfront.trainables.precision import forward_pass
from slimfront.trainables.tasks import ActiveTask
from slimfront.trainables.training.acceleration.compiled import Compiled
from slimfront.trainables.training.distillation import FeatureMatching
from slimfront.trainables.training.slimming import Acting

TwoLosses = tuple[Tensor, Tensor]
"""The task loss of some examples, and what the penalties add to it."""


class Losses(nn.Module):
    """The task loss of some examples, and what the penalties add to it."""

    def __init__(
        self,
        model: nn.Module,
        acting: Acting,
        task: ActiveTask,
        *,
        bf16: bool = False,
        compiled: Compiled | None = None,
        matching: FeatureMatching | None = None,
    ) -> None:
        """With `bf16` the network computes in bfloat16; both losses are taken in float32.
        `compiled` is `model`; `matching` compares its layers with a teacher's."""
        super().__init__()
        self.model = model
        self.acting = acting
        self.task = task
        self.bf16 = bf16
        self.compiled = compiled
        self.matching = matching

    def forward(self, inputs: Tensor, targets: Tensor) -> TwoLosses:
        """The task loss of `inputs` (N, …) with `targets` (N, …), and penalty loss; the latter
        without gradient where none acts."""
        watched = self.matching is not None or any(
            isinstance(penalty, ActiveFeatures) and penalty.features.watching
            for penalty in self.acting.penalties
        )
        network = self.model if watched or self.compiled is None else self.compiled
        with forward_pass(inputs.device, self.bf16):
            outputs = network(inputs)
        task_loss = self.task.loss(outputs, targets)
        extra = self.acting.losses()
        if self.matching is not None and (apart := self.matching.loss()) is not None:
            extra.append(apart)
        if not extra:
            return task_loss, torch.zeros_like(task_loss)
        return task_loss, torch.stack(extra).sum()
