"""Sparse kernels: whether they make a network that has zeros inside its layers faster here is
measured, never assumed.

On the CPU compressed sparse rows (CSR). On GPUs 2:4: of every four weights in a row at most two are
non-zero, in half precision (Mishra et al. 2021, Accelerating sparse deep neural networks, arXiv
2104.08378, section 3), as the N:M sparsifier leaves them.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from slimfront.trainables.measures.latency import Latency, Timing, time_networks
from slimfront.trainables.structure.copying import copied

Kernel = Literal["CSR", "2:4"]

BATCHES = (1, 64)
"""The sizes of batch that networks are timed at."""
_COMPARED = 1024
"""Outputs are compared on at most so many inputs: the features of all at once would fill a
memory."""
_LEAST_SPARSITY = 0.5
"""Denser layers are left as they are: CSR has no chance there."""
_ROWS, _COLUMNS = 32, 64
"""What the sizes of a 2:4 weight in half precision must be multiples of."""
_TOLERANCE = {"CSR": 1e-4, "2:4": 1e-2}
"""How far, relative to the largest output, kernels may be off: 2:4 computes in half precision."""


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
        *before, _ = x.shape
        rows = x.flatten(0, -2)
        columns = self.weight @ rows.T
        made = columns.T
        out: Tensor = made.unflatten(0, before)
        if self.bias is None:
            return out
        return out + self.bias


class HalfLinear(nn.Module):
    """A linear layer that computes in half precision: what 2:4 kernels must be faster than."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight.detach().half()
        self.bias: Tensor | None = None
        if layer.bias is not None:
            self.bias = layer.bias.detach().half()

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out), both in the type of x."""
        *before, _ = x.shape
        rows = x.flatten(0, -2)
        halved = rows.half()
        made = F.linear(halved, self.weight, self.bias)
        made = made.to(x.dtype)
        out: Tensor = made.unflatten(0, before)
        return out


class SemiStructuredLinear(HalfLinear):
    """A linear layer with a 2:4 weight, in half precision, on a GPU."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        beta = "The PyTorch API of SparseSemiStructuredTensor"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=beta)
            self.weight = to_sparse_semi_structured(self.weight.contiguous())


def is_2_of_4(weight: Tensor) -> bool:
    """Whether the kernels can hold a weight (out, in): two zeros in every four weights of a row,
    and sizes that they take."""
    rows, columns = weight.shape
    if rows % _ROWS or columns % _COLUMNS:
        return False
    fours = weight.reshape(rows, -1, 4)
    alive = fours != 0
    nonzero = alive.sum(-1)
    fits = nonzero <= 2
    return bool(fits.all())


def _is_sparse(weight: Tensor) -> bool:
    zeros = weight == 0
    sparsity = float(zeros.float().mean())
    return sparsity >= _LEAST_SPARSITY


_SUITS: Mapping[Kernel, Callable[[Tensor], bool]] = {"CSR": _is_sparse, "2:4": is_2_of_4}
_LAYERS: Mapping[Kernel, type[nn.Module]] = {"CSR": CsrLinear, "2:4": SemiStructuredLinear}


def with_sparse_kernels(
    network: nn.Module, kernel: Kernel = "CSR", layer: type[nn.Module] | None = None
) -> nn.Module | None:
    """A copy of the network with sparse kernels in the linear layers that suit them; None if there
    are none.

    For CSR layers of which at least half is zero, for 2:4 those where `is_2_of_4`. The network is
    on the device of the kernels.

    Args:
        layer: another class to put in the place of the same layers.
    """
    made = copied(network)
    suits = _SUITS[kernel]
    if layer is None:
        layer = _LAYERS[kernel]
    changed = False
    for name, module in list(made.named_modules()):
        if not isinstance(module, nn.Linear) or not suits(module.weight):
            continue
        path, _, leaf = name.rpartition(".")
        parent = made.get_submodule(path)
        sparse = layer(module)
        setattr(parent, leaf, sparse)
        changed = True
    if not changed:
        return None
    return made.eval()


@dataclass(frozen=True)
class Tried:
    """What sparse kernels did to a network on the device that they are for."""

    kernel: Kernel
    device: str
    """Such as "this CPU", or the name of the GPU."""
    timings: Mapping[int, Timing]
    """By batch size: with the kernels, against the same layers without them, for 2:4 in half
    precision too."""
    difference: float
    """The largest difference of the outputs to those without, relative to the largest output."""
    faster: bool
    """Whether they were faster at every batch size, and no further off than their precision
    explains."""


def try_kernels(network: nn.Module, inputs: Tensor, latency: Latency | None = None) -> list[Tried]:
    """Times a network on the CPU, in evaluation mode, with each sparse kernel that suits it and
    that this machine has.

    Args:
        inputs: (N, *input_shape), on the CPU.
        latency: how times are taken, but for the size of the batch.
    """
    if latency is None:
        latency = Latency()
    tried = []
    on_cpu = _try(network, inputs, "CSR", "this CPU", latency)
    if on_cpu is not None:
        tried.append(on_cpu)
    if not has_2_of_4():
        return tried
    gpu = torch.cuda.get_device_name()
    there = copied(network).cuda()
    on_gpu = _try(there, inputs.cuda(), "2:4", gpu, latency)
    if on_gpu is not None:
        tried.append(on_gpu)
    return tried


@torch.no_grad()
def has_2_of_4() -> bool:
    """Whether there is a GPU, and its kernels and this build of torch can multiply by a 2:4
    weight."""
    if not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability() < (8, 0):
        return False
    layer = nn.Linear(_COLUMNS, _ROWS, device="cuda")
    fours = layer.weight.view(_ROWS, -1, 4)
    fours[..., :2] = 0
    ones = torch.ones(8, _COLUMNS, device="cuda")
    try:
        SemiStructuredLinear(layer)(ones)
    except RuntimeError:  # as torch says that it has no such kernel
        return False
    return True


def _try(
    network: nn.Module, inputs: Tensor, kernel: Kernel, device: str, latency: Latency
) -> Tried | None:
    sparse = with_sparse_kernels(network, kernel)
    if sparse is None:
        return None
    networks = [network, sparse]
    if kernel == "2:4":  # half precision alone may be what is faster
        half = with_sparse_kernels(network, kernel, HalfLinear)
        networks.insert(0, half or network)
    timings = {}
    faster = True
    for size in BATCHES:
        of_size = latency.model_copy(update={"batch_size": size})
        _, *rest, mine = time_networks(networks, inputs, of_size)
        timings[size] = mine
        least, _ = mine.spread
        to_beat = 1.0
        for other in rest:
            _, most = other.spread
            to_beat = max(to_beat, most)
        faster &= least > to_beat
    with torch.no_grad():
        some = inputs[:_COMPARED]
        made = sparse(some)
        wanted = network(some)
        difference = relative_difference(made, wanted)
    exact = difference <= _TOLERANCE[kernel]
    return Tried(kernel, device, timings, difference, faster and exact)


def relative_difference(made: Tensor, wanted: Tensor) -> float:
    """The largest difference of outputs to those wanted, relative to the largest of these."""
    sizes = wanted.abs()
    largest = sizes.max().clamp_min(1e-30)
    differences = (made - wanted).abs()
    relative = differences.max() / largest
    return float(relative)
