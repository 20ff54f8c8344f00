"""Sparse kernels: whether they make an unstructured-sparse network faster here is measured, never assumed."""

import copy
import warnings

from torch import Tensor, nn

_LEAST_SPARSITY = 0.5
"""Denser layers are left as they are: CSR has no chance there."""


class CsrLinear(nn.Module):
    """A linear layer whose weight is in compressed sparse rows (CSR), on the CPU."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.weight = layer.weight.detach().to_sparse_csr()
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        out: Tensor = (self.weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def with_sparse_kernels(network: nn.Module) -> nn.Module | None:
    """A copy of the network with CSR kernels in its linear layers of which at least half is zero; None if it has none."""
    made, changed = copy.deepcopy(network), False
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.Linear) and float((module.weight == 0).float().mean()) >= _LEAST_SPARSITY:
            parent, _, leaf = name.rpartition(".")
            setattr(made.get_submodule(parent), leaf, CsrLinear(module))
            changed = True
    return made.eval() if changed else None
