"""Optuna's study: kept in a database by the one driver that writes to it, and made anew from the
journal."""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from slimfront.search.record.ledger import Ledger
from slimfront.search.record.optuna_internals import trial_id
from slimfront.search.record.session import Session, open_existing
from slimfront.trainables.errors import UserError, first_line

# What lies outside is told by name, where values to start from are read.
warnings.filterwarnings("ignore", message="Fixed parameter .* is out of range")

STUDY_FILE = "study.journal"
"""Optuna's study, where it is in no database."""

_ANSWERS_S = 10
"""How long a database may take to let somebody in."""


def check_database(url: str) -> None:
    """Finds out whether the database at `url` answers, and makes nothing there.

    Raises:
        UserError: if it does not, or does not let us in.
    """
    try:
        place = make_url(url)
        if place.get_backend_name() == "sqlite":
            options = {}
            file = Path(place.database or "")
            made = not file.exists()
        else:
            options = {"connect_timeout": _ANSWERS_S}
            file = None
            made = False
        engine = create_engine(place, connect_args=options)
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        engine.dispose()
        if file is not None and made:
            file.unlink(missing_ok=True)
    except Exception as error:  # every database raises its own kinds
        raise UserError(
            f"search.storage: the database of the study does not answer ({first_line(error)}); "
            "start it, or set search.storage to one that runs"
        ) from None


class OnlyWriter(InMemoryStorage):
    """A study in memory and, ahead of that, in `database`, which nobody else may write to.

    Optuna's own cache of a database expects that others write, and so reads every trial under way
    each time it is asked for one
    more: with hundreds of them, a driver does little else. Ids of studies and trials are those in
    memory, not the database's.
    """

    def __init__(self, database: BaseStorage) -> None:
        super().__init__()
        self.database = database
        self.study_ids: list[int] = []
        """The database's, by the ids in memory."""
        self.trial_ids: list[int] = []

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """As Optuna has it; raises DuplicatedStudyError if the database has one of that name."""
        self.study_ids.append(self.database.create_new_study(directions, study_name))
        return super().create_new_study(directions, study_name)

    def get_study_id_from_name(self, study_name: str) -> int:
        """As Optuna has it; reads the study if that was not done yet."""
        known = {study.study_name for study in self.get_all_studies()}
        if study_name not in known:
            there = self.database.get_study_id_from_name(study_name)
            self._read(there, study_name)
        return super().get_study_id_from_name(study_name)

    def _read(self, there: int, name: str) -> None:
        database = self.database
        self.study_ids.append(there)
        directions = database.get_study_directions(there)
        here = super().create_new_study(directions, name)
        of_users = database.get_study_user_attrs(there)
        for key, value in of_users.items():
            super().set_study_user_attr(here, key, value)
        of_optuna = database.get_study_system_attrs(there)
        for key, value in of_optuna.items():
            super().set_study_system_attr(here, key, value)
        for trial in database.get_all_trials(there, deepcopy=False):
            self.trial_ids.append(trial_id(trial))
            super().create_new_trial(here, trial)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """As Optuna has it."""
        there = self.study_ids[study_id]
        self.database.set_study_user_attr(there, key, value)
        super().set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """As Optuna has it."""
        there = self.study_ids[study_id]
        self.database.set_study_system_attr(there, key, value)
        super().set_study_system_attr(study_id, key, value)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """As Optuna has it."""
        study_there = self.study_ids[study_id]
        there = self.database.create_new_trial(study_there, template_trial)
        self.trial_ids.append(there)
        return super().create_new_trial(study_id, template_trial)

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """As Optuna has it."""
        there = self.trial_ids[trial_id]
        self.database.set_trial_param(there, param_name, param_value_internal, distribution)
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """As Optuna has it."""
        there = self.trial_ids[trial_id]
        changed = self.database.set_trial_state_values(there, state, values)
        return changed and super().set_trial_state_values(trial_id, state, values)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """As Optuna has it."""
        there = self.trial_ids[trial_id]
        self.database.set_trial_intermediate_value(there, step, intermediate_value)
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As Optuna has it."""
        there = self.trial_ids[trial_id]
        self.database.set_trial_user_attr(there, key, value)
        super().set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As Optuna has it."""
        there = self.trial_ids[trial_id]
        self.database.set_trial_system_attr(there, key, value)
        super().set_trial_system_attr(trial_id, key, value)


def rebuild(
    study: optuna.Study, distributions: dict[str, BaseDistribution], ledger: Ledger
) -> None:
    """Puts the trials of the journal into an empty study, as running; `reconcile` then finds out
    what became of them.

    Numbers that the journal does not know, of trials that were proposed and never began, get values
    when they begin.
    """
    known: dict[int, dict[str, Any]] = {}
    for record in ledger.trials:
        known[record.number or 0] = record.values
    for number, repeated in ledger.repeated.items():
        known[number] = repeated.values
    last = max(known, default=-1)
    for number in range(last + 1):
        begun = known.get(number, {})
        values = {}
        for path in distributions:
            if path in begun:
                values[path] = begun[path]
        # As it was begun: values outside of the space's bounds are taken from what is enqueued.
        study.enqueue_trial(values)
        trial = study.ask()
        for path in values:
            suggest(trial, path, distributions[path])


def suggest(trial: optuna.Trial, path: str, distribution: BaseDistribution) -> Any:
    """The trial's value for a path: the one that it has, the one that it was enqueued with, or one
    drawn now."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(path, distribution.choices)
    if isinstance(distribution, FloatDistribution):
        ask: Callable[..., Any] = trial.suggest_float
    else:
        assert isinstance(distribution, IntDistribution)
        ask = trial.suggest_int
    return ask(
        path,
        distribution.low,
        distribution.high,
        log=distribution.log,
        step=distribution.step,
    )


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
    if not file.exists():
        return
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


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
        begun = len(study.get_trials(deepcopy=False))
        for values in session.starts[begun:]:
            study.enqueue_trial(values)
        return len(session.ledger.trials)
    finally:
        session.journal.close()
