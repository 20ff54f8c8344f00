"""Plug-ins, measures, metrics and losses of the user's in whole searches, as a user types them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from slimfront.search.record.events import (
    EpochsReported,
    NetworkMeasured,
    TrialBegan,
    TrialContinued,
    TrialEnded,
)
from slimfront.search.record.journal import read_events
from slimfront.trainables.measures.described import KNOWN

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]

MODULE = """
import sys
from pathlib import Path
import torch
from slimfront import PENALTIES, SPARSIFIERS, Penalty
from slimfront.trainables.sparsifiers.base import ActiveSparsifier, TargetSparsifier

class ActiveL2:
    targets = 1
    def __init__(self, options, model):
        self.options, self.model, self.scale = options, model, 1.0
    def before_batch(self, step, scale):
        self.scale = scale
    def loss(self):
        squares = sum(p.square().sum() for p in self.model.parameters())
        return self.scale * self.options.strength * squares
    def proximal(self, step_size):
        pass
    def close(self):
        pass

@PENALTIES.register("my_l2")
class MyL2(Penalty):
    def attach(self, model, sample):
        return ActiveL2(self, model)

class Last(ActiveSparsifier):
    def __init__(self, options, setting):
        super().__init__(options, setting)
        draw = torch.Generator().manual_seed(0)
        self.set_masks({name: torch.rand(weight.shape, generator=draw) > options.sparsity
                        for name, weight in self.weights.items()})

@SPARSIFIERS.register("my_mask")
class MyMask(TargetSparsifier):
    name: str = "my_mask"
    def attach(self, setting):
        return Last(self, setting)

def energy_mj(network, inputs, per_weight=1e-6):
    assert not network.training and len(inputs) > 1
    with torch.no_grad():
        return per_weight * sum(p.count_nonzero().item() for p in network.parameters())

def file_kb(path):
    assert Path(path).suffix == ".onnx"
    return Path(path).stat().st_size / 1000

def deficit(outputs, targets):
    return float(outputs.gather(1, targets[:, None]).mean()) - 100

def focal(outputs, targets, gamma=2.0):
    each = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
    return (1 - (-each).exp()) ** gamma * each
"""
PARTS = """
import torch
from slimfront import Penalty
from slimfront.trainables.sparsifiers.base import ActiveSparsifier, TargetSparsifier

class ActiveNorm:
    targets = 1
    def __init__(self, options, model):
        self.options, self.model, self.scale = options, model, 0.0
    def before_batch(self, step, scale):
        self.scale = scale
    def loss(self):
        norm = sum(p.abs().pow(self.options.power).sum() for p in self.model.parameters())
        return self.scale * self.options.strength * norm
    def proximal(self, step_size):
        pass
    def close(self):
        pass

class MyNorm(Penalty):
    power: float = 2.0
    def attach(self, model, sample):
        return ActiveNorm(self, model)

class Last(ActiveSparsifier):
    def __init__(self, options, setting):
        super().__init__(options, setting)
        draw = torch.Generator().manual_seed(options.draw)
        self.set_masks({name: torch.rand(weight.shape, generator=draw) > options.sparsity
                        for name, weight in self.weights.items()})

class MyMask(TargetSparsifier):
    draw: int = 0
    def attach(self, setting):
        return Last(self, setting)
"""
BROKEN = """
import sys
if "default_worker" in sys.argv[0]:
    raise RuntimeError("no licence on this machine")
"""
CONFIG: dict[str, Any] = {
    "name": "own",
    "plugins": ["my_slim"],
    "task": {
        "name": "classification",
        "loss": {"factory": "my_slim:focal", "args": {"gamma": 1.5}},
        "metrics": ["accuracy", {"factory": "my_slim:deficit", "better": "larger"}],
    },
    "data": "digits",
    "model": {"name": "mlp", "depth": 2, "width": 12},
    "training": {"epochs": 2, "lr": 0.01, "report_every": 1},
    "penalties": {"my_l2": {"strength": 1e-4}},
    "sparsifier": {"name": "my_mask", "sparsity": 0.5},
    "measures": {
        "energy_mj": {
            "factory": "my_slim:energy_mj",
            "args": {"per_weight": 2e-6},
            "label": "energy, mJ",
        },
        "file_kb": {"factory": "my_slim:file_kb", "on": "onnx", "scale": "log"},
    },
    "latency": {"runs": 3, "warm_up": 0},
    "one_shot": {"steps": 1},
    "space": {"sparsifier.sparsity": {"low": 0.3, "high": 0.9}},
    "objectives": ["val_accuracy", "val_deficit", *KNOWN, "energy_mj", "file_kb"],
    "constraints": {"energy_mj": "<= 1"},
    "search": {"trials": 2, "concurrency": 1, "sampler": "random"},
}

OF_PARTS: dict[str, Any] = {
    "name": "parts",
    "data": "digits",
    "model": {"name": "mlp", "depth": 2, "width": 12},
    "training": {"epochs": 2, "lr": 0.01},
    "penalties": {"mine": {"factory": "my_parts:MyNorm", "strength": 1e-4, "power": 1.5}},
    "sparsifier": {"factory": "my_parts:MyMask", "sparsity": 0.5, "draw": 3},
    "space": {
        "penalties.mine.strength": {"low": 1e-5, "high": 1e-3, "log": True},
        "sparsifier.sparsity": {"low": 0.3, "high": 0.9},
    },
    "search": {"trials": 3, "sampler": "random"},
}

Command = Callable[..., subprocess.CompletedProcess[str]]


def command(folder: Path) -> Command:
    """`slimfront …` in a folder."""
    root = str(Path(__file__).parents[2])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "slimfront", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": root, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command, dict[str, Any]]:
    """A search over every measure that there is, its folder, and what it printed as JSON."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_slim.py").write_text(MODULE)
    (folder / "own.yaml").write_text(yaml.safe_dump(CONFIG))
    run = command(folder)
    done = run("search", "own.yaml", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Inputs, float32 (N, 1, 8, 8), are normalised (global)" in " ".join(done.stderr.split())
    return folder, run, json.loads(done.stdout)


def test_every_measure_is_an_objective_of_a_whole_search_with_pictures(searched: Any) -> None:
    folder, _, report = searched
    assert report["objectives"] == CONFIG["objectives"]
    assert report["trials"] == {"completed": 2, "stopped": 0, "failed": 0, "repeated": 0}
    own = report["described"]["energy_mj"]
    assert (own["better"], own["label"]) == ("smaller", "energy, mJ")
    for member in report["front"]:
        weights = member["nonzero_params"]
        assert member["energy_mj"] == pytest.approx(2e-6 * weights)
        assert member["val_deficit"] < 0 < member["file_kb"]
        assert not {name for name in CONFIG["objectives"] if name != "params"} - set(member)
    page = next(folder.rglob("front.html")).read_text()
    assert len(next(folder.rglob("front.png")).read_bytes()) > 10_000
    assert "trial-000" in page and "validation accuracy" in page


def test_plug_ins_are_imported_by_check_resume_and_export(searched: Any) -> None:
    folder, run, report = searched
    checked = run("check", "own.yaml")
    assert checked.returncode == 0 and "my_mask" in checked.stdout, checked.stderr[-1000:]
    exported = run("export", report["search"], "--pick", "smallest", "--output", "small.onnx")
    assert exported.returncode == 0, exported.stderr[-1000:]
    assert (folder / "small.onnx").stat().st_size > 1000
    resumed = run("resume", report["search"], "--json")
    assert resumed.returncode == 0, resumed.stderr[-1000:]
    assert json.loads(resumed.stdout)["hypervolume"] == report["hypervolume"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plugins": ["my_slimm"]}, "there is no module 'my_slimm'"),
        ({"plugins": []}, "unknown penalty 'my_l2'; known: aug_cka"),
        ({"plugins": ["half"]}, "half"),
    ],
)
def test_what_cannot_be_imported_is_one_sentence(
    searched: Any, changes: dict[str, Any], message: str
) -> None:
    folder, run, _ = searched
    (folder / "half.py").write_text("import no_such_library\n")
    (folder / "wrong.yaml").write_text(yaml.safe_dump(CONFIG | changes))
    done = run("check", "--no-build", "wrong.yaml")
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert said.startswith("Error: ") and message in said and "Traceback" not in said


def test_a_penalty_and_a_sparsifier_by_import_path_are_searched_over(searched: Any) -> None:
    """No plug-in registers them: config, workers, journal, MLflow, resume and export find them."""
    folder, run, _ = searched
    (folder / "my_parts.py").write_text(PARTS)
    (folder / "parts.yaml").write_text(yaml.safe_dump(OF_PARTS))
    done = run("search", "parts.yaml", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["trials"] == {"completed": 3, "stopped": 0, "failed": 0, "repeated": 0}
    mine = "penalties.mine.strength"
    strengths = {one["params"][mine] for one in report["front"]}
    assert strengths and all(1e-5 <= value <= 1e-3 for value in strengths)
    events = list(read_events(next(folder.glob("runs/parts-*/journal.jsonl"))))
    of_trials = [event for event in events if isinstance(event, EpochsReported)]
    reported = {event.number: event.history[-1] for event in of_trials}
    begun = {event.number: event.values for event in events if isinstance(event, TrialBegan)}
    for number, epoch in reported.items():
        if number is None:  # the dense network has neither
            assert epoch["penalty_loss"] == epoch["sparsity"] == 0
            continue
        assert epoch["penalty_loss"] > 0
        assert epoch["sparsity"] == pytest.approx(begun[number]["sparsifier.sparsity"], abs=0.1)
    client = MlflowClient(f"sqlite:///{folder}/slimfront.db")
    experiment = client.get_experiment_by_name("parts")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    trials = [run for run in runs if run.data.tags["slimfront.role"] == "trial"]
    recorded = [run.data.params[mine] for run in trials if mine in run.data.params]
    assert {str(value) for value in strengths} <= set(recorded) and len(recorded) == 3
    exported = run("export", report["search"], "--pick", "smallest", "--output", "parts.onnx")
    assert exported.returncode == 0, exported.stderr[-1000:]
    assert "my_parts:MyMask" in (folder / "parts.md").read_text()
    more = run("resume", report["search"], "--set", "search.trials=4", "--json")
    assert more.returncode == 0, more.stderr[-1000:]
    assert json.loads(more.stdout)["trials"]["completed"] == 4


def test_a_plug_in_that_only_workers_cannot_import_fails_a_trial_once(searched: Any) -> None:
    folder, run, _ = searched
    (folder / "licensed.py").write_text(BROKEN)
    config = CONFIG | {
        "name": "licensed",
        "plugins": ["my_slim", "licensed"],
        "measures": [],
        "objectives": ["val_accuracy", "params"],
        "constraints": {},
    }
    (folder / "licensed.yaml").write_text(yaml.safe_dump(config))
    done = run("search", "licensed.yaml")
    assert done.returncode == 1, done.stderr[-1000:]
    assert "no licence on this machine" in done.stdout
    events = list(read_events(next(folder.glob("runs/licensed-*/journal.jsonl"))))
    ended = [event for event in events if isinstance(event, TrialEnded)]
    assert ended and {event.status for event in ended} == {"failed"}
    assert not any(isinstance(event, TrialContinued | NetworkMeasured) for event in events)
