"""What is tried of a config before a search, and by `slimfront check`: its data, its networks, and
one step of each."""

import logging
import math
from collections.abc import Mapping

import torch

from slimfront.search.config.samplers import try_sampler
from slimfront.search.config.schema import Config
from slimfront.search.record.storage import check_place
from slimfront.search.record.study import check_database
from slimfront.search.tracking.store import check_store
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import Dataset
from slimfront.trainables.data.look import looked_at
from slimfront.trainables.errors import TrialFailure, UserError, first_line, said_once
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.models import built
from slimfront.trainables.penalties.base import check_penalties
from slimfront.trainables.shipping.formats import need_onnx
from slimfront.trainables.shipping.stopwatch import Stopwatch
from slimfront.trainables.training.finishing import measure_own
from slimfront.trainables.training.rehearsal import look_at, rehearse, run_once

log = logging.getLogger(__name__)


def ask_stores(config: Config) -> None:
    """Finds out whether a search of this config could write to its storage path and its tracking
    store, and reach the database of its study; nothing is left there.

    Raises:
        UserError: one sentence that says which does not answer, and why.
    """
    check_place(config.search.storage_path)
    check_store(config.tracking.absolute_uri())
    if config.search.storage is not None:
        check_database(config.search.storage)


@said_once()
def preflight(config: Config) -> dict[str, float]:
    """Builds the data and every architecture of a config, and takes each through one real step: see
    `rehearsal.rehearse`.

    Returns:
        The measures and metrics of the dense network, untrained: the scale of the hypervolume,
        until the dense network is trained.

    Raises:
        UserError: one sentence that says which part of the config does not fit the others, and why.
    """
    base = config.candidate({})
    _try_sampler(config)
    try:
        data = looked_at(base.data, torch.device("cpu"), base.task)
        _say_how_inputs_are_seen(config, data)
        network = built(base.model, data)
        _say_what_is_unused(run_once(network, data), data)
        sample = data.prepare(data.validation.inputs[:8])
        if base.int8 or "int8" in config.space:
            need_onnx()
        stopwatch = Stopwatch(data, base.latency)
        sizes = measure(network, sample)
        sizes |= stopwatch.measure(network, sample, base.asked_measures())
        sizes |= data.task.evaluate(network, *data.validation, prepare=data.prepare)
        sizes |= measure_own(network, data, base.own_measures()) if base.own_measures() else {}
        _check_scales(base, sizes)
        _say_what_is_no_number(config, sizes)
        _say_what_never_comes(config)
        check_penalties(config.varied_penalties(), network, sample)
        for candidate in config.rehearsed():
            rehearse(candidate)
        for candidate in config.looked_at():
            look_at(candidate)
        return {name: float(value) for name, value in sizes.items()}
    except TrialFailure as error:
        raise UserError(str(error)) from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the model '{base.model.name}' does not work on the data set '{base.data.name}': "
            f"{first_line(error)}"
        ) from error


def _try_sampler(config: Config) -> None:
    options = config.search.sampler_options
    if not options:
        return
    sampler = config.build_sampler()
    startup = max(options.get(name, 10) for name in ("n_startup_trials", "population_size"))
    try:
        try_sampler(sampler, config.distributions(), startup)
    except ValueError as error:
        raise UserError(str(error)) from None


def _say_what_never_comes(config: Config) -> None:
    """What training is over before."""
    epochs = config.training.epochs
    stopping = config.search.early_stopping
    if stopping is not None and epochs and config.grace() >= epochs:
        log.warning(
            "search.early_stopping stops no trial: its first rung is after %g epochs, and "
            "training.epochs is %d; set search.early_stopping.grace to less",
            config.grace(),
            epochs,
        )
    for name, options in config.penalties.items():
        risen_at = options.warmup + options.ramp
        if options.on and risen_at > epochs:
            log.warning(
                "penalties.%s does not reach its strength: warmup and ramp take %g epochs, and "
                "training.epochs is %d",
                name,
                risen_at,
                epochs,
            )


def _say_how_inputs_are_seen(candidate: Candidate, data: Dataset) -> None:
    """Trained weights are of inputs that were normalised in one way, which only the user knows."""
    left_out = "normalise" not in candidate.data.model_fields_set
    if candidate.model.weights is not None and data.normalised != "none" and left_out:
        log.warning(
            "data.normalise is left out, and inputs are normalised %s: if the network of "
            "model.weights was trained otherwise, set it to none, or to {mean: …, std: …}",
            data.normalised,
        )


def _say_what_is_unused(outputs: torch.Tensor, data: Dataset) -> None:
    """Outputs of the network that stand for nothing in the data."""
    unused = data.task.options.unused_outputs(outputs, data.head)
    if unused is not None:
        log.warning("%s", unused)


def _say_what_is_no_number(config: Config, sizes: Mapping[str, float]) -> None:
    """A metric that no trial may have a number for: what has none is not on the front."""
    for name in config.objectives:
        found = sizes.get(name, 0.0)
        if not math.isfinite(found):
            log.warning(
                "the objective %s is %s for the untrained network; a network of which it stays so "
                "is not on the front, so see that the metric gives a number on the validation "
                "split",
                name,
                found,
            )


def _check_scales(candidate: Candidate, sizes: Mapping[str, float]) -> None:
    """Refuses a measure of the user's that is compared with the dense network's as so many times as
    large, where that is 0."""
    for own in candidate.own_measures():
        if own.scale != "relative" and sizes[own.name] == 0:
            raise UserError(
                f"the measure '{own.name}' ({own.factory}) is 0 for the dense network, with which "
                f"'scale: {own.scale}' compares every other; give it 'scale: relative'"
            )
