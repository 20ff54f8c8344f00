"""The optimiser's step of one member of a pack: torch's own fused kernels, on all its parameters in
one call.

One call per member is faster on a CPU than one formula over the stack with the learning rates as a
column: the kernel reads each number once, the formula eight times. Members may so have different
optimisers, too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimfront.trainables.training.optimizers import adam_, sgd_

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What is kept for an optimiser, by the names that Adam gives them; SGD's momentum is in the
first."""


class Update:
    """The step of torch's SGD, Adam or AdamW, with the hyperparameters of `optimizer`.

    Args:
        weights: the parameters.
        moments: tensors of their shapes, for each of `MOMENTS`.
        steps: a scalar for each, the number of steps taken, which the caller counts before each.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],
        steps: Sequence[Tensor],
    ) -> None:
        self.group = optimizer.param_groups[0]
        self.weights = list(weights)
        self.steps = list(steps)
        self.first, self.second = map(list, moments)
        self.sgd = isinstance(optimizer, torch.optim.SGD)

    @staticmethod
    def remembers(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
        """The names of what the optimiser keeps of each parameter."""
        if isinstance(optimizer, torch.optim.SGD):
            if optimizer.param_groups[0]["momentum"]:
                return ("momentum_buffer",)
            return ()
        return ("step", *MOMENTS)

    def __call__(self, gradients: tuple[Tensor, ...], lr: float) -> None:
        """One step along the gradients of the parameters."""
        if not self.sgd:
            adam_(
                group=self.group,
                weights=self.weights,
                gradients=gradients,
                first=self.first,
                second=self.second,
                steps=self.steps,
                lr=lr,
            )
            return
        momenta = []
        if self.group["momentum"]:
            momenta = self.first
        sgd_(group=self.group, weights=self.weights, gradients=gradients, momenta=momenta, lr=lr)
