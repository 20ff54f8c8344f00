"""Tasks, losses and metrics of the user's, by import path."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from slimfront import Candidate, Encoded, Task, train
from slimfront.trainables.errors import UserError
from slimfront.trainables.packs import Pack
from slimfront.trainables.tasks.sequence import TokenClassification
from slimfront.trainables.training.rehearsal import rehearse

HERE = "tests.trainables.tasks.test_factory"


class Quantile(Task):
    """A quantile of a number, by the pinball loss."""

    name: str = "quantile"
    q: float = 0.9
    DEFAULT: ClassVar[tuple[str, ...]] = ()

    def encode(self, given: Any, names: Sequence[str] = (), outputs: int | None = None) -> Encoded:
        return Encoded(torch.as_tensor(given).float().reshape(-1, 1), 1)

    def criterion(self, targets: Tensor, encoded: Encoded) -> Any:
        def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
            over = wanted - outputs
            return torch.maximum(self.q * over, (self.q - 1) * over).mean()

        return loss

    def wrong_outputs(self, found: Tensor, targets: Tensor, outputs: int) -> str | None:
        right = tuple(found.shape) == (len(targets), 1)
        return None if right else "the network must return (N, 1)"


class Margin(Task):
    """Classes by the multi-class hinge loss; what it gives looks as in classification."""

    LIKE: ClassVar[str] = "classification"
    LOSSES: ClassVar[tuple[str, ...]] = ("hinge", "squared_hinge")

    def encode(self, given: Any, names: Sequence[str] = (), outputs: int | None = None) -> Encoded:
        targets = torch.as_tensor(given)
        return Encoded(targets, int(targets.max()) + 1)

    def criterion(self, targets: Tensor, encoded: Encoded) -> Any:
        power = 2 if self.loss == "squared_hinge" else 1

        def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
            right = outputs.gather(1, wanted[:, None])
            return (1 + outputs - right).clamp_min(0).pow(power).mean()

        return loss


class Unknown(Quantile):
    DEFAULT: ClassVar[tuple[str, ...]] = ("accuracy",)


class Astray(Quantile):
    LIKE: ClassVar[str] = "regresion"


def quantile(q: float) -> Task:
    return Quantile(q=q, metrics=[{"factory": f"{HERE}:covered", "better": "larger"}])


def covered(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs >= targets).float().mean()


def numbers() -> tuple[Tensor, Tensor]:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    return x, x[:, 0]


def focal(outputs: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
    each = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return (1 - (-each).exp()) ** gamma * each


def misses(outputs: Tensor, targets: Tensor, weight: float = 1.0) -> float:
    return weight * int((outputs.argmax(1) != targets).sum())


def raises(outputs: Tensor, targets: Tensor) -> Tensor:
    raise ValueError("no such luck\nat all")


def nothing(outputs: Tensor, targets: Tensor) -> None:
    """A return that was forgotten."""


def a_list(outputs: Tensor, targets: Tensor) -> list[float]:
    return [0.0]


def per_class(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean(0)


def not_a_task() -> dict[str, int]:
    return {}


def error(outputs: Tensor, targets: Tensor) -> Tensor:
    """As most would write it: of outputs (N, 1) and targets (N,) it would be of (N, N)."""
    return (outputs - targets).square().mean()


class Top(MulticlassAccuracy):
    """A class of torchmetrics of the user's."""


def candidate(task: Any, data: Mapping[str, Any] | None = None, **training: Any) -> Candidate:
    return Candidate.model_validate(
        {
            "task": task,
            "data": data or {"factory": "tests.trainables.tasks.made:classes"},
            "model": {"name": "mlp", "depth": 1, "width": 16},
            "training": {"epochs": 8, "batch_size": 16, "lr": 0.01, "seed": 1} | training,
            "one_shot": {"steps": 0},
        }
    )


MICRO = {"num_classes": 3, "average": "micro"}
RAISES = {"factory": f"{HERE}:raises", "better": "larger"}
NUMBERS = {"factory": f"{HERE}:numbers"}


@pytest.mark.parametrize(
    ("task", "low"),
    [
        ({"factory": f"{HERE}:quantile", "args": {"q": 0.9}}, 0.7),
        (
            {
                "name": "factory",
                "factory": f"{HERE}:Quantile",
                "args": {"q": 0.95},
                "metrics": {"factory": f"{HERE}:covered", "better": "larger"},
            },
            0.8,
        ),
    ],
)
def test_a_task_of_the_users_own_is_trained_alone_and_in_packs(task: Any, low: float) -> None:
    made = candidate(task, NUMBERS)
    rehearse(made)
    done = train(made)
    assert low < done.measures["val_covered"] <= 1
    pack = Pack([candidate(task, NUMBERS, seed=seed, epochs=1) for seed in (1, 2)])
    members = list(pack.members)
    found = pack.run_epoch()
    assert all(0 <= found[one]["val_covered"] <= 1 for one in members)  # type: ignore[index]
    pack.close()


@pytest.mark.parametrize("data", ["numbers", "several_numbers"])
def test_functions_of_a_regression_see_outputs_in_the_shape_of_the_targets(data: str) -> None:
    task = {
        "name": "regression",
        "loss": {"factory": f"{HERE}:error"},
        "metrics": [
            "mse",
            {"factory": f"{HERE}:error", "better": "smaller"},
            {"factory": "torchmetrics.regression:MeanSquaredError", "better": "smaller"},
        ],
    }
    source = {"factory": f"tests.trainables.tasks.made:{data}"}
    made = candidate(task, source)
    rehearse(made)
    own, plain = train(made), train(candidate({"name": "regression"}, source))
    assert own.measures["val_mse"] == pytest.approx(plain.measures["val_mse"], rel=1e-4)
    for name in ("val_error", "val_MeanSquaredError"):
        assert own.measures[name] == pytest.approx(own.measures["val_mse"], rel=1e-4)
    pack = Pack([candidate(task, source, seed=seed, epochs=1) for seed in (1, 2)])
    members = list(pack.members)
    for found in map(pack.run_epoch().get, members):
        assert isinstance(found, dict)
        assert found["val_error"] == pytest.approx(found["val_mse"], rel=1e-4)
    pack.close()


def test_metrics_of_a_task_that_is_alike_are_known_by_name() -> None:
    for loss in ("", "squared_hinge"):
        metrics = [
            "accuracy",
            {"name": "f1", "better": "larger"},
            {"name": "auroc", "average": "weighted", "called": "area"},
        ]
        made = candidate({"factory": f"{HERE}:Margin", "metrics": metrics, "loss": loss})
        assert [(one.name, one.bounded) for one in made.task.described()] == [
            ("accuracy", True),
            ("f1", True),
            ("area", True),
        ]
        rehearse(made)
        measures = train(made).measures
        assert measures["val_accuracy"] > 0.6 and measures["val_area"] > 0.8
    regression = {"factory": f"{HERE}:Quantile", "metrics": ["mae", "r2"]}
    with pytest.raises(UserError, match="the metric 'mae' is another task's, and Quantile has"):
        rehearse(candidate(regression, NUMBERS))


def test_a_loss_and_metrics_of_the_users_own_are_taken() -> None:
    made = candidate(
        {
            "name": "classification",
            "loss": {"factory": f"{HERE}:focal", "args": {"gamma": 1.0}},
            "metrics": [
                {"factory": f"{HERE}:misses", "better": "smaller", "weight": 2},
                {
                    "factory": f"{HERE}:Top",
                    "better": "larger",
                    "num_classes": 3,
                    "average": "micro",
                },
                {"factory": f"{HERE}:Top", "better": "larger", "called": "macro", "num_classes": 3},
                "accuracy",
            ],
        }
    )
    assert [one.better for one in made.task.described()] == [
        "smaller",
        "larger",
        "larger",
        "larger",
    ]
    measures = train(made).measures
    right = measures["val_accuracy"]
    assert measures["val_Top"] == pytest.approx(right)
    assert measures["val_misses"] == pytest.approx(2 * 48 * (1 - right))
    assert right > 0.6 and 0 < measures["val_macro"] <= 1


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"factory": f"{HERE}:not_a_task"},
            "gives a dict; it must be a subclass of",
        ),
        ({"factory": f"{HERE}:Top", "args": {"num_classes": 3}}, "it must be a subclass of slim"),
        ({"factory": f"{HERE}:quantil"}, "there is no 'quantil' in it; did you mean 'quantile'"),
        ({"factory": f"{HERE}:quantile"}, "raised TypeError: .*missing 1 required"),
        ({"factory": f"{HERE}:Quantile", "args": {"r": 1}}, "unknown key 'r'"),
        ({"factory": f"{HERE}:Quantile"}, "names no metric"),
        (
            {"factory": f"{HERE}:Quantile", "metrics": ["accuracy", "f1"]},
            "the metric 'accuracy' is another task's, and Quantile has none by name; set LIKE of",
        ),
        (
            {"factory": f"{HERE}:Margin", "metrics": "acuracy"},
            "Margin': unknown metric 'acuracy'; did you mean 'accuracy'",
        ),
        (
            {"factory": f"{HERE}:Margin", "metrics": "f1", "loss": "hing"},
            "Margin': unknown loss 'hing', .* did you mean 'hinge'",
        ),
        (
            {"factory": f"{HERE}:Margin", "metrics": {"name": "f1", "better": "smaller"}},
            "the metric 'f1' is better when larger; leave out 'better'",
        ),
        ({"factory": f"{HERE}:Unknown"}, "DEFAULT names 'accuracy', which is not in KNOWN"),
        (
            {"factory": f"{HERE}:Astray", "metrics": "r2"},
            "Astray': unknown task 'regresion'; did you mean 'regression'",
        ),
        (
            {"name": "classification", "loss": {"factory": f"{HERE}:raises"}},
            "raises' raised ValueError: no such luck",
        ),
        (
            {"name": "classification", "loss": {"factory": f"{HERE}:a_list"}},
            "gave list; it must give a tensor",
        ),
        (
            {
                "name": "classification",
                "metrics": {"factory": f"{HERE}:raises", "better": "larger"},
            },
            "the metric 'raises' raised ValueError: no such luck",
        ),
        (
            {
                "name": "classification",
                "metrics": {"factory": f"{HERE}:per_class", "better": "larger"},
            },
            r"the metric 'per_class' gave \(3,\) numbers; it must give one",
        ),
        (
            {
                "name": "classification",
                "metrics": {"factory": f"{HERE}:nothing", "better": "larger"},
            },
            r"the metric 'nothing' gave None \(NoneType\); it must give one number",
        ),
        (
            {
                "name": "classification",
                "metrics": {"factory": f"{HERE}:Top", "better": "larger", "classes": 3},
            },
            "the metric 'Top' does not take these arguments",
        ),
        (
            {"name": "classification", "metrics": {"name": "f1", "averag": "macro"}},
            "the metric 'f1'",
        ),
    ],
)
def test_what_is_wrong_with_them_is_one_sentence_before_training(task: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        rehearse(candidate(task))
    assert "\n" not in str(caught.value)


def of_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    """As torch's users write it, of logits (N, length, classes)."""
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def test_functions_of_the_users_see_the_logits_of_tokens_as_the_network_gives_them() -> None:
    options = TokenClassification.model_validate(
        {
            "name": "tokens",
            "loss": {"factory": f"{HERE}:of_tokens"},
            "metrics": [{"factory": f"{HERE}:of_tokens", "better": "smaller"}, "accuracy"],
        }
    )
    targets = torch.randint(0, 3, (6, 5))
    active = options.attach(targets, options.encode(targets, outputs=3))
    logits = torch.randn(6, 5, 3)
    wanted = of_tokens(logits, targets)
    assert torch.allclose(active.loss(logits, targets), wanted)
    tally = active.tally()
    active.count(tally, logits, targets)
    found = active.scores(tally.state().tolist())
    assert found["val_of_tokens"] == pytest.approx(float(wanted))
    assert found["val_accuracy"] == pytest.approx(
        float((logits.argmax(-1) == targets).float().mean())
    )
