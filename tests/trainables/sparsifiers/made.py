"""A network and a training on noise, for the tests of sparsifiers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.sparsifiers import SPARSIFIERS, ActiveSparsifier, Setting, Sparsifier

STEPS = 40


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 4)
    )


def examples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(count, 20, generator=generator), torch.randint(
        4, (count,), generator=generator
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def attach(
    options: Sparsifier,
    model: nn.Module | None = None,
    *,
    steps: int = STEPS,
    seed: int = 0,
    optimizer: Any = sgd,
) -> ActiveSparsifier:
    """The sparsifier on a network with a new optimiser, for a training of `steps`."""
    model = model or network()
    return options.attach(
        Setting(model, optimizer(model), steps, seed, examples, nn.functional.cross_entropy)
    )


def with_sparsity(name: str, sparsity: float, **options: Any) -> Sparsifier:
    """Options of the sparsifier `name` that meet `sparsity`, with several updates within 40
    steps."""
    if name == "nm":
        return SPARSIFIERS[name](name=name, n=1, m=round(1 / (1 - sparsity)), **options)
    every = {"every": 5} if "every" in SPARSIFIERS[name].model_fields else {}
    return SPARSIFIERS[name](name=name, sparsity=sparsity, **(every | options))


def train(
    active: ActiveSparsifier,
    steps: tuple[int, int] = (0, STEPS),
    watch: Callable[[int], None] | None = None,
) -> None:
    """Training steps on noise, as `Training` makes them."""
    model, optimizer = active.setting.model, active.setting.optimizer
    for step in range(*steps):
        generator = torch.Generator().manual_seed(step)
        inputs, labels = (
            torch.randn(16, 20, generator=generator),
            torch.randint(4, (16,), generator=generator),
        )
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        active.before_step(step)
        optimizer.step()
        active.after_step(step)
        if watch:
            watch(step)
