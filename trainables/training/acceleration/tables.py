"""What the steps of an epoch read, on the GPU before the first of them begins: so a step that is
replayed needs nothing from this process."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimfront.trainables.data import Dataset
from slimfront.trainables.data.transforms import Draws
from slimfront.trainables.gpu import to_device

Numbers = Sequence[float]
_PLACE = torch.int64


class Tables:
    """The order of an epoch's examples, what augmentation draws, learning rates and proximal step
    sizes, with counters that say where in them the coming step is."""

    def __init__(self, data: Dataset, size: int, steps: int, device: torch.device) -> None:
        """`size` is that of a full batch, `steps` are those of an epoch."""
        targets = data.train.targets
        augment = data.augment
        count = len(targets)
        with device:
            self.order = torch.zeros(count, dtype=_PLACE)
            self.mirrored = None
            if augment.flip:
                self.mirrored = torch.zeros(count, 1, dtype=torch.bool)
            self.corner = None
            if augment.crop:
                self.corner = torch.zeros(2, count, 1, dtype=_PLACE)
            # What fused optimisers take.
            self.rates = torch.zeros(steps, dtype=torch.float32)
            self.step_sizes = torch.zeros_like(self.rates)
            self.first = torch.zeros((), dtype=_PLACE)
            """The place in `order` where the coming batch begins."""
            self.number = torch.zeros(1, dtype=_PLACE)
            """Which step of the epoch comes."""
            self.of_batch = torch.arange(size)
            self.totals = torch.zeros(2, dtype=torch.float64)
            """The sums of task losses, each times the size of its batch, and of penalty losses."""

    def begin(self, order: Tensor, rates: Numbers, step_sizes: Numbers) -> None:
        """Takes what is known of the coming epoch, and begins to count."""
        _fill(self.order, order)
        new_rates = torch.tensor(rates)
        new_step_sizes = torch.tensor(step_sizes)
        _fill(self.rates, new_rates)
        _fill(self.step_sizes, new_step_sizes)
        for counter in (self.first, self.number, self.totals):
            counter.zero_()

    def take_draws(self, first: int, last: int, draws: Sequence[Draws]) -> None:
        """Takes what was drawn, batch by batch, for the examples at places `first` to `last`."""
        mirrored: list[Any] = []
        corner: list[Any] = []
        for drawn in draws:
            mirrored.append(drawn.mirrored)
            corner.append(drawn.corner)
        if self.mirrored is not None:
            table = self.mirrored[first:last]
            drawn_mirrored = torch.cat(mirrored)
            _fill(table, drawn_mirrored)
        if self.corner is not None:
            table = self.corner[:, first:last]
            drawn_corners = torch.cat(corner, 1)
            _fill(table, drawn_corners)

    def places(self, size: int) -> Tensor:
        """Where in `order` the examples of the coming batch are, (size,)."""
        within = self.of_batch[:size]
        return self.first + within

    def drawn(self, places: Tensor) -> Draws:
        """What was drawn for the examples at these places."""
        mirrored = None
        if self.mirrored is not None:
            mirrored = self.mirrored.index_select(0, places)
        corner = None
        if self.corner is not None:
            corner = self.corner.index_select(1, places)
        return Draws(mirrored, corner)

    def now(self, table: Tensor) -> Tensor:
        """The number of a table that is of the coming step, a scalar."""
        row = table.index_select(0, self.number)
        return row.squeeze(0)

    @torch.no_grad()
    def count(self, size: int, task_loss: Tensor, penalty_loss: Tensor) -> None:
        """Counts a step on so many examples, with its losses (float64 scalars)."""
        of_batch = task_loss * size
        self.totals += torch.stack([of_batch, penalty_loss])
        self.first += size
        self.number += 1

    def means(self) -> Tensor:
        """The mean task loss of the epoch's examples, and the mean penalty loss of its steps: (2,),
        float64."""
        examples = len(self.order)
        steps = len(self.rates)
        counts = torch.tensor([examples, steps], dtype=torch.float64)
        counts = to_device(counts, self.totals.device)
        return self.totals / counts


def _fill(table: Tensor, values: Tensor) -> None:
    """Copies `values` into a table on the GPU without waiting for it."""
    pinned = values
    if table.is_cuda and not values.is_cuda:
        pinned = values.pin_memory()
    table.copy_(pinned, non_blocking=True)
