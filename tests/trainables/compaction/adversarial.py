"""Networks drawn at random to mislead compaction: each is really sparse, and what it becomes is
compared in float64."""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from slimfront.trainables.compaction import compact
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.structure.agreement import difference, outputs
from slimfront.trainables.structure.attention import split_attention
from slimfront.trainables.structure.attention_modules import Attention, ScaledDotProduct

WIDTHS = (4, 6, 8)
CLASSES = 5
WRONG = 1e-8
"""Outputs in float64 that differ by more, relative to their spread, are not equal."""


class Fn(nn.Module):
    """A function of its parts, which says itself what it is; `share` is what belongs to it beside
    modules."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module, **share: Tensor) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.function = function
        for name, value in share.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x, *self.parts)


class NormReLU(nn.BatchNorm2d):
    """A norm with code of its own, which tracing follows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class SameNorm(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class PadConv(nn.Conv2d):
    """A convolution with code of its own, which calls the function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class SameConv(nn.Conv2d):
    """A subclass that changes nothing."""


class ModeDropout(nn.Module):
    """Functional dropout of one kind."""

    def __init__(self, function: Callable[..., Tensor], p: float = 0.4) -> None:
        super().__init__()
        self.function, self.p = function, p

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.p, self.training)


class DropPath(nn.Module):
    """Stochastic depth, with code of its own in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) > 0.3)


class Heads(nn.Module):
    """Attention by linear layers, whose heads are partitioned by number or by width."""

    def __init__(self, width: int, by: str, rng: random.Random) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.by, self.size, self.width = by, 2, width
        self.dropout = rng.choice([0.0, 0.3])
        self.function = rng.random() < 0.5
        self.scale = nn.Parameter(torch.full((width,), rng.choice([1.0, 0.01, 1e-4])))

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[0], x.shape[1]
        shape = (n, t, -1, self.size) if self.by == "width" else (n, t, self.size, -1)
        q, k, v = (part(x).view(*shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.function:
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=self.dropout if self.training else 0.0
            )
        else:
            y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return x + self.scale * self.out(y.transpose(1, 2).reshape(n, t, -1))


def _norm2d(rng: random.Random, c: int) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.BatchNorm2d(c),
        lambda: NormReLU(c),
        lambda: SameNorm(c),
        lambda: nn.GroupNorm(2, c),
        lambda: nn.InstanceNorm2d(c, affine=True, track_running_stats=rng.random() < 0.5),
        lambda: nn.LayerNorm([c, 8, 8]),
        lambda: nn.BatchNorm2d(c, affine=False),
        nn.Identity,
    ]
    return rng.choice(kinds[:3] + kinds)()


def _act(rng: random.Random) -> nn.Module:
    return rng.choice(
        [
            nn.ReLU(),
            nn.ReLU(),
            nn.ReLU(),
            nn.GELU(),
            nn.Sigmoid(),
            nn.SiLU(),
            nn.Tanh(),
            nn.Softmax(1),
        ]
    )


def _conv(rng: random.Random, a: int, b: int) -> nn.Module:
    return rng.choice([nn.Conv2d, nn.Conv2d, SameConv])(a, b, 3, padding=1, bias=rng.random() < 0.7)


def _image(rng: random.Random, c: int) -> tuple[str, nn.Module]:
    """A block (N, c, 8, 8) to the same."""
    m = rng.choice(WIDTHS)
    scale = torch.full((c, 1, 1), rng.choice([1.0, 0.01, 1e-4]))
    conv, norm, act = lambda a, b: _conv(rng, a, b), lambda w: _norm2d(rng, w), lambda: _act(rng)
    inner = lambda: nn.Sequential(conv(c, m), norm(m), act(), conv(m, c), norm(c))  # noqa: E731
    kinds: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: nn.Sequential(conv(c, m), norm(m), act(), conv(m, c), norm(c), act()),
        "residual": lambda: nn.Sequential(Fn(lambda _, x, f: x + f(x), inner()), act()),
        "layer scale": lambda: Fn(lambda s, x, f: x + s.scale * f(x), inner(), scale=scale),
        "keepdim": lambda: Fn(lambda _, x, f: x.mean((2, 3), keepdim=True) + f(x), inner()),
        "keepdim branch": lambda: Fn(lambda _, x, f: x + f(x).mean((2, 3), keepdim=True), inner()),
        "mean of channels": lambda: Fn(
            lambda _, x, f, g: x + g(f(x).relu().mean(1, keepdim=True)), conv(c, m), conv(1, c)
        ),
        "gate": lambda: Fn(
            lambda _, x, a, b: (
                x * torch.sigmoid(b(torch.relu(a(x.mean((2, 3))))))[:, :, None, None]
            ),
            nn.Linear(c, m),
            nn.Linear(m, c),
        ),
        "concatenation": lambda: nn.Sequential(
            Fn(
                lambda _, x, f, g: torch.cat([f(x), g(x).relu()], 1), conv(c, m), nn.Conv2d(c, 4, 1)
            ),
            norm(m + 4),
            conv(m + 4, c),
        ),
        "concatenated rows": lambda: Fn(
            lambda _, x, f, g: f(torch.cat([x, g(x)], 2))[:, :, :8], conv(c, c), conv(c, c)
        ),
        "depthwise": lambda: nn.Sequential(
            conv(c, m),
            norm(m),
            nn.ReLU(),
            nn.Conv2d(m, m, 3, padding=1, groups=m),
            norm(m),
            nn.ReLU(),
            nn.Conv2d(m, c, 1),
        ),
        "grouped": lambda: nn.Sequential(
            conv(c, m),
            nn.ReLU(),
            nn.Conv2d(m, 2 * m, 3, padding=1, groups=2),
            norm(2 * m),
            conv(2 * m, c),
        ),
        "shuffle": lambda: nn.Sequential(
            conv(c, m),
            Fn(lambda _, x: x.view(-1, 2, m // 2, 8, 8).transpose(1, 2).reshape(-1, m, 8, 8)),
            nn.ReLU(),
            conv(m, c),
        ),
        "split": lambda: nn.Sequential(
            conv(c, 8),
            Fn(lambda _, x: x.chunk(2, 1)[0] * torch.sigmoid(x.chunk(2, 1)[1])),
            norm(4),
            conv(4, c),
        ),
        "shared": lambda: Fn(lambda _, x, f, n: n(f(torch.relu(n(f(x))))), conv(c, c), norm(c)),
        "own padding": lambda: nn.Sequential(
            PadConv(c, m, 3), norm(m), nn.ReLU(), PadConv(m, c, 3)
        ),
        "rows": lambda: nn.Sequential(
            Fn(lambda _, x: x.flatten(2)),
            nn.Conv1d(c, m, 3, padding=1),
            rng.choice([nn.BatchNorm1d(m), nn.Identity()]),
            nn.ReLU(),
            rng.choice([nn.AvgPool1d(3, 1, 1), nn.Identity()]),
            nn.Conv1d(m, c, 1),
            Fn(lambda _, x: x.view(x.size(0), -1, 8, 8)),
        ),
        "volume": lambda: nn.Sequential(
            Fn(lambda _, x: x.unsqueeze(2)),
            nn.Conv3d(c, m, (1, 3, 3), padding=(0, 1, 1)),
            rng.choice([nn.BatchNorm3d(m), nn.Identity()]),
            nn.ReLU(),
            nn.Conv3d(m, c, 1),
            Fn(lambda _, x: x.squeeze(2)),
        ),
        "channels last": lambda: Fn(
            lambda _, x, n, f, g: x + g(f(n(x.permute(0, 2, 3, 1))).relu()).permute(0, 3, 1, 2),
            nn.LayerNorm(c),
            nn.Linear(c, m),
            nn.Linear(m, c),
        ),
        "linear over columns": lambda: nn.Sequential(
            nn.Linear(8, 8), norm(c), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()
        ),
        "pool of units": lambda: nn.Sequential(
            nn.Linear(8, 8), nn.MaxPool2d(3, 1, 1), nn.ReLU(), nn.Linear(8, 8)
        ),
        "transposed": lambda: nn.Sequential(
            conv(c, m), nn.ReLU(), nn.ConvTranspose2d(m, c, 2, 2), nn.AvgPool2d(2)
        ),
        "dropout": lambda: nn.Sequential(
            conv(c, c),
            ModeDropout(
                rng.choice(
                    [
                        F.dropout,
                        F.dropout2d,
                        F.alpha_dropout,
                        torch.dropout,
                        F.feature_alpha_dropout,
                    ]
                )
            ),
            act(),
        ),
        "stochastic depth": lambda: Fn(lambda _, x, f, d: x + d(f(x)), inner(), DropPath()),
        "pools": lambda: nn.Sequential(
            conv(c, m),
            nn.ReLU(),
            rng.choice(
                [
                    nn.MaxPool2d(3, 1, 1),
                    nn.AvgPool2d(3, 1, 1),
                    nn.AvgPool2d(3, 1, 1, divisor_override=4),
                ]
            ),
            conv(m, c),
        ),
        "idle": lambda: nn.Sequential(
            nn.Conv2d(c, m, 1), nn.ReLU(), nn.Conv2d(m, m, 1), nn.ReLU(), nn.Conv2d(m, c, 1)
        ),
    }
    kind = rng.choice(sorted(kinds))
    return kind, kinds[kind]()


def _tokens(rng: random.Random, c: int) -> tuple[str, nn.Module]:
    """A block (N, 8, c) to the same."""
    m = rng.choice(WIDTHS)
    scale = torch.full((c,), rng.choice([1.0, 0.01, 1e-4]))
    kinds: dict[str, Callable[[], nn.Module]] = {
        "perceptron": lambda: Fn(
            lambda s, x, f: x + s.scale * f(x),
            nn.Sequential(nn.Linear(c, m), nn.ReLU(), nn.Linear(m, c)),
            scale=scale,
        ),
        "norm over time": lambda: nn.Sequential(
            nn.Linear(c, c), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(c, c)
        ),
        "norm over units": lambda: nn.Sequential(
            nn.Linear(c, m),
            Fn(lambda _, x, n: n(x.transpose(1, 2)).transpose(1, 2), nn.BatchNorm1d(m)),
            nn.ReLU(),
            nn.Linear(m, c),
        ),
        "heads by width": lambda: Heads(c, "width", rng),
        "heads by number": lambda: Heads(c, "number", rng),
        "attention": lambda: Fn(
            lambda _, x, n, a: x + a(n(x), n(x), n(x), need_weights=False)[0],
            nn.LayerNorm(c),
            nn.MultiheadAttention(c, 2, dropout=rng.choice([0.0, 0.2]), batch_first=True),
        ),
        "softmax of units": lambda: nn.Sequential(nn.Linear(c, m), nn.Softmax(-1), nn.Linear(m, c)),
        "mixing of tokens": lambda: Fn(
            lambda _, x, f, g: x + g(torch.relu(f(x.transpose(1, 2)))).transpose(1, 2),
            nn.Linear(8, m),
            nn.Linear(m, 8),
        ),
        "transposed square": lambda: nn.Sequential(
            nn.Linear(c, 8), nn.ReLU(), Fn(lambda _, x: x.transpose(1, 2)), nn.Linear(8, c)
        ),
        "shared": lambda: Fn(lambda _, x, f: f(torch.relu(f(x))), nn.Linear(c, c)),
        "dropout": lambda: nn.Sequential(
            nn.Linear(c, m), ModeDropout(F.dropout), nn.ReLU(), nn.Linear(m, c)
        ),
        "convolution": lambda: Fn(
            lambda _, x, f, n, g: x + g(n(f(x.transpose(1, 2))).relu()).transpose(1, 2),
            nn.Conv1d(c, m, 3, padding=1),
            nn.BatchNorm1d(m),
            nn.Conv1d(m, c, 1),
        ),
        "root of squares": lambda: nn.Sequential(nn.Linear(c, m), nn.RMSNorm(m), nn.Linear(m, c)),
        "concatenated units": lambda: Fn(
            lambda _, x, f, g: g(torch.cat([x, f(x).relu()], -1)),
            nn.Linear(c, m),
            nn.Linear(c + m, c),
        ),
    }
    kind = rng.choice(sorted(kinds))
    return kind, kinds[kind]()


class Drawn(nn.Module):
    """A stem, blocks and a head."""

    def __init__(
        self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module, output: str, mask: Tensor
    ) -> None:
        super().__init__()
        self.stem, self.blocks, self.head, self.output = stem, nn.Sequential(*blocks), head, output
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Any:
        x = self.blocks(self.stem(x))
        out = self.head(x)
        if self.output == "masked":
            return F.log_softmax(out + self.mask, 1)
        if self.output == "tuple":
            return out, x
        return {"logits": out, "mean": x.mean(1)} if self.output == "mapping" else out


@dataclass(frozen=True)
class Ended:
    """What became of one network: compacted, refused or fault, and what is not as it should be."""

    seed: int
    kinds: tuple[str, ...]
    what: str
    problem: str = ""
    smaller: bool = False


def draw(seed: int) -> tuple[tuple[str, ...], nn.Module, Tensor]:
    """The kinds of its blocks, a sparse network in float64 and evaluation mode, and inputs (16, 3,
    8, 8)."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    c = rng.choice(WIDTHS)
    tokens = rng.random() < 0.4
    blocks = [(_tokens if tokens else _image)(rng, c) for _ in range(rng.randint(1, 3))]
    stem: nn.Module = (
        nn.Sequential(Fn(lambda _, x: x.transpose(1, 2).flatten(2)), nn.Linear(24, c))
        if tokens
        else _conv(rng, 3, c)
    )
    flat = nn.Sequential(nn.Flatten(), nn.Linear(c * (8 if tokens else 64), CLASSES))
    mean = nn.Sequential(
        Fn((lambda _, x: x.mean(1)) if tokens else (lambda _, x: x.mean((2, 3)))),
        nn.Linear(c, CLASSES),
    )
    output = rng.choice(["plain", "plain", "masked", "tuple", "mapping"])
    mask = torch.tensor([0.0] * (CLASSES - 1) + [rng.choice([0.0, -1e4])])
    model = Drawn(
        stem, [block for _, block in blocks], rng.choice([flat, mean]), output, mask
    ).double()
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, 3, 8, 8, dtype=torch.float64))
    _damage(model, rng)
    return (
        tuple(kind for kind, _ in blocks),
        model.eval(),
        torch.randn(16, 3, 8, 8, dtype=torch.float64),
    )


@torch.no_grad()
def _damage(model: nn.Module, rng: random.Random) -> None:
    """Statistics of norms of all values; whole layers and units zero, some of them the same ones in
    all layers of one width."""
    share = rng.choice([0.2, 0.5, 0.8])
    same = {width: [n for n in range(width) if rng.random() < share] for width in range(1, 65)}
    coupled = rng.random() < 0.6
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase)
        if norm and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        own = [p for p in module.parameters(recurse=False) if p.dim() >= 1]
        kept = isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm) or rng.random() < 0.2
        if norm and module.affine:
            for p in own:
                p.normal_()
        if (
            not isinstance(
                module, nn.Linear | nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase
            )
            or kept
            or not own
        ):
            continue
        units = len(own[0])
        dead = same[units] if coupled else [n for n in range(units) if rng.random() < share]
        dead = list(range(units)) if rng.random() < 0.08 else dead
        for p in own:
            if len(p) == units and (p.dim() > 1 or not norm or rng.random() < 0.9):
                p[dead] = 0
        if not norm and rng.random() < 0.15:
            own[0].clamp_(min=0)
        if not norm and rng.random() < 0.3:
            own[0].flatten(1)[:, :: rng.choice([2, 3])] = 0


def examine(seed: int) -> Ended:
    """Makes the network of that number compact and compares; whatever is raised but a sentence is a
    fault."""
    try:
        kinds, model, inputs = draw(seed)
    except Exception as error:
        return Ended(seed, (), "fault", f"drawing: {error!r}")
    said = _Said()
    log = logging.getLogger("slimfront.trainables")
    log.addHandler(said)
    try:
        result = compact(model, inputs)
        return Ended(
            seed,
            kinds,
            "compacted",
            _problem(seed, model, result, said),
            _size(result.network) < _size(model),
        )
    except (UserError, TrialFailure) as error:
        return Ended(seed, kinds, "refused", f"refused: {str(error)[:150]}")
    except Exception as error:
        return Ended(seed, kinds, "fault", f"fault: {type(error).__name__}: {str(error)[:150]}")
    finally:
        log.removeHandler(said)


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _problem(seed: int, model: nn.Module, result: Any, said: _Said) -> str:
    """What is not as it should be, "" if nothing."""
    network = result.network
    generator = torch.Generator().manual_seed(seed + 1)
    wide = torch.randn(32, 3, 8, 8, dtype=torch.float64, generator=generator) * 2
    reference = outputs(model, wide)
    for batch in (wide, wide[:1], wide[1:6]):
        apart = difference(outputs(model, batch), outputs(network, batch), WRONG, reference)
        if not apart <= WRONG:
            return f"wrong: {apart:.1e} for a batch of {len(batch)}"
    nonzero = [sum(int(p.count_nonzero()) for p in each.parameters()) for each in (model, network)]
    if _size(network) > _size(model) or nonzero[1] > nonzero[0]:
        return (
            f"larger: {_size(model)} to {_size(network)} parameters, {nonzero[0]} "
            f"to {nonzero[1]} non-zero"
        )
    last = {
        str(node.target)
        for node in network.graph.nodes
        if any(user.op == "output" for user in node.users)
    }
    text = "\n".join(said.lines)
    told = {name for name, action, _ in result.report.steps if action == "zeros stay"}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and name not in last:
            bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
            zero = bool(((layer.weight.flatten(1) == 0).all(1) & (bias == 0)).any())
            if zero and (name not in told or "units without a weight stay" not in text):
                return f"unsaid: zero units of {name}"
    if "stays as in evaluation mode" not in text:
        lost = _lost_dropout(model, network)
        if lost:
            return f"undropped: {lost} is gone, and the layer that it acts on is not"
        if _dropouts(network) and not _draws(network, wide):
            return "undropped: the compact network has no dropout in training mode"
    return ""


def _lost_dropout(model: nn.Module, network: fx.GraphModule) -> str:
    """A dropout of the model that is not in the compact network, though the layers before it and
    those behind it are; "" if there is none."""
    before = traced_in_both_modes(model)
    split_attention(before)
    called = {str(node.target) for node in network.graph.nodes if node.op == "call_module"}
    kept = _dropouts(network)
    for node in before.graph.nodes:
        if node.op == "call_module" and node.target in _dropouts(before) - kept:
            sources = _nearest(before, node, lambda each: each.all_input_nodes)
            readers = _nearest(before, node, lambda each: list(each.users))
            if sources & called and (not readers or readers & called):
                return f"'{node.target}'"
    return ""


def _dropouts(network: fx.GraphModule) -> set[str]:
    """The names of the modules that draw at random in training mode, among those that are
    called."""
    called = {str(node.target) for node in network.graph.nodes if node.op == "call_module"}
    return {name for name in called if _share(network.get_submodule(name)) > 0}


def _share(module: nn.Module) -> float:
    if isinstance(module, Attention | ScaledDotProduct):
        return module.dropout
    return module.p if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0


def _nearest(
    network: fx.GraphModule, start: fx.Node, step: Callable[[fx.Node], list[fx.Node]]
) -> set[str]:
    """The names of the first layers with weights on all ways from a node."""
    found, seen, waiting = set(), {start}, [start]
    while waiting:
        for node in step(waiting.pop()):
            if node in seen:
                continue
            seen.add(node)
            if node.op == "call_module" and isinstance(
                network.get_submodule(str(node.target)), nn.Linear | nn.modules.conv._ConvNd
            ):
                found.add(str(node.target))
            else:
                waiting.append(node)
    return found


@torch.no_grad()
def _draws(network: nn.Module, inputs: Tensor) -> bool:
    """Whether it draws random numbers in training mode; running statistics change in that."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    before = torch.get_rng_state()
    network(inputs)
    drawn = not torch.equal(before, torch.get_rng_state())
    network.load_state_dict(state)
    network.eval()
    return drawn
