"""Networks of the zoo in torch alone: what people write themselves, each as small as it can be."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(
    ins: int, outs: int, size: int = 3, stride: int = 1, groups: int = 1, act: str = "ReLU"
) -> nn.Sequential:
    """A convolution with its batch norm and activation; `act` is a class of torch.nn."""
    return nn.Sequential(
        nn.Conv2d(ins, outs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outs),
        getattr(nn, act)(),
    )


def classifier(*layers: nn.Module, width: int, outputs: int = 10) -> nn.Sequential:
    """Layers on images, then a mean over places and a linear layer."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))


def mlp() -> nn.Sequential:
    """Linear layers with a batch norm, a layer norm and dropout."""
    return nn.Sequential(
        *(nn.Linear(32, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Linear(96, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 10)),
    )


def autoencoder() -> nn.Sequential:
    """An autoencoder whose bottleneck is linear."""
    sizes = (256, 128, 64, 8, 64, 128, 256)
    layers: list[nn.Module] = []
    for ins, outs in itertools.pairwise(sizes):
        layers += [nn.Linear(ins, outs)] + [nn.ReLU()] * (outs != 8)
    return nn.Sequential(*layers[:-1])


class UNet(nn.Module):
    """A U-Net with transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv(3, 16), conv(16, 32), conv(32, 64)])
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)]
        )
        self.join = nn.ModuleList([conv(64, 32), conv(32, 16)])
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, 4, H, W)."""
        first = self.down[0](x)
        second = self.down[1](F.max_pool2d(first, 2))
        x = self.down[2](F.max_pool2d(second, 2))
        x = self.join[0](torch.cat([self.up[0](x), second], 1))
        x = self.join[1](torch.cat([self.up[1](x), first], 1))
        return self.head(x)


class Recurrent(nn.Module):
    """A classifier of sequences of whole numbers: embedding, recurrent layers, linear layers."""

    def __init__(self, kind: str, **options: object) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.recurrent = getattr(nn, kind)(32, 48, batch_first=True, **options)
        width = 96 if options.get("bidirectional") else 48
        self.head = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T) to logits (N, 5)."""
        states, _ = self.recurrent(self.embedding(tokens))
        return self.head(states[:, -1])


def conv1d_net() -> nn.Sequential:
    """Convolutions over time."""
    return nn.Sequential(
        *(nn.Conv1d(8, 32, 5, 2, 2), nn.BatchNorm1d(32), nn.ReLU()),
        *(nn.Conv1d(32, 64, 5, 2, 2), nn.BatchNorm1d(64), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(64, 64, 3, 1, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool1d(1)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


def conv3d_net() -> nn.Sequential:
    """Convolutions over volumes."""
    return nn.Sequential(
        *(nn.Conv3d(1, 16, 3, 1, 1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(16, 32, 3, 1, 1), nn.BatchNorm3d(32), nn.ReLU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(32, 32, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1)),
        *(nn.Flatten(), nn.Linear(32, 4)),
    )


class Residual(nn.Module):
    """Adds what its layers compute to its input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        return x + self.body(x)


class SqueezeExcite(nn.Module):
    """Gates each channel by what all channels are on average."""

    def __init__(self, width: int, inner: int, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, inner, 1)
        self.expand = nn.Conv2d(inner, width, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        mean = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(F.relu(self.reduce(mean))))


def _inverted(width: int, act: str, *gates: nn.Module) -> Residual:
    inner = 4 * width
    return Residual(
        conv(width, inner, 1, act=act),
        conv(inner, inner, 3, groups=inner, act=act),
        *gates,
        nn.Conv2d(inner, width, 1, bias=False),
        nn.BatchNorm2d(width),
    )


def mobilenet_v2_like() -> nn.Sequential:
    """Inverted residuals with ReLU6."""
    blocks = [_inverted(16, "ReLU6"), conv(16, 32, 3, 2), _inverted(32, "ReLU6")]
    return classifier(conv(3, 16, 3, 2, act="ReLU6"), *blocks, conv(32, 64, 1), width=64)


def mobilenet_v3_like() -> nn.Sequential:
    """Inverted residuals with Hardswish, gated by squeeze-and-excitation."""
    blocks = [
        _inverted(16, "Hardswish", SqueezeExcite(64, 16, F.hardsigmoid)),
        conv(16, 24, 3, 2, act="Hardswish"),
        _inverted(24, "Hardswish", SqueezeExcite(96, 24, F.hardsigmoid)),
    ]
    return classifier(conv(3, 16, 3, 2, act="Hardswish"), *blocks, width=24)


class TwoInputs(nn.Module):
    """An image and a table of numbers, each with layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Sequential(conv(3, 16, 3, 2), conv(16, 32, 3, 2), nn.AdaptiveAvgPool2d(1))
        self.known = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        """Images (N, 3, H, W) and numbers (N, 12) to logits (N, 5)."""
        seen = self.seen(image).flatten(1)
        return self.head(torch.cat([seen, self.known(table)], 1))


class DictOutputs(nn.Module):
    """Two heads, whose outputs are in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv(3, 16, 3, 2), conv(16, 32, 3, 2))
        self.classes = nn.Linear(32, 10)
        self.boxes = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to `logits` (N, 10) and `boxes` (N, 4)."""
        features = self.trunk(x).mean((2, 3))
        return {"logits": self.classes(features), "boxes": self.boxes(features)}


class Cell(nn.Module):
    """An LSTM's cell, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.cell = nn.LSTMCell(24, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens) to (N, classes)."""
        x = self.embed(x)
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        assert state is not None
        hidden, _ = state
        out: Tensor = self.head(hidden)
        return out


class Stateful(nn.Module):
    """A GRU whose states start from zeros that the code makes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.recurrent = nn.GRU(24, 32, 2, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens) to (N, classes)."""
        start = torch.zeros(2, x.size(0), 32).to(x.device)
        states, _ = self.recurrent(self.embed(x), start)
        out: Tensor = self.head(states[:, -1])
        return out


class Blurred(nn.Module):
    """Channels that are blurred by one kernel before every second one of them is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 48, 3, padding=1)
        self.head = nn.Linear(48, 10)
        weights = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", torch.outer(weights, weights)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, classes)."""
        x = self.first(x).relu()
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, 3, 3)
        x = F.conv2d(x, kernel, stride=2, padding=1, groups=channels)
        x = self.second(x).relu()
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class TiedEmbeddings(nn.Module):
    """A language model whose last layer has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.hidden = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T) to logits (N, T, 64)."""
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.hidden(x)))


def group_norm_resnet() -> nn.Sequential:
    """Residual blocks with group norms."""

    def block() -> Residual:
        return Residual(
            *(nn.Conv2d(32, 32, 3, 1, 1, bias=False), nn.GroupNorm(8, 32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, 1, 1, bias=False), nn.GroupNorm(8, 32)),
        )

    stem = nn.Conv2d(3, 32, 3, 2, 1), nn.GroupNorm(8, 32), nn.ReLU()
    return classifier(*stem, block(), nn.ReLU(), block(), nn.ReLU(), width=32)


def prelu_net() -> nn.Sequential:
    """Activations with a parameter for each channel."""
    layers: list[nn.Module] = []
    for ins, outs in ((3, 24), (24, 32), (32, 48)):
        layers += [nn.Conv2d(ins, outs, 3, 2, 1), nn.BatchNorm2d(outs), nn.PReLU(outs)]
    return classifier(*layers, width=48)


class Encoder(nn.Module):
    """A classifier of tokens with torch's own transformer encoder."""

    def __init__(self, *, first: bool) -> None:
        """`first`: norms stand before attention and linear layers, and not after them."""
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.places = nn.Parameter(torch.randn(1, 12, 32) * 0.02)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, 12) to logits (N, 5)."""
        x = self.encoder(self.embedding(tokens) + self.places)
        return self.head(x.mean(1))


class Shuffled(nn.Module):
    """Grouped convolutions between which channels are shuffled, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 32, 3, 2)
        self.first = conv(32, 64, 1, groups=4)
        self.depth = conv(64, 64, 3, groups=64)
        self.second = conv(64, 32, 1, groups=4)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, 10)."""
        x = self.stem(x)
        y = F.channel_shuffle(self.first(x), 4)
        x = x + self.second(self.depth(y))
        return self.head(x.mean((2, 3)))


class MixerBlock(nn.Module):
    """Mixes places, then channels."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.over_places = nn.Sequential(nn.Linear(places, 32), nn.GELU(), nn.Linear(32, places))
        self.over_width = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape (N, places, width)."""
        x = x + self.over_places(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_width(self.norms[1](x))


class Mixer(nn.Module):
    """An MLP-Mixer on patches of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        self.blocks = nn.Sequential(MixerBlock(16, 48), MixerBlock(16, 48))
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) to logits (N, 10)."""
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


class ConvNextBlock(nn.Module):
    """A depthwise convolution, a norm over channels, two linear layers and a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(width, width, 7, 1, 3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape (N, width, H, W)."""
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.shrink(F.gelu(self.expand(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


def convnext_like() -> nn.Sequential:
    """Blocks of ConvNeXt."""
    blocks = ConvNextBlock(32), nn.Conv2d(32, 48, 2, 2), ConvNextBlock(48)
    return classifier(nn.Conv2d(3, 32, 4, 4), *blocks, width=48)


def squeeze_net() -> nn.Sequential:
    """Convolutions gated by squeeze-and-excitation."""
    gates = [SqueezeExcite(width, 8, torch.sigmoid) for width in (32, 48)]
    layers = conv(3, 32, 3, 2), gates[0], conv(32, 48, 3, 2), gates[1], conv(48, 64)
    return classifier(*layers, width=64)


class DenseBlock(nn.Module):
    """Layers that each take what all layers before them made."""

    def __init__(self, width: int, growth: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width + n * growth),
                nn.ReLU(),
                nn.Conv2d(width + n * growth, growth, 3, 1, 1, bias=False),
            )
            for n in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) to (N, width + count · growth, H, W)."""
        made = [x]
        for layer in self.layers:
            made.append(layer(torch.cat(made, 1)))
        return torch.cat(made, 1)


def dense_net() -> nn.Sequential:
    """A dense block between convolutions."""
    return classifier(conv(3, 24, 3, 2), DenseBlock(24, 16, 3), conv(72, 48, 1), width=48)


class RepVggBlock(nn.Module):
    """The sum of a convolution of 3, one of 1 and the input, each with a batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.three = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        )
        self.one = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.same = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape (N, width, H, W)."""
        return F.relu(self.three(x) + self.one(x) + self.same(x))


def repvgg_like() -> nn.Sequential:
    """Blocks of RepVGG."""
    blocks = RepVggBlock(32), conv(32, 48, 3, 2), RepVggBlock(48)
    return classifier(conv(3, 32, 3, 2), *blocks, width=48)


def depth_multiplier() -> nn.Sequential:
    """Depthwise convolutions that make several channels of each."""
    layers = conv(3, 16, 3, 2), conv(16, 48, 3, groups=16), conv(48, 32, 1)
    return classifier(*layers, conv(32, 64, 3, groups=32), conv(64, 48, 1), width=48)


def super_resolution() -> nn.Sequential:
    """Images of twice the size, by pixel shuffle."""
    return nn.Sequential(
        *(conv(3, 32, 5), Residual(conv(32, 32), nn.Conv2d(32, 32, 3, 1, 1))),
        *(nn.Conv2d(32, 64, 3, 1, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(16, 3, 3, 1, 1)),
    )


class Chunks(nn.Module):
    """Halves of a layer's outputs, of which one gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 32, 3, 2)
        self.both = nn.Conv2d(32, 96, 1)
        self.after = conv(48, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, 10)."""
        x = self.stem(x)
        values, gates = self.both(x).chunk(2, dim=1)
        return self.head((x + self.after(values * gates.sigmoid())).mean((2, 3)))


class Looped(nn.Module):
    """Control flow on shapes and on an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(3, 16), conv(16, 32), conv(32, 32)])
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (N, 3, H, W) to logits (N, 10)."""
        for layer in self.layers:
            x = layer(x)
            if x.shape[-1] > 8 and x.shape[-2] > 8:
                x = F.max_pool2d(x, 2)
        if mask is not None:
            x = x * mask
        return self.head(x.mean((2, 3)))


class OnData(nn.Module):
    """Control flow on the data, which no graph holds: it must be refused."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(32, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, 32) to logits (N, 5)."""
        x = self.first(x) if x.mean() > 0 else self.second(x)
        return self.head(x.relu())


class Twice(nn.Module):
    """A block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = conv(3, 24, 3, 2), Residual(conv(24, 48), conv(48, 24))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, 10)."""
        return self.head(self.block(self.block(self.stem(x))).mean((2, 3)))


def weight_norm_net() -> nn.Sequential:
    """Layers whose weights are computed anew in each forward pass."""
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(32, 64)),
        nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Bilinear(nn.Module):
    """Two inputs by their places, and a product of them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 24), nn.Linear(12, 20)
        self.both = nn.Bilinear(24, 20, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Features (N, 16) and (N, 12) to logits (N, 5)."""
        return self.head(F.relu(self.both(self.left(left).relu(), self.right(right).relu())))
