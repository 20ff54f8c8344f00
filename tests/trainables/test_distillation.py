"""Networks learn from a teacher: the loss is the paper's, for every task, alone, refitted, on
augmented images, and in searches, whose baseline may be the teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimfront as sf
from slimfront.search.engine.runner import run_search
from slimfront.trainables.inputs import Several
from slimfront.trainables.models import MODELS
from slimfront.trainables.tasks.active import ActiveTask
from slimfront.trainables.tasks.classification import soft_cross_entropy
from slimfront.trainables.training.batch_step import BatchStep
from slimfront.trainables.training.distillation import TEACHER
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.rehearsal import rehearse
from tests.conftest import small_config
from tests.trainables.tasks.made import JOBS

MLP: dict[str, Any] = {"name": "mlp", "depth": 2, "width": 8}


def weights_of(candidate: dict[str, Any], path: Path, epochs: int = 3) -> Training:
    """A trained network of the candidate, whose weights are at `path`."""
    tree = candidate | {"training": {"epochs": epochs, "lr": 1e-2, "seed": 1}}
    training = Training(sf.Candidate.model_validate(tree))
    for _ in range(epochs):
        training.run_epoch()
    torch.save(training.model.state_dict(), path)
    return training


def test_the_loss_is_hintons() -> None:
    """Against torch's own divergence, and its limit for high temperatures (section 2.1)."""
    generator = torch.Generator().manual_seed(0)
    outputs, teacher = (torch.randn(5, 4, 3, generator=generator).double() for _ in range(2))
    made = soft_cross_entropy(outputs, teacher, 3.0)
    wanted = 9 * nn.functional.kl_div(
        torch.log_softmax(outputs / 3, 1), torch.softmax(teacher / 3, 1), reduction="none"
    ).sum(1)
    torch.testing.assert_close(made, wanted)
    centred = (outputs - outputs.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    hot = soft_cross_entropy(outputs, teacher, 1e4)
    torch.testing.assert_close(hot, centred.square().mean(1) / 2, rtol=1e-3, atol=1e-6)
    assert soft_cross_entropy(teacher, teacher, 2.0).abs().max() < 1e-12


def test_task_and_teacher_share_the_loss(tmp_path: Path) -> None:
    teacher = weights_of({"model": MLP}, tmp_path / "teacher.pt").model
    candidate = sf.Candidate.model_validate(
        {
            "model": MLP,
            "training": {"seed": 3},
            "distill": {"teacher": str(tmp_path / "teacher.pt"), "temperature": 3, "weight": 0.25},
        }
    )
    training = Training(candidate)
    inputs, targets = training.taught.train
    assert isinstance(targets, Several)
    seen = training.data.prepare(inputs[:50])
    outputs = training.model(seen)
    wanted = 0.75 * nn.functional.cross_entropy(outputs, training.data.train.targets[:50])
    with torch.no_grad():
        taught = teacher.eval()(seen)
    torch.testing.assert_close(targets.named[TEACHER][:50], taught)
    wanted = wanted + 0.25 * soft_cross_entropy(outputs, taught, 3.0).mean()
    torch.testing.assert_close(training.taught.task.loss(outputs, targets[:50]), wanted)
    both = torch.stack([outputs, outputs.flip(1)])
    of_each = [training.taught.task.loss(made, targets[:50]) for made in both]
    doubled = targets[:50].each(lambda tensor: torch.stack([tensor, tensor]))
    torch.testing.assert_close(training.taught.task.losses(both, doubled), torch.stack(of_each))


@pytest.mark.parametrize("job", JOBS)
def test_every_task_is_distilled_and_refitted(job: str, tmp_path: Path) -> None:
    """With all of the loss from the teacher, a student comes nearer to it."""
    tree = JOBS[job] | {"one_shot": {"steps": 0}}
    teacher = weights_of(tree, tmp_path / "teacher.pt").model
    student = sf.Candidate.model_validate(
        tree
        | {
            "training": {"epochs": 3, "lr": 1e-2, "seed": 8},
            "refit": {"epochs": 1},
            "distill": {"teacher": str(tmp_path / "teacher.pt"), "weight": 1.0},
        }
    )
    rehearse(student)
    training = Training(student)
    data = training.data

    def apart() -> float:
        inputs = data.validation.inputs
        made, wanted = (
            data.task.outputs_of(network, inputs, data.prepare)
            for network in (training.model, teacher)
        )
        return float((made - wanted).square().mean())

    before = apart()
    for _ in range(3):
        training.run_epoch()
    assert apart() < before
    assert len(training.finish().history) == 1


def test_the_teacher_sees_augmented_images_as_the_student_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree: dict[str, Any] = {
        "model": {"name": "lenet", "width": 2},
        "data": {
            "name": "factory",
            "factory": "tests.trainables.data.made:image_tensors",
            "args": {"count": 60},
            "augment": {"crop": 2, "flip": True},
        },
    }
    weights_of(tree, tmp_path / "teacher.pt", 1)
    training = Training(
        sf.Candidate.model_validate(
            tree | {"training": {"epochs": 1}, "distill": {"teacher": str(tmp_path / "teacher.pt")}}
        )
    )
    assert training.teacher is not None
    assert not training.teacher.cached
    seen: list[tuple[Tensor, Tensor]] = []
    prepared = BatchStep._prepared

    def watched(self: BatchStep, part: Any) -> tuple[Tensor, Tensor]:
        seen.append(prepared(self, part))
        return seen[-1]

    monkeypatch.setattr(BatchStep, "_prepared", watched)
    training.run_epoch()
    assert seen
    for inputs, targets in seen:
        assert isinstance(targets, Several)
        with torch.no_grad():
            wanted = training.teacher.network(inputs)
        assert torch.equal(targets.named[TEACHER], wanted)


def test_features_come_near_to_the_teachers(tmp_path: Path) -> None:
    """Relative to the teacher's, on the batch that both have seen; and hooks go."""
    weights_of({"model": MLP}, tmp_path / "teacher.pt")
    distill = {"teacher": str(tmp_path / "teacher.pt"), "weight": 0.0, "features": {"3": 5.0}}
    training = Training(
        sf.Candidate.model_validate(
            {"model": MLP, "training": {"epochs": 8, "lr": 3e-3, "seed": 8}, "distill": distill}
        )
    )
    assert training.teacher is not None
    assert not training.teacher.cached
    seen = training.data.prepare(training.data.train.inputs[:100])

    def apart() -> float:
        with torch.no_grad():
            mine, wanted = (m[:4](seen) for m in (training.model, training.teacher.network))
        return float((mine - wanted).square().sum() / wanted.square().sum())

    before = apart()
    metrics = [training.run_epoch() for _ in range(8)]
    assert apart() < before / 2
    assert metrics[0]["penalty_loss"] == pytest.approx(5 * before, rel=0.5)
    training.close()
    for network in (training.model, training.teacher.network):
        assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("features", "width", "said"),
    [
        ({"layer": 1.0}, 8, "the network has no layer 'layer'"),
        ({"3": 1.0}, 12, "'3' gives (8,) for an example, and (12,) in the teacher"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(
    features: dict[str, float], width: int, said: str, tmp_path: Path
) -> None:
    teacher = MLP | {"width": width}
    weights_of({"model": teacher}, tmp_path / "teacher.pt", 1)
    distill = {
        "teacher": teacher | {"weights": str(tmp_path / "teacher.pt")},
        "features": features,
    }
    with pytest.raises(sf.UserError) as caught:
        Training(sf.Candidate.model_validate({"model": MLP, "distill": distill}))
    assert said in str(caught.value)


def test_what_a_teacher_says_is_kept_for_the_next_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_of({"model": MLP}, tmp_path / "teacher.pt")
    calls = []
    outputs_of = ActiveTask.outputs_of

    def counted(*arguments: Any) -> Tensor:
        calls.append(len(arguments[2]))
        return outputs_of(*arguments)

    monkeypatch.setattr(ActiveTask, "outputs_of", counted)
    for seed in range(3):
        training = Training(
            sf.Candidate.model_validate(
                {
                    "model": MLP,
                    "training": {"seed": seed},
                    "distill": {"teacher": str(tmp_path / "teacher.pt")},
                }
            )
        )
    examples = len(training.data.train.targets)
    assert calls == [256, examples]  # a few first, to see how long all will take


def test_a_teacher_may_be_another_network(tmp_path: Path) -> None:
    large = MLP | {"width": 64}
    weights_of({"model": large}, tmp_path / "teacher.pt")
    candidate = sf.Candidate.model_validate(
        {
            "model": MLP,
            "training": {"epochs": 1},
            "distill": {"teacher": large | {"weights": str(tmp_path / "teacher.pt")}},
        }
    )
    assert Training(candidate).run_epoch()["train_loss"] > 0
    again = sf.Candidate.model_validate(candidate.model_dump(mode="json"))
    assert again == candidate


@pytest.mark.parametrize(
    ("distill", "said"),
    [
        ({"teacher": "baseline"}, "give model.weights, or a teacher with weights"),
        ({"teacher": "nowhere.pt"}, "there is no file nowhere.pt"),
        ({"teacher": MLP}, "the network has no weights"),
        ({"teacher": MLP | {"weights": "W", "heads": 3}}, "unknown key 'heads'"),
        ({"temperature": 0}, "greater than 0"),
        ({"weight": 1.5}, "less than or equal to 1"),
        ({"teachers": "x"}, "did you mean 'teacher'"),
    ],
)
def test_what_cannot_be_is_refused(distill: dict[str, Any], said: str) -> None:
    with pytest.raises((sf.UserError, ValueError)) as caught:
        Training(sf.Candidate.model_validate({"model": MLP, "distill": distill}))
    assert said in str(caught.value)


def test_a_teacher_of_another_task_is_refused(tmp_path: Path) -> None:
    model = MODELS.parse_named(MLP).build((64,), 3)
    torch.save(model.state_dict(), tmp_path / "other.pt")
    candidate = sf.Candidate.model_validate(
        {"model": MLP, "distill": {"teacher": str(tmp_path / "other.pt")}}
    )
    with pytest.raises(sf.UserError, match="has the shape") as caught:
        Training(candidate)
    assert "distill.teacher.weights" in str(caught.value)
    assert "model." not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_the_baseline_of_a_search_teaches_the_others(given: bool, tmp_path: Path) -> None:
    """A baseline that is trained is trained first, and its network file is the teacher's."""
    model = {"name": "mlp", "depth": 2, "width": 16}
    if given:
        weights_of({"model": model}, tmp_path / "given.pt")
        model = model | {"weights": str(tmp_path / "given.pt")}
    config = small_config(
        tmp_path,
        model=model,
        distill={"teacher": "baseline", "weight": 0.5},
        penalties={},
        space={"sparsifier.sparsity": {"low": 0.3, "high": 0.5}},
        search={"trials": 2},
    )
    result = run_search(config)
    assert [trial.status for trial in result.ledger.trials] == ["completed"] * 2
    dense = result.ledger.dense
    assert dense is not None
    assert dense.status == "completed"
