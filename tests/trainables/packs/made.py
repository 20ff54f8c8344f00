"""Candidates for packs: a network with something for every penalty to act on, in float64, on few
examples."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from slimfront import Candidate
from slimfront.trainables.data import Data, Dataset, load_once
from slimfront.trainables.data.base import Split
from slimfront.trainables.models.resnet import BasicBlock
from slimfront.trainables.packs import Pack
from slimfront.trainables.penalties import PENALTIES
from slimfront.trainables.penalties.base import GroupPenalty
from slimfront.trainables.sparsifiers import SPARSIFIERS
from slimfront.trainables.tasks import Task
from slimfront.trainables.training.loop import Training
from tests.trainables.networks import Transformer

EXAMPLES, BATCH, EPOCHS = 74, 16, 10  # 50 steps, of which every fifth has a smaller batch
MLP = {"name": "mlp", "depth": 3, "width": 12}
CONVOLUTIONS = {"factory": "tests.trainables.packs.made:convolutions"}
TRANSFORMER = {"factory": "tests.trainables.packs.made:transformer"}

FORMS = [
    (name, form)
    for name, options in sorted(PENALTIES.items())
    for form in (("proximal", "gradient") if issubclass(options, GroupPenalty) else (None,))
]
"""Every penalty in each of its forms; those that compare features have none."""

RATES = [0.003, 0.01, 0.002]
SEEDS = [3, 1, 4]


def convolutions() -> nn.Module:
    """Convolutions, batch norms, a residual block and linear layers."""
    layers = [
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        BasicBlock(4, 4, 1),
        nn.MaxPool2d(2),
    ]
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 10),
    )


def transformer() -> nn.Module:
    """One that drops nothing at random."""
    network = Transformer(width=8, heads=2)
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return network


@lru_cache
def few_digits(options: Data, device: torch.device, task: Task | None = None) -> Dataset:
    """What `load_once` gives, but few examples of it, in float64."""
    data = load_once(options, device, task)
    few = [
        Split(s.inputs[:n].double(), s.targets[:n])
        for s, n in zip((data.train, data.validation), (EXAMPLES, 40), strict=True)
    ]
    return replace(data, train=few[0], validation=few[1])


def candidates(
    count: int = 3, model: dict[str, Any] = MLP, options: Sequence[dict[str, Any]] = (), **same: Any
) -> list[Candidate]:
    """Candidates with seeds and learning rates of their own; `options` are changes of each, `same`
    of all, to the training."""
    made = []
    for number in range(count):
        training = {
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "lr": RATES[number % 3],
            "seed": SEEDS[number % 3] + number,
        } | same
        tree: dict[str, Any] = {"model": model, "training": training}
        own = dict(options[number]) if options else {}
        tree["training"] = training | own.pop("training", {})
        made.append(Candidate.model_validate(tree | own))
    return made


def with_target(name: str, number: int) -> dict[str, Any]:
    """Options of the sparsifier `name`, another target for each number from 0 to 2."""
    options: dict[str, Any] = {"name": name} | (
        {"every": 5} if "every" in SPARSIFIERS[name].model_fields else {}
    )
    if name == "nm":
        return options | {"n": 1 + number, "start": 0.2 * number}
    return (
        options
        | {"sparsity": (0.5, 0.8, 0.3)[number]}
        | ({"rounds": 1 + number} if name == "lottery" else {})
    )


def trained_alone(
    candidate: Candidate, epochs: int | None = None
) -> tuple[Training, list[dict[str, Any]]]:
    training = Training(candidate)
    history = []
    while not training.done and training.epoch != epochs:
        history.append(training.run_epoch())
    return training, history


def trained_together(pack: Pack) -> dict[Training, list[Any]]:
    """Epoch after epoch, until all have left."""
    histories: dict[Training, list[Any]] = {member: [] for member in pack.members}
    while pack.members:
        for member, metrics in pack.run_epoch().items():
            histories[member].append(metrics)
    return histories


def assert_same(one: Training, other: Training) -> None:
    """All that is saved of two trainings is the same, numbers to 1e-5."""
    first, second = one.state_dict(), other.state_dict()
    _assert_same(first, second, "")


def _assert_same(one: Any, other: Any, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            _assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            _assert_same(*pair, f"{where}[{number}]")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(
            one, other, rtol=1e-5, atol=1e-5, msg=lambda said: f"{where}: {said}"
        )
    elif isinstance(one, float):
        assert abs(one - other) <= 1e-5 * max(1, abs(one)), where
    else:
        assert one == other, where


def assert_histories_same(one: list[Any], other: list[Any]) -> None:
    _assert_same(one, other, "history")
