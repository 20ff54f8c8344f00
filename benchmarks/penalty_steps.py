"""Time of a training step with each penalty, and with Slimming in a plain loop, as a ratio to the
step without: ResNet-20, batch 128, interleaved medians."""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.common import Outcome, at_most, run
from benchmarks.steps import SlimmedStepper, Stepper, interleaved, step_ratio
from slimfront.trainables.penalties import PENALTIES

PENALTY_OPTIONS: dict[str, dict[str, Any]] = {
    "layer": {"strength": 0.1},
    "node": {"strength": 0.1},
    "connection": {"strength": 1e-4},
    "block": {"strength": 0.1},
    "channel": {"strength": 0.1},
    "cka": {"strength": 1e-4, "samples": 8, "every": 5},
    "aug_cka": {"strength": 1e-4, "samples": 8, "every": 5},
}
SLIMMED: dict[str, Any] = {
    "penalties": {"layer": {"strength": 0.1}},
    "sparsifier": {"name": "channels", "sparsity": 0.5, "start": 0.0, "end": 1.0, "every": 10},
}
IN_A_LOOP = "Slimming: layer, channels"
"""`slimfront.Slimming` in a loop of a user's, whose channels are updated in every tenth step."""
GOAL = 1.05


def penalty_steps(arguments: argparse.Namespace) -> Outcome:
    """Step times of ResNet-20 with each penalty over those without."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = 16 if arguments.quick else 128
    assert set(PENALTY_OPTIONS) == set(PENALTIES)
    penalties = {
        name: PENALTIES[name].model_validate(options) for name, options in PENALTY_OPTIONS.items()
    }
    plain = {"": Stepper(None, batch, device)}
    times = interleaved(
        plain
        | {name: Stepper(p, batch, device) for name, p in penalties.items()}
        | {IN_A_LOOP: SlimmedStepper(SLIMMED, batch, device)},
        10 if arguments.quick else 40,
    )
    rows, goals = [], []
    for name, options in (PENALTY_OPTIONS | {IN_A_LOOP: {"every": 10}}).items():
        cost, low, high = step_ratio(times[name], times[""], options.get("every", 1))
        rows.append(
            {
                "penalty": name,
                "ms per step": f"{1e3 * statistics.median(times[name]):.1f}",
                "ms without": f"{1e3 * statistics.median(times['']):.1f}",
                "ratio": f"{cost:.3f}",
                "quartiles of the ratio": f"{low:.3f} to {high:.3f}",
            }
        )
        goals.append(at_most(f"step ratio with {name}, batch {batch}", cost, GOAL))
    return Outcome(1, rows, goals)


if __name__ == "__main__":
    run("penalty_steps", penalty_steps)
