import pytest
import torch
from torch import nn

from slimfront.trainables.sparsifiers import SNIP
from slimfront.trainables.sparsifiers.base import prunable_weights
from slimfront.trainables.sparsifiers.snip import sensitivities
from tests.trainables.sparsifiers.made import attach, examples, network

LOSS = nn.functional.cross_entropy


def test_the_sensitivity_is_the_change_of_loss_when_a_weight_is_scaled() -> None:
    model = network().double()
    inputs, labels = examples(32)
    inputs = inputs.double()
    scores = sensitivities(model, inputs, labels, LOSS)["2.weight"]
    step = 1e-6
    for row, column in ((0, 0), (3, 7), (19, 39)):
        losses = []
        for factor in (1 + step, 1 - step):
            model_copy = network().double()
            with torch.no_grad():
                model_copy[2].weight[row, column] *= factor
            losses.append(float(nn.functional.cross_entropy(model_copy(inputs), labels)))
        assert float(scores[row, column]) == pytest.approx(
            abs(losses[0] - losses[1]) / (2 * step), rel=1e-4, abs=1e-9
        )


def test_the_most_sensitive_weights_of_all_layers_are_kept() -> None:
    model = network()
    scores = sensitivities(model, *examples(64), LOSS)
    active = attach(SNIP(sparsity=0.9, samples=64), model)
    kept = torch.cat([scores[name][mask] for name, mask in active.masks.items()])
    dropped = torch.cat([scores[name][~mask] for name, mask in active.masks.items()])
    assert kept.min() >= dropped.max()


def test_looking_leaves_the_network_its_gradients_and_the_random_numbers_alone() -> None:
    model = nn.Sequential(
        nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)
    ).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    sensitivities(model, *examples(16), LOSS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert set(sensitivities(model, *examples(16), LOSS)) == set(prunable_weights(model))
