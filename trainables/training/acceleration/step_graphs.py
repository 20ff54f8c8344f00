"""Steps of training recorded once as CUDA graphs, and then replayed: small networks spend their
time launching kernels.

What a step reads is on the GPU before it begins: the order of an epoch's examples, what
augmentation draws, learning rates and proximal step sizes, and counters that say where in them it
is. So a replay needs nothing from this process, and nothing waits.

Recorded are full batches, one graph for each phase of the penalties (with CKA-SR: batches that it
looks at, and others). Steps in which a sparsifier changes its masks, the last and smaller batch,
and the first few steps are taken as ever, by the same code.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Generator, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from slimfront.trainables.data.transforms import draw
from slimfront.trainables.errors import UserError, first_line_of
from slimfront.trainables.penalties.base import ActiveGroups
from slimfront.trainables.penalties.cka import ActiveFeatures
from slimfront.trainables.torch_internals import Dropout
from slimfront.trainables.training.acceleration.tables import Tables
from slimfront.trainables.training.ranks import Solo

if TYPE_CHECKING:
    from slimfront.trainables.training.loop import Training

CudaGraphs = bool | Literal["auto"]

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]

log = logging.getLogger(__name__)

WARM_UP = 3
"""So many steps of a phase are taken as ever before it is recorded: libraries choose their
algorithms in them."""

_PHASES = 8
"""At most so many phases are recorded; a penalty whose strength rises in each step has a phase in
each."""

_SEEN = 64
"""So many phases are counted that are not recorded yet."""

_AHEAD = 32
"""Augmentation is drawn for so many batches at once: one copy to the GPU for all of them."""


def record_on_gpu(take: Callable[[], None]) -> Replay:
    """Takes a step by recording it and replaying it once; what it returns takes further ones."""
    graph = torch.cuda.CUDAGraph()
    try:
        graph.capture_begin(capture_error_mode="thread_local")
        take()
    finally:
        graph.capture_end()
    graph.replay()
    return graph.replay


@dataclass(frozen=True)
class _Recorded:
    """A recorded step, and the addresses of all that it reads and writes."""

    replay: Replay
    addresses: tuple[int, ...]


class StepGraphs:
    """The steps of one training, an epoch at a time."""

    def __init__(self, training: "Training", record: Record = record_on_gpu) -> None:
        """`record` takes a step in such a way that it can be repeated; tests have one that needs no
        GPU."""
        self.training = training
        self.record = record
        self.stream: torch.cuda.Stream | None = None
        if training.device.type == "cuda":
            self.stream = torch.cuda.Stream(training.device)
        self.refusal: str | None = None
        """Why steps are no longer recorded."""
        self.recorded: dict[Hashable, _Recorded] = {}
        self.seen: Counter[Hashable] = Counter()
        self.replays = 0
        self.size = training.options.batch_size
        steps = training.steps_per_epoch()
        self.tables = Tables(training.data, self.size, steps, training.device)

    def on_stream(self) -> AbstractContextManager[object]:
        """Within, what is computed is queued behind the steps taken before, and beside what other
        trainings do."""
        if self.stream is not None:
            return torch.cuda.stream(self.stream)
        return nullcontext()

    def steps(self, order: Tensor) -> Generator[None]:
        """Takes the steps of an epoch on the examples in `order` (N,), one for each item that is
        asked for."""
        count = len(order)
        device = self.training.device
        ahead = _AHEAD * self.size
        if self.stream is not None:
            current = torch.cuda.current_stream(device)
            self.stream.wait_stream(current)
        with self.on_stream():
            self._begin(order)
        for first in range(0, count, self.size):
            with self.on_stream():
                if first % ahead == 0:
                    last = min(first + ahead, count)
                    self._draw(first, last)
                left = count - first
                size = min(self.size, left)
                self._step(size)
            yield
        if self.stream is not None:
            current = torch.cuda.current_stream(device)
            current.wait_stream(self.stream)

    def means(self) -> Tensor:
        """The mean task loss of the epoch's examples, and the mean penalty loss of its steps: (2,),
        float64."""
        return self.tables.means()

    def _begin(self, order: Tensor) -> None:
        training = self.training
        rates = []
        step_sizes = []
        for number in range(training.steps_per_epoch()):
            rate = training.learning_rate(training.step + number)
            step_size = training.proximal_step(rate)
            rates.append(rate)
            step_sizes.append(step_size)
        self.tables.begin(order, rates, step_sizes)

    def _draw(self, first: int, last: int) -> None:
        """Draws the augmentation of the examples at places `first` to `last`, batch by batch, as
        without recording."""
        training = self.training
        augment = training.data.augment
        if not augment.active:
            return
        draws = []
        for begin in range(first, last, self.size):
            left = last - begin
            size = min(self.size, left)
            drawn = draw(size, augment, training.augmenter)
            draws.append(drawn)
        self.tables.take_draws(first, last, draws)

    def _step(self, size: int) -> None:
        training = self.training
        phase = self._phase(training.step)
        sparsifier = training.sparsifier
        due = sparsifier is not None and sparsifier.due(training.step)
        recorded = self.recorded.get(phase)
        if due or size < self.size:
            self._take(size)
            self._forget_what_moved()
        elif recorded is not None:
            recorded.replay()
            self.replays += 1
        elif self._ready(phase):
            self._take_recorded(phase, size)
        else:
            self._take_watched(size)
            self._count(phase)
            self._forget_what_moved()
        training.step += 1

    def _phase(self, step: int) -> Hashable:
        """Equal for two steps in which the same is computed."""
        training = self.training
        epoch = step / training.steps_per_epoch()
        phases = []
        pairs = zip(training.penalties, training.penalty_options, strict=True)
        for penalty, options in pairs:
            scale = options.scale(epoch)
            phase = penalty.phase(step, scale)  # type: ignore[attr-defined]
            phases.append(phase)
        return tuple(phases)

    def _count(self, phase: Hashable) -> None:
        if len(self.seen) > _SEEN:
            self.seen.clear()
        self.seen[phase] += 1

    def _ready(self, phase: Hashable) -> bool:
        if self.refusal is not None:
            return False
        if len(self.recorded) >= _PHASES:
            return False
        return self.seen[phase] >= WARM_UP

    def _take(self, size: int) -> None:
        """One step that is not replayed, with the random numbers that this training has alone."""
        with self.training.own_rng_state():
            self._compute(size)

    def _compute(self, size: int) -> None:
        """One step of this training, which reads its examples and numbers from the tables, at the
        counters."""
        training = self.training
        data = training.data
        tables = self.tables
        places = tables.places(size)
        chosen = tables.order.index_select(0, places)
        drawn = tables.drawn(places)
        stored = data.train.inputs.index_select(0, chosen)
        inputs = data.varied(stored, drawn)
        all_targets = training.taught.train.targets
        targets = all_targets.index_select(0, chosen)
        lr = tables.now(tables.rates)
        step_size = tables.now(tables.step_sizes)
        losses = training.take_prepared_step(inputs, targets, lr, step_size)
        task_loss, penalty_loss = (loss.double() for loss in losses)
        tables.count(size, task_loss, penalty_loss)

    def _take_watched(self, size: int) -> None:
        """The same; finds out whether the network keeps anything in Python that a replay would not
        see."""
        if self.refusal is not None or len(self.seen) > _PHASES:
            self._take(size)
            return
        model = self.training.model
        on_gpu = self.stream is not None
        with self.training.own_rng_state():
            before = _outside(model, on_gpu)
            self._compute(size)
            changed = _outside(model, on_gpu) != before
        if changed:
            self._refuse("the network draws random numbers, or counts something, in each step")

    def _take_recorded(self, phase: Hashable, size: int) -> None:
        try:
            replay = self.record(lambda: self._compute(size))
        except (RuntimeError, torch.OutOfMemoryError) as error:  # nothing was computed
            self._refuse(f"{type(error).__name__}: {first_line_of(str(error))}")
            self._take(size)
            return
        self.training.clear_gradients()  # they lie in the graph's memory
        addresses = self._addresses()
        self.recorded[phase] = _Recorded(replay, addresses)
        self.replays += 1

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        if self.training.options.cuda_graphs is True:
            raise UserError(
                f"training.cuda_graphs: true: steps of this network cannot be recorded ({reason}); "
                "set it to auto"
            )
        log.info("training.cuda_graphs: auto: steps are not recorded: %s", reason)

    def _forget_what_moved(self) -> None:
        """Drops recordings of tensors that are no longer used, such as an optimiser's that was
        reset."""
        if not self.recorded:
            return
        addresses = self._addresses()
        for phase, recorded in list(self.recorded.items()):
            if recorded.addresses != addresses:
                del self.recorded[phase]
                del self.seen[phase]

    def check_addresses(self) -> None:
        """To be called when anything but a step may have changed the training's tensors."""
        self._forget_what_moved()

    def _addresses(self) -> tuple[int, ...]:
        training = self.training
        model = training.model
        held: list[Any] = [*model.parameters(), *model.buffers()]
        if training.sparsifier:
            held += training.sparsifier.masks.values()
        states = training.optimizer.state
        for state in states.values():
            held += state.values()
        addresses = []
        for value in held:
            if isinstance(value, Tensor):
                address = value.data_ptr()
                addresses.append(address)
        return tuple(addresses)


def why_not(training: "Training") -> str | None:
    """Why the steps of a training cannot be recorded; None if they may be."""
    if training.device.type != "cuda":
        return "it needs a GPU"
    return why_not_anywhere(training)


def why_not_anywhere(training: "Training") -> str | None:
    """The same, but for the device."""
    data = training.data
    if type(training.ranks) is not Solo:
        return "the training has several processes"
    if training.teacher is not None and not training.teacher.cached:
        return "a teacher sees each batch"
    if training.closing is not None:
        return "depth.layers changes the network while it is trained"
    if training.options.lr_factors:
        return "training.lr_factors gives parameters learning rates of their own"
    if training.options.out_of_memory == "halve":
        return "training.out_of_memory is halve"
    if data.train.inputs.device.type != training.device.type:
        return "the training data are not on the GPU"
    for module in training.model.modules():
        if isinstance(module, Dropout) and module.p > 0:
            return "the network drops at random"
    for penalty in training.penalties:
        if not isinstance(penalty, (ActiveGroups, ActiveFeatures)):
            return "a penalty acts on neither groups nor features"
    return None


def step_graphs(training: "Training") -> StepGraphs | None:
    """The recorded steps of a training, if `training.cuda_graphs` asks for them and they can be.

    Raises:
        UserError: if it is `true`, and they cannot.
    """
    wanted = training.options.cuda_graphs
    if wanted is False:
        return None
    reason = why_not(training)
    if reason is None:
        return StepGraphs(training)
    if wanted is True:
        raise UserError(
            f"training.cuda_graphs: true: steps cannot be recorded: {reason}; set it to auto or "
            "false"
        )
    if training.device.type == "cuda":
        log.info("training.cuda_graphs: auto: steps are not recorded: %s", reason)
    return None


def _outside(model: nn.Module, on_gpu: bool) -> tuple[object, ...]:
    """What a replay cannot change: random numbers of this process, and numbers that modules keep in
    Python."""
    of_torch = torch.get_rng_state()
    of_numpy: Any = np.random.get_state()[1]  # type: ignore[index]
    random_states = [of_torch.tolist(), random.getstate(), of_numpy.tolist()]
    if on_gpu:
        of_gpu = torch.cuda.get_rng_state()
        random_states.append(of_gpu.tolist())
    kept = []
    for name, module in model.named_modules():
        attributes = vars(module)
        for key, value in attributes.items():
            if isinstance(value, (bool, int, float, str)):
                kept.append((name, key, value))
    return (*random_states, kept)
