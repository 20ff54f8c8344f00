"""What every penalty must do, whatever it is."""

from typing import Any

import pytest
import torch
from torch import nn

from trainables.penalties import PENALTIES


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(3):
        layers += [nn.Linear(6, 6), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, 3)).double()


INPUTS = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def one_step(name: str, **options: Any) -> tuple[nn.Module, torch.Tensor | None]:
    """The network after one SGD step of size 0.1 under the penalty alone, and the penalty's loss."""
    model = network()
    active = PENALTIES[name](**options).attach(model, INPUTS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    active.before_batch(0)
    output = model(INPUTS)
    loss = active.loss()
    (output.sum() * 0 + (loss if loss is not None else 0)).backward()
    optimizer.step()
    active.proximal(0.1)
    active.close()
    return model, loss


def parameters(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_strength_zero_changes_nothing(name: str) -> None:
    model, _ = one_step(name, strength=0.0)
    assert torch.equal(parameters(model), parameters(network()))


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_a_positive_strength_changes_weights_and_keeps_them_finite(name: str) -> None:
    model, _ = one_step(name, strength=1.0)
    assert not torch.equal(parameters(model), parameters(network()))
    assert parameters(model).isfinite().all()


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_the_same_input_gives_the_same_step(name: str) -> None:
    assert torch.equal(parameters(one_step(name, strength=1.0)[0]), parameters(one_step(name, strength=1.0)[0]))


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_nothing_is_left_on_the_network(name: str) -> None:
    model, _ = one_step(name, strength=1.0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_a_negative_strength_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        PENALTIES[name](strength=-1)
