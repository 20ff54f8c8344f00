import torch

from slimfront.trainables.models import MLP


def test_depth_counts_hidden_layers_of_the_given_width() -> None:
    model = MLP(depth=3, width=5).build((1, 2, 2), outputs=7)
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert shapes == [(5, 4), (5, 5), (5, 5), (7, 5)]
    assert model(torch.zeros(6, 1, 2, 2)).shape == (6, 7)
