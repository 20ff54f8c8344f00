"""Searches whose trials share processes in packs, on a real Ray cluster."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from pydantic import ValidationError

from slimfront import train
from slimfront.search.config.schema import Config
from slimfront.search.engine import packing
from slimfront.search.engine.interrupt import Interrupt
from slimfront.search.engine.packing import pack
from slimfront.search.engine.progress import Progress
from slimfront.search.engine.runner import resume_search, run_search
from slimfront.search.record.ledger import Ledger
from slimfront.trainables.errors import UserError
from tests.conftest import SMALL_CONFIG, small_config
from tests.search.searches import Kills, actors, check_histories, runs_of

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(180)]


def packed(directory: Path, size: int | str, trials: int = 8, **changes: Any) -> Config:
    search = {"trials": trials, "sampler": "random", "concurrency": "auto"}
    search |= changes.pop("search", {})
    return small_config(directory, resources={"pack": size}, search=search, **changes)


class Processes(Progress):
    """Sees how many processes train at most, and how many trials are under way."""

    shared = own = trials = 0

    def update(self, ledger: Ledger) -> None:
        self.shared = max(self.shared, len(actors("SharedProcess")))
        self.own = max(self.own, len(actors("CandidateTrainable")))
        self.trials = max(self.trials, sum(trial.status == "running" for trial in ledger.trials))


def test_trials_in_packs_are_trials_like_others(tmp_path: Path) -> None:
    seen, config = Processes(), packed(tmp_path, 4)
    result = run_search(config, seen)
    assert len(result.ledger.with_status("completed")) == 8
    assert seen.own == 0
    assert seen.trials > seen.shared >= 1
    check_histories(tmp_path, result, epochs=2)
    client = MlflowClient(f"sqlite:///{tmp_path}/slimfront.db")
    for name, run in runs_of(tmp_path, result)[1].items():
        record = result.ledger.by_label[name]
        if record.number is None:
            continue
        alone = train(config.candidate(record.values | {"training.seed": record.seed}))
        losses = [
            point.value for point in client.get_metric_history(run.info.run_id, "epoch/train_loss")
        ]
        assert losses == pytest.approx([epoch["train_loss"] for epoch in alone.history], rel=1e-4)
        assert record.measures["nonzero_params"] == pytest.approx(
            alone.measures["nonzero_params"], rel=0.02
        )
    for point in result.front:
        assert point.origin.checkpoint is not None


@pytest.mark.slow
def test_a_killed_process_costs_its_trials_only_the_steps_since_their_last_checkpoints(
    tmp_path: Path,
) -> None:
    training = SMALL_CONFIG["training"] | {"epochs": 12}
    killer = Kills(1, "SharedProcess")
    result = run_search(packed(tmp_path, 3, 6, training=training), killer)
    assert killer.left == 0
    assert len(result.ledger.with_status("completed")) == 6
    check_histories(tmp_path, result, epochs=12)


@pytest.mark.slow
def test_trials_of_a_pack_are_stopped_early_and_one_that_diverges_fails_alone(
    tmp_path: Path,
) -> None:
    space = SMALL_CONFIG["space"] | {"training.lr": {"choices": [0.01, 1e30]}}
    training = SMALL_CONFIG["training"] | {"epochs": 9, "optimizer": "sgd"}
    result = run_search(
        packed(
            tmp_path,
            6,
            16,
            space=space,
            training=training,
            search={"early_stopping": {"grace": 1}, "seed": 3},
        )
    )
    diverged = {
        record.label for record in result.ledger.trials if record.values["training.lr"] == 1e30
    }
    assert {record.label for record in result.ledger.with_status("failed")} == diverged
    assert diverged
    assert result.ledger.with_status("stopped")
    assert result.ledger.with_status("completed")
    assert all("diverged" in str(record.reason) for record in result.ledger.with_status("failed"))


@pytest.mark.slow
def test_a_search_in_packs_is_interrupted_and_resumed(tmp_path: Path) -> None:
    class Stops(Progress):
        """Ends the search when trials have reported."""

        def update(self, ledger: Ledger) -> None:
            if sum(len(record.points) for record in ledger.trials) > 6:
                interrupt.requested = True

    interrupt = Interrupt()
    training = SMALL_CONFIG["training"] | {"epochs": 12}
    cut_off = run_search(packed(tmp_path, 3, 6, training=training), Stops(), interrupt=interrupt)
    assert cut_off.interrupted
    result = resume_search(cut_off.search, storage_path=str(tmp_path / "runs"))
    assert len(result.ledger.with_status("completed")) == 6
    check_histories(tmp_path, result, epochs=12)


def test_candidates_that_do_not_pack_are_refused_where_packs_are_asked_for(tmp_path: Path) -> None:
    model = {"factory": "tests.search.test_packing:dropping"}
    with pytest.raises(
        UserError,
        match=(
            r"resources\.pack: the model's '1' drops at random.*set its rate to 0, "
            r"or resources\.pack to 1"
        ),
    ):
        run_search(packed(tmp_path, 4, model=model))
    assert pack(packed(tmp_path, "auto", 1000, model=model)).size == 1
    with pytest.raises(
        ValidationError, match="a trial in 2 processes cannot be one of a pack of 4; set pack to 1"
    ):
        small_config(tmp_path, resources={"pack": 4, "cpu": 2, "processes": 2})


@pytest.mark.parametrize(("size", "least"), [(4, 4), ("auto", 1)])
def test_a_teacher_that_is_trained_first_is_no_reason_not_to_pack(
    tmp_path: Path, size: int | str, least: int
) -> None:
    made = pack(packed(tmp_path, size, 40, distill={"teacher": "baseline"}))
    assert least <= made.size <= 4


def dropping() -> Any:
    """A network with dropout."""
    from torch import nn

    return nn.Sequential(
        nn.Flatten(),
        nn.Dropout(0.1),
        *(layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.ReLU())),
        nn.Linear(64, 10),
    )


@pytest.mark.parametrize(
    ("trials", "concurrency", "most"),
    [(39, "auto", None), (40, "auto", 4), (5000, "auto", 64), (5000, 4, None)],
)
def test_a_pack_is_measured_and_leaves_the_search_rounds_to_learn_from(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trials: int,
    concurrency: int | str,
    most: int | None,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(packing, "best_size", lambda _, most, threads: asked.append(most) or 4)
    monkeypatch.setattr(
        packing, "capacity", lambda _: lambda: 2 if concurrency == "auto" else concurrency
    )
    found = pack(packed(tmp_path, "auto", trials, search={"concurrency": concurrency}))
    assert asked == ([] if most is None else [most])
    assert found.size == (1 if most is None else 4)
    assert found.capacity() == (concurrency if concurrency != "auto" else 2 * found.size)
    assert found.processes() == (4 if concurrency == 4 else 2)
