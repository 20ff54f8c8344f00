"""A training loop of the user's as the training of a candidate: a function that is called with a
`Trial`, in a thread that waits whenever it has reported."""

import inspect
import io
import math
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import TrialFailure, UserError, shorten
from slimfront.trainables.importing import import_by_path
from slimfront.trainables.training.finishing import Number
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.ranks import Solo
from slimfront.trainables.training.slimming import Slimming, unwrapped

Function = Callable[..., object]


class Stopped(BaseException):
    """The search goes on without this trial: raised in the user's function by `Trial.report`."""


class Trial:
    """What a training function of the user's is given.

    ```python
    def train(trial: sf.Trial, lr: float = 1e-3) -> None:
        optimizer = torch.optim.AdamW(trial.network.parameters(), lr)
        slim = trial.slimming(optimizer, steps=trial.epochs * trial.steps_per_epoch)
        for epoch in trial.epochs_to_come:
            for inputs, targets in trial.batches():
                loss = trial.loss(trial.network(inputs), targets) + slim.loss()
                optimizer.zero_grad()
                loss.backward()
                slim.before_step()
                optimizer.step()
                slim.after_step()
            trial.report(epoch, state=optimizer.state_dict(), train_loss=float(loss))
    ```
    """

    def __init__(self, training: "OwnTraining") -> None:
        self._training = training

    @property
    def network(self) -> nn.Module:
        """The network of this candidate, on its device, with the weights that it starts from, or
        those of the checkpoint that the trial goes on from."""
        return self._training.model

    @property
    def candidate(self) -> Candidate:
        """All that the config and the search say of this candidate."""
        return self._training.asked

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._training.device

    @property
    def seed(self) -> int:
        """Of this trial; torch's own random numbers begin with it."""
        return self._training.seed

    @property
    def epochs(self) -> int:
        """`training.epochs` of the config."""
        return self._training.options.epochs

    @property
    def epochs_to_come(self) -> range:
        """The numbers of the epochs that are not trained yet, the first of all being 1."""
        return range(self._training.epoch + 1, self.epochs + 1)

    @property
    def steps_per_epoch(self) -> int:
        """How many batches `batches` has."""
        return self._training.steps_per_epoch()

    @property
    def resume_state(self) -> Any:
        """What was given to `report` as `state` in the checkpoint that the trial goes on from; None
        if it begins."""
        return self._training.own_state

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch of the training examples, shuffled, in batches of `training.batch_size`: inputs
        as the network sees them, with the data's augmentation, and targets, on the device."""
        training = self._training
        order = torch.randperm(len(training.taught.train.targets), generator=training.shuffler)
        chosen = order.to(training.taught.train.targets.device).split(training.options.batch_size)
        for batch in training.taught.batches(chosen):
            yield training._prepared(batch)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The task's loss of a batch, a scalar, with the teacher's share where the config has
        `distill`."""
        return self._training.taught.task.loss(outputs, targets)

    def evaluate(self, network: nn.Module | None = None) -> dict[str, float]:
        """The task's metrics on the validation split, of the network or of another."""
        data = self._training.data
        return data.task.evaluate(network or self.network, *data.validation, prepare=data.prepare)

    def slimming(self, optimizer: torch.optim.Optimizer, steps: int, **options: Any) -> Slimming:
        """The candidate's penalties and sparsifier at work on the network; where the trial goes on
        from a checkpoint, so do they.

        Args:
            steps: how many steps the optimiser takes in the whole training.
            options: as of `Slimming`: `steps_per_epoch`, `output`.
        """
        return self._training.slimmed(optimizer, steps, options)

    def report(
        self,
        epoch: int,
        *,
        state: Any = None,
        network: nn.Module | None = None,
        **metrics: float,
    ) -> None:
        """Ends an epoch: the network is measured as it would ship, becomes a candidate for the
        front, and is kept; the trial may be stopped here, by an exception that only `finally` and
        `with` should see.

        Args:
            epoch: its number, from 1.
            state: what the function needs to go on after it, such as the optimiser's state; tensors
                and plain data, which `resume_state` gives back.
            network: what is measured instead of the network, such as an average of its weights.
            metrics: further numbers for the record, such as `train_loss`.

        Raises:
            UserError: if the epoch is not after the last one, or `state` is no plain data.
        """
        self._training.reported(epoch, state, network, metrics)


class OwnTraining(Training):
    """The training of one candidate by a function of the user's; see `Training`."""

    def __init__(
        self, candidate: Candidate, device: torch.device | str = "cpu", ranks: Solo | None = None
    ) -> None:
        """Raises UserError as `Training`, and if there is no such function."""
        own = {"cuda_graphs": False, "compile": False}
        plain = candidate.model_copy(
            update={
                "penalties": {},
                "sparsifier": None,
                "training": candidate.training.model_copy(update=own),
            }
        )
        super().__init__(plain, device, ranks)
        self.asked = candidate
        self.function = function_of(candidate)
        self.threads = torch.get_num_threads()
        self.own_state: Any = None
        self.slim: Slimming | None = None
        self.resumed: Mapping[str, Any] | None = None
        """What the checkpoint has of `slim`, for when that is made."""
        self.reporting: nn.Module | None = None
        self.metrics: dict[str, Number] = {}
        self.thread: threading.Thread | None = None
        self.ended = False
        self.error: BaseException | None = None
        self.turn = threading.Semaphore(0)
        self.reports = threading.Semaphore(0)
        self.stopping = False

    @property
    def done(self) -> bool:
        """Whether the function has returned, or reported its last epoch."""
        return self.ended or self.epoch >= self.options.epochs

    def run_epoch(self) -> dict[str, Number]:
        """Lets the function go on to its next report; gives the epoch and the metrics of that, or
        nothing if it returns first.

        Raises:
            TrialFailure: if a metric is not finite, or the function returns without a report.
        """
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True, name="training")
            self.thread.start()
        self.metrics = {}
        self.turn.release()
        self.reports.acquire()
        if self.error is not None:
            raise self.error
        self._check_what_acts()
        if not self.metrics:
            if self.epoch == 0:
                raise TrialFailure(
                    f"{self.asked.training.factory} returned without a report; call "
                    "trial.report(epoch) after each epoch"
                )
            return {}
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise TrialFailure(f"diverged: {name} is {value} in epoch {self.epoch}")
        return self.metrics

    def _check_what_acts(self) -> None:
        sparsifier = self.asked.sparsifier
        on = [f"penalties.{name}" for name, one in self.asked.penalties.items() if one.on]
        if sparsifier is not None and sparsifier.on:
            on.append("the sparsifier")
        if on and self.slim is None:
            raise TrialFailure(
                f"the config has {' and '.join(on)}, and {self.asked.training.factory} did not "
                "call trial.slimming, so that nothing of it acts"
            )
        if on and self.slim is not None and self.slim.step == 0:
            raise TrialFailure(
                f"the config has {' and '.join(on)}, and {self.asked.training.factory} did not "
                "call slim.after_step() after the optimiser's steps, so that nothing of it acts"
            )

    def _run(self) -> None:
        """The function, in its thread."""
        self.turn.acquire()
        torch.set_num_threads(self.threads)
        try:
            if not self.stopping:
                torch.manual_seed(self.seed + self.epoch)
                self.model.train()
                self.function(Trial(self), **self.asked.training.args)
        except Stopped:
            pass
        except SystemExit as leaving:
            if leaving.code:
                self.error = leaving
        except BaseException as error:
            self.error = error
        self.ended = True
        self.reports.release()

    def reported(
        self, epoch: int, state: Any, network: nn.Module | None, metrics: Mapping[str, float]
    ) -> None:
        """See `Trial.report`; called in the function's thread, which waits here."""
        if self.stopping or self.epoch >= self.options.epochs:
            raise Stopped
        epochs = self.options.epochs
        if isinstance(epoch, bool) or not isinstance(epoch, Integral) or not 1 <= epoch <= epochs:
            raise UserError(
                f"trial.report: the epoch is {epoch!r}; it must be a whole number from 1 to "
                f"{epochs}, which is training.epochs"
            )
        epoch = int(epoch)
        if epoch <= self.epoch:
            raise UserError(
                f"trial.report: epoch {epoch} comes after epoch {self.epoch}; epochs count from 1, "
                "and trial.epochs_to_come are those that are left"
            )
        _check_plain(state)
        numbers = _numbers(metrics)
        self.epoch = epoch
        self.own_state = state
        self.reporting = None
        if network is not None:
            self.reporting = unwrapped(network)
        self.metrics = {"epoch": epoch, **numbers}
        self.reports.release()
        self.turn.acquire()
        if self.stopping:
            raise Stopped

    def slimmed(
        self, optimizer: torch.optim.Optimizer, steps: int, options: Mapping[str, Any]
    ) -> Slimming:
        """See `Trial.slimming`."""
        inputs, targets = self._examples(self.options.batch_size)
        self.slim = Slimming(
            self.model,
            optimizer,
            inputs,
            steps=steps,
            penalties=self.asked.penalties,
            sparsifier=self.asked.sparsifier,
            targets=targets,
            loss=self.taught.task.loss,
            seed=self.seed,
            trained=self.candidate.model.weights is not None,
            **({"steps_per_epoch": self.steps_per_epoch()} | dict(options)),
        )
        if self.resumed is not None:
            self.slim.load_state_dict(self.resumed)
        return self.slim

    def finish(self, *arguments: Any, **options: Any) -> Any:
        """As of `Training`, of the network that was reported."""
        own = self.model
        try:
            self.model = self.reporting or own
            return super().finish(*arguments, **options)
        finally:
            self.model = own

    def close(self) -> None:
        """Ends the function, which is told by an exception where it reports."""
        # After its last epoch the function goes on to its end.
        self.stopping = self.epoch < self.options.epochs
        if self.thread is not None and not self.ended:
            self.turn.release()
            self.thread.join(timeout=60)
        if self.slim is not None:
            self.slim.close()
        super().close()

    def state_dict(self) -> dict[str, Any]:
        """As of `Training`, with the function's own state."""
        slimming = self.slim.state_dict() if self.slim is not None else None
        return super().state_dict() | {"own": self.own_state, "slimming": slimming}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The function goes on after the epoch that was reported last."""
        super().load_state_dict(state)
        self.own_state = state["own"]
        if state["slimming"] is not None:
            self.resumed = state["slimming"]


def function_of(candidate: Candidate) -> Function:
    """The user's function that trains. Raises UserError if there is none at that import path, or it
    does not take a trial and `training.args`."""
    path = str(candidate.training.factory)
    function = import_by_path(path, "training factory")
    _check_arguments(function, path, candidate.training.args)
    return function


def _check_arguments(function: Function, path: str, given: Mapping[str, Any]) -> None:
    """Raises UserError if a function does not take a trial and these arguments."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # of one that is not written in Python
        return
    try:
        signature.bind(None, **given)
    except TypeError as error:
        raise UserError(
            f"training.factory '{path}' is called with the trial and training.args, and {error}; "
            f"it is {path.rpartition(':')[2]}{signature}"
        ) from None


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an epoch. Raises UserError for one that is no number, by name."""
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            kind = type(value).__name__
            raise UserError(
                f"trial.report: a metric is a number, and '{name}' is {shorten(repr(value))} "
                f"({kind})"
            ) from None
    return found


def _check_plain(state: Any) -> None:
    if state is None:
        return
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(
            f"trial.report: state is no tensors and plain data ({type(error).__name__}); give what "
            "state_dict() returns"
        ) from None


def training_of(
    candidate: Candidate, device: torch.device | str = "cpu", ranks: Solo | None = None
) -> Training:
    """The training of a candidate: ours, or by the user's function."""
    if candidate.training.factory is None:
        return Training(candidate, device, ranks)
    return OwnTraining(candidate, device, ranks)
