"""What is measured on a compact network: numbers of the network as it would ship."""

import io
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.described import KNOWN
from slimfront.trainables.measures.latency import Latency, time_networks
from slimfront.trainables.sparsifiers.base import is_own_layer
from slimfront.trainables.structure.attention import split_attention
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.tracing.trace import trace
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.torch_internals import without_compiler

_WEIGHT_LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)

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
        `layers`: linear and convolutional layers, the four projections of attention among them,
            and layers that are not of torch (see `sparsifiers.base.is_own_layer`);
        `flops`: floating-point operations for one input (a multiply-add is two, zeros count), by
            torch's counter; `bytes`: size of the saved state dict, dense, uncompressed;
        `bytes_sparse`: size of parameters and buffers, each dense, or as a bitmap and its non-zero
            entries where that is smaller;
        `peak_activation_bytes`: the largest sum of what must be kept between two operations for one
        input, the input included, but not the weights of attention, which fused kernels do not
        keep; not there where the network cannot be traced.
    """
    with evaluating(network):
        try:
            flops, peak = _watched(network, inputs[:1])
        except (RuntimeError, ValueError):
            if len(inputs) < 2:
                raise
            # It takes no single one, as batch norms without running statistics.
            flops, peak = _watched(network, inputs[:2])
            flops, peak = flops // 2, peak // 2 if peak is not None else None
    params = 0
    nonzero = 0
    for parameter in network.parameters():
        params += parameter.numel()
        nonzero += int(parameter.count_nonzero())
    state = distinct(network.state_dict(keep_vars=True))
    found: dict[str, float] = {
        "params": params,
        "nonzero_params": nonzero,
        "layers": sum(_count_layers(module) for module in network.modules()),
        "flops": flops,
        "bytes": _saved_bytes(state),
        "bytes_sparse": sum(_sparse_bytes(tensor) for tensor in state.values()),
    }
    if peak is not None:
        found["peak_activation_bytes"] = peak
    return found


def _saved_bytes(state: Mapping[str, Tensor]) -> int:
    # A GPU's names take bytes too.
    on_cpu = {}
    for name, tensor in state.items():
        on_cpu[name] = tensor.detach().cpu()
    saved = io.BytesIO()
    torch.save(on_cpu, saved)
    return saved.tell()


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
        state = distinct(network.state_dict(keep_vars=True))
        encoded = b"".join(map(_encoded, state.values()))
        compressed = zlib.compress(encoded)
        found["bytes_compressed"] = len(compressed)
    if "latency_ms" not in names and "speedup" not in names:
        return found
    reference = dense or network
    _, timing = time_networks([reference, network], inputs, latency)
    if "latency_ms" in names:
        found["latency_ms"] = timing.latency_ms
    if "speedup" in names:
        found["speedup"] = timing.speedup
    return found


def distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that keeps variables, those that have several names once."""
    seen = set()
    found = {}
    for name, tensor in state.items():
        identity = id(tensor)
        if identity in seen:
            continue
        seen.add(identity)
        found[name] = tensor
    return found


def _sparse_bytes(tensor: Tensor) -> int:
    """Size of a tensor, dense, or as one bit per entry and the entries that are not 0."""
    bits = tensor.numel()
    bitmap = math.ceil(bits / 8)
    nonzero = int(tensor.count_nonzero())
    entries = nonzero * tensor.element_size()
    sparse = bitmap + entries
    return min(tensor.nbytes, sparse)


def _encoded(tensor: Tensor) -> bytes:
    """What `_sparse_bytes` is the size of."""
    on_cpu = tensor.detach().cpu()
    entries: NDArray[Any] = on_cpu.flatten().numpy()
    dense = _sparse_bytes(tensor) == tensor.nbytes
    if dense:
        return entries.tobytes()
    alive = entries != 0
    bitmap = np.packbits(alive)
    kept: NDArray[Any] = entries[alive]
    return bitmap.tobytes() + kept.tobytes()


def _count_layers(module: nn.Module) -> int:
    """The layers that a module is, without those within it: query, key and value of attention are
    parameters of its own."""
    if isinstance(module, nn.MultiheadAttention):
        return 3
    return int(isinstance(module, _WEIGHT_LAYERS) or is_own_layer(module))


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

    def run_node(self, n: Node) -> Any:
        """Runs one operation; what is not used after it is dropped afterwards."""
        made = super().run_node(n)
        alive = (*self.env.values(), made)
        sizes = {}
        for value in alive:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            address = storage.data_ptr()
            sizes[address] = storage.nbytes()
        total = sum(sizes.values())
        self.peak = max(self.peak, total)
        return made


def _watched(network: nn.Module, one_input: Tensor) -> tuple[int, int | None]:
    """The floating-point operations for one input, and the peak of activation bytes if the network
    can be traced."""
    try:
        graph = trace(network)
        traced = _apart(graph)
    except UserError:
        flops = count_flops(network, one_input)
        return flops, None
    watch = _Watch(traced)
    own_input = one_input.clone()
    flops = _counted_flops(traced, lambda: watch.run(own_input))
    return flops, watch.peak


@torch.no_grad()
def count_flops(network: nn.Module, one_input: Tensor) -> int:
    """The floating-point operations of a network for `one_input` (1, *input_shape), by torch's
    counter."""
    return _counted_flops(network, lambda: network(one_input))


def _counted_flops(network: nn.Module, run: Callable[[], object]) -> int:
    """The operations of `run`, which runs the network."""
    with (
        plain_attention(),
        without_compiler(),
        _without_gradients(network),
        FlopCounterMode(display=False) as counter,
        _uncounted(network, counter) as extra,
    ):
        run()
    counted: int = counter.get_total_flops()
    return counted + sum(extra)


@contextmanager
def _without_gradients(network: nn.Module) -> Iterator[None]:
    """Within, no parameter asks for a gradient: torch's counter hooks on to what a module is given
    that does, and a view of a parameter that was taken without gradients has nothing to hook on
    to."""
    asking = []
    for parameter in network.parameters():
        can_be_set = parameter.is_leaf and not parameter.is_inference()
        if can_be_set and parameter.requires_grad:
            asking.append(parameter)
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _uncounted(network: nn.Module, counter: FlopCounterMode) -> Iterator[list[int]]:
    """Gathers the operations that torch's counter misses, whose kernels it does not know: recurrent
    and bilinear layers."""
    extra: list[int] = []
    before: list[int] = []

    def enter(*_of_call: object) -> None:
        counted = counter.get_total_flops()
        before.append(counted)

    def leave(module: nn.Module, inputs: Any, _outputs: object) -> None:
        first = inputs[0]
        counted = counter.get_total_flops() - before.pop()
        missed = _by_hand(module, first) - counted
        extra.append(missed)

    handles = []
    for module in network.modules():
        if not isinstance(module, nn.RNNBase | nn.Bilinear):
            continue
        entering = module.register_forward_pre_hook(enter)
        leaving = module.register_forward_hook(leave)
        handles += [entering, leaving]
    try:
        yield extra
    finally:
        for handle in handles:
            handle.remove()


def _by_hand(module: nn.Module, x: Any) -> int:
    """A multiply-add is two. Recurrent: for each step, two for each entry of its matrices;
    bilinear: xᵀA, and that times y."""
    rows = x
    if isinstance(x, nn.utils.rnn.PackedSequence):
        rows = x.data
    features = rows.shape[-1]
    steps = rows.numel() // features
    of_step = 0
    if isinstance(module, nn.Bilinear):
        products = module.out_features * module.in1_features
        of_each = module.in2_features + 1
        of_step = products * of_each
    else:
        for parameter in module.parameters():
            if parameter.dim() == 2:
                of_step += parameter.numel()
    multiply_adds: int = steps * of_step
    return 2 * multiply_adds


def _apart(traced: GraphModule) -> GraphModule:
    """The same with every attention split, so that what it keeps is seen."""
    modules = traced.modules()
    has_attention = any(isinstance(module, nn.MultiheadAttention) for module in modules)
    if not has_attention:
        return traced
    apart = copied(traced)
    split_attention(apart)
    return apart
