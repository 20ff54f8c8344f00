"""How many whole layers of a trained candidate go: what users may say of it."""

from pydantic import Field, field_validator

from slimfront.trainables.depth.base import CRITERIA
from slimfront.trainables.options import Options, suggest


class Depth(Options):
    """Takes whole layers out of a candidate when its training is over, before its refit.

    `layers` of them go, one by one, each time the one that the `criterion` finds worth least on
    training examples: residual branches, layers between activations that keep the shape, and the
    activations of layers that become one then. 0: none. `exclude` names layers that stay.
    """

    layers: int = Field(0, ge=0)
    criterion: str = "cka"
    exclude: tuple[str, ...] = ()

    @field_validator("criterion")
    @classmethod
    def _known(cls, criterion: str) -> str:
        if criterion not in CRITERIA:
            hint = suggest(criterion, CRITERIA)
            raise ValueError(f"there is no criterion '{criterion}'; {hint}")
        return criterion
