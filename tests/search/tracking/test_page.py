"""The run of a finished search in MLflow, as people and programs find it."""

import cProfile
import csv
import io
import json
import pstats
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from slimfront.search.config.objectives import OBJECTIVES, Constraint
from slimfront.search.record.events import TrialBegan
from slimfront.search.record.front.picks import member_name
from slimfront.search.record.front.shown import shown
from slimfront.search.record.front.told import quality_and_error
from slimfront.search.record.ledger import Ledger, SearchResult
from slimfront.search.record.report import as_json
from slimfront.search.record.session import read_search
from slimfront.search.tracking import charts, compare, models
from slimfront.search.tracking.page import live_metrics
from slimfront.search.tracking.store import find_search
from slimfront.trainables.data import Digits
from slimfront.trainables.errors import UserError
from tests.search.test_ledger import begin, end, point

Finished = tuple[Path, SearchResult]

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def client(finished: Finished) -> MlflowClient:
    return MlflowClient(f"sqlite:///{finished[0]}/slimfront.db")


@pytest.fixture
def parent(finished: Finished, client: MlflowClient) -> Run:
    return find_search(client, finished[1].search)


def test_the_description_tells_the_story_with_links_to_the_trials(
    finished: Finished, parent: Run
) -> None:
    _, result = finished
    text = parent.data.tags["mlflow.note.content"]
    recommended = result.ledger.front.recommended()
    assert recommended is not None
    run = result.run_ids[recommended.trial.label]
    place = f"#/experiments/{parent.info.experiment_id}/runs/{run}?workflowType=machine_learning"
    assert f"### Recommended: [{recommended.name}]({place})" in text
    assert "more `val_accuracy` and less `nonzero_params`" in text
    assert "`sparsifier.sparsity` | 0.1 to 0.9 |" in text
    linked = re.findall(
        r"^\| (?:dense: )?\[[^\]]*\]\(#/experiments/\d+/runs/(\w+)\?", text, re.MULTILINE
    )
    chosen = shown(result.ledger, result.front)
    labels = ["dense", *(member.trial.label for member in chosen.members)]
    assert linked == [result.run_ids[label] for label in labels]
    left_out = len(result.front) - len(chosen.members)
    assert left_out == chosen.outside + chosen.equal
    assert ("Not shown: " in text) == (left_out > 0)
    dense = result.ledger.dense_network
    assert dense is not None
    assert f"(dense {quality_and_error(dense, 'val_accuracy')})" in text


def test_how_far_a_quality_may_be_off_is_said(
    finished: Finished, client: MlflowClient, parent: Run
) -> None:
    _, result = finished
    best = result.ledger.front.recommended()
    assert best is not None
    assert best.tested is not None
    error = best.tested["val_accuracy_se"]
    assert 0 < error < 0.1
    accuracy = best.measures["val_accuracy"]
    text = parent.data.tags["mlflow.note.content"]
    assert f"accuracy {accuracy:.4f} ± {error:.4f}" in text
    member = next(member for member in as_json(result)["front"] if member["recommended"])
    assert member["val_accuracy_se"] == error
    assert member["test_accuracy_se"] > 0
    run = client.get_run(result.run_ids[best.trial.label])
    prefix = f"one_shot_{best.step}/" if best.step else ""
    assert run.data.metrics[f"{prefix}val_accuracy_se"] == error


def test_pictures_environment_and_data_set_are_there(
    finished: Finished, client: MlflowClient, parent: Run, tmp_path: Path
) -> None:
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    pictures = {"front.png", "history.png", "importance.png", "layers.png"}
    assert names == pictures | {"config.yaml", "environment.txt", "front.json", "front.html"}
    for name in pictures:
        assert (
            Path(client.download_artifacts(parent.info.run_id, name, str(tmp_path)))
            .read_bytes()
            .startswith(b"\x89PNG")
        )
    environment = Path(
        client.download_artifacts(parent.info.run_id, "environment.txt", str(tmp_path))
    ).read_text()
    assert re.search(r"^torch==2", environment, re.MULTILINE)
    (data,) = parent.inputs.dataset_inputs
    assert data.dataset.name == "digits"
    assert json.loads(data.dataset.profile)["train"] == 1078


def test_trials_are_tagged_with_front_knee_and_rank(
    finished: Finished, client: MlflowClient, parent: Run
) -> None:
    _, result = finished
    knee = result.ledger.front.knee()
    assert knee is not None
    assert parent.data.tags["slimfront.knee"] == knee.name
    recommended = result.ledger.front.recommended()
    assert recommended is not None
    assert parent.data.tags["slimfront.recommended"] == recommended.name
    assert re.fullmatch("[0-9a-f]{16}", parent.data.tags["slimfront.config_digest"])
    on_front = {member.trial.label for member in result.front}
    for trial in result.ledger.trials:
        tags = client.get_run(result.run_ids[trial.label]).data.tags
        assert tags["slimfront.front"] == str(trial.label in on_front).lower()
        assert tags["slimfront.knee"] == str(trial is knee.trial).lower()
        better = [t for t in result.ledger.trials if dominates(t.measures, trial.measures)]
        assert (tags["slimfront.rank"] == "0") == (not better)


def dominates(a: dict[str, float], b: dict[str, float]) -> bool:
    ahead = (a["val_accuracy"] - b["val_accuracy"], b["nonzero_params"] - a["nonzero_params"])
    return min(ahead) >= 0 and max(ahead) > 0


_WITHOUT_SLIMFRONT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("slimfront", "ray", "optuna"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import mlflow, numpy, torch
mlflow.set_tracking_uri(sys.argv[1])
x = numpy.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype("float32")
for uri in sys.argv[2:]:
    by_pyfunc = mlflow.pyfunc.load_model(uri).predict(x)
    by_torch = mlflow.pytorch.load_model(uri)(torch.from_numpy(x)).detach().numpy()
    numpy.testing.assert_allclose(by_pyfunc, by_torch, atol=1e-6)
    print(*by_torch.flatten().tolist())
"""


def test_every_front_member_is_a_model_that_loads_without_slimfront_and_the_registry_has_the_pick(
    finished: Finished, client: MlflowClient, parent: Run
) -> None:
    directory, result = finished
    members = compare.read_front(client, result.search)["front"]
    assert len(members) == len(result.front)
    uris = []
    for member in members:
        name = models.model_name(member["trial"], member["epoch"], member["one_shot"])
        model_id = client.get_run(member["run_id"]).data.tags[f"{models.MODEL_TAG}/{name}"]
        model = client.get_logged_model(model_id)
        assert model.params["val_accuracy"] == f"{member['val_accuracy']:g}"
        assert model.tags["slimfront.front"] == "true"
        uris.append(f"models:/{model_id}")
    assert models.register(client, members[0], "tiny", result.search) == 1
    assert models.register(client, members[-1], "tiny", result.search) == 2
    tags = client.get_model_version("tiny", "1").tags
    assert tags["slimfront.network"] == member_name(members[0])
    assert float(tags["nonzero_params"]) == members[0]["nonzero_params"]
    command = [
        sys.executable,
        "-c",
        _WITHOUT_SLIMFRONT,
        f"sqlite:///{directory}/slimfront.db",
        *uris,
        "models:/tiny/2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    outputs = done.stdout.strip().splitlines()[-len(uris) - 1 :]
    assert outputs[-1] == outputs[-2]  # the second version is the last member
    import numpy
    import torch

    x = torch.from_numpy(numpy.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype("float32"))
    mean, std = Digits().load().normalisation()  # the model takes inputs as they come
    config, _ = read_search(result.search, str(directory / "runs"))
    for line, member in zip(outputs, result.front, strict=False):
        network = charts.load(member, config)
        assert network is not None
        torch.testing.assert_close(
            torch.tensor([float(v) for v in line.split()]),
            network((x - mean) / std).detach().flatten(),
            atol=1e-5,
            rtol=0,
        )


def test_models_of_networks_that_left_the_front_say_so(
    finished: Finished, client: MlflowClient, parent: Run
) -> None:
    _, result = finished
    experiment, runs = parent.info.experiment_id, set(result.run_ids.values())

    def on_front() -> list[str]:
        found = client.search_logged_models([experiment])
        return sorted(model.name for model in found if model.tags["slimfront.front"] == "true")

    everyone = on_front()
    left = [
        models.model_name(point.trial.label, point.epoch, point.step) for point in result.front[1:]
    ]
    models.mark_front(client, experiment, runs, result.front[1:])
    assert on_front() == sorted(left)
    models.mark_front(client, experiment, runs, result.front)
    assert on_front() == everyone


@pytest.mark.parametrize("name", ["a/b", 'a"b', "a:b"])
def test_a_name_that_the_registry_cannot_keep_is_refused(client: MlflowClient, name: str) -> None:
    with pytest.raises(UserError, match=r"has none of / : \. % and quotes"):
        models.register(client, {"trial": "trial-000", "epoch": 1}, name, "s")


def test_fronts_are_read_from_mlflow_alone_and_compared_on_one_scale(
    finished: Finished, client: MlflowClient
) -> None:
    _, result = finished
    fronts = compare.read_fronts(client, [result.search, result.search])
    assert [front.search for front in fronts] == [result.search] * 2
    full = pytest.approx(result.ledger.front.hypervolume_full())
    assert fronts[0].hypervolume == fronts[1].hypervolume == full
    rows = list(csv.DictReader(io.StringIO(compare.render(fronts, "csv").decode())))
    assert [row["network"] for row in rows].count("dense") == 2
    assert len(rows) == 2 * (1 + len(result.front))
    assert sum(row["knee"] == "True" for row in rows) == 2
    plain = json.loads(compare.render(fronts, "json"))
    assert plain[0]["hypervolume"] == fronts[0].hypervolume
    table = compare.render(fronts, "table").decode()
    assert f"{fronts[0].hypervolume:.4f}" in table
    assert "(knee)" in table
    assert compare.render(fronts, "png").startswith(b"\x89PNG")
    with pytest.raises(UserError, match="there is no search called 'other' in this store"):
        compare.read_fronts(client, [result.search, "other"])


def test_live_metrics_say_what_is_smallest_at_the_accuracy_that_is_wanted() -> None:
    objectives = [OBJECTIVES["val_accuracy"], OBJECTIVES["nonzero_params"]]
    for constraints, threshold, smallest in (
        ([], 0.89, 300.0),
        ([Constraint.parse("val_accuracy", ">= 0.7")], 0.7, 100.0),
    ):
        book = Ledger(objectives, {"nonzero_params": 1000}, constraints)
        assert live_metrics(book).keys() >= {"hypervolume", "front_size", "trials_completed"}
        for number in (None, 0):
            begin(book, number)
        point(book, None, 1, 0.9, 1000)
        point(book, 0, 1, 0.8, 100)
        point(book, 0, 2, 0.895, 300)
        end(book, 0)
        live = live_metrics(book)
        assert live["accuracy_threshold"] == pytest.approx(threshold)
        assert live["smallest_nonzero_params"] == smallest
        assert live["best_val_accuracy"] == 0.895
        assert live["trials_completed"] == 1


def test_importances_name_what_drives_an_objective_and_need_some_trials() -> None:
    from optuna.distributions import FloatDistribution

    objectives = [OBJECTIVES["val_accuracy"], OBJECTIVES["nonzero_params"]]
    book = Ledger(objectives, {"nonzero_params": 1000})
    space = {"drives": FloatDistribution(0, 1), "does.nothing": FloatDistribution(0, 1)}
    assert charts.importances(book, space) == {}
    for number in range(30):
        drives, nothing = (number * 7 % 30) / 30, (number * 11 % 30) / 30
        book.apply(
            TrialBegan(number=number, values={"drives": drives, "does.nothing": nothing}, seed=0)
        )
        # The size is always the same: it has no variance to explain.
        point(book, number, 1, drives, 100)
        end(book, number)
    shares = charts.importances(book, space)
    assert set(shares) == {"val_accuracy"}
    assert shares["val_accuracy"]["drives"] > 0.8


def test_the_work_of_importances_grows_no_faster_than_the_trials() -> None:
    from optuna.distributions import FloatDistribution

    def calls(trials: int) -> int:
        chance, book = random.Random(0), Ledger([OBJECTIVES["val_accuracy"]], {})
        for number in range(trials):
            book.apply(TrialBegan(number=number, values={"x": chance.random()}, seed=0))
            point(book, number, 1, chance.random(), 100)
            end(book, number)
        profile = cProfile.Profile()
        profile.runcall(charts.importances, book, {"x": FloatDistribution(0, 1)})
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]

    calls(10)  # imports what it needs
    assert calls(600) < 1.7 * calls(300)
