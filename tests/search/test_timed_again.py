"""A search whose networks are timed by a command: what is recommended is timed again in quiet."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from slimfront.search.cli import main
from slimfront.search.config.schema import Config
from slimfront.search.engine.finished import ending
from slimfront.search.engine.preflight import preflight
from slimfront.search.engine.runner import resume_search, run_search
from slimfront.search.python_api.found import Search
from slimfront.search.record.ledger import Ledger, SearchResult
from slimfront.search.record.report import as_json, as_text
from slimfront.search.record.session import read_result
from slimfront.trainables.errors import UserError
from tests.conftest import small_config
from tests.search.searches import runs_of

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(240)]

SIZE = """
import os, sys
size = os.stat(sys.argv[1]).st_size
print(size / 1000 * float(os.environ.get("SLIMFRONT_TEST_QUIET", 1)))
"""
"""A thousand bytes take a millisecond while trials run, which are in other processes."""


def timed_by(folder: Path, program: str, **changes: Any) -> Config:
    file = folder / "size.py"
    file.write_text(program)
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(file))} {{file}}"
    return small_config(
        folder,
        **{
            "objectives": ["val_accuracy", "latency_ms"],
            "constraints": {"speedup": ">= 0.1"},
            "latency": {"command": command, "runs": 3, "warm_up": 0},
            "one_shot": {"steps": 1},
            "search": {"trials": 2},
            "training": {"epochs": 2, "batch_size": 256, "lr": 0.01, "report_every": 2},
            "resources": {"pack": 2},
        }
        | changes,
    )


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, SearchResult]:
    """A search in packs, where files are as fast again in the process that leads it."""
    folder = tmp_path_factory.mktemp("timed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMFRONT_TEST_QUIET", "0.5")
        return folder, run_search(timed_by(folder, SIZE))


def recommended(ledger: Ledger) -> Any:
    point = ledger.front.recommended()
    assert point is not None
    return point


@pytest.mark.slow
def test_what_is_recommended_has_both_figures(timed: tuple[Path, SearchResult]) -> None:
    _, result = timed
    point = recommended(result.ledger)
    during = {name: point.measures[name] for name in ("latency_ms", "speedup")}
    assert during["latency_ms"] > 0
    # The dense network is timed again too: it is as fast again as well.
    again = {"latency_ms": during["latency_ms"] / 2, "speedup": during["speedup"]}
    assert point.timed_again == pytest.approx(again, rel=0.01)
    region = result.ledger.region
    others = [other for other in result.front if not region.is_near(other)]
    assert all(other.timed_again is None for other in others if other is not point)


@pytest.mark.slow
def test_json_table_and_mlflow_have_both_and_say_what_took_them(
    timed: tuple[Path, SearchResult],
) -> None:
    folder, result = timed
    point = recommended(result.ledger)
    plain = json.loads(json.dumps(as_json(result)))
    assert plain["recommended"]["latency_ms"] == point.measures["latency_ms"]
    assert plain["recommended"]["timed_again"] == point.timed_again
    label = "latency, ms per batch, by latency.command"
    assert plain["described"]["latency_ms"]["label"] == label
    text = as_text(result, "slimfront", 160)
    assert f"timed again in quiet: latency_ms {point.timed_again['latency_ms']:.3g}, speedup" in (
        text
    )
    heads = [line for line in text.splitlines() if "command" in line]
    assert heads[0].count("command") == 2  # of the objective and of the constraint
    _, children = runs_of(folder, result)
    metrics = children[point.trial.label].data.metrics
    assert metrics["timed_again/latency_ms"] == point.timed_again["latency_ms"]
    client = MlflowClient(f"sqlite:///{folder}/slimfront.db")
    parent, _ = runs_of(folder, result)
    page = Path(client.download_artifacts(parent.info.run_id, "front.html", str(folder)))
    assert label in page.read_text()


@pytest.mark.slow
def test_the_card_has_both(
    timed: tuple[Path, SearchResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = timed
    point = recommended(result.ledger)
    monkeypatch.chdir(tmp_path)
    storage = ["--storage-path", str(folder / "runs"), "--output", "small.onnx"]
    monkeypatch.setattr(sys, "argv", ["slimfront", "export", result.search, *storage])
    with pytest.raises(SystemExit):
        main()
    card = Path("small.md").read_text()
    during, again = point.measures["latency_ms"], point.timed_again["latency_ms"]
    assert "The search took these times by latency.command" in card
    assert f"| `latency_ms` | {during:.4g} | {again:.4g} |" in card


@pytest.mark.slow
def test_a_search_that_is_read_or_resumed_knows_it_and_times_it_no_more(
    timed: tuple[Path, SearchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = timed
    point = recommended(result.ledger)
    loaded = Search(*read_result(result.search, str(folder / "runs")))
    assert loaded.pick("recommended").timed_again == point.timed_again

    def refuses(*_: Any) -> None:
        raise AssertionError("it was timed before")

    monkeypatch.setattr(ending, "_times", refuses)
    again = resume_search(result.search, storage_path=str(folder / "runs"))
    assert recommended(again.ledger).timed_again == point.timed_again


@pytest.mark.slow
def test_a_device_that_is_gone_at_the_end_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = timed_by(tmp_path, SIZE, search={"trials": 1})
    times = ending._times

    def gone(*arguments: Any) -> dict[str, float]:
        (tmp_path / "size.py").write_text("raise SystemExit('the device is gone')")
        return times(*arguments)

    monkeypatch.setattr(ending, "_times", gone)
    result = run_search(config)
    assert recommended(result.ledger).timed_again is None
    assert "was not timed again: latency.command" in caplog.text
    assert "the device is gone" in caplog.text


def test_a_command_that_fails_is_told_before_a_search(tmp_path: Path) -> None:
    config = timed_by(tmp_path, "raise SystemExit('no route to host')")
    with pytest.raises(UserError, match=r"ended with exit code 1; .* stderr: no route"):
        preflight(config)


def test_a_runtime_that_is_not_installed_is_told_before_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    config = timed_by(tmp_path, SIZE, latency={"runtime": "openvino"})
    with pytest.raises(UserError, match=r"latency\.runtime: openvino needs the package openvino"):
        preflight(config)


@pytest.mark.slow
def test_the_dense_network_is_timed_by_the_command_too(tmp_path: Path) -> None:
    assert 5 < preflight(timed_by(tmp_path, SIZE))["latency_ms"] < 50  # its kilobytes
