"""Refit: a short training of the compact network without penalties, zeros kept zero (arXiv
2006.15604, section 2)."""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from slimfront.trainables.data import Dataset
from slimfront.trainables.errors import TrialFailure
from slimfront.trainables.options import Options
from slimfront.trainables.training.distillation import Teacher
from slimfront.trainables.training.freezing import frozen, training_mode
from slimfront.trainables.training.optimizers import (
    OptimizerName,
    build_optimizer,
    scheduled,
    set_lr,
    take_step,
    trained_parameters,
)


class Refit(Options):
    """How the compact network is trained further: `epochs` (0: not at all), from learning rate `lr`
    down to 0 on a cosine.

    `when: end` refits the network at the end of training alone; `when: reports` a copy of each that
    is reported on the way as well, which training itself does not notice: with a penalty that
    rises (`ramp_from`), these are networks for a whole range of strengths.
    """

    epochs: int = Field(0, ge=0)
    lr: float = Field(1e-3, gt=0)
    when: Literal["end", "reports"] = "end"

    @model_validator(mode="after")
    def _what_is_refitted_has_epochs(self) -> Self:
        if self.when == "reports" and self.epochs == 0:
            raise ValueError(
                "when: reports refits each network that is reported, and epochs is 0; set epochs "
                "to 1 or more"
            )
        return self


def refit(
    network: nn.Module,
    data: Dataset,
    options: Refit,
    *,
    optimizer: OptimizerName,
    momentum: float,
    batch_size: int,
    shuffler: torch.Generator,
    augmenter: torch.Generator,
    freeze: Sequence[str] = (),
    lr_factors: Mapping[str, float] | None = None,
    teacher: Teacher | None = None,
) -> list[dict[str, float]]:
    """Trains `network` in place by the task loss alone; parameters that are exactly zero stay zero.

    Args:
        momentum: for sgd.
        shuffler: gives the order of the batches.
        augmenter: varies the training images, where the data set says so.
        teacher: gives its outputs of each batch, where `data` has none.
        freeze: names of parameters that stay as they are, as in `freezing`.
        lr_factors: of the learning rate, by names of parameters, as in `trained_parameters`.

    Returns:
        Per epoch: `train_loss`, the metrics on the validation split, and `lr`.

    Raises:
        TrialFailure: if the loss is not finite.
    """
    parameters = list(network.parameters())
    alive = [parameter.detach() != 0 for parameter in parameters]
    _unfreeze_all_but(network, freeze)
    trained = trained_parameters(network, lr_factors or {})
    steps = build_optimizer(optimizer, trained, options.lr, momentum=momentum, weight_decay=0.0)
    task = data.task
    all_targets = data.train.targets
    count = len(all_targets)
    history = []
    for epoch in range(options.epochs):
        training_mode(network, freeze)
        losses: list[Tensor] = []
        order = torch.randperm(count, generator=shuffler)
        beside_targets = order.to(all_targets.device)
        chosen = beside_targets.split(batch_size)
        with closing(data.batches(chosen)) as batches:
            for index, batch in enumerate(batches):
                share_of_epoch = index / len(chosen)
                progress = (epoch + share_of_epoch) / options.epochs
                lr = scheduled(options.lr, "cosine", progress)
                set_lr(steps, lr)
                inputs = data.augmented(batch.inputs, augmenter)
                wanted = batch.targets.to(data.device)
                if teacher is not None:
                    wanted = teacher.beside(inputs, wanted)
                outputs = network(inputs)
                loss = task.loss(outputs, wanted)
                for parameter in parameters:
                    parameter.grad = None
                loss.backward()
                take_step(steps)
                _zero(parameters, alive)
                examples = len(batch.targets)
                losses.append(loss.detach() * examples)
        total = torch.stack(losses).sum()
        train_loss = float(total / count)
        if not math.isfinite(train_loss):
            raise TrialFailure(
                f"diverged: the loss of refit is {train_loss} in its epoch {epoch + 1}"
            )
        scores = task.evaluate(network, *data.validation, prepare=data.prepare)
        history.append({"train_loss": train_loss, **scores, "lr": lr})
    network.eval()
    network.requires_grad_(True)
    return history


def _unfreeze_all_but(network: nn.Module, freeze: Sequence[str]) -> None:
    """Has all parameters trained but those that are frozen. Raises TrialFailure if none is left."""
    network.requires_grad_(True)
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if frozen(name, freeze):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise TrialFailure("all that is left of the network is frozen, and refit.epochs is not 0")


@torch.no_grad()
def _zero(parameters: Sequence[Tensor], alive: Sequence[Tensor]) -> None:
    """Sets what is not `alive` to zero."""
    for parameter, mask in zip(parameters, alive, strict=True):
        parameter.mul_(mask)
