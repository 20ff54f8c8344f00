"""What CKA-SR and AugCKA-SR cost: steps of ResNet-20 with them over steps without, and the plain
pairwise formula beside them."""

import argparse
import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks.common import Goal, Outcome, at_most, run
from benchmarks.steps import Stepper, interleaved, step_ratio
from slimfront.trainables.penalties import CKA, AugCKA, Penalty

BETA = 1e-4


class PairwiseCKA(CKA):
    """CKA-SR as one would write it down: pair by pair, in float64, each HSIC from the features."""

    def value(self, features: Sequence[Sequence[Tensor]], weights: Sequence[Tensor]) -> Tensor:  # noqa: ARG002
        """L_C; pair weights are left out."""
        pairs = [
            (x, y)
            for stage in features
            for i, x in enumerate(stage)
            for j, y in enumerate(stage)
            if i != j
        ]
        return (
            torch.stack([_hsic(x, y) / (_hsic(x, x) * _hsic(y, y)).sqrt() for x, y in pairs])
            .sum()
            .float()
        )


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5."""
    n = len(x)
    k, m = (flat @ flat.T for flat in (x.flatten(1).double(), y.flatten(1).double()))
    k, m = k - k.diag().diag(), m - m.diag().diag()
    value = (
        (k @ m).trace()
        + k.sum() * m.sum() / ((n - 1) * (n - 2))
        - 2 * (k.sum(0) @ m.sum(1)) / (n - 2)
    )
    return value / (n * (n - 3))


SETTINGS = {
    "8 samples, every batch": (8, 1),
    "8 samples, every 5th batch": (8, 5),
    "all samples, every batch": (-1, 1),
}
GOALS = dict(zip(SETTINGS, (1.03, 1.01, 1.20), strict=True))
KINDS: dict[str, type[Penalty]] = {
    "CKA-SR": CKA,
    "AugCKA-SR": AugCKA,
    "pairwise, float64": PairwiseCKA,
}


def penalty_of(kind: str, setting: str) -> Penalty | None:
    """The penalty of a row; None for the plain step."""
    if not kind:
        return None
    samples, every = SETTINGS[setting]
    return KINDS[kind].model_validate({"strength": BETA, "samples": samples, "every": every})


def peak_memory(row: tuple[str, str, int, str]) -> float:
    """Peak memory in MB of two steps in a process of its own: of the process, or of the GPU's
    tensors."""
    kind, setting, batch, device = row
    stepper = Stepper(penalty_of(kind, setting), batch, torch.device(device))
    for _ in range(2):
        stepper.train_step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def cka(arguments: argparse.Namespace) -> Outcome:
    """Step times and peak memory of ResNet-20 with CKA-SR and AugCKA-SR over those without."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, rounds = (16, 10) if arguments.quick else (128, 60)
    names = [("", ""), *((kind, setting) for kind in KINDS for setting in SETTINGS)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        memory = dict(
            zip(
                names,
                pool.map(peak_memory, [(*name, batch, device) for name in names]),
                strict=True,
            )
        )
    steppers = {
        "/".join(name): Stepper(penalty_of(*name), batch, torch.device(device)) for name in names
    }
    times = interleaved(steppers, rounds)
    rows, goals = [], list[Goal]()
    for kind, setting in names[1:]:
        ratio, low, high = step_ratio(times[f"{kind}/{setting}"], times["/"], SETTINGS[setting][1])
        rows.append(
            {
                "penalty": kind,
                "looks at": setting,
                "step ratio": f"{ratio:.3f}",
                "quartiles": f"{low:.3f} to {high:.3f}",
                "peak memory, MB": f"{memory[kind, setting]:.0f} (without: {memory['', '']:.0f})",
            }
        )
        if KINDS[kind] is not PairwiseCKA:
            goals.append(
                at_most(f"step ratio of {kind}, {setting}, batch {batch}", ratio, GOALS[setting])
            )
    return Outcome(1, rows, goals)


if __name__ == "__main__":
    run("cka", cka)
