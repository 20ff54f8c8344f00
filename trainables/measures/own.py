"""Measures of the user's, by import path."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, JsonValue

from slimfront.trainables.errors import OF_USERS_CODE, TrialFailure, first_line
from slimfront.trainables.importing import import_by_path
from slimfront.trainables.measures.described import KNOWN, Measure
from slimfront.trainables.options import Options, suggest
from slimfront.trainables.tasks.metrics import Better

TAKEN = frozenset(
    (
        # What an epoch of a trial has beside its metrics, in MLflow too.
        *("epoch", "train_loss", "penalty_loss", "sparsity", "active_layers", "lr"),
        # What a report of a trial has (`messages.Report`), and what Ray Tune adds to it.
        *("history", "compaction", "pruned", "finished", "done", "measured", "failure"),
        *("training_iteration", "trial_id", "experiment_tag", "experiment_id", "date", "timestamp"),
        *("time_this_iter_s", "time_total_s", "time_since_restore", "iterations_since_restore"),
        *("timesteps_total", "timesteps_since_restore", "episodes_total", "timesteps_this_iter"),
        *("pid", "hostname", "node_ip", "config", "should_checkpoint", "checkpoint_dir_name"),
        # What a member of a front has, and a trial in MLflow.
        *(
            "trial",
            "one_shot",
            "step",
            "knee",
            "recommended",
            "in_region",
            "replicas",
            "timed_again",
            "one_shot_share",
            "recovery_epochs",
            "run_id",
            "total_params",
            "layers_merged",
            "int8",
        ),
    )
)
"""Names that mean something else where measures are written down."""


class OwnMeasure(Options):
    """What the callable at the import path `factory` gives for a compact network: one number.

    It is called as `function(network, inputs, **args)`, with the network in evaluation mode and
    some validation inputs as the network sees them; with `on: onnx` as `function(path, **args)`,
    with the path of the network's ONNX file. `scale` says how it counts in a hypervolume: `ratio`
    and `log` are for numbers that are never negative.
    """

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")
    factory: str
    args: dict[str, JsonValue] = Field(default_factory=dict)
    better: Better = "smaller"
    on: Literal["network", "onnx"] = "network"
    label: str = ""
    scale: Literal["relative", "ratio", "log"] = "relative"

    def described(self) -> Measure:
        """What is known of it."""
        return Measure(
            self.name,
            self.better,
            label=self.label,
            scale=self.scale,
            asked=True,
            logarithmic=self.scale == "log",
        )

    def function(self) -> Callable[..., Any]:
        """What it calls.

        Raises:
            UserError: if there is no such function.
        """
        return import_by_path(self.factory, f"measure '{self.name}'")

    def take(self, *seen: Any) -> float:
        """The number; `seen` are a network and inputs, or the path of an ONNX file.

        Raises:
            TrialFailure: if the function raises, or gives anything but a finite number, or one that
                its scale has no place for.
        """
        function = self.function()
        try:
            found = float(function(*seen, **copy.deepcopy(self.args)))
        except OF_USERS_CODE as error:
            raise TrialFailure(
                f"the measure '{self.name}' ({self.factory}) raised {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
        if not math.isfinite(found):
            raise TrialFailure(
                f"the measure '{self.name}' ({self.factory}) gave {found}; it must be a finite "
                "number"
            )
        if not self.has_place_for(found):
            least = "above 0" if self.better == "larger" else "0 or more"
            raise TrialFailure(
                f"the measure '{self.name}' ({self.factory}) gave {found:g}, and 'scale: "
                f"{self.scale}' is for numbers that are {least}; give it 'scale: relative'"
            )
        return found

    def has_place_for(self, value: float) -> bool:
        """Whether the scale, on which sizes and times are compared by how many times larger they
        are, has a place for a value."""
        return self.scale == "relative" or value > 0 or (value == 0 and self.better == "smaller")


def parse_measures(given: Any) -> Any:
    """`[latency_ms]`, or `{latency_ms: , energy_mj: {factory: …}}`, to names and measures of the
    user's."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given, Mapping):
        given = [_named(name, options) for name, options in given.items()]
    if not isinstance(given, list | tuple):
        return given
    found = []
    for one in given:
        if isinstance(one, Mapping):
            one = OwnMeasure.model_validate(one)
        found.append(one)
    return tuple(found)


def _named(name: object, options: Any) -> Any:
    """A measure that is the key of a mapping: its name alone, or options with the name."""
    if options is None:
        return name
    return {"name": name, **_mapping(name, options)}


def _mapping(name: object, options: Any) -> Mapping[str, Any]:
    if isinstance(options, str):
        return {"factory": options}
    if not isinstance(options, Mapping):
        raise ValueError(f"the measure '{name}' is {options!r}; it needs a 'factory'")
    return options


def check_measures(measures: tuple[str | OwnMeasure, ...]) -> None:
    """Raises ValueError for a measure that is not known, or that has the name of another."""
    extra = [name for name, known in KNOWN.items() if known.asked]
    names = []
    for one in measures:
        if isinstance(one, OwnMeasure):
            names.append(one.name)
            if one.name in KNOWN or one.name in TAKEN or one.name.startswith(("val_", "test_")):
                raise ValueError(
                    f"the measure '{one.name}' has a name that is taken; choose another"
                )
        else:
            names.append(one)
            if one not in extra:
                raise ValueError(
                    f"unknown extra measure '{one}'; {suggest(one, extra)}; one of your own has a "
                    "'factory'"
                )
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the measure '{name}' is named twice")
