"""A real Ray cluster of two nodes on this machine, one of which dies in the middle of a search."""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from search.journal import JOURNAL_FILE, Event, read_events
from tests.conftest import SMALL_CONFIG

pytestmark = pytest.mark.timeout(180)

ENVIRONMENT = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Of both nodes and of the driver: without the token none of them would be let in."""


@contextlib.contextmanager
def ray_node(directory: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """`ray start` with these options in a process group of its own, and the file that it prints to."""
    said = directory / f"node{len(list(directory.glob('node*')))}.txt"
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", *options]
    with said.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=ENVIRONMENT
        )
    try:
        yield process, said
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    """Everything of a node dies at once, as when its power goes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], object], seconds: float) -> object:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"it did not happen within {seconds} s")


def test_a_trial_whose_node_is_lost_goes_on_elsewhere_from_its_last_checkpoint(tmp_path: Path) -> None:
    config = SMALL_CONFIG | {
        "training": {"epochs": 40, "batch_size": 16, "report_every": 4},
        "search": {"trials": 4, "storage_path": str(tmp_path / "runs"), "concurrency": 2},
        "tracking": {"uri": f"sqlite:///{tmp_path}/slimfront.db"},
    }
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump(config))
    port = 20000 + os.getpid() % 10000
    stack = contextlib.ExitStack()
    sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True))  # their paths are short
    options = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={sockets}"]
    with stack, ray_node(tmp_path, *options) as (_, said):
        wait_for(lambda: "Ray runtime started" in said.read_text(), 60)
        with ray_node(tmp_path, f"--address=127.0.0.1:{port}") as (node, joined):
            wait_for(lambda: "Ray runtime started" in joined.read_text(), 60)
            command = [str(Path(sys.executable).with_name("slimfront")), "search", "lost.yaml", "--name", "lost", "--json"]
            environment = ENVIRONMENT | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
            driver = subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            try:
                wait_for(lambda: len(kinds(tmp_path, "point")) >= 6 or driver.poll() is not None, 90)
                assert driver.poll() is None, driver.communicate()[1]
                kill_group(node)
                out, err = driver.communicate(timeout=120)
            finally:
                driver.kill()
    assert driver.returncode == 0, err
    assert re.search(r"(dense|trial-\d+) lost its process \(.*\); it goes on from its last checkpoint", " ".join(err.split())), (
        err
    )
    assert json.loads(out.splitlines()[-1])["trials"] == {"completed": 4, "stopped": 0, "failed": 0}
    for number in range(4):
        epochs = [e["epoch"] for event in kinds(tmp_path, "epochs") if event["number"] == number for e in event["history"]]
        assert epochs == list(range(1, 41))


def kinds(directory: Path, kind: str) -> list[Event]:
    file = directory / "runs" / "lost" / JOURNAL_FILE
    return [event for event in read_events(file) if event["event"] == kind] if file.exists() else []
