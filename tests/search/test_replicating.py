"""Members of a front trained anew with other seeds."""

import csv
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from pydantic import ValidationError

from slimfront.search.config.settings import SearchOptions
from slimfront.search.engine.finished import replicas
from slimfront.search.engine.finished.replicas import planned, train_again
from slimfront.search.engine.finished.replicating import replicate
from slimfront.search.engine.runner import resume_search, run_search
from slimfront.search.record.events import NetworkReplicated, SessionEnded
from slimfront.search.record.export import export
from slimfront.search.record.front.shown import shown
from slimfront.search.record.front.told import quality_and_error
from slimfront.search.record.journal import JOURNAL_FILE, read_events
from slimfront.search.record.ledger import SearchResult
from slimfront.search.record.report import as_json, as_text
from slimfront.search.record.session import read_search
from slimfront.search.tracking.compare import read_fronts, render
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.training.train import train
from tests.conftest import SMALL_CONFIG, small_config
from tests.search.searches import replace_in_journal, runs_of
from tests.search.test_ledger import ledger, region_ledger

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def replicated(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SearchResult, list[str]]:
    """A search whose members were trained anew with two seeds, and what was said meanwhile."""
    directory = tmp_path_factory.mktemp("replicated")
    config = small_config(directory, tolerance=0.2)
    search = run_search(config).search
    said: list[str] = []
    result = replicate(search, 2, str(directory / "runs"), say=said.append)
    return directory, result, said


Replicated = tuple[Path, SearchResult, list[str]]


def written(directory: Path, result: SearchResult) -> list[NetworkReplicated]:
    events = read_events(directory / "runs" / result.search / JOURNAL_FILE)
    return [event for event in events if isinstance(event, NetworkReplicated)]


def test_each_member_and_the_baseline_are_trained_with_each_seed(replicated: Replicated) -> None:
    directory, result, said = replicated
    found = Counter((e.number, e.epoch, e.step) for e in written(directory, result))
    assert set(found.values()) == {2}
    dense = result.ledger.dense_network
    assert dense is not None
    assert (None, dense.epoch, 0) in found
    best = result.front[0]
    assert (best.trial.number, best.epoch, best.step) in found
    assert said[-1] == f"{len(said)} of {len(said)} trainings"


def test_what_is_there_is_not_trained_again(replicated: Replicated) -> None:
    directory, result, _ = replicated
    config, book = read_search(result.search, str(directory / "runs"))
    replicas = [point for point in book.front.members() if point.replicas]
    assert replicas
    for point in replicas:
        mine = next(p for p in result.front if p.name == point.name)
        assert point.replicas == mine.replicas
    # The means may put others into the region; those that were trained are not trained again.
    trained = {(point.trial.number, point.epoch, point.step) for point in replicas}
    again = {(j.number, j.epoch, step) for j in planned(config, book, 2) for step in j.shares}
    assert not again & trained
    more = planned(config, book, 3)
    assert {job.seed for job in more if job.number is None} == {max(replicas[0].replicas) + 1}


def test_the_means_are_in_the_json_the_table_and_mlflow(replicated: Replicated) -> None:
    directory, result, _ = replicated
    point = next(p for p in shown(result.ledger, result.front).members if p.replicas)
    mean, deviation = point.mean("val_accuracy"), point.deviation("val_accuracy")
    assert deviation is not None
    member = next(
        m
        for m in json.loads(json.dumps(as_json(result)))["front"]
        if (m["trial"], m["epoch"], m["one_shot"]) == (point.trial.label, point.epoch, point.step)
    )
    assert member["replicas"]["seeds"] == 2
    assert member["replicas"]["val_accuracy"] == {"mean": mean, "std": deviation}
    assert "over seeds" in as_text(result, "slimfront", 200)
    assert f"{mean:.4f} ± {deviation:.4f}" in as_text(result, "slimfront", 200)
    _, children = runs_of(directory, result)
    prefix = f"one_shot_{point.step}/replicas" if point.step else "replicas"
    metrics = children[point.trial.label].data.metrics
    assert metrics[f"{prefix}/val_accuracy_mean"] == pytest.approx(mean)
    assert metrics[f"{prefix}/seeds"] == 2


def test_what_is_read_beside_the_means_is_a_mean_too(
    replicated: Replicated, tmp_path: Path
) -> None:
    """In MLflow's description, in `slimfront front`, and on the card."""
    directory, result, _ = replicated
    dense = result.ledger.dense_network
    recommended = result.ledger.front.recommended()
    assert dense is not None
    assert recommended is not None
    parent, _ = runs_of(directory, result)
    story = parent.data.tags["mlflow.note.content"]
    assert f"(dense {quality_and_error(dense, 'val_accuracy')})" in story
    assert "over 2 seeds" in quality_and_error(dense, "val_accuracy")
    rows = [line for line in story.splitlines() if line.startswith("| dense: ")]
    mean, deviation = dense.mean("val_accuracy"), dense.deviation("val_accuracy")
    assert f" | {mean:.4f} ± {deviation:.4f} | " in rows[0]
    client = MlflowClient(result.tracking_uri)
    fronts = read_fronts(client, [result.search])
    first, *_ = csv.DictReader(io.StringIO(render(fronts, "csv").decode()))
    assert (first["network"], first["seeds"]) == ("dense", "2")
    assert float(first["val_accuracy_mean"]) == pytest.approx(mean)
    assert float(first["val_accuracy_std"]) == pytest.approx(deviation)
    assert f"{mean:.4f}" in render(fronts, "table").decode()
    path = tmp_path / "small.safetensors"
    exported = export(result.search, str(directory / "runs"), "recommended", path)
    assert f"| the dense network, mean of 2 seeds | {mean:.4f} | " in exported.card
    assert "| this recipe, mean of 2 seeds | " in exported.card
    own, bound = recommended.measures["val_accuracy"], result.ledger.region.quality_within(1)
    by_mean = result.ledger.region.is_near(recommended)
    assert ("this one network of it is not" in exported.card) == (by_mean and own < bound)


@pytest.mark.slow
def test_a_replicated_search_resumes_with_its_replicas(replicated: Replicated) -> None:
    directory, result, _ = replicated
    count = len(result.ledger.trials)
    again = resume_search(
        result.search, [f"search.trials={count + 1}"], storage_path=str(directory / "runs")
    )
    assert len(again.ledger.trials) == count + 1
    dense = again.ledger.dense_network
    assert dense is not None
    assert len(dense.replicas) == 2


def test_a_training_of_the_same_seed_is_the_same() -> None:
    plain = {
        "model": {"name": "mlp", "depth": 2, "width": 16},
        "training": {"epochs": 2, "batch_size": 256, "lr": 0.01, "seed": 5},
        "sparsifier": {"name": "magnitude", "sparsity": 0.5},
        "one_shot": {"steps": 1, "keep": 0.7, "refine": 0},
    }
    once = train(Candidate.model_validate(plain))
    share = once.pruned[0].measures["one_shot_share"]
    assert share == pytest.approx(0.7, abs=0.01)
    again = train_again(plain, epoch=2, shares={0: 1.0, 1: share})
    for name, value in once.measures.items():
        assert again[0][name] == pytest.approx(value), name
    assert "test_accuracy" in again[0]
    for name in ("nonzero_params", "val_accuracy"):
        assert again[1][name] == once.pruned[0].measures[name]
    early = train_again(plain, epoch=1, shares={0: 1.0})
    assert early[0]["val_accuracy"] != again[0]["val_accuracy"]


def test_the_recommendation_is_by_the_means() -> None:
    book = region_ledger()
    lucky = book.front.recommended()
    assert lucky is not None
    size = lucky.measures["nonzero_params"]
    for seed, accuracy in enumerate((0.95, 0.96)):
        lucky.replicas[seed] = {"val_accuracy": accuracy, "nonzero_params": size}
    other = book.front.recommended()
    assert other is not None
    assert other.measures["nonzero_params"] > size
    dense = book.dense_network
    assert dense is not None
    for seed, accuracy in enumerate((0.96, 0.962)):
        dense.replicas[seed] = {"val_accuracy": accuracy, "nonzero_params": 1000.0}
    assert book.front.recommended() is lucky


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_search_repeats_what_somebody_may_ship_before_it_ends(tmp_path: Path) -> None:
    config = small_config(tmp_path, tolerance=0.2, search={"trials": 2, "repeats": 2})
    result = run_search(config)
    members = shown(result.ledger, result.front).members
    assert members
    assert all(len(member.replicas) == 2 for member in members)
    dense = result.ledger.dense_network
    assert dense is not None
    assert len(dense.replicas) == 2
    # Nothing is left for the command.
    assert not planned(config, result.ledger, 2)
    # A resume that adds no trial trains none of them again.
    again = resume_search(result.search, storage_path=str(tmp_path / "runs"))
    assert len(written(tmp_path, again)) == len(written(tmp_path, result))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_repeats_that_all_fail_cost_a_warning_and_not_the_search(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object) -> object:
        raise TrialFailure("it diverged")

    monkeypatch.setattr(replicas, "train_again", broken)
    config = small_config(tmp_path, tolerance=0.2, search={"trials": 1, "repeats": 2})
    result = run_search(config)
    assert result.front
    assert "The means over seeds are missing: none of" in caplog.text
    ends = list(read_events(tmp_path / "runs" / result.search / JOURNAL_FILE))[-1]
    assert isinstance(ends, SessionEnded)
    assert ends.status == "completed"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"distill": {"teacher": "baseline"}}, "give distill.teacher a file"),
        ({"one_shot": {"steps": 1, "recover": 1}}, "set one_shot.recover to 0"),
        ({"int8": True}, "set int8 to false"),
        ({"space": SMALL_CONFIG["space"] | {"int8": {"choices": [True, False]}}}, "set int8 to"),
    ],
)
def test_repeats_of_what_cannot_be_trained_apart_are_refused_before_training(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValidationError, match=f"search.repeats trains a network anew.*{reason}"):
        small_config(tmp_path, search={"trials": 2, "repeats": 2}, **changes)


def test_a_search_without_a_front_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no front beside a trained baseline yet; resume it"):
        planned(small_config(tmp_path), ledger(), 2)


def test_a_search_that_has_not_ended_is_refused(replicated: Replicated, tmp_path: Path) -> None:
    directory, result, _ = replicated
    lines = (directory / "runs" / result.search / JOURNAL_FILE).read_bytes().splitlines(True)
    killed = tmp_path / "runs" / "killed"
    killed.mkdir(parents=True)
    kept = [line for line in lines if b'"event": "finished"' not in line]
    (killed / JOURNAL_FILE).write_bytes(b"".join(kept[:12]))
    with pytest.raises(UserError, match="has not ended; let it end first: slimfront resume killed"):
        replicate("killed", 2, str(tmp_path / "runs"))


def copy_of(replicated: Replicated, directory: Path, old: str, new: str) -> None:
    """The search with another text in its journal, as `other`."""
    _, result, _ = replicated
    place = replicated[0] / "runs" / result.search
    other = directory / "runs" / "other"
    other.mkdir(parents=True)
    shutil.copy(place / JOURNAL_FILE, other)
    replace_in_journal(other / JOURNAL_FILE, json.dumps(old)[1:-1], json.dumps(new)[1:-1])


MODEL = "  name: mlp\n  weights: null\n  strict: true\n  depth: 2\n  width: 16\n"


def test_a_network_that_cannot_be_built_here_is_one_sentence_before_training(
    replicated: Replicated, tmp_path: Path
) -> None:
    copy_of(replicated, tmp_path, MODEL, '  factory: "nowhere:net"\n')
    with pytest.raises(UserError, match="there is no module 'nowhere'"):
        replicate("other", 3, str(tmp_path / "runs"))


def test_that_no_training_succeeds_is_said(
    replicated: Replicated, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy_of(replicated, tmp_path, "\n  lr: 0.01\n", "\n  lr: 1.0e+300\n")
    with pytest.raises(UserError, match=r"none of \d+ trainings succeeded: .*diverged"):
        replicate("other", 3, str(tmp_path / "runs"))
    assert "dense with seed" in caplog.text


@pytest.mark.parametrize("seed", [0, 1, 4242, 2**32 - 1])
def test_replicas_draw_what_no_training_of_the_search_drew(seed: int) -> None:
    search = SearchOptions(seed=seed)
    of_search = {_drawn(search.seed_of_training(place)) for place in range(200)}
    of_replicas = {_drawn(search.seed_of_replica(place)) for place in range(50)}
    assert len(of_search) == 200
    assert len(of_replicas) == 50
    assert not of_search & of_replicas


def _drawn(seed: int) -> tuple[float, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(3, generator=generator).tolist())
