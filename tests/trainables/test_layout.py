"""Channels last changes where numbers lie, and nothing else: in float64, where rounding does not
decide."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront import Candidate
from slimfront.trainables.models.resnet import BasicBlock
from slimfront.trainables.packs import Pack
from slimfront.trainables.shipping.network_file import restore, store
from slimfront.trainables.sparsifiers import SPARSIFIERS
from slimfront.trainables.training.acceleration.layout import (
    align_gradients,
    align_state,
    ambiguous_strides,
)
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.optimizers import take_step
from tests.trainables.packs.conftest import doubles  # noqa: F401 (float64, on few examples)
from tests.trainables.packs.made import (
    CONVOLUTIONS,
    FORMS,
    assert_histories_same,
    assert_same,
    candidates,
    trained_alone,
    with_target,
)

AMBIGUOUS = {"factory": "tests.trainables.test_layout:ambiguous"}


def ambiguous() -> nn.Module:
    """Weights with dimensions of size 1: a first layer of grey images, one by one, and one channel
    in each group."""
    layers = [
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
    ]
    return nn.Sequential(*layers, nn.ReLU(), BasicBlock(4, 6, 2), nn.Flatten(), nn.Linear(24, 10))


def pair(**options: Any) -> tuple[Candidate, Candidate]:
    """The same candidate, contiguous and with channels last."""
    model = options.pop("model", CONVOLUTIONS)
    optimizer = options.pop("optimizer", "adam")
    same: dict[str, Any] = {
        "model": model,
        "options": [options],
        "optimizer": optimizer,
        "epochs": 3,
    }
    return candidates(1, **same)[0], candidates(1, **same, channels_last=True)[0]


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def check_same(plain: Candidate, last: Candidate) -> None:
    (one, history), (other, its_history) = trained_alone(plain), trained_alone(last)
    assert any(is_channels_last(parameter) for parameter in other.parameters)
    assert_histories_same(history, its_history)
    assert_same(one, other)
    finished, its_own = one.finish(), other.finish()
    assert_histories_same(
        [finished.measures, finished.history], [its_own.measures, its_own.history]
    )
    assert [p.measures for p in finished.pruned] == [p.measures for p in its_own.pruned]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_penalty_does_the_same(name: str, form: str | None) -> None:
    check_same(
        *pair(
            penalties={name: {"strength": 0.03} | ({"form": form} if form else {"every": 2})},
            refit={"epochs": 1},
        )
    )


@pytest.mark.parametrize("name", sorted(SPARSIFIERS))
def test_every_sparsifier_does_the_same(name: str) -> None:
    check_same(*pair(sparsifier=with_target(name, 0)))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_optimizer_does_the_same_also_where_the_layout_is_ambiguous(optimizer: str) -> None:
    check_same(*pair(model=AMBIGUOUS, optimizer=optimizer))


def test_convolutions_get_images_with_channels_last_and_gradients_have_the_strides_of_weights() -> (
    None
):
    training = Training(pair(model=AMBIGUOUS)[1])
    seen: list[bool] = []
    training.model[3].register_forward_pre_hook(
        lambda module, inputs: seen.append(is_channels_last(inputs[0]))
    )
    training.run_epoch()
    assert all(seen[:5])  # the steps
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in training.parameters)
    assert {tuple(p.shape[1:]) for p in training.ambiguous} == {(1, 3, 3), (4, 1, 1)}
    assert all(
        v.stride() == p.stride()
        for p, s in training.optimizer.state.items()
        for v in s.values()
        if v.shape == p.shape
    )


def test_gradients_that_autograd_lays_out_otherwise_are_aligned_before_the_optimizer_sees_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = Training(pair(model=AMBIGUOUS)[1])
    before, at_the_step = [], []

    def otherwise(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad = torch.empty(parameter.shape).copy_(parameter.grad)
        before.append(parameter.grad.stride() == parameter.stride())

    for parameter in training.ambiguous:
        parameter.register_post_accumulate_grad_hook(otherwise)

    def watched(optimizer: torch.optim.Optimizer, lr: torch.Tensor | None) -> None:
        at_the_step.append(
            all(p.grad is not None and p.grad.stride() == p.stride() for p in training.parameters)
        )
        take_step(optimizer, lr)

    monkeypatch.setattr("slimfront.trainables.training.batch_step.take_step", watched)
    training.run_epoch()
    assert not any(before)
    assert len(at_the_step) == 5 and all(at_the_step)


def saved(training: Training, tmp_path: Any) -> dict[str, Any]:
    torch.save(training.state_dict(), tmp_path / "state.pt")
    loaded: dict[str, Any] = torch.load(tmp_path / "state.pt", weights_only=True)
    return loaded


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_checkpoint_continues_bit_exactly_and_in_the_other_layout_as_well(
    optimizer: str, tmp_path: Any
) -> None:
    plain, last = pair(optimizer=optimizer, penalties={"channel": {"strength": 0.03}})
    whole, _ = trained_alone(last)
    for first, second in ((last, last), (plain, last), (last, plain)):
        continued = Training(second)
        continued.load_state_dict(saved(trained_alone(first, 2)[0], tmp_path))
        continued.run_epoch()
        assert_same(continued, whole)
        if first is second:
            assert all(
                torch.equal(a, b)
                for a, b in zip(continued.parameters, whole.parameters, strict=True)
            )


def test_a_member_of_a_pack_is_as_alone_and_goes_on_from_its_checkpoint(tmp_path: Any) -> None:
    made = candidates(2, CONVOLUTIONS, channels_last=True, epochs=4)
    pack = Pack([trained_alone(made[0], 1)[0], made[1]])
    first = pack.members[0]
    for _ in range(2):
        pack.run_epoch()
    pack.leave(first)
    continued = Training(made[0])
    continued.load_state_dict(saved(first, tmp_path))
    for training in (first, continued):
        training.run_epoch()
        assert_same(training, trained_alone(made[0])[0])


def test_a_stored_network_lies_as_ever_and_gives_the_same() -> None:
    training, _ = trained_alone(pair(compaction={"merge": "never"})[1])
    network = training.finish().compacted.network
    # Those in training stay.
    assert any(is_channels_last(parameter) for parameter in training.parameters)
    assert all(tensor.is_contiguous() for tensor in network.state_dict().values())
    data = training.data
    again = restore(store(network, training.candidate.model, data.input_shape, data.head))
    inputs = data.prepare(data.validation.inputs)
    assert torch.equal(again(inputs), network(inputs))


def test_gradients_and_state_are_aligned_with_their_parameters() -> None:
    layer = nn.Conv2d(4, 2, 1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    values = torch.arange(8.0).view(2, 4, 1, 1)
    layer.weight.grad = values.clone()
    assert layer.weight.stride() != values.stride()
    assert ambiguous_strides(layer.parameters()) == [layer.weight]
    align_gradients(ambiguous_strides(layer.parameters()))
    assert layer.weight.grad.stride() == layer.weight.stride()
    assert torch.equal(layer.weight.grad, values)
    wide = nn.Parameter(torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([wide], momentum=0.9)
    kept = torch.randn(2, 4, 3, 3)
    optimizer.state[wide]["momentum_buffer"] = kept.clone()
    align_state(optimizer)
    assert optimizer.state[wide]["momentum_buffer"].stride() == wide.stride()
    assert torch.equal(optimizer.state[wide]["momentum_buffer"], kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_on_a_gpu_it_does_the_same(optimizer: str) -> None:
    for model in (CONVOLUTIONS, AMBIGUOUS):
        plain, last = (
            Training(candidate, "cuda") for candidate in pair(model=model, optimizer=optimizer)
        )
        assert_histories_same(
            [plain.run_epoch() for _ in range(3)], [last.run_epoch() for _ in range(3)]
        )
        assert_same(plain, last)
