import torch
from torch import nn

from trainables.measures import MEASURES, accuracy, measure


def test_measures_of_a_known_network_are_exact() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
        model[1].weight[0] = 0
    found = measure(model, torch.zeros(5, 2, 4))
    assert set(found) == set(MEASURES)
    assert found["params"] == 8 * 4 + 4 + 4 * 2 + 2
    assert found["nonzero_params"] == found["params"] - 8
    assert found["layers"] == 2
    assert found["flops"] == 2 * (8 * 4 + 4 * 2)  # of one input, whatever the batch
    assert found["bytes"] > 4 * found["params"]


def test_accuracy_is_the_share_of_right_labels_and_leaves_the_mode_alone() -> None:
    logits = torch.eye(3)
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9)).train()
    assert accuracy(model, logits, torch.tensor([0, 1, 0]), batch_size=2) == 2 / 3
    assert model.training
