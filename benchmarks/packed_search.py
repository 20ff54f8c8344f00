"""What packs do to a search: the main job with more trials, one by one and in packs; its time, and
the front that it finds.

More trials under way at a time mean that each is proposed from fewer that have ended. Packs save
time, and may cost quality.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Outcome, at_least, at_most, run, spread
from benchmarks.main_job import most_accurate_small, search

TRIALS = 96
PACKS: tuple[str, ...] = ("1", "auto", "16")


def packed_search(arguments: argparse.Namespace) -> Outcome:
    """The same search with each setting of `resources.pack`, in turn."""
    seeds, trials = (1, 16) if arguments.quick else (arguments.seeds, TRIALS)
    found: dict[str, list[dict[str, Any]]] = {pack: [] for pack in PACKS}
    for seed in range(seeds):
        for pack in PACKS if seed % 2 == 0 else reversed(PACKS):
            with tempfile.TemporaryDirectory() as name:
                overrides = [f"search.trials={trials}", f"resources.pack={pack}"]
                found[pack].append(search(seed, Path(name), overrides)[0])
    rows = []
    volumes: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for pack, results in found.items():
        volumes[pack] = [result["hypervolume"] for result in results]
        ratios[pack] = [
            mine["wall_seconds"] / first["wall_seconds"]
            for mine, first in zip(results, found["1"], strict=True)
        ]
        small = [most_accurate_small(result) for result in results]
        rows.append(
            {
                "resources.pack": pack,
                "time over one by one": spread(ratios[pack], 2),
                "hypervolume": spread(volumes[pack], 4),
                "members of the front": spread([len(result["front"]) for result in results], 1),
                "validation accuracy at most 10 % of dense": spread(
                    [each["val_accuracy"] for each in small], 4
                ),
            }
        )
    one_by_one = spread(volumes["1"], 4)
    lowest = one_by_one.mean - (one_by_one.std or 0.02)
    goals = [
        at_most("time over one by one, auto, mean", spread(ratios["auto"]).mean, 0.8),
        at_least(
            "hypervolume, auto, mean, against one by one less its standard deviation",
            spread(volumes["auto"]).mean,
            lowest,
        ),
    ]
    return Outcome(seeds, rows, goals)


if __name__ == "__main__":
    run("packed_search", packed_search, ("--seeds", {"type": int, "default": 3}))
