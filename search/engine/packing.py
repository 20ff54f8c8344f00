"""How many trials share a process: what the config says, or what a short measurement finds
fastest."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import ray

from slimfront.search.config.schema import Config
from slimfront.search.engine.nodes import capacity
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import UserError
from slimfront.trainables.gpu import take_share
from slimfront.trainables.packs import best_size, packable

_ROUNDS = 5
"""With `resources.pack: auto` so many rounds of trials at least follow one another: a search learns
from one for the next."""

_LEAST, _MOST = 4, 64
"""Packs of fewer gain too little to be measured for."""


@dataclass(frozen=True)
class Packing:
    """`size` trials share a process, and `capacity()` trials may be under way."""

    size: int
    capacity: Callable[[], int]

    def processes(self) -> int:
        """How many processes those trials are spread over."""
        return math.ceil(self.capacity() / self.size)


def pack(config: Config) -> Packing:
    """How the trials of a search share processes.

    Raises:
        UserError: if the config asks for packs, and its candidates do not pack.
    """
    places = capacity(config)
    asked = config.resources.pack
    candidate = config.candidate({}).with_a_teacher()
    if asked == "auto":
        size = _fastest(config, candidate, places())
    else:
        size = asked
        if size > 1 and (reason := packable(candidate)):
            raise UserError(f"resources.pack: {reason}")
    if config.search.concurrency != "auto":
        return Packing(size, places)
    return Packing(size, lambda: places() * size)


def _fastest(config: Config, candidate: Candidate, places: int) -> int:
    """The size of pack, such that `_ROUNDS` rounds of trials follow one another."""
    resources = config.resources
    if config.search.concurrency != "auto" or resources.processes_of_a_trial() > 1:
        return 1
    most = min(config.search.trials // (_ROUNDS * places), _MOST)
    if most < _LEAST:
        return 1
    threads = max(1, int(resources.cpu))
    if not resources.gpu:
        return best_size(candidate, most, threads=threads)
    where_trials_run = ray.remote(
        num_cpus=resources.cpu, num_gpus=resources.gpu, resources=resources.custom
    )(_fastest_on_a_gpu)
    size: int = ray.get(where_trials_run.remote(candidate, most, resources.gpu, threads))
    return size


def _fastest_on_a_gpu(candidate: Candidate, most: int, gpus: float, threads: int) -> int:
    take_share(gpus)
    return best_size(candidate, most, "cuda", threads)
