"""Slimming where loops do what was not thought of: copies, wrappers, forgotten calls, other
states."""

import copy
import io
import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimfront as sf
from slimfront.trainables.errors import said_once
from slimfront.trainables.models.resnet import BasicBlock
from tests.trainables.slimming.loops import INPUTS, adam, perceptron, step

CKA: dict[str, Any] = {"cka": {"strength": 0.5, "every": 1}}
CHANNELS: dict[str, Any] = {"name": "channels", "sparsity": 0.5, "every": 1}


def gradients_beside(other: nn.Module | None) -> list[Tensor]:
    """Of what CKA-SR adds, where a copy of the network sees the batch too."""
    network = perceptron()
    slim = sf.Slimming(network, adam(network), INPUTS, steps=4, penalties=CKA)
    if other is None:
        other = copy.deepcopy(network)
    network(INPUTS)
    other(INPUTS)
    return list(torch.autograd.grad(slim.loss(), network.parameters(), allow_unused=True))


def test_a_copy_made_later_has_no_hooks_at_work() -> None:
    plain = gradients_beside(nn.Identity())
    for mine, beside_a_copy in zip(plain, gradients_beside(None), strict=True):
        torch.testing.assert_close(mine, beside_a_copy)


def test_a_network_with_hooks_is_written_to_a_file_and_read() -> None:
    network = perceptron()
    sf.Slimming(network, adam(network), INPUTS, steps=4, penalties=CKA)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    torch.testing.assert_close(again(INPUTS), network(INPUTS))


class Difference(nn.Module):
    """Two inputs, which are not alike."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        difference = self.a(left).relu() - self.b(right).relu()
        made: Tensor = self.last(difference)
        return made


def test_a_compact_network_has_the_places_of_forward_whatever_the_order_of_the_inputs() -> None:
    network = Difference().eval()
    inputs = {"right": INPUTS, "left": INPUTS.flip(0)}
    slim = sf.Slimming(network, adam(network), inputs, steps=4, sparsifier=CHANNELS)
    small = slim.compact().network
    wanted = network(INPUTS, INPUTS.flip(0))
    torch.testing.assert_close(small(INPUTS, INPUTS.flip(0)), wanted)
    torch.testing.assert_close(small(right=INPUTS.flip(0), left=INPUTS), wanted)


def test_what_is_asked_for_with_nothing_to_do_is_named(caplog: Any) -> None:
    network = perceptron()
    sf.Slimming(
        network,
        adam(network),
        INPUTS,
        steps=4,
        penalties={"layer": {}},
        sparsifier={"name": "channels"},
    )
    assert "penalties.layer does nothing: its strength is 0" in caplog.text
    assert "the sparsifier does nothing: its sparsity is 0" in caplog.text


def test_calls_that_were_forgotten_are_named(caplog: Any) -> None:
    network = perceptron()
    layer = {"layer": {"strength": 1.0}}
    sf.Slimming(network, adam(network), INPUTS, steps=4, penalties=layer).compact()
    assert "after_step was never called" in caplog.text
    optimizer = adam(network)
    slim = sf.Slimming(network, optimizer, INPUTS, steps=1, penalties=CKA)
    network(INPUTS).sum().backward()
    optimizer.step()
    slim.after_step()
    network(INPUTS)
    slim.compact()
    assert "loss() was never called" in caplog.text


def test_parameters_that_were_replaced_are_named(caplog: Any) -> None:
    network = perceptron()
    slim = sf.Slimming(network, adam(network), INPUTS, steps=1, sparsifier=CHANNELS)
    network[6] = nn.Linear(16, 3)
    slim.compact()
    assert "replaced after Slimming was made" in caplog.text
    assert "'6.weight'" in caplog.text


def test_rigl_without_gradients_says_what_was_forgotten() -> None:
    network = perceptron()
    optimizer = adam(network)
    rigl = {"name": "rigl", "sparsity": 0.5, "every": 1}
    slim = sf.Slimming(network, optimizer, INPUTS, steps=9, sparsifier=rigl)

    def train() -> None:
        for _ in range(3):
            network(INPUTS).sum().backward()
            optimizer.step()
            slim.after_step()

    with pytest.raises(sf.UserError, match="before_step was not called"):
        train()


class Wrapper(torch.optim.Optimizer):
    """As Accelerate wraps optimisers: with the methods of those that keep weights apart."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def train(self) -> None:
        """Nothing."""

    def eval(self) -> None:
        """Nothing."""


def test_a_wrapped_optimiser_is_the_one_within() -> None:
    network = perceptron()
    optimizer = adam(network)
    penalties = {"layer": {"strength": 1.0}}
    slim = sf.Slimming(network, Wrapper(optimizer), INPUTS, steps=4, penalties=penalties)
    assert slim.optimizer is optimizer


def test_relative_strengths_in_a_warm_up_from_0_are_relative_to_its_end(caplog: Any) -> None:
    strengths = []
    for begins_at_0 in (False, True):
        network = perceptron()
        optimizer = adam(network)
        if begins_at_0:
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 2, 1.0))
            assert optimizer.param_groups[0]["lr"] == 0
        penalties = {"node": {"strength": 1.0, "relative": True}}
        slim = sf.Slimming(network, optimizer, INPUTS, steps=4, penalties=penalties)
        strengths.append(slim.state_dict()["strengths"]["node"]["strength"])
        optimizer.param_groups[0]["lr"] = 0.01
        step(network, optimizer, slim)
    assert strengths[0] == strengths[1]
    assert "has risen" not in caplog.text


def test_relative_strengths_without_a_learning_rate_are_refused() -> None:
    network = perceptron()
    penalties = {"node": {"strength": 1.0, "relative": True}}
    with pytest.raises(sf.UserError, match="the learning rate is 0"):
        sf.Slimming(network, adam(network, 0.0), INPUTS, steps=4, penalties=penalties)


def slimming(**asked: Any) -> sf.Slimming:
    network = perceptron()
    return sf.Slimming(network, adam(network), INPUTS, steps=4, **asked)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (slimming, "the state is of another network, or of another sparsifier"),
        (lambda: slimming(sparsifier={"name": "rigl", "sparsity": 0.5, "every": 1}), "another"),
        (perceptron, "this is not what Slimming.state_dict gave"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: Any, said: str) -> None:
    slim = slimming(sparsifier=CHANNELS)
    with pytest.raises(sf.UserError, match=said):
        slim.load_state_dict(state().state_dict())
    with pytest.raises(sf.UserError, match="with a sparsifier, and this one has none"):
        slimming().load_state_dict(slim.state_dict())


def test_strengths_that_were_changed_are_kept_when_a_training_goes_on() -> None:
    before = slimming(penalties={"node": {"strength": 0.01}})
    after = slimming(penalties={"node": {"strength": 0.5}})
    after.load_state_dict(before.state_dict())
    (node,) = after.acting.penalties
    assert node.options.strength == 0.5  # type: ignore[attr-defined]


class Tied(nn.Module):
    """A layer's weight is another's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens).mean(1)
        made: Tensor = self.head(embedded + self.hidden(embedded).relu())
        return made


def test_channels_of_shared_weights_go() -> None:
    torch.manual_seed(0)
    network = Tied()
    tokens = torch.arange(36).view(9, 4) % 12
    optimizer = adam(network)
    slim = sf.Slimming(network, optimizer, tokens, steps=3, sparsifier=CHANNELS)
    for _ in range(3):
        nn.functional.cross_entropy(network(tokens), tokens[:, 0]).backward()
        slim.before_step()
        optimizer.step()
        slim.after_step()
        optimizer.zero_grad()
    small = slim.compact()
    assert small.measures["params"] < sum(one.numel() for one in network.parameters())
    torch.testing.assert_close(small.network(tokens), network.eval()(tokens))


def test_channels_of_computed_weights_are_refused_by_name() -> None:
    network = perceptron()
    nn.utils.parametrizations.weight_norm(network[2])
    with pytest.raises(sf.UserError, match=r"'2\.weight' is computed from"):
        sf.Slimming(network, adam(network), INPUTS, steps=4, sparsifier=CHANNELS)


def test_networks_of_several_inputs_are_made_compact_and_measured_as_they_are_called() -> None:
    network = Difference()
    small = sf.compact(network, (INPUTS, INPUTS)).network
    torch.testing.assert_close(small(INPUTS, 2 * INPUTS), network(INPUTS, 2 * INPUTS))
    for size in ("params", "flops", "layers"):
        assert sf.measure(small, (INPUTS, INPUTS))[size] == sf.measure(network, [INPUTS] * 2)[size]
    with pytest.raises(TypeError, match="is called with 1 inputs"):
        small(INPUTS)
    with pytest.raises(sf.UserError, match="'1' of the inputs is a str"):
        sf.compact(network, (INPUTS, "more"))


@pytest.mark.parametrize("named", [("left",), ("left", "right", "labels"), ("right", "z")])
def test_a_compact_network_takes_the_inputs_that_it_was_made_with(named: tuple[str, ...]) -> None:
    small = sf.compact(Difference(), {"left": INPUTS, "right": INPUTS}).network
    with pytest.raises(TypeError, match="takes what it was made with, left, right"):
        small(**dict.fromkeys(named, INPUTS))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": nn.Linear}, "the network is a class, Linear"),
        ({"network": torch.relu}, "the network is a builtin_function_or_method"),
        ({"optimizer": [INPUTS]}, "the optimizer is a list"),
        ({"steps": None}, "steps is None"),
        ({"steps": 10.5}, "steps is 10.5"),
        ({"steps": float("inf")}, "steps is inf"),
        ({"steps": "60"}, "steps is '60'"),
    ],
)
def test_arguments_of_another_kind_are_refused(changes: dict[str, Any], said: str) -> None:
    network = perceptron()
    given = {"network": network, "optimizer": adam(network), "inputs": INPUTS, "steps": 4}
    with pytest.raises(sf.UserError, match=re.escape(said)):
        sf.Slimming(**(given | changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_network_of_any_precision_is_made_compact(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()
    )
    images = torch.randn(16, 2, 8, 8)
    network(images)  # statistics of its own
    network.to(dtype).eval()
    with torch.no_grad():
        network[0].weight[:3] = 0  # type: ignore[index, operator]
        network[1].bias[:3] = -1  # type: ignore[index, operator]
    small = sf.compact(network, images.to(dtype))
    assert small.measures["params"] < sum(one.numel() for one in network.parameters())
    wanted = network(images.to(dtype)).float()
    got = small.network(images.to(dtype)).float()
    assert (wanted - got).norm() <= max(1e-5, torch.finfo(dtype).eps) * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_that_is_active_stays_so_in_an_average_of_any_precision(dtype: torch.dtype) -> None:
    network = perceptron().to(dtype)
    inputs = INPUTS.to(dtype)
    with torch.no_grad():
        for layer in (network[2], network[4]):
            layer.weight.abs_()  # type: ignore[operator, union-attr]
            layer.bias.abs_()  # type: ignore[operator, union-attr]
        network[2].weight[0, 0] *= -1  # type: ignore[index, operator]
    average = copy.deepcopy(network)
    penalties = {"layer": {"strength": 1e-6}}
    slim = sf.Slimming(network, adam(network), inputs, steps=4, penalties=penalties)
    slim.apply_to(average)
    torch.testing.assert_close(average.state_dict(), network.state_dict())


def residual() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(BasicBlock(8, 8, 1), BasicBlock(8, 16, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    ]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    "asked",
    [{"penalties": {name: {"strength": 0.3}}} for name in ("layer", "channel", "block", "node")]
    + [{"sparsifier": CHANNELS}],
    ids=["layer", "channel", "block", "node", "channels"],
)
def test_batch_norms_that_share_statistics_between_processes_are_batch_norms(
    asked: dict[str, Any],
) -> None:
    """As `convert_sync_batchnorm` leaves them, in one process."""
    images = torch.randn(8, 3, 8, 8)
    found = []
    for convert in (nn.Identity(), nn.SyncBatchNorm.convert_sync_batchnorm):
        network: nn.Module = convert(residual())
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        slim = sf.Slimming(network, optimizer, images, steps=10, **asked)
        for _ in range(10):
            loss = network(images).square().mean() + slim.loss()
            optimizer.zero_grad()
            loss.backward()
            slim.before_step()
            optimizer.step()
            slim.after_step()
        small = slim.compact(images)
        found.append((small.measures["params"], small.network(images)))
    (plain, wanted), (shared, made) = found
    assert shared == plain < sum(one.numel() for one in residual().parameters())
    torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize("inputs", [(torch.randn(4, 6), torch.randn(4, 6)), "named"])
def test_a_compact_network_of_several_inputs_is_written_to_a_file(inputs: Any) -> None:
    if inputs == "named":
        inputs = {"left": torch.randn(4, 6), "right": torch.randn(4, 6)}
    small = sf.compact(Difference().eval(), inputs).network
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for other in (again, copy.deepcopy(small)):
        made = other(**inputs) if isinstance(inputs, dict) else other(*inputs)
        wanted = small(**inputs) if isinstance(inputs, dict) else small(*inputs)
        torch.testing.assert_close(made, wanted)
        assert type(other).__name__ == "ByArguments"


def test_what_is_added_to_the_loss_of_a_complex_network_is_real() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64))
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            spectrum = torch.fft.fft(x) @ self.weight
            made: Tensor = self.head(torch.fft.ifft(spectrum).real)
            return made

    network = Complex()
    options = {"name": "magnitude", "sparsity": 0.5}
    slim = sf.Slimming(network, adam(network), INPUTS, steps=4, sparsifier=options)
    assert slim.loss().dtype == torch.float32
    (network(INPUTS).square().mean() + slim.loss()).backward()


class Auxiliary(nn.Module):
    """A head that is read while training alone, and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 32), nn.Linear(32, 16), nn.Linear(16, 3)
        self.beside = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
        self.left_over = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x).relu()
        made = self.head(self.second(x).relu())
        return (made, self.beside(x)) if self.training else made


def test_what_no_output_depends_on_is_not_counted_among_what_stays() -> None:
    network = Auxiliary()
    optimizer = adam(network)
    options = {"name": "channels", "sparsity": 0.5, "of": "params", "every": 1}
    slim = sf.Slimming(network, optimizer, INPUTS, steps=10, sparsifier=options)
    for _ in range(10):
        made, beside = network(INPUTS)
        loss = made.square().mean() + beside.square().mean() + slim.loss()
        optimizer.zero_grad()
        loss.backward()
        slim.before_step()
        optimizer.step()
        slim.after_step()
    small = slim.compact(INPUTS)
    whole = 6 * 32 + 32 + 32 * 16 + 16 + 16 * 3 + 3
    assert 0.4 * whole < small.measures["params"] <= 0.5 * whole


def test_what_was_said_is_not_said_again_while_it_is_made(caplog: Any) -> None:
    """Strengths that are relative have a penalty look at the network twice."""
    log = logging.getLogger("slimfront.trainables.structure.removable")
    with said_once():
        for _ in range(3):
            log.warning("the channels of %s stay", "'a'")
        log.warning("the channels of %s stay", "'b'")
    log.warning("the channels of %s stay", "'a'")
    assert [said.split()[3] for said in caplog.messages] == ["'a'", "'b'", "'a'"]
