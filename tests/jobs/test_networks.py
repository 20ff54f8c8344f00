"""Searches of networks of twelve kinds through the command line, on random examples: each trains,
shrinks, is stored, and is exported."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.zoo_networks import NETWORKS
from slimfront.search.cli import main
from slimfront.trainables.shipping import load
from tests.conftest import empty_store

ROOT = Path(__file__).parents[2]
CODE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from benchmarks.zoo_networks import NETWORKS

def network(name):
    return NETWORKS[name].build()

def examples(name, classes):
    generator = torch.Generator().manual_seed(0)
    inputs = NETWORKS[name].inputs(240, generator)
    return inputs, torch.arange(240) % classes
"""
KINDS = {
    "gru": 5,
    "lstm-2-both-ways": 5,
    "encoder-pre-norm": 5,
    "conv1d": 10,
    "conv3d": 4,
    "mobilenet-v3-like": 10,
    "group-norm-resnet": 10,
    "prelu": 10,
    "channel-shuffle": 10,
    "convnext-like": 10,
    "dense-block": 10,
    "looped": 10,
}
"""How many classes each tells apart."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", list(KINDS))
def test_a_search_of_such_networks_makes_them_smaller_and_exports_one(
    name: str,
    users_code: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (users_code / "zoo_job.py").write_text(CODE)
    monkeypatch.syspath_prepend(users_code)
    monkeypatch.chdir(tmp_path)
    config = {
        "name": "zoo",
        "data": {
            "name": "factory",
            "factory": "zoo_job:examples",
            "args": {"name": name, "classes": KINDS[name]},
        },
        "model": {"name": "factory", "factory": "zoo_job:network", "args": {"name": name}},
        "training": {"epochs": 2, "batch_size": 64, "lr": 0.01, "report_every": 2},
        "sparsifier": {"name": "channels"},
        "space": {"sparsifier.sparsity": {"low": 0.3, "high": 0.8}},
        "objectives": ["val_accuracy", "params"],
        "search": {"trials": 4, "concurrency": 1},
    }
    Path("zoo.yaml").write_text(yaml.safe_dump(config))
    Path("slimfront.db").write_bytes(empty_store())

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["slimfront", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        return out

    report = json.loads(run("search", "zoo.yaml", "--json").splitlines()[-1])
    assert report["trials"]["completed"] + report["trials"]["stopped"] == 4
    assert report["trials"]["failed"] == 0
    smallest = min(member["total_params"] for member in report["front"])
    assert smallest < 0.9 * report["dense"]["total_params"]
    run("export", report["search"], "--pick", "smallest", "--output", "small.onnx")
    shipped = load(Path("small.onnx"))
    batch = NETWORKS[name].inputs(3, torch.Generator().manual_seed(1))
    assert tuple(shipped(batch).shape) == (3, KINDS[name])
