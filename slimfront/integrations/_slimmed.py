"""What the callbacks share: Slimming that begins with a trainer's training, goes on from its
checkpoints, and gives the compact network at its end."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimfront.trainables.compaction import Compacted, Compaction
from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import as_one, each
from slimfront.trainables.training.slimming import Slimming, inner_optimizer


class Slimmed:
    """Slimming in somebody else's loop."""

    def __init__(
        self,
        inputs: Any,
        penalties: Mapping[str, Any] | None,
        sparsifier: Mapping[str, Any] | str | None,
        options: Mapping[str, Any],
    ) -> None:
        """As of `Slimming`; what cannot be is refused when training begins."""
        self.inputs = as_one(inputs)
        self.convert: Callable[[Tensor], Tensor] = lambda tensor: tensor
        """What the trainer does to a tensor of a batch, such as another precision."""
        self.asked = {"penalties": penalties, "sparsifier": sparsifier, **options}
        self.slim: Slimming | None = None
        self.resumed: Mapping[str, Any] | None = None
        """The state of a checkpoint, until training goes on from it."""
        self.handles: list[RemovableHandle] = []
        """Of hooks on the network and the optimiser, to be taken off in the end."""
        self.added = False
        """Whether the penalties' loss is part of a loss that no backward pass has seen yet."""

    def begin(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        per_epoch: int | None,
    ) -> Slimming:
        """Has penalties and the sparsifier act, after each step of the optimiser; `per_epoch` steps
        are an epoch, None where the data has no length."""
        self.end()
        optimizer = inner_optimizer(optimizer)
        device = next(network.parameters()).device
        slim = Slimming(
            network,
            optimizer,
            each(self.inputs, lambda tensor: self.convert(tensor.to(device))),
            **({"steps": steps, "steps_per_epoch": per_epoch} | self.asked),
        )
        if self.resumed is not None:
            slim.load_state_dict(self.resumed)
            self.resumed = None
        self.handles.append(optimizer.register_step_post_hook(lambda *_: slim.after_step()))
        self.slim = slim
        return slim

    def extra_loss(self) -> torch.Tensor | None:
        """What the penalties add to the loss of the batch just seen; None if nothing."""
        assert self.slim is not None
        extra = self.slim.loss()
        if not extra.requires_grad:
            return None
        self.added = True
        extra.register_hook(self._is_seen)
        return extra

    def _is_seen(self, _gradient: torch.Tensor) -> None:
        self.added = False

    def before_step(self, trainer: str) -> None:
        """Between the backward pass and the optimiser's step."""
        assert self.slim is not None
        if self.added:
            self.end()
            raise UserError(
                f"the penalties' loss was added to the model's, and {trainer} has not used that: "
                "it computes a loss of its own; give the penalties 'form: proximal', or add "
                "Slimming.loss() where the loss is computed"
            )
        self.slim.before_step()

    def compact(
        self, inputs: Any, options: Compaction | Mapping[str, Any] | None, network: nn.Module | None
    ) -> Compacted:
        """See `Slimming.compact`."""
        if self.slim is None:
            raise UserError("there is nothing to make compact yet: training has not begun")
        if inputs is not None:
            inputs = each(as_one(inputs), self.convert)
        return self.slim.compact(inputs, options, network=network)

    def end(self) -> None:
        """Takes off the network and the optimiser what was attached."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.slim is not None:
            self.slim.close()
