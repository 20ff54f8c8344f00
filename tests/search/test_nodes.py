import logging
from typing import Any

import pytest

from slimfront.search.config.schema import Config
from slimfront.search.config.settings import Resources
from slimfront.search.engine import nodes
from slimfront.search.engine.nodes import capacity, check_fits, slots
from slimfront.trainables.errors import UserError


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("trial", "fit"),
    [
        ({"CPU": 1}, 12),
        ({"CPU": 3}, 3),
        ({"CPU": 1, "GPU": 0.25}, 4),
        ({"CPU": 0.1, "GPU": 0.4}, 4),
        ({"CPU": 1, "big": 1}, 0),
    ],
)
def test_a_trial_fits_whole_on_one_live_node(trial: dict[str, float], fit: int) -> None:
    cluster = [node(CPU=4, GPU=2), node(CPU=8), node(alive=False, CPU=100, GPU=8, big=1)]
    assert slots(cluster, trial) == fit


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray says of its nodes."""
    there = [node(CPU=4)]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: there)
    return there


def asking(config: Config, concurrency: int | str = "auto", **resources: Any) -> Config:
    search = config.search.model_copy(update={"concurrency": concurrency})
    return config.model_copy(
        update={"search": search, "resources": Resources.model_validate(resources)}
    )


def test_there_is_room_for_what_joins(
    config: Config, cluster: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(nodes.time, "monotonic", lambda: now)
    places = capacity(asking(config, cpu=2))
    assert places() == 2
    cluster.append(node(CPU=8))
    assert places() == 2  # nodes are not counted at every call
    now += 1
    assert places() == 6
    cluster.clear()
    now += 1
    assert places() == 1  # one waits for a node
    assert capacity(asking(config, 64))() == 64  # what an autoscaler is to make room for


def test_resources_that_no_node_has(
    config: Config,
    cluster: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_fits(asking(config, cpu=4))
    for resources, problem in (
        (
            {"cpu": 5},
            r"resources\.cpu: a trial asks for 5 CPU, and there is 4 here; set resources\.cpu to 4 "
            r"or less",
        ),
        (
            {"gpu": 1},
            r"resources\.gpu: a trial asks for 1 GPU, and there is 0 here; leave resources\.gpu "
            r"out, or add a node",
        ),
    ):
        with pytest.raises(UserError, match=problem):
            check_fits(asking(config, **resources))
    cluster.append(node(CPU=1, GPU=1))
    with pytest.raises(UserError, match=r"no node has all that a trial asks for \(4 CPU, 1 GPU\)"):
        check_fits(asking(config, cpu=4, gpu=1))
    # On a machine alone none comes, whatever concurrency says.
    monkeypatch.setattr(nodes.local_ray, "is_own", lambda: True)
    with pytest.raises(UserError, match=r"no node has all that a trial asks for \(4 CPU, 1 GPU\)"):
        check_fits(asking(config, 8, cpu=4, gpu=1))
    monkeypatch.setattr(nodes.local_ray, "is_own", lambda: False)
    with caplog.at_level(logging.WARNING):
        check_fits(asking(config, 8, cpu=4, gpu=1))
    assert (
        "no node has the resources of a trial (4 CPU, 1 GPU) yet; trials wait for one"
        in caplog.text
    )
