"""Slimming as a callback of Lightning's Trainer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from slimfront.integrations._slimmed import Slimmed
from slimfront.trainables.compaction import Compacted, Compaction
from slimfront.trainables.errors import UserError

try:
    import lightning
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
except ImportError:
    raise UserError(
        "slimfront.integrations.lightning needs Lightning: pip install 'slimfront[lightning]'"
    ) from None


class SlimmingCallback(lightning.Callback):
    """Penalties and a sparsifier in a training by Lightning, with automatic optimisation.

    What penalties add to the loss is added to that of `training_step`. Lightning's checkpoints hold
    what is needed to go on bit-exactly. At the end, `compact` gives the smaller network.
    """

    def __init__(
        self,
        inputs: Any,
        *,
        penalties: Mapping[str, Any] | None = None,
        sparsifier: Mapping[str, Any] | str | None = None,
        network: str | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            inputs: a batch of real inputs, as the network is called.
            penalties: by name with their options.
            sparsifier: its options with its `name`.
            network: the attribute of the LightningModule that is made compact, such as `model`;
                the module itself if None.
            options: further ones of `slimfront.Slimming`: `output`, `targets`, `loss`, `seed`,
                `trained`; `steps` and `steps_per_epoch` where Lightning does not know them.
        """
        self.slimmed = Slimmed(inputs, penalties, sparsifier, options)
        self.name = network

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Has penalties and the sparsifier act on the network."""
        if not pl_module.automatic_optimization:
            raise UserError(
                "SlimmingCallback: the module optimises by hand (automatic_optimization is false); "
                "use slimfront.Slimming within its training_step"
            )
        if len(trainer.optimizers) != 1:
            raise UserError(
                f"SlimmingCallback: the module has {len(trainer.optimizers)} optimisers, and must "
                "have one; use slimfront.Slimming within its training_step"
            )
        steps = self._steps(trainer)
        per_epoch = None
        batches = trainer.num_training_batches
        if batches != float("inf"):
            # The last group of batches has a step too, however few they are.
            per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
        self._go_on(trainer.global_step)
        self.slimmed.convert = trainer.precision_plugin.convert_input
        self.slimmed.begin(self._network(pl_module), trainer.optimizers[0], steps, per_epoch)
        self._add_to_loss(pl_module)

    def _steps(self, trainer: lightning.Trainer) -> int:
        """How many steps the optimiser is going to take: what was given, or Lightning's estimate.

        Raises:
            UserError: if neither is there.
        """
        given = self.slimmed.asked.get("steps")
        if given is not None:
            return int(given)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            is_scheduler = isinstance(callback, GradientAccumulationScheduler)
            if is_scheduler and len(set(callback.scheduling.values())) > 1:
                raise UserError(
                    "SlimmingCallback: gradients are accumulated over other numbers of batches "
                    "from epoch to epoch, so that it is not known how many steps there will be; "
                    "give SlimmingCallback steps=, the steps of the optimiser in the whole training"
                )
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError(
                "SlimmingCallback: the trainer trains without end, and schedules of sparsifiers "
                "need one; set max_epochs or max_steps, or give SlimmingCallback steps="
            )
        return int(steps)

    @property
    def state_key(self) -> str:
        """By which checkpoints know it: several have networks of their own."""
        own = type(self).__qualname__
        return own if self.name is None else f"{own} of {self.name}"

    def _go_on(self, taken: int) -> None:
        """Where the trainer goes on from earlier steps, has this go on from its own."""
        if not taken or self.slimmed.resumed is not None:
            return
        if self.slimmed.slim is None:
            raise UserError(
                f"SlimmingCallback: training goes on from step {taken}, and this callback has no "
                "state of it; resume from a checkpoint that was written with the callback, or give "
                "the module to a new Trainer"
            )
        self.slimmed.resumed = self.slimmed.slim.state_dict()

    def _network(self, pl_module: lightning.LightningModule) -> nn.Module:
        if self.name is None:
            return pl_module
        network = getattr(pl_module, self.name, None)
        if not isinstance(network, nn.Module):
            raise UserError(
                f"SlimmingCallback: the module has no network '{self.name}'; it has "
                f"{', '.join(name for name, _ in pl_module.named_children())}"
            )
        return network

    def _add_to_loss(self, pl_module: lightning.LightningModule) -> None:
        training_step: Callable[..., Any] = pl_module.training_step

        def slimmed_step(*arguments: Any, **named: Any) -> Any:
            made = training_step(*arguments, **named)
            extra = None if made is None else self.slimmed.extra_loss()
            if extra is None:
                return made
            if isinstance(made, Mapping):
                return {**made, "loss": made["loss"] + extra}
            return made + extra

        pl_module.training_step = slimmed_step  # type: ignore[method-assign]

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,  # noqa: ARG002
        optimizer: torch.optim.Optimizer,  # noqa: ARG002
    ) -> None:
        """Zeroes the gradients of dropped weights."""
        self.slimmed.before_step("the module")

    def on_train_end(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,
    ) -> None:
        """Takes off what was attached."""
        self._leave(pl_module)

    def on_exception(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """The same."""
        self._leave(pl_module)

    def _leave(self, pl_module: lightning.LightningModule) -> None:
        vars(pl_module).pop("training_step", None)
        self.slimmed.end()

    def compact(
        self,
        inputs: Any = None,
        options: Compaction | Mapping[str, Any] | None = None,
        *,
        network: nn.Module | None = None,
    ) -> Compacted:
        """The compact network; see `slimfront.Slimming.compact`."""
        return self.slimmed.compact(inputs, options, network)

    def state_dict(self) -> dict[str, Any]:
        """The state of penalties and sparsifier."""
        if self.slimmed.slim is None:
            return {}
        return self.slimmed.slim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps it until training begins."""
        self.slimmed.resumed = state_dict or None
