"""Does CKA-SR help random sparse training, as arXiv 2307.07389 (table of random sparse training on
CIFAR-10) reports?

`--scale paper` is the authors' setting (ResNet-20, 160 epochs, batch 128, SGD 0.1, weight decay
5e-4; on a GPU in bfloat16, many candidates at once), `--scale small` one that two cores can do.
Candidates of one seed have the same initial weights, masks, order of examples and augmentation, so
that differences are paired. Every result is appended to a file as soon as it is there: runs add up,
and a run that is cut off goes on where its states were kept. The table is of all that the file has.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Outcome, run, spread
from slimfront import Candidate
from slimfront.trainables.errors import TrialFailure
from slimfront.trainables.packs import Pack
from slimfront.trainables.training.loop import Training

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
RESULTS = Path(__file__).parent / "results"

PENALTIES: dict[str, dict[str, float]] = {
    "none": {},
    "CKA-SR, β 1e-4": {"cka": 1e-4},
    "CKA-SR, β 8e-4": {"cka": 8e-4},
    "AugCKA-SR, β 1e-2": {"aug_cka": 1e-2},
    "CKA-SR, β 1e-2": {"cka": 1e-2},
}
"""The authors sweep β from 1e-5 to 1e-2. AugCKA-SR is a mean over pairs and not a sum, so that its
β is larger."""


@dataclass(frozen=True)
class Scale:
    """The training of a candidate, and what is asked of it."""

    model: dict[str, Any]
    training: dict[str, Any]
    data: dict[str, Any]
    sparsifiers: tuple[str, ...]
    sparsities: tuple[float, ...]
    penalties: tuple[str, ...]
    every: int
    """Steps between updates of RigL's masks."""


_SGD = {
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "schedule": "cosine",
}
_AUGMENT = {"crop": 4, "flip": True}
SCALES = {
    "paper": Scale(
        {"name": "resnet20"},
        _SGD | {"epochs": 160, "precision": "bf16", "channels_last": True},
        {"validation": 0.02, "augment": _AUGMENT},
        ("random",),
        (0.95, 0.98, 0.90, 0.998),
        ("none", "CKA-SR, β 1e-4", "CKA-SR, β 8e-4", "AugCKA-SR, β 1e-2"),
        100,
    ),
    "small": Scale(
        {"name": "resnet20", "depth": 8, "width": 8},
        _SGD | {"epochs": 30},
        {"validation": 0.02, "limit": 16_000, "augment": _AUGMENT},
        ("random", "rigl"),
        (0.95, 0.98, 0.90),
        ("none", "CKA-SR, β 1e-4", "CKA-SR, β 8e-4", "CKA-SR, β 1e-2", "AugCKA-SR, β 1e-2"),
        40,
    ),
    "tiny": Scale(
        {"name": "resnet20", "depth": 8, "width": 4},
        _SGD | {"epochs": 2, "batch_size": 16},
        {"test": 0.2},
        ("random",),
        (0.9,),
        ("none", "CKA-SR, β 1e-2"),
        5,
    ),
}
"""`tiny` is what `--quick` does: that it runs, and nothing about the question."""


@dataclass(frozen=True)
class Job:
    """One training, by what makes it different from others of its scale."""

    sparsifier: str
    sparsity: float
    penalty: str
    seed: int


def candidate(scale: Scale, job: Job, compiled: bool) -> Candidate:
    """The training of a job. Penalties that are off are there too: a pack wants the same ones in
    all members."""
    if "limit" in scale.data or "validation" in scale.data:
        data: dict[str, Any] = {"name": "huggingface", "path": str(CIFAR)}
    else:
        data = {"name": "factory", "factory": "benchmarks.gpu:images", "args": {"count": 120}}
    strengths = {"cka": 0.0, "aug_cka": 0.0} | PENALTIES[job.penalty]
    sparsifier = {"name": job.sparsifier, "sparsity": job.sparsity}
    return Candidate.model_validate(
        {
            "data": data | scale.data,
            "model": scale.model,
            "training": scale.training | {"seed": job.seed, "compile": compiled},
            "penalties": {
                name: {"strength": strength, "samples": 8, "every": 5}
                for name, strength in strengths.items()
            },
            "sparsifier": sparsifier | ({"every": scale.every} if job.sparsifier == "rigl" else {}),
        }
    )


def jobs(
    seeds: Sequence[int],
    sparsifiers: Sequence[str],
    sparsities: Sequence[float],
    penalties: Sequence[str],
) -> list[Job]:
    """All of them, seed by seed for each sparsifier and sparsity, so that what is there when a run
    ends is paired."""
    return [
        Job(sparsifier, sparsity, penalty, seed)
        for sparsity in sparsities
        for sparsifier in sparsifiers
        for seed in seeds
        for penalty in penalties
    ]


def done_in(file: Path) -> dict[Job, float]:
    """Test accuracies by job, of all results in the file."""
    if not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        Job(**{name: row[name] for name in ("sparsifier", "sparsity", "penalty", "seed")}): row[
            "accuracy"
        ]
        for row in rows
    }


def append(file: Path, job: Job, found: float, device: torch.device) -> None:
    """Adds a result to the file."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    with file.open("a") as out:
        out.write(
            json.dumps(
                asdict(job) | {"accuracy": found, "device": name, "torch": torch.__version__}
            )
            + "\n"
        )


class States:
    """Keeps the states of trainings in a folder, for a run that goes on with them."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def _file(self, group: Sequence[Job]) -> Path:
        assert self.folder is not None
        name = f"{group[0]}-{len(group)}".translate(str.maketrans(" '(),=β", "_______"))
        return self.folder / f"{name}.pt"

    def load(self, group: Sequence[Job], trainings: Sequence[Training]) -> None:
        """Gives the trainings the states that were kept of this group, if there are any."""
        if self.folder is None or not self._file(group).exists():
            return
        for training, state in zip(
            trainings, torch.load(self._file(group), weights_only=True), strict=True
        ):
            training.load_state_dict(state)
        print(f"goes on from epoch {trainings[0].epoch}", file=sys.stderr, flush=True)

    def keep(self, group: Sequence[Job], states: list[dict[str, Any]]) -> None:
        """Keeps them; what was kept before is replaced at once."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._file(group).with_suffix(".part")
        torch.save(states, part)
        part.replace(self._file(group))


@dataclass(frozen=True)
class Session:
    """How a run trains: where, how many at once, until when, and what it keeps."""

    device: torch.device
    compiled: bool
    states: States
    ends: float


def run_epoch(trainings: list[Training], pack: Pack | None) -> dict[Training, Any]:
    """One epoch of all that are left: metrics, or why a training cannot go on."""
    if pack is not None:
        return dict(pack.run_epoch())
    (training,) = trainings
    try:
        return {training: training.run_epoch()}
    except TrialFailure as failure:
        return {training: failure}


def train_group(
    scale: Scale, group: Sequence[Job], session: Session
) -> Iterator[tuple[Job, float]]:
    """Trains jobs together; gives each with its test accuracy, or nothing if time was up (their
    states are kept)."""
    begun = time.perf_counter()
    trainings = [Training(candidate(scale, job, session.compiled), session.device) for job in group]
    session.states.load(group, trainings)
    pack = Pack(trainings, session.device) if len(group) > 1 else None
    jobs_of = dict(zip(trainings, group, strict=True))
    first, left = trainings[0].epoch, list(trainings)
    while left:
        for training, result in run_epoch(left, pack).items():
            if isinstance(result, TrialFailure):
                print(f"{jobs_of[training]}: {result}", file=sys.stderr, flush=True)
                left.remove(training)
            elif training.done:
                data = training.data
                left.remove(training)
                yield (
                    jobs_of[training],
                    data.task.evaluate(training.model, *data.test, "test", prepare=data.prepare)[
                        "test_accuracy"
                    ],
                )
        epoch = trainings[0].epoch
        if epoch % 10 == 0 or epoch - first <= 2:
            seconds = time.perf_counter() - begun
            print(
                f"{len(group)} candidates, epoch {epoch}, {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        if left and time.time() > session.ends:
            session.states.keep(
                group, [pack.state_dict(one) if pack else one.state_dict() for one in trainings]
            )
            print(f"time is up in epoch {epoch}", file=sys.stderr, flush=True)
            return


def paired(values: Sequence[float], baseline: Sequence[float]) -> str:
    """The mean difference in points, its standard error over seeds, and in how many seeds it was
    positive."""
    differences = [100 * (a - b) for a, b in zip(values, baseline, strict=True)]
    if len(differences) < 2:
        return "".join(f"{difference:+.2f}" for difference in differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    better = sum(difference > 0 for difference in differences)
    return f"{statistics.mean(differences):+.2f} ± {error:.2f} ({better} of {len(differences)})"


def as_rows(scale: Scale, found: dict[Job, float]) -> list[dict[str, Any]]:
    """A row for each sparsifier and sparsity: accuracy without a penalty, and paired differences
    with each."""
    rows = []
    for sparsifier, sparsity in sorted({(job.sparsifier, job.sparsity) for job in found}):
        own = {
            job: value
            for job, value in found.items()
            if (job.sparsifier, job.sparsity) == (sparsifier, sparsity)
        }
        plain = {job.seed: 100 * value for job, value in own.items() if job.penalty == "none"}
        if not plain:
            continue
        row: dict[str, Any] = {
            "sparsifier": sparsifier,
            "sparsity": sparsity,
            "seeds": len(plain),
            "test accuracy without, %": spread(list(plain.values()), 2),
        }
        for penalty in scale.penalties[1:]:
            with_it = {
                job.seed: value
                for job, value in own.items()
                if job.penalty == penalty and job.seed in plain
            }
            row[f"with {penalty}, points"] = paired(
                list(with_it.values()), [plain[seed] / 100 for seed in with_it]
            )
        rows.append(row)
    return rows


def fidelity(arguments: argparse.Namespace) -> Outcome:
    """CKA-SR and AugCKA-SR beside no penalty, in sparse training, paired over seeds."""
    name = "tiny" if arguments.quick else arguments.scale
    scale = SCALES[name]
    if name != "tiny" and not CIFAR.exists() and not arguments.table:
        raise SystemExit("there is no CIFAR-10 beside the checkout; see docs/sparse-training.md")
    file = Path(arguments.out) if arguments.out else RESULTS / f"fidelity-{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    states = States(Path(arguments.states) if arguments.states else None)
    session = Session(device, arguments.compile, states, time.time() + 60 * arguments.minutes)
    sparsities = (
        [float(one) for one in arguments.sparsities.split(",")]
        if arguments.sparsities
        else scale.sparsities
    )
    sparsifiers = arguments.sparsifiers.split(",") if arguments.sparsifiers else scale.sparsifiers
    first, _, last = (arguments.seeds or ("0-0" if arguments.quick else "0-4")).partition("-")
    penalties = scale.penalties[: arguments.penalties]
    wanted = jobs(range(int(first), int(last or first) + 1), sparsifiers, sparsities, penalties)
    left = [] if arguments.table else [job for job in wanted if job not in done_in(file)]
    size = arguments.together or (
        len(scale.penalties) if device.type == "cuda" or arguments.quick else 1
    )
    for begin in range(0, len(left), size):
        if time.time() > session.ends:
            break
        for job, found in train_group(scale, left[begin : begin + size], session):
            append(file, job, found, device)
            print(f"{job}: {found:.4f}", file=sys.stderr, flush=True)
    results = done_in(file)
    if not results:
        raise SystemExit("no training has ended yet; run it again with --states to go on")
    return Outcome(len({job.seed for job in results}), as_rows(scale, results), [])


if __name__ == "__main__":
    run(
        "fidelity",
        fidelity,
        ("--scale", {"choices": ["paper", "small"], "default": "small"}),
        ("--seeds", {"help": "such as 0-9; 0-4 if left out"}),
        ("--sparsifiers", {"help": "such as random,rigl"}),
        ("--sparsities", {"help": "such as 0.95,0.98"}),
        ("--penalties", {"type": int, "help": "takes only so many, the first of which is none"}),
        (
            "--minutes",
            {"type": float, "default": 1e6, "help": "ends after so long, with what is there"},
        ),
        ("--together", {"type": int, "help": "candidates that are trained at once"}),
        ("--compile", {"action": "store_true", "help": "compiles the network"}),
        ("--states", {"help": "a folder that keeps what is not finished, for a run that goes on"}),
        ("--out", {"help": "the file that results are appended to"}),
        (
            "--table",
            {
                "action": "store_true",
                "help": "trains nothing, and prints the table of what is there",
            },
        ),
    )
