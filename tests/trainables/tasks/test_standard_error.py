"""Standard errors against formulas and a slow bootstrap, and by how often they cover the truth."""

import math
import statistics

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.tasks import TASKS, Classification
from slimfront.trainables.tasks.active import ActiveTask
from slimfront.trainables.tasks.standard_error import standard_error
from slimfront.trainables.training.loop import Training
from tests.trainables.tasks.made import JOBS
from tests.trainables.tasks.test_conformance import candidate


def classification(targets: Tensor, **options: object) -> ActiveTask:
    task = Classification.model_validate(options)
    encoded = task.encode(targets)
    return task.attach(encoded.targets, encoded)


def guesses(count: int, right: float, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of two classes that are right with this probability, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 2
    correct = torch.rand(count, generator=generator) < right
    guessed = torch.where(correct, targets, 1 - targets)
    return nn.functional.one_hot(guessed, 2).float(), targets


def test_that_of_an_accuracy_is_the_binomial_one() -> None:
    logits, targets = guesses(400, 0.9, 0)
    share = float((logits.argmax(1) == targets).double().mean())
    found = standard_error(classification(targets), nn.Identity(), logits, targets)
    assert found == pytest.approx(math.sqrt(share * (1 - share) / 400), rel=0.15)


def test_that_of_a_mean_squared_error_is_that_of_a_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(500, generator=generator)
    outputs = targets + torch.randn(500, generator=generator)
    options = TASKS.parse_named({"name": "regression", "metrics": ["mse"], "standardise": False})
    encoded = options.encode(targets)
    task = options.attach(encoded.targets, encoded)
    found = standard_error(task, nn.Identity(), outputs.unsqueeze(1), encoded.targets)
    squares = (outputs - targets).square()
    assert found == pytest.approx(float(squares.std()) / math.sqrt(500), rel=0.15)


@pytest.mark.parametrize("metrics", [["accuracy"], ["auroc"], ["f1"]])
def test_four_times_the_examples_halve_it(metrics: list[str]) -> None:
    errors = []
    for count in (200, 800):
        logits, targets = guesses(count, 0.8, 2)
        task = classification(targets, metrics=metrics)
        errors.append(standard_error(task, nn.Identity(), logits, targets))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.25)


def test_two_of_them_cover_the_truth_about_as_often_as_they_should() -> None:
    covered = 0
    for seed in range(60):
        logits, targets = guesses(300, 0.9, seed)
        share = float((logits.argmax(1) == targets).double().mean())
        error = standard_error(classification(targets), nn.Identity(), logits, targets)
        covered += abs(share - 0.9) <= 1.96 * error
    assert 0.85 <= covered / 60 <= 1


@pytest.mark.parametrize("job", JOBS)
def test_that_of_every_task_is_about_that_of_evaluations_on_samples(job: str) -> None:
    training = Training(candidate(job))
    training.run_epoch()
    data, task = training.data, training.data.task
    inputs, targets = data.validation
    found = standard_error(task, training.model, inputs, targets, prepare=data.prepare)
    key = f"val_{task.quality.name}"
    values = []
    for draw in range(60):
        generator = torch.Generator().manual_seed(draw)
        drawn = torch.randint(len(targets), (len(targets),), generator=generator)
        scores = task.evaluate(training.model, inputs[drawn], targets[drawn], prepare=data.prepare)
        values.append(scores[key])
    training.close()
    assert found > 0
    assert found == pytest.approx(statistics.stdev(values), rel=0.35)


def test_one_example_has_none() -> None:
    logits, targets = guesses(2, 1.0, 0)
    task = classification(targets)
    assert math.isnan(standard_error(task, nn.Identity(), logits[:1], targets[:1]))
