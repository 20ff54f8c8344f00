import copy
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import UserError
from slimfront.trainables.packs.packable import packable
from slimfront.trainables.torch_internals import without_compiler
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.optimizers import OptimizerName, build_optimizer, take_step
from slimfront.trainables.training.rehearsal import rehearse


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


FACTORS: dict[str, Any] = {
    "model": {"name": "mlp", "depth": 3, "width": 8},
    "training": {
        "epochs": 2,
        "batch_size": 256,
        "optimizer": "sgd",
        "momentum": 0.0,
        "lr": 0.1,
        "seed": 3,
    },
}


def one_step(factors: dict[str, float], **changes: Any) -> tuple[dict[str, Tensor], Training]:
    """By how much each parameter changes in the first step."""
    options = FACTORS["training"] | {"lr_factors": factors}
    training = Training(Candidate.model_validate(FACTORS | changes | {"training": options}))
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    next(training.steps())
    changed = {}
    for name, parameter in training.model.named_parameters():
        changed[name] = parameter.detach() - before[name]
    return changed, training


def test_parameters_are_trained_at_so_many_times_the_learning_rate() -> None:
    whole, _ = one_step({})
    first, *_ = whole
    layer = first.partition(".")[0]
    scaled, training = one_step({f"{layer}.weight": 0.25, f"{layer}.*": 0.5, "*": 2.0})
    for name, change in whole.items():
        factor = 2.0
        if name.startswith(f"{layer}."):
            factor = 0.25 if name.endswith("weight") else 0.5
        assert torch.allclose(scaled[name], factor * change, atol=1e-6), name
    assert {group["lr"] for group in training.optimizer.param_groups} == {0.025, 0.05, 0.2}
    training.close()


def test_proximal_steps_are_as_long_as_those_of_the_optimiser() -> None:
    penalties = {"connection": {"strength": 1.0}}
    _, training = one_step({"*": 0.5}, penalties=penalties)
    sizes = training._step_sizes(0.1)
    assert {sizes([parameter]) for parameter in training.model.parameters()} == {0.05}
    training.close()


def test_a_training_with_factors_goes_on_where_it_was_left() -> None:
    whole = Training(candidate_with_factors())
    whole.run_epoch()
    state = copy.deepcopy(whole.state_dict())
    whole.run_epoch()
    again = Training(candidate_with_factors())
    again.load_state_dict(state)
    again.run_epoch()
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def candidate_with_factors(**changes: Any) -> Candidate:
    options = FACTORS["training"] | {"lr_factors": {"*.bias": 0.1}} | changes
    return Candidate.model_validate(FACTORS | {"training": options})


def test_a_factor_of_no_parameter_is_refused_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"^training.lr_factors: no parameter .* called 'bakbone"):
        rehearse(candidate_with_factors(lr_factors={"bakbone.*": 0.1}))


def test_factors_are_refused_beside_a_function_of_the_users_and_in_a_pack() -> None:
    with pytest.raises(ValidationError, match="give that parameter groups"):
        candidate_with_factors(factory="my_loop:train")
    assert "training.lr_factors cannot be in a pack" in str(packable(candidate_with_factors()))


def test_the_refit_has_the_factors_too() -> None:
    still = {"*": 1e-12}
    candidate = Candidate.model_validate(
        FACTORS
        | {
            "training": FACTORS["training"] | {"epochs": 0, "lr_factors": still},
            "refit": {"epochs": 1, "lr": 0.1},
        }
    )
    training = Training(candidate)
    refitted = training.finish(one_shot=False).compacted.network
    for one, other in zip(refitted.parameters(), training.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


WITHOUT_COMPILER = """
import sys
from contextlib import ExitStack
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.training.train import train

for optimizer in ("adam", "sgd"):
    train(Candidate.model_validate({
        "model": {"name": "mlp", "depth": 2, "width": 8},
        "training": {"epochs": 1, "optimizer": optimizer, "batch_size": 256},
        "penalties": {"layer": {"strength": 1.0}},
        "sparsifier": {"name": "magnitude", "sparsity": 0.5},
        "refit": {"epochs": 1},
    }))
assert "torch._dynamo" not in sys.modules
import torch
network = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
compiled = torch.compile(network, backend="eager")
compiled(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.state_dict()
"""


@pytest.mark.slow
def test_a_training_loads_no_compiler_and_one_may_be_loaded_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_of_a_process_may_be_without_the_compiler_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As trials that share a process are, when two of them are saved."""
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    with ExitStack() as one, ExitStack() as other:
        one.enter_context(without_compiler())
        other.enter_context(without_compiler())
        one.close()
        optimizer.state_dict()
        assert "torch._dynamo" not in sys.modules
