"""Optuna's samplers by the name in a config."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Union

from optuna import create_study, create_trial, logging
from optuna.distributions import BaseDistribution
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
from pydantic import TypeAdapter, ValidationError

from slimfront.trainables.errors import first_line, shorten
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

_PLAIN: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "None": None}
_MOST_TRIED = 200


def sampler_options(name: str) -> dict[str, str]:
    """What a config may set of a sampler, with its type: the options of Optuna's class that are
    plain values, as they are annotated there; the seed is the search's."""
    cls, _ = SAMPLERS[name]
    found = {}
    for key, parameter in inspect.signature(cls.__init__).parameters.items():
        kind = str(parameter.annotation)
        if key not in ("self", "seed") and set(kind.split(" | ")) <= _PLAIN.keys():
            found[key] = kind
    return found


def _refuse_other_types(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that a sampler does not have, or that is of another type:
    Optuna looks at neither before it proposes."""
    known = sampler_options(name)
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"the sampler '{name}' has no option '{key}'; {suggest(key, known)}")
        kind = known[key]
        allowed: Any = Union[tuple(_PLAIN[part] for part in kind.split(" | "))]  # noqa: UP007 (of parts)
        try:
            TypeAdapter(allowed).validate_python(value, strict=True)
        except ValidationError:
            shown = shorten(repr(value))
            raise ValueError(
                f"{key} of the sampler '{name}' is {shown}, and must be {kind.split(' | ')[0]}"
            ) from None


def try_sampler(
    sampler: BaseSampler, distributions: Mapping[str, BaseDistribution], startup: int
) -> None:
    """Has a sampler propose once, after as many made-up trials as it begins with: what is wrong
    with its options shows only there.

    Raises:
        ValueError: with what Optuna says.
    """
    logging.set_verbosity(logging.WARNING)  # else a line for each study
    drawn = create_study(directions=["minimize", "minimize"], sampler=RandomSampler(0))
    study = create_study(directions=["minimize", "minimize"], sampler=sampler)
    try:
        for number in range(min(startup + 1, _MOST_TRIED)):
            params = drawn.ask(dict(distributions)).params
            values = [float(number), float(-number)]
            made_up = create_trial(params=params, distributions=dict(distributions), values=values)
            study.add_trial(made_up)
        study.ask(dict(distributions))
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"search.sampler: it cannot propose with these options ({said})") from None


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
    _refuse_other_types(name, options or {})
    wanted = {**defaults, **(options or {})}
    if conditional:
        wanted = _for_conditions(name, seed, wanted) | wanted
    try:
        return cls(**wanted | {"seed": seed})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the sampler '{name}' does not take these options: {error}") from None
