"""How a trained network is made smaller: what users may say of it."""

from typing import Self

from pydantic import Field, model_validator

from slimfront.trainables.compaction.merging.merge import MergePolicy
from slimfront.trainables.options import Options


class Compaction(Options):
    """How a trained network is made smaller.

    `merge: smaller` merges an inactive layer into the next one where that adds neither weights nor
    non-zero ones: the product of sparse matrices is denser than they are, and that of a bottleneck
    larger. `always` is for the fewest layers, even where the network becomes larger; `never` does
    not merge. `tolerance` is the largest difference of an output, relative to its spread, that
    counts as equal. `approximate` also merges padded convolutions where only the border of the
    image comes out differently, after that check; it needs a refit. With a `multiple`, such as 8,
    as many units of each layer that loses any stay as make their number a multiple, where it has so
    many: for hardware that is faster then.
    """

    enabled: bool = True
    merge: MergePolicy = "smaller"
    tolerance: float = Field(1e-4, gt=0)
    approximate: bool = False
    multiple: int = Field(1, ge=1, le=1024)

    @model_validator(mode="after")
    def _a_multiple_is_kept_by_compaction(self) -> Self:
        if self.multiple > 1 and not self.enabled:
            raise ValueError(
                "compaction.multiple is kept by compaction, which is not enabled; leave one out"
            )
        return self
