"""What is measured on a compact network: numbers of the network as it would ship."""

import io
import math
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainables.attention import split_attention
from trainables.errors import UserError
from trainables.gpu import to_device
from trainables.graph import copied, trace
from trainables.latency import Latency, time_networks

_WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

MEASURES = ("params", "nonzero_params", "layers", "flops", "bytes", "bytes_sparse", "peak_activation_bytes")
"""The names of the measures that are always taken, all of them better when smaller."""
EXTRA_MEASURES = ("bytes_compressed", "latency_ms", "speedup")
"""Those that are taken where they are asked for; of them only the speed-up is better when larger."""


@torch.no_grad()
def measure(network: nn.Module, inputs: Tensor) -> dict[str, float]:
    """The measures of a network.

    Args:
        network: the network as it would ship.
        inputs: (N, *input_shape), at least one real input.

    Returns:
        `params`: entries of all parameters; `nonzero_params`: those that are not exactly 0; `layers`: linear and
        convolutional layers, the four projections of attention among them; `flops`: floating-point operations for one input (a
        multiply-add is two, zeros count), by torch's counter; `bytes`: size of the saved state dict, dense, uncompressed;
        `bytes_sparse`: size of parameters and buffers, each dense, or as a bitmap and its non-zero entries where that is smaller;
        `peak_activation_bytes`: the largest sum of what must be kept between two operations for one input, the input included,
        but not the weights of attention, which fused kernels do not keep; not there where the network cannot be traced.
    """
    parameters = list(network.parameters())
    training = network.training
    network.eval()
    try:
        flops, peak = _watched(network, inputs[:1])
    finally:
        network.train(training)
    saved = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in network.state_dict().items()}, saved)  # a GPU's names take bytes too
    found: dict[str, float] = {
        "params": sum(p.numel() for p in parameters),
        "nonzero_params": sum(int(p.count_nonzero()) for p in parameters),
        "layers": sum(_count_layers(module) for module in network.modules()),
        "flops": flops,
        "bytes": saved.tell(),
        "bytes_sparse": sum(_sparse_bytes(tensor) for tensor in network.state_dict().values()),
    }
    if peak is not None:
        found["peak_activation_bytes"] = peak
    return found


@torch.no_grad()
def measure_extra(
    network: nn.Module, inputs: Tensor, names: Collection[str], dense: nn.Module | None = None, latency: Latency | None = None
) -> dict[str, float]:
    """Those of `EXTRA_MEASURES` that are in `names`.

    Args:
        inputs: (N, *input_shape), at least one real input.
        dense: the network that the speed-up is against; the network itself if None.
        latency: how times are taken.

    Returns:
        `bytes_compressed`: `bytes_sparse` after zlib; `latency_ms`: median time of a batch; `speedup`: how many times faster than
        `dense` the network is, the median of interleaved runs.
    """
    found: dict[str, float] = {}
    if "bytes_compressed" in names:
        found["bytes_compressed"] = len(zlib.compress(b"".join(_encoded(tensor) for tensor in network.state_dict().values())))
    if "latency_ms" in names or "speedup" in names:
        timing = time_networks([dense or network, network], inputs, latency)[1]
        times = {"latency_ms": timing.latency_ms, "speedup": timing.speedup}
        found |= {name: times[name] for name in times if name in names}
    return found


def _sparse_bytes(tensor: Tensor) -> int:
    """Size of a tensor, dense, or as one bit per entry and the entries that are not 0."""
    return min(tensor.nbytes, math.ceil(tensor.numel() / 8) + int(tensor.count_nonzero()) * tensor.element_size())


def _encoded(tensor: Tensor) -> bytes:
    """What `_sparse_bytes` is the size of."""
    flat = tensor.detach().cpu().flatten()
    if _sparse_bytes(tensor) == tensor.nbytes:
        return flat.numpy().tobytes()
    return np.packbits(flat.numpy() != 0).tobytes() + flat[flat != 0].numpy().tobytes()


def _count_layers(module: nn.Module) -> int:
    """The layers that a module is, without those within it: query, key and value of attention are parameters of its own."""
    return 3 if isinstance(module, nn.MultiheadAttention) else int(isinstance(module, _WEIGHT_LAYERS))


@contextmanager
def plain_attention() -> Iterator[None]:
    """Has attention computed by matrix products: torch's counter and vmap do not see into all of its fused kernels."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Watch(fx.Interpreter):
    """Runs a graph and remembers the largest sum of the tensors that were alive at once; views count once."""

    peak = 0

    def run_node(self, n: fx.Node) -> Any:
        """Runs one operation; what is not used after it is dropped afterwards."""
        made = super().run_node(n)
        alive = [value for value in (*self.env.values(), made) if isinstance(value, Tensor)]
        sizes = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in alive}
        self.peak = max(self.peak, sum(sizes.values()))
        return made


def _watched(network: nn.Module, one_input: Tensor) -> tuple[int, int | None]:
    """The floating-point operations for one input, and the peak of activation bytes if the network can be traced."""
    try:
        watch = _Watch(_apart(trace(network)))
    except UserError:
        watch = None
    with plain_attention(), FlopCounterMode(display=False) as counter:
        if watch is None:
            network(one_input)
        else:
            watch.run(one_input.clone())
    return counter.get_total_flops(), watch.peak if watch else None


@torch.no_grad()
def count_flops(network: nn.Module, one_input: Tensor) -> int:
    """The floating-point operations of a network for `one_input` (1, *input_shape), by torch's counter."""
    with plain_attention(), FlopCounterMode(display=False) as counter:
        network(one_input)
    flops: int = counter.get_total_flops()
    return flops


def _apart(traced: fx.GraphModule) -> fx.GraphModule:
    """The same with every attention split, so that what it keeps is seen."""
    if any(isinstance(module, nn.MultiheadAttention) for module in traced.modules()):
        traced = copied(traced)
        split_attention(traced)
    return traced


def accuracy(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    batch_size: int | None = None,
    prepare: Callable[[Tensor], Tensor] = lambda inputs: inputs,
) -> float:
    """The share of examples whose largest logit is at the label, in evaluation mode; see `count_right`."""
    return int(count_right(network, inputs, labels, batch_size, prepare)) / len(labels)


@torch.no_grad()
def count_right(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    batch_size: int | None = None,
    prepare: Callable[[Tensor], Tensor] = lambda inputs: inputs,
) -> Tensor:
    """How many examples have their largest logit at the label, in evaluation mode; `inputs` (N, …), `labels` (N,).

    Nothing here waits for a GPU.

    Args:
        batch_size: 4096 if None, or what makes batches of 64 MiB of float32 if that is less.
        prepare: makes what the network sees of a batch of inputs: `Dataset.prepare`, for inputs as a data set stores them.

    Returns:
        An int64 scalar on the device of the network's outputs.
    """
    batch_size = batch_size or max(1, min(4096, 2**24 // max(inputs[0].numel(), 1)))
    training = network.training
    network.eval()
    counts = []
    try:
        for some, wanted in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
            found = network(prepare(some)).argmax(1)
            counts.append((found == to_device(wanted, found.device)).sum())
    finally:
        network.train(training)
    return torch.stack(counts).sum()
