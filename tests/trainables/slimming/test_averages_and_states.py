"""Averages of the weights, and loops that go on where they were saved."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import slimfront as sf
from tests.trainables.slimming.loops import (
    IMAGES,
    INPUTS,
    TARGETS,
    adam,
    convolutional,
    perceptron,
    run,
    step,
)


def test_an_average_of_the_weights_becomes_as_small() -> None:
    network = perceptron()
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    )
    optimizer = adam(network)
    slim = sf.Slimming(
        network,
        optimizer,
        INPUTS,
        steps=40,
        penalties={"layer": {"strength": 50.0}},
        sparsifier={"name": "channels", "sparsity": 0.5, "every": 5},
    )
    for _ in range(40):
        step(network, optimizer, slim)
        average.update_parameters(network)
    small = slim.compact(INPUTS)
    assert slim.compact(network=average).measures["params"] > small.measures["params"]
    slim.apply_to(average)
    of_average = slim.compact(network=average)
    assert of_average.measures["params"] == small.measures["params"]
    assert of_average.measures["layers"] == small.measures["layers"] < 4
    assert not torch.equal(of_average.network(INPUTS), small.network(INPUTS))
    average.eval()
    torch.testing.assert_close(of_average.network(INPUTS), average(INPUTS), rtol=1e-4, atol=1e-5)


def test_batch_norms_of_an_average_keep_its_layers_inactive() -> None:
    network = convolutional()
    average = copy.deepcopy(network)
    optimizer = adam(network)
    slim = sf.Slimming(
        network, optimizer, IMAGES, steps=30, penalties={"block": {"strength": 20.0}}
    )
    for _ in range(30):
        step(network, optimizer, slim, IMAGES)
        with torch.no_grad():
            for mine, theirs in zip(
                average.state_dict().values(), network.state_dict().values(), strict=True
            ):
                mine.lerp_(theirs, 0.5) if mine.is_floating_point() else mine.copy_(theirs)
    slim.apply_to(average)
    small = slim.compact()
    assert small.report.count("block removed") == 1
    assert slim.compact(network=average).measures["params"] == small.measures["params"]


def test_only_a_copy_of_the_network_can_be_given_its_zeros() -> None:
    network = perceptron()
    slim = sf.Slimming(network, adam(network), INPUTS, steps=1)
    with pytest.raises(sf.UserError, match="give a copy of it"):
        slim.apply_to(nn.Linear(2, 2))


def test_a_continued_loop_equals_an_uninterrupted_one() -> None:
    options: dict[str, Any] = {
        "steps": 30,
        "penalties": {"layer": {"strength": 1.0}, "cka": {"strength": 0.1, "every": 3}},
        "sparsifier": {"name": "rigl", "sparsity": 0.7, "every": 4},
    }

    def begin() -> tuple[nn.Module, Any, sf.Slimming]:
        network = perceptron()
        optimizer = adam(network)
        return network, optimizer, sf.Slimming(network, optimizer, INPUTS, **options)

    whole = begin()
    run(*whole, 30)
    half = begin()
    run(*half, 13)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in half], file)
    file.seek(0)
    other = begin()
    run(*other, 5)
    for part, state in zip(other, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*other, 17)
    for mine, theirs in zip(whole[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["rigl", "set", "granet", "random", "snip", "lottery"])
@pytest.mark.parametrize("first", ["all", "network", "slimming"])
def test_a_loop_goes_on_in_whichever_order_states_are_loaded(name: str, first: str) -> None:
    options: dict[str, Any] = {
        "steps": 20,
        "sparsifier": {"name": name, "sparsity": 0.7},
        "targets": TARGETS,
        "loss": nn.functional.cross_entropy,
        "seed": 3,
    }
    if name in ("rigl", "set", "granet"):
        options["sparsifier"]["every"] = 4

    def begin(loaded: list[Any] | None = None) -> tuple[nn.Module, Any, sf.Slimming]:
        network = perceptron()
        optimizer = adam(network)
        if loaded and first in ("all", "network"):
            network.load_state_dict(loaded[0])
        if loaded and first == "all":
            optimizer.load_state_dict(loaded[1])
        slim = sf.Slimming(network, optimizer, INPUTS, **options)
        if loaded and first == "slimming":
            network.load_state_dict(loaded[0])
        if loaded and first != "all":
            optimizer.load_state_dict(loaded[1])
        if loaded:
            slim.load_state_dict(loaded[2])
        return network, optimizer, slim

    whole = begin()
    run(*whole, 20)
    half = begin()
    run(*half, 9)
    states = copy.deepcopy([part.state_dict() for part in half])
    kept = copy.deepcopy(states)
    other = begin(states)
    for name_of, parameter in other[0].state_dict().items():
        assert torch.equal(parameter, kept[0][name_of])
    run(*other, 11)
    for mine, theirs in zip(whole[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["magnitude", "rigl", "random", "nm"])
@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "old weight_norm"])
def test_weights_that_are_computed_are_refused_or_excluded(name: str, kind: str) -> None:
    network = perceptron()
    norms = {
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "old weight_norm": nn.utils.weight_norm,
    }
    network[2] = norms[kind](network[2])
    asked: dict[str, Any] = {"name": name}
    if name != "nm":
        asked["sparsity"] = 0.5
    if name == "rigl":
        asked["every"] = 2
    before = {key: value.clone() for key, value in network.named_parameters()}
    with pytest.raises(sf.UserError, match=rf"sparsifier {name}: '2\.weight' is computed"):
        sf.Slimming(network, adam(network), INPUTS, steps=10, sparsifier=asked)
    for key, value in network.named_parameters():
        assert torch.equal(value, before[key])
    optimizer = adam(network)
    slim = sf.Slimming(network, optimizer, INPUTS, steps=10, sparsifier=asked | {"exclude": ["2"]})
    run(network, optimizer, slim, 10)
    slim.compact()


@pytest.mark.parametrize("change", ["shape", "name"])
def test_a_state_that_does_not_fit_changes_nothing(change: str) -> None:
    network = perceptron()
    asked = {"name": "magnitude", "sparsity": 0.5}
    slim = sf.Slimming(network, adam(network), INPUTS, steps=10, sparsifier=asked)
    run(network, slim.optimizer, slim, 10)
    assert slim.sparsifier is not None
    before = {name: mask.clone() for name, mask in slim.sparsifier.masks.items()}
    state = copy.deepcopy(slim.state_dict())
    masks = state["sparsifier"]["masks"]
    *_, last = masks
    for mask in masks.values():
        mask.logical_not_()
    mask = masks.pop(last)
    if change == "shape":
        masks[last] = mask[:1]
    with pytest.raises(sf.UserError, match="the state is of another network"):
        slim.load_state_dict(state)
    for name, mask in slim.sparsifier.masks.items():
        assert torch.equal(mask, before[name])
