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


Distributions = dict[str, BaseDistribution]
"""By path, of what varies."""
Shares = dict[str, dict[str, float]]
"""By objective, and then by path."""
History = Sequence[tuple[float, int, float]]
"""At each end of a trial: minutes since the beginning, epochs trained, hypervolume."""


def history_png(history: History, title: str) -> Figure:
    """Hypervolume over time and over epochs."""
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    minutes = []
    epochs = []
    volumes = []
    for minute, epoch, volume in history:
        minutes.append(minute)
        epochs.append(float(epoch))
        volumes.append(volume)
    charts = {"minutes": minutes, "epochs of training, all trials": epochs}
    for column, (name, places) in enumerate(charts.items(), start=1):
        axes = figure.add_subplot(1, 2, column)
        axes.step(places, volumes, where="post")
        axes.set(xlabel=name, ylabel="hypervolume")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    return figure


def importances(ledger: Ledger, distributions: Distributions) -> Shares:
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
    trial: TrialRecord, objectives: Sequence[str], distributions: Distributions
) -> optuna.trial.FrozenTrial | None:
    """A trial as Optuna knows it; None if it has no values that tell anything."""
    if trial.status not in ("completed", "stopped"):
        return None
    values = [trial.measures.get(name, math.nan) for name in objectives]
    finite = all(map(math.isfinite, values))
    if not finite:
        return None
    known = _of(trial.values, distributions)
    if known is None:
        return None
    params = {path: trial.values[path] for path in known}
    return optuna.create_trial(params=params, distributions=known, values=values)


def _of(values: dict[str, Any], distributions: Distributions) -> Distributions | None:
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


def importance_png(shares: Shares, title: str) -> Figure:
    """Bars of `importances`, a group for each varied value."""
    distinct: dict[str, None] = {}
    for of_one in shares.values():
        distinct |= dict.fromkeys(of_one)
    paths = list(distinct)
    count = len(paths)
    objectives = len(shares)
    bars = count * (1 + objectives)
    tall = 1.2 + 0.3 * bars
    figure = Figure(figsize=(7.2, tall), layout="constrained")
    axes = figure.add_subplot()
    groups = np.arange(count)
    height = 0.8 / max(objectives, 1)
    for index, objective in enumerate(shares):
        of_one = shares[objective]
        below_first = index * height
        places = groups + below_first
        lengths = [of_one.get(path, 0.0) for path in paths]
        axes.barh(places, lengths, height=height, label=objective)
    half = height / 2
    middle = 0.4 - half
    axes.set_yticks(groups + middle, paths)
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
    row_count, column_count = cells.shape
    width = 2.4 + 0.6 * max(column_count, 6)
    height = 1.6 + 0.28 * row_count
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    shades = colormaps["viridis"].with_extremes(bad="0.93")
    magnitudes = np.log10(np.maximum(cells, 1e-4))
    image = axes.imshow(magnitudes, aspect="auto", cmap=shades, vmin=-4, vmax=0)
    are_told = column_count <= 12
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
    layers = list(columns)
    axes.set_xticks(range(column_count), layers, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(row_count), names, fontsize=7)
    axes.set_title(
        f"{title}: weights left in each layer; blank: merged into the next, or removed", fontsize=8
    )
    bar = figure.colorbar(image, ax=axes, ticks=[-4, -3, -2, -1, 0])
    bar.ax.set_yticklabels(["≤ 0.01%", "0.1%", "1%", "10%", "100%"], fontsize=7)
    return figure


def _shares(dense: dict[str, int], networks: Sequence[nn.Module]) -> NDArray[np.float64]:
    """The share of the dense network's weights that each layer has left, (networks, layers); NaN
    for a layer that is not there."""
    shape = (len(networks), len(dense))
    cells = np.full(shape, np.nan)
    for row, network in enumerate(networks):
        left = _weights(network)
        for column, name in enumerate(dense):
            if name not in left:
                continue
            weights = max(dense[name], 1)
            share = left[name] / weights
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
            count = module.weight.count_nonzero()
            counts[name] = int(count)
    return counts
