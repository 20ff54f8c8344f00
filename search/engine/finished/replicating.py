"""The members of a front of a search that has ended, trained anew with other seeds: how good they
are by their means, and how far that spreads."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from slimfront.search.engine.finished.replicas import planned, train_missing
from slimfront.search.engine.nodes import check_fits, ray_session
from slimfront.search.engine.runner import session_recorder
from slimfront.search.record.events import Event, SessionBegan, SessionEnded
from slimfront.search.record.ledger import SearchResult
from slimfront.search.record.session import Session, open_existing
from slimfront.search.tracking.recorder import Recorder
from slimfront.search.tracking.store import connect, taking_writes
from slimfront.trainables.data import load_once
from slimfront.trainables.errors import UserError
from slimfront.trainables.models import built

_CPU = torch.device("cpu")


def replicate(
    search: str,
    seeds: int = 5,
    storage_path: str = "runs",
    address: str | None = None,
    say: Callable[[str], object] = lambda _text: None,
) -> SearchResult:
    """Trains the baseline and the members of the front in the region that matters anew, each with
    `seeds` other seeds; those that are there already are not trained again.

    Args:
        say: called with a line about each training that has ended.

    Returns:
        The search with its replicas; what is recommended is judged by their means.

    Raises:
        UserError: if there is no such search, it is running or has not ended, it has no front, its
            members cannot be trained apart from it, its network cannot be built here, none of the
            trainings succeeds, or its journal takes no more.
    """
    session = open_existing(search, storage_path)
    try:
        ended = _last_end(session)
        planned(session.config, session.ledger, seeds)  # refuses what cannot be replicated
        # What this machine cannot build, no worker can.
        built(session.config.model, load_once(session.config.data, _CPU, session.config.task))
        with ray_session(address), _recorded(session, ended) as recorder:
            check_fits(session.config)

            def write(event: Event) -> None:
                written = session.journal.append(event)
                session.ledger.apply(written)
                recorder.take(written)

            train_missing(session.config, session.ledger, seeds, write, say)
    except OSError as error:
        raise UserError(
            f"the journal of {search} took no more: {error.strerror}; what is in it stays, and is "
            "not trained again: make room, and call replicate once more"
        ) from None
    finally:
        session.journal.close()
    return SearchResult(
        search=session.directory.name,
        ledger=session.ledger,
        front=session.ledger.front.members(),
        wall_seconds=session.seconds_before(),
        tracking_uri=session.config.tracking.shown_uri(),
        interrupted=False,
        run_ids=dict(recorder.run_ids),
        undelivered=not recorder.complete,
    )


def _last_end(session: Session) -> SessionEnded:
    for event in reversed(session.earlier):
        if isinstance(event, SessionEnded):
            return event
    name = session.directory.name
    raise UserError(f"{name} has not ended; let it end first: slimfront resume {name}")


@contextlib.contextmanager
def _recorded(session: Session, ended: SessionEnded) -> Iterator[Recorder]:
    """A session of the journal and of MLflow around the block."""
    config = session.config
    uri = config.tracking.absolute_uri()
    client = connect(uri, writes=True)
    with taking_writes(uri, f"slimfront sync {session.folder.search}"):
        recorder = session_recorder(session, client)
    recorder.take(session.journal.append(SessionBegan(session=session.number)))
    try:
        yield recorder
    finally:
        again = SessionEnded(status=ended.status, seconds=ended.seconds)
        recorder.take(session.journal.append(again))
        recorder.close()
