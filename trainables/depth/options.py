"""How many whole layers of a trained candidate go: what users may say of it."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from slimfront.trainables.depth.base import CRITERIA
from slimfront.trainables.depth.target import Target
from slimfront.trainables.options import Options, suggest


class Depth(Options):
    """Takes whole layers out of a candidate.

    `layers` of them go, one by one, each time the one that the `criterion` finds worth least on
    training examples: residual branches, layers between activations that keep the shape, and the
    activations of layers that become one then. 0: none; or as many as a `target` takes, such as
    `{speedup: 1.6}`. `exclude` names layers that stay.
    `when: training` chooses them after a third of the epochs, and closes them little by little
    until half of them are over (see `closing`); `trained` takes them out when training is over,
    before the refit.
    """

    layers: int = Field(0, ge=0)
    target: Target | None = None
    when: Literal["training", "trained"] = "training"
    criterion: str = "cka"
    exclude: tuple[str, ...] = ()

    @property
    def on(self) -> bool:
        """Whether layers go at all."""
        return self.layers > 0 or self.target is not None

    @property
    def closes(self) -> bool:
        """Whether layers go while training."""
        return self.on and self.when == "training"

    @property
    def cuts(self) -> bool:
        """Whether layers go when training is over."""
        return self.on and self.when == "trained"

    @property
    def words(self) -> str:
        """What is asked for, as in a config."""
        if self.target is not None:
            return f"depth.target: {self.target}"
        return f"depth.layers: {self.layers}"

    def when_trained(self) -> "Depth":
        """The same layers, taken out when training is over."""
        return self.model_copy(update={"when": "trained"})

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.layers > 0 and self.target is not None:
            raise ValueError("layers and target both say how many layers go; leave one of them out")
        return self

    @field_validator("criterion")
    @classmethod
    def _known(cls, criterion: str) -> str:
        if criterion not in CRITERIA:
            hint = suggest(criterion, CRITERIA)
            raise ValueError(f"there is no criterion '{criterion}'; {hint}")
        return criterion
