"""The state of a search on disk: its directory, its journal, its config as it began, and Optuna's
study."""

import json
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from slimfront.search.config.plain import as_plain, dump
from slimfront.search.config.schema import Config, load_recorded
from slimfront.search.config.settings import STORE_VARIABLE
from slimfront.search.config.space import flatten
from slimfront.search.config.space_checks import is_in, shown
from slimfront.search.record.events import Event, SearchBegan, SessionBegan, seconds_spent
from slimfront.search.record.journal import (
    JOURNAL_FILE,
    Journal,
    damaged,
    present,
    read_events,
)
from slimfront.search.record.ledger import Ledger, SearchResult, ledger_of
from slimfront.search.record.locate import locate
from slimfront.search.record.storage import Folder, Storage
from slimfront.search.record.study import OnlyWriter, rebuild
from slimfront.trainables.data import Factory as DataFactory
from slimfront.trainables.errors import UserError, first_line, shorten
from slimfront.trainables.models import Factory as ModelFactory
from slimfront.trainables.options import suggest
from slimfront.trainables.redaction import HIDDEN, without_secrets

log = logging.getLogger(__name__)

STUDY_FILE = "study.journal"
"""Optuna's study, where it is in no database."""


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
    def starts(self) -> list[dict[str, Any]]:
        """The values to try first, as they were when the search began."""
        begun = self.earlier[0]
        if isinstance(begun, SearchBegan):
            return begun.starts
        return []

    def seconds_before(self) -> float:
        """Seconds of wall time that earlier sessions took, up to their last sign of life."""
        return seconds_spent(self.earlier)


def begin(
    config: Config, name: str | None, dense_sizes: dict[str, float], starts: list[dict[str, Any]]
) -> Session:
    """A new search, in a new directory. Raises UserError if there is one of that name, or the
    directory cannot be made."""
    folder = new_folder(config, name)
    journal = Journal(folder.local, folder.mirror(config.search.storage))
    if (folder.local / JOURNAL_FILE).stat().st_size:
        journal.close()
        raise UserError(_THERE.format(name=folder.search))
    event = SearchBegan(
        search=folder.search, config=dump(config), dense_sizes=dense_sizes, starts=starts
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
    journal = Journal(folder.local, folder.mirror(_database(folder, overrides)))
    try:
        earlier = list(read_events(folder.local / JOURNAL_FILE))
        begun = next(iter(earlier), None)
        if not isinstance(begun, SearchBegan):
            raise UserError(_UNREADABLE.format(search=search))
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
    begun = next(iter(read_events(folder.local / JOURNAL_FILE)), None)
    if not isinstance(begun, SearchBegan):
        raise UserError(_UNREADABLE.format(search=folder.search))
    return resumed_config(begun.config, overrides, folder.search).search.storage


_UNREADABLE = (
    "the journal of {search} does not say what was searched; restore it from a copy, or start a "
    "new search"
)


def new_folder(config: Config, name: str | None) -> Folder:
    """The new folder of this search in its storage path; its name is the search's."""
    storage = Storage(config.search.storage_path)
    for candidate in [name] if name else new_names(config.name):
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

RESUMABLE = (
    "search.trials",
    "search.time",
    "search.patience",
    "search.concurrency",
    "search.retries",
    "search.storage",
    "resources",
    "tracking.uri",
)
"""What may change when a search is resumed; `search.storage` and `tracking.uri` only to give a
password again."""


def resumed_config(
    text: str, overrides: Sequence[str], search: str, *, trains: bool = False
) -> Config:
    """The config of a search as it began, with overrides.

    Args:
        trains: whether the search goes on, which needs the secrets that its factories were given.

    Raises:
        UserError: if something else would change, or a secret is needed that was not given again.
    """
    began = load_recorded(text)
    before = flatten(as_plain(began))
    hidden = [path for path, value in before.items() if HIDDEN in str(value)]
    given = [override.partition("=")[0] for override in overrides]
    for override, path in zip(overrides, given, strict=True):
        if path not in hidden and not _may_change(path):
            raise UserError(
                f"--set {shorten(override)}: a resumed search cannot change '{shorten(path)}', "
                f"only {', '.join(RESUMABLE)}; "
                f"start a new search with search.start_from={search}"
            )
    missing = [path for path in hidden if path not in given]
    if trains and missing:
        raise UserError(
            f"{missing[0]} of {search} had a secret, which is not recorded; give it again: "
            f"SLIMFRONT_SET='{missing[0]}=…' in the environment"
        )
    again = os.environ.get(STORE_VARIABLE, "")
    if "tracking.uri" not in given and _place(again) == _place(began.tracking.uri):
        # The same store, with the password that is not recorded.
        overrides = [*overrides, f"tracking.uri={json.dumps(again)}"]
    config = load_recorded(text, overrides)
    _refuse_other_stores(config, began, search)
    after = flatten(as_plain(config))
    for path in set(hidden) & set(given):
        if after[path] != before[path]:
            raise UserError(
                f"{path}: only its secret can be given again, and the rest of it differs from what "
                f"{search} began with"
            )
    return config


def _may_change(path: str) -> bool:
    """Whether `RESUMABLE` names this path, or a part of the config that it is in."""
    return any(path == allowed or path.startswith(f"{allowed}.") for allowed in RESUMABLE)


def _place(uri: str | None) -> str:
    # Twice: what stood alone before an @ when it was recorded was a user's name, and seems a token
    # now.
    return without_secrets(without_secrets(uri or ""))


def _refuse_other_stores(config: Config, began: Config, search: str) -> None:
    if _place(config.search.storage) != _place(began.search.storage):
        raise UserError(
            f"search.storage: the study of {search} is at "
            f"{began.search.storage or 'its own directory'}, and stays there"
        )
    if _place(config.tracking.absolute_uri()) != _place(began.tracking.absolute_uri()):
        raise UserError(
            f"tracking.uri: {search} is recorded at {began.tracking.shown_uri()}, and stays there"
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
    trials = [*ledger.trials, *([ledger.dense] if ledger.dense else [])]
    return config, SearchResult(
        search,
        ledger,
        ledger.front.members(),
        seconds,
        config.tracking.shown_uri(),
        interrupted=any(trial.unfinished for trial in trials),
    )


def _read(search: str, storage_path: str) -> tuple[Config, Ledger, float]:
    """The config, what is known about the trials, and the seconds that the search took."""
    folder = _folder(search, storage_path)
    events = list(read_events(folder.local / JOURNAL_FILE))
    begun = next(iter(events), None)
    if not isinstance(begun, SearchBegan):
        raise UserError(_UNREADABLE.format(search=search))
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
    named = [
        part.factory
        for part in (config.model, config.data)
        if isinstance(part, (ModelFactory, DataFactory))
    ]
    if folder.bucket is not None or not named:
        return
    file = folder.local / JOURNAL_FILE
    state = file.stat()
    theirs = None
    if state.st_uid not in (os.getuid(), 0):
        theirs = "it belongs to another user"
    if state.st_mode & stat.S_IWOTH:
        theirs = "others may write to it"
    if theirs:
        raise UserError(
            f"the journal {file} names code to run ({', '.join(named)}), and {theirs}; make it "
            "yours if you trust it: chown, or chmod o-w"
        )


def _apply_all(ledger: Ledger, events: Iterable[Event], folder: Folder, first: int = 1) -> None:
    """Takes in the events of a journal from line `first` on. Raises UserError for one that does not
    fit those before it."""
    for number, event in enumerate(events, start=first):
        try:
            ledger.apply(event)
        except (KeyError, TypeError, ValueError, StopIteration, AttributeError) as error:
            reason = (
                f"its event '{event.kind}' does not fit what is before it: "
                f"{type(error).__name__} {error}"
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


def starting_values(config: Config) -> list[dict[str, Any]]:
    """The values to try first: those of the config, or of the front of an earlier search as far as
    they vary here."""
    wanted = config.search.start_from
    space = config.search_space
    if not isinstance(wanted, str):
        return [space.recorded(values) for values in wanted]
    try:
        _, ledger = read_search(wanted, config.search.storage_path)
    except UserError as error:
        raise UserError(f"search.start_from: {error}") from None
    distributions = config.distributions()
    found: list[dict[str, Any]] = []
    # Several networks of a trial may be on the front.
    trials = {point.trial.label: point.trial for point in ledger.front.members()}
    for trial in trials.values():
        values = {}
        for path, value in trial.values.items():
            if path in distributions:
                values[path] = value
        taken = _taken(values, distributions, f"{trial.label} of {wanted}")
        if taken and taken not in found:
            found.append(taken)
    return found


def _taken(
    values: dict[str, Any], distributions: dict[str, BaseDistribution], whose: str
) -> dict[str, Any]:
    """Those of the values that can be tried: numbers outside of the bounds too, but no choice that
    is none of the space's; each that is outside is told."""
    taken = {}
    for path, value in values.items():
        varies = distributions[path]
        if is_in(varies, value):
            taken[path] = value
            continue
        numeric = not isinstance(varies, CategoricalDistribution)
        if numeric and isinstance(value, int | float) and not isinstance(value, bool):
            taken[path] = value
            done = "it is tried all the same"
        else:
            done = "one that the space has is drawn instead"
        log.warning(
            "search.start_from: %s has %s = %s, which is outside of what the space varies in "
            "(%s); %s",
            whose,
            path,
            shorten(repr(value)),
            shown(varies),
            done,
        )
    return taken


def rebuild_study(search: str, storage_path: str, overrides: Sequence[str] = ()) -> int:
    """Makes Optuna's study of a search anew from its journal; how many trials it has then.

    The study as it was stays beside the journal with another name; in a database it is deleted.

    Raises:
        UserError: if there is no such search, it is running, or its journal cannot be read.
    """
    session = open_existing(search, storage_path, overrides)
    try:
        file = session.directory / STUDY_FILE
        if session.config.search.storage is not None:
            with suppress(KeyError):  # there is none
                optuna.delete_study(
                    study_name=session.directory.name, storage=session.config.search.storage
                )
        elif file.exists():
            file.replace(file.with_suffix(f".{datetime.now(UTC):%Y%m%d-%H%M%S}"))
        study = open_study(session, starts=False)
        rebuild(study, session.config.distributions(), session.ledger)
        for values in session.starts[len(study.get_trials(deepcopy=False)) :]:
            study.enqueue_trial(values)
        return len(session.ledger.trials)
    finally:
        session.journal.close()


def open_study(session: Session, *, starts: bool = True) -> optuna.Study:
    """Optuna's study of the search, made or found again; a new one begins with the `starts` of the
    search."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory = session.directory
    config = session.config
    storage: BaseStorage
    try:
        if config.search.storage is None:
            file = directory / STUDY_FILE
            _repair(file)
            storage = JournalStorage(JournalFileBackend(str(file)))
        else:
            database = RDBStorage(config.search.storage)
            if session.journal.fence is not None:
                session.journal.fence.guard(database.engine)
            storage = OnlyWriter(database)
        study = optuna.create_study(
            study_name=directory.name,
            storage=storage,
            sampler=config.build_sampler(session.number),
            directions=[o.direction.value for o in config.chosen_objectives()],
            load_if_exists=session.resumed,
        )
    except UserError:
        raise
    except optuna.exceptions.DuplicatedStudyError:
        raise UserError(
            f"search.storage has a study '{directory.name}' already; choose another name for this "
            "search"
        ) from None
    except Exception as error:  # every database raises its own kinds
        raise UserError(
            f"Optuna's storage of {directory.name} cannot be used: {first_line(error)}"
        ) from None
    if starts and not study.get_trials(deepcopy=False):
        for values in session.starts:
            study.enqueue_trial(values)
    return study


def _repair(file: Path) -> None:
    """Takes away what a killed process can leave of Optuna's journal: half a line, and its lock."""
    Path(f"{file}.lock").unlink(missing_ok=True)
    if file.exists():
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(file, whole)
