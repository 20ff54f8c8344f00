"""The shell that a command was called from: its environment, and what is printed there."""

import os
import shutil
import sys
from pathlib import Path

from slimfront.search import terminal

errors = terminal.console(stderr=True)
"""What is said beside the result."""

PIPE_WIDTH = 160
"""Characters of a line where stdout is no terminal."""


def width() -> int | None:
    """How wide tables are; None: as wide as the terminal."""
    if sys.stdout.isatty():
        return None
    return PIPE_WIDTH


def overrides_and_environment(overrides: list[str] | None = None) -> list[str]:
    """The overrides of `SLIMFRONT_SET`, one a line, then those of the command line, which everyone
    on this machine can read."""
    found = []
    for line in os.environ.get("SLIMFRONT_SET", "").splitlines():
        if line.strip():
            found.append(line)
    return found + (overrides or [])


def command_name() -> str:
    """How the user called this command, so that the next one to type works in the same shell."""
    called = sys.argv[0]
    if called.endswith("__main__.py"):
        return "slimfront"
    on_path = shutil.which("slimfront")
    if on_path and Path(on_path).samefile(called):
        return "slimfront"
    return called


def spare_loopback() -> None:
    """Keeps what this machine asks itself (MLflow's UI, a cluster's dashboard through ssh) from
    going to a proxy."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        hosts += ["localhost", "127.0.0.1", "::1"]
        os.environ[name] = ",".join(dict.fromkeys(hosts))
