from itertools import combinations

import pytest
import torch
from torch import Tensor

from slimfront.trainables.penalties.aug_cka import AugCKA, aug_cka_loss
from slimfront.trainables.penalties.cka import pair_weights


def slow_hsic(x: Tensor, y: Tensor) -> Tensor:
    """The biased HSIC as Gretton et al. 2005 write it: tr(K H L H) / (n − 1)²."""
    n = len(x)
    centring = torch.eye(n, dtype=x.dtype) - torch.ones(n, n, dtype=x.dtype) / n
    return torch.trace(x @ x.T @ centring @ y @ y.T @ centring) / (n - 1) ** 2


def slow_loss(layers: list[Tensor], weights: dict[tuple[int, int], float] | None = None) -> Tensor:
    """The mean of CKA over the unordered pairs of different layers."""
    values = [
        (weights or {}).get((i, j), 1.0)
        * slow_hsic(layers[i], layers[j])
        / (slow_hsic(layers[i], layers[i]) * slow_hsic(layers[j], layers[j])).sqrt()
        for i, j in combinations(range(len(layers)), 2)
    ]
    return torch.stack(values).sum() * 2 / (len(layers) * (len(layers) - 1))


def features(n: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, width, dtype=torch.float64, generator=generator) for width in (5, 3, 8, 2)
    ]


@pytest.mark.parametrize("n", [2, 3, 8, 32])
def test_value_and_gradients_agree_with_the_slow_formula_for_layers_of_any_width(n: int) -> None:
    fast_layers, slow_layers = ([x.requires_grad_() for x in features(n)] for _ in range(2))
    fast, slow = aug_cka_loss(fast_layers), slow_loss(slow_layers)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    fast.backward()
    slow.backward()
    for a, b in zip(fast_layers, slow_layers, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-9)


def test_gradcheck_in_float64() -> None:
    assert torch.autograd.gradcheck(
        lambda *x: aug_cka_loss(x), [x.requires_grad_() for x in features(5)]
    )


def test_pairs_are_weighed_in_either_order() -> None:
    weights = pair_weights(["a", "b", "c", "d"], {"a": {"b": 3.0}, "d": {"b": 0.0}})
    torch.testing.assert_close(
        aug_cka_loss(features(), weights), slow_loss(features(), {(0, 1): 3.0, (1, 3): 0.0})
    )


def test_dead_and_constant_features_give_zero_and_no_nan() -> None:
    layers = [
        torch.zeros(6, 4),
        torch.ones(6, 4),
        torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
    ]
    leaves = [x.requires_grad_() for x in layers]
    loss = aug_cka_loss(leaves)
    assert loss == 0
    loss.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
    assert leaves[0].grad is not None
    assert not leaves[0].grad.any()


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        AugCKA(samples=1)
