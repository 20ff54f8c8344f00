"""Packs that compute in bfloat16: in float32 otherwise, on all digits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.data import load_once
from slimfront.trainables.errors import UserError
from slimfront.trainables.packs import Pack, best_size, pack_key, packable
from slimfront.trainables.packs.stack import Stack
from slimfront.trainables.packs.step import Step
from slimfront.trainables.training.loop import Training
from tests.marks import often
from tests.trainables.packs.made import CONVOLUTIONS, MLP, TRANSFORMER, candidates, trained_together

MODELS = {"mlp": MLP, "convolutions": CONVOLUTIONS, "transformer": TRANSFORMER}
PENALTIES = {"penalties": {"layer": {"strength": 0.1}, "cka": {"strength": 0.1, "every": 1}}}


@pytest.fixture(autouse=True)
def floats(doubles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimfront.trainables.training.candidate_setup.load_once", load_once)
    torch.set_default_dtype(torch.float32)


def gradients(training: Training, step: Step) -> Tensor:
    """Of the task loss and the penalties that act by it, at the first examples: (P,), as a pack of
    two like it takes them."""
    stack = Stack([training, Training(training.candidate)])
    leaf = stack.weights.detach().requires_grad_()
    inputs, labels = (
        tensor[:32].expand(2, 32, *tensor.shape[1:]) for tensor in training.data.train
    )
    strengths = {name: torch.ones(2, 1) for name in step.penalties if not step.by_proximal(name)}
    task, extra = step.losses(stack.named(leaf), stack.buffers, inputs, labels, strengths)
    assert task.dtype == extra.dtype == torch.float32
    return torch.autograd.grad((task + extra).sum(), leaf)[0][0]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_gradients_of_a_pack_are_those_alone_to_the_precision_of_bf16(name: str) -> None:
    plain, half = (
        candidates(1, MODELS[name], precision=p, options=[PENALTIES])[0]
        for p in ("float32", "bf16")
    )
    assert packable(half) is None
    steps = [
        Step(
            Training(c).model,
            c.penalties,
            Training(c).data.train.inputs[:8],
            Training(c).data.task,
            bf16=c.training.bf16,
        )
        for c in (plain, half)
    ]
    exact, packed = (gradients(Training(plain), step) for step in steps)
    alone = Training(half)
    losses = alone.shared_losses()
    for penalty in alone.penalties:
        penalty.before_batch(0, 10.0)  # of the strength 0.1
    sum(losses(*(tensor[:32] for tensor in alone.data.train))).backward()
    own = torch.cat([p.grad.flatten() for p in alone.parameters if p.grad is not None])
    assert 1e-4 < (packed - exact).norm() / exact.norm() < 0.1
    assert (packed - own).norm() / own.norm() < 0.1
    assert (packed - own).norm() < 2 * (own - exact).norm()


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, nn.BatchNorm2d])
def test_layers_of_a_pack_give_bf16_in_training_and_float32_in_evaluation(
    kind: type[nn.Module],
) -> None:
    pack = Pack(candidates(2, CONVOLUTIONS, precision="bf16", epochs=1))
    pack.step = pack._new_step(pack.members[0])
    seen: set[tuple[bool, torch.dtype]] = set()

    def hook(module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.add((module.training, output.dtype))

    for module in pack.step.model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(hook)
    pack.run_epoch()
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}


WIDE = {
    "mlp": {"name": "mlp", "depth": 2, "width": 32},
    "resnet": {"name": "resnet20", "width": 4, "depth": 8},
}


@pytest.mark.parametrize("name", often(sorted(WIDE), "mlp"))
def test_a_pack_in_bf16_learns_as_its_members_do_alone(name: str) -> None:
    sparse: dict[str, Any] = {
        "penalties": {"layer": {"strength": 0.1}},
        "sparsifier": {"name": "magnitude", "sparsity": 0.5},
    }
    made = candidates(
        2, WIDE[name], options=[sparse] * 2, precision="bf16", epochs=4, batch_size=128, lr=0.01
    )
    for candidate, (member, history) in zip(
        made, trained_together(Pack(made)).items(), strict=True
    ):
        alone = Training(candidate)
        for metrics in history:
            expected = alone.run_epoch()
            assert metrics["train_loss"] == pytest.approx(expected["train_loss"], rel=0.1)
        assert history[-1]["train_loss"] < 0.6 * history[0]["train_loss"]
        assert history[-1]["sparsity"] == pytest.approx(expected["sparsity"])
        assert all(parameter.dtype == torch.float32 for parameter in member.parameters)


class Functional(nn.Module):
    """Batch norm as a function, whose rule for vmap does not take several types."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Linear(64, 16, bias=False),
            nn.BatchNorm1d(16),
            nn.Linear(16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8, 8) to (N, 10)."""
        norm = self.norm
        x = self.first(x.flatten(1))
        x = nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training
        )
        out: Tensor = self.last(x.relu())
        return out


def test_a_network_that_packs_in_float32_alone_is_refused_in_one_sentence() -> None:
    model = {"factory": "tests.trainables.packs.test_bf16:Functional"}
    plain, half = (
        candidates(1, model, precision=precision)[0] for precision in ("float32", "bf16")
    )
    assert packable(plain) is None
    said = packable(half)
    assert said is not None and "does not pack in bf16 (" in said and "\n" not in said
    assert said.endswith("set training.precision to float32, or resources.pack to 1")
    assert best_size(half, 4) == 1


def test_candidates_of_two_precisions_are_not_in_one_pack() -> None:
    auto, plain, half = (
        candidates(1, precision=precision)[0] for precision in ("auto", "float32", "bf16")
    )
    assert pack_key(auto) == pack_key(plain) != pack_key(half)
    with pytest.raises(UserError, match=r"these differ in training\.precision; fix what differs"):
        Pack([plain, half])


def test_the_size_of_packs_in_bf16_is_measured() -> None:
    assert best_size(candidates(1, precision="bf16")[0], 2) in (1, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_pack_in_bf16_on_a_gpu_learns_as_its_members_do_alone(name: str) -> None:
    made = candidates(
        2, MODELS[name], options=[PENALTIES] * 2, precision="bf16", epochs=2, batch_size=128
    )
    for candidate, history in zip(made, trained_together(Pack(made, "cuda")).values(), strict=True):
        alone = Training(candidate, "cuda")
        for metrics in history:
            assert metrics["train_loss"] == pytest.approx(alone.run_epoch()["train_loss"], rel=0.1)
