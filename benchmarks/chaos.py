"""`make chaos`: a search whose driver is killed many times at random moments, and some of its
workers, resumed each time."""

import argparse
import tempfile
from pathlib import Path

from benchmarks.common import Outcome, at_least, run
from tests.search.test_resume import TRIALS, chaos


def chaos_table(arguments: argparse.Namespace) -> Outcome:
    """Kills a search of 24 trials with early stopping; it fails if a trial is lost, doubled or
    running in the end."""
    rounds, workers = (2, 1) if arguments.quick else (20, 8)
    with tempfile.TemporaryDirectory() as directory:
        hits = chaos(Path(directory), arguments.seed, rounds, workers, most=5)
    row = {
        "rounds": str(rounds),
        "kills that hit a running driver": str(hits["drivers"]),
        "kills that hit a worker": str(hits["workers"]),
        f"trials of {TRIALS} in the end, each once, none running": str(hits["trials"]),
    }
    return Outcome(1, [row], [at_least("kills that hit a running driver", hits["drivers"], rounds)])


if __name__ == "__main__":
    run("chaos", chaos_table, ("--seed", {"type": int, "default": 0, "help": "other moments"}))
