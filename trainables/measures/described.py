"""What is known of each number that a network has: one description, which objectives, constraints,
tables, pictures and MLflow read."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from slimfront.trainables.tasks import Described
from slimfront.trainables.tasks.metrics import Better

Scale = Literal["share", "log", "ratio", "inverse", "relative"]


@dataclass(frozen=True)
class Measure:
    """A number of a network: a metric of its quality on a split, or a measure of the network."""

    name: str
    better: Better = "smaller"
    label: str = ""
    """What axes of pictures call it, with its unit."""
    scale: Scale = "log"
    """How it counts in a hypervolume: see `Objective.loss`."""
    asked: bool = False
    """Whether it is taken only where a config asks for it."""
    short: str = ""
    """What heads of tables call it."""
    logarithmic: bool = True
    """Whether axes of pictures are."""
    quality: bool = False
    """Whether it is a metric of a task."""

    @property
    def head(self) -> str:
        """What tables call it."""
        return self.short or self.name

    @property
    def axis(self) -> str:
        """What axes call it."""
        return self.label or self.name.replace("_", " ")


KNOWN: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("params", label="parameters", short="params"),
        Measure("nonzero_params", label="non-zero parameters", short="non-zero"),
        Measure("layers", label="weight layers", logarithmic=False),
        Measure("flops", label="FLOPs per input", short="FLOPs"),
        Measure("bytes", label="bytes"),
        Measure("bytes_sparse", label="bytes, sparse-encoded"),
        Measure("peak_activation_bytes", label="bytes of activations at most"),
        Measure("bytes_compressed", label="bytes, sparse-encoded and compressed", asked=True),
        Measure("latency_ms", label="latency, ms per batch", scale="ratio", asked=True),
        Measure(
            "speedup",
            "larger",
            label="times faster than the dense network",
            scale="inverse",
            asked=True,
            logarithmic=False,
        ),
    )
}
"""The measures that every network has, or can be asked for, by name."""


def of_metrics(metrics: Iterable[Described], split: str = "val") -> dict[str, Measure]:
    """The metrics of a task on a split, by name, such as `val_f1`."""
    words = {"val": "validation", "test": "test"}
    return {
        f"{split}_{metric.name}": Measure(
            f"{split}_{metric.name}",
            metric.better,
            label=f"{words[split]} {metric.name.replace('_', ' ')}",
            scale="share" if metric.bounded else "relative",
            short=f"{split} {metric.head}",
            logarithmic=False,
            quality=True,
        )
        for metric in metrics
    }
