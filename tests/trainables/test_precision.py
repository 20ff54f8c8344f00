from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from slimfront import Candidate, train
from slimfront.trainables.compaction import compact
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.precision import check_bf16
from slimfront.trainables.training.loop import Training
from tests.conftest import SMALL_CANDIDATE

RESIDUAL = {"model": {"factory": "tests.trainables.packs.made:convolutions"}}
LEARNS = {"epochs": 8, "lr": 0.01, "seed": 0}


def small(precision: str, device: str = "cpu", **changes: Any) -> Training:
    training = SMALL_CANDIDATE["training"] | {"precision": precision}
    return Training(
        Candidate.model_validate(SMALL_CANDIDATE | {"training": training} | changes), device
    )


def kinds(training: Training, layers: type[nn.Module]) -> set[tuple[bool, torch.dtype]]:
    """Fills up with whether the network trained, and the type of what such layers gave."""
    seen: set[tuple[bool, torch.dtype]] = set()

    def hook(module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.add((module.training, output.dtype))

    for module in training.model.modules():
        if isinstance(module, layers):
            module.register_forward_hook(hook)
    return seen


def check_training_in_bf16(device: str) -> None:
    training = small("bf16", device, **RESIDUAL)
    seen = kinds(training, nn.Conv2d)
    metrics = training.run_epoch()
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    gradients = [p.grad for p in training.parameters if p.grad is not None]
    state = [value for kept in training.optimizer.state.values() for value in kept.values()]
    tensors = [*training.model.state_dict().values(), *gradients, *state]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    data = training.data
    found = data.task.evaluate(training.model, *data.validation, prepare=data.prepare)
    assert metrics["val_accuracy"] == found["val_accuracy"]


def test_only_the_forward_pass_of_training_steps_is_in_bf16() -> None:
    check_training_in_bf16("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_gpu_too_only_the_forward_pass_of_training_steps_is_in_bf16() -> None:
    check_training_in_bf16("cuda")


def test_training_in_bf16_learns_the_digits() -> None:
    options = {
        "training": LEARNS | {"precision": "bf16"},
        "penalties": {"layer": {"strength": 1.0}},
    }
    trained = train(Candidate.model_validate(SMALL_CANDIDATE | options))
    assert trained.measures["val_accuracy"] > 0.9
    assert trained.history[-1]["train_loss"] < trained.history[0]["train_loss"] / 2


def test_auto_is_float32() -> None:
    first, second, rounded = (
        small(precision).run_epoch() for precision in ("auto", "float32", "bf16")
    )
    assert first == second != rounded


@pytest.mark.parametrize(
    "penalties",
    [
        {"cka": {"strength": 0.1, "every": 1}},
        {"aug_cka": {"strength": 0.1, "every": 1}},
        {"layer": {"strength": 0.1, "form": "gradient"}},
    ],
    ids=lambda penalties: next(iter(penalties)),
)
def test_penalties_are_taken_in_float32_beside_bf16(
    penalties: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = small("bf16", penalties=penalties)
    values: list[Tensor] = []
    (penalty,) = training.penalties

    def noted(loss: Callable[[], Tensor | None] = penalty.loss) -> Tensor | None:
        value = loss()
        assert value is not None
        values.append(value)
        return value

    monkeypatch.setattr(penalty, "loss", noted)
    metrics = training.run_epoch()
    assert {value.dtype for value in values} == {torch.float32}
    assert metrics["penalty_loss"] == pytest.approx(
        small("float32", penalties=penalties).run_epoch()["penalty_loss"], rel=0.1
    )


def test_a_training_in_bf16_continues_bit_exactly() -> None:
    whole, first, second = (small("bf16", **RESIDUAL) for _ in range(3))
    history = [first.run_epoch()]
    second.load_state_dict(first.state_dict())
    history += [second.run_epoch(), second.run_epoch()]
    assert history == [whole.run_epoch() for _ in range(3)]
    assert second.finish().measures == whole.finish().measures


def test_a_gpu_without_bf16_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(UserError, match="and the Tesla V100 does not; set it to float32"):
        check_bf16(torch.device("cuda"))
    check_bf16(torch.device("cpu"))


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValidationError, match="'auto', 'float32' or 'bf16'"):
        small("half")


def test_compaction_is_checked_in_all_of_float32() -> None:
    kinds = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [kind.fp32_precision for kind in kinds]
    assert before[0] == "tf32"  # torch's default
    seen: list[list[str]] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model.register_forward_pre_hook(lambda *_: seen.append([kind.fp32_precision for kind in kinds]))
    compact(model, torch.rand(3, 4))
    assert seen
    assert all(precisions == ["ieee", "ieee"] for precisions in seen)
    with pytest.raises(TrialFailure):
        compact(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.full((3, 4), float("nan")))
    assert [kind.fp32_precision for kind in kinds] == before
