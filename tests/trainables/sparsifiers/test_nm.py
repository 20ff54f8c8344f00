import pytest
import torch
from torch import nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.sparsifiers import NM
from slimfront.trainables.sparsifiers.nm import nm_mask
from tests.trainables.sparsifiers.made import attach, train


@pytest.mark.parametrize("shape", [(6, 8), (5, 12, 3), (5, 8, 3, 3)])
def test_of_every_m_neighbours_along_the_inputs_the_n_largest_are_kept(
    shape: tuple[int, ...],
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = nm_mask(weight, 2, 4)
    assert mask.shape == weight.shape
    for start in range(0, shape[1], 4):
        group, kept = weight[:, start : start + 4].abs(), mask[:, start : start + 4]
        assert (kept.sum(1) == 2).all()
        assert (
            torch.where(kept, group, torch.inf).amin(1)
            >= torch.where(kept, -torch.inf, group).amax(1)
        ).all()


def test_the_mask_is_chosen_once_and_layers_that_do_not_divide_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 4))
    active = attach(NM(start=0.5), model)
    masks = []
    train(active, watch=lambda _: masks.append(active.masks["0.weight"].clone()))
    assert list(active.masks) == ["0.weight"]
    assert all(mask.all() for mask in masks[:20])
    assert all(torch.equal(mask, masks[20]) and not mask.all() for mask in masks[20:])
    assert (model[0].weight.view(6, 5, 4) != 0).sum(-1).eq(2).all()
    assert model[2].weight.all()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"n \(4\) must be below m \(4\)"):
        NM(n=4)
    with pytest.raises(
        UserError, match=r"no layer of this network has a multiple of m \(7\) inputs"
    ):
        attach(NM(m=7))
