"""The losses of a training, as one module: DistributedDataParallel must see every parameter that either of them reads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainables.penalties.base import ActivePenalty


class Losses(nn.Module):
    """The task loss of some examples, and what the penalties add to it."""

    def __init__(self, model: nn.Module, penalties: Sequence[ActivePenalty]) -> None:
        super().__init__()
        self.model = model
        self.penalties = penalties

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of `inputs` (N, …) with `labels` (N,), and penalty loss; the latter without gradient where none acts."""
        task_loss = nn.functional.cross_entropy(self.model(inputs), labels)
        extra = [value for value in (penalty.loss() for penalty in self.penalties) if value is not None]
        return task_loss, torch.stack(extra).sum() if extra else torch.zeros_like(task_loss)
