"""What people really have: half of the units of a hundred networks zeroed, taken out, stored and
exported; Torch-Pruning alone beside it."""

import argparse
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Goal, Outcome, at_least, at_most, run
from benchmarks.zoo_networks import NETWORKS
from benchmarks.zoo_steps import TOLERANCE, Row, examine

SECONDS = 120.0
"""A network that takes longer does not end."""
MEMORY = 12 * 2**30
"""Bytes that a process may have."""
QUICK = ("mlp", "unet", "conv1d", "two-inputs", "dict-outputs", "control-flow-on-data")
SMALLER = 0.95
"""Whoever has at most so much of its parameters left became smaller."""
AS_SMALL = 1.05
"""As small as what Torch-Pruning leaves: no more than so much of it."""
_STEPS = ("trace", "compact", "store", "pt2", "onnx", "Torch-Pruning", "targets")


def benchmark(arguments: argparse.Namespace) -> Outcome:
    """Half of the units of each network zeroed, compacted, stored, reloaded and exported."""
    names = _names(arguments)
    rows = _kept(arguments.keep)
    if arguments.keep is not None:
        arguments.keep.parent.mkdir(parents=True, exist_ok=True)
    for row in examined([n for n in names if n not in rows], arguments.jobs, arguments.seconds):
        rows[row["network"]] = row
        if arguments.keep is not None:
            with arguments.keep.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{row['network']}: {_problem(row) or 'fine'}", file=sys.stderr, flush=True)
    found = [rows[name] for name in names]
    return Outcome(1, [_shown(row) for row in found], _goals(found))


def _names(arguments: argparse.Namespace) -> list[str]:
    """Those that were asked for, or else those whose libraries are installed."""
    if arguments.only:
        return arguments.only.split(",")
    if arguments.quick:
        return list(QUICK)
    libraries = {network.library for network in NETWORKS.values()}
    there = {library for library in libraries if importlib.util.find_spec(library)}
    for library in sorted(libraries - there):
        print(f"{library} is not installed: its networks are left out", file=sys.stderr)
    return [name for name, network in NETWORKS.items() if network.library in there]


def _kept(file: Path | None) -> dict[str, Row]:
    """What was found out in earlier runs."""
    lines = file.read_text().splitlines() if file is not None and file.exists() else []
    return {row["network"]: row for row in map(json.loads, lines)}


@dataclass
class _Job:
    """A network that a process of its own is busy with."""

    name: str
    process: BaseProcess
    connection: Connection
    deadline: float
    errors: Path
    row: Row
    """What it has told so far."""

    def over(self) -> Row | None:
        """What is known once it has ended, or must; None while it goes on."""
        with suppress(EOFError, OSError):
            while self.connection.poll():
                self.row = self.connection.recv()
        late, alive = time.monotonic() > self.deadline, self.process.is_alive()
        if self.row["at"] != "end" and alive and not late:
            return None
        self.process.kill()
        self.process.join()
        with suppress(EOFError, OSError):
            while self.connection.poll():
                self.row = self.connection.recv()
        self.connection.close()
        if self.row["at"] != "end":
            what = "did not end in time" if late else f"its process died ({self.process.exitcode})"
            self.row["failures"][self.row["at"]] = what
            self.row["faults"].append([self.row["at"], what])
        said = self.errors.read_text(errors="replace") if self.errors.exists() else ""
        if "Traceback" in said:
            self.row["faults"].append(["stderr", said[-4000:]])
        return self.row


def examined(names: Sequence[str], jobs: int = 1, seconds: float = SECONDS) -> Iterator[Row]:
    """What is found out about these networks, as they end, each in a process of its own.

    Processes are forked from one that has imported what all need. A network that takes longer
    than `seconds`, or whose process dies, is a fault of the step that it was in.
    """
    context = multiprocessing.get_context("forkserver")
    libraries = [n.library for n in NETWORKS.values() if importlib.util.find_spec(n.library)]
    context.set_forkserver_preload(["benchmarks.zoo_warm", *dict.fromkeys(libraries)])
    waiting, busy = list(reversed(names)), list[_Job]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or busy:
                while waiting and len(busy) < jobs:
                    busy.append(_started(context, waiting.pop(), Path(folder), seconds))
                multiprocessing.connection.wait([job.process.sentinel for job in busy], 0.2)
                for job in list(busy):
                    row = job.over()
                    if row is not None:
                        busy.remove(job)
                        yield row
        finally:
            for job in busy:
                job.process.kill()


def _started(context: Any, name: str, folder: Path, seconds: float) -> _Job:
    ours, theirs = context.Pipe()
    errors = folder / f"{len(list(folder.iterdir()))}.txt"
    errors.touch()
    process = context.Process(target=_work, args=(theirs, name, str(errors)), daemon=True)
    process.start()
    theirs.close()
    network = NETWORKS[name]
    row = {
        **{"network": name, "library": network.library, "size": network.size, "at": "start"},
        **{"refused": network.refused, "seconds": {}, "failures": {}, "faults": []},
    }
    return _Job(name, process, ours, time.monotonic() + seconds, errors, row)


def _work(connection: Connection, name: str, errors: str) -> None:
    os.nice(5)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    with Path(errors).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.filterwarnings("ignore")
    examine(name, connection.send)


def _wrong(row: Row) -> bool:
    """Whether something has other outputs than it should: compacted, stored or exported."""
    others = "computes something else", "outputs are off by"
    said = [
        message for step, message in row["failures"].items() if step in ("store", "pt2", "onnx")
    ]
    compacted = row.get("difference", 0) > TOLERANCE or (row["refused"] and "difference" in row)
    return compacted or any(part in message for message in said for part in others)


def _smaller(row: Row) -> bool:
    return row.get("difference", 1) <= TOLERANCE and row["after"] <= SMALLER * row["before"]


def _shipped(row: Row) -> bool:
    return all(row.get(step) is True for step in ("stored", "pt2", "onnx"))


def _problem(row: Row) -> str:
    """The first thing that went wrong with a network, in one line; empty if nothing did."""
    ours = {step: said for step, said in row["failures"].items() if step != "Torch-Pruning"}
    if row["refused"] and "compact" in ours and not row["faults"]:
        return ""
    if row["faults"]:
        step, said = row["faults"][0]
        return f"fault in {step}: {ours.get(step, said.strip().splitlines()[-1])}"
    if _wrong(row):
        return f"wrong: {row.get('difference', 0):.1e}; {ours}"
    for step, said in ours.items():
        return f"{step}: {said}"
    if not _smaller(row):
        return f"not smaller: {row['before']:,} to {row['after']:,} parameters"
    theirs = _theirs(row)
    if theirs is not None and row["after"] > AS_SMALL * theirs:
        return f"larger than Torch-Pruning's: {row['after']:,} against {theirs:,} parameters"
    return ""


def _theirs(row: Row, *, equal: bool = False) -> int | None:
    """The parameters that Torch-Pruning leaves, if it can do the network; with `equal`, if the
    outputs are the same, too."""
    apart = row.get("torch_pruning_difference", float("inf"))
    if equal and apart > TOLERANCE:
        return None
    return row.get("torch_pruning")


def _shown(row: Row) -> Row:
    targets = row.get("targets", {})
    theirs, apart = row.get("torch_pruning"), row.get("torch_pruning_difference")
    seconds = [f"{row['seconds'].get(step, 0):.1f}" for step in _STEPS]
    return {
        "network": row["network"],
        "one input": row["size"],
        "traced": _yes(row.get("traced")),
        "zeroed by": row.get("zeroed_by", "").partition(":")[0],
        "zero units": _number(row.get("units")),
        "found": _number(row.get("found")),
        "targets": " ".join(f"{k} {v}" for k, v in targets.items() if isinstance(v, int)),
        "parameters": _number(row.get("before")),
        "after": _number(row.get("after")),
        "difference": "" if "difference" not in row else f"{row['difference']:.0e}",
        "stored": _yes(row.get("stored")),
        "pt2": _yes(row.get("pt2")),
        "ONNX": _yes(row.get("onnx")),
        "Torch-Pruning": _number(theirs),
        "its difference": "" if apart is None else f"{apart:.0e}",
        f"seconds: {', '.join(_STEPS)}": " / ".join(seconds),
        "said": _problem(row).replace("|", "\\|").replace("\n", " ")[:200],
    }


def _yes(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, "")


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _goals(rows: list[Row]) -> list[Goal]:
    todo = [row for row in rows if not row["refused"]]
    done = [_smaller(row) and _shipped(row) for row in todo]
    goals = [
        at_most("networks with other outputs", sum(map(_wrong, rows)), 0),
        at_most(
            "networks with a traceback or without an end", sum(bool(r["faults"]) for r in rows), 0
        ),
        at_least("% smaller with equal outputs, stored, reloaded and exported", _share(done), 95),
    ]
    for what, equal in (("can do", False), ("does with equal outputs", True)):
        pairs = [(row.get("after"), _theirs(row, equal=equal)) for row in todo]
        small = [
            ours is not None and ours <= AS_SMALL * theirs
            for ours, theirs in pairs
            if theirs is not None
        ]
        goals.append(
            at_least(f"% as small as by Torch-Pruning, of what it {what}", _share(small), 95)
        )
    return goals


def _share(found: Sequence[bool]) -> float:
    return 100 * sum(found) / max(len(found), 1)


if __name__ == "__main__":
    run(
        "zoo",
        benchmark,
        ("--only", {"default": "", "metavar": "NAME,…", "help": "these networks"}),
        ("--jobs", {"type": int, "default": 1, "help": "so many networks at a time"}),
        (
            "--seconds",
            {"type": float, "default": SECONDS, "help": "the most that a network may take"},
        ),
        (
            "--keep",
            {
                "type": Path,
                "default": None,
                "help": "a file for what was found out about each; those in it are not looked at "
                "again",
            },
        ),
    )
