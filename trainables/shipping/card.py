"""The model card of a shipped network, in Markdown: what it is, how good, how small, how fast, and
how to load it."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

import torch

from slimfront.trainables.data import Dataset
from slimfront.trainables.inputs import Several, by_place, described
from slimfront.trainables.markdown import code, text
from slimfront.trainables.shipping.formats import onnx_names
from slimfront.trainables.shipping.kernels import Tried
from slimfront.trainables.shipping.shipment import SearchedTimes, Shipment

_SIZES = {
    "params": "parameters",
    "nonzero_params": "non-zero parameters",
    "layers": "weight layers",
    "flops": "FLOPs per input",
    "bytes": "bytes of the weights",
    "bytes_sparse": "bytes, sparse-encoded",
    "bytes_compressed": "bytes, sparse-encoded and compressed",
    "peak_activation_bytes": "bytes of activations at most, one input",
}
_LOADING = {
    "pt2": (
        "import torch\n\nnetwork = torch.export.load({path!r}).module()\noutputs = network({given})"
    ),
    "onnx": (
        "import onnxruntime\n\nsession = onnxruntime.InferenceSession({path!r})\n"
        "outputs = session.run(None, {fed})[0]  # inputs: NumPy arrays"
    ),
    "safetensors": (
        "from pathlib import Path\n\nfrom slimfront.trainables.shipping import load\n\n"
        "network = load(Path({path!r}))\noutputs = network({given})"
    ),
}


def card(
    shipment: Shipment,
    title: str,
    data: Dataset,
    data_name: str,
    trained: Mapping[str, object],
    compaction: Sequence[Sequence[str]],
    given: Mapping[str, float] | None = None,
    beside: Mapping[str, Mapping[str, float]] | None = None,
    note: str = "",
) -> str:
    """The card of a shipped file.

    Args:
        beside: metrics of other networks, by what they are called: those that the file's are to be
            read beside.
        note: a sentence on its quality.
        given: the metrics of the network that it was made of without training, which it is
            compared with then; None: it was trained, and is compared with the dense network.
        trained: what is to be said of its training, by name, in Markdown.
        compaction: the (layer, action, detail) of each step.
    """
    task = data.task.options
    inputs = described(data.train.inputs)
    outputs = task.shape_of_outputs(data.validation.targets, data.head)
    around = " ".join(_around(data))
    other = "dense" if given is None else "given"
    history = [f"- {name}: {value}" for name, value in trained.items()]
    loading = _loading(shipment, data)
    python = platform.python_version()
    parts = [
        f"# {text(title)}",
        f"A network for the task {code(task.name)} on the data set {code(data_name)}: {inputs} as "
        f"they come, {outputs}. {around}",
        "## Quality\n\n" + _scores(shipment, given, beside or {}) + note,
        "## Size\n\n" + _sizes(shipment, other),
        "## Speed\n\n" + speed(shipment, other),
        "## How it came about\n\n" + "\n".join(history),
        "## What compaction did\n\n" + did(compaction),
        f"## Loading\n\n```python\n{loading}\n```",
        f"Written with torch {version('torch')}, Python {python}, slimfront "
        f"{version('slimfront')}.",
    ]
    return "\n\n".join(parts) + "\n"


def _loading(shipment: Shipment, data: Dataset) -> str:
    """The Python that loads the file and calls it."""
    inputs = data.train.inputs
    given = ["inputs"]
    fed = ['"input": inputs']
    if isinstance(inputs, Several):
        names = list(inputs.named)
        given = onnx_names(inputs)
        fed = [f'"{name}": {name}' for name in given]
        if not by_place(names):
            given = [f"{name}={name}" for name in names]
    how = _LOADING[shipment.kind]
    arguments = ", ".join(given)
    arrays = ", ".join(fed)
    return how.format(path=shipment.path.name, given=arguments, fed=f"{{{arrays}}}")


def _around(data: Dataset) -> Iterator[str]:
    """What stands before and behind the network in the file."""
    if data.normalisation() is None:
        yield "It takes inputs as they come, without normalisation."
    else:
        yield f"Normalisation ({data.normalised}) is its first step."
    if data.task.scale is not None:
        yield "Its last step turns outputs into the unit of the targets."
    if data.names:
        names = ", ".join(map(code, data.names))
        yield f"Its outputs stand for: {names}."


def _scores(
    shipment: Shipment,
    given: Mapping[str, float] | None,
    beside: Mapping[str, Mapping[str, float]],
) -> str:
    compared = dict(beside)
    written = "the trained network"
    if given is not None:
        compared["the network given"] = given
        written = "the compact network"
    compared[written] = shipment.trained_scores
    compared["this file"] = shipment.scores
    names = []
    for key in shipment.scores:
        if key.startswith("val_"):
            names.append(key.removeprefix("val_"))
    heads = " | ".join(f"validation {name} | test {name}" for name in names)
    rows = [f"| | {heads} |", "| --- |" + " ---: | ---: |" * len(names)]
    for network, scores in compared.items():
        cells = []
        for name in names:
            for key in (f"val_{name}", f"test_{name}"):
                value = scores.get(key)
                cells.append("-" if value is None else f"{value:.4f}")
        values = " | ".join(cells)
        rows.append(f"| {network} | {values} |")
    table = "\n".join(rows)
    return (
        f"{table}\n\nThe file was loaded in a fresh process and run on the {shipment.checked:,} "
        f"inputs of both splits: its outputs differ from {written}'s by at most "
        f"{shipment.difference:.1e} of the largest."
    )


def _sizes(shipment: Shipment, other: str) -> str:
    rows = [f"| | this network | {other} | ratio |", "| --- | ---: | ---: | ---: |"]
    for key, name in _SIZES.items():
        mine = shipment.measures.get(key)
        dense = shipment.dense_measures.get(key)
        if mine is None or dense is None:
            continue
        ratio = mine / dense
        rows.append(f"| {name} | {mine:,.0f} | {dense:,.0f} | {ratio:.1%} |")
    table = "\n".join(rows)
    file_bytes = shipment.measures["file_bytes"]
    said = f"{table}\n\nThe file has {file_bytes:,.0f} bytes."
    if shipment.int8:
        said += (
            " Its weights and activations are int8 in the file; the sizes above are of the network "
            "before that."
        )
    return said


def speed(shipment: Shipment, other: str = "dense") -> str:
    """Times and speed-ups that were measured, with their quartiles."""
    runtime = "ONNX Runtime" if shipment.kind == "onnx" else f"torch {torch.__version__}, eager"
    rows = [
        f"| batch | this network, ms | {other}, ms | speed-up | quartiles |",
        "| ---: | ---: | ---: | ---: | --- |",
    ]
    for size, (dense, mine) in shipment.timings.items():
        low, high = mine.spread
        rows.append(
            f"| {size} | {mine.latency_ms:.3f} | {dense.latency_ms:.3f} | {mine.speedup:.2f} | "
            f"{low:.2f} to {high:.2f} |"
        )
    lines = [
        f"Medians of interleaved runs on one thread of this CPU ({platform.machine()}), in "
        f"{runtime}.",
        "\n".join(rows),
    ]
    for each in shipment.tried:
        lines += _of_kernel(each)
    for kernel in shipment.sparse_kernels:
        where = "on a GPU" if kernel == "2:4" else "on the CPU"
        lines.append(
            f"They were faster, so `load` gives this file {kernel} kernels {where}; the table is "
            "without them."
        )
    if shipment.searched is not None:
        lines.append(_searched(shipment.searched))
    return "\n\n".join(lines)


def _of_kernel(tried: Tried) -> Iterator[str]:
    """What a sparse kernel did, a sentence or two for each size of batch."""
    against = "the same network without"
    if tried.kernel == "2:4":
        against = "these layers in half precision"
    for size, timing in tried.timings.items():
        low, high = timing.spread
        yield (
            f"Sparse ({tried.kernel}) kernels in its linear layers, in torch on {tried.device}, "
            f"batch {size}: {timing.speedup:.2f} times the speed of {against} ({low:.2f} to "
            f"{high:.2f}). Outputs off by {tried.difference:.1e}."
        )


def _searched(times: SearchedTimes) -> str:
    """What a search measured, and what was measured again when it was over, side by side."""
    rows = [
        f"The search took these times {times.taken}, and those of what it recommends again at its "
        "end, in quiet.\n",
        "| | in the search | again in quiet |",
        "| --- | ---: | ---: |",
    ]
    for name, value in times.during.items():
        again = "-"
        if name in times.again:
            again = f"{times.again[name]:.4g}"
        rows.append(f"| {code(name)} | {value:.4g} | {again} |")
    return "\n".join(rows)


def did(compaction: Sequence[Sequence[str]]) -> str:
    """The steps of compaction by kind, with their layers."""
    if not compaction:
        return "Nothing: compaction was off, or found nothing to do."
    layers_of: dict[str, list[str]] = {}
    for layer, action, *_ in compaction:
        layers = layers_of.setdefault(action, [])
        if layer not in layers:
            layers.append(layer)
    lines = []
    for action, layers in layers_of.items():
        names = ", ".join(map(code, layers))
        lines.append(f"- {action}: {names}")
    return "\n".join(lines)
