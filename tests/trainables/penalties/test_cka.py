import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.penalties.cka import CKA, cka_loss, pair_weights, pairwise_cka


def slow_hsic(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased HSIC as Song et al. 2012 write it, eq. 5: slow, obvious, float64."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    k, m = k - k.diag().diag(), m - m.diag().diag()
    one = torch.ones(n, dtype=x.dtype)
    value = (
        torch.trace(k @ m)
        + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        - 2 * (one @ k @ m @ one) / (n - 2)
    )
    return value / (n * (n - 3))


def slow_cka(x: Tensor, y: Tensor) -> Tensor:
    return slow_hsic(x, y) / (slow_hsic(x, x) * slow_hsic(y, y)).sqrt()


def features(count: int = 3, n: int = 7, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 5, dtype=torch.float64, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("n", [4, 5, 8, 32])
def test_all_pairs_agree_with_the_slow_formula(n: int) -> None:
    layers = features(n=n)
    fast = pairwise_cka(layers)
    for i, x in enumerate(layers):
        for j, y in enumerate(layers):
            torch.testing.assert_close(fast[i, j], slow_cka(x, y), rtol=1e-9, atol=1e-9)


def test_gradients_agree_with_the_slow_formula() -> None:
    fast_layers = [x.requires_grad_() for x in features()]
    slow_layers = [x.requires_grad_() for x in features()]
    cka_loss([fast_layers]).backward()
    slow = sum(
        slow_cka(a, b)
        for i, a in enumerate(slow_layers)
        for j, b in enumerate(slow_layers)
        if i != j
    )
    assert isinstance(slow, Tensor)
    slow.backward()
    for a, b in zip(fast_layers, slow_layers, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_gradcheck_in_float64() -> None:
    layers = [x.requires_grad_() for x in features(n=5)]
    assert torch.autograd.gradcheck(lambda *x: cka_loss([x]), layers)


def test_a_layer_is_like_itself_and_its_scaled_and_rotated_copies() -> None:
    x = features(1)[0]
    rotation = torch.linalg.qr(
        torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    )[0]
    similarity = pairwise_cka([x, 100 * x @ rotation + 3])
    torch.testing.assert_close(similarity, torch.ones_like(similarity))


def test_constant_features_have_similarity_zero_and_zero_gradient() -> None:
    dead = torch.zeros(6, 4, requires_grad=True)
    constant = torch.ones(6, 4, requires_grad=True)
    alive = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    similarity = pairwise_cka([dead, constant, alive])
    assert torch.equal(similarity[:2], torch.zeros(2, 3))
    similarity.sum().backward()
    for leaf in (dead, constant, alive):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert dead.grad is not None
    assert not dead.grad.any()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_features_of_any_size_are_compared_safely_in_float32(scale: float) -> None:
    layers = [x.float() for x in features()]
    expected = pairwise_cka(features())
    torch.testing.assert_close(
        pairwise_cka([scale * x for x in layers]).double(), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    assert pairwise_cka([x.to(dtype) for x in features()]).dtype == torch.float32


def test_pairs_are_weighed_and_the_gradients_agree_with_the_slow_formula() -> None:
    layers = [x.requires_grad_() for x in features()]
    weights = pair_weights(["a", "b", "c"], {"c": {"a": 2.5}})
    grads = torch.autograd.grad(cka_loss([layers], [weights]), layers)
    slow = (
        2 * slow_cka(layers[0], layers[1])
        + 5 * slow_cka(layers[0], layers[2])
        + 2 * slow_cka(layers[1], layers[2])
    )
    for fast, expected in zip(grads, torch.autograd.grad(slow, layers), strict=True):
        torch.testing.assert_close(fast, expected, rtol=1e-9, atol=1e-9)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def test_only_every_mth_batch_is_looked_at_and_only_n_samples() -> None:
    model = network()
    batch = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    active = CKA(strength=0.5, samples=6, every=3).attach(model, batch)
    losses = []
    for step in range(4):
        active.before_batch(step, 1.0)
        model(batch)
        losses.append(active.loss())
    assert [loss is not None for loss in losses] == [True, False, False, True]
    first = torch.relu(model[0](batch[:6]))
    second = torch.relu(model[2](first))
    torch.testing.assert_close(losses[0], 0.5 * cka_loss([[first, second]]))
    active.close()


def test_a_batch_of_fewer_than_four_is_passed_over() -> None:
    model = network()
    active = CKA(strength=1.0, samples=-1, every=1).attach(model, torch.zeros(8, 4))
    active.before_batch(0, 1.0)
    model(torch.randn(3, 4))
    assert active.loss() is None
    active.close()


def test_features_are_let_go_of_after_the_batch() -> None:
    model = network()
    active = CKA(strength=1.0, every=1).attach(model, torch.zeros(8, 4))
    active.before_batch(0, 1.0)
    model(torch.randn(8, 4))
    active.loss()
    assert not active.features.kept
    model(torch.randn(8, 4))  # evaluation between two batches is not watched
    assert not active.features.kept
    active.close()


@pytest.mark.parametrize("samples", [0, 3, -2])
def test_too_few_samples_are_refused(samples: int) -> None:
    with pytest.raises(ValueError, match="at least 4 samples"):
        CKA(samples=samples)


@pytest.mark.parametrize("unbiased", [True, False])
def test_large_constant_features_are_seen_as_constant_in_float32_despite_rounding(
    unbiased: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    constant = torch.rand(1, 64, 32, 32, generator=generator).expand(128, -1, -1, -1)
    alive = torch.rand(128, 64, 32, 32, generator=generator)
    similarity = pairwise_cka([constant, alive], unbiased=unbiased)
    assert similarity[0].abs().max() == 0
    assert similarity[1, 1] == pytest.approx(1)


@pytest.mark.parametrize("unbiased", [True, False])
def test_features_with_a_large_mean_agree_with_float64(unbiased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [10 + torch.randn(32, 500, generator=generator) for _ in range(3)]
    expected = pairwise_cka([x.double() for x in layers], unbiased=unbiased)
    torch.testing.assert_close(
        pairwise_cka(layers, unbiased=unbiased).double(), expected, rtol=2e-3, atol=2e-3
    )


def test_half_precision_gradients_come_back_in_half_precision() -> None:
    layers = [x.bfloat16().requires_grad_() for x in features()]
    cka_loss([layers]).backward()
    assert all(
        x.grad is not None and x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()
        for x in layers
    )


def test_layers_that_a_pass_leaves_out_are_compared_with_none() -> None:
    """As where a network drops whole layers at random."""
    torch.manual_seed(0)
    network = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    whole = nn.Sequential(*network)
    options = CKA(strength=1.0, every=1, stages=(("0", "1", "2"),))
    x = torch.randn(8, 4)
    active = options.attach(whole, x)
    active.before_batch(0, 1.0)
    last = network[2](network[0](x))
    found = active.loss()
    first = network[0](x)
    expected = pairwise_cka([first, last])
    assert found is not None
    assert torch.allclose(found, 2 * expected[0, 1])
    active.before_batch(1, 1.0)
    network[0](x)
    assert active.loss() is None
    active.close()
