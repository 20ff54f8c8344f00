"""What becomes of a network when its training is over: it is made compact, refitted, measured, and
pruned further."""

import bisect
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.compaction import Compacted, compact
from slimfront.trainables.compaction.report import Step
from slimfront.trainables.data import Dataset, Split
from slimfront.trainables.depth import shallower
from slimfront.trainables.errors import TrialFailure
from slimfront.trainables.inputs import each
from slimfront.trainables.measures.latency import SPEEDS
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.measures.own import OwnMeasure
from slimfront.trainables.models import built
from slimfront.trainables.penalties.features import remove_hooks
from slimfront.trainables.shipping.formats import write_onnx
from slimfront.trainables.shipping.int8 import Int8, as_int8
from slimfront.trainables.shipping.stopwatch import Stopwatch
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.targets.still import stilled
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.training.one_shot import Pruning
from slimfront.trainables.training.rivals import Rivals

log = logging.getLogger(__name__)

Number = int | float
Numbers = Mapping[str, float]
Measures = dict[str, Number]
"""What is known of a network, by name: its sizes, times and metrics."""
History = list[dict[str, Number]]
"""The metrics of each epoch."""
FurtherTraining = Callable[[nn.Module], list[dict[str, float]]]
"""Trains a compact network further, in place, and gives the metrics of each epoch."""

ONE_SHOT_SHARE = "one_shot_share"
"""The measure of a network that was pruned in one shot: the share of the weights that it kept."""
RECOVERY_EPOCHS = "recovery_epochs"
"""The measure of a network that was trained further by itself, beside the training that it comes
from: for how many epochs."""
CHECKED_INPUTS = 1024
"""Compaction is checked on at most so many validation inputs: the features of all of them at once
would fill a memory."""
CHECKED_AGAIN = 64
"""On so many, if it is that of a network which was pruned in one shot: the network that it was made
of was checked on more."""

PRUNING_GAINS = 0.01
"""No network gains as much by being pruned: as a tolerance, in the unit of a metric in [0, 1]."""


@dataclass(frozen=True)
class Trained:
    """A finished candidate: metrics of each epoch, the compact network, and its measures with the
    metrics of the validation split."""

    history: History
    compacted: Compacted
    measures: Measures
    step: int = 0
    """Its number among those that were pruned in one shot, from 1; those that the front beats
    count, and are not there."""
    pruned: tuple["Trained", ...] = ()
    """The same network pruned further and further in one shot, where the candidate asks for it;
    their histories are empty."""


class Finishing:
    """Finishes networks of one candidate, of any epoch."""

    def __init__(self, candidate: Candidate, data: Dataset) -> None:
        """`data` is on the device of the networks."""
        self.candidate = candidate
        self.data = data
        self.rivals = Rivals()
        """What need not be evaluated is what they beat."""
        self._stopwatch: Stopwatch | None = None
        self.told: set[str] = set()
        """The layers whose zero units were warned of: once, and not for each network."""

    def finish(
        self,
        model: nn.Module,
        epoch: int,
        refit: FurtherTraining | None,
        *,
        one_shot: bool,
        gone: Sequence[Step] = (),
        is_over: bool = True,
        recover: FurtherTraining | None = None,
    ) -> Trained:
        """Compacts the network as it is now, refits it if asked to, measures it, prunes it further;
        `model` stays as it is.

        Args:
            epoch: how many epochs it was trained for.
            refit: trains the compact network; None: it is not.
            one_shot: whether to prune it further in one shot, as the candidate says.
            gone: the layers that went while it was trained.
            is_over: whether its training is, so that whole layers go, as the candidate says.
            recover: as `refit`, of each network that was pruned in one shot.

        Returns:
            The compact network, its measures with metrics and `layers_merged`, and the metrics of
            the refit, as epochs that go on counting from those of training; of a refit on the way,
            its measures have their number alone.

        Raises:
            TrialFailure: if compaction changed the outputs on the validation inputs, or refit
                diverges.
        """
        inputs = self._checked_inputs(self.data.validation)
        model = stilled(model, inputs)
        if is_over and self.candidate.depth.cuts:
            compacted, history = self._shallower(model, inputs, epoch, refit)
            sizes: Numbers = compacted.report.after
        else:
            compacted = compact(model, inputs, self.candidate.compaction, self.told)
            compacted = _told_first(gone, compacted)
            remove_hooks(compacted.network)
            compacted, history = _refitted_if_it_can(compacted, epoch, refit, is_over=is_over)
            sizes = compacted.report.after
            if history:
                sizes = measure(compacted.network, inputs)
        network = compacted.network
        report = compacted.report
        measures = self._measures(network, inputs, sizes)
        if history and not is_over:
            measures[RECOVERY_EPOCHS] = len(history)
            history = []
        measures["layers_merged"] = report.count("merged")
        trained = Trained(history, compacted, measures)
        if not one_shot:
            return trained
        pruned = tuple(self._numbered(trained, recover))
        return replace(trained, pruned=pruned)

    def _shallower(
        self, model: nn.Module, inputs: Tensor, epoch: int, refit: FurtherTraining | None
    ) -> tuple[Compacted, History]:
        """The network without whole layers, refitted, and made compact then: while its batch norms
        are there, it bears the learning rates of training, and more of what went comes back."""
        candidate = self.candidate
        shallow, gone = shallower(
            model,
            self.data,
            candidate.depth,
            candidate.latency,
            at_most=True,
            compaction=candidate.compaction,
        )
        remove_hooks(shallow)
        history = _refitted(shallow, epoch, refit)
        compacted = compact(shallow, inputs, self.candidate.compaction, self.told)
        return _told_first(gone, compacted), history

    def _checked_inputs(self, split: Split) -> Tensor:
        """What the network sees of the first examples of a split."""
        stored = split.inputs[:CHECKED_INPUTS]
        return self.data.prepare(stored)

    def _numbered(self, trained: Trained, recover: FurtherTraining | None) -> Iterator[Trained]:
        """The network pruned in one shot, but for what the front beats."""
        options = self.candidate.one_shot
        if options.steps == 0:
            return
        pruning = self._pruning(trained)
        levels = pruning.levels(options)
        beaten = 0
        if recover is None:
            beaten = self._beaten(pruning, levels, trained)
        good = levels[beaten - 1] if beaten else pruning.alive
        further = self._pruned(pruning, levels[beaten:], good, trained, recover)
        for step, found in enumerate(further, start=beaten + 1):
            yield replace(found, step=step)

    def _pruned(
        self,
        pruning: Pruning,
        levels: Sequence[int],
        good: int,
        trained: Trained,
        recover: FurtherTraining | None,
    ) -> Iterator[Trained]:
        """Networks with so many weights, each one compacted and measured, until it is not worth
        measuring any more, and one between the smallest as good, if not the one with `good`
        weights, and the first that is not."""
        bad = 0
        for kept in levels:
            found = self._worth_it(pruning, kept, trained, recover)
            if found is not None:
                yield found
            as_good = found is not None and self._as_good(found.measures, trained)
            if not bad and as_good:
                good = kept
            else:
                bad = bad or kept
            if found is None:
                break
        if not bad:
            return
        kept = self._refined(pruning, trained, (good, bad))
        if kept == good:
            return
        found = self._worth_it(pruning, kept, trained, recover)
        if found is not None:
            yield found

    def _beaten(self, pruning: Pruning, levels: Sequence[int], trained: Trained) -> int:
        """How many of the levels need not be evaluated, which are the largest: their networks could
        not join the front if they were better than what they are made of by a tolerance, or by
        `PRUNING_GAINS`."""
        if self.candidate.int8 or not self.rivals.networks:
            return 0
        return bisect.bisect(levels, 0, key=lambda kept: self._survives(pruning, kept, trained))

    def _survives(self, pruning: Pruning, kept: int, trained: Trained) -> bool:
        inputs = self._checked_inputs(self.data.validation)
        task = self.data.task
        try:
            compacted = self._compacted(pruning.at(kept, corrected=False), inputs)
        except TrialFailure:
            return True  # found out, and told, where it is evaluated
        gain = max(self.candidate.tolerance, PRUNING_GAINS)
        at_best = task.at_best(trained.measures, gain)
        return not self.rivals.beat(task.quality, at_best, compacted.report.after)

    def _compacted(self, pruned: nn.Module, inputs: Tensor) -> Compacted:
        few = inputs[:CHECKED_AGAIN]
        return compact(pruned, few, self.candidate.compaction, self.told)

    def _pruning(self, trained: Trained) -> Pruning:
        inputs = self._checked_inputs(self.data.train)
        correct = self.candidate.one_shot.correct
        return Pruning(trained.compacted.network, inputs, correct=correct)

    def _refined(self, pruning: Pruning, trained: Trained, between: tuple[int, int]) -> int:
        """The fewest weights that `refine` halvings between a number that is as good and one that
        is not find as good; judged before compaction, which keeps what a network computes."""
        good, bad = between
        for _ in range(self.candidate.one_shot.refine):
            kept = (good + bad) // 2
            if kept in (good, bad):
                break
            scores = self._scores(pruning.at(kept))
            if self._as_good(scores, trained):
                good = kept
            else:
                bad = kept
        return good

    def pruned_to(self, trained: Trained, share: float) -> Trained:
        """A finished network pruned in one shot to a share of its weights, compacted and measured,
        however bad it is. Raises TrialFailure if it cannot be compacted."""
        pruning = self._pruning(trained)
        wanted = round(pruning.alive * share)
        kept = max(1, wanted)
        return self._smaller(pruning, kept, trained, None)

    def _as_good(self, scores: Numbers, trained: Trained) -> bool:
        task = self.data.task
        tolerance = self.candidate.tolerance
        return task.about_as_good(scores, trained.measures, tolerance)

    def _worth_it(
        self,
        pruning: Pruning,
        kept: int,
        trained: Trained,
        recover: FurtherTraining | None,
    ) -> Trained | None:
        """A network pruned in one shot to so many weights, compacted and measured; None if its
        quality is half of what it was, or less."""
        task = self.data.task
        if recover is not None and not self.candidate.int8:
            scores = self._scores(pruning.at(kept))
            if not task.worth_going_on(scores, trained.measures):
                return None  # before it is trained further
        try:
            smaller = self._smaller(pruning, kept, trained, recover)
        except TrialFailure:
            return None  # nearly nothing is left of its outputs
        if not task.worth_going_on(smaller.measures, trained.measures):
            return None
        return smaller

    def _smaller(
        self,
        pruning: Pruning,
        kept: int,
        trained: Trained,
        recover: FurtherTraining | None,
    ) -> Trained:
        """A network pruned in one shot to so many weights, compacted, recovered and measured."""
        inputs = self._checked_inputs(self.data.validation)
        compacted = self._compacted(pruning.at(kept), inputs)
        network = compacted.network
        report = compacted.report
        sizes: Numbers = report.after
        epochs = 0
        if recover:
            history = recover(network)
            epochs = len(history)
        if epochs:
            sizes = measure(network, inputs)
        measures = self._measures(network, inputs, sizes)
        if epochs:
            measures[RECOVERY_EPOCHS] = epochs
        merged = trained.measures["layers_merged"] + report.count("merged")
        measures["layers_merged"] = merged
        measures[ONE_SHOT_SHARE] = kept / pruning.alive
        return Trained([], compacted, measures)

    def _scores(self, network: nn.Module) -> dict[str, float]:
        """The metrics on the validation split."""
        data = self.data
        task = data.task
        return task.evaluate(network, *data.validation, prepare=data.prepare)

    def _measures(self, network: nn.Module, inputs: Tensor, sizes: Numbers) -> Measures:
        """Metrics, `sizes`, and what else the candidate asks for; of the int8 network, where that
        is to ship."""
        found: Measures = {}
        if not self.candidate.int8:
            found |= self._scores(network)
            found |= sizes
            found |= self._extra_measures(network, inputs)
            return found
        int8 = self._as_int8(network)
        found |= int8.scores(self.data, "val")
        found |= sizes
        found |= int8.sizes()
        speeds = self._asked_speeds()
        if speeds:
            stopwatch = self.stopwatch()
            found |= stopwatch.measure_file(int8.file, speeds)
        for own in self.candidate.own_measures():
            found[own.name] = int8.measure(own)
        return found

    def _extra_measures(self, network: nn.Module, inputs: Tensor) -> Measures:
        """The measures that the candidate asks for beyond those that are always taken; `inputs` (N,
        *input_shape)."""
        candidate = self.candidate
        names = candidate.asked_measures()
        found: Measures = {}
        if names:
            stopwatch = self.stopwatch()
            found |= stopwatch.measure(network, inputs, names)
        own = candidate.own_measures()
        if own:
            found |= measure_own(network, self.data, own)
        return found

    def stopwatch(self) -> Stopwatch:
        """What takes times as the candidate says, against the network that speed-ups are against,
        whose weights do not matter."""
        if self._stopwatch is None:
            candidate = self.candidate
            dense = None
            if "speedup" in candidate.asked_measures():
                against = candidate.latency.against or candidate.model
                with torch.random.fork_rng(devices=[]):
                    dense = built(against, self.data)
                dense = dense.to(self.data.device)
            self._stopwatch = Stopwatch(self.data, candidate.latency, dense)
        return self._stopwatch

    def _asked_speeds(self) -> list[str]:
        asked = self.candidate.asked_measures()
        return [name for name in asked if name in SPEEDS]

    def _as_int8(self, network: nn.Module) -> Int8:
        on_cpu = copied(network).cpu()
        return as_int8(on_cpu, self.data)

    def timed(self, network: nn.Module) -> dict[str, float]:
        """The times that the candidate asks for of a compact network, as it ships; empty if it asks
        for none.

        Raises:
            UserError: as `Stopwatch.measure`.
            TrialFailure: as `Stopwatch.measure`.
        """
        speeds = self._asked_speeds()
        if not speeds:
            return {}
        if self.candidate.int8:
            int8 = self._as_int8(network)
            stopwatch = self.stopwatch()
            return stopwatch.measure_file(int8.file, speeds)
        inputs = self._checked_inputs(self.data.validation)
        stopwatch = self.stopwatch()
        return stopwatch.measure(network, inputs, speeds)


def _told_first(gone: Sequence[Step], compacted: Compacted) -> Compacted:
    """With the layers that went as the first steps of its report."""
    report = compacted.report
    steps = (*gone, *report.steps)
    report = replace(report, steps=steps)
    return replace(compacted, report=report)


def _refitted(network: nn.Module, epoch: int, refit: FurtherTraining | None) -> History:
    """Trains a network further in place, if asked to; the metrics of each epoch, counted on from
    those of training."""
    if refit is None:
        return []
    history: History = []
    number = epoch
    for metrics in refit(network):
        number += 1
        history.append({"epoch": number, **metrics})
    return history


def _refitted_if_it_can(
    compacted: Compacted, epoch: int, refit: FurtherTraining | None, *, is_over: bool
) -> tuple[Compacted, History]:
    """The same refitted; on the way, where training goes on, one whose refit fails as it was."""
    if is_over or refit is None:
        return compacted, _refitted(compacted.network, epoch, refit)
    before = copied(compacted.network)
    try:
        return compacted, _refitted(compacted.network, epoch, refit)
    except TrialFailure as failure:
        log.warning("the network of epoch %d is reported without its refit: %s", epoch, failure)
        return replace(compacted, network=before), []


def measure_own(network: nn.Module, data: Dataset, own: Sequence[OwnMeasure]) -> Measures:
    """The user's measures of a compact network.

    Raises:
        TrialFailure: if a function raises, or gives anything but a finite number.
        UserError: if one is on the ONNX file, and there can be none.
    """
    stored = data.validation.inputs[:CHECKED_INPUTS]
    inputs = data.prepare(stored)
    found: Measures = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        file = str(path)
        if any(measure.on == "onnx" for measure in own):
            write_onnx(network, data, path)
        with evaluating(network):
            for measure_of in own:
                name = measure_of.name
                if measure_of.on == "onnx":
                    found[name] = measure_of.take(file)
                    continue
                # Of copies: the function is the user's, and may change what it is given.
                twin = copied(network)
                twins_inputs = each(inputs, Tensor.clone)
                found[name] = measure_of.take(twin, twins_inputs)
    return found
