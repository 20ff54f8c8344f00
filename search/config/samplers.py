"""Optuna's samplers by the name in a config."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)

from slimfront.trainables.options import suggest

# Optuna calls these experimental at every use; one line in the docs says it better.
warnings.filterwarnings(
    "ignore",
    category=ExperimentalWarning,
    message=".*(NSGAIIISampler|QMCSampler|multivariate|group|constant_liar)",
)

SAMPLERS: dict[str, tuple[type[BaseSampler], dict[str, Any]]] = {
    "tpe": (TPESampler, {"constant_liar": True}),
    "nsga2": (NSGAIISampler, {}),
    "nsga3": (NSGAIIISampler, {}),
    "gp": (GPSampler, {}),
    "qmc": (QMCSampler, {"scramble": True}),
    "random": (RandomSampler, {}),
}
"""Optuna samplers that take several objectives, by the name in a config, with our defaults of their
options."""

_PLAIN = (bool, int, float, str)


def sampler_options(name: str) -> list[str]:
    """What a config may set of a sampler: the options of Optuna's class that are plain values; the
    seed is the search's."""
    cls, _ = SAMPLERS[name]
    return [
        key
        for key, parameter in inspect.signature(cls.__init__).parameters.items()
        if key not in ("self", "seed")
        and (parameter.default is None or isinstance(parameter.default, _PLAIN))
    ]


def _for_conditions(name: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a sampler is told further where some values vary only beside certain others: TPE models
    together those that vary together, and those that have no model of all values take the rest from
    another sampler, without a warning for each."""
    if name == "tpe" and options.get("multivariate"):
        return {"group": True}
    if name == "gp":
        return {"independent_sampler": TPESampler(seed=seed), "warn_independent_sampling": False}
    if name == "qmc":
        return {"independent_sampler": RandomSampler(seed), "warn_independent_sampling": False}
    return {}


def build_sampler(
    name: str,
    seed: int,
    options: Mapping[str, Any] | None = None,
    *,
    conditional: bool = False,
) -> BaseSampler:
    """The sampler of that name; `conditional` where some values vary only beside certain others.
    Raises ValueError, in one sentence, for a name or option that it does not have."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler '{name}'; {suggest(name, SAMPLERS)}")
    cls, defaults = SAMPLERS[name]
    for key in options or {}:
        if key not in sampler_options(name):
            raise ValueError(
                f"the sampler '{name}' has no option '{key}'; {suggest(key, sampler_options(name))}"
            )
    wanted = {**defaults, **(options or {})}
    if conditional:
        wanted = _for_conditions(name, seed, wanted) | wanted
    try:
        return cls(**wanted | {"seed": seed})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the sampler '{name}' does not take these options: {error}") from None
