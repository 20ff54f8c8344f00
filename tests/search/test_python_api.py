"""Searches from Python: the front as a table, its members as networks, files and cards."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import yaml

import slimfront
from slimfront.search.python_api import Search
from slimfront.search.record.events import TrialEnded
from slimfront.search.record.journal import JOURNAL_FILE, read_events
from slimfront.search.record.ledger import SearchResult
from slimfront.trainables.data import Digits
from slimfront.trainables.shipping import load as load_file
from tests.conftest import SMALL_CONFIG
from tests.search.test_export import Finished

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def saved(finished: Finished) -> Search:
    directory, result = finished
    return slimfront.load(result.search, str(directory / "runs"))


def test_the_front_is_a_table_with_a_row_for_each_member(saved: Search, finished: Finished) -> None:
    result: SearchResult = finished[1]
    front = saved.front
    assert isinstance(front, pandas.DataFrame)
    assert front.index.name == "member"
    assert front.index.is_unique
    assert len(front) == len(result.front)
    assert list(front.columns[:5]) == ["trial", "step", "epoch", "recommended", "knee"]
    for row, point in zip(front.itertuples(), result.front, strict=True):
        assert (row.trial, row.step, row.epoch) == (point.trial.label, point.step, point.epoch)
    for name in result.front[0].measures:
        measured = [point.measures[name] for point in result.front]
        assert front[name].tolist() == pytest.approx(measured), name
    tested = [point.tested["test_accuracy"] for point in result.front]
    assert front["test_accuracy"].tolist() == tested
    for path in SMALL_CONFIG["space"]:
        assert front[path].tolist() == [point.trial.values[path] for point in result.front]
    assert front["knee"].sum() == front["recommended"].sum() == 1
    del front["trial"]
    assert "trial" in saved.front.columns  # a table of one's own each time


def test_a_search_that_has_measured_nothing_yet_has_an_empty_table_of_the_same_columns(
    saved: Search, finished: Finished, tmp_path: Path
) -> None:
    directory, result = finished
    lines = (directory / "runs" / result.search / JOURNAL_FILE).read_bytes().splitlines(True)
    begun = tmp_path / "runs" / "begun"
    begun.mkdir(parents=True)
    (begun / JOURNAL_FILE).write_bytes(b"".join(lines[:2]))
    early = slimfront.load("begun", str(tmp_path / "runs"))
    assert len(early.front) == 0
    assert list(early.front.columns) == list(saved.front.columns)
    assert early.front.index.name == "member"
    with pytest.raises(slimfront.UserError, match="the front is empty"):
        early.pick("knee")


def test_a_running_search_has_the_front_so_far(
    saved: Search, finished: Finished, tmp_path: Path
) -> None:
    directory, result = finished
    journal = directory / "runs" / result.search / JOURNAL_FILE
    events = list(read_events(journal))
    ended = [
        line
        for line, event in enumerate(events, start=1)
        if isinstance(event, TrialEnded) and event.number is not None
    ]
    until = ended[0]
    lines = journal.read_bytes().splitlines(True)
    running = tmp_path / "runs" / "running"
    running.mkdir(parents=True)
    (running / JOURNAL_FILE).write_bytes(b"".join(lines[:until]))
    found = slimfront.load(str(running))
    assert len(found.front) >= 1
    assert found.front["test_accuracy"].isna().all()  # taken at the end
    assert list(found.front.columns) == list(saved.front.columns)
    assert found.pick("best").measures["val_accuracy"] == found.front["val_accuracy"].max()


def test_members_are_picked_as_the_command_picks_them(saved: Search) -> None:
    front = saved.front
    assert saved.pick().name == front.index[front["recommended"]][0]
    assert saved.pick("smallest").measures["nonzero_params"] == front["nonzero_params"].min()
    best = saved.pick("best")
    assert best.measures["val_accuracy"] == front["val_accuracy"].max()
    assert saved.pick(best.name).name == best.name
    assert saved.pick(best.trial).trial == best.trial
    assert saved.pick(int(best.trial.removeprefix("trial-"))).trial == best.trial
    least = sorted(front["val_accuracy"])[-1]
    assert saved.pick("smallest", min_quality=least).measures["val_accuracy"] == least
    assert [member.name for member in saved.members] == list(front.index)
    with pytest.raises(slimfront.UserError, match=r"^pick 'trial-999': it is not on the front; "):
        saved.pick("trial-999")
    with pytest.raises(slimfront.UserError, match="no network of the front has validation acc"):
        saved.pick("knee", min_quality=1.5)


def test_a_member_says_what_it_is(saved: Search, finished: Finished) -> None:
    point = finished[1].front[0]
    member = saved.pick(saved.front.index[0])
    assert (member.trial, member.epoch, member.step) == (
        point.trial.label,
        point.epoch,
        point.step,
    )
    assert member.measures == {**point.measures, **point.tested}
    assert member.values == point.trial.values
    assert repr(member).startswith(f"Member({member.name} of {finished[1].search}: ")


def test_a_member_is_a_compact_network_on_the_cpu_in_evaluation_mode(saved: Search) -> None:
    member = saved.pick("smallest")
    network = member.network()
    assert not any(module.training for module in network.modules())
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
    assert sum(p.numel() for p in network.parameters()) == member.measures["params"]
    data = slimfront_data()
    found = data.task.evaluate(network, *data.validation, prepare=data.prepare)
    assert found["val_accuracy"] == pytest.approx(member.measures["val_accuracy"], abs=1e-6)
    ships = member.network(shipped=True)
    images, labels = data.validation
    with torch.no_grad():
        right = ships(data.raw(images)).argmax(1) == labels
    assert float(right.float().mean()) == pytest.approx(found["val_accuracy"], abs=1e-6)
    again = saved.network(member)
    assert sum(p.numel() for p in again.parameters()) == member.measures["params"]


def slimfront_data() -> Any:
    from slimfront.trainables.data import load_once

    return load_once(Digits(), torch.device("cpu"), slimfront.Candidate().task)


def test_a_member_is_exported_as_the_command_exports(
    saved: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    member = saved.pick("smallest")
    exported = member.export("small.safetensors")
    card = Path("small.md").read_text()
    assert exported.card == card
    assert exported.shipment.path == Path("small.safetensors")
    assert card.startswith(f"# {member.name}")
    assert member.card == card
    network = load_file(tmp_path / "small.safetensors")
    data = slimfront_data()
    with torch.no_grad():
        right = network(data.raw(data.validation.inputs)).argmax(1) == data.validation.targets
    assert float(right.float().mean()) == pytest.approx(member.measures["val_accuracy"], abs=1e-6)
    with pytest.raises(slimfront.UserError, match="is there already; choose another name"):
        member.export("small.safetensors")
    with pytest.raises(slimfront.UserError, match=r"it ends in none of \.pt2, \.onnx, \.saf"):
        member.export("small.pkl")


def test_a_card_needs_no_file_to_be_kept(
    saved: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    member = saved.pick("smallest")
    assert member.card.startswith(f"# {member.name}")
    assert f"| parameters | {member.measures['params']:,.0f} |" in member.card
    assert list(tmp_path.iterdir()) == []


def test_what_a_search_tells_beside_its_front_stays(saved: Search, finished: Finished) -> None:
    result = finished[1]
    assert saved.name == saved.search == result.search
    assert saved.config.name == "small"
    assert saved.tracking_uri == result.tracking_uri
    assert not saved.interrupted
    assert not saved.all_failed
    assert not saved.undelivered
    assert saved.run_ids == {}
    assert 0 < saved.wall_seconds < 1000
    assert saved.ledger.counts["completed"] == result.ledger.counts["completed"]
    assert saved.hypervolume == result.ledger.front.hypervolume()
    assert saved.dense["val_accuracy"] == result.ledger.dense_network.measures["val_accuracy"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_search_gives_the_same_object_with_overrides_as_a_mapping_or_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL_CONFIG))
    overrides = {
        "search.trials": 2,
        "training.epochs": 1,
        "training.lr": 1e-05,
        "space": {"sparsifier.sparsity": {"low": 0.2, "high": 0.8}},
        "resources.pack": 1,
    }
    result = slimfront.search("small.yaml", overrides, name="mapped")
    out, err = capsys.readouterr()
    assert out == ""
    assert "The search mapped has begun" in err
    assert "2/2 trials" in err
    assert isinstance(result, Search)
    assert result.config.training.lr == 1e-05
    assert list(result.config.space) == ["sparsifier.sparsity"]
    assert result.run_ids
    assert result.name == "mapped"
    texts = ["search.trials=2", "training.epochs=1", "resources.pack=1"]
    other = slimfront.search(SMALL_CONFIG, texts, name="told", progress=False)
    assert capsys.readouterr().err == ""
    assert other.ledger.counts["completed"] == 2
    assert list(slimfront.load("told").front.index) == list(other.front.index)
    assert not math.isnan(other.front["test_accuracy"].iloc[0])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"training.epoch": 1}, "did you mean 'epochs'?"),
        ({"training.lr": torch.tensor(1.0)}, "overrides 'training.lr': it is a Tensor"),
        ({3: 1}, "overrides: a path is text, such as 'training.epochs', and 3 is none"),
        (["training.epochs"], "it needs the form path=value"),
    ],
)
def test_overrides_that_cannot_be_get_a_sentence(overrides: Any, sentence: str) -> None:
    with pytest.raises(slimfront.UserError) as raised:
        slimfront.search(SMALL_CONFIG, overrides)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_progress_of_a_search_in_a_script_has_no_control_codes(tmp_path: Path) -> None:
    program = f"""
import slimfront
config = {SMALL_CONFIG!r}
overrides = {{"search.trials": 2, "training.epochs": 1, "resources.pack": 1}}
if __name__ == "__main__":
    result = slimfront.search(config, overrides, name="script")
    print(len(result.front))
"""
    (tmp_path / "script.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=190
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
    assert "2/2 trials, front" in done.stderr
    for text in (done.stdout, done.stderr):
        assert "\x1b" not in text
        assert "\r" not in text
