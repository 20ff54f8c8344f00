"""Units behind moves of whole channels: shuffles, rolls, parts, and modules that are given
sizes."""

import operator
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimfront.trainables.compaction import compact, deserialise, serialise
from slimfront.trainables.shipping import save
from slimfront.trainables.shipping.shipped import Shipped

Move = Callable[[Tensor], Tensor]


class Moved(nn.Module):
    def __init__(self, move: Move, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 16, 3, padding=1)
        self.move = move
        self.last = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.move(self.first(x).relu()))
        return made


MOVES: dict[str, tuple[Move, int]] = {
    "roll": (lambda h: torch.roll(h, 3, 1), 16),
    "flip": (lambda h: h.flip(1), 16),
    "a part": (lambda h: h[:, :8], 8),
    "every second": (lambda h: h[:, ::2], 8),
    "a list": (lambda h: h[:, [0, 3, 5, 7]], 4),
    "ChannelShuffle": (nn.ChannelShuffle(4), 16),
    "channel_shuffle": (lambda h: F.channel_shuffle(h, 4), 16),
    "Unflatten": (nn.Sequential(nn.Unflatten(1, (8, 2)), nn.Flatten(1, 2)), 16),
    "Unflatten and a sum": (lambda h: nn.Unflatten(1, (8, 2))(h).sum(2), 8),
    "PixelShuffle": (nn.PixelShuffle(2), 4),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_stays_is_taken_by_its_places(name: str, tmp_path: Path) -> None:
    move, channels = MOVES[name]
    network = Moved(move, channels).eval()
    with torch.no_grad():
        # Pairs, and fours for pixels: parts that some moves take together.
        for layer in (network.first,):
            layer.weight[4:8] = 0
            layer.bias[4:8] = 0
            layer.weight[12:] = 0
            layer.bias[12:] = 0
    inputs = torch.randn(8, 2, 6, 6)
    made = compact(network, inputs)
    small = made.network
    assert made.report.after["params"] < sum(p.numel() for p in network.parameters())
    assert small.get_submodule("first").out_channels <= 8
    assert not made.report.count("zeros stay")
    for shape in ((3, 2, 6, 6), (1, 2, 6, 6), (5, 2, 8, 10)):
        other = torch.randn(shape)
        torch.testing.assert_close(small(other), network(other), rtol=1e-5, atol=1e-6)
    again = deserialise(serialise(small))
    torch.testing.assert_close(again(inputs), small(inputs))
    path = tmp_path / "small.onnx"
    save(Shipped(small, None, None), inputs, path, "onnx")
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    (outputs,) = session.run(None, {given.name: inputs[:3].numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), network(inputs[:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["view", "unflatten"])
@pytest.mark.parametrize("head", [0, 1, 3])
def test_any_head_of_attention_by_linear_layers_goes(head: int, how: str) -> None:
    """The first one too, which stays where all others go."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.parts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
            self.out = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            heads = []
            for part in self.parts:
                made = part(x)
                if how == "view":
                    made = made.view(x.shape[0], x.shape[1], 4, -1)
                else:
                    made = made.unflatten(-1, (4, -1))
                heads.append(made.transpose(1, 2))
            attended = F.scaled_dot_product_attention(*heads)
            joined: Tensor = self.out(attended.transpose(1, 2).flatten(2))
            return joined

    network = Attention().eval()
    of_head = slice(4 * head, 4 * head + 4)
    with torch.no_grad():
        for part in network.parts:
            part.weight[of_head] = 0
            part.bias[of_head] = 0
        network.out.weight[:, of_head] = 0
    inputs = torch.randn(8, 5, 16)
    small = compact(network, inputs).network
    assert small.get_submodule("parts.0").out_features == 12
    torch.testing.assert_close(small(inputs), network(inputs))


class InTheShapeOf(nn.Module):
    """Attention whose heads are put together in the shape of another tensor, whose width is that of
    all heads by chance."""

    def __init__(self, together: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.queries, self.keys = nn.Linear(16, 16), nn.Linear(16, 16)
        self.values, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        n, length, width = h.shape
        parts = []
        for layer in (self.queries, self.keys, self.values):
            parts.append(layer(h).view(n, length, 2, width // 2).transpose(1, 2))
        queries, keys, values = parts
        scores = (queries @ keys.transpose(-2, -1) * 8**-0.5).softmax(-1)
        heads = (scores @ values).transpose(1, 2)
        made: Tensor = self.last((h + self.out(self.together(heads, h))).mean(1))
        return made


@pytest.mark.parametrize(
    "together",
    [
        lambda heads, h: heads.reshape(h.shape),
        lambda heads, h: heads.reshape(h.size()),
        lambda heads, h: heads.reshape(*h.shape),
        lambda heads, h: heads.reshape(*h.shape[:2], -1),
        lambda heads, h: heads.reshape(operator.add(h.shape[:2], (16,))),
    ],
    ids=["shape", "size", "unpacked", "in part", "added"],
)
def test_a_shape_that_is_given_as_a_whole_is_what_it_was(
    together: Callable[[Tensor, Tensor], Tensor],
) -> None:
    network = InTheShapeOf(together).eval()
    with torch.no_grad():
        for layer in (network.first, network.out):
            layer.weight[::3] = 0
            layer.bias[::3] = 0
    inputs = torch.randn(6, 10, 8)
    made = compact(network, inputs)
    assert made.network.get_submodule("first").out_features == 10
    for shape in ((6, 10, 8), (1, 10, 8), (3, 7, 8)):
        other = torch.randn(shape)
        torch.testing.assert_close(made.network(other), network(other), rtol=1e-4, atol=1e-5)
    again = deserialise(serialise(made.network))
    torch.testing.assert_close(again(inputs), made.network(inputs))


PLACES = torch.randint(0, 7, (2, 20), generator=torch.Generator().manual_seed(0))
BEGUN: dict[str, Move] = {
    "zeros of a shape": lambda h: torch.zeros(h.shape),
    "full of a shape": lambda h: torch.full(h.shape, 0.0),
    "new_zeros of a shape": lambda h: h.new_zeros(h.shape),
    "zeros_like": torch.zeros_like,
    "sizes one by one": lambda h: torch.zeros(h.shape[0], h.shape[1], h.shape[2]),
    "a list": lambda h: torch.zeros([h.shape[0], 7, 12]),
}


class Messages(nn.Module):
    """Messages between nodes of a graph, added up in a tensor that is made for it."""

    def __init__(self, begun: Move, cell: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.begun = begun
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 1)
        self.message = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12))
        self.cell = nn.GRUCell(12, 12) if cell else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        sources, targets = PLACES
        sums = self.begun(h).index_add(1, targets, self.message(h[:, sources]))
        if self.cell is None:
            h = h + sums.tanh()
        else:
            n, nodes, d = h.shape
            h = self.cell(sums.reshape(n * nodes, d), h.reshape(n * nodes, d)).view(n, nodes, d)
        made: Tensor = self.last(h)
        return made


@pytest.mark.parametrize("cell", [True, False])
@pytest.mark.parametrize("how", BEGUN)
def test_sums_in_a_tensor_of_the_shape_of_another(how: str, cell: bool) -> None:
    """Its size is that of what is added to it, whatever becomes of the other."""
    network = Messages(BEGUN[how], cell).eval()
    with torch.no_grad():
        for layer, units in ((network.message[0], [1, 4, 9]), (network.message[2], [0, 3])):
            layer.weight[units] = 0
            layer.bias[units] = 0
        if network.cell is None:
            network.first.weight[[0, 3]] = 0
            network.first.bias[[0, 3]] = 0
    inputs = torch.randn(6, 7, 5)
    made = compact(network, inputs)
    for count in (1, 4):
        other = torch.randn(count, 7, 5)
        torch.testing.assert_close(made.network(other), network(other), rtol=1e-5, atol=1e-6)
    assert made.network.get_submodule("message.0").out_features == 13
    if network.cell is None and how != "a list":  # whose sizes are numbers of the code
        assert made.network.get_submodule("first").out_features == 10
