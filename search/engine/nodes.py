"""The Ray cluster that a search runs on: joining one or starting a local one, and how many trials
its nodes hold now."""

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slimfront.search.config.schema import Config
from slimfront.search.engine.leftovers import Leftovers, end_here, nothing_left
from slimfront.search.engine.ray_internals import local_ray
from slimfront.search.engine.ray_internals.quiet import quieten
from slimfront.trainables.data.factory import SESSION
from slimfront.trainables.errors import UserError, first_line, shorten

log = logging.getLogger(__name__)

# Read by Ray Tune: no CSV, JSON and TensorBoard files per trial (MLflow has it all), and Ctrl-C is
# ours to handle.
_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",  # the searcher holds back what has no room
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Relative paths in a config mean the same in a trial as in the driver.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

_RECOUNT_S = 1.0
_NODES_S = 30.0
"""How long the nodes of a cluster may take to end what is left on them."""
_LINGER_S = 3.0
"""How long processes may take to end by themselves when a search is over."""


@contextmanager
def ray_session(address: str | None = None, working_dir: str | None = None) -> Iterator[None]:
    """A Ray cluster: one that is running, that at `address` or RAY_ADDRESS, or a local one for the
    time of the block.

    Args:
        address: `auto` or HOST:PORT of a cluster that this machine is a node of.
        working_dir: what processes on its nodes find in their working directory; nothing is sent if
            None.

    Raises:
        UserError: if there is no cluster at `address`, or it does not let us in.
    """
    os.environ.update(_TUNE_ENVIRONMENT)
    if ray.is_initialized():
        yield
        return
    with nothing_left() as leftovers:
        joins = address is not None or "RAY_ADDRESS" in os.environ
        if joins:
            _join(address, working_dir)
        else:
            start_local_ray(leftovers=leftovers)
        try:
            yield
            if joins:  # after an error the cluster may answer to nothing
                _say_ended(_end_on_nodes())
        finally:
            ray.shutdown()
            _say_ended(leftovers.end(_LINGER_S))


def start_local_ray(num_cpus: int | None = None, leftovers: Leftovers | None = None) -> None:
    """Starts a Ray for this machine alone. Raises UserError if it cannot start."""
    os.environ.update(_TUNE_ENVIRONMENT)
    local_ray.start(num_cpus, leftovers)
    quieten()


def _end_on_nodes() -> list[str]:
    """Ends what trials of this driver have started and left on the nodes of a cluster; its command
    lines.

    A trial has the name of its session in its environment, and so has what it starts. A fork that
    runs no program of its own has its parent's environment from before, and is not found.
    """
    job = ray.get_runtime_context().get_job_id()
    end = ray.remote(num_cpus=0, max_retries=0)(end_here)
    asked = [
        end.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(f"{SESSION}={node['NodeID']}-{job}-")
        for node in ray.nodes()
        if node["Alive"]
    ]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_NODES_S)
    ended: list[str] = []
    for answer in answered:
        with suppress(ray.exceptions.RayError):  # its node was lost
            ended += ray.get(answer)
    return ended


def _say_ended(ended: list[str]) -> None:
    if ended:
        shown = "; ".join(shorten(text) for text in ended[:3]) + ("; …" if len(ended) > 3 else "")
        log.warning(
            "%d processes that the search had started still ran, and were ended: %s",
            len(ended),
            shown,
        )


def _join(address: str | None, working_dir: str | None) -> None:
    shown = address or os.environ["RAY_ADDRESS"]
    environment: dict[str, Any] = {"working_dir": working_dir} if working_dir else {}
    try:
        _check_reachable(shown)
        ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = first_line(error)
        raise UserError(
            f"no Ray cluster can be joined at {shown} from this machine ({reason}); it must be a "
            "node of the cluster: start one "
            "with `ray start`, or use `slimfront submit`"
        ) from None
    quieten()


def _check_reachable(address: str) -> None:
    """Raises OSError if nothing listens at HOST:PORT: Ray itself would try for many minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def slots(nodes: list[dict[str, Any]], trial: Mapping[str, float]) -> int:
    """How many trials that take `trial`, such as {"CPU": 1}, fit on the live ones of `ray.nodes()`,
    each whole on one node."""
    fit = 0
    for node in nodes:
        if node["Alive"]:
            fit += min(
                _fit(name, node["Resources"].get(name, 0.0), asked) for name, asked in trial.items()
            )
    return fit


def _fit(resource: str, there: float, asked: float) -> int:
    if resource == "GPU" and asked < 1:  # a share is of one GPU, not of two
        return int(there) * math.floor(1 / asked + 1e-9)
    return math.floor(there / asked + 1e-9)


def check_fits(config: Config) -> None:
    """Finds out before a search if some node has the resources of one trial.

    With a `search.concurrency` of its own, a search on a cluster waits for such a node: an
    autoscaler may add one.

    Raises:
        UserError: if none has, and none is waited for.
    """
    trial = config.resources.for_ray()
    live = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if slots(ray.nodes(), trial):
        return
    if config.search.concurrency != "auto" and not local_ray.is_own():
        log.warning(
            "no node has the resources of a trial (%s) yet; trials wait for one", _shown(trial)
        )
        return
    for name, asked in trial.items():
        most = max((node.get(name, 0.0) for node in live), default=0.0)
        if asked > most:
            key = {"CPU": "cpu", "GPU": "gpu", "memory": "memory"}.get(name, f"custom.{name}")
            right = (
                f"set resources.{key} to {most:g} or less"
                if most
                else f"leave resources.{key} out, or add a node that has it"
            )
            raise UserError(
                f"resources.{key}: a trial asks for {asked:g} {name}, and there is {most:g} here; "
                f"{right}"
            )
    raise UserError(
        f"resources: no node has all that a trial asks for ({_shown(trial)}); ask for less, or add "
        "such a node"
    )


def _shown(trial: Mapping[str, float]) -> str:
    return ", ".join(f"{asked:g} {name}" for name, asked in trial.items())


def capacity(config: Config) -> Callable[[], int]:
    """How many trials may be under way: `search.concurrency`; where it is auto what the live nodes
    hold, counted each second.

    At least one, which waits for a node if there is none.
    """
    asked = config.search.concurrency
    if asked != "auto":
        number = asked
        return lambda: number
    trial = config.resources.for_ray()
    counted_at = -_RECOUNT_S
    count = 1

    def now() -> int:
        nonlocal counted_at, count
        if time.monotonic() - counted_at >= _RECOUNT_S:
            counted_at = time.monotonic()
            count = max(slots(ray.nodes(), trial), 1)
        return count

    return now
