"""Charts about a search beside its front: how it went, what drove it, and which layers its networks
kept."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import optuna
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from torch import nn

from slimfront.search.config.schema import Config
from slimfront.search.config.space_checks import is_in
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.trials import MeasuredNetwork, TrialRecord
from slimfront.trainables.errors import UserError
from slimfront.trainables.shipping.network_file import read

_FEWEST = 6
"""Importances are not estimated on fewer trials."""
_DEPTH = 8
"""Of the trees of importances: fully grown ones, of as many leaves as trials, take time with the
square of the trials."""
_ROWS = 30


def history_png(history: Sequence[tuple[float, int, float]], title: str) -> Figure:
    """Hypervolume over time and over epochs; `history` has (minutes since the beginning, epochs
    trained, hypervolume)."""
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    minutes = [point[0] for point in history]
    epochs = [float(point[1]) for point in history]
    volumes = [point[2] for point in history]
    charts = {"minutes": minutes, "epochs of training, all trials": epochs}
    for column, (name, places) in enumerate(charts.items(), start=1):
        axes = figure.add_subplot(1, 2, column)
        axes.step(places, volumes, where="post")
        axes.set(xlabel=name, ylabel="hypervolume")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    return figure


def importances(
    ledger: Ledger, distributions: dict[str, BaseDistribution]
) -> dict[str, dict[str, float]]:
    """By objective, the share of its variance over the trials that each varied value explains
    (Optuna's fANOVA).

    Empty where there are too few trials, or an objective did not vary.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=[objective.direction.value for objective in ledger.objectives]
    )
    names = [objective.name for objective in ledger.objectives]
    for trial in ledger.trials:
        told = _as_optunas(trial, names, distributions)
        if told is not None:
            study.add_trial(told)
    if len(study.trials) < _FEWEST:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(
        n_trees=32,
        max_depth=_DEPTH,
        seed=0,
    )
    found = {}
    for index, name in enumerate(names):
        target = partial(_value, index)
        distinct = {target(trial) for trial in study.trials}
        if len(distinct) < 2:
            continue
        found[name] = optuna.importance.get_param_importances(
            study,
            evaluator=evaluator,
            target=target,
        )
    return found


def _as_optunas(
    trial: TrialRecord, objectives: Sequence[str], distributions: dict[str, BaseDistribution]
) -> optuna.trial.FrozenTrial | None:
    """A trial as Optuna knows it; None if it has no values that tell anything."""
    if trial.status not in ("completed", "stopped"):
        return None
    values = [trial.measures.get(name, math.nan) for name in objectives]
    if not all(map(math.isfinite, values)):
        return None
    known = _of(trial.values, distributions)
    if known is None:
        return None
    params = {path: trial.values[path] for path in known}
    return optuna.create_trial(params=params, distributions=known, values=values)


def _of(
    values: dict[str, Any], distributions: dict[str, BaseDistribution]
) -> dict[str, BaseDistribution] | None:
    """The distributions of the values of a trial, some of which may not vary beside the others;
    None if one lies outside, as values to start from can."""
    known = {}
    for path, value in values.items():
        if path not in distributions:
            continue
        distribution = distributions[path]
        if not is_in(distribution, value):
            return None
        known[path] = distribution
    return known


def _value(index: int, trial: optuna.trial.FrozenTrial) -> float:
    return float(trial.values[index])


def importance_png(shares: dict[str, dict[str, float]], title: str) -> Figure:
    """Bars of `importances`, a group for each varied value."""
    paths: dict[str, None] = {}
    for of_one in shares.values():
        paths |= dict.fromkeys(of_one)
    bars = len(paths) * (1 + len(shares))
    figure = Figure(figsize=(7.2, 1.2 + 0.3 * bars), layout="constrained")
    axes = figure.add_subplot()
    groups = np.arange(len(paths))
    height = 0.8 / max(len(shares), 1)
    for index, (objective, of_one) in enumerate(shares.items()):
        places = groups + index * height
        lengths = [of_one.get(path, 0.0) for path in paths]
        axes.barh(places, lengths, height=height, label=objective)
    middle = 0.4 - height / 2
    axes.set_yticks(groups + middle, list(paths))
    axes.invert_yaxis()
    axes.set(xlabel="share of the objective's variance", title=title)
    axes.legend()
    return figure


def layers_png(
    networks: Sequence[tuple[MeasuredNetwork, nn.Module]],
    dense: nn.Module,
    title: str,
    quality: str,
) -> Figure:
    """Rows are networks, columns the dense network's weight layers; a cell shows the share of its
    weights that is left.

    A layer that was merged into the next one, or removed, is blank: its weights live on, if at all,
    in the next cell that is not. `quality` is the metric that stands beside a network's name.
    """
    columns = _weights(dense)
    shown = networks[:_ROWS]
    rows = [network for _, network in shown]
    cells = _shares(columns, rows)
    width = 2.4 + 0.6 * max(len(columns), 6)
    height = 1.6 + 0.28 * len(shown)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    shades = colormaps["viridis"].with_extremes(bad="0.93")
    magnitudes = np.log10(np.maximum(cells, 1e-4))
    image = axes.imshow(magnitudes, aspect="auto", cmap=shades, vmin=-4, vmax=0)
    are_told = len(columns) <= 12
    for (row, column), share in np.ndenumerate(cells):
        if are_told and np.isfinite(share):
            axes.text(
                column,
                row,
                f"{share:.1%}",
                ha="center",
                va="center",
                fontsize=6,
                color="w",
            )
    names = [f"{point.name}  {point.measures[quality]:.3f}" for point, _ in shown]
    axes.set_xticks(range(len(columns)), list(columns), rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.set_title(
        f"{title}: weights left in each layer; blank: merged into the next, or removed", fontsize=8
    )
    bar = figure.colorbar(image, ax=axes, ticks=[-4, -3, -2, -1, 0])
    bar.ax.set_yticklabels(["≤ 0.01%", "0.1%", "1%", "10%", "100%"], fontsize=7)
    return figure


def _shares(dense: dict[str, int], networks: Sequence[nn.Module]) -> NDArray[np.float64]:
    """The share of the dense network's weights that each layer has left, (networks, layers); NaN
    for a layer that is not there."""
    cells = np.full((len(networks), len(dense)), np.nan)
    for row, network in enumerate(networks):
        left = _weights(network)
        for column, (name, weights) in enumerate(dense.items()):
            if name not in left:
                continue
            share = left[name] / max(weights, 1)
            cells[row, column] = share
    return cells


def load(point: MeasuredNetwork, config: Config) -> nn.Module | None:
    """The network of a point as it is stored; None if its file cannot be read."""
    try:
        model = config.model_of(point.trial.values)
        return read(point.file, model)
    except (UserError, KeyError, ValueError):
        # The latter two of values that are no candidate's any more.
        return None


def _weights(network: nn.Module) -> dict[str, int]:
    """Non-zero weights of each linear and convolutional layer, by its name, in order."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    counts = {}
    for name, module in network.named_modules():
        if isinstance(module, kinds):
            counts[name] = int(module.weight.count_nonzero())
    return counts
