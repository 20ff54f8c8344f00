"""What is measured on a compact network: numbers of the network as it would ship."""

import io
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.described import KNOWN
from slimfront.trainables.measures.latency import Latency, time_networks
from slimfront.trainables.structure.attention import split_attention
from slimfront.trainables.structure.graph import copied, trace

_WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

MEASURES = tuple(name for name, known in KNOWN.items() if not known.asked)
"""The names of the measures that are always taken."""
EXTRA_MEASURES = tuple(name for name, known in KNOWN.items() if known.asked)
"""Those that are taken where they are asked for."""


@torch.no_grad()
def measure(network: nn.Module, inputs: Tensor) -> dict[str, float]:
    """The measures of a network.

    Args:
        network: the network as it would ship.
        inputs: (N, *input_shape), at least one real input.

    Returns:
        `params`: entries of all parameters; `nonzero_params`: those that are not exactly 0;
        `layers`: linear and convolutional layers, the four projections of attention among them;
        `flops`: floating-point operations for one input (a multiply-add is two, zeros count), by
            torch's counter; `bytes`: size of the saved state dict, dense, uncompressed;
        `bytes_sparse`: size of parameters and buffers, each dense, or as a bitmap and its non-zero
            entries where that is smaller;
        `peak_activation_bytes`: the largest sum of what must be kept between two operations for one
        input, the input included, but not the weights of attention, which fused kernels do not
        keep; not there where the network cannot be traced.
    """
    parameters = list(network.parameters())
    training = network.training
    network.eval()
    try:
        flops, peak = _watched(network, inputs[:1])
    finally:
        network.train(training)
    saved = io.BytesIO()
    state = distinct(network.state_dict(keep_vars=True))
    # A GPU's names take bytes too.
    torch.save({name: tensor.detach().cpu() for name, tensor in state.items()}, saved)
    found: dict[str, float] = {
        "params": sum(p.numel() for p in parameters),
        "nonzero_params": sum(int(p.count_nonzero()) for p in parameters),
        "layers": sum(_count_layers(module) for module in network.modules()),
        "flops": flops,
        "bytes": saved.tell(),
        "bytes_sparse": sum(_sparse_bytes(tensor) for tensor in state.values()),
    }
    if peak is not None:
        found["peak_activation_bytes"] = peak
    return found


@torch.no_grad()
def measure_extra(
    network: nn.Module,
    inputs: Tensor,
    names: Collection[str],
    dense: nn.Module | None = None,
    latency: Latency | None = None,
) -> dict[str, float]:
    """Those of `EXTRA_MEASURES` that are in `names`.

    Args:
        inputs: (N, *input_shape), at least one real input.
        dense: the network that the speed-up is against; the network itself if None.
        latency: how times are taken.

    Returns:
        `bytes_compressed`: `bytes_sparse` after zlib; `latency_ms`: median time of a batch;
        `speedup`: how many times faster than `dense` the network is, the median of interleaved
            runs.
    """
    found: dict[str, float] = {}
    if "bytes_compressed" in names:
        found["bytes_compressed"] = len(
            zlib.compress(
                b"".join(
                    _encoded(tensor)
                    for tensor in distinct(network.state_dict(keep_vars=True)).values()
                )
            )
        )
    if "latency_ms" in names or "speedup" in names:
        timing = time_networks([dense or network, network], inputs, latency)[1]
        times = {"latency_ms": timing.latency_ms, "speedup": timing.speedup}
        found |= {name: times[name] for name in times if name in names}
    return found


def distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that keeps variables, those that have several names once."""
    first: dict[int, str] = {}
    return {
        name: tensor for name, tensor in state.items() if first.setdefault(id(tensor), name) == name
    }


def _sparse_bytes(tensor: Tensor) -> int:
    """Size of a tensor, dense, or as one bit per entry and the entries that are not 0."""
    return min(
        tensor.nbytes,
        math.ceil(tensor.numel() / 8) + int(tensor.count_nonzero()) * tensor.element_size(),
    )


def _encoded(tensor: Tensor) -> bytes:
    """What `_sparse_bytes` is the size of."""
    flat = tensor.detach().cpu().flatten()
    if _sparse_bytes(tensor) == tensor.nbytes:
        return flat.numpy().tobytes()
    return np.packbits(flat.numpy() != 0).tobytes() + flat[flat != 0].numpy().tobytes()


def _count_layers(module: nn.Module) -> int:
    """The layers that a module is, without those within it: query, key and value of attention are
    parameters of its own."""
    if isinstance(module, nn.MultiheadAttention):
        return 3
    return int(isinstance(module, _WEIGHT_LAYERS))


@contextmanager
def plain_attention() -> Iterator[None]:
    """Has attention computed by matrix products: torch's counter and vmap do not see into all of
    its fused kernels."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Watch(fx.Interpreter):
    """Runs a graph and remembers the largest sum of the tensors that were alive at once; views
    count once."""

    peak = 0

    def run_node(self, n: fx.Node) -> Any:
        """Runs one operation; what is not used after it is dropped afterwards."""
        made = super().run_node(n)
        alive = [value for value in (*self.env.values(), made) if isinstance(value, Tensor)]
        sizes = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in alive
        }
        self.peak = max(self.peak, sum(sizes.values()))
        return made


def _watched(network: nn.Module, one_input: Tensor) -> tuple[int, int | None]:
    """The floating-point operations for one input, and the peak of activation bytes if the network
    can be traced."""
    try:
        watch = _Watch(_apart(trace(network)))
    except UserError:
        watch = None
    counted = network if watch is None else watch.module
    with (
        plain_attention(),
        FlopCounterMode(display=False) as counter,
        _uncounted(counted, counter) as extra,
    ):
        if watch is None:
            network(one_input)
        else:
            watch.run(one_input.clone())
    return counter.get_total_flops() + sum(extra), watch.peak if watch else None


@torch.no_grad()
def count_flops(network: nn.Module, one_input: Tensor) -> int:
    """The floating-point operations of a network for `one_input` (1, *input_shape), by torch's
    counter."""
    with (
        plain_attention(),
        FlopCounterMode(display=False) as counter,
        _uncounted(network, counter) as extra,
    ):
        network(one_input)
    flops: int = counter.get_total_flops() + sum(extra)
    return flops


@contextmanager
def _uncounted(network: nn.Module, counter: FlopCounterMode) -> Iterator[list[int]]:
    """Gathers the operations that torch's counter misses, whose kernels it does not know: recurrent
    and bilinear layers."""
    extra: list[int] = []
    before: list[int] = []

    def enter(_module: nn.Module, _inputs: object) -> None:
        before.append(counter.get_total_flops())

    def leave(module: nn.Module, inputs: tuple[Any, ...], _outputs: object) -> None:
        extra.append(_by_hand(module, inputs[0]) - (counter.get_total_flops() - before.pop()))

    modules = [
        module for module in network.modules() if isinstance(module, nn.RNNBase | nn.Bilinear)
    ]
    handles = [
        hook
        for m in modules
        for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))
    ]
    try:
        yield extra
    finally:
        for handle in handles:
            handle.remove()


def _by_hand(module: nn.Module, x: Any) -> int:
    """A multiply-add is two. Recurrent: for each step, two for each entry of its matrices;
    bilinear: xᵀA, and that times y."""
    if isinstance(module, nn.Bilinear):
        examples: int = x.numel() // x.shape[-1]
        return 2 * examples * module.out_features * module.in1_features * (module.in2_features + 1)
    steps: int = (
        x.data.shape[0] if isinstance(x, nn.utils.rnn.PackedSequence) else x.numel() // x.shape[-1]
    )
    return 2 * steps * sum(p.numel() for p in module.parameters() if p.dim() == 2)


def _apart(traced: fx.GraphModule) -> fx.GraphModule:
    """The same with every attention split, so that what it keeps is seen."""
    if any(isinstance(module, nn.MultiheadAttention) for module in traced.modules()):
        traced = copied(traced)
        split_attention(traced)
    return traced
