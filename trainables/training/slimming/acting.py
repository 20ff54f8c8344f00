"""Penalties and a sparsifier at work on one network, step by step: what all training loops
share."""

from typing import Annotated

from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from slimfront.trainables.options import Options
from slimfront.trainables.penalties import PENALTIES, ActivePenalty, Penalty
from slimfront.trainables.penalties.base import ActiveGroups, StepSizes
from slimfront.trainables.sparsifiers import SPARSIFIERS, ActiveSparsifier, Setting, Sparsifier
from slimfront.trainables.structure.tracing.trace import traced_once


class Asked(Options):
    """What is to act on a network: penalties by name, and a sparsifier, as in a config."""

    penalties: Annotated[
        dict[str, SerializeAsAny[Penalty]], BeforeValidator(PENALTIES.parse_mapping)
    ] = Field(default_factory=dict)
    sparsifier: (
        SerializeAsAny[Annotated[Sparsifier, BeforeValidator(SPARSIFIERS.parse_named)]] | None
    ) = None


class Acting:
    """The penalties and the sparsifier of one network, which count no steps themselves: what all
    training loops share."""

    def __init__(
        self, asked: Asked, network: nn.Module, sample: Tensor, setting: Setting | None
    ) -> None:
        """`network` takes `sample` (N, …) as its one argument; without a `setting` there is no
        sparsifier.

        Raises:
            UserError: if what is asked for has nothing to act on, or cannot be done.
        """
        self.penalty_options = [options for options in asked.penalties.values() if options.on]
        self.penalties: list[ActivePenalty] = []
        self.sparsifier: ActiveSparsifier | None = None
        sparsifier = asked.sparsifier
        try:
            with traced_once():
                for options in self.penalty_options:
                    active = options.attach(network, sample)
                    self.penalties.append(active)
            if setting is not None and sparsifier is not None and sparsifier.on:
                sparsifier.refuse_computed(setting.model)
                self.sparsifier = sparsifier.attach(setting)
        except BaseException:
            self.close()
            raise

    def watch(self, step: int, epoch: float) -> None:
        """Tells penalties and sparsifier which step comes: called before its forward pass."""
        pairs = zip(self.penalties, self.penalty_options, strict=True)
        for penalty, options in pairs:
            scale = options.scale(epoch)
            penalty.before_batch(step, scale)
        if self.sparsifier is not None:
            self.sparsifier.before_batch(step)

    def losses(self) -> list[Tensor]:
        """What the penalties add to the loss after a forward pass, a scalar each."""
        found = []
        for penalty in self.penalties:
            value = penalty.loss()
            if value is not None:
                found.append(value)
        return found

    def before_step(self, step: int) -> None:
        """Between the backward pass and the optimiser's step."""
        if self.sparsifier is not None:
            self.sparsifier.before_step(step)

    def after_step(self, step: int, sizes: StepSizes) -> None:
        """After the optimiser's step: proximal steps, then masks."""
        for penalty in self.penalties:
            if isinstance(penalty, ActiveGroups):
                penalty.proximal_of_each(sizes)
            else:
                penalty.proximal(sizes.largest)
        if self.sparsifier is not None:
            self.sparsifier.after_step(step)

    def close(self) -> None:
        """Takes off the network what was attached to it."""
        for penalty in self.penalties:
            penalty.close()
        if self.sparsifier is not None:
            self.sparsifier.close()
