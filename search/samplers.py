"""Optuna's samplers by the name in a config."""

import warnings
from collections.abc import Callable

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler

# Optuna calls these two experimental at every use; one line in the docs says it better.
warnings.filterwarnings("ignore", category=ExperimentalWarning, message=".*(NSGAIIISampler|QMCSampler)")

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed, multivariate=True, constant_liar=True),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
    "nsga3": lambda seed: NSGAIIISampler(seed=seed),
    "gp": lambda seed: GPSampler(seed=seed),
    "qmc": lambda seed: QMCSampler(seed=seed, scramble=True),
    "random": lambda seed: RandomSampler(seed=seed),
}
"""Optuna samplers that take several objectives, by the name in a config, made from a seed."""
