"""A Ray of this machine's own for one search: on loopback alone, started with patience, and gone
with its driver."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private.node import Node
from ray.tune.execution.class_cache import DEFAULT_ENV_VARS

from slimfront.search.engine.leftovers import Leftovers
from slimfront.search.engine.ray_internals.places import check_places
from slimfront.trainables.errors import UserError, first_line, shorten

log = logging.getLogger(__name__)

_given: dict[str, str] = {}
"""The environment that the Ray of this process was started with, and so its processes have; empty
if it started none."""

START_S = 300.0
"""How long a start of Ray may take."""
_ATTEMPT_S = 60
"""How long Ray's first server is waited for before another is started. Ray hears no Ctrl-C in this
time."""
_HANGS_S = 120.0
"""After so much more it is taken to hang."""
_SAY_EVERY_S = 20.0


def _patience() -> dict[str, str]:
    """Ray's own limits of waiting while it starts, which are too short for a busy machine, by the
    variables that set them."""
    seconds = str(int(START_S))
    ms = str(int(1000 * START_S))
    names = {
        "gcs_server_port_wait_time_s": str(_ATTEMPT_S),
        "gcs_rpc_server_connect_timeout_s": "60",
    }
    names |= {"worker_register_timeout_seconds": seconds, "agent_register_timeout_ms": ms}
    return {f"RAY_{name}": value for name, value in names.items()}


def start(num_cpus: int | None = None, leftovers: Leftovers | None = None) -> None:
    """Starts Ray quietly, so that it listens on loopback alone; its own chatter stays in its log
    files.

    Raises:
        UserError: if it cannot start here, or is not there after `START_S` seconds.
    """
    for name, value in (_patience() | DEFAULT_ENV_VARS).items():
        os.environ.setdefault(name, value)
    check_places()
    if leftovers is not None:
        leftovers.starts()
    began = time.monotonic()
    _given.clear()
    with _loopback(), _few_servers(), _patient(began), _progress(began, leftovers):
        while True:
            try:
                ray.init(
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
                break
            except Exception as error:  # Ray raises many kinds here, bare Exceptions among them
                waited = time.monotonic() - began
                ray.shutdown()
                if leftovers is not None:
                    leftovers.end()
                if "Timed out" not in str(error) or waited >= START_S:
                    if leftovers is not None:
                        leftovers.started()
                    raise UserError(_sentence(error, waited)) from None
    _given.update(os.environ)
    if leftovers is not None:
        leftovers.belongs(session_directory())


def is_own() -> bool:
    """Whether this process runs on a Ray that it has started, on this machine alone: no node comes
    or goes."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.head)


def gives(environment: dict[str, str]) -> bool:
    """Whether this process runs on a Ray that it has started, whose processes have all of this in
    their environment."""
    return is_own() and environment.items() <= _given.items()


def session_directory() -> str:
    """Where the Ray that this process has joined keeps its logs and sockets on this machine; empty
    if it has joined none."""
    node = ray._private.worker._global_node
    if node is not None:
        return str(node.get_session_dir_path())
    return ""


def _sentence(error: Exception, waited: float) -> str:
    reason = shorten(first_line(error), 200)
    if isinstance(error, OSError) and error.errno is not None:
        return f"Ray cannot start: {reason}"
    return (
        f"Ray did not start within {waited:.0f} s ({reason}); the machine may be too busy: try "
        "again when it has less to do, or "
        "use a running cluster with --address"
    )


@contextmanager
def _loopback() -> Iterator[None]:
    """Has a Ray that starts within take 127.0.0.1 for the address of this machine, and so all its
    processes listen there alone.

    It is Ray's own way on other systems than Linux. An address that is given to `ray.init` does not
    do it: where it is loopback, Ray takes the machine's in its place.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _few_servers() -> Iterator[None]:
    """Has a Ray that starts within leave out three servers that a search on one machine has no use
    for, each a Python of its own: that of the autoscaler, that of the dashboard, and what prints
    the logs of workers into the terminal. Ray has no public switch for them (Ray 2.60)."""

    def nothing(_node: Node, **_options: object) -> None:
        pass

    names = ("start_monitor", "start_api_server", "start_log_monitor")
    before = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, nothing)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


@contextmanager
def _patient(began: float) -> Iterator[None]:
    """Within, the driver waits for its node as long as for the rest; Ray itself gives up after 30
    s, whatever is set."""
    ask: Callable[[Any, Any], Any] = services.get_node

    def get_node(address: Any, node: Any) -> Any:
        while True:
            try:
                return ask(address, node)
            except RuntimeError:
                if time.monotonic() - began > START_S:
                    raise
            time.sleep(0.2)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = ask


@contextmanager
def _progress(began: float, leftovers: Leftovers | None) -> Iterator[None]:
    """Says now and then that Ray is being waited for; ends the process where Ray waits in C++, for
    a process of its own that died, and would for ever."""
    over = threading.Event()

    def say() -> None:
        while not over.wait(_SAY_EVERY_S):
            waited = time.monotonic() - began
            if waited > START_S + _HANGS_S:
                if leftovers is not None:
                    leftovers.started()
                message = _sentence(TimeoutError("it hangs"), waited)
                print(f"Error: {message}", file=sys.stderr, flush=True)
                os._exit(2)
            log.warning(
                "Ray has been starting for %.0f s; the machine is busy, and up to %.0f s are "
                "waited",
                waited,
                START_S,
            )

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
