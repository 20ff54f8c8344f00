"""Searches that were cut off and go on: what must not be lost, done again or told twice."""

import contextlib
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from slimfront.search.config.loading import load
from slimfront.search.engine.interrupt import Interrupt
from slimfront.search.engine.progress import Progress
from slimfront.search.engine.runner import resume_search, run_search, sync_search
from slimfront.search.record.journal import JOURNAL_FILE, Journal, read_events
from slimfront.search.record.ledger import Ledger, SearchResult
from slimfront.search.record.session import read_search
from slimfront.search.record.study import rebuild_study
from slimfront.trainables.errors import UserError
from tests.conftest import SMALL_CONFIG, small_config
from tests.search.searches import check_histories, replace_in_journal, runs_of, study_of

pytestmark = pytest.mark.timeout(240)

TRIALS = 24
EPOCHS = 10


def slimfront(*arguments: str, directory: Path) -> "subprocess.Popen[str]":
    command = [str(Path(sys.executable).with_name("slimfront")), *arguments]
    return subprocess.Popen(
        command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def events(directory: Path, name: str = "chaos") -> list[dict[str, Any]]:
    file = directory / "runs" / name / JOURNAL_FILE
    return list(read_events(file)) if file.exists() else []


def kill_at_random(
    driver: "subprocess.Popen[str]",
    directory: Path,
    luck: random.Random,
    most: int,
    *,
    worker: bool,
) -> Counter[str]:
    """Lets 2 to `most` more events happen, then kills the driver, or a worker and a little later
    the driver: what was hit."""
    hits: Counter[str] = Counter()
    wanted = len(events(directory)) + luck.randint(2, most)
    while len(events(directory)) < wanted and driver.poll() is None:
        time.sleep(0.02)
    if worker:
        ours = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
        busy = [p for p in ours if "ray::CandidateTrainable" in " ".join(p.cmdline() or [""])]
        if busy:
            busy[0].kill()
            hits["workers"] += 1
        time.sleep(luck.random())
    hits["drivers"] += driver.poll() is None
    family = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
    driver.kill()
    driver.communicate()
    # Ray's processes end when their driver does, a little later; a reboot would end them at once.
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return hits


def chaos(directory: Path, seed: int, rounds: int, workers: int, most: int) -> Counter[str]:
    """A search whose driver is killed `rounds` times, in `workers` of them after a worker, and
    resumed: what was hit."""
    luck, hits = random.Random(seed), Counter[str]()
    training = SMALL_CONFIG["training"] | {"epochs": EPOCHS, "report_every": 2}
    options = {"trials": TRIALS, "retries": 10, "early_stopping": {"reduction": 2, "grace": 2}}
    (directory / "small.yaml").write_text(
        yaml.safe_dump(SMALL_CONFIG | {"training": training, "search": options})
    )
    worker_rounds = set(luck.sample(range(rounds), workers))
    driver = slimfront("search", "small.yaml", "--name", "chaos", directory=directory)
    for number in range(rounds):
        while not events(directory):
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.1)
        hits += kill_at_random(driver, directory, luck, most, worker=number in worker_rounds)
        driver = slimfront("resume", "chaos", "--json", directory=directory)
    out, err = driver.communicate(timeout=200)
    assert driver.returncode == 0, err
    hits["trials"] = check_chaos(directory, json.loads(out))
    return hits


def check_chaos(directory: Path, result: dict[str, Any]) -> int:
    """Exactly the trials that were asked for, in Optuna and in MLflow, each once, none running,
    every history whole: how many."""
    counted = Counter(event.number for event in events(directory) if event.kind == "ended")
    assert sorted(number for number in counted if number is not None) == list(range(TRIALS))
    assert set(counted.values()) == {1}
    assert sum(result["trials"].values()) == TRIALS
    ledger = resume_ledger(directory)
    told = study_of(directory, ledger).trials
    assert [trial.number for trial in told] == list(range(TRIALS))
    assert {trial.state for trial in told} == {TrialState.COMPLETE}
    parent, children = runs_of(directory, ledger)
    assert set(children) == {"dense", *(f"trial-{n:03d}" for n in range(TRIALS))}
    assert {run.info.status for run in [parent, *children.values()]} == {"FINISHED"}
    check_histories(directory, ledger, epochs=EPOCHS)
    return len(children) - 1  # without the dense reference


def resume_ledger(directory: Path) -> SearchResult:
    """What the journal tells, without running anything."""
    from slimfront.search.record.session import open_existing

    session = open_existing("chaos", str(directory / "runs"))
    session.journal.close()
    return SearchResult(
        "chaos", session.ledger, session.ledger.front.members(), 0.0, "", interrupted=False
    )


@pytest.mark.slow
def test_a_search_survives_three_kills_of_its_driver_and_two_of_its_workers(tmp_path: Path) -> None:
    assert chaos(tmp_path, seed=1, rounds=3, workers=2, most=30)["drivers"] == 3


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """A search that has ended, called done, for tests that must not change it."""
    directory = tmp_path_factory.mktemp("untouched")
    run_search(small_config(directory, search={"trials": 2}), name="done")
    return directory


@pytest.fixture
def finished(untouched: Path, tmp_path: Path) -> Path:
    """A copy of it that names no path of the original."""
    shutil.copytree(untouched, tmp_path, dirs_exist_ok=True)
    replace_in_journal(tmp_path / "runs" / "done" / JOURNAL_FILE, str(untouched), str(tmp_path))
    with contextlib.closing(sqlite3.connect(tmp_path / "slimfront.db")) as store, store:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            store.execute(
                f"update {table} set {column} = replace({column}, ?, ?)",
                (str(untouched), str(tmp_path)),
            )
    return tmp_path


@pytest.mark.slow
def test_a_search_that_was_moved_and_died_before_its_first_session_goes_on(
    finished: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    (finished / "runs").rename(moved)
    result = resume_search("done", ["search.trials=3"], storage_path=str(moved))
    assert len(result.ledger.with_status("completed")) == 3
    assert all(point.file and point.file.is_file() for point in result.front)
    journal = moved / "done" / JOURNAL_FILE
    # It had begun, and no more.
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    (moved / "done" / "study.journal").write_text("nonsense\nnonsense\n")
    with pytest.raises(UserError, match="Optuna's storage of done cannot be used"):
        resume_search("done", storage_path=str(moved))
    (moved / "done" / "study.journal").unlink()
    again = resume_search("done", storage_path=str(moved))
    assert len(again.ledger.with_status("completed")) == 2


def test_a_finished_search_can_be_given_more_trials_and_doubles_nothing(finished: Path) -> None:
    again = resume_search("done", ["search.trials=3"], storage_path=str(finished / "runs"))
    assert len(again.ledger.trials) == 3
    check_histories(finished, again, epochs=2)
    same = resume_search("done", storage_path=str(finished / "runs"))
    assert len(same.ledger.trials) == 3
    assert same.front[0].measures == again.front[0].measures
    assert len(study_of(finished, same).trials) == 3


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("dome", "", "there is no search 'dome' in .*; did you mean 'done'"),
        (
            "done",
            "training.epochs=9",
            r"a resumed search cannot change 'training\.epochs', only search\.trials, search\.time",
        ),
        (
            "done",
            "space.training.lr={low: 1, high: 2}",
            r"a resumed search cannot change 'space\.training\.lr'",
        ),
        ("done", "search.trials=0", "'search.trials': it should be greater than or equal to 1"),
        (
            "done",
            "tracking.uri=sqlite:///other.db",
            r"tracking\.uri: done is recorded at sqlite:.*, and stays there",
        ),
        (
            "done",
            "search.concurrency=auto & resources.gpu=64",
            r"resources\.gpu: a trial asks for 64 GPU",
        ),
    ],
)
def test_what_a_resume_cannot_do_is_refused(
    untouched: Path, name: str, override: str, message: str
) -> None:
    before = (untouched / "runs" / "done" / JOURNAL_FILE).read_bytes()
    overrides = override.split(" & ") if override else []
    with pytest.raises(UserError, match=message):
        resume_search(name, overrides, storage_path=str(untouched / "runs"))
    assert (untouched / "runs" / "done" / JOURNAL_FILE).read_bytes() == before


def test_a_second_search_of_a_name_is_refused_and_so_is_resuming_one_that_runs(
    untouched: Path,
) -> None:
    with pytest.raises(
        UserError,
        match="there is a search 'done' already; continue it with `slimfront resume done`",
    ):
        run_search(small_config(untouched), name="done")
    journal = Journal(untouched / "runs" / "done")
    with pytest.raises(UserError, match="the search done is running in another process"):
        resume_search("done", storage_path=str(untouched / "runs"))
    journal.close()


def test_a_state_that_cannot_be_read_is_refused_and_never_begun_again(untouched: Path) -> None:
    directory = untouched / "runs" / "done"
    study = directory / "study.journal"
    kept = study.read_bytes()
    study.unlink()
    with pytest.raises(
        UserError,
        match=(
            r"Optuna's study 'done' has no trial-000, .* which the journal has; "
            r".*slimfront rebuild done"
        ),
    ):
        resume_search("done", storage_path=str(untouched / "runs"))
    study.write_bytes(kept)
    journal = directory / JOURNAL_FILE
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(["nonsense\n", *lines[1:]]))
    with pytest.raises(UserError, match="is damaged in line 1"):
        resume_search("done", storage_path=str(untouched / "runs"))
    journal.write_text("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("keep", [2, 5, 9])
def test_a_journal_that_is_older_than_its_study_is_refused_and_the_study_can_be_made_anew(
    untouched: Path, keep: int
) -> None:
    storage_path = str(untouched / "runs")
    journal = untouched / "runs" / "done" / JOURNAL_FILE
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:keep]))  # as a copy of the day before
    with pytest.raises(
        UserError,
        match=(
            r"the journal of done is older than Optuna's study, which knows how "
            r"trial-\d+.* ended"
        ),
    ):
        resume_search("done", storage_path=storage_path)
    known = {record.label: record.values for record in read_search("done", storage_path)[1].trials}
    assert rebuild_study("done", storage_path) == len(known)
    assert list((untouched / "runs" / "done").glob("study.2*"))
    result = resume_search("done", storage_path=storage_path)
    ledger = result.ledger
    assert (
        len(ledger.trials)
        == ledger.planned
        == len(ledger.with_status("completed")) + len(ledger.with_status("stopped"))
    )
    assert {
        record.label: record.values for record in ledger.trials if record.label in known
    } == known


def test_a_study_that_is_lost_is_made_anew_and_knows_how_trials_ended(untouched: Path) -> None:
    storage_path = str(untouched / "runs")
    (untouched / "runs" / "done" / "study.journal").write_bytes(b"\x00damaged\n")
    rebuild_study("done", storage_path)
    before = read_search("done", storage_path)[1]
    resume_search("done", storage_path=storage_path)
    storage = JournalStorage(JournalFileBackend(str(untouched / "runs" / "done" / "study.journal")))
    study = optuna.load_study(study_name="done", storage=storage)
    told = {
        trial.number: trial.values
        for trial in study.get_trials()
        if trial.state is TrialState.COMPLETE
    }
    expected = {
        r.number: [r.measures["val_accuracy"], r.measures["nonzero_params"]]
        for r in before.trials
        if r.status != "failed"
    }
    assert told == expected


def test_sync_delivers_what_the_store_does_not_have(finished: Path) -> None:
    (finished / "slimfront.db").rename(finished / "gone.db")
    (finished / "runs" / "done" / "delivered").unlink()
    assert sync_search("done", str(finished / "runs")) == (True, [])
    result = resume_search("done", storage_path=str(finished / "runs"))
    assert set(runs_of(finished, result)[1]) == {"dense", "trial-000", "trial-001"}
    check_histories(finished, result, epochs=2)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_front_of_an_earlier_search_and_given_values_are_tried_first(finished: Path) -> None:
    given = {"penalties.layer.strength": 2.5, "sparsifier.sparsity": 0.25}
    options: dict[str, Any] = {"trials": 1, "start_from": [given]}
    first = run_search(small_config(finished, search=options), name="first")
    assert first.ledger.trials[0].values == given
    front = first.front[0].trial.values
    second = run_search(
        small_config(finished, search={"trials": 1, "start_from": "first"}), name="second"
    )
    assert second.ledger.trials[0].values == front
    with pytest.raises(UserError, match=r"search\.start_from: there is no search 'nowhere'"):
        run_search(small_config(finished, search={"start_from": "nowhere"}))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_search_ends_after_its_time_and_after_trials_without_a_gain(tmp_path: Path) -> None:
    interrupt = Interrupt()

    class EndsItsTime(Progress):
        """The time is up as soon as a trial has ended."""

        def update(self, ledger: Ledger) -> None:
            assert interrupt.deadline is not None
            if ledger.with_status("completed"):
                interrupt.end_after(0)
            else:
                assert 3000 < interrupt.deadline - time.monotonic() < 3600

    many = small_config(tmp_path, search={"trials": 1000, "time": "1h"}, resources={"pack": 1})
    timed = run_search(many, EndsItsTime(), interrupt=interrupt)
    assert 0 < len(timed.ledger.trials) < 100
    assert not timed.interrupted
    # Values that differ, so that each is trained, and networks that do not.
    still = {"compaction.tolerance": {"low": 1e-4, "high": 1e-3}}
    training = SMALL_CONFIG["training"] | {"seed": 3}
    options = {"trials": 1000, "patience": 3, "concurrency": 1}
    patient = run_search(small_config(tmp_path, search=options, space=still, training=training))
    assert len(patient.ledger.with_status("completed")) == 4


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_optuna_can_keep_its_study_in_a_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db"
    run_search(small_config(tmp_path, search={"trials": 2, "storage": url}), name="stored")
    result = resume_search("stored", ["search.trials=3"], storage_path=str(tmp_path / "runs"))
    assert len(result.ledger.with_status("completed")) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_optuna_can_keep_its_study_in_postgresql_whose_password_is_written_nowhere(
    tmp_path: Path, postgres: str
) -> None:
    config = small_config(
        tmp_path,
        search={"trials": 2, "storage": postgres},
        training={"epochs": 1, "batch_size": 512},
    )
    run_search(config, name="stored")
    written = [
        file for file in tmp_path.rglob("*") if file.is_file() and b":secret@" in file.read_bytes()
    ]
    assert written == []
    runs = str(tmp_path / "runs")
    with pytest.raises(UserError, match=r"Optuna's storage of stored cannot be used: .*password"):
        resume_search("stored", ["search.trials=3"], storage_path=runs)
    with pytest.raises(
        UserError, match=r"search\.storage: the study of stored is at postgresql://anna@/test_"
    ):
        resume_search(
            "stored", [f"search.storage=sqlite:///{tmp_path}/other.db"], storage_path=runs
        )
    result = resume_search(
        "stored", ["search.trials=3", f"search.storage={postgres}"], storage_path=runs
    )
    assert len(result.ledger.with_status("completed")) == 3
    study = optuna.load_study(study_name="stored", storage=postgres)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_search_whose_database_goes_away_ends_with_a_sentence_and_goes_on_later(
    tmp_path: Path, postgres: str, postgres_server: Any
) -> None:
    name = postgres.partition("@/")[2].partition("?")[0]

    class GoesAway(Progress):
        """Ends the connections to the database, and allows no new ones, after a first trial."""

        def update(self, ledger: Ledger) -> None:
            if ledger.with_status("completed") and not self.gone:
                self.gone = True
                postgres_server.psql(f"alter database {name} allow_connections false")
                postgres_server.psql(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    f"where datname = '{name}'"
                )

        gone = False

    config = small_config(tmp_path, search={"trials": 2, "concurrency": 1, "storage": postgres})
    with pytest.raises(
        UserError,
        match=r"left cannot be kept in .* \(the database of the study: "
        r".*(terminat|not currently acc).*\); what is "
        r"there is safe: mend that, then `slimfront resume left`",
    ):
        run_search(config, GoesAway(), name="left")
    postgres_server.psql(f"alter database {name} allow_connections true")
    result = resume_search(
        "left", [f"search.storage={postgres}"], storage_path=str(tmp_path / "runs")
    )
    assert len(result.ledger.with_status("completed")) == 2


@pytest.mark.usefixtures("ray_session")
def test_a_storage_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Optuna's storage of .* cannot be used"):
        run_search(small_config(tmp_path, search={"trials": 1, "storage": "nonsense://x"}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "search.sampler",
            {"name": "tpe", "n_start": 3},
            "the sampler 'tpe' has no option 'n_start'; did you mean",
        ),
        ("search.sampler", {"n_startup_trials": 3}, "the sampler has no 'name'; known: gp, nsga2"),
        ("search.time", "soon", "'soon' is not a time; it needs the form 90, 90s, 30m, 2h or 1d"),
        ("search.time", "0", "it must be above 0"),
        ("search.early_stopping", {"grace": 0}, "it must be at least 1 epoch"),
        ("search.early_stopping", {"eta": 3}, "unknown key 'eta'"),
        (
            "search.start_from",
            [{"model.width": 3}],
            r"search.start_from\[0\]: 'model.width' does not vary",
        ),
        (
            "search.start_from",
            [{"sparsifier.sparsity": 0.95}],
            "0.95 is outside of what 'sparsifier.sparsity' varies in",
        ),
        ("constraints", {"layer": "<= 3"}, "'layer' is not a measure; did you mean 'layers'"),
        ("constraints", {"layers": "3"}, "it needs the form"),
    ],
)
def test_options_of_the_search_that_mean_nothing_are_refused(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    head, _, rest = key.partition(".")
    tree = SMALL_CONFIG | {head: SMALL_CONFIG.get(head, {}) | {rest: value} if rest else value}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=message):
        load(path)
