"""Trials of a local Ray take the processes that Ray has begun to start already.

Ray Tune gives the class of its trials an environment of their own, of a few variables, and Ray
starts processes anew for it while those that it had begun to start are ended. What this process has
in its environment when it starts a local Ray, all processes of that Ray have anyway.
"""

import os
from typing import Any

import ray
from ray.tune.execution.class_cache import (
    DEFAULT_ENV_VARS,
    ENV_VARS_TO_PROPAGATE,
    _ActorClassCache,
)

from slimfront.search.engine.ray_internals import local_ray


class TrialActors(_ActorClassCache):
    """Ray Tune's, without an environment where the Ray that runs here gives it to all."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: dict[type, Any] = {}

    def get(self, trainable_cls: type) -> Any:
        """The actor class of a class of trials, made once."""
        if not local_ray.gives(environment_of_trials()):
            return super().get(trainable_cls)
        if trainable_cls not in self.plain:
            self.plain[trainable_cls] = ray.remote(trainable_cls)
        return self.plain[trainable_cls]


def environment_of_trials() -> dict[str, str]:
    """What Ray Tune adds to the environment of trials that begin now."""
    environment: dict[str, str] = dict(DEFAULT_ENV_VARS)
    for name in ENV_VARS_TO_PROPAGATE:
        if name in os.environ:
            environment[name] = os.environ[name]
    return environment
