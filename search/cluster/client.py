"""A search on a cluster that this machine is no node of, through Ray Client (ray://): the driver
runs on the cluster's head."""

import io
import logging
import os
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from slimfront.search import terminal
from slimfront.search.cluster.submission import directory_of_factories, staged
from slimfront.search.config.loading import load
from slimfront.search.config.names import check_name
from slimfront.search.config.yaml_files import read_text
from slimfront.trainables.errors import UserError, first_line

_ATTEMPTS, _LATE = 3, "Starting Ray client server failed"


class _Said(io.TextIOBase):
    """Text that is written in one thread and taken away in another."""

    def __init__(self) -> None:
        self.parts: deque[str] = deque()

    def write(self, text: str) -> int:
        """Keeps it."""
        self.parts.append(text)
        return len(text)

    def take(self) -> str:
        """What was written since the last call."""
        return "".join(self.parts.popleft() for _ in range(len(self.parts)))


class _Driver:
    """Runs one search in a process on the head, and keeps what it says until it is asked."""

    def __init__(self) -> None:
        self.said = _Said()
        self.interrupt: Any = None

    def run(self, text: str, overrides: list[str], name: str | None) -> dict[str, Any]:
        """The result of the search, as JSON and as text; or the sentence of a UserError."""
        from slimfront.search.engine.interrupt import Interrupt
        from slimfront.search.engine.progress import ProgressDisplay
        from slimfront.search.engine.runner import run_search
        from slimfront.search.record import report

        self.interrupt = Interrupt()
        console = terminal.console(file=self.said, width=160)
        handler = logging.StreamHandler(self.said)
        handler.setLevel(logging.WARNING)
        logging.getLogger("search").addHandler(handler)
        try:
            with tempfile.TemporaryDirectory() as directory, ProgressDisplay(console) as progress:
                file = Path(directory, "search.yaml")
                file.write_text(text, encoding="utf-8")
                result = run_search(load(file, overrides), progress, name, interrupt=self.interrupt)
        except UserError as error:
            return {"error": str(error)}
        return {
            "json": report.as_json(result),
            "text": report.as_text(result, "slimfront"),
            "text_of_all": report.as_text(result, "slimfront", everything=True),
            "code": report.exit_code(result),
        }

    def news(self) -> str:
        """What was said since the last call."""
        return self.said.take()

    def stop(self) -> None:
        """Ends the search gracefully."""
        if self.interrupt is not None:
            self.interrupt.requested = True


def _connect(address: str, working_dir: str) -> None:
    """Joins a cluster; a head with much to do may take longer to start a server for us than it
    waits for one itself."""
    for attempt in range(_ATTEMPTS):
        try:
            ray.init(
                address,
                runtime_env={"working_dir": working_dir},
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            late = any(_LATE in line for line in reason)
            if not late or attempt == _ATTEMPTS - 1:
                raise UserError(
                    f"no Ray cluster answers at {address} ({reason[-1 if late else 0][:200]})"
                ) from None


def search_remotely(
    address: str,
    config: Path,
    overrides: Sequence[str],
    name: str | None,
    working_dir: Path | None,
    said: Console,
) -> dict[str, Any]:
    """Runs a search on the cluster at `address` (ray://HEAD:10001) and shows on `said` how it goes.

    It ends when this process does; a job goes on (`Cluster.submit`). Ctrl-C ends it gracefully.

    Returns:
        `json`, as `report.as_json`; `text`, for people; `code`, the exit code.

    Raises:
        UserError: as `run_search`, or if the cluster does not answer.
    """
    loaded = load(config, overrides)
    if name is not None:
        check_name(name)
    if loaded.tracking.from_environment:  # of this machine: the head has another
        overrides = [*overrides, f"tracking.uri={loaded.tracking.uri}"]
    with staged(working_dir or directory_of_factories(loaded, config), {}) as directory:
        _connect(address, str(directory))
        try:
            return _drive(read_text(config), list(overrides), name, said)
        finally:
            ray.shutdown()


def _drive(text: str, overrides: list[str], name: str | None, said: Console) -> dict[str, Any]:
    on_head = {"resources": {"node:__internal_head__": 0.001}, "num_cpus": 0, "max_concurrency": 3}
    driver = ray.remote(**on_head)(_Driver).remote()
    ended = driver.run.remote(text, overrides, name)
    asked = 0
    while True:
        try:
            done, _ = ray.wait([ended], timeout=0.5)
            said.out(ray.get(driver.news.remote()), end="", highlight=False)
            if done:
                result: dict[str, Any] = ray.get(ended)
                break
        except KeyboardInterrupt:
            asked += 1
            if asked > 1:
                os._exit(130)
            said.print(
                "Stopping: running trials end, and the front of the finished ones follows. Ctrl-C "
                "again to quit at once."
            )
            driver.stop.remote()
        except ray.exceptions.RayError as error:
            raise UserError(
                f"the search was lost with its driver on the cluster: {first_line(error)}"
            ) from None
    if "error" in result:
        raise UserError(result["error"])
    return result
