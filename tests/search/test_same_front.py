"""A search gives what version 0.1 gave, to the bit, where it computes with the same kernels."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from slimfront.search.config.loading import from_mapping
from slimfront.search.engine.runner import run_search
from slimfront.search.record.report import as_json

OLD: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "digits_front.json").read_text(encoding="utf-8")
)
"""What version 0.1 printed of this search with --json, and on what."""

CONFIG = {
    "name": "held",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "depth": 3, "width": 32},
    "training": {"epochs": 6, "batch_size": 64},
    "penalties": {"layer": {"strength": 0.001}, "node": {"strength": 0.001}},
    "sparsifier": {"name": "magnitude", "sparsity": 0.5},
    "refit": {"epochs": 1},
    "one_shot": {"steps": 3, "refine": 0},
    "space": {
        "penalties.layer.strength": {"low": 1e-4, "high": 0.01, "log": True},
        "sparsifier.sparsity": {"low": 0.3, "high": 0.9},
    },
    "objectives": ["val_accuracy", "nonzero_params"],
    "search": {"trials": 6, "concurrency": 1, "seed": 3},
    "resources": {"pack": 1},
}


def processor() -> str:
    """The kind of this processor: others add in another order."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    keys = ("model name", "cpu family", "model", "stepping")
    found = [re.search(rf"^{key}\s*:\s*(.*)$", info, re.MULTILINE) for key in keys]
    return ", ".join(match[1] for match in found if match)


@pytest.mark.skipif(
    processor() != OLD["cpu"] or not torch.__version__.startswith(OLD["torch"]),
    reason="the front was recorded on another processor, or with another torch, and rounds so",
)
def test_the_front_of_the_digits_is_that_of_version_0_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = as_json(run_search(from_mapping(CONFIG), name="held"))
    assert found["hypervolume_full"] == OLD["hypervolume"]
    # The knee is taken in the region that matters since.
    expected = [{key: value for key, value in old.items() if key != "knee"} for old in OLD["front"]]
    pairs = zip(found["front"], expected, strict=True)
    assert [{key: member[key] for key in old} for member, old in pairs] == expected
    # The dense network is refitted since.
    sizes = {key: size for key, size in OLD["dense"].items() if not key.endswith("_accuracy")}
    assert {key: found["dense"][key] for key in sizes} == sizes
