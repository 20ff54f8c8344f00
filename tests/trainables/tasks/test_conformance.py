"""What holds of every task, in every way that a network is trained and shipped."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import load_once
from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.latency import Latency
from slimfront.trainables.models import built
from slimfront.trainables.packs import Pack, packable
from slimfront.trainables.shipping import ship
from slimfront.trainables.shipping.formats import shipped
from slimfront.trainables.shipping.int8 import as_int8
from slimfront.trainables.tasks import TASKS
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.rehearsal import rehearse
from slimfront.trainables.training.train import train
from tests.trainables.tasks.made import JOBS

CPU = torch.device("cpu")


def candidate(job: str, **changes: Any) -> Candidate:
    training = {"epochs": 3, "batch_size": 32, "lr": 0.01, "seed": 1} | changes.pop("training", {})
    return Candidate.model_validate({**copy.deepcopy(JOBS[job]), "training": training, **changes})


def quality(job: str) -> tuple[str, str]:
    described = candidate(job).task.described()[0]
    return f"val_{described.name}", described.better


def test_every_task_is_tried_here() -> None:
    tried = {candidate(job).task.name for job in JOBS}
    assert tried == set(TASKS) - {"factory"}


@pytest.mark.parametrize("job", JOBS)
def test_training_makes_the_quality_better(job: str) -> None:
    made = candidate(job, training={"epochs": 12})
    training = Training(made)
    name, better = quality(job)
    data = training.data
    before = data.task.evaluate(training.model, *data.validation, prepare=data.prepare)
    epochs = [training.run_epoch() for _ in range(12)]
    training.close()
    first, last = before[name], epochs[-1][name]
    assert last > first if better == "larger" else last < first
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    assert list(before) == [f"val_{d.name}" for d in made.task.described()]


@pytest.mark.parametrize("job", JOBS)
def test_metrics_do_not_depend_on_how_examples_are_batched(job: str) -> None:
    training = Training(candidate(job))
    training.run_epoch()
    data, task = training.data, training.data.task
    whole = task.state(training.model, *data.validation, prepare=data.prepare)
    parts = task.state(training.model, *data.validation, batch_size=7, prepare=data.prepare)
    assert task.scores(whole.tolist()) == pytest.approx(task.scores(parts.tolist()), rel=1e-4)
    training.close()


@pytest.mark.parametrize("job", JOBS)
def test_a_pack_has_the_results_of_each_alone(job: str) -> None:
    members = [
        candidate(job, training={"seed": seed, "lr": lr}) for seed, lr in ((1, 0.01), (2, 0.003))
    ]
    assert packable(members[0]) is None
    alone = []
    for one in members:
        training = Training(one)
        alone.append([training.run_epoch() for _ in range(2)])
        training.close()
    pack = Pack(members)
    trainings = list(pack.members)
    together = [pack.run_epoch() for _ in range(2)]
    for number, training in enumerate(trainings):
        for epoch in range(2):
            wanted = alone[number][epoch]
            found = together[epoch][training]
            assert isinstance(found, dict)
            assert found == pytest.approx(wanted, rel=2e-2, abs=1e-3)
    pack.close()


@pytest.mark.parametrize("job", JOBS)
def test_training_goes_on_bit_exactly_from_its_state(job: str) -> None:
    whole = Training(candidate(job))
    whole.run_epoch()
    state = copy.deepcopy(whole.state_dict())
    wanted = whole.run_epoch()
    again = Training(candidate(job))
    again.load_state_dict(state)
    assert again.run_epoch() == wanted
    for training in (whole, again):
        training.close()


@pytest.mark.parametrize("job", JOBS)
def test_all_of_a_training_works_and_what_comes_out_is_smaller(job: str) -> None:
    made = candidate(
        job,
        training={"epochs": 4},
        penalties={"node": {"strength": 0.02}} if job != "segmentation" else {},
        sparsifier={"name": "snip", "sparsity": 0.6},
        refit={"epochs": 1},
        one_shot={"steps": 2},
    )
    done = train(made)
    name, _ = quality(job)
    data = load_once(made.data, CPU, made.task)
    found = data.task.evaluate(done.compacted.network, *data.validation, prepare=data.prepare)
    assert done.measures[name] == pytest.approx(found[name], rel=1e-5)
    dense = sum(p.numel() for p in built(made.model, data).parameters())
    assert done.measures["nonzero_params"] < dense
    assert all(name in pruned.measures for pruned in done.pruned)


KINDS = ("pt2", "onnx", "safetensors")
OFTEN = {
    *(("regression", "pt2"), ("tokens", "pt2"), ("classification", "onnx"), ("sequence", "onnx")),
    *(("segmentation", "onnx"), ("multilabel", "safetensors"), ("weighted", "safetensors")),
    ("several", "safetensors"),
}
"""Each task, and each kind of file; the other pairs take long."""


def pairs() -> list[Any]:
    return [
        pytest.param(job, kind, marks=() if (job, kind) in OFTEN else pytest.mark.slow)
        for job in JOBS
        for kind in KINDS
    ]


@pytest.mark.parametrize(("job", "kind"), pairs())
def test_a_shipped_file_has_the_metrics_of_the_network(job: str, kind: str, tmp_path: Path) -> None:
    made = candidate(job, training={"epochs": 1}, sparsifier={"name": "magnitude", "sparsity": 0.5})
    network = train(made).compacted.network
    data = load_once(made.data, CPU, made.task)
    dense = built(made.model, data).eval()
    few = Latency(runs=3, warm_up=0)
    shipment = ship(network, dense, data, tmp_path / f"n.{kind}", kind, latency=few)  # type: ignore[arg-type]
    found = data.task.evaluate(network, *data.test, "test", prepare=data.prepare)
    assert {name: shipment.scores[name] for name in found} == pytest.approx(
        found, rel=1e-3, abs=1e-5
    )
    # What ships takes inputs as they come, and gives the unit of the targets.
    raw = data.raw(data.test.inputs)
    outputs = shipped(network, data)(raw)
    scores = data.task.scores(
        data.task.state_of_shipped(outputs, data.test.targets).tolist(), "test"
    )
    assert scores == pytest.approx(found, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("job", ["regression", "multilabel", "sequence"])
def test_int8_networks_are_measured_by_the_task(job: str) -> None:
    made = candidate(job, training={"epochs": 2})
    network = train(made).compacted.network
    data = load_once(made.data, CPU, made.task)
    name, _ = quality(job)
    exact = data.task.evaluate(network, *data.validation, prepare=data.prepare)[name]
    assert as_int8(network, data).scores(data, "val")[name] == pytest.approx(exact, rel=0.3)


@pytest.mark.parametrize("job", JOBS)
def test_outputs_that_do_not_fit_the_targets_are_refused(job: str) -> None:
    made = candidate(job)
    rehearse(made)
    data = load_once(made.data, CPU, made.task)
    outputs = built(made.model, data)(data.prepare(data.train.inputs[:4]))
    targets, check = data.train.targets[:4], data.task.options.check_outputs
    check(outputs, targets, data.head)
    with pytest.raises(UserError, match=r"the network (returns|gives)"):
        check(outputs, targets, data.head + 1)
    with pytest.raises(UserError, match="returns a dict; it must return one tensor"):
        check({"logits": outputs}, targets, data.head)
