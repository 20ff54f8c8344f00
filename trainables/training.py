"""Trains one candidate with torch alone: epochs under penalties and a sparsifier, then compaction and measures."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainables.candidate import Candidate
from trainables.compaction import Compacted, compact
from trainables.data import Dataset, load_once
from trainables.errors import TrialFailure
from trainables.graph import has_negative_entry, inner_layers, trace
from trainables.measures import accuracy, measure
from trainables.sparsifiers.base import prunable_weights

Number = int | float

CHECKED_INPUTS = 1024
"""Compaction is checked on at most so many validation inputs: the features of all of them at once would fill a memory."""

_AUGMENTATION_STREAM = 0x9E3779B97F4A7C15
"""Added to a training's seed for its augmentation, which must not repeat the numbers that shuffle the batches."""


@dataclass(frozen=True)
class Trained:
    """A finished candidate: metrics of each epoch, the compact network, and its measures with `val_accuracy`."""

    history: list[dict[str, Number]]
    compacted: Compacted
    measures: dict[str, Number]


class Training:
    """The training of one candidate, epoch by epoch; its state can be saved after each and continued bit-exactly.

    Nothing of it is global: the seed decides the initial weights, the order of the batches and augmentation, through
    generators of its own, so a process can run one training after another with the same results as fresh processes.
    """

    def __init__(self, candidate: Candidate, device: torch.device | str = "cpu") -> None:
        """Raises UserError if the candidate asks for what its network cannot do (a layer penalty on an untraceable one)."""
        self.candidate = candidate
        self.options = candidate.training
        self.device = torch.device(device)
        self.data: Dataset = load_once(candidate.data, self.device)
        self.epoch = 0
        self.step = 0
        seed = self.options.seed or 0
        self.shuffler = torch.Generator().manual_seed(seed)
        self.augmenter = torch.Generator().manual_seed((seed + _AUGMENTATION_STREAM) % 2**63)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # torch's initialisers know only the global generator
            self.model = candidate.model.build(self.data.input_shape, self.data.classes)
        self.model.to(self.device)
        self.optimizer = self._build_optimizer()
        self.inner = inner_layers(trace(self.model))
        sample = self.data.prepare(self.data.train.inputs[:8])
        self.penalties = [p.attach(self.model, sample) for p in candidate.penalties.values() if p.strength > 0]
        self.sparsifier = candidate.sparsifier and candidate.sparsifier.attach(self.model, self._total_steps())

    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train.labels) / self.options.batch_size)

    def _total_steps(self) -> int:
        return self._steps_per_epoch() * self.options.epochs

    def _build_optimizer(self) -> torch.optim.Optimizer:
        options = self.options
        parameters = list(self.model.parameters())
        if options.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=True
            )
        adam = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
        return adam(parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True)

    @property
    def done(self) -> bool:
        """Whether all epochs are over."""
        return self.epoch >= self.options.epochs

    def run_epoch(self) -> dict[str, Number]:
        """Trains one epoch.

        Returns:
            `epoch` (from 1), `train_loss` (mean task loss), `penalty_loss` (mean of what penalties add to it),
            `val_accuracy` (of the network in training), `sparsity` (share of zeros among the prunable weights),
            `active_layers` (inner layers that still have a negative entry), `lr`.

        Raises:
            TrialFailure: if the loss is not finite.
        """
        self.model.train()
        order = torch.randperm(len(self.data.train.labels), generator=self.shuffler).to(self.data.train.labels.device)
        task_losses, penalty_losses = [], []
        for batch in order.split(self.options.batch_size):
            task_loss, penalty_loss = self._train_batch(batch)
            task_losses.append(task_loss * len(batch))
            penalty_losses.append(penalty_loss)
        self.epoch += 1
        train_loss = float(torch.stack(task_losses).sum() / len(order))
        extra_loss = float(torch.stack(penalty_losses).mean())
        if not math.isfinite(train_loss + extra_loss):
            raise TrialFailure(f"diverged: the training loss is {train_loss + extra_loss} in epoch {self.epoch}")
        weights = list(prunable_weights(self.model).values())
        zeros = sum(int((w == 0).sum()) for w in weights)
        return {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "penalty_loss": extra_loss,
            "val_accuracy": accuracy(self.model, *self.data.validation, prepare=self.data.prepare),
            "sparsity": zeros / max(sum(w.numel() for w in weights), 1),
            "active_layers": sum(has_negative_entry(inner.layer) for inner in self.inner),
            "lr": self._learning_rate(),
        }

    def _learning_rate(self) -> float:
        if self.options.schedule == "constant":
            return self.options.lr
        return self.options.lr * 0.5 * (1 + math.cos(math.pi * self.step / self._total_steps()))

    def _train_batch(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """One step on the examples at the indices `batch` (N,); returns task loss and penalty loss, scalars."""
        lr = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for penalty in self.penalties:
            penalty.before_batch(self.step)
        inputs = self.data.augmented(self.data.train.inputs[batch], self.augmenter)
        labels = self.data.train.labels[batch].to(self.device)
        task_loss = nn.functional.cross_entropy(self.model(inputs), labels)
        extra = [value for value in (penalty.loss() for penalty in self.penalties) if value is not None]
        penalty_loss = torch.stack(extra).sum() if extra else torch.zeros_like(task_loss)
        self.optimizer.zero_grad()
        (task_loss + penalty_loss if extra else task_loss).backward()
        if self.sparsifier:
            self.sparsifier.before_step()
        self.optimizer.step()
        for penalty in self.penalties:
            penalty.proximal(lr)
        if self.sparsifier:
            self.sparsifier.after_step(self.step)
        self.step += 1
        return task_loss.detach(), penalty_loss.detach()

    def finish(self) -> tuple[Compacted, dict[str, Number]]:
        """Compacts the network and measures it; `self.model` stays as it is.

        Returns:
            The compact network, and its measures with `val_accuracy` and `layers_merged`.

        Raises:
            TrialFailure: if compaction changed the outputs on the validation inputs.
        """
        inputs = self.data.prepare(self.data.validation.inputs[:CHECKED_INPUTS])
        compacted = compact(self.model, inputs, self.candidate.compaction)
        measures: dict[str, Number] = {
            "val_accuracy": accuracy(compacted.network, *self.data.validation, prepare=self.data.prepare)
        }
        measures |= measure(compacted.network, inputs)
        return compacted, measures | {"layers_merged": compacted.report.count("merged")}

    def close(self) -> None:
        """Takes the penalties' hooks off the network."""
        for penalty in self.penalties:
            penalty.close()

    def state_dict(self) -> dict[str, Any]:
        """All that continuing needs: tensors and plain data only."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict() if self.sparsifier else {},
            "shuffler": self.shuffler.get_state(),
            "augmenter": self.augmenter.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, bit-exactly."""
        self.epoch, self.step = state["epoch"], state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sparsifier:
            self.sparsifier.load_state_dict(state["sparsifier"])
        self.shuffler.set_state(state["shuffler"].cpu())
        self.augmenter.set_state(state["augmenter"].cpu())


def train(
    candidate: Candidate,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[dict[str, Number]], None] | None = None,
) -> Trained:
    """Trains, compacts and measures one candidate, in this process.

    Args:
        on_epoch: called with the metrics of each epoch, as `Training.run_epoch` returns them.

    Raises:
        TrialFailure: if the loss diverges, or compaction changes the outputs.
    """
    training = Training(candidate, device)
    history = []
    try:
        while not training.done:
            history.append(training.run_epoch())
            if on_epoch:
                on_epoch(history[-1])
        compacted, measures = training.finish()
    finally:
        training.close()
    return Trained(history, compacted, measures)
