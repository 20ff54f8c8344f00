import pytest
import torch
from torch import nn

from slimfront.trainables.training.optimizers import OptimizerName, build_optimizer, take_step


def trained(
    name: OptimizerName, *, ours: bool, without: int | None = None, wide: int | None = None
) -> list[torch.Tensor]:
    """The parameters after some steps, and what the optimiser remembers; one may lack a gradient,
    one be of float64."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((8, 4), (8,), (3, 2, 3, 3))]
    if wide is not None:
        parameters[wide] = nn.Parameter(parameters[wide].detach().double())
    optimizer = build_optimizer(name, parameters, lr=0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        if without is not None:
            parameters[without].grad = None
        optimizer.param_groups[0]["lr"] *= 0.9
        if ours:
            take_step(optimizer)
        else:
            optimizer.step()
    remembered = [
        value for state in optimizer.state.values() for value in state.values() if value is not None
    ]
    return [parameter.detach() for parameter in parameters] + remembered


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize(("without", "wide"), [(None, None), (1, None), (None, 0)])
def test_a_step_is_torchs_to_the_bit(
    name: OptimizerName, without: int | None, wide: int | None
) -> None:
    mine, torchs = (trained(name, ours=ours, without=without, wide=wide) for ours in (True, False))
    assert len(mine) == len(torchs) > 3
    assert all(torch.equal(one, other) for one, other in zip(mine, torchs, strict=True))
