"""Slimming as a callback of Hugging Face's Trainer."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimfront.integrations._slimmed import Slimmed
from slimfront.trainables.compaction import Compacted, Compaction
from slimfront.trainables.errors import UserError

try:
    import transformers
except ImportError:
    raise UserError(
        "slimfront.integrations.transformers needs Hugging Face's library: pip install "
        "'slimfront[transformers]'"
    ) from None

log = logging.getLogger(__name__)

FILE = "slimming.pt"
"""In each checkpoint of the trainer: the state of penalties and sparsifier."""


class SlimmingCallback(transformers.TrainerCallback):
    """Penalties and a sparsifier in a training by Hugging Face's Trainer.

    What penalties add to the loss is added to the loss that the model returns; a trainer that
    computes another loss is refused in its first step, where a penalty needs it. Checkpoints get a
    file of ours, with which training goes on bit-exactly. At the end, `compact` gives the smaller
    network.
    """

    def __init__(
        self,
        inputs: Any,
        *,
        penalties: Mapping[str, Any] | None = None,
        sparsifier: Mapping[str, Any] | str | None = None,
        output: str | int | None = "logits",
        **options: Any,
    ) -> None:
        """
        Args:
            inputs: a batch of real inputs by the names of the model's arguments, without labels.
            penalties: by name with their options.
            sparsifier: its options with its `name`.
            output: which of the model's outputs counts.
            options: further ones of `slimfront.Slimming`: `targets`, `loss`, `seed`, and
                `steps_per_epoch` where the data has no length.
        """
        self.slimmed = Slimmed(inputs, penalties, sparsifier, {"output": output, **options})

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,  # noqa: ARG002
        **given: Any,
    ) -> None:
        """Has penalties and the sparsifier act on the network."""
        if state.global_step > 0:
            self.slimmed.resumed = _state_of(args, state)
        network: nn.Module = given["model"]
        per_epoch = _steps_per_epoch(args, given.get("train_dataloader"))
        self.slimmed.begin(network, given["optimizer"], state.max_steps, per_epoch)
        parts = args.gradient_accumulation_steps

        def add_to_loss(_model: nn.Module, _given: Any, named: dict[str, Any], made: Any) -> Any:
            if not torch.is_grad_enabled() or not network.training:
                return made
            extra = self.slimmed.extra_loss()
            # Where there is no loss to add to, the step that follows refuses.
            if extra is not None and isinstance(made, Mapping) and "loss" in made:
                # With the number of items in the batch, the trainer divides by nothing else.
                divided = named.get("num_items_in_batch") is None
                made["loss"] = made["loss"] + (extra if divided else extra / parts)  # type: ignore[index]
            return made

        self.slimmed.handles.append(network.register_forward_hook(add_to_loss, with_kwargs=True))

    def on_pre_optimizer_step(
        self,
        args: transformers.TrainingArguments,  # noqa: ARG002
        state: transformers.TrainerState,  # noqa: ARG002
        control: transformers.TrainerControl,  # noqa: ARG002
        **_given: Any,
    ) -> None:
        """Zeroes the gradients of dropped weights."""
        self.slimmed.before_step("the trainer")

    def on_save(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,  # noqa: ARG002
        **_given: Any,
    ) -> None:
        """Writes the state of penalties and sparsifier into the checkpoint."""
        folder = _checkpoint(args, state)
        if self.slimmed.slim is not None and state.is_world_process_zero and folder.is_dir():
            torch.save(self.slimmed.slim.state_dict(), folder / FILE)

    def on_train_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,  # noqa: ARG002
        **_given: Any,
    ) -> None:
        """Takes off what was attached. Where the trainer has loaded its best checkpoint, masks are
        those of that."""
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and self.slimmed.slim is not None:
            if (Path(best) / FILE).is_file():
                self.slimmed.slim.load_state_dict(_read(Path(best)))
            else:
                log.warning("%s was loaded, and has no %s: masks are those of the end", best, FILE)
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


def _steps_per_epoch(args: transformers.TrainingArguments, batches: Any) -> int | None:
    """As the trainer counts them: the last group of batches has a step too. None where the data has
    no length."""
    try:
        count = len(batches)
    except TypeError:
        return None
    return max(1, math.ceil(count / args.gradient_accumulation_steps))


def _checkpoint(args: transformers.TrainingArguments, state: transformers.TrainerState) -> Path:
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")


def _state_of(
    args: transformers.TrainingArguments, state: transformers.TrainerState
) -> Mapping[str, Any]:
    """What `on_save` wrote beside the checkpoint that training goes on from."""
    places = [_checkpoint(args, state)]
    if args.resume_from_checkpoint:
        places.insert(0, Path(args.resume_from_checkpoint))
    for place in places:
        if (place / FILE).is_file():
            return _read(place)
    raise UserError(
        f"SlimmingCallback: training goes on from step {state.global_step}, and there is no {FILE} "
        f"in {places[0]}; resume from a checkpoint that was written with the callback, or begin "
        "anew"
    )


def _read(checkpoint: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = torch.load(checkpoint / FILE, weights_only=True)
    return found
