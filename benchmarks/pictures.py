"""Pictures for the docs, drawn from networks that were really trained."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure
from torch import nn


def before_and_after(before: nn.Module, after: nn.Module, path: Path) -> None:
    """The weight matrices of two MLPs, one row each: red below zero, blue above, white at zero;
    inactive layers named."""
    rows = [
        [m.weight.detach() for m in network.modules() if isinstance(m, nn.Linear)]
        for network in (before, after)
    ]
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.3 * columns, 3.6), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for row, name, line in zip(rows, ("trained", "compact"), axes, strict=True):
        for index, axis in enumerate(line):
            axis.set_axis_off()
            if index >= len(row):
                continue
            weight = row[index].T  # inputs downwards, outputs to the right
            limit = float(weight.abs().max()) or 1.0
            axis.imshow(
                weight, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
            )
            inner = 0 < index < len(row) - 1
            state = (
                ("inactive" if bool((weight >= 0).all()) else "active")
                if inner
                else f"{weight.shape[0]} → {weight.shape[1]}"
            )
            axis.set_title(f"{name} {index + 1}\n{state}", fontsize=7)
    figure.savefig(path, dpi=130)
