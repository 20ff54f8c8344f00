"""The model card of a shipped network, in Markdown: what it is, how good, how small, how fast, and
how to load it."""

import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

import torch

from slimfront.trainables.data import Dataset
from slimfront.trainables.inputs import Several, by_place, described
from slimfront.trainables.markdown import code, text
from slimfront.trainables.shipping.formats import onnx_names
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
) -> str:
    """The card of a shipped file.

    Args:
        given: the metrics of the network that it was made of without training, which it is
            compared with then; None: it was trained, and is compared with the dense network.
        trained: what is to be said of its training, by name, in Markdown.
        compaction: the (layer, action, detail) of each step.
    """
    task = data.task
    other = "dense" if given is None else "given"
    parts = [
        f"# {text(title)}",
        f"A network for the task {code(task.options.name)} on the data set {code(data_name)}: "
        f"{described(data.train.inputs)} as they come, "
        f"{task.options.shape_of_outputs(data.validation.targets, data.head)}. "
        + " ".join(_around(data)),
        "## Quality\n\n" + _scores(shipment, given),
        "## Size\n\n" + _sizes(shipment, other),
        "## Speed\n\n" + speed(shipment, other),
        "## How it came about\n\n"
        + "\n".join(f"- {name}: {value}" for name, value in trained.items()),
        "## What compaction did\n\n" + did(compaction),
        f"## Loading\n\n```python\n{_loading(shipment, data)}\n```",
        f"Written with torch {version('torch')}, Python {platform.python_version()}, slimfront "
        f"{version('slimfront')}.",
    ]
    return "\n\n".join(parts) + "\n"


def _loading(shipment: Shipment, data: Dataset) -> str:
    """The Python that loads the file and calls it."""
    inputs = data.train.inputs
    arguments, fed = "inputs", '{"input": inputs}'
    if isinstance(inputs, Several):
        names = list(inputs.named)
        values = onnx_names(inputs)
        arguments = ", ".join(values if by_place(names) else [f"{n}={n}" for n in names])
        fed = "{" + ", ".join(f'"{name}": {name}' for name in values) + "}"
    return _LOADING[shipment.kind].format(path=shipment.path.name, given=arguments, fed=fed)


def _around(data: Dataset) -> Iterator[str]:
    """What stands before and behind the network in the file."""
    if data.normalisation() is None:
        yield "It takes inputs as they come, without normalisation."
    else:
        yield f"Normalisation ({data.normalised}) is its first step."
    if data.task.scale is not None:
        yield "Its last step turns outputs into the unit of the targets."
    if data.names:
        yield "Its outputs stand for: " + ", ".join(map(code, data.names)) + "."


def _scores(shipment: Shipment, given: Mapping[str, float] | None) -> str:
    compared = {"the trained network": shipment.trained_scores}
    if given is not None:
        compared = {"the network given": given, "the compact network": shipment.trained_scores}
    last = list(compared)[-1]
    names = [name.removeprefix("val_") for name in shipment.scores if name.startswith("val_")]
    rows = [
        "| | " + " | ".join(f"validation {n} | test {n}" for n in names) + " |",
        "| --- |" + " ---: | ---: |" * len(names),
    ]
    for name, of in {**compared, "this file": shipment.scores}.items():
        values = " | ".join(f"{of[f'val_{n}']:.4f} | {of[f'test_{n}']:.4f}" for n in names)
        rows.append(f"| {name} | {values} |")
    checked = (
        f"The file was loaded in a fresh process and run on the {shipment.checked:,} inputs of "
        "both splits: its outputs differ "
        f"from {last}'s by at most {shipment.difference:.1e} of the largest."
    )
    return "\n".join(rows) + f"\n\n{checked}"


def _sizes(shipment: Shipment, other: str) -> str:
    rows = [f"| | this network | {other} | ratio |", "| --- | ---: | ---: | ---: |"]
    for key, name in _SIZES.items():
        if key in shipment.measures and key in shipment.dense_measures:
            mine, dense = shipment.measures[key], shipment.dense_measures[key]
            rows.append(f"| {name} | {mine:,.0f} | {dense:,.0f} | {mine / dense:.1%} |")
    kept = (
        " Its weights and activations are int8 in the file; the sizes above are of the network "
        "before that."
        if shipment.int8
        else ""
    )
    return "\n".join(rows) + f"\n\nThe file has {shipment.measures['file_bytes']:,.0f} bytes.{kept}"


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
        against = (
            "these layers in half precision" if each.kernel == "2:4" else "the same network without"
        )
        for size, timing in each.timings.items():
            low, high = timing.spread
            lines.append(
                f"Sparse ({each.kernel}) kernels in its linear layers, in torch on {each.device}, "
                f"batch {size}: "
                f"{timing.speedup:.2f} times the speed of {against} ({low:.2f} to {high:.2f}). "
                f"Outputs off by {each.difference:.1e}."
            )
    for kernel in shipment.sparse_kernels:
        where = "on a GPU" if kernel == "2:4" else "on the CPU"
        lines.append(
            f"They were faster, so `load` gives this file {kernel} kernels {where}; the table is "
            "without them."
        )
    if shipment.searched is not None:
        lines.append(_searched(shipment.searched))
    return "\n\n".join(lines)


def _searched(times: SearchedTimes) -> str:
    """What a search measured, and what was measured again when it was over, side by side."""
    rows = [
        f"The search took these times {times.taken}, and those of what it recommends again at its "
        "end, in quiet.\n",
        "| | in the search | again in quiet |",
        "| --- | ---: | ---: |",
    ]
    for name, value in times.during.items():
        again = f"{times.again[name]:.4g}" if name in times.again else "-"
        rows.append(f"| {code(name)} | {value:.4g} | {again} |")
    return "\n".join(rows)


def did(compaction: Sequence[Sequence[str]]) -> str:
    """The steps of compaction, counted by kind, with the layers."""
    if not compaction:
        return "Nothing: compaction was off, or found nothing to do."
    counts = Counter(step[1] for step in compaction)
    layers = {
        action: list(dict.fromkeys(step[0] for step in compaction if step[1] == action))
        for action in counts
    }
    return "\n".join(f"- {action}: {', '.join(map(code, layers[action]))}" for action in counts)
