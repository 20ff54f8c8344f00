"""Trains one candidate with torch alone: epochs under penalties and a sparsifier, and then what
`finishing` does."""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import TrialFailure
from slimfront.trainables.gpu import to_device
from slimfront.trainables.torch_internals import without_compiler
from slimfront.trainables.training.acceleration.layout import align_state, contiguous_copy
from slimfront.trainables.training.acceleration.step_graphs import step_graphs
from slimfront.trainables.training.batch_step import BatchStep
from slimfront.trainables.training.finishing import Finishing, Number, Trained
from slimfront.trainables.training.freezing import training_mode
from slimfront.trainables.training.ranks import Solo
from slimfront.trainables.training.refit import Refit, refit

REPORT_STEPS = 2000
"""With `training.report_every: auto`, a report comes after so many steps, at the end of an epoch:
of work, not of time, so that the networks which a search measures are the same on any machine."""


class Training(BatchStep):
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
        ranks = ranks or Solo()
        super().__init__(candidate, device, ranks)
        self.epoch = 0
        self.pruned = False
        """Whether a network that is not trained was pruned."""
        self.finishing = Finishing(candidate, self.data)
        self.shuffler = torch.Generator()
        self.shuffler.manual_seed(self.seed)
        self.means = torch.zeros(2, dtype=torch.float64, device=self.device)
        """The mean task loss and the mean penalty loss of the epoch whose steps were taken last."""
        self.graphs = step_graphs(self)

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
        numbers = self.numbers()
        return self.end_epoch(numbers.tolist())

    def steps(self) -> Generator[None]:
        """Takes the steps of an epoch, one for each item that is asked for; then `means` are known.

        Without recorded steps, torch's global random numbers are this training's until the last
        item was asked for.
        """
        if self.closing is not None and self.closing.begin(self.epoch):
            self._count_in_network()
            self.losses = None
        training_mode(self.network, self.options.freeze)
        targets = self.data.train.targets
        order = torch.randperm(len(targets), generator=self.shuffler)
        self.losses = self.losses or self.shared_losses()
        graphs = self.graphs
        if graphs is None:
            beside_targets = to_device(order, targets.device)
            yield from self._steps(beside_targets)
            return
        graphs.check_addresses()
        yield from graphs.steps(order)
        self.means = graphs.means()

    def _steps(self, order: Tensor) -> Generator[None]:
        ranks = self.ranks
        counts = []
        mine = []
        weights = []
        for batch in order.split(self.options.batch_size):
            share, weight = ranks.share(batch)
            count = len(batch)
            counts.append(float(count))
            mine.append(share)
            weights.append(weight)
        task_losses = []
        penalty_losses = []
        with self.own_rng_state(), closing(self.taught.batches(mine)) as batches:
            ranks.reseed(self.seed, self.epoch, self.augmenter)
            for weight, examples in zip(weights, batches, strict=True):
                task_loss, penalty_loss = self.train_batch(examples, weight)
                task_losses.append(task_loss)
                penalty_losses.append(penalty_loss)
                yield
        sizes = to_device(torch.tensor(counts), self.device)
        of_batches = torch.stack(task_losses) * sizes
        task_mean = of_batches.sum() / len(order)
        penalty_mean = torch.stack(penalty_losses).mean()
        means = [task_mean, penalty_mean]
        ranks.average(means)
        self.means = torch.stack(means).double()

    def numbers(self) -> Tensor:
        """What `end_epoch` is to know, (n,), float64, on the device: nothing waits for it yet."""
        scores = self.ranks.scores(self.network, self.data)
        counts = self.counts()
        return torch.cat([self.means, counts, scores])

    @torch.no_grad()
    def counts(self) -> Tensor:
        """(2,), float64: the non-zero prunable weights, and active inner layers."""
        alive = torch.zeros((), dtype=torch.int64, device=self.device)
        active = torch.zeros_like(alive)
        for weight in self.weights:
            nonzero = weight.count_nonzero()
            alive = alive + nonzero
        for layer in self.inner:
            is_active = layer.active()
            active = active + is_active
        counts = torch.stack([alive, active])
        return counts.double()

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
        loss = train_loss + extra_loss
        if not math.isfinite(loss):
            raise TrialFailure(f"diverged: the training loss is {loss} in epoch {self.epoch}")
        entries = sum(weight.numel() for weight in self.weights)
        zeros = entries - int(alive)
        return {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "penalty_loss": extra_loss,
            **self.data.task.scores(state),
            "sparsity": zeros / max(entries, 1),
            "active_layers": int(active),
            "lr": self.learning_rate(self.step),
        }

    def finish(self, refit_options: Refit | None = None, *, one_shot: bool = True) -> Trained:
        """Compacts the network as it is now, refits it if asked to, measures it, prunes it further;
        `self.model` stays as it is.

        Training can go on afterwards, as if this had not been: a network of any epoch can be
        measured as it would ship.

        Args:
            refit_options: if None, the candidate's, at the end or where they ask for it.
            one_shot: whether to prune it further in one shot, as the candidate says.

        Returns:
            As `Finishing.finish`, and raises as it does.
        """
        options = refit_options or self._refit_now()
        if self.options.epochs == 0 and not self.pruned:
            self.prune_untrained()
            self.pruned = True

        def further(network: nn.Module, options: Refit) -> list[dict[str, float]]:
            with self._aside(), self.own_rng_state():
                return refit(
                    network,
                    self.taught,
                    options,
                    optimizer=self.options.optimizer,
                    momentum=self.options.momentum,
                    batch_size=self.options.batch_size,
                    shuffler=self.shuffler,
                    augmenter=self.augmenter,
                    freeze=self.frozen,
                    lr_factors=self.options.lr_factors,
                    teacher=self.teacher,
                )

        model = self.network
        if self.options.channels_last:
            model = contiguous_copy(model)
        refitted = None
        if options.epochs:
            refitted = partial(further, options=options)
        candidate = self.candidate
        recovery = Refit(epochs=candidate.one_shot.recover, lr=candidate.refit.lr)
        recovered = None
        if recovery.epochs and self.done:
            recovered = partial(further, options=recovery)
        return self.finishing.finish(
            model,
            self.epoch,
            refitted,
            one_shot=one_shot,
            gone=self.closing.gone if self.closing else (),
            is_over=self.done,
            recover=recovered,
        )

    def _refit_now(self) -> Refit:
        """How a network is refitted that is reported now."""
        options = self.candidate.refit
        if self.done or options.when == "reports":
            return options
        return Refit()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What draws random numbers here does not change the training that goes on after it."""
        streams = (self.shuffler, self.augmenter)
        states = [stream.get_state() for stream in streams]
        noise = dict(self.rng_state)
        try:
            yield
        finally:
            if not self.done:
                for stream, state in zip(streams, states, strict=True):
                    stream.set_state(state)
                self.rng_state = noise

    def close(self) -> None:
        """Takes the penalties' hooks off the network."""
        self.acting.close()
        if self.matching is not None:
            self.matching.close()

    def state_dict(self) -> dict[str, Any]:
        """All that continuing needs: tensors and plain data only."""
        with without_compiler():
            optimizer = self.optimizer.state_dict()
        sparsifier = {}
        if self.sparsifier:
            sparsifier = self.sparsifier.state_dict()
        return {
            "epoch": self.epoch,
            "step": self.step,
            "parts": self.parts,
            "compiles": self.compiles,
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "sparsifier": sparsifier,
            "shuffler": self.shuffler.get_state(),
            "augmenter": self.augmenter.get_state(),
            "noise": self.rng_state,
            "closing": self.closing.state_dict() if self.closing else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, bit-exactly."""
        self.epoch = state["epoch"]
        self.step = state["step"]
        self.parts = state["parts"]
        self.compiles = state.get("compiles", self.compiles)
        self.model.load_state_dict(state["model"])
        with without_compiler():
            self.optimizer.load_state_dict(state["optimizer"])
        align_state(self.optimizer)
        if self.closing is not None:
            self.closing.load_state_dict(state["closing"], self.epoch, self.step)
            self._count_in_network()
        if self.sparsifier:
            self.sparsifier.load_state_dict(state["sparsifier"])
        shuffler = state["shuffler"]
        augmenter = state["augmenter"]
        self.shuffler.set_state(shuffler.cpu())
        self.augmenter.set_state(augmenter.cpu())
        noise = state["noise"]
        for kind, rng_state in noise.items():
            if kind in self.rng_state:
                self.rng_state[kind] = rng_state.cpu()
