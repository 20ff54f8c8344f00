"""Our own graph of units: on networks of each kind, and on random ones, units that are zero go and
the outputs stay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm

from slimfront.trainables.compaction import compact, deserialise, serialise
from slimfront.trainables.post_training.shrinkable import what_can_shrink
from slimfront.trainables.structure.agreement import Probe
from slimfront.trainables.structure.coupling import graph_of_units
from slimfront.trainables.structure.coupling.units import NONE, Units, packed, packed_shape
from slimfront.trainables.structure.shared_units import shared_units
from slimfront.trainables.structure.tracing.trace import trace

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randint(0, 20, (6, 7), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Network(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, does: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.does = does

    def forward(self, x: Tensor) -> Any:
        return self.does(self, x)


def shuffled(net: Any, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    b, c, h, w = x.shape
    x = x.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)
    return net.head(net.c(net.b(x).relu()).relu().mean((2, 3)))


def attended(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    b, n, c = x.shape
    q, k, v = net.qkv(net.norm(x)).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-2, -1)) * 0.5
    x = x + net.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))
    x = x + net.down(F.gelu(net.up(net.norm2(x))))
    return net.head(net.norm3(x).mean(1))


def gated(net: Any, x: Tensor) -> Tensor:
    x = F.relu6(net.depth(F.hardswish(net.norm(net.stem(x)))))
    gate = torch.sigmoid(net.expand(F.relu(net.squeeze(F.adaptive_avg_pool2d(x, 1)))))
    x = net.out(x * gate + x).relu()
    return net.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def dense(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    x = torch.cat([x, net.b(net.n1(x).relu())], 1)
    x = torch.cat([x, net.c(net.n2(x).relu())], 1)
    return net.head(x.mean((2, 3)))


def both_ways(net: Any, x: Tensor) -> Tensor:
    return net.head(net.recurrent(net.embed(x))[0][:, -1])


def u_shaped(net: Any, x: Tensor) -> Tensor:
    wide = net.a(x).relu()
    narrow = net.b(wide).relu()
    return net.out(net.c(torch.cat([wide, net.up(narrow).relu()], 1)).relu())


def grouped(net: Any, x: Tensor) -> Tensor:
    return net.head(net.n2(net.b(net.n1(net.a(x)).relu())).relu().mean([2, 3]))


def mixed(net: Any, x: Tensor) -> Tensor:
    x = net.patches(x).flatten(2).transpose(1, 2)
    x = x + net.t2(F.gelu(net.t1(net.n1(x).transpose(1, 2)))).transpose(1, 2)
    x = x + net.c2(F.gelu(net.c1(net.n2(x))))
    return net.head(x.mean(1))


def chosen_by_shape(net: Any, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    if x.shape[-1] > 8:
        x = F.avg_pool2d(x, 2)
    for _ in range(int(x.shape[-1] // 4)):
        x = x + net.b(x).relu()
    return net.head(x.mean((2, 3)))


def normed_by_shape(net: Any, x: Tensor) -> Tensor:
    x = net.act(net.norm(net.a(x)))
    if x.shape[-1] % 4 == 0:
        x = x + net.act(net.norm2(net.b(x)))
    return net.head(x.mean((2, 3)))


def split_and_shuffled(net: Any, x: Tensor) -> Tensor:
    one, other = net.a(x).chunk(2, 1)
    x = net.slopes(torch.cat([other, one * torch.tanh(other)], 1))
    x = F.pixel_shuffle(net.b(x), 2)
    return net.head(x[:, :, 1:-1].flatten(2).amax(-1))


CONVS = {"padding": 1}


def by_steps(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    state = None
    for step in range(x.shape[1]):
        state = net.cell(F.relu(net.inward(x[:, step])), state)
    assert state is not None
    return net.head(state[0] if isinstance(state, tuple) else state)


def by_steps_from_zero(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    state = x.new_zeros(x.shape[0], 12)
    for step in range(x.shape[1]):
        state = net.cell(F.relu(net.inward(x[:, step])), state)
    return net.head(state)


def from_zero_states(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    zero = torch.zeros(net.recurrent.num_layers, x.size(0), 12).to(x)
    state = (zero, zero) if isinstance(net.recurrent, nn.LSTM) else zero
    x, _ = net.recurrent(x, state)
    return net.head(x[:, -1])


def from_a_learned_state(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    x, _ = net.recurrent(x, net.start.expand(1, x.shape[0], 12).contiguous())
    return net.head(x[:, -1])


def attended_by_function(net: Any, x: Tensor) -> Tensor:
    x = net.embed(x)
    b, n, c = x.shape
    q, k, v = net.qkv(net.norm(x)).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
    x = x + net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
    return net.head(x.mean(1))


def in_patches(net: Any, x: Tensor) -> Tensor:
    """As in MobileViT: attention within what lies at the same place of each patch."""
    x = net.a(x).relu()
    b, c, h, w = x.shape
    x = x.reshape(b * c * (h // 2), 2, w // 2, 2).transpose(1, 2)
    x = x.reshape(b, c, h * w // 4, 4).transpose(1, 3).reshape(b * 4, h * w // 4, c)
    x = x + net.down(F.gelu(net.up(x)))
    x = (
        x.contiguous()
        .view(b, 4, h * w // 4, c)
        .transpose(1, 3)
        .reshape(b * c * h // 2, w // 2, 2, 2)
    )
    return net.head(net.b(x.transpose(1, 2).reshape(b, c, h, w)).relu().mean((2, 3)))


def in_patches_by_shape(net: Any, x: Tensor) -> Tensor:
    return in_patches(net, x) if x.shape[-1] % 2 == 0 else net.head(x.mean((2, 3)))


def answering(net: Any, x: Tensor) -> Tensor:
    """Global response normalisation, as in ConvNeXt V2."""
    x = F.gelu(net.a(x))
    size = x.norm(p=2, dim=(2, 3), keepdim=True)
    response = x * (size / (size.mean(1, keepdim=True) + 1e-6))
    x = x + torch.addcmul(net.shift.view(1, -1, 1, 1), net.scale.view(1, -1, 1, 1), response)
    return net.head(net.b(x).mean((2, 3)))


class Answering(Network):
    def __init__(self) -> None:
        super().__init__(
            answering,
            a=nn.Conv2d(3, 16, 3),
            b=nn.Conv2d(16, 8, 3),
            head=nn.Linear(8, 3),
        )
        self.scale = nn.Parameter(torch.randn(16))
        self.shift = nn.Parameter(torch.randn(16))


class LearnedStart(Network):
    def __init__(self) -> None:
        super().__init__(
            from_a_learned_state,
            embed=nn.Embedding(20, 8),
            recurrent=nn.GRU(8, 12, batch_first=True),
            head=nn.Linear(12, 3),
        )
        self.start = nn.Parameter(torch.rand(1, 1, 12))


class Blurred(Network):
    """Channels are blurred by one kernel, as where signals are kept free of aliases."""

    def __init__(self) -> None:
        super().__init__(
            blurred,
            a=nn.Conv2d(3, 16, 3, padding=1),
            b=nn.Conv2d(16, 8, 3, padding=1),
            head=nn.Linear(8, 3),
        )
        self.register_buffer("kernel", torch.rand(1, 1, 3, 3))
        self.mixing = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)


def blurred(net: Any, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    x = F.conv2d(x, net.mixing, padding=1).relu()
    channels = x.shape[1]
    kernel = net.kernel.expand(channels, 1, 3, 3)
    x = F.conv2d(x, kernel, stride=2, padding=1, groups=channels)
    return net.head(net.b(x).relu().mean((2, 3)))


CELLS = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)
MADE: dict[str, tuple[Callable[[], Network], Tensor, float]] = {
    "channel shuffle": (
        lambda: Network(
            shuffled,
            a=nn.Conv2d(3, 16, 1),
            b=nn.Conv2d(16, 16, 3, padding=1, groups=4),
            c=nn.Conv2d(16, 8, 1),
            head=nn.Linear(8, 4),
        ),
        IMAGES,
        0.8,
    ),
    "attention": (
        lambda: Network(
            attended,
            embed=nn.Linear(16, 16),
            norm=nn.LayerNorm(16),
            qkv=nn.Linear(16, 48),
            out=nn.Linear(16, 16),
            norm2=nn.LayerNorm(16),
            up=nn.Linear(16, 32),
            down=nn.Linear(32, 16),
            norm3=nn.LayerNorm(16),
            head=nn.Linear(16, 5),
        ),
        ROWS,
        0.5,
    ),
    "attention by the function": (
        lambda: Network(
            attended_by_function,
            embed=nn.Linear(16, 16),
            norm=nn.LayerNorm(16),
            qkv=nn.Linear(16, 48),
            out=nn.Linear(16, 16),
            head=nn.Linear(16, 5),
        ),
        ROWS,
        0.5,
    ),
    **{
        does.__name__.replace("_", " "): (
            lambda does=does: Network(  # type: ignore[misc]
                does,
                a=nn.Conv2d(3, 12, 3, padding=1),
                up=nn.Linear(12, 24),
                down=nn.Linear(24, 12),
                b=nn.Conv2d(12, 8, 3, padding=1),
                head=nn.Linear(8, 3),
            ),
            IMAGES,
            0.5,
        )
        for does in (in_patches, in_patches_by_shape)
    },
    "global response norm": (Answering, IMAGES, 0.5),
    "squeeze and excitation": (
        lambda: Network(
            gated,
            stem=nn.Conv2d(3, 16, 3, padding=1),
            norm=nn.BatchNorm2d(16),
            depth=nn.Conv2d(16, 16, 3, padding=1, groups=16),
            squeeze=nn.Conv2d(16, 4, 1),
            expand=nn.Conv2d(4, 16, 1),
            out=nn.Conv2d(16, 16, 1),
            head=nn.Linear(16, 4),
        ),
        IMAGES,
        0.5,
    ),
    "dense block": (
        lambda: Network(
            dense,
            stem=nn.Conv2d(3, 8, 3, padding=1),
            n1=nn.BatchNorm2d(8),
            b=nn.Conv2d(8, 4, 3, padding=1),
            n2=nn.BatchNorm2d(12),
            c=nn.Conv2d(12, 4, 3, padding=1),
            head=nn.Linear(16, 3),
        ),
        IMAGES,
        0.5,
    ),
    **{
        kind.__name__: (
            lambda kind=kind: Network(  # type: ignore[misc]
                both_ways,
                embed=nn.Embedding(20, 8),
                recurrent=kind(8, 12, 2, batch_first=True, bidirectional=True),
                head=nn.Linear(24, 3),
            ),
            TOKENS,
            0.6,
        )
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
    },
    **{
        f"{kind.__name__} {does.__name__}": (
            lambda kind=kind, does=does: Network(  # type: ignore[misc]
                does,
                embed=nn.Embedding(20, 8),
                inward=nn.Linear(8, 10),
                cell=kind(10, 12),
                head=nn.Linear(12, 3),
            ),
            TOKENS,
            0.7,
        )
        for kind in CELLS
        for does in (by_steps, by_steps_from_zero)
        if not (kind is nn.LSTMCell and does is by_steps_from_zero)
    },
    **{
        f"{kind.__name__} of {layers} from zero states": (
            lambda kind=kind, layers=layers: Network(  # type: ignore[misc]
                from_zero_states,
                embed=nn.Embedding(20, 8),
                recurrent=kind(8, 12, layers, batch_first=True),
                head=nn.Linear(12, 3),
            ),
            TOKENS,
            0.7,
        )
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
        for layers in (1, 2)
    },
    "learned state": (LearnedStart, TOKENS, 0.7),
    "blurred": (Blurred, IMAGES, 0.4),
    "U-Net": (
        lambda: Network(
            u_shaped,
            a=nn.Conv2d(3, 8, 3, padding=1),
            b=nn.Conv2d(8, 16, 3, padding=1, stride=2),
            up=nn.ConvTranspose2d(16, 8, 2, 2),
            c=nn.Conv2d(16, 8, 3, padding=1),
            out=nn.Conv2d(8, 2, 1),
        ),
        IMAGES,
        0.4,
    ),
    "group norm": (
        lambda: Network(
            grouped,
            a=nn.Conv2d(3, 16, 3),
            n1=nn.GroupNorm(4, 16),
            b=nn.Conv2d(16, 16, 3),
            n2=nn.GroupNorm(2, 16),
            head=nn.Linear(16, 3),
        ),
        IMAGES,
        0.5,
    ),
    "mixer": (
        lambda: Network(
            mixed,
            patches=nn.Conv2d(3, 12, 4, 4),
            n1=nn.LayerNorm(12),
            t1=nn.Linear(16, 20),
            t2=nn.Linear(20, 16),
            n2=nn.LayerNorm(12),
            c1=nn.Linear(12, 24),
            c2=nn.Linear(24, 12),
            head=nn.Linear(12, 3),
        ),
        IMAGES,
        0.8,
    ),
    "chosen by shape": (
        lambda: Network(
            chosen_by_shape,
            a=nn.Conv2d(3, 8, 3, padding=1),
            b=nn.Conv2d(8, 8, 3, padding=1),
            head=nn.Linear(8, 3),
        ),
        IMAGES,
        0.5,
    ),
    "normed, by shape": (
        lambda: Network(
            normed_by_shape,
            a=nn.Conv2d(3, 8, 3, padding=1),
            norm=nn.BatchNorm2d(8),
            b=nn.Conv2d(8, 8, 3, padding=1),
            norm2=nn.BatchNorm2d(8),
            act=nn.ReLU(inplace=True),
            head=nn.Linear(8, 3),
        ),
        IMAGES,
        0.5,
    ),
    "split and shuffled": (
        lambda: Network(
            split_and_shuffled,
            a=nn.Conv2d(3, 16, 3, padding=1),
            slopes=nn.PReLU(16),
            b=nn.Conv2d(16, 32, 3, padding=1),
            head=nn.Linear(8, 3),
        ),
        IMAGES,
        0.8,
    ),
}


def killed(network: nn.Module, inputs: Tensor, *, fitting: bool = False) -> int:
    """Sets about half of the units to zero of each group that can lose them, however they are made;
    how many. If `fitting`, only such as leave one size along each axis."""
    graph = trace(network, inputs)
    walk = graph_of_units.units_of(graph, inputs[:2])
    roots = walk.units.roots()
    random = torch.rand(walk.units.count, generator=torch.Generator().manual_seed(1)) < 0.5
    chosen = random[roots]
    if fitting:
        walk.units.keep(torch.arange(walk.units.count)[~chosen], "it is not chosen")
    dead = walk.units.removable(structure_only=True) & chosen
    parameters = dict(graph.named_parameters())
    with torch.no_grad():
        for name, axes in walk.tensors.items():
            for axis, units in enumerate(axes):
                if name in parameters and units is not None and units.numel():
                    rows = dead[units] & (units != NONE)
                    parameters[name].movedim(axis, 0)[rows] = 0
    return int(dead.sum())


@pytest.mark.parametrize("name", MADE)
def test_units_that_are_zero_go_and_the_outputs_stay(name: str) -> None:
    make, inputs, share = MADE[name]
    torch.manual_seed(0)
    network = make().eval().double()
    assert killed(network, inputs) > 5
    made = compact(network, inputs).network
    assert Probe(network, inputs).difference(made, 1e-10) < 1e-10
    before, after = (sum(p.numel() for p in each.parameters()) for each in (network, made))
    assert after < share * before
    assert isinstance(made, fx.GraphModule)
    restored = deserialise(serialise(made))
    assert torch.equal(restored(inputs), made(inputs))


@pytest.mark.parametrize("name", [name for name in MADE if name != "mixer"])
def test_all_that_fit_together_go(name: str) -> None:
    # What mixes places in a mixer adds a bias to all channels, so that none of them is 0.
    make, inputs, _ = MADE[name]
    torch.manual_seed(0)
    network = make().eval().double()
    assert killed(network, inputs, fitting=True) > 2
    made = compact(network, inputs)
    assert [step for step in made.report.steps if step[1] == "zeros stay"] == []


@pytest.mark.parametrize("name", MADE)
def test_in_float32_too(name: str) -> None:
    make, inputs, _ = MADE[name]
    torch.manual_seed(0)
    network = make().eval()
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    killed(network, inputs)
    made = compact(network, inputs).network
    torch.testing.assert_close(made(inputs), network(inputs), rtol=1e-4, atol=1e-5)
    assert {p.dtype for p in made.parameters()} == {torch.float32}


class Random(nn.Module):
    """A random graph of layers over maps of 4 channels and multiples."""

    def __init__(self, choices: list[tuple[int, int]]) -> None:
        super().__init__()
        self.steps: list[tuple[str, int, nn.Module]] = []
        self.layers = nn.ModuleList()
        widths = [8]
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        for kind, where in choices:
            name = KINDS[kind % len(KINDS)]
            source = where % len(widths)
            layer, width = self._layer(name, widths[source], widths[-1])
            self.steps.append((name, source, layer))
            self.layers.append(layer)
            widths.append(width)
        self.head = nn.Linear(sum(widths), 3)

    def _layer(self, name: str, width: int, last: int) -> tuple[nn.Module, int]:
        if name == "conv":
            return nn.Conv2d(width, 8, 3, padding=1), 8
        if name == "grouped":
            return nn.Conv2d(width, width, 3, padding=1, groups=4), width
        if name == "depthwise":
            return nn.Conv2d(width, width, 3, padding=1, groups=width), width
        if name == "transposed":
            return nn.ConvTranspose2d(width, 8, 3, padding=1), 8
        if name in ("add", "gate"):
            return nn.Conv2d(width, last, 1), last
        layers: dict[str, nn.Module] = {
            "norm": nn.BatchNorm2d(width),
            "groups": nn.GroupNorm(4, width),
            "slopes": nn.PReLU(width),
        }
        return layers.get(name, nn.Identity()), width + last if name == "cat" else width

    def forward(self, x: Tensor) -> Tensor:
        made = [self.stem(x)]
        for name, source, layer in self.steps:
            out = layer(made[source])
            if name == "add":
                out = out + made[-1]
            elif name == "gate":
                out = torch.sigmoid(out) * made[-1]
            elif name == "cat":
                out = torch.cat([out, made[-1]], 1)
            elif name == "turn":
                one, other = out.chunk(2, 1)
                out = torch.cat([other, one], 1)
            elif name == "relu":
                out = torch.relu(out)
            elif name == "silu":
                out = F.silu(out)
            made.append(out)
        return self.head(torch.cat([each.mean((2, 3)) for each in made], 1))  # type: ignore[no-any-return]


KINDS = (
    *("conv", "grouped", "depthwise", "transposed", "add", "gate", "cat", "turn", "relu", "silu"),
    *("norm", "groups", "slopes"),
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=7),
    st.integers(0, 10**6),
)
def test_random_graphs_stay_what_they_are_whatever_rows_are_zero(
    choices: list[tuple[int, int]], seed: int
) -> None:
    torch.manual_seed(seed)
    network = Random(choices).eval().double()
    inputs = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter[torch.rand(len(parameter)) < 0.4] = 0
    made = compact(network, inputs).network
    assert Probe(network, inputs).difference(made, 1e-10) < 1e-10
    assert isinstance(made, fx.GraphModule)
    assert torch.equal(deserialise(serialise(made))(inputs), made(inputs))


def test_a_parametrised_weight_is_what_it_computes_and_the_network_keeps_it() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        weight_norm(nn.Linear(8, 16)), nn.ReLU(), weight_norm(nn.Linear(16, 3))
    ).eval()
    inputs = torch.randn(5, 8)
    made = compact(network, inputs).network
    torch.testing.assert_close(made(inputs), network(inputs))
    assert isinstance(made, fx.GraphModule)
    assert serialise(made)["modules"]["0"]["kind"] == "Linear"
    assert type(network[0]).__name__ == "ParametrizedLinear"


def padded(net: Any, x: Tensor) -> Tensor:
    x = net.widen(F.pad(net.a(x).relu(), (1, 2, 0, 1)))
    x = net.b(torch.cat([x, F.pad(x, (0, 0, 0, 0, 2, 0))], 1))
    return net.head(x.mean((2, 3)))


def test_padding_is_of_the_unit_that_it_lies_beside_and_new_channels_are_of_none() -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(18, 4, 3), "head": nn.Linear(4, 3)}
    network = Network(padded, widen=nn.ZeroPad2d(1), **layers).eval().double()
    with torch.no_grad():
        for parameter in network.a.parameters():  # type: ignore[operator, union-attr]
            parameter[torch.tensor([0, 5])] = 0
    made = compact(network, IMAGES).network
    assert Probe(network, IMAGES).difference(made, 1e-10) < 1e-10
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    assert shapes["a.weight"] == (6, 3, 3, 3)
    assert shapes["b.weight"] == (4, 14, 3, 3)


def typed(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    scale = torch.ones(x.shape[1], dtype=torch.int64, device=x.device)
    x = x.relu() * scale.sum().to(x.dtype)
    return net.head((x / x.shape[1]).mean((2, 3)).float().type_as(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_stay_what_they_are_and_numbers_that_are_no_sizes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = Network(typed, a=nn.Conv2d(3, 8, 3), head=nn.Linear(8, 3)).eval().to(dtype)
    inputs = IMAGES.to(dtype)
    with torch.no_grad():
        for parameter in network.a.parameters():  # type: ignore[operator, union-attr]
            parameter[5:7] = 0
    made = compact(network, inputs).network
    torch.testing.assert_close(made(inputs), network(inputs), rtol=1e-4, atol=1e-5)
    assert made(inputs).dtype == dtype
    assert next(made.parameters()).shape[0] == 6


def written(net: Any, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    halves = x.clone()
    halves[:, 2:4].zero_()
    x = x + halves
    halves += 1
    return net.head(halves.mean((2, 3)) - x.mean((2, 3)))


def test_code_that_writes_in_place_is_traced_as_what_it_computes() -> None:
    torch.manual_seed(0)
    network = Network(written, a=nn.Conv2d(3, 8, 3), head=nn.Linear(8, 3)).eval().double()
    with torch.no_grad():
        for parameter in network.a.parameters():
            parameter[5:7] = 0
    made = compact(network, IMAGES).network
    assert Probe(network, IMAGES).difference(made, 1e-10) < 1e-10
    assert isinstance(made, fx.GraphModule)
    assert torch.equal(deserialise(serialise(made))(IMAGES), made(IMAGES))


class Doubled(nn.Module):
    """A layer that nobody taught: twice its input, in an order of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cummax(x, -1).values * 2


def test_what_no_handler_knows_blocks_its_units_and_no_others_until_one_is_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), Doubled(), nn.Linear(8, 3)
        ).double()

    inputs = torch.randn(5, 4, 16, dtype=torch.float64)
    model = network().eval()
    walk = graph_of_units.units_of(trace(model, inputs), inputs[:2])
    assert walk.unknown == ["cummax"]
    told = what_can_shrink(model, inputs).problems
    assert any("units that flow through 'cummax' stay" in sentence for sentence in told)
    assert [name for name in walk.units.reasons if "cummax" in name] == [
        "'cummax' mixes them in a way that is not known"
    ]
    assert bool(walk.units.removable(structure_only=True)[walk.units_of("0.weight", 0)].all())
    assert not bool(walk.units.removable(structure_only=True)[walk.units_of("2.weight", 0)].any())

    monkeypatch.setattr(graph_of_units.HANDLERS, "functions", {**graph_of_units.HANDLERS.functions})
    page = (Path(__file__).parents[3] / "docs" / "networks.md").read_text()
    exec(page.split("```python")[1].split("```")[0], {})
    walk = graph_of_units.units_of(trace(model, inputs), inputs[:2])
    assert walk.unknown == []
    assert not bool(walk.units.removable(structure_only=True)[walk.units_of("2.weight", 0)].any())
    images = torch.randn(5, 8, 3, dtype=torch.float64)
    over_positions = (
        Network(
            lambda net, x: net.b(torch.cummax(net.a(x), 2)[0]),
            a=nn.Conv1d(8, 6, 1),
            b=nn.Conv1d(6, 2, 1),
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        for parameter in over_positions.a.parameters():
            parameter[2:4] = 0
    made = compact(over_positions, images).network
    assert sum(p.numel() for p in made.parameters()) == 8 * 4 + 4 + 4 * 2 + 2
    torch.testing.assert_close(made(images), over_positions(images))


def test_units_that_do_not_fill_a_block_stay() -> None:
    units = Units()
    made = units.fresh(12).reshape(3, 4)
    units.pack(made)
    harmless = torch.zeros(12, dtype=torch.bool)
    harmless[[0, 1, 4, 8, 9]] = True  # two of the first row, one of the second, two of the third
    units.read(made.reshape(-1), harmless)
    gone = units.removable().reshape(3, 4)
    assert gone.sum(1).tolist() == [1, 1, 1]
    assert packed_shape(torch.Size((3, 4)), ~gone) == (3, 3)
    assert packed(made, ~gone).shape == (3, 3)


def test_one_of_all_stays_and_ties_hold() -> None:
    units = Units()
    one, other = units.fresh(3), units.fresh(3)
    units.tie(one, other)
    units.read(other, torch.tensor([True, True, False]))
    assert units.removable().tolist() == [True, True, False] * 2
    units = Units()
    units.fresh(3)
    assert units.removable().tolist() == [False, True, True]
    units.keep(torch.tensor([1]), "so")
    assert units.removable(structure_only=True).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("GRU", ["embed", "recurrent"]),
        ("group norm", ["a", "b"]),
        ("attention", ["up", "qkv"]),
        ("dense block", ["stem", "b", "c"]),
    ],
)
def test_groups_for_penalties_and_sparsifiers(name: str, names: list[str]) -> None:
    make, inputs, _ = MADE[name]
    network = make().eval()
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    found = [group.name for group in shared_units(network, inputs)]
    assert set(names) <= set(found)
    assert len(set(found)) == len(found)


def test_a_layer_that_nothing_acts_on_is_told_of() -> None:
    """Its units are the network's outputs, and no sparsifier acts on embeddings."""
    network = nn.Sequential(nn.Embedding(20, 3), nn.Flatten())
    (report,) = what_can_shrink(network, TOKENS).layers
    assert report.why_not == "no penalty or sparsifier acts on Embedding"
