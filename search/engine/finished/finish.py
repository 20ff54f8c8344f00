"""What follows the last trial: what was cut off is marked, what somebody may ship is trained with
other seeds, the test set is touched, and the record of the session ends."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Literal

from slimfront.search.engine.finished.ending import take_test_metrics, time_again
from slimfront.search.engine.finished.replicas import train_missing
from slimfront.search.engine.observer import Observer
from slimfront.search.engine.progress import Progress
from slimfront.search.record.events import SessionEnded, TrialInterrupted
from slimfront.search.record.ledger import SearchResult
from slimfront.search.record.session import Session
from slimfront.search.tracking.recorder import Recorder
from slimfront.trainables.errors import UserError

log = logging.getLogger(__name__)


def finish(
    session: Session, observer: Observer, recorder: Recorder, seconds: float
) -> SearchResult:
    """Marks what was cut off, touches the test set, and ends the record of this session."""
    ledger = session.ledger
    records = list(ledger.trials)
    if ledger.dense:
        records.append(ledger.dense)
    for record in records:
        if record.status == "running":
            observer.write(TrialInterrupted(number=record.number))
    networks = ledger.front.members()
    if ledger.dense_network and ledger.dense_network.trial.status == "completed":
        networks.append(ledger.dense_network)
    say = (observer.progress or Progress()).finishing
    say(f"Measuring {len(networks)} networks on the test set")
    take_test_metrics(session.config, networks, observer.write)
    _repeat(session, observer, say)
    time_again(session.config, ledger, observer.write)
    front = ledger.front.members()
    result = SearchResult(
        search=session.directory.name,
        ledger=ledger,
        front=front,
        wall_seconds=seconds,
        tracking_uri=session.config.tracking.shown_uri(),
        interrupted=observer.interrupt.requested,
    )
    observer.write(SessionEnded(status=_ending(result), seconds=round(seconds, 2)))
    say(f"Writing the rest to MLflow, with the models of {len(front)} networks")
    delivered = recorder.close()
    return dataclasses.replace(result, run_ids=dict(recorder.run_ids), undelivered=not delivered)


def _repeat(session: Session, observer: Observer, say: Callable[[str], object]) -> None:
    """Trains what somebody may ship with other seeds, where the config asks for it; what fails
    costs a warning and the means, not the front."""
    seeds = session.config.search.repeats
    ledger = session.ledger
    if seeds is None or observer.interrupt.requested:
        return
    if not ledger.front.members() or ledger.dense_network is None:
        return
    say(f"Training the baseline and what somebody may ship with {seeds} other seeds each")
    try:
        train_missing(
            session.config,
            ledger,
            seeds,
            write=observer.write,
            say=say,
            ends=lambda: observer.interrupt.requested,
        )
    except UserError as error:
        log.warning("The means over seeds are missing: %s", error)


def _ending(result: SearchResult) -> Literal["completed", "interrupted", "failed"]:
    if result.interrupted:
        return "interrupted"
    if result.all_failed:
        return "failed"
    return "completed"
