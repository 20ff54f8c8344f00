"""The state of a search on disk: its directory, its journal, its config as it began, and Optuna's
study."""

import logging
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from slimfront.search.config.beside import find_in, found_in
from slimfront.search.config.plain import dump
from slimfront.search.config.schema import Config
from slimfront.search.record.events import Event, SearchBegan, SessionBegan, Values, seconds_spent
from slimfront.search.record.journal import (
    JOURNAL_FILE,
    Journal,
    damaged,
    present,
    read_events,
)
from slimfront.search.record.ledger import Ledger, SearchResult, ledger_of
from slimfront.search.record.locate import locate
from slimfront.search.record.resuming import resumed_config
from slimfront.search.record.storage import Folder, Storage
from slimfront.trainables.data import Factory as DataFactory
from slimfront.trainables.errors import UserError
from slimfront.trainables.models import Factory as ModelFactory
from slimfront.trainables.options import suggest

log = logging.getLogger(__name__)


@dataclass
class Session:
    """One run of the driver on a search: the first, or one that resumes it."""

    config: Config
    folder: Folder
    journal: Journal
    earlier: list[Event]
    ledger: Ledger
    resumed: bool

    @property
    def directory(self) -> Path:
        """Where its journal and its study are, on this machine; its name is the search's."""
        return self.folder.local

    @property
    def number(self) -> int:
        """1 for the first."""
        begun = [event for event in self.earlier if isinstance(event, SessionBegan)]
        return 1 + len(begun)

    @property
    def starts(self) -> list[Values]:
        """The values to try first, as they were when the search began."""
        begun = self.earlier[0]
        if isinstance(begun, SearchBegan):
            return begun.starts
        return []

    def seconds_before(self) -> float:
        """Seconds of wall time that earlier sessions took, up to their last sign of life."""
        return seconds_spent(self.earlier)


def begin(
    config: Config, name: str | None, dense_sizes: dict[str, float], starts: list[Values]
) -> Session:
    """A new search, in a new directory. Raises UserError if there is one of that name, or the
    directory cannot be made."""
    folder = new_folder(config, name)
    mirror = folder.mirror(config.search.storage)
    journal = Journal(folder.local, mirror)
    if (folder.local / JOURNAL_FILE).stat().st_size:
        journal.close()
        raise UserError(_THERE.format(name=folder.search))
    event = SearchBegan(
        search=folder.search,
        config=dump(config),
        dense_sizes=dense_sizes,
        starts=starts,
        beside=found_in(),
    )
    begun = journal.append(event)
    ledger = ledger_of(config, begun, folder.place)
    return Session(config, folder, journal, [begun], ledger, resumed=False)


def open_existing(search: str, storage_path: str, overrides: Sequence[str] = ()) -> Session:
    """A search that is there, with what its journal tells.

    Raises:
        UserError: if there is no such search, it is running, its journal cannot be read, or
            `overrides` change what may not.
    """
    folder = _folder(search, storage_path)
    database = _database(folder, overrides)
    journal = Journal(folder.local, folder.mirror(database))
    try:
        earlier = list(read_events(folder.local / JOURNAL_FILE))
        begun = _beginning(earlier, search)
        _find_beside(begun, folder)
        config = resumed_config(begun.config, overrides, folder.search, trains=True)
        _check_code(config, folder)
        ledger = ledger_of(config, begun, folder.place)
        _apply_all(ledger, earlier, folder)
    except BaseException:
        journal.close()
        raise
    return Session(config, folder, journal, earlier, ledger, resumed=True)


def _database(folder: Folder, overrides: Sequence[str]) -> str | None:
    """The database that says which driver has a search in a bucket, as its config names it."""
    if folder.bucket is None:
        return None
    events = read_events(folder.local / JOURNAL_FILE)
    begun = _beginning(events, folder.search)
    config = resumed_config(begun.config, overrides, folder.search)
    return config.search.storage


def _beginning(events: Iterable[Event], search: str) -> SearchBegan:
    """The first event of a journal. Raises UserError if it is not what says what is searched."""
    first = next(iter(events), None)
    if not isinstance(first, SearchBegan):
        raise UserError(
            f"the journal of {search} does not say what was searched; restore it from a copy, or "
            "start a new search"
        )
    return first


def new_folder(config: Config, name: str | None) -> Folder:
    """The new folder of this search in its storage path; its name is the search's."""
    storage = Storage(config.search.storage_path)
    names = [name] if name else new_names(config.name)
    for candidate in names:
        try:
            return storage.make(candidate)
        except FileExistsError:
            continue
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"search.storage_path: cannot write to {storage.shown}: {reason}"
            ) from None
    if name:
        raise UserError(_THERE.format(name=name))
    raise UserError(f"search.storage_path: {storage.shown} has a hundred searches of this second")


def new_names(config_name: str) -> list[str]:
    """Names for a search that was given none, the first to be tried first: that of its config, and
    the time."""
    now = datetime.now(UTC)
    stamped = f"{config_name}-{now:%Y%m%d-%H%M%S}"
    names = [stamped]
    for number in range(2, 100):
        names.append(f"{stamped}-{number}")
    return names


_THERE = (
    "there is a search '{name}' already; continue it with `slimfront resume {name}`, or choose "
    "another name"
)


def read_search(search: str, storage_path: str) -> tuple[Config, Ledger]:
    """The config of a search and what is known about its trials, as its journal tells it now; it
    may be running.

    Raises:
        UserError: if there is no such search, or its journal cannot be read.
    """
    config, ledger, _ = _read(search, storage_path)
    return config, ledger


def read_result(search: str, storage_path: str) -> tuple[Config, SearchResult]:
    """The same as `read_search`, as the result that the search would end with now.

    Raises:
        UserError: as `read_search`.
    """
    config, ledger, seconds = _read(search, storage_path)
    front = ledger.front.members()
    trials = list(ledger.trials)
    if ledger.dense:
        trials.append(ledger.dense)
    interrupted = any(trial.unfinished for trial in trials)
    store = config.tracking.shown_uri()
    result = SearchResult(search, ledger, front, seconds, store, interrupted=interrupted)
    return config, result


def _read(search: str, storage_path: str) -> tuple[Config, Ledger, float]:
    """The config, what is known about the trials, and the seconds that the search took."""
    folder = _folder(search, storage_path)
    journal = folder.local / JOURNAL_FILE
    events = list(read_events(journal))
    begun = _beginning(events, search)
    _find_beside(begun, folder)
    config = resumed_config(begun.config, (), search)
    _check_code(config, folder)
    ledger = ledger_of(config, begun, folder.place)
    _apply_all(ledger, events[1:], folder, first=2)
    return config, ledger, seconds_spent(events)


def _check_code(config: Config, folder: Folder) -> None:
    """Refuses a journal that names code of the user's (factories) where others may have written
    that.

    What the user named when the search began is in the journal, and what reads it runs it. A bucket
    cannot say who wrote to it.

    Raises:
        UserError: if the journal belongs to another user than this one or root, or others may write
            to it.
    """
    named = []
    for part in (config.model, config.data):
        if isinstance(part, (ModelFactory, DataFactory)):
            named.append(part.factory)
    if folder.bucket is not None or not named:
        return
    theirs = _of_others(folder)
    if theirs:
        journal = folder.local / JOURNAL_FILE
        raise UserError(
            f"the journal {journal} names code to run ({', '.join(named)}), "
            f"and {theirs}; make it yours if you trust it: chown, or chmod o-w"
        )


def _of_others(folder: Folder) -> str | None:
    """Why somebody else may have written the journal of a search; None where nobody has."""
    state = (folder.local / JOURNAL_FILE).stat()
    if state.st_mode & stat.S_IWOTH:
        return "others may write to it"
    if state.st_uid not in (os.getuid(), 0):
        return "it belongs to another user"
    return None


def _find_beside(begun: SearchBegan, folder: Folder) -> None:
    """Has modules found again where they were when the search began, if nobody else can have
    written where that is."""
    if folder.bucket is None and _of_others(folder) is None:
        find_in(begun.beside)


def _apply_all(ledger: Ledger, events: Iterable[Event], folder: Folder, first: int = 1) -> None:
    """Takes in the events of a journal from line `first` on. Raises UserError for one that does not
    fit those before it."""
    for number, event in enumerate(events, start=first):
        try:
            ledger.apply(event)
        except (KeyError, TypeError, ValueError, StopIteration, AttributeError) as error:
            kind_of_error = type(error).__name__
            reason = (
                f"its event '{event.kind}' does not fit what is before it: {kind_of_error} {error}"
            )
            raise damaged(folder.local / JOURNAL_FILE, number, reason) from None


def _folder(search: str, storage_path: str) -> Folder:
    search, storage_path = locate(search, storage_path)
    storage = Storage(storage_path)
    folder = storage.folder(search)
    if not present(folder):
        known = storage.searches(JOURNAL_FILE)
        raise UserError(
            f"there is no search '{search}' in {storage.shown}; {suggest(search, known)}"
        )
    return folder
