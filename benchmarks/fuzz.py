"""Broken configs through the real `slimfront check --no-build`: each ends with one short line,
soon, and in little memory."""

import argparse
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.broken_configs import Broken, draw
from benchmarks.common import Goal, Outcome, at_most, run

CONFIGS, FRESH, PROCESSES = 10_000, 40, 2
SECONDS, MEGABYTES, CHARACTERS = 5.0, 300.0, 500
_KILLED_AFTER_S = 20.0


@dataclass(frozen=True)
class Ended:
    """How one `check` ended; `what` is `taken`, `refused` or `traceback`, `megabytes` the most
    memory that its process had.

    `seconds` are those that its user waits; of a fresh process, which mostly imports, those of the
    processor.
    """

    kind: str
    what: str
    seconds: float
    megabytes: float
    characters: int
    number: int


def benchmark(arguments: argparse.Namespace) -> Outcome:
    """Broken configs through `slimfront check`: 10,000 in forks of a process that has imported it,
    40 in fresh processes."""
    count, fresh = (300, 4) if arguments.quick else (arguments.configs, FRESH)
    numbers = range(arguments.first, arguments.first + count)
    with multiprocessing.get_context("fork").Pool(PROCESSES, _import) as pool:
        alone = list(pool.imap_unordered(_fresh, numbers[:fresh]))
        ends = list(pool.imap_unordered(_forked, numbers, chunksize=8))
    for end in ends + alone:
        if _bad(end):
            print(f"number {end.number}: {end}", file=sys.stderr)
    kinds = sorted({end.kind for end in ends})
    rows = [_row(kind, [end for end in ends if end.kind == kind]) for kind in kinds]
    rows += [_row("all", ends), _row("in fresh processes", alone)]
    return Outcome(1, rows, _goals(ends + alone))


def _bad(end: Ended) -> bool:
    late, large = end.seconds > SECONDS, end.megabytes > MEGABYTES
    return end.what == "traceback" or late or large or end.characters > CHARACTERS


def _row(kind: str, ends: list[Ended]) -> dict[str, object]:
    counts = {
        what: sum(end.what == what for end in ends) for what in ("taken", "refused", "traceback")
    }
    return {
        "what is broken": kind,
        "configs": f"{len(ends):,}",
        "taken": f"{counts['taken']:,}",
        "refused with one line": f"{counts['refused']:,}",
        "anything else": counts["traceback"],
        "slowest, s": f"{max(end.seconds for end in ends):.2f}",
        "most memory, MB": f"{max(end.megabytes for end in ends):.0f}",
        "longest line": max(end.characters for end in ends),
    }


def _goals(ends: list[Ended]) -> list[Goal]:
    return [
        at_most(
            "tracebacks, and what else is not one line",
            sum(end.what == "traceback" for end in ends),
            0,
        ),
        at_most(
            f"configs that took over {SECONDS:g} s", sum(end.seconds > SECONDS for end in ends), 0
        ),
        at_most(
            f"configs that took over {MEGABYTES:g} MB",
            sum(end.megabytes > MEGABYTES for end in ends),
            0,
        ),
        at_most("characters of the longest line", max(end.characters for end in ends), CHARACTERS),
    ]


def _import() -> None:
    import slimfront.search.cli
    import slimfront.search.config.schema  # noqa: F401


def _forked(number: int) -> Ended:
    """Runs the command in a fork of this process, which is killed if it hangs."""

    def start(arguments: list[str], out: int) -> int:
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            from slimfront.search.cli import main

            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.argv = ["slimfront", *arguments]
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException as error:
            print(f"Traceback: {error!r}", file=sys.stderr)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    return _measured(number, start)


def _fresh(number: int) -> Ended:
    """Runs `python -m slimfront check` as a user does."""
    command = [sys.executable, "-m", "slimfront"]
    return _measured(
        number,
        lambda arguments, out: subprocess.Popen([*command, *arguments], stdout=out, stderr=out).pid,
        True,
    )


def _measured(number: int, start: Callable[[list[str], int], int], imports: bool = False) -> Ended:
    broken = draw(number)
    with _placed(broken) as path, tempfile.TemporaryFile() as said:
        arguments = ["check", "--no-build", str(path)]
        arguments += [word for override in broken.overrides for word in ("--set", override)]
        begun = time.monotonic()
        process = start(arguments, said.fileno())
        while True:
            pid, status, usage = os.wait4(process, os.WNOHANG)
            seconds = time.monotonic() - begun
            if pid:
                break
            if seconds > _KILLED_AFTER_S:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.002)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    if imports and seconds < _KILLED_AFTER_S:
        seconds = usage.ru_utime + usage.ru_stime
    code = os.waitstatus_to_exitcode(status)
    one_line = (
        code == 2 and text.startswith("Error: ") and text.endswith("\n") and text.count("\n") == 1
    )
    what = (
        "taken" if code == 0 and "Traceback" not in text else "refused" if one_line else "traceback"
    )
    return Ended(
        broken.kind, what, seconds, usage.ru_maxrss / 1024, len(text) - 1 if one_line else 0, number
    )


@contextlib.contextmanager
def _placed(broken: Broken) -> Iterator[Path]:
    """The config as a file, or what stands in its place."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        path = Path(folder, "a\nb.yaml" if broken.file == "name" else "config.yaml")
        if broken.file in ("", "name"):
            path.write_bytes(broken.content)
        elif broken.file == "pipe":
            os.mkfifo(path)
        elif broken.file == "directory":
            path.mkdir()
        elif broken.file == "huge":
            path.touch()
            os.truncate(path, 50_000_000)
        else:
            path.symlink_to(
                {"loop": path, "dangling": Path(folder, "nothing")}.get(
                    broken.file, Path(broken.file)
                )
            )
        yield path


if __name__ == "__main__":
    run(
        "fuzz",
        benchmark,
        ("--configs", {"type": int, "default": CONFIGS, "help": "so many"}),
        (
            "--first",
            {
                "type": int,
                "default": 0,
                "help": "the number of the first, as messages about failures say it",
            },
        ),
    )
