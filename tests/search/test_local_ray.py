"""A Ray of a search's own: where it listens, how long it is waited for, and that nothing of it
stays."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray._private import services

from slimfront.search.engine.leftovers import MARK, Leftovers
from slimfront.search.engine.ray_internals import local_ray, places
from slimfront.trainables.errors import UserError
from tests.conftest import SMALL_CONFIG
from tests.search.clusters import RayCluster, wait_for

ROOT = Path(__file__).parents[2]
LEAVING = """
import subprocess, os, sys, time
from torch import nn

def network(width):
    if os.environ.get("RAY_RAYLET_PID"):  # in a trial's process
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(987)"])
        command = [sys.executable, "-c", "import time; time.sleep(986)"]
        subprocess.Popen(command, start_new_session=True, close_fds=True)
        subprocess.run(["setsid", "--fork", "sleep", "984"])
        if not os.fork():
            if os.fork():
                os._exit(0)
            time.sleep(985)
            os._exit(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
"""


def started(
    directory: Path, *, trials: int, epochs: int, code: str = LEAVING
) -> "subprocess.Popen[str]":
    """A search whose trials run this code of its user's."""
    write_search(directory, trials=trials, epochs=epochs, code=code)
    command = [sys.executable, "-m", "slimfront", "search", "c.yaml", "--name", "leaving"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def write_search(directory: Path, *, trials: int, epochs: int, code: str = LEAVING) -> None:
    """The config of such a search, and its code."""
    (directory / "leaving.py").write_text(code)
    model = {"factory": "leaving:network", "args": {"width": 4}}
    space = {"sparsifier.sparsity": {"low": 0.1, "high": 0.9}}
    tree = SMALL_CONFIG | {"model": model, "space": space, "penalties": {}}
    tree |= {
        "search": {"trials": trials},
        "training": SMALL_CONFIG["training"] | {"epochs": epochs},
    }
    (directory / "c.yaml").write_text(yaml.safe_dump(tree))


def of_search(directory: Path) -> list[psutil.Process]:
    """All processes whose working directory is the search's, forks among them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def commands(directory: Path) -> list[str]:
    """The command lines of all processes of a search that still run."""
    found = []
    for process in of_search(directory):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one
            found.append(" ".join(process.cmdline()))
    return found


def listening_of(processes: list[psutil.Process]) -> list[tuple[str, Any]]:
    """The names of those that listen, with the addresses; one that has ended meanwhile has none."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            name, connections = process.name(), process.net_connections()
            found += [(name, one.laddr) for one in connections if one.status == psutil.CONN_LISTEN]
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for process in of_search(tmp_path):
        process.kill()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_search_listens_on_loopback_alone_and_nothing_of_it_stays_when_its_driver_is_killed(
    directory: Path,
) -> None:
    driver = started(directory, trials=500, epochs=200)
    wait_for(lambda: any("time.sleep(986)" in command for command in commands(directory)), 100)
    listening = listening_of(of_search(directory))
    assert len(listening) > 5
    assert [
        found for found in listening if found[1].ip.removeprefix("::ffff:") != "127.0.0.1"
    ] == []

    assert len(of_search(directory)) > 8
    for server in ("dashboard/dashboard.py", "monitor.py", "log_monitor.py"):
        assert not any(server in command for command in commands(directory)), server
    driver.send_signal(signal.SIGKILL)
    wait_for(lambda: not of_search(directory), 25)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_what_trials_started_ends_with_the_search_which_says_so(directory: Path) -> None:
    driver = started(directory, trials=2, epochs=1)
    _, said = driver.communicate(timeout=150)
    assert driver.returncode == 0, said
    assert of_search(directory) == []
    assert "processes that the search had started still ran, and were ended: " in " ".join(
        said.split()
    )
    assert "sleep 984" in " ".join(said.split())


def test_a_process_with_another_mark_is_let_alone() -> None:
    program = [sys.executable, "-c", "import time; time.sleep(60)"]
    leftovers = Leftovers()
    mine = subprocess.Popen(program, env=os.environ | {MARK: leftovers.mark})
    others = [
        subprocess.Popen(program, env=os.environ | {MARK: "f" * 24}),
        subprocess.Popen(program),
    ]
    try:
        assert leftovers.end() == [" ".join(program)]
        assert mine.wait(5) == -signal.SIGTERM
        assert [process.poll() for process in others] == [None, None]
    finally:
        for process in [mine, *others]:
            process.kill()
            process.wait()


DYING = """
import os, signal
from torch import nn

def network(width):
    if os.environ.get("RAY_RAYLET_PID"):
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_process_that_dies_is_told_in_words_of_ours(directory: Path) -> None:
    driver = started(directory, trials=1, epochs=1, code=DYING)
    _, said = driver.communicate(timeout=150)
    assert driver.returncode == 1
    text = " ".join(said.split())
    assert (
        "trial-000 lost its process (it ended without saying why: it crashed, or was killed, "
        "perhaps for want of" in text
    )
    assert "raylet" not in said
    assert "worker" not in said
    assert max(len(line) for line in said.splitlines()) < 200


def test_a_ray_that_does_not_come_up_is_one_sentence_after_a_wait_that_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local_ray, "START_S", 1.0)
    monkeypatch.setattr(local_ray, "_SAY_EVERY_S", 0.3)
    asked = []

    def init(**_: object) -> None:
        def never(*_: object) -> None:
            asked.append(None)
            raise RuntimeError("no node yet")

        monkeypatch.setattr(services, "get_node", never)
        with local_ray._patient(time.monotonic()):
            try:
                services.get_node("address", "node")
            except RuntimeError:
                raise Exception(
                    "The current node timed out during startup. This could\nhappen"
                ) from None

    monkeypatch.setattr(local_ray.ray, "init", init)
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: None)
    with pytest.raises(
        UserError,
        match=(
            r"Ray did not start within \d+ s \(The current node timed out during "
            r"startup\. This could\)"
        ),
    ):
        local_ray.start()
    assert len(asked) > 2
    assert "Ray has been starting for" in caplog.text


def test_where_ray_cannot_write_it_is_not_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_path: Path) -> "shutil._ntuple_diskusage":
        return shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)

    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(places.shutil, "disk_usage", full)
    with pytest.raises(
        UserError,
        match=(
            r"Ray cannot start: .* has 1 MB left, and it keeps its logs and sockets "
            r"there; set RAY_TMPDIR"
        ),
    ):
        local_ray.start()


def test_a_directory_that_is_too_long_for_sockets_is_refused_if_it_is_ray_s_and_else_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = tmp_path / "a-directory-of-a-job-on-a-cluster" / "with-a-long-name"
    long.mkdir(parents=True)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(
        UserError, match=r"RAY_TMPDIR \(.*\) has \d+ characters, .* at most 39; set it to a shorter"
    ):
        local_ray.start()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(long))
    places.check_places()
    assert os.environ["RAY_TMPDIR"] == "/tmp"
    assert "Ray keeps its logs and sockets in /tmp: TMPDIR has" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_longest_directory_that_is_taken_is_not_too_long_for_ray(tmp_path: Path) -> None:
    place = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    longest = place / ("x" * (39 - len(str(place)) - 1))
    longest.mkdir()
    code = "from slimfront.search.engine.ray_internals import local_ray; local_ray.start(1)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(longest)},
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stderr
    finally:
        shutil.rmtree(place)


def test_a_first_server_of_ray_s_that_does_not_answer_is_given_up_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = ["Timed out waiting for file /tmp/gcs_server_port", "the disk is odd"]
    ended = []
    leftovers = Leftovers()
    monkeypatch.setattr(leftovers, "end", lambda: ended.append(None))

    def init(**_: object) -> None:
        raise RuntimeError(said.pop(0))

    monkeypatch.setattr(local_ray.ray, "init", init)
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: None)
    with pytest.raises(UserError, match="the disk is odd"):
        local_ray.start(leftovers=leftovers)
    assert len(ended) == 2


ABORTING = """
import os, sys, time
from slimfront.search.engine.leftovers import nothing_left
from slimfront.search.engine.ray_internals import local_ray, places

way = sys.argv[1]

def init(**_):
    if way == "hangs":
        time.sleep(50)
    if way == "starts":
        os.abort()  # as a failed check in Ray's C++ does

local_ray.ray.init = init
local_ray.ray.shutdown = lambda: None
local_ray.session_directory = lambda: "/nowhere"
with nothing_left() as leftovers:
    local_ray.start(leftovers=leftovers)
    if way == "runs":
        os.abort()
"""


@pytest.mark.parametrize(("way", "told"), [("starts", 1), ("runs", 0), ("ends", 0)])
def test_a_ray_that_aborts_while_it_starts_is_told_in_one_sentence(way: str, told: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ABORTING, way],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,  # which the watcher has too: it is read to the watcher's end
        text=True,
        timeout=60,
    )
    assert done.returncode == (0 if way == "ends" else -signal.SIGABRT)
    assert done.stderr.count("Error: this process was ended while Ray started") == told
    assert done.stderr.count("\n") == told


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_trials_started_on_other_nodes_of_a_cluster_ends_with_the_search(
    directory: Path,
) -> None:
    with RayCluster(PYTHONPATH=f"{ROOT}{os.pathsep}{directory}") as cluster:
        cluster.add_head("--num-cpus=0")
        cluster.add_node()
        # Seconds that no other run of these tests has.
        code = LEAVING.replace("98", number := f"{os.getpid()}0")
        write_search(directory, trials=2, epochs=1, code=code)
        where = {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
        done = subprocess.run(
            [sys.executable, "-m", "slimfront", "search", "c.yaml", "--name", "leaving"],
            cwd=directory,
            env=cluster.environment | where,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        said = " ".join(done.stderr.split())
        assert "processes that the search had started still ran, and were ended: " in said
        running = [
            " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])
        ]
        for left in (f"time.sleep({number}7)", f"time.sleep({number}6)", f"sleep {number}4"):
            assert [command for command in running if left in command] == []


def test_a_ray_that_hangs_while_it_starts_ends_in_one_sentence() -> None:
    impatient = "local_ray.START_S, local_ray._HANGS_S, local_ray._SAY_EVERY_S = 0.1, 0.1, 0.3"
    done = subprocess.run(
        [sys.executable, "-c", ABORTING.replace("way = ", f"{impatient}\nway = "), "hangs"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=45,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: Ray did not start within ")
    assert done.stderr.count("\n") == 1
