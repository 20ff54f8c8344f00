"""Slimming in training loops as people write them."""

import logging
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimfront as sf
from slimfront.trainables.inputs import Several
from tests.trainables.slimming.loops import (
    IMAGES,
    INPUTS,
    TARGETS,
    adam,
    convolutional,
    hooks,
    perceptron,
    run,
    zeros,
)


def test_a_loop_ends_with_a_smaller_network_of_equal_outputs() -> None:
    network = perceptron()
    optimizer = adam(network)
    slim = sf.Slimming(
        network,
        optimizer,
        INPUTS,
        steps=40,
        penalties={"layer": {"strength": 5.0}, "cka": {"strength": 1e-3, "every": 2}},
        sparsifier={"name": "channels", "sparsity": 0.5, "every": 5},
    )
    run(network, optimizer, slim, 40)
    small = slim.compact(INPUTS)
    assert small.measures["params"] < 0.6 * sum(p.numel() for p in network.parameters())
    torch.testing.assert_close(small.network(INPUTS), network.eval()(INPUTS), rtol=1e-4, atol=1e-5)


def test_each_group_of_weights_steps_with_the_learning_rate_of_its_parameter_group() -> None:
    network = perceptron()
    first, second = network[0].weight, network[2].weight
    groups = [
        {"params": [first], "lr": 0.5},
        {"params": [second], "lr": 0.25},
        {"params": [p for p in network.parameters() if p is not first and p is not second]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.0)
    slim = sf.Slimming(
        network, optimizer, INPUTS, steps=10, penalties={"connection": {"strength": 0.1}}
    )
    before = [weight.detach().clone() for weight in (first, second, network[4].weight)]
    slim.after_step()
    for weight, was, size in zip(
        (first, second, network[4].weight), before, (0.05, 0.025, 0.0), strict=True
    ):
        torch.testing.assert_close(weight.data, nn.functional.softshrink(was, size))
    optimizer.param_groups[0]["lr"] = 0.0  # as a schedule does
    now = first.detach().clone()
    slim.after_step()
    assert torch.equal(first, now)


def test_momentum_makes_proximal_steps_longer_as_it_does_gradients() -> None:
    network = perceptron()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    slim = sf.Slimming(
        network, optimizer, INPUTS, steps=10, penalties={"connection": {"strength": 0.1}}
    )
    before = network[0].weight.detach().clone()
    slim.after_step()
    torch.testing.assert_close(network[0].weight.data, nn.functional.softshrink(before, 0.01))


def test_a_learning_rate_may_be_a_tensor() -> None:
    network = perceptron()
    optimizer = torch.optim.Adam(network.parameters(), lr=torch.tensor(0.05), foreach=False)
    slim = sf.Slimming(
        network, optimizer, INPUTS, steps=10, penalties={"connection": {"strength": 1.0}}
    )
    before = network[0].weight.detach().clone()
    slim.after_step()
    torch.testing.assert_close(network[0].weight.data, nn.functional.softshrink(before, 0.05))


def test_penalties_leave_alone_what_is_frozen_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    network = perceptron()
    network[0].requires_grad_(False)
    optimizer = torch.optim.SGD(network[2:].parameters(), lr=1.0)
    before = network[0].weight.clone()
    slim = sf.Slimming(
        network, optimizer, INPUTS, steps=10, penalties={"connection": {"strength": 0.1}}
    )
    assert "penalties.connection leaves alone what is not trained: '0'" in caplog.text
    slim.after_step()
    assert torch.equal(network[0].weight, before)
    assert (network[2].weight == 0).any()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
        (torch.optim.RMSprop, {"momentum": 0.5}),
        (torch.optim.Adagrad, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.ASGD, {}),
        (torch.optim.Rprop, {}),
        (torch.optim.Adafactor, {}),
    ],
)
def test_zeros_stay_zero_with_any_optimiser(kind: Any, options: dict[str, Any]) -> None:
    network = perceptron()
    optimizer = kind(network.parameters(), lr=0.01, **options)
    slim = sf.Slimming(
        network,
        optimizer,
        INPUTS,
        steps=20,
        penalties={"node": {"strength": 0.01}},
        sparsifier={"name": "magnitude", "sparsity": 0.8, "every": 2},
    )
    run(network, optimizer, slim, 20)
    assert slim.sparsifier is not None
    for name, mask in slim.sparsifier.masks.items():
        assert not dict(network.named_parameters())[name][~mask].any()
    assert zeros(network) >= 0.75 * (6 * 16 + 2 * 256 + 48)


class ScheduleFree(torch.optim.SGD):
    """Keeps weights of its own for evaluation, as schedule-free optimisers do."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"optimizer": lambda n: torch.optim.LBFGS(n.parameters())},
            "LBFGS evaluates the loss several times in a step",
        ),
        (
            {"optimizer": lambda n: ScheduleFree(n.parameters(), 0.1)},
            "ScheduleFree keeps weights apart for evaluation",
        ),
        (
            {"optimizer": lambda _: torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)},
            "SGD has none of the network's parameters",
        ),
        ({"steps": 0}, "steps is 0"),
        ({"penalties": {"layers": {"strength": 1}}}, "unknown penalty 'layers'; did you mean"),
        (
            {"penalties": {"layer": {"strenth": 1}}},
            "unknown key 'strenth'; did you mean 'strength'",
        ),
        ({"penalties": {"layer": {"strength": -1}}}, "greater than or equal to 0"),
        ({"penalties": {"block": {"strength": 1}}}, "no residual branch in this network"),
        ({"penalties": {"layer": {"strength": 1, "warmup": 2}}}, "give steps_per_epoch"),
        ({"sparsifier": {"name": "magnet", "sparsity": 0.5}}, "unknown sparsifier 'magnet'"),
        ({"sparsifier": {"name": "snip", "sparsity": 0.5}}, "give the targets of the inputs"),
        ({"inputs": "digits"}, "the inputs is a str"),
        ({"inputs": {"x": 3}}, "'x' of the inputs is a int"),
        ({"inputs": {"y": INPUTS}}, "Sequential.forward has no such argument"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(changes: dict[str, Any], said: str) -> None:
    network = perceptron()
    optimizer = changes.pop("optimizer", adam)(network)
    inputs = changes.pop("inputs", INPUTS)
    options: dict[str, Any] = {"steps": 10, "penalties": {"layer": {"strength": 1.0}}}
    with pytest.raises(sf.UserError) as caught:
        sf.Slimming(network, optimizer, inputs, **(options | changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hooks(network) == 0


def test_a_schedule_free_optimiser_works_with_a_sparsifier() -> None:
    network = perceptron()
    optimizer = ScheduleFree(network.parameters(), 0.1)
    slim = sf.Slimming(
        network,
        optimizer,
        INPUTS,
        steps=10,
        sparsifier={"name": "set", "sparsity": 0.5, "every": 2},
    )
    run(network, optimizer, slim, 10)
    assert zeros(network) > 100


@pytest.mark.parametrize("mistake", ["another optimizer", "each half of a batch", "each epoch"])
def test_steps_that_after_step_does_not_see_are_told_of(
    mistake: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = perceptron()
    optimizer = adam(network)
    slim = sf.Slimming(
        network, optimizer, INPUTS, steps=60, sparsifier={"name": "magnitude", "sparsity": 0.5}
    )
    if mistake == "another optimizer":
        optimizer = adam(network)
    for number in range(60):
        network(INPUTS).square().mean().backward()
        if mistake != "each half of a batch" or number % 4 == 3:
            optimizer.step()
        if mistake != "each epoch" or number % 10 == 9:
            slim.after_step()
    slim.compact()
    (said,) = [message for message in caplog.messages if "after_step was called" in message]
    assert "call after_step once after each step of it" in said
    slim.close()
    assert not slim.optimizer._optimizer_step_post_hooks


def test_a_loop_as_documented_says_nothing_of_its_steps(caplog: pytest.LogCaptureFixture) -> None:
    network = perceptron()
    slim = sf.Slimming(
        network,
        adam(network),
        INPUTS,
        steps=60,
        sparsifier={"name": "magnitude", "sparsity": 0.5},
    )
    run(network, slim.optimizer, slim, 60)
    slim.compact()
    assert not [message for message in caplog.messages if "after_step" in message]


def test_nothing_is_left_behind() -> None:
    network = perceptron()
    kept: list[object] = []
    network[0].register_forward_hook(lambda *_: kept.append(1))
    before = [dict(vars(module)) for module in network.modules()]
    with sf.Slimming(
        network, adam(network), INPUTS, steps=3, penalties={"cka": {"strength": 1.0, "every": 1}}
    ):
        assert hooks(network) > 1
    assert hooks(network) == 1
    assert [vars(module).keys() for module in network.modules()] == [b.keys() for b in before]


def test_gradients_may_be_accumulated() -> None:
    """CKA-SR is looked at in each part."""
    network = perceptron()
    slim = sf.Slimming(
        network,
        adam(network),
        INPUTS,
        steps=3,
        penalties={"cka": {"strength": 1.0, "every": 1, "samples": -1}},
    )
    losses = []
    for part in INPUTS.split(16):
        network(part)
        losses.append(slim.loss())
    network.eval()
    with torch.no_grad():
        network(INPUTS)  # a look at the metrics changes nothing
    assert all(loss > 0 for loss in losses)
    assert losses[0] != losses[1]
    network(INPUTS[:16])
    torch.testing.assert_close(slim.loss(), losses[0])


def test_features_that_are_never_seen_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    network = perceptron()
    slim = sf.Slimming(
        network, adam(network), INPUTS, steps=3, penalties={"cka": {"strength": 1.0, "every": 1}}
    )
    assert slim.loss() == 0
    assert slim.loss() == 0
    assert caplog.text.count("penalties.cka has seen no features of this batch") == 1


def test_a_compiled_network_is_slimmed_too() -> None:
    network = perceptron()
    compiled = torch.compile(network, backend="aot_eager")
    optimizer = adam(network)
    slim = sf.Slimming(
        compiled,
        optimizer,
        INPUTS,
        steps=12,
        penalties={"cka": {"strength": 1.0, "every": 2}},
        sparsifier={"name": "channels", "sparsity": 0.5, "every": 2},
    )
    seen = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(compiled(INPUTS), TARGETS)
        extra = slim.loss()
        seen.append(bool(extra != 0))
        optimizer.zero_grad()
        (loss + extra).backward()
        slim.before_step()
        optimizer.step()
        slim.after_step()
    assert seen == [True, False] * 6
    small = slim.compact()
    assert small.measures["params"] < 0.6 * sum(p.numel() for p in network.parameters())


def test_mixed_precision_with_a_gradient_scaler() -> None:
    network = perceptron()
    optimizer = adam(network)
    slim = sf.Slimming(
        network,
        optimizer,
        INPUTS,
        steps=10,
        penalties={"cka": {"strength": 0.1, "every": 1}},
        sparsifier={"name": "rigl", "sparsity": 0.5, "every": 2},
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(10):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(network(INPUTS), TARGETS) + slim.loss()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        slim.before_step()
        scaler.step(optimizer)
        scaler.update()
        slim.after_step()
    assert slim.sparsifier is not None
    assert zeros(network) >= sum(int((~mask).sum()) for mask in slim.sparsifier.masks.values())


def test_several_networks_are_slimmed_side_by_side() -> None:
    both = [perceptron(), convolutional()]
    optimizer = torch.optim.Adam([p for network in both for p in network.parameters()], 0.01)
    slims = [
        sf.Slimming(
            network,
            optimizer,
            inputs,
            steps=10,
            sparsifier={"name": "magnitude", "sparsity": s, "every": 2},
        )
        for network, inputs, s in zip(both, (INPUTS, IMAGES), (0.5, 0.9), strict=True)
    ]
    for _ in range(10):
        losses = [
            nn.functional.cross_entropy(network(inputs), TARGETS[: len(inputs)])
            for network, inputs in zip(both, (INPUTS, IMAGES), strict=True)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        for slim in slims:
            slim.before_step()
        optimizer.step()
        for slim in slims:
            slim.after_step()
    for slim, share in zip(slims, (0.5, 0.9), strict=True):
        assert slim.sparsifier is not None
        masks = torch.cat([mask.flatten() for mask in slim.sparsifier.masks.values()])
        assert float((~masks).float().mean()) == pytest.approx(share, abs=0.01)


class Two(nn.Module):
    """Takes two tensors by name, and gives a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 16), nn.Linear(6, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = torch.relu(self.left(left) + self.right(right))
        return {"logits": self.head(hidden) * scale, "hidden": hidden}


@pytest.mark.parametrize("by", ["name", "place"])
def test_a_network_of_several_inputs_and_outputs_stays_as_it_is_called(by: str) -> None:
    torch.manual_seed(0)
    network = Two()
    kind = type(network)
    inputs: Any = {"left": INPUTS, "right": INPUTS.flip(0)}
    given = inputs if by == "name" else tuple(inputs.values())
    optimizer = adam(network)
    slim = sf.Slimming(
        network,
        optimizer,
        given,
        steps=10,
        sparsifier={"name": "channels", "sparsity": 0.5, "every": 2},
        output="logits",
    )
    for _ in range(10):
        loss = nn.functional.cross_entropy(network(**inputs)["logits"], TARGETS) + slim.loss()
        optimizer.zero_grad()
        loss.backward()
        slim.before_step()
        optimizer.step()
        slim.after_step()
    assert type(network) is kind
    small = slim.compact()
    assert small.measures["params"] < sum(p.numel() for p in network.parameters())
    made = small.network(**inputs) if by == "name" else small.network(*given)
    torch.testing.assert_close(made, network.eval()(**inputs)["logits"], rtol=1e-4, atol=1e-5)


def test_a_sparsifier_that_was_stopped_early_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    network = perceptron()
    optimizer = adam(network)
    slim = sf.Slimming(
        network, optimizer, INPUTS, steps=100, sparsifier={"name": "magnitude", "sparsity": 0.8}
    )
    run(network, optimizer, slim, 20)
    slim.compact()
    assert "20 of 100 steps were taken, and it changes its masks until step 71" in caplog.text


def test_what_no_sparsifier_acts_on_is_named(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(
        OrderedDict(words=nn.Embedding(9, 4), flat=nn.Flatten(), head=nn.Linear(8, 3))
    )
    tokens = torch.randint(9, (8, 2))
    with caplog.at_level(logging.WARNING):
        sf.Slimming(
            network,
            adam(network),
            tokens,
            steps=2,
            sparsifier={"name": "magnitude", "sparsity": 0.5},
        )
    assert (
        "36 weights stay dense, whatever the sparsity: no sparsifier acts on 'words.weight'"
        in caplog.text
    )


def test_snip_takes_the_loss_that_it_is_given() -> None:
    network = perceptron()
    slim = sf.Slimming(
        network,
        adam(network),
        INPUTS,
        steps=2,
        sparsifier={"name": "snip", "sparsity": 0.5},
        targets=TARGETS,
        loss=nn.functional.cross_entropy,
    )
    assert zeros(network) >= 300
    assert slim.progress == 0


def test_inputs_as_one_argument_are_taken_too() -> None:
    network = perceptron()
    slim = sf.Slimming(
        network, adam(network), [INPUTS], steps=2, penalties={"layer": {"strength": 1.0}}
    )
    assert slim.targets == {"layer": 2}
    assert isinstance(slim._sample, Tensor) and not isinstance(slim._sample, Several)


class Upscaled(nn.Module):
    """Units that lie along another axis than rows: of an embedding and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.up = nn.ConvTranspose1d(8, 8, 2, stride=2)
        self.head = nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(torch.relu(self.up(self.words(x).transpose(1, 2)))).mean(2)
        return made


def test_the_channel_penalty_acts_on_units_along_any_axis(caplog: pytest.LogCaptureFixture) -> None:
    network = Upscaled()
    tokens = torch.randint(20, (8, 6))
    optimizer = torch.optim.SGD(network.parameters(), 0.5)
    slim = sf.Slimming(
        network, optimizer, tokens, steps=9, penalties={"channel": {"strength": 50.0}}
    )
    assert "not trained" not in caplog.text
    for _ in range(3):
        slim.after_step()
    assert not network.up.weight.any()
    assert not network.words.weight.any()


@pytest.mark.parametrize(("relative", "times"), [(True, 1), (False, 0)])
def test_a_learning_rate_that_rises_above_what_strengths_are_relative_to_is_said_once(
    relative: bool, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    network = perceptron()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    strength = {"strength": 0.1, "relative": relative}
    with sf.Slimming(network, optimizer, INPUTS, steps=4, penalties={"node": strength}) as slim:
        for rate in (0.01, 0.02, 0.04, 0.05):
            optimizer.param_groups[0]["lr"] = rate
            loss = nn.functional.cross_entropy(network(INPUTS), TARGETS) + slim.loss()
            optimizer.zero_grad()
            loss.backward()
            slim.before_step()
            optimizer.step()
            slim.after_step()
    said = [message for message in caplog.messages if "learning rate has risen" in message]
    assert len(said) == times
    if said:
        assert "from 0.01 to 0.04" in said[0]
        assert "'node'" in said[0]
