"""Connection sparsity: pushes single weights to zero.

The lasso (arXiv 2006.15604, section 2, sets Σ_j r_j ‖W^j‖_1 beside layer sparsity). Biases are free.
"""

from torch import Tensor, nn
from torch.nn.functional import softshrink

from trainables.penalties.base import PENALTIES, ActiveGroups, GroupPenalty
from trainables.sparsifiers.base import prunable_weights


def soft_threshold(weight: Tensor, threshold: Tensor) -> Tensor:
    """Proximal operator of `threshold` · ‖·‖₁: sign(w) · max(0, |w| − threshold), any shape. NaN in, NaN out."""
    return weight.sign() * (weight.abs() - threshold).clamp(min=0)


@PENALTIES.register("connection")
class ConnectionSparsity(GroupPenalty):
    """Connection sparsity; `strength` is λ. It acts on the weights of all linear and convolutional layers; needs no tracing."""

    def attach(self, model: nn.Module, sample: Tensor) -> ActiveGroups[Tensor]:
        groups = {name.removesuffix(".weight"): weight for name, weight in prunable_weights(model).items()}

        def shrink(weight: Tensor, threshold: Tensor) -> None:
            weight.copy_(softshrink(weight, float(threshold)))  # `soft_threshold` in one operation, but for the sign of zeros

        return ActiveGroups(self, groups, lambda weight: weight.abs().sum(), shrink)
