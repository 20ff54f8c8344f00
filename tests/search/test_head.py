"""A head node that stops in the middle of a search: one sentence, and the search goes on later."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from slimfront.search.engine.head import Head
from slimfront.search.engine.interrupt import Interrupt
from slimfront.search.record.events import TrialEnded
from slimfront.search.record.journal import JOURNAL_FILE, read_events
from tests.conftest import SMALL_CONFIG

ROOT = Path(__file__).parents[2]
IMPATIENT = """
from slimfront.search import cli
from slimfront.search.engine import head
head._LOOK_EVERY_S, head._LOST_AFTER, head._ORDERLY_S = 0.5, 3, 5.0
cli.main()
"""


def ended(directory: Path) -> int:
    file = directory / "runs" / "headless" / JOURNAL_FILE
    events = read_events(file) if file.exists() else ()
    return sum(isinstance(event, TrialEnded) for event in events)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_head_that_stops_ends_the_search_in_one_sentence_and_loses_nothing(
    tmp_path: Path,
) -> None:
    config = SMALL_CONFIG | {"search": {"trials": 500, "concurrency": 1}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IMPATIENT, "search", "c.yaml", "--name", "headless"]
    driver = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 150
    while ended(tmp_path) < 2 and time.monotonic() < until:
        time.sleep(0.3)
    children = psutil.Process(driver.pid).children(recursive=True)
    (gcs,) = [child for child in children if "gcs_server" in child.name()]
    gcs.kill()
    said = driver.communicate(timeout=60)[1]
    assert driver.returncode == 2
    assert "Error: Ray's head node stopped while headless ran; what was finished is safe" in said
    assert "slimfront resume headless" in said.replace("\n", " ")
    assert "Traceback" not in said
    finished = ended(tmp_path)
    assert finished >= 2
    more = ["resume", "headless", "--set", f"search.trials={finished + 1}", "--json"]
    resumed = subprocess.run(
        [sys.executable, "-m", "slimfront", *more],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert resumed.returncode == 0, resumed.stderr
    trials = json.loads(resumed.stdout)["trials"]
    assert trials["completed"] + trials["stopped"] == finished + 1


def test_a_head_that_misses_a_look_or_two_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimfront.search.engine.head._LOOK_EVERY_S", 0.01)
    interrupt = Interrupt()
    head = Head("127.0.0.1:1", interrupt, "lost")
    answers = iter([True, False, False, False, False, True] * 3)

    def answer() -> bool:
        found = next(answers, None)
        if found is None:
            head.over.set()
        return found is not False

    monkeypatch.setattr(head, "answers", answer)
    watch = threading.Thread(target=head.watch)
    watch.start()
    watch.join(timeout=20)
    assert not watch.is_alive()
    assert not head.lost.is_set()
    assert not interrupt.requested
