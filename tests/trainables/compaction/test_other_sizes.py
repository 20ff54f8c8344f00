"""Compact networks on inputs of other sizes than they were made with."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimfront as sf
from slimfront.trainables.shipping import load, save
from slimfront.trainables.shipping.shipped import Shipped

LENGTHS = (8, 3, 1, 20)
"""Of sequences; the first is that of the inputs at hand."""


class Tokens(nn.Module):
    """A transformer block on tokens whose positions have 32 places."""

    def __init__(self, positions: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(20, 16)
        self.table = nn.Parameter(torch.randn(1, 32, 16))
        self.rows = nn.Embedding(32, 16)
        self.register_buffer("places", torch.arange(32).unsqueeze(0))
        self.positions = positions
        self.block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.block(self.positions(self, self.tokens(x))).mean(1))
        return made


class Causal(nn.Module):
    """Attention under a mask that is cut out of a larger one, as in minGPT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(20, 16)
        self.keys, self.queries = nn.Linear(16, 16), nn.Linear(16, 16)
        self.values, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)
        self.register_buffer("seen", torch.ones(32, 32).tril().view(1, 1, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        n, length, width = x.shape
        shape = (n, length, 4, width // 4)
        keys = self.keys(x).view(shape).transpose(1, 2)
        queries = self.queries(x).view(shape).transpose(1, 2)
        values = self.values(x).view(shape).transpose(1, 2)
        scores = queries @ keys.transpose(-2, -1) * 0.5
        hidden = self.seen[:, :, :length, :length] == 0
        scores = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        x = x + self.out((scores @ values).transpose(1, 2).reshape(n, length, width))
        made: Tensor = self.head(x + self.down(self.up(x).relu()))
        return made


class Window(nn.Module):
    """Convolutions of images, under a window that is as large as the largest image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.window = nn.Parameter(torch.rand(1, 1, 48, 48))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu() * self.window[..., : x.shape[2], : x.shape[3]]
        made: Tensor = self.head(self.second(x).relu().mean((2, 3)))
        return made


class BySize(nn.Module):
    """Chooses by the size of its images, which no graph does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if x.shape[-1] > 8:
            x = 3 * self.second(x).relu()
        made: Tensor = self.head(x.mean((2, 3)))
        return made


POSITIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a parameter": lambda net, x: x + net.table[:, : x.shape[1]],
    "a parameter, narrowed": lambda net, x: x + net.table.narrow(1, 0, x.size(1)),
    "rows of an embedding": lambda net, x: x + net.rows.weight[: x.shape[1]],
    "a range": lambda net, x: x + net.rows(torch.arange(x.shape[1], device=x.device)),
    "a buffer": lambda net, x: x + net.rows(net.places[:, : x.size(1)]),
    "both ends": lambda net, x: x + net.table[:, 32 - x.shape[1] :],
    "repeated": lambda net, x: x + net.table[:, :1].expand(-1, x.shape[1], -1),
}


def tokens(length: int, examples: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(20, (examples, length), generator=generator)


def images(size: int, examples: int = 6) -> Tensor:
    return torch.randn(examples, 3, size, size, generator=torch.Generator().manual_seed(size))


def check(network: nn.Module, made: nn.Module, inputs: Tensor) -> None:
    with torch.no_grad():
        wanted, got = network(inputs), made(inputs)
    assert torch.allclose(wanted, got, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("where", POSITIONS)
def test_sequences_may_have_any_length(where: str, caplog: pytest.LogCaptureFixture) -> None:
    network = Tokens(POSITIONS[where]).eval()
    with caplog.at_level(logging.WARNING):
        pruned = sf.prune(network, [tokens(8)], channels=0.4)
    zeroed = pruned.network
    before = sum(parameter.numel() for parameter in network.parameters())
    assert sum(parameter.numel() for parameter in zeroed.parameters()) < 0.8 * before
    small = sf.compact(network, tokens(8)).network
    for length in LENGTHS:
        check(network, small, tokens(length))
        zeroed(tokens(length))
    assert not [said for said in caplog.messages if "of the size that it was made" in said]


@pytest.mark.parametrize(
    ("network", "inputs", "sizes"),
    [(Causal().eval(), tokens, LENGTHS), (Window().eval(), images, (16, 12, 32))],
)
def test_what_is_cut_out_of_a_larger_whole_stays_whole(
    network: nn.Module, inputs: Callable[[int], Tensor], sizes: tuple[int, ...]
) -> None:
    here = inputs(sizes[0])
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    asked = {"name": "channels", "sparsity": 0.5, "every": 1}
    with sf.Slimming(network, optimizer, here, steps=2, sparsifier=asked) as slim:
        for _ in range(2):
            network(here).square().mean().backward()
            slim.before_step()
            optimizer.step()
            slim.after_step()
        small = slim.compact()
    assert small.measures["params"] < sum(p.numel() for p in network.parameters())
    for size in sizes:
        check(network, small.network, inputs(size))


def test_a_network_of_one_size_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    network = BySize().eval()
    with caplog.at_level(logging.WARNING):
        small = sf.compact(network, images(16)).network
    check(network, small, images(16))
    (said,) = [said for said in caplog.messages if "of the size that it was made" in said]
    assert "float32 (N, 3, 16, 16), and not for float32 (N, 3, 8, 8)" in said


@pytest.mark.parametrize("kind", ["pt2", "onnx", "safetensors"])
def test_files_take_sequences_of_any_length(kind: Any, tmp_path: Any) -> None:
    network = Tokens(POSITIONS["a buffer"]).eval()
    small = sf.compact(network, tokens(8)).network
    path = tmp_path / f"small.{kind}"
    save(Shipped(small, None, None).eval(), tokens(8), path, kind)
    read = load(path)
    for length in LENGTHS[:2] if kind == "onnx" else LENGTHS:
        check(network, read, tokens(length))


class Levels(nn.Module):
    """Two levels of an image, of which the lower is made as large as the upper."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.second = nn.Conv2d(8, 8, 3, 2, 1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        upper = self.first(x).relu()
        lower = self.second(upper).relu()
        made = self.last(upper + nn.functional.interpolate(lower, size=upper.shape[-2:]))
        if self.form == "a mapping":
            return {"out": made, "beside": 2 * made}
        if self.form == "mappings within":
            return {"out": [made, {"beside": 2 * made}]}
        return [made, 2 * made]


@pytest.mark.parametrize("form", ["a list", "a mapping", "mappings within"])
def test_images_may_have_any_size_whatever_is_returned(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = Levels(form).eval()
    with torch.no_grad():
        network.second.weight[:4] = 0
        network.second.bias[:4] = 0
    small = sf.compact(network, torch.randn(4, 3, 16, 16)).network
    assert not [message for message in caplog.messages if "size" in message]
    for shape in ((2, 3, 32, 32), (1, 3, 24, 40)):
        images = torch.randn(shape)
        torch.testing.assert_close(small(images), network(images))


class Masked(nn.Module):
    """A transformer of torch's whose mask is cut or made to the length of what it is given."""

    def __init__(self, mask: Callable[[Any, int], Any], layers: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(20, 16), nn.Linear(16, 5)
        self.layers: nn.Module = nn.MultiheadAttention(16, 4, batch_first=True)
        if layers == "an encoder":
            layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("seen", torch.ones(32, 32, dtype=torch.bool).triu(1))
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(self, x.shape[1])
        x = self.tokens(x)
        if isinstance(self.layers, nn.MultiheadAttention):
            x, _ = self.layers(x, x, x, attn_mask=mask, need_weights=False)
        else:
            x = self.layers(x, mask=mask)
        made: Tensor = self.head(x)
        return made


MASKS: dict[str, Callable[[Any, int], Any]] = {
    "generated": lambda _net, n: nn.Transformer.generate_square_subsequent_mask(n),
    "triu": lambda net, n: torch.triu(
        torch.ones(n, n, dtype=torch.bool, device=net.seen.device), 1
    ),
    "full": lambda _net, n: torch.full((n, n), float("-inf")).triu(1),
    "positions": lambda _net, n: torch.arange(n)[None, :] > torch.arange(n)[:, None],
    "a part": lambda net, n: net.seen[:n, :n],
}


@pytest.mark.parametrize("layers", ["an encoder", "an attention"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_made_for_each_length(mask: str, layers: str, caplog: Any) -> None:
    network = Masked(MASKS[mask], layers)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    sparsifier = {"name": "channels", "sparsity": 0.4, "of": "params", "every": 1}
    with sf.Slimming(network, optimizer, tokens(8), steps=6, sparsifier=sparsifier) as slim:
        for _ in range(6):
            loss = network(tokens(8)).square().mean() + slim.loss()
            optimizer.zero_grad()
            loss.backward()
            slim.before_step()
            optimizer.step()
            slim.after_step()
        small = slim.compact()
    assert "refuse" not in caplog.text
    assert small.measures["params"] < 0.75 * sum(p.numel() for p in network.parameters())
    network.eval()
    for length in LENGTHS:
        check(network, small.network, tokens(length))


def test_attention_that_will_be_refused_is_named_before_the_training(caplog: Any) -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor
            weights: Tensor
            made, weights = self.attention(x, x, x)
            return made + weights @ made

    network = Weights()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    inputs = torch.randn(4, 6, 16)
    sparsifier = {"name": "magnitude", "sparsity": 0.5}
    sf.Slimming(network, optimizer, inputs, steps=6, sparsifier=sparsifier).close()
    (said,) = [said for said in caplog.messages if "compact will refuse" in said]
    assert "the attention 'attention' has its attention weights read" in said
