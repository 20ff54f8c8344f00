"""Real MLflow servers for tests."""

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from slimfront.search.tracking.server import server_command, server_environment

PASSWORD = "x" * 16


def basic_auth(directory: Path) -> dict[str, str]:
    """The environment of a server that asks for a user and a password."""
    (directory / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{directory}/auth.db\n"
        f"admin_username = anna\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    return {
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32,
        "MLFLOW_AUTH_CONFIG_PATH": str(directory / "auth.ini"),
    }


class Server:
    """`mlflow server` on a port of its own, with artifacts through its proxy; it can be killed and
    started again."""

    def __init__(self, directory: Path, store: str, *options: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        artifacts = ["--artifacts-destination", str(directory / "artifacts")]
        self.command = [*server_command(self.port), *artifacts, *options]
        self.environment = server_environment(store) | environment
        self.directory = directory

    def start(self, *, wait: bool = True) -> None:
        with (self.directory / "server.txt").open("a") as said:
            self.process = subprocess.Popen(
                self.command,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.directory,
                start_new_session=True,
            )
        ends = time.monotonic() + 90
        while wait and not self.answers():
            assert time.monotonic() < ends, (self.directory / "server.txt").read_text()[-2000:]
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()
