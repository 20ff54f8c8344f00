"""Assembles the Ray Tune experiment of a config and runs it: trials, records, the front, and the test set."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import ray
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from pydantic import ValidationError
from ray import tune

from search.config import Config, explain_first
from search.interrupt import Interrupt
from search.observer import Observer, Progress
from search.records import Ledger, SearchResult, TrialRecord, label
from search.samplers import SAMPLERS
from search.searcher import InvalidCandidate, StudySearcher
from search.tracking import Recorder, connect
from trainables.candidate import Candidate
from trainables.data import load_once
from trainables.errors import UserError
from trainables.measures import accuracy, measure
from trainables.penalties.base import check_penalties
from trainables.storage import check_storable, restore
from trainables.trainable import NETWORK_FILE, CandidateTrainable
from trainables.training import Training

log = logging.getLogger(__name__)

# Read by Ray Tune: no CSV, JSON and TensorBoard files per trial (MLflow has it all), and Ctrl-C is ours to handle.
_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a config mean the same in a trial as in the driver
}


def run_search(config: Config, progress: Progress | None = None) -> SearchResult:
    """Runs one search to its end, or until Ctrl-C.

    Raises:
        UserError: before any trial starts, if the tracking store does not answer, the network does not fit the data,
            or the resources of one trial are not there.
    """
    begun = time.monotonic()
    base = config.candidate({})
    dense_sizes = _dense_sizes(config)
    tracking_uri = config.tracking.absolute_uri()
    client = connect(tracking_uri)
    with _ray_session():
        concurrency = _concurrency(config)
        search, directory = _new_directory(config)
        ledger = Ledger(config.chosen_objectives(), dense_sizes)
        interrupt = Interrupt()
        recorder = Recorder(client, config, search, directory.parent / "artifacts")
        observer = Observer(ledger, recorder, progress)

        # From here on trials may have finished: whatever happens, they are recorded and the front is told.
        with interrupt.on_signals():
            try:
                searcher = _searcher(config, directory, observer)
                _run_trials(config, searcher, observer, interrupt, directory, concurrency)
                searcher.close()
            finally:
                _end_unfinished(ledger, recorder)
                _touch_test_set(base, [*ledger.front(), *([ledger.dense] if ledger.dense else [])])
                seconds = time.monotonic() - begun
                shown_uri = config.tracking.shown_uri()
                result = SearchResult(search, ledger, ledger.front(), seconds, shown_uri, interrupted=interrupt.requested)
                recorder.finish(result)
    return result


def _dense_sizes(config: Config) -> dict[str, float]:
    """The sizes of the dense network, untrained: the scale of the hypervolume. Finds out if the parts fit."""
    base = config.candidate({})
    try:
        data = load_once(base.data, torch.device("cpu"))
        network = base.model.build(data.input_shape, data.classes)
        sample = data.prepare(data.validation.inputs[:8])
        sizes = {name: float(value) for name, value in measure(network, sample).items()}
        check_penalties(config.varied_penalties(), network, sample)
        for candidate in config.varied_sparsifiers():
            Training(candidate).close()
        if base.compaction.enabled:
            check_storable(network, sample)
        return sizes
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the model '{base.model.name}' does not work on the data set '{base.data.name}': {error}") from error


@contextmanager
def _ray_session() -> Iterator[None]:
    """A Ray cluster: the one that is there (a running session, or RAY_ADDRESS), or a local one for the time of the block."""
    if ray.is_initialized():
        yield
        return
    start_local_ray()
    try:
        yield
    finally:
        ray.shutdown()


def start_local_ray(num_cpus: int | None = None) -> None:
    """Starts Ray quietly: its own chatter stays in its log files."""
    os.environ.update(_TUNE_ENVIRONMENT)
    ray.init(num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # it lists failed trials, which we report with reasons


def _concurrency(config: Config) -> int:
    """How many trials run at a time.

    Raises:
        UserError: if the cluster has not even the resources of one trial.
    """
    available = ray.cluster_resources()
    fits = []
    for resource, key, asked in (("GPU", "gpu", config.resources.gpu), ("CPU", "cpu", config.resources.cpu)):
        there = available.get(resource, 0.0)
        if asked > there:
            raise UserError(
                f"resources.{key}: a trial asks for {asked:g} {resource}, and there is {there:g} here; "
                f"set resources.{key} to {there:g} or less"
            )
        if asked > 0:
            fits.append(int(there / asked))
    asked_for = config.search.concurrency
    return min(fits) if asked_for == "auto" else asked_for


def _new_directory(config: Config) -> tuple[str, Path]:
    """The name of this search, unique in its storage path, and its new directory there."""
    root = Path(config.search.storage_path).resolve()
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    names = [f"{config.name}-{stamp}", *(f"{config.name}-{stamp}-{n}" for n in range(2, 100))]
    for name in names:
        try:
            (root / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"search.storage_path: cannot write to {root}: {error.strerror}") from None
        return name, root / name
    raise UserError(f"search.storage_path: {root} has a hundred searches of this second")


def _searcher(config: Config, directory: Path, observer: Observer) -> StudySearcher:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    objectives = config.chosen_objectives()
    study = optuna.create_study(
        study_name=directory.name,
        storage=JournalStorage(JournalFileBackend(str(directory / "study.journal"))),
        sampler=SAMPLERS[config.search.sampler](config.search.seed),
        directions=[o.direction.value for o in objectives],
    )
    return StudySearcher(
        study,
        config.distributions(),
        [o.name for o in objectives],
        _config_maker(config),
        config.search.trials,
        observer.reject,
    )


def _config_maker(config: Config) -> Callable[[int | None, dict[str, Any] | None], dict[str, Any]]:
    """Makes the Tune config of a trial. Without `training.seed`, trial n of search seed s trains with 1,000,003 s + n + 1."""

    def make(number: int | None, values: dict[str, Any] | None) -> dict[str, Any]:
        try:
            candidate = config.candidate({}).dense() if number is None else config.candidate(values or {})
        except (KeyError, ValidationError) as error:
            raise InvalidCandidate(f"these values make no candidate: {explain_first(error)}") from error
        if candidate.training.seed is None:
            seed = 1_000_003 * config.search.seed + (0 if number is None else number + 1)
            candidate = candidate.model_copy(update={"training": candidate.training.model_copy(update={"seed": seed})})
        plain = candidate.model_dump(mode="json")
        return {"number": number, "values": values or {}, "candidate": plain, "resources": config.resources.for_ray()}

    return make


def _run_trials(
    config: Config, searcher: StudySearcher, observer: Observer, interrupt: Interrupt, directory: Path, concurrency: int
) -> None:
    tuner = tune.Tuner(
        CandidateTrainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=config.search.trials + 1,  # and the dense reference
            max_concurrent_trials=concurrency,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: label(trial.config["number"]),
        ),
        run_config=tune.RunConfig(
            name=directory.name,
            storage_path=str(directory.parent),
            callbacks=[observer],
            stop=interrupt,
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True, num_to_keep=1),
        ),
    )
    tuner.fit()


def _end_unfinished(ledger: Ledger, recorder: Recorder) -> None:
    """Marks the trials that an interrupt cut off."""
    for record in [*ledger.trials, *([ledger.dense] if ledger.dense else [])]:
        if record.status == "running":
            record.status, record.reason = "stopped", "interrupted"
            recorder.end_trial(record, ledger)


def _touch_test_set(base: Candidate, records: list[TrialRecord]) -> None:
    """Measures the test accuracy of finished trials, on their compact networks as stored.

    A network that cannot be read any more costs a warning and its test accuracy, not the front.
    """
    data = load_once(base.data, torch.device("cpu"))
    for record in records:
        if record.status != "completed":
            continue
        try:
            stored = torch.load(Path(record.checkpoint or "", NETWORK_FILE), weights_only=True)
            record.test_accuracy = accuracy(restore(stored), *data.test, prepare=data.prepare)
        except (OSError, RuntimeError, ValueError) as error:
            log.warning("%s has no test accuracy, since its network cannot be read: %s", record.label, error)
