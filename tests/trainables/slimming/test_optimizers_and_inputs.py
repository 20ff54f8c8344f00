"""Slimming beside optimisers of many makes, and with inputs and outputs that cannot be looked at
a few examples at a time."""

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimfront as sf
from slimfront.trainables.errors import UserError
from tests.trainables.slimming.loops import INPUTS, adam, perceptron, step

RELATIVE: dict[str, Any] = {"connection": {"strength": 1.0, "relative": True}}
SPARSE: dict[str, Any] = {"name": "magnitude", "sparsity": 0.8}


class Lookahead(torch.optim.Optimizer):
    """As many repositories write it: without the constructor of torch's."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.param_groups = base.param_groups
        self.state = base.state
        self.defaults = base.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step(closure)


class Sharpness(torch.optim.Optimizer):
    """As SAM is: another optimiser takes its steps, and has a state of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network.parameters(), {"lr": 0.05})
        self.base = torch.optim.SGD(self.param_groups, lr=0.05, momentum=0.9)
        self.param_groups = self.base.param_groups

    def second_step(self) -> None:
        self.base.step()


class Shampoo(torch.optim.SGD):
    """Remembers what has the shape of a square weight, and is of its rows."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and weight.dim() == 2:
                    outer = weight.grad @ weight.grad.t() + torch.eye(len(weight))
                    self.state[weight]["left"] = outer
        super().step(closure)


def test_a_wrapper_that_torch_did_not_make_is_an_optimizer_too() -> None:
    network = perceptron()
    slim = sf.Slimming(network, Lookahead(adam(network)), INPUTS, steps=4, sparsifier=SPARSE)
    for _ in range(4):
        step(network, slim.optimizer, slim)
    assert slim.sparsifier is not None
    assert all(bool((mask == 0).any()) for mask in slim.sparsifier.masks.values())


def test_steps_of_an_optimizer_within_count_and_its_moments_are_masked(caplog: Any) -> None:
    network = perceptron()
    optimizer = Sharpness(network)
    slim = sf.Slimming(network, optimizer, INPUTS, steps=60, sparsifier=SPARSE)
    for _ in range(60):
        optimizer.zero_grad()
        (network(INPUTS).square().mean() + slim.loss()).backward()
        slim.before_step()
        optimizer.second_step()
        slim.after_step()
    slim.compact()
    assert "after_step was called" not in caplog.text
    assert slim.sparsifier is not None
    for name, mask in slim.sparsifier.masks.items():
        momentum = optimizer.base.state[network.get_parameter(name)]["momentum_buffer"]
        assert not momentum[~mask].any()


def test_what_an_optimizer_remembers_of_rows_is_not_masked() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = Shampoo(network.parameters(), lr=0.1, momentum=0.9)
    slim = sf.Slimming(network, optimizer, torch.randn(16, 8), steps=3, sparsifier=SPARSE)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.randn(16, 8)).square().mean().backward()
        slim.before_step()
        optimizer.step()
        slim.after_step()
    weight = network[0].weight
    assert bool(optimizer.state[weight]["left"].diagonal().all())
    assert not optimizer.state[weight]["momentum_buffer"][weight == 0].any()


def test_a_state_of_another_optimizer_keeps_no_relative_strength(caplog: Any) -> None:
    network = perceptron()
    slim = sf.Slimming(network, adam(network), INPUTS, steps=8, penalties=RELATIVE)
    step(network, slim.optimizer, slim)
    state = slim.state_dict()
    slim.close()

    def strength_with(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
        own = sf.Slimming(network, optimizer, INPUTS, steps=8, penalties=RELATIVE)
        before = own.state_dict()["strengths"]["connection"]["strength"]
        own.load_state_dict(state)
        own.close()
        return before, own.state_dict()["strengths"]["connection"]["strength"]

    before, after = strength_with(torch.optim.SGD(network.parameters(), lr=0.5))
    assert before == after
    assert "the state is of a training with Adam, and this one has SGD" in caplog.text
    caplog.clear()
    _, of_adam = strength_with(adam(network))
    assert of_adam == state["strengths"]["connection"]["strength"]
    assert not caplog.text


def test_an_optimizer_that_is_replaced_on_the_way_is_missed(caplog: Any) -> None:
    network = perceptron()
    slim = sf.Slimming(network, adam(network), INPUTS, steps=120, sparsifier=SPARSE)
    for _ in range(60):
        step(network, slim.optimizer, slim)
    assert not caplog.text
    other = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(60):
        step(network, other, slim)
    assert "after_step was called 50 times" in caplog.text


@pytest.mark.parametrize("name", ["cka", "aug_cka"])
def test_a_loss_that_is_never_asked_for_is_named(name: str, caplog: Any) -> None:
    network = perceptron()
    optimizer = adam(network)
    penalties = {name: {"strength": 1.0, "every": 1}}
    slim = sf.Slimming(network, optimizer, INPUTS, steps=4, penalties=penalties)
    for _ in range(4):
        optimizer.zero_grad()
        network(INPUTS).square().mean().backward()
        slim.before_step()
        optimizer.step()
        slim.after_step()
    slim.compact()
    assert f"loss() was never called; add it to the loss of each batch: '{name}'" in caplog.text


def test_masks_are_not_put_on_parameters_that_took_the_place_of_theirs(caplog: Any) -> None:
    network = perceptron()
    slim = sf.Slimming(network, adam(network), INPUTS, steps=4, sparsifier=SPARSE)
    for _ in range(4):
        step(network, slim.optimizer, slim)
    other = {name: torch.randn_like(value) for name, value in network.state_dict().items()}
    network.load_state_dict(other, assign=True)
    small = slim.compact()
    assert "parameters were replaced after Slimming was made" in caplog.text
    torch.testing.assert_close(small.network(INPUTS), network.eval()(INPUTS))


def test_a_head_of_another_size_is_named_and_the_rest_is_made_compact(caplog: Any) -> None:
    network = perceptron()
    slim = sf.Slimming(network, adam(network), INPUTS, steps=4, sparsifier=SPARSE)
    for _ in range(4):
        step(network, slim.optimizer, slim)
    last, layer = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear)][-1]
    setattr(network, last, nn.Linear(layer.in_features, layer.out_features + 2))
    small = slim.compact()
    assert f"'{last}.weight', '{last}.bias'" in caplog.text
    torch.testing.assert_close(small.network(INPUTS), network.eval()(INPUTS))


@pytest.mark.parametrize("options", [{"relative": True}, {"relative": False}])
def test_a_penalty_without_a_target_says_so_relative_or_not(options: dict[str, Any]) -> None:
    network = perceptron()
    penalties = {"block": {"strength": 1.0, **options}}
    with pytest.raises(UserError, match="there is no residual branch"):
        sf.Slimming(network, adam(network), INPUTS, steps=4, penalties=penalties)


class Graph(nn.Module):
    """Adds up what comes along edges."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        made = self.first(nodes).relu()
        made = made.index_add(0, edges[1], made[edges[0]])
        out: Tensor = self.last(made)
        return out


class Warm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor, temperature: Tensor) -> Tensor:
        made: Tensor = self.last(self.first(x).relu()) / temperature
        return made


EDGES = torch.randint(0, 20, (2, 40))


@pytest.mark.parametrize(
    ("network", "inputs", "said"),
    [
        (Graph(), (torch.randn(20, 4), EDGES), "'1' of the inputs has 2 examples and '0' 20"),
        (Warm(), {"x": torch.randn(20, 4), "temperature": torch.tensor(2.0)}, "is a number"),
    ],
)
def test_inputs_that_are_no_examples_are_refused_in_a_sentence(
    network: nn.Module, inputs: Any, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        sf.compact(network, inputs)
    with pytest.raises(UserError, match=said):
        sf.measure(network, inputs)
    with pytest.raises(UserError, match=said):
        sf.Slimming(network, adam(network), inputs, steps=4, sparsifier=SPARSE)
    with pytest.raises(UserError, match=said):
        sf.prune(network, [inputs], channels=0.5)


def test_an_input_of_one_is_the_same_for_all_examples() -> None:
    small = sf.compact(Warm(), {"x": torch.randn(20, 4), "temperature": torch.ones(1)})
    assert small.report.difference < 1e-6


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Any:
        made = self.body(x)
        return torch.distributions.Categorical(logits=made), made


def test_outputs_that_nobody_sees_are_refused_before_the_training() -> None:
    network = Chooses()
    inputs = torch.randn(8, 6)
    with pytest.raises(UserError, match=r"returns a Categorical within its tuple.*output=1"):
        sf.Slimming(network, adam(network), inputs, steps=4, sparsifier=SPARSE)


class Counting(nn.Module):
    """As observers of a quantisation do, in evaluation mode too."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        made: Tensor = self.layer(x) * self.seen
        return made


def test_a_network_that_does_not_compute_the_same_twice_is_told_so() -> None:
    with pytest.raises(UserError, match="does not compute the same twice in evaluation mode"):
        sf.compact(Counting(), torch.randn(8, 6))


def test_hooks_of_users_are_named(caplog: Any) -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.utils.spectral_norm(nn.Linear(8, 3)))
    with caplog.at_level(logging.WARNING):
        sf.compact(network, torch.randn(8, 6))
    assert "forward hooks" not in caplog.text
    network[0].register_forward_hook(lambda _module, _inputs, made: 2 * made)
    sf.Slimming(network, adam(network), torch.randn(8, 6), steps=4, penalties=RELATIVE)
    assert "forward hooks are no part of a network that is stored" in caplog.text
    assert any(message.endswith("computes at '0'") for message in caplog.messages)


def test_hooks_that_look_at_what_passes_are_not_warned_of(caplog: Any) -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    seen: list[Tensor] = []
    network[1].register_forward_hook(lambda _module, _inputs, made: seen.append(made))
    network[0].register_forward_pre_hook(lambda _module, inputs, _named: None, with_kwargs=True)
    with caplog.at_level(logging.WARNING):
        sf.compact(network, torch.randn(8, 6))
    assert "forward hooks" not in caplog.text
    network(torch.randn(2, 6))
    assert len(seen[-1]) == 2


def test_a_batch_norm_without_running_statistics_takes_no_single_input() -> None:
    network = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3)
    )
    inputs = torch.randn(16, 6)
    assert sf.compact(network, inputs).report.difference < 1e-6
    assert sf.measure(network, inputs)["flops"] == 2 * (6 * 8 + 8 * 3)


@pytest.mark.parametrize("follows", [True, False])
def test_a_schedule_that_does_not_begin_anew_with_lottery_is_told_of(
    follows: bool, caplog: Any
) -> None:
    network = perceptron()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    sparsifier = {"name": "lottery", "sparsity": 0.8, "rounds": 2}
    slim = sf.Slimming(network, optimizer, INPUTS, steps=60, sparsifier=sparsifier)

    def rate(done: int) -> float:
        progress = slim.progress if follows else done / 60
        return 0.5 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(60):
        step(network, optimizer, slim)
        scheduler.step()
    assert ("has set the weights back" in caplog.text) != follows
