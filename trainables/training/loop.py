"""Trains one candidate with torch alone: epochs under penalties and a sparsifier, and then what
`finishing` does."""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import Dataset, Split, load_once
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.gpu import to_device
from slimfront.trainables.models import built
from slimfront.trainables.precision import check_bf16
from slimfront.trainables.sparsifiers import ActiveSparsifier, Setting
from slimfront.trainables.sparsifiers.base import computed_weights, prunable_weights
from slimfront.trainables.structure.graph import Layer, inner_layers, trace
from slimfront.trainables.training.compiled import Compiled, pays_back
from slimfront.trainables.training.finishing import Finishing, Number, Trained
from slimfront.trainables.training.layout import (
    align_gradients,
    align_state,
    ambiguous_strides,
    channels_last,
    contiguous_copy,
)
from slimfront.trainables.training.losses import Losses
from slimfront.trainables.training.optimizers import build_optimizer, scheduled, set_lr, take_step
from slimfront.trainables.training.ranks import Solo
from slimfront.trainables.training.refit import Refit, refit
from slimfront.trainables.training.step_graphs import StepGraphs, step_graphs

REPORT_STEPS = 2000
"""With `training.report_every: auto`, a report comes after so many steps, at the end of an epoch:
of work, not of time, so that the networks which a search measures are the same on any machine."""

_AUGMENTATION_STREAM = 0x9E3779B97F4A7C15
"""Added to a training's seed for its augmentation, which must not repeat the numbers that shuffle
the batches."""

_EXAMPLES_STREAM = 0xBB67AE8584CAA73B
"""The same for the examples that a sparsifier looks at before training."""


class Training:
    """The training of one candidate, epoch by epoch; its state can be saved after each and
    continued bit-exactly.

    Nothing of it is global: the seed decides the initial weights, the order of the batches and
    augmentation, through generators of its own, so a process can run one training after another
    with the same results as fresh processes.
    """

    def __init__(
        self, candidate: Candidate, device: torch.device | str = "cpu", ranks: Solo | None = None
    ) -> None:
        """`ranks` are the processes that share the training, this one alone if None.

        Raises UserError if the candidate asks for what its network cannot do (a layer penalty on an
        untraceable one), or the device (bfloat16 on an old GPU).
        """
        self.candidate = candidate
        self.options = candidate.training
        self.device = torch.device(device)
        if self.options.bf16:
            check_bf16(self.device)
        self.ranks = ranks or Solo()
        self.data: Dataset = load_once(candidate.data, self.device, candidate.task)
        self.epoch = 0
        self.step = 0
        self.parts = 1
        self.finishing = Finishing(candidate, self.data)
        seed = self.options.seed or 0
        self.shuffler = torch.Generator().manual_seed(seed)
        self.augmenter = torch.Generator().manual_seed((seed + _AUGMENTATION_STREAM) % 2**63)
        with torch.random.fork_rng(devices=self._gpus()):
            torch.manual_seed(seed)  # torch's initialisers know only the global generator
            self.model = built(candidate.model, self.data)
            self.rng_state = self._rng_state()
        _refuse_computed_weights(candidate, self.model)
        self.model.to(self.device)
        options = self.options
        if options.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = list(self.model.parameters())
        self.ambiguous = ambiguous_strides(self.parameters) if options.channels_last else []
        self.optimizer = build_optimizer(
            options.optimizer, self.parameters, options.lr, options.momentum, options.weight_decay
        )
        sample = self.data.prepare(self.data.train.inputs[:8])
        self.inner = _inner_layers(self.model, sample)
        self.penalty_options = [p for p in candidate.penalties.values() if p.on]
        self.penalties = [options.attach(self.model, sample) for options in self.penalty_options]
        self.sparsifier: ActiveSparsifier | None = None
        if candidate.sparsifier and candidate.sparsifier.on:
            setting = Setting(
                self.model,
                self.optimizer,
                self._total_steps(),
                seed,
                self._examples,
                self.data.task.loss,
                self.ranks.broadcast_from_rank0,
            )
            self.sparsifier = candidate.sparsifier.attach(setting)
        self.losses: nn.Module | None = None
        self.compiles = None if options.compile == "auto" else options.compile
        self.weights = list(prunable_weights(self.model).values())
        self.statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        self.means = torch.zeros(2, dtype=torch.float64, device=self.device)
        """The mean task loss and the mean penalty loss of the epoch whose steps were taken last."""
        self.graphs: StepGraphs | None = step_graphs(self)

    def _examples(self, count: int) -> tuple[Tensor, Tensor]:
        """So many training examples, as they are without augmentation, drawn by the seed."""
        generator = torch.Generator().manual_seed(
            ((self.options.seed or 0) + _EXAMPLES_STREAM) % 2**63
        )
        train = self.data.train
        drawn = torch.randperm(len(train.targets), generator=generator)[:count].to(
            train.targets.device
        )
        return self.data.prepare(train.inputs[drawn]), train.targets[drawn].to(self.device)

    def _gpus(self) -> list[torch.device]:
        if self.device.type == "cuda":
            return [self.device]
        return []

    def _rng_state(self) -> dict[str, Tensor]:
        """The state of torch's global generators, by kind of device."""
        state = {"cpu": torch.get_rng_state()}
        return state | (
            {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        )

    @contextmanager
    def own_rng_state(self) -> Iterator[None]:
        """Lends torch's global generators the state of this training: dropout knows no other. They
        get theirs back."""
        with torch.random.fork_rng(devices=self._gpus()):
            torch.set_rng_state(self.rng_state["cpu"])
            if "cuda" in self.rng_state:
                torch.cuda.set_rng_state(self.rng_state["cuda"], self.device)
            yield
            self.rng_state = self._rng_state()

    def steps_per_epoch(self) -> int:
        """How many steps an epoch has."""
        return math.ceil(len(self.data.train.targets) / self.options.batch_size)

    def _total_steps(self) -> int:
        return self.steps_per_epoch() * self.options.epochs

    @property
    def report_every(self) -> int:
        """Epochs between two reports."""
        asked = self.options.report_every
        if asked == "auto":
            return math.ceil(REPORT_STEPS / self.steps_per_epoch())
        return asked

    @property
    def done(self) -> bool:
        """Whether all epochs are over."""
        return self.epoch >= self.options.epochs

    def run_epoch(self) -> dict[str, Number]:
        """Trains one epoch. On a GPU, this process waits for it once: for the metrics, at its end.

        Returns:
            `epoch` (from 1), `train_loss` (mean task loss), `penalty_loss` (mean of what penalties
            add to it), the metrics of the network in training on the validation split, such as
            `val_f1`, `sparsity` (share of zeros among the prunable weights), `active_layers` (inner
            layers that still have a negative entry), `lr`.

        Raises:
            TrialFailure: if the loss is not finite.
        """
        for _ in self.steps():
            pass
        return self.end_epoch(self.numbers().tolist())

    def steps(self) -> Generator[None]:
        """Takes the steps of an epoch, one for each item that is asked for; then `means` are known.

        Without recorded steps, torch's global random numbers are this training's until the last
        item was asked for.
        """
        self.model.train()
        order = torch.randperm(len(self.data.train.targets), generator=self.shuffler)
        self.losses = self.losses or self._shared_losses()
        if self.graphs is not None:
            self.graphs.check_addresses()
            yield from self.graphs.steps(order)
            self.means = self.graphs.means()
        else:
            yield from self._steps(to_device(order, self.data.train.targets.device))

    def _steps(self, order: Tensor) -> Generator[None]:
        task_losses, penalty_losses = [], []
        shares = [
            (len(batch), *self.ranks.share(batch)) for batch in order.split(self.options.batch_size)
        ]
        with (
            self.own_rng_state(),
            closing(self.data.batches([mine for _, mine, _ in shares])) as batches,
        ):
            self.ranks.reseed(self.options.seed or 0, self.epoch, self.augmenter)
            for (_, _, weight), batch in zip(shares, batches, strict=True):
                task_loss, penalty_loss = self._train_batch(batch, weight)
                task_losses.append(task_loss)
                penalty_losses.append(penalty_loss)
                yield
        sizes = to_device(torch.tensor([float(count) for count, _, _ in shares]), self.device)
        means = [
            (torch.stack(task_losses) * sizes).sum() / len(order),
            torch.stack(penalty_losses).mean(),
        ]
        self.ranks.average(means)
        self.means = torch.stack(means).double()

    def numbers(self) -> Tensor:
        """What `end_epoch` is to know, (n,), float64, on the device: nothing waits for it yet."""
        return torch.cat([self.means, self.counts(), self.ranks.scores(self.model, self.data)])

    @torch.no_grad()
    def counts(self) -> Tensor:
        """(2,), float64: the non-zero prunable weights, and active inner layers."""
        none = torch.zeros((), dtype=torch.int64, device=self.device)
        alive = sum((weight.count_nonzero() for weight in self.weights), none)
        active = sum((layer.active() for layer in self.inner), none)
        return torch.stack([alive, active]).double()

    def end_epoch(self, numbers: Sequence[float]) -> dict[str, Number]:
        """Counts an epoch whose steps were taken, and gives its metrics as `run_epoch` does.

        Args:
            numbers: the mean task loss, the mean of what penalties add to it, `counts`, and what
                the task makes its metrics of (`ActiveTask.scores`).

        Raises:
            TrialFailure: if the losses are not finite.
        """
        train_loss, extra_loss, alive, active, *state = numbers
        self.epoch += 1
        if not math.isfinite(train_loss + extra_loss):
            raise TrialFailure(
                f"diverged: the training loss is {train_loss + extra_loss} in epoch {self.epoch}"
            )
        entries = sum(weight.numel() for weight in self.weights)
        return {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "penalty_loss": extra_loss,
            **self.data.task.scores(state),
            "sparsity": (entries - int(alive)) / max(entries, 1),
            "active_layers": int(active),
            "lr": self.learning_rate(self.step),
        }

    def _shared_losses(self) -> nn.Module:
        """The losses, wrapped so that all ranks step alike; made late, when the state of training
        is loaded."""
        # Where memory may run out on one rank alone, the others must not wait for its gradients in
        # their backward pass.
        overlap = self.options.out_of_memory == "fail"
        sample = self.data.prepare(self.data.train.inputs[:8])
        compiled = None
        if self._compiles():
            compiled = Compiled(self.model, self._share_of_batch())
        losses = Losses(
            self.model,
            self.penalties,
            self.data.task,
            bf16=self.options.bf16,
            compiled=compiled,
        )
        wrapped = self.ranks.wrap(losses, sample, overlap=overlap)
        self.ranks.broadcast_from_rank0(self.sparsifier.masks.values() if self.sparsifier else ())
        return wrapped

    def _share_of_batch(self) -> int:
        """How many examples of a full batch are this rank's."""
        return len(self.ranks.share(torch.arange(self.options.batch_size))[0])

    def _compiles(self) -> bool:
        """Whether steps are compiled; decided once, so that a training which is resumed goes on as
        it was."""
        if self.compiles is None:
            self.compiles = self._pays_back()
        return self.compiles

    def _pays_back(self) -> bool:
        """Whether most ranks find that it pays back to compile."""
        count = self._share_of_batch()
        if len(self.data.train.targets) < self.options.batch_size:
            return False
        inputs = self.data.prepare(self.data.train.inputs[:count])
        if self.options.channels_last:
            inputs = channels_last(inputs)
        targets = self.data.train.targets[:count].to(self.device)
        found = [
            torch.tensor(
                float(self._pays_back_on(inputs, targets, self._total_steps() - self.step)),
                device=self.device,
            )
        ]
        self.ranks.average(found)
        return bool(found[0] > 0.5)

    def _pays_back_on(self, inputs: Tensor, targets: Tensor, steps: int) -> bool:
        loss = self.data.task.loss
        return pays_back(self.model, inputs, targets, loss, steps, bf16=self.options.bf16)

    def learning_rate(self, step: int) -> float:
        """The learning rate of training step `step` (from 0)."""
        progress = self.sparsifier.progress(step) if self.sparsifier else step / self._total_steps()
        return scheduled(self.options.lr, self.options.schedule, progress)

    def proximal_step(self, lr: float) -> float:
        """The step size of proximal steps: lr, and lr / (1 − momentum) for SGD, whose gradients act
        that much longer."""
        if self.options.optimizer == "sgd":
            return lr / (1 - self.options.momentum)
        return lr

    def _train_batch(self, batch: Split, weight: float) -> tuple[Tensor, Tensor]:
        """One step on the examples of `batch`, as they are stored; returns task and penalty loss,
        scalars, times `weight`."""
        lr = self.learning_rate(self.step)
        set_lr(self.optimizer, lr)
        task_loss, penalty_loss = self._gradients(batch, weight)
        self.ranks.average(self.statistics)
        self._update(None, self.proximal_step(lr))
        self.step += 1
        return task_loss, penalty_loss

    def take_prepared_step(
        self, inputs: Tensor, targets: Tensor, lr: Tensor, step_size: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step of a single process that reads nothing but tensors; `step` is not counted.

        Args:
            inputs: (N, *input_shape), what the network sees, on the device.
            targets: (N, …), there too.
            lr: the learning rate, a float32 scalar there.
            step_size: that of proximal steps, likewise.

        Returns:
            Task and penalty loss, scalars.
        """
        set_lr(self.optimizer, self.learning_rate(self.step))
        self.clear_gradients()
        losses = self._part_gradients(inputs, targets, 1.0)
        self._update(lr, step_size)
        return losses

    def _update(self, lr: Tensor | None, step_size: float | Tensor) -> None:
        """What follows the backward pass; `lr` is that of the optimiser if None."""
        if self.sparsifier:
            self.sparsifier.before_step(self.step)
        align_gradients(self.ambiguous)
        take_step(self.optimizer, lr)
        for penalty in self.penalties:
            penalty.proximal(step_size)
        if self.sparsifier:
            self.sparsifier.after_step(self.step)

    def clear_gradients(self) -> None:
        """As the optimiser's `zero_grad`, which takes longer than some backward passes."""
        for parameter in self.parameters:
            parameter.grad = None

    def _gradients(self, batch: Split, weight: float) -> tuple[Tensor, Tensor]:
        """Accumulates the gradients of the examples of `batch`, in `parts` parts; gives task and
        penalty loss, scalars.

        Where memory runs out and `training.out_of_memory` is `halve`, the batch is taken in twice
        as many parts from then on, by all ranks. The gradient is the same mean over the batch;
        batch norm and CKA-SR see the parts.
        """
        halve = self.options.out_of_memory == "halve"
        while True:
            self.clear_gradients()
            if not halve and self.parts == 1:
                return self._part_gradients(*self._prepared(batch), weight)
            short = False
            losses = [torch.zeros((), device=self.device), torch.zeros((), device=self.device)]
            try:
                count = len(batch.targets)
                for part in map(
                    Split, *(tensor.tensor_split(min(self.parts, count)) for tensor in batch)
                ):
                    share = weight * (len(part.targets) / count)
                    for total, loss in zip(
                        losses, self._part_gradients(*self._prepared(part), share), strict=True
                    ):
                        total += loss
            except torch.OutOfMemoryError:
                if not halve or self.parts >= len(batch.targets):
                    raise
                short = True
            if not (halve and self.ranks.reduce(self.parameters, short)):
                return losses[0], losses[1]
            # Outside of the handler, whose traceback keeps the tensors of the failed pass alive.
            self.parts *= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _prepared(self, part: Split) -> tuple[Tensor, Tensor]:
        """What the network sees of some examples, and their targets on the device."""
        return self.data.augmented(part.inputs, self.augmenter), to_device(
            part.targets, self.device
        )

    def _part_gradients(
        self, inputs: Tensor, targets: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        epoch = self.step / self.steps_per_epoch()
        for penalty, options in zip(self.penalties, self.penalty_options, strict=True):
            penalty.before_batch(self.step, options.scale(epoch))
        if self.options.channels_last:
            inputs = channels_last(inputs)
        assert self.losses is not None
        task_loss, penalty_loss = self.losses(inputs, targets)
        loss = task_loss
        if penalty_loss.requires_grad:
            loss = task_loss + penalty_loss
        if share == 1:
            loss.backward()
            return task_loss.detach(), penalty_loss.detach()
        (loss * share).backward()
        return task_loss.detach() * share, penalty_loss.detach() * share

    def finish(self, refit_options: Refit | None = None, *, one_shot: bool = True) -> Trained:
        """Compacts the network as it is now, refits it if asked to, measures it, prunes it further;
        `self.model` stays as it is.

        Training can go on afterwards: a network of any epoch can be measured as it would ship.

        Args:
            refit_options: the candidate's if None.
            one_shot: whether to prune it further in one shot, as the candidate says.

        Returns:
            As `Finishing.finish`, and raises as it does.
        """
        options = refit_options or self.candidate.refit

        def further(network: nn.Module) -> list[dict[str, float]]:
            with self.own_rng_state():
                return refit(
                    network,
                    self.data,
                    options,
                    optimizer=self.options.optimizer,
                    momentum=self.options.momentum,
                    batch_size=self.options.batch_size,
                    shuffler=self.shuffler,
                    augmenter=self.augmenter,
                )

        model = self.model
        if self.options.channels_last:
            model = contiguous_copy(self.model)
        return self.finishing.finish(
            model, self.epoch, further if options.epochs else None, one_shot=one_shot
        )

    def close(self) -> None:
        """Takes the penalties' hooks off the network."""
        for penalty in self.penalties:
            penalty.close()

    def state_dict(self) -> dict[str, Any]:
        """All that continuing needs: tensors and plain data only."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "parts": self.parts,
            "compiles": self.compiles,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict() if self.sparsifier else {},
            "shuffler": self.shuffler.get_state(),
            "augmenter": self.augmenter.get_state(),
            "noise": self.rng_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, bit-exactly."""
        self.epoch, self.step, self.parts = state["epoch"], state["step"], state["parts"]
        self.compiles = state.get("compiles", self.compiles)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        align_state(self.optimizer)
        if self.sparsifier:
            self.sparsifier.load_state_dict(state["sparsifier"])
        self.shuffler.set_state(state["shuffler"].cpu())
        self.augmenter.set_state(state["augmenter"].cpu())
        self.rng_state |= {
            kind: noise.cpu() for kind, noise in state["noise"].items() if kind in self.rng_state
        }


def _refuse_computed_weights(candidate: Candidate, model: nn.Module) -> None:
    acts = [f"penalties.{name}" for name, options in candidate.penalties.items() if options.on]
    acts += ["the sparsifier"] if candidate.sparsifier and candidate.sparsifier.on else []
    acts += ["compaction"] if candidate.compaction.enabled else []
    computed = computed_weights(model)
    if acts and computed:
        raise UserError(
            f"the weight of '{computed[0]}' is computed anew in every forward pass (weight_norm or "
            "another parametrisation), so "
            f"that {' and '.join(acts)} cannot act on it; build the network without it, or take it "
            "away by "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )


def _inner_layers(model: nn.Module, sample: Tensor) -> list[Layer]:
    """The layers whose activity is reported; none for a network that cannot be traced, which may
    train all the same."""
    try:
        return inner_layers(trace(model, sample))
    except UserError:
        return []
