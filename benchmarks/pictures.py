"""Pictures for the docs, drawn from networks that were really trained."""

from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

KINDS = {"3×3": "#0072b2", "1×1": "#e69f00", "depthwise 3×3": "#009e73", "linear": "#999999"}
"""Kinds of layers, in colours that colour-blind people tell apart."""


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


def depth_before_and_after(
    networks: Mapping[str, tuple[nn.Module, nn.Module]], inputs: Tensor, path: Path
) -> None:
    """The weight layers of networks in order of execution, whole ones and what is left of them, a
    bar each: as high as its share of the whole network's FLOPs, in the colour of its kind."""
    figure = Figure(figsize=(9, 2.2 * len(networks)), layout="constrained")
    lines = figure.subplots(len(networks), 2, squeeze=False, sharey="row")
    for line, (name, pair) in zip(lines, networks.items(), strict=True):
        of_pair = [_layers(network, inputs) for network in pair]
        whole = sum(work for _, work in of_pair[0])
        for axis, state, layers in zip(line, ("whole", "compact"), of_pair, strict=True):
            heights = [100 * work / whole for _, work in layers]
            colours = [KINDS[kind] for kind, _ in layers]
            axis.bar(range(1, len(layers) + 1), heights, color=colours)
            axis.set_xlim(0, len(of_pair[0]) + 1)
            left = sum(heights)
            title = f"{name}, {state}: {len(layers)} layers, {left:.0f} % of the FLOPs"
            axis.set_title(title, fontsize=10)
            axis.set_ylabel("% of the FLOPs")
    patches = [Patch(color=colour, label=kind) for kind, colour in KINDS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    figure.savefig(path, dpi=110)


@torch.no_grad()
def _layers(network: nn.Module, inputs: Tensor) -> Sequence[tuple[str, float]]:
    """The kind of each weight layer, and its multiplications for one input."""
    found: list[tuple[str, float]] = []

    def note(layer: nn.Module, _inputs: object, outputs: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        positions = outputs[0].numel() / layer.weight.shape[0]
        found.append((_kind(layer), positions * layer.weight.numel()))

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    network.eval()(inputs[:1])
    for handle in handles:
        handle.remove()
    return found


def _kind(layer: nn.Conv2d | nn.Linear) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    if layer.kernel_size == (1, 1):
        return "1×1"
    if layer.groups > 1:
        return "depthwise 3×3"
    return "3×3"
