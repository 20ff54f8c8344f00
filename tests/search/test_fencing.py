"""A search has one driver, whatever processes do and whenever they are stopped."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from optuna.storages import RDBStorage
from optuna.study import StudyDirection

from slimfront.search.record import fencing
from slimfront.search.record.fencing import Fence, Superseded
from slimfront.trainables.errors import UserError


@pytest.fixture(autouse=True)
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fencing, "LEASE_S", 1.0)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/study.db"
    url: str = request.getfixturevalue("postgres")
    return url


RACE = """
import random, sys, time
from slimfront.search.record import fencing
fencing.LEASE_S = 0.5
seed, database, search = sys.argv[1:]
chance = random.Random(int(seed))
for name in ("_row", "_mine", "_wait_for_loss"):
    def late(self, *args, real=getattr(fencing.Fence, name)):
        time.sleep(chance.random() / 5)
        made = real(self, *args)
        time.sleep(chance.random() / 5)
        return made
    setattr(fencing.Fence, name, late)
fence = fencing.Fence(database, search, seed)
try:
    fence.take()
except fencing.UserError as error:
    print("refused")
else:
    print("took", fence.number, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("round_number", range(3))
def test_of_processes_that_race_one_gets_the_search(database: str, round_number: int) -> None:
    search = f"race-{time.monotonic_ns()}"
    Fence(database, search, "x")  # makes the table
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(10 * round_number + n), database, search],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(3)
    ]
    try:
        said = []
        for racer in racers:
            assert racer.stdout is not None
            said.append(racer.stdout.readline().strip())
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert sorted(said) == ["refused", "refused", "took 1"]


STOPPED = """
import sys, time
from sqlalchemy.exc import SQLAlchemyError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from slimfront.search.record import fencing
fencing.LEASE_S = 1.0
database, search = sys.argv[1:]
fence = fencing.Fence(database, search, "stopped")
fence.take()
storage = RDBStorage(database)
fence.guard(storage.engine)
study = storage.create_new_study([StudyDirection.MINIMIZE], search)
print("begun", flush=True)
while True:
    try:
        storage.create_new_trial(study)
        fence.check()
    except fencing.Superseded:
        print("superseded", flush=True)
        break
    except SQLAlchemyError:
        continue  # PostgreSQL ended the write that it was stopped in
    time.sleep(0.1)  # a SQLite that is written to all the time lets nobody read
"""


def stop_between_writes(driver: "subprocess.Popen[str]", database: str) -> None:
    """Stops the driver while it does not write: who is stopped within a write to SQLite keeps the
    file locked, and nobody can take the search until it goes on."""
    for _ in range(100):
        os.kill(driver.pid, signal.SIGSTOP)
        if not database.startswith("sqlite"):
            return
        with contextlib.closing(
            sqlite3.connect(database.removeprefix("sqlite:///"), timeout=0.2)
        ) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                os.kill(driver.pid, signal.SIGCONT)
                time.sleep(0.05)
            else:
                connection.rollback()
                return
    pytest.fail("the driver was within a write each time that it was stopped")


def test_a_driver_that_was_stopped_past_its_lease_writes_nothing_when_it_wakes_up(
    database: str,
) -> None:
    search = f"stopped-{time.monotonic_ns()}"
    driver = subprocess.Popen(
        [sys.executable, "-c", STOPPED, database, search], stdout=subprocess.PIPE, text=True
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "begun\n"
        time.sleep(0.3)
        other = Fence(database, search, "other")
        with pytest.raises(UserError, match="running in another process \\(stopped\\)"):
            other.take()
        stop_between_writes(driver, database)
        other.take()
        assert other.number == 2
        storage = RDBStorage(database)
        study = storage.get_study_id_from_name(search)
        before = len(storage.get_all_trials(study))
        os.kill(driver.pid, signal.SIGCONT)
        assert driver.stdout.readline() == "superseded\n"
        assert driver.wait(20) == 0
        assert len(storage.get_all_trials(study)) == before
        other.check()
        other.release()
    finally:
        driver.kill()
        driver.wait()


HELD = """
import os, signal, sys
from sqlalchemy.exc import SQLAlchemyError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from sqlalchemy import event
from slimfront.search.record import fencing
fencing.LEASE_S = 1.0
database, search = sys.argv[1:]
fence = fencing.Fence(database, search, "held")
fence.take()
storage = RDBStorage(database)
fence.guard(storage.engine)
study = storage.create_new_study([StudyDirection.MINIMIZE], search)
def stop(connection, cursor, statement, *others):
    if statement.startswith("INSERT INTO trials"):
        print("within a write", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
event.listen(storage.engine, "after_cursor_execute", stop)
try:
    storage.create_new_trial(study)
except fencing.Superseded:  # Optuna tries once more what a database has ended
    print("superseded", flush=True)
except SQLAlchemyError:
    print("ended", flush=True)
try:
    fence.check()
except fencing.Superseded:
    print("superseded", flush=True)
"""


def test_a_driver_that_stands_still_within_a_write_to_postgresql_loses_it(postgres: str) -> None:
    search = f"held-{time.monotonic_ns()}"
    driver = subprocess.Popen(
        [sys.executable, "-c", HELD, postgres, search], stdout=subprocess.PIPE, text=True
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "within a write\n"
        other = Fence(postgres, search, "other")
        other.take()
        assert other.number == 2
        storage = RDBStorage(postgres)
        study = storage.get_study_id_from_name(search)
        os.kill(driver.pid, signal.SIGCONT)
        first, second = driver.stdout.read().split()
        assert first in ("ended", "superseded")
        assert second == "superseded"
        assert driver.wait(20) == 0
        assert not storage.get_all_trials(study)
        other.release()
    finally:
        driver.kill()
        driver.wait()


def test_a_write_to_the_study_and_a_takeover_do_not_overlap(database: str) -> None:
    search = f"overlap-{time.monotonic_ns()}"
    first = Fence(database, search, "first")
    first.take()
    storage = RDBStorage(database)
    first.guard(storage.engine)
    study = storage.create_new_study([StudyDirection.MINIMIZE], search)
    storage.create_new_trial(study)
    assert first.keeper is not None
    first.closing.set()
    first.keeper.join()
    second = Fence(database, search, "second")
    second.take()
    with pytest.raises(Superseded):
        storage.create_new_trial(study)
    assert len(storage.get_all_trials(study)) == 1
    first.release()
    second.check()  # who was superseded lets go of nothing
    second.release()


def test_a_driver_that_ends_need_not_be_waited_for(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fencing, "LEASE_S", 1000.0)
    search = f"ends-{time.monotonic_ns()}"
    for number in (1, 2):
        fence = Fence(database, search, "me")
        fence.take()
        assert fence.number == number
        fence.release()
        fence.release()


def test_who_waits_for_a_driver_that_ends_gets_the_search(database: str) -> None:
    search = f"waits-{time.monotonic_ns()}"
    first, second = (Fence(database, search, name) for name in ("first", "second"))
    first.take()
    assert first.keeper is not None
    first.closing.set()
    first.keeper.join()
    timer = threading.Timer(0.3, first.release)
    timer.start()
    second.take()
    assert second.number == 2
    timer.join()
    second.release()


def test_a_database_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"search\.storage: the database that says who runs one cannot be used: .*"
    ):
        Fence(f"sqlite:///{tmp_path}/nowhere/x.db", "one", "me")
