"""The state of a search on disk: its directory, its journal, its config as it began, and Optuna's study."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from search.config import Config, dump, load
from search.journal import JOURNAL_FILE, Event, Journal, read_events
from search.records import Ledger
from search.settings import without_password
from trainables.errors import UserError
from trainables.options import suggest


@dataclass
class Session:
    """One run of the driver on a search: the first, or one that resumes it."""

    config: Config
    directory: Path
    journal: Journal
    earlier: list[Event]
    ledger: Ledger
    resumed: bool

    @property
    def number(self) -> int:
        """1 for the first."""
        return 1 + len([event for event in self.earlier if event["event"] == "session"])

    def seconds_before(self) -> float:
        """Seconds of wall time that earlier sessions took, up to their last sign of life."""
        spent, begun, last = 0.0, None, 0.0
        for event in self.earlier:
            if event["event"] == "session":
                spent += last - begun if begun is not None else 0.0
                begun = event["time"]
            last = event["time"]
        return (spent + (last - begun if begun is not None else 0.0)) / 1000


def begin(config: Config, name: str | None, dense_sizes: dict[str, float], starts: list[dict[str, Any]]) -> Session:
    """A new search, in a new directory. Raises UserError if there is one of that name, or the directory cannot be made."""
    directory = new_directory(config, name)
    journal = Journal(directory)
    begun = journal.append("begun", search=directory.name, config=dump(config), dense_sizes=dense_sizes, starts=starts)
    return Session(config, directory, journal, [begun], _ledger(config, begun, directory), resumed=False)


def take_up(search: str, storage_path: str, overrides: Sequence[str] = ()) -> Session:
    """A search that is there, with what its journal tells.

    Raises:
        UserError: if there is no such search, it is running, its journal cannot be read, or `overrides` change what may not.
    """
    directory = _directory(search, storage_path)
    journal = Journal(directory)
    try:
        earlier = list(read_events(directory / JOURNAL_FILE))
        if not earlier or earlier[0]["event"] != "begun":
            raise UserError(_UNREADABLE.format(search=search))
        config = resumed_config(earlier[0]["config"], overrides, search)
        ledger = _ledger(config, earlier[0], directory)
        for event in earlier:
            ledger.apply(event)
    except BaseException:
        journal.close()
        raise
    return Session(config, directory, journal, earlier, ledger, resumed=True)


_UNREADABLE = "the journal of {search} does not say what was searched; restore it from a copy, or start a new search"


def _ledger(config: Config, begun: Event, directory: Path) -> Ledger:
    return Ledger(config.chosen_objectives(), begun["dense_sizes"], config.chosen_constraints(), directory)


def new_directory(config: Config, name: str | None) -> Path:
    """The new directory of this search in its storage path; its name is the search's."""
    root = Path(config.search.storage_path).resolve()
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    names = [name] if name else [f"{config.name}-{stamp}", *(f"{config.name}-{stamp}-{n}" for n in range(2, 100))]
    for candidate in names:
        try:
            (root / candidate).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"search.storage_path: cannot write to {root}: {error.strerror}") from None
        return root / candidate
    if name:
        raise UserError(f"there is a search '{name}' already; continue it with `slimfront resume {name}`, or choose another name")
    raise UserError(f"search.storage_path: {root} has a hundred searches of this second")


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
"""What may change when a search is resumed; `search.storage` and `tracking.uri` only to give a password again."""


def resumed_config(text: str, overrides: Sequence[str], search: str) -> Config:
    """The config of a search as it began, with overrides.

    Raises:
        UserError: if something else would change.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        began = load(Path(file.name))
        for override in overrides:
            path = override.partition("=")[0]
            if not any(path == allowed or path.startswith(f"{allowed}.") for allowed in RESUMABLE):
                raise UserError(
                    f"--set {override}: a resumed search cannot change '{path}', only {', '.join(RESUMABLE)}; start a new search "
                    f"with search.start_from={search}"
                )
        config = load(Path(file.name), overrides)
    if without_password(config.search.storage or "") != without_password(began.search.storage or ""):
        raise UserError(
            f"search.storage: the study of {search} is at {began.search.storage or 'its own directory'}, and stays there"
        )
    if config.tracking.shown_uri() != began.tracking.shown_uri():
        raise UserError(f"tracking.uri: {search} is recorded at {began.tracking.shown_uri()}, and stays there")
    return config


def read_search(search: str, storage_path: str) -> tuple[Config, Ledger]:
    """The config of a search and what is known about its trials, as its journal tells it now; it may be running.

    Raises:
        UserError: if there is no such search, or its journal cannot be read.
    """
    directory = _directory(search, storage_path)
    events = read_events(directory / JOURNAL_FILE)
    begun = next(iter(events), None)
    if begun is None or begun["event"] != "begun":
        raise UserError(_UNREADABLE.format(search=search))
    config = resumed_config(begun["config"], (), search)
    ledger = _ledger(config, begun, directory)
    for event in events:
        ledger.apply(event)
    return config, ledger


def _directory(search: str, storage_path: str) -> Path:
    directory = Path(storage_path).resolve() / search
    if not (directory / JOURNAL_FILE).is_file():
        known = sorted(file.parent.name for file in Path(storage_path).resolve().glob(f"*/{JOURNAL_FILE}"))
        raise UserError(f"there is no search '{search}' in {storage_path}; {suggest(search, known)}")
    return directory


def starting_values(config: Config) -> list[dict[str, Any]]:
    """The values to try first: those of the config, or of the front of an earlier search as far as they vary here."""
    wanted = config.search.start_from
    if not isinstance(wanted, str):
        return [dict(values) for values in wanted]
    try:
        _, ledger = read_search(wanted, config.search.storage_path)
    except UserError as error:
        raise UserError(f"search.start_from: {error}") from None
    front = ledger.front()
    values = [{path: value for path, value in point.trial.values.items() if path in config.space} for point in front]
    return [v for number, v in enumerate(values) if v and v not in values[:number]]


def open_study(session: Session) -> optuna.Study:
    """Optuna's study of the search, made or found again."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory, config = session.directory, session.config
    storage: BaseStorage
    try:
        if config.search.storage is None:
            file = directory / "study.journal"
            _mend(file)
            storage = JournalStorage(JournalFileBackend(str(file)))
        else:
            storage = RDBStorage(config.search.storage)
        study = optuna.create_study(
            study_name=directory.name,
            storage=storage,
            sampler=config.search.build_sampler(),
            directions=[o.direction.value for o in config.chosen_objectives()],
            load_if_exists=session.resumed,
        )
    except UserError:
        raise
    except optuna.exceptions.DuplicatedStudyError:
        raise UserError(f"search.storage has a study '{directory.name}' already; choose another name for this search") from None
    except Exception as error:  # every database raises its own kinds
        raise UserError(f"Optuna's storage of {directory.name} cannot be used: {str(error).splitlines()[0]}") from None
    if not study.get_trials(deepcopy=False):
        for values in session.earlier[0]["starts"]:
            study.enqueue_trial(values)
    return study


def _mend(file: Path) -> None:
    """Takes away what a killed process can leave of Optuna's journal: half a line, and its lock."""
    Path(f"{file}.lock").unlink(missing_ok=True)
    if file.exists():
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(file, whole)
