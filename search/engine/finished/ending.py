"""What is taken when a search is over: its front on the test split, and the times of what is
recommended, in quiet."""

import logging
import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import nn

from slimfront.search.config.schema import Config
from slimfront.search.record.events import Event, NetworkTested, NetworkTimed
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.trials import MeasuredNetwork
from slimfront.trainables.data import Dataset, load_once
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.measures.latency import SPEEDS
from slimfront.trainables.shipping.int8 import as_int8
from slimfront.trainables.shipping.network_file import read
from slimfront.trainables.tasks.standard_error import standard_error
from slimfront.trainables.training.finishing import Finishing

log = logging.getLogger(__name__)


def take_test_metrics(
    config: Config, points: Sequence[MeasuredNetwork], write: Callable[[Event], object]
) -> None:
    """Takes the metrics on the test split of networks that have none yet, on their compact form as
    stored, and the standard errors of their quality on both splits (but of int8 networks).

    A network that cannot be read any more costs a warning and these metrics, not the front.
    """
    data = load_once(config.data, torch.device("cpu"), config.task)
    for point in points:
        if point.tested is not None:
            continue
        try:
            measured = _metrics(config, point, data)
        except UserError as error:
            log.warning(
                "%s was not measured on the test set, since its network cannot be read: %s",
                point.name,
                error,
            )
            continue
        write(
            NetworkTested(
                number=point.trial.number, epoch=point.epoch, step=point.step, metrics=measured
            )
        )


def _metrics(config: Config, point: MeasuredNetwork, data: Dataset) -> dict[str, float]:
    network = read(point.file, config.model_of(point.trial.values))
    if config.ships_int8(point.trial.number, point.trial.values):
        return as_int8(network, data).scores(data, "test")
    metrics = data.task.evaluate(network, *data.test, "test", prepare=data.prepare)
    return metrics | _standard_errors(network, data)


def _standard_errors(network: nn.Module, data: Dataset) -> dict[str, float]:
    """How far the quality on each split may be off, such as `val_f1_se`; what has no value is
    left out."""
    found = {}
    for name, split in (("val", data.validation), ("test", data.test)):
        error = standard_error(data.task, network, *split, prepare=data.prepare)
        if math.isfinite(error):
            found[f"{name}_{data.task.quality.name}_se"] = error
    return found


def time_again(config: Config, ledger: Ledger, write: Callable[[Event], object]) -> None:
    """Takes the times of what is recommended once more, now that nothing runs beside it, where the
    search took them; of all that may be the fastest, where that decides it, twice each, forwards
    and backwards. A network that was timed so before is not again.

    What fails costs a warning and these times, not the front.
    """
    chosen = ledger.front.to_be_timed()
    points = [point for point in chosen if point.timed_again is None]
    order = [*points, *reversed(points)] if len(chosen) > 1 else points
    taken: dict[str, list[dict[str, float]]] = {}
    failed: set[str] = set()
    for point in order:
        if point.name in failed:
            continue
        try:
            times = _times(config, point)
        except (UserError, TrialFailure) as error:
            log.warning("%s was not timed again: %s", point.name, error)
            failed.add(point.name)
            continue
        if times:
            taken.setdefault(point.name, []).append(times)
    for point in points:
        if point.name in taken:
            write(_timed(point, taken[point.name]))
    best = ledger.front.recommended()
    if best is not None and best.name in taken and len(taken) > 1:
        # Once more, and last: a trial's times in MLflow are those of what is recommended of it.
        write(_timed(best, taken[best.name]))


def _timed(point: MeasuredNetwork, each: list[dict[str, float]]) -> NetworkTimed:
    means = {name: statistics.fmean(times[name] for times in each) for name in each[0]}
    return NetworkTimed(
        number=point.trial.number,
        epoch=point.epoch,
        step=point.step,
        times=means,
        each=each if len(each) > 1 else [],
    )


def _times(config: Config, point: MeasuredNetwork) -> dict[str, float]:
    """The times that the search takes of a network, on the kind of device that its trials use."""
    candidate = config.candidate(point.trial.values)
    if not any(name in SPEEDS for name in candidate.asked_measures()):
        return {}
    device = torch.device("cpu")
    if config.resources.gpu and not candidate.latency.of_file:
        if not torch.cuda.is_available():
            raise UserError("trials were timed on GPUs, and there is none where the search is led")
        device = torch.device("cuda")
    network = read(point.file, candidate.model).to(device).eval()
    data = load_once(config.data, device, config.task)
    return Finishing(candidate, data).timed(network)
