"""What is left of a network makes up for what is gone."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import slimfront as sf
from slimfront.trainables.inputs import Several
from slimfront.trainables.reconstruction import Reconstruction, reconstruct
from slimfront.trainables.reconstruction.layers import can_be_fitted, matrix_of, rows_of

IMAGES = torch.randn(32, 3, 9, 8)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(8, 5), torch.randn(4, 3, 8)),
        (nn.Linear(8, 5, bias=False), torch.randn(7, 8)),
        (Conv1D(5, 8), torch.randn(4, 3, 8)),
        (nn.Conv1d(3, 5, 3, padding=1, stride=2), torch.randn(4, 3, 11)),
        (nn.Conv1d(3, 5, 4, padding="same", dilation=3), torch.randn(4, 3, 30)),
        (nn.Conv2d(3, 5, (3, 2), padding=(1, 0), stride=(2, 1), dilation=(1, 2)), IMAGES),
        (nn.Conv2d(3, 5, (4, 3), padding="same"), IMAGES),
        (nn.Conv2d(3, 5, 3, padding="valid", bias=False), IMAGES),
        (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), IMAGES),
        (nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect"), IMAGES),
        (nn.Conv2d(3, 5, 3), IMAGES[0]),
        (nn.Conv2d(3, 6, 3, groups=3, padding=1), IMAGES),
        (nn.Conv1d(6, 4, 3, groups=2), torch.randn(4, 6, 11)),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_a_layer_is_a_matrix_of_what_it_sees(layer: nn.Module, inputs: Tensor) -> None:
    assert can_be_fitted(layer)
    inputs = inputs[:8]
    outputs = layer(inputs)
    matrix = matrix_of(layer)
    x, y = rows_of(layer, inputs, outputs)
    computed = x @ matrix.weight.mT
    if matrix.bias is not None:
        computed = computed + matrix.bias.unsqueeze(1)
    torch.testing.assert_close(computed, y)
    assert y.numel() == outputs.numel()


def test_some_places_stand_for_all_of_a_large_image() -> None:
    layer = nn.Conv2d(3, 5, 3)
    images = torch.randn(6, 3, 80, 80)
    outputs = layer(images)
    x, y = rows_of(layer, images, outputs)
    assert x.shape[1] == y.shape[1] == 2**11
    torch.testing.assert_close(x @ matrix_of(layer).weight.mT + layer.bias, y)


class Net(nn.Module):
    """Activations in place, a residual addition, a layer that is called twice, one whose weight is
    tied, and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.one, self.two = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.twice, self.tied = nn.Linear(12, 12), nn.Linear(12, 12)
        self.other = nn.Linear(12, 12)
        self.other.weight = self.tied.weight
        self.head = nn.Linear(12, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(x + self.two(self.relu(self.one(x))))
        x = self.depthwise(x).mean((2, 3))
        x = self.twice(torch.tanh(self.twice(x)))
        x = x + self.other(torch.tanh(self.tied(x)))
        out: Tensor = self.head(x)
        return out


@pytest.fixture
def whole() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def without_channels(whole: nn.Module) -> Any:
    smaller: Any = copy.deepcopy(whole)
    with torch.no_grad():
        for layer in (smaller.stem, smaller.norm):
            layer.weight[:3] = 0
            layer.bias[:3] = 0
        smaller.one.weight[5:9] = 0
        smaller.one.bias[5:9] = 0
        smaller.two.weight[:, :, 0, 0] = 0
    return smaller


def error(one: nn.Module, other: nn.Module, inputs: Any) -> float:
    with torch.no_grad():
        return float((one(inputs) - other(inputs)).square().mean())


def test_layers_are_fitted_in_order_and_their_zeros_stay(whole: nn.Module) -> None:
    smaller = without_channels(whole)
    before = copy.deepcopy(smaller)
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    names = reconstruct(whole, smaller, [IMAGES[:20], IMAGES[20:]])
    # The stem sees what it saw, and what is left of it gives the same.
    assert names == ["one", "two", "depthwise", "head"]
    assert torch.equal(smaller.stem.weight, before.stem.weight)
    fresh = torch.randn(32, 3, 9, 8)
    assert error(whole, smaller, fresh) < 0.5 * error(whole, before, fresh)
    for (name, one), two in zip(smaller.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(one[two == 0], two[two == 0]), name
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert not any(module._forward_hooks for net in (whole, smaller) for module in net.modules())


def test_nothing_changes_where_nothing_is_gone(whole: nn.Module) -> None:
    same = copy.deepcopy(whole)
    assert reconstruct(whole, same, [IMAGES]) == []
    assert all(map(torch.equal, same.parameters(), whole.parameters()))


def test_a_network_that_fails_on_the_way_leaves_no_thread(whole: nn.Module) -> None:
    smaller = without_channels(whole)
    smaller.head.register_forward_pre_hook(lambda *_: 1 / 0)
    calls = []
    smaller.head.forward = lambda x: calls.append(x) or 1 / 0
    count = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        reconstruct(whole, smaller, [IMAGES])
    assert threading.active_count() == count


class Two(nn.Module):
    """Of two inputs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(4, 8), nn.Linear(2, 8), nn.Linear(8, 3)

    def forward(self, given: Any) -> Tensor:
        out: Tensor = self.last(torch.relu(self.a(given["x"]) + self.b(given["time"])))
        return out


def test_several_inputs_and_batches_of_other_sizes() -> None:
    whole = Two().eval()
    smaller = copy.deepcopy(whole)
    with torch.no_grad():
        for layer in (smaller.a, smaller.b):
            layer.weight[:2] = 0
            layer.bias[:2] = 0
    before = copy.deepcopy(smaller)
    given: Any = Several({"x": torch.randn(50, 4), "time": torch.randn(50, 2)})
    longer: Any = Several({"x": torch.randn(6, 3, 4), "time": torch.randn(6, 3, 2)})
    assert "last" in reconstruct(whole, smaller, [given, longer, given])
    assert error(whole, smaller, given) < 0.5 * error(whole, before, given)


@pytest.mark.parametrize("amount", [{"channels": 0.4}, {"weights": 0.7}, {"layers": 1}], ids=str)
def test_a_pruned_network_computes_more_nearly_what_it_did(
    whole: nn.Module, amount: dict[str, Any]
) -> None:
    images = torch.randn(128, 3, 9, 8)
    fresh = torch.randn(64, 3, 9, 8)
    fitted = sf.prune(whole, images.split(32), **amount)
    plain = sf.prune(whole, images.split(32), fit=False, recalibrate=False, **amount)
    assert error(whole, fitted.network, fresh) < 0.5 * error(whole, plain.network, fresh)
    assert fitted.measures["nonzero_params"] <= plain.measures["nonzero_params"]
    said = [step for step in fitted.report.steps if step[1] == "fitted"]
    assert ("head", "fitted", "to what it gave in the whole network") in said
    assert plain.report.count("fitted") == 0


def test_inputs_stay_as_they_are_where_networks_change_them_in_place() -> None:
    whole = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    inputs = torch.randn(64, 6)
    before = inputs.clone()
    targets = torch.randint(3, (64,))
    sf.prune(whole, [inputs[:32], inputs[32:]], weights=0.5)
    sf.prune(whole, [(inputs, targets)], channels=0.3, loss=nn.functional.cross_entropy)
    sf.compact(whole, inputs)
    sf.measure(whole, inputs)
    assert torch.equal(inputs, before)
    kept = Reconstruction(whole, inputs)
    smaller = copy.deepcopy(whole)
    with torch.no_grad():
        smaller[1].weight[:, 0] = 0
    kept.apply(smaller)
    assert torch.equal(inputs, before)
    assert torch.equal(kept.inputs, before)
