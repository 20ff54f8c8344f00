"""Slimming: penalties and a sparsifier at work on one network and its optimiser, in any training
loop.

A training step is the same everywhere, in a loop of the user's and in ours: the penalties' loss is
added before the backward pass; gradients of dropped weights are zeroed before the optimiser's step;
after it come the proximal steps of the penalties, and then the masks.
"""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import Compacted, Compaction
from slimfront.trainables.errors import UserError, first_few, said_once
from slimfront.trainables.inputs import as_one
from slimfront.trainables.models.adapted import as_called_with
from slimfront.trainables.options import validated
from slimfront.trainables.penalties import Penalty
from slimfront.trainables.penalties.base import ActiveGroups, GroupPenalty
from slimfront.trainables.penalties.cka import ActiveFeatures
from slimfront.trainables.penalties.features import remove_hooks
from slimfront.trainables.penalties.relative import absolute
from slimfront.trainables.shipping.any_inputs import compact, name_hooks
from slimfront.trainables.sparsifiers import ActiveSparsifier, Setting, Sparsifier
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.targets.still import stilled
from slimfront.trainables.structure.tracing.trace import traced_once
from slimfront.trainables.training.optimizers import check_optimizer, step_sizes
from slimfront.trainables.training.slimming.acting import Acting, Asked
from slimfront.trainables.training.slimming.arguments import (
    Loss,
    beside,
    broadcast,
    check_arguments,
    examples_of,
    inner_optimizer,
    loss_of,
    per_epoch,
    refuse_opaque_outputs,
    shapes,
    unwrapped,
)
from slimfront.trainables.training.slimming.as_given import AsGiven
from slimfront.trainables.training.slimming.what_acts import (
    RisingRate,
    Rounds,
    WhatActs,
)
from slimfront.trainables.training.slimming.what_goes import (
    name_refusal,
    name_what_does_not_last,
    name_what_stayed,
    what_would_stay,
)

log = logging.getLogger(__name__)


class Slimming(AbstractContextManager["Slimming"]):
    """Penalties and a sparsifier in a training loop of the user's.

    ```python
    slim = Slimming(network, optimizer, inputs, steps=total_steps,
                    penalties={"layer": {"strength": 2.0}},
                    sparsifier={"name": "channels", "sparsity": 0.5})
    for batch in loader:
        loss = criterion(network(batch.x), batch.y) + slim.loss()
        optimizer.zero_grad()
        loss.backward()
        slim.before_step()
        optimizer.step()
        slim.after_step()
    small = slim.compact(inputs)
    ```

    Learning rates are read from the optimiser's parameter groups in each step, so schedules need
    nothing; the proximal step of a group of weights has the learning rate of its largest parameter.
    With gradient accumulation, add `loss()` to the loss of each part. With a `GradScaler`, call
    `scaler.unscale_(optimizer)` before `before_step`. Penalties leave alone what is not trained; a
    sparsifier acts on it too, unless it is excluded.
    """

    @said_once()
    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        inputs: Any,
        *,
        steps: int,
        penalties: Mapping[str, Any] | None = None,
        sparsifier: Mapping[str, Any] | Sparsifier | str | None = None,
        steps_per_epoch: int | None = None,
        targets: Tensor | None = None,
        loss: Loss | None = None,
        output: str | int | None = None,
        seed: int = 0,
        trained: bool = False,
    ) -> None:
        """
        Args:
            network: wrapped by DistributedDataParallel or torch.compile or not; on its device.
            optimizer: any of torch's but LBFGS, with the parameters of `network`.
            inputs: a batch of real inputs, as the network is called: a tensor (N, …), a tuple of
                tensors, or a mapping of tensors by the names of forward's arguments.
            steps: how many optimiser steps the whole training has; schedules of sparsifiers go by
                it.
            penalties: by name with their options, as in a config: `{"layer": {"strength": 2.0}}`.
            sparsifier: its options with its `name`.
            steps_per_epoch: for penalties with `warmup` or `ramp`, which are in epochs.
            targets: (N, …), those of `inputs`, for a sparsifier that needs a loss before training
                (snip); `loss` is of outputs and targets then.
            output: which of the network's outputs counts, if it returns several: a key, an
                attribute or a place.
            seed: of what is drawn, such as the first masks of rigl.
            trained: whether the network has trained weights, so that `channels` takes out channels
                early, unless its options say when.

        Raises:
            UserError: if an option is unknown or out of range, or what is asked for has nothing to
                act on in this network.
        """
        asked = validated(
            Asked, {"penalties": penalties or {}, "sparsifier": sparsifier}, "Slimming"
        )
        optimizer = inner_optimizer(optimizer)
        check_arguments(network, optimizer, steps)
        self.steps = steps
        self.steps_per_epoch = per_epoch(asked, steps_per_epoch)
        self.optimizer = optimizer
        self.network = unwrapped(network)
        check_optimizer(optimizer, self.network, asked.penalties)
        self.output = output
        sample = as_one(inputs)
        view = as_called_with(self.network, sample, output)
        refuse_opaque_outputs(view, sample)
        name_hooks(self.network, view, sample)
        self._rounds = Rounds()
        self._rise = RisingRate(optimizer, asked.penalties)
        self._relative = {
            name
            for name, options in asked.penalties.items()
            if isinstance(options, GroupPenalty) and options.relative
        }
        penalties_by_name = self._absolute(asked.penalties, view, sample)
        asked = asked.model_copy(update={"penalties": penalties_by_name})
        setting = Setting(
            model=view,
            optimizer=optimizer,
            total_steps=steps,
            seed=seed,
            examples=examples_of(sample, targets),
            loss=loss_of(loss, targets),
            broadcast_from_rank0=broadcast,
            trained=trained,
            stays=partial(what_would_stay, view, sample),
        )
        drops = asked.sparsifier is not None and asked.sparsifier.on
        self._as_given = AsGiven(self.network, optimizer, drops=drops)
        with traced_once():
            self.acting = Acting(asked, view, sample, setting)
            name_refusal(view, sample)
        name_what_does_not_last(view, sample, self.sparsifier)
        self._as_given.attached()
        self.step = 0
        self._asked = asked
        self._sample = sample
        self._copy: tuple[nn.Module, Acting] | None = None
        try:
            self._what_acts = WhatActs(asked, self.network, optimizer, self.acting)
        except UserError:
            self.acting.close()
            raise
        for penalty in self.acting.penalties:
            if isinstance(penalty, ActiveFeatures):
                # A network that is compiled later keeps the hooks that it has at its first run.
                penalty.features.stay()
        self._watch()

    @property
    def sparsifier(self) -> ActiveSparsifier | None:
        """The sparsifier at work, with its masks by the name of the parameter."""
        return self.acting.sparsifier

    def _absolute(
        self, penalties: Mapping[str, Penalty], view: nn.Module, sample: Tensor
    ) -> dict[str, Penalty]:
        """The penalties with strengths as the steps take them, for steps as long as now."""
        size = float(step_sizes(self.optimizer).largest) or self._rise.first
        if self._relative and size == 0:
            raise UserError(
                "Slimming: the learning rate is 0, and strengths that are relative are so to the "
                "steps of a training; make Slimming while the optimizer has a learning rate"
            )

        def total_step(options: Penalty) -> float:
            taken = []
            for step in range(self.steps):
                epoch = step / self.steps_per_epoch
                scale = options.scale(epoch)
                taken.append(size * scale)
            return sum(taken)

        return absolute(penalties, view, sample, total_step)

    @property
    def targets(self) -> dict[str, int]:
        """On how many groups of weights, or stages of layers, each penalty acts."""
        return self._what_acts.targets

    def loss(self) -> Tensor:
        """What the penalties add to the loss of the batch that the network has just seen: a scalar,
        0 where none acts by its gradient."""
        self._what_acts.loss_asked()
        found = self.acting.losses()
        # The next part of a batch, where gradients are accumulated, is looked at too.
        self._watch()
        if found:
            return torch.stack(found).sum()
        first = next(self.network.parameters())
        return torch.zeros((), dtype=first.dtype.to_real(), device=first.device)

    def before_step(self) -> None:
        """Call it between the backward pass and the optimiser's step: zeroes the gradients of
        dropped weights."""
        self.acting.before_step(self.step)

    @torch.no_grad()
    def after_step(self) -> None:
        """Call it after the optimiser's step: takes the penalties' proximal steps, and updates and
        applies the masks."""
        self.acting.after_step(self.step, step_sizes(self.optimizer))
        self._rise.say_if_far()
        self._what_acts.steps.called()
        self._as_given.forget()
        if self.sparsifier is not None and self.sparsifier.begins_anew:
            self._rounds.stepped(self.progress, float(step_sizes(self.optimizer).largest))
        self.step += 1
        self._watch()

    @property
    def progress(self) -> float:
        """How far training is, 0 to 1, as a schedule of the learning rate should see it: with
        `lottery` it begins anew in each round."""
        if self.sparsifier is not None:
            return self.sparsifier.progress(self.step)
        return min(1.0, self.step / self.steps)

    @torch.no_grad()
    def apply_to(self, other: nn.Module) -> None:
        """Gives a copy of the network, such as an average of its weights, the same zeros, and the
        same inactive layers; call it before the copy is used.

        Raises:
            UserError: if it is no copy of the network.
        """
        twin = unwrapped(other)
        own = dict(self.network.named_parameters())
        theirs = dict(twin.named_parameters())
        if shapes(own) != shapes(theirs):
            raise UserError(
                "Slimming.apply_to: the parameters of the network given are others than those of "
                "the network in training; give a copy of it"
            )
        for name, parameter in own.items():
            copied_parameter = theirs[name]
            alive = parameter != 0
            copied_parameter.mul_(alive.to(copied_parameter.device))
        acting = self._acting_on(twin)
        pairs = zip(self.acting.penalties, acting.penalties, strict=True)
        for penalty, twins in pairs:
            if isinstance(penalty, ActiveGroups) and isinstance(twins, ActiveGroups):
                twins.finish_where(penalty)

    def _acting_on(self, twin: nn.Module) -> Acting:
        """The same penalties on a copy of the network; found once for the same copy."""
        if self._copy is not None:
            known, acting = self._copy
            if known is twin:
                return acting
        sample = beside(self._sample, twin)
        view = as_called_with(twin, sample, self.output)
        acting = Acting(self._asked, view, sample, None)
        self._copy = twin, acting
        return acting

    def compact(
        self,
        inputs: Any = None,
        options: Compaction | Mapping[str, Any] | None = None,
        *,
        network: nn.Module | None = None,
    ) -> Compacted:
        """A smaller network with the same outputs in evaluation mode; the network in training is
        left as it is.

        Args:
            inputs: real inputs on which both are compared, as the network is called; those that
                Slimming was made with if None.
            options: of compaction, as in a config.
            network: a copy to make compact instead, such as an average of the weights, after
                `apply_to`.

        Returns:
            The network, which is called as the one in training was, with what was done and its
            measures.

        Raises:
            TrialFailure: if compaction changed the outputs.
            UserError: if the network cannot be traced.
        """
        self._what_acts.before_compaction(self.step, self.steps)
        given = self._sample
        if inputs is not None:
            given = as_one(inputs)
        whole = self.network
        if network is not None:
            whole = unwrapped(network)
        twin = copied(whole)
        remove_hooks(twin)
        self._zero_again(twin)
        twin = stilled(twin, beside(given, twin))
        if options is None or isinstance(options, Mapping):
            options = validated(Compaction, options or {}, "compact")
        made = compact(twin, beside(given, twin), options, output=self.output)
        if self.sparsifier is not None:
            name_what_stayed(twin, made, self.sparsifier, options)
        return made

    @torch.no_grad()
    def _zero_again(self, twin: nn.Module) -> None:
        """Has the masks hold in a copy of the network, which may have been changed since the last
        step."""
        if self.sparsifier is None:
            return
        parameters = dict(twin.named_parameters(remove_duplicate=False))
        changed = []
        for name, mask in self.sparsifier.masks.items():
            if self._what_acts.is_replaced(name):
                continue  # which was said: the mask is another parameter's
            parameter = parameters[name]
            mask = mask.to(parameter.device)
            if bool((parameter[~mask] != 0).any()):
                parameter.mul_(mask)
                changed.append(f"'{name}'")
        if changed:
            log.warning(
                "weights that the sparsifier has zeroed were not 0 any more, as where an average "
                "of weights took the network's place, or weights of an earlier step were loaded "
                "without the state of Slimming then; they were zeroed again: %s",
                first_few(changed),
            )

    def state_dict(self) -> dict[str, Any]:
        """All that continuing needs beside the network's and the optimiser's: plain data and
        tensors."""
        masks = {}
        if self.sparsifier is not None:
            masks = self.sparsifier.state_dict()
        strengths = {}
        for name, options in self._asked.penalties.items():
            if name in self._relative and isinstance(options, GroupPenalty):
                strengths[name] = {"strength": options.strength, "layers": options.layers}
        return {
            "step": self.step,
            "sparsifier": masks,
            "strengths": strengths,
            "optimizer": type(self.optimizer).__name__,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues bit-exactly where `state_dict` was taken, with the network's and the
        optimiser's, which may be loaded before Slimming is made, or after it.

        Strengths and options are those that Slimming was made with, but for relative strengths,
        which are relative to the weights that the training began with, unless the optimiser is of
        another kind now.

        Raises:
            UserError: if the state is of another network, or of another sparsifier.
        """
        if not isinstance(state.get("step"), int):
            raise UserError("Slimming.load_state_dict: this is not what Slimming.state_dict gave")
        masks = state.get("sparsifier", {})
        if masks and self.sparsifier is None:
            raise UserError(
                "Slimming.load_state_dict: the state is of a training with a sparsifier, and this "
                "one has none"
            )
        if self.sparsifier is not None:
            own = self.sparsifier.state_dict()
            self._as_given.restore()
            try:
                self.sparsifier.load_state_dict(masks)
            except (KeyError, RuntimeError, ValueError) as error:
                self.sparsifier.load_state_dict(own)
                raise UserError(
                    "Slimming.load_state_dict: the state is of another network, or of another "
                    f"sparsifier ({type(error).__name__}: {error})"
                ) from None
        self.step = state["step"]
        own_kind = type(self.optimizer).__name__
        kind = state.get("optimizer", own_kind)
        strengths = state.get("strengths", {})
        if kind == own_kind:
            self._take_strengths(strengths)
        elif self._relative.intersection(strengths):
            log.warning(
                "Slimming.load_state_dict: the state is of a training with %s, and this one has "
                "%s: relative strengths are relative to the steps of %s, and to the weights as "
                "they were when this Slimming was made",
                kind,
                own_kind,
                own_kind,
            )
        self._watch()

    def _take_strengths(self, strengths: Mapping[str, Any]) -> None:
        """Those of the weights that the training began with, to which they may be relative."""
        asked = self._asked
        penalties = dict(asked.penalties)
        for name in self._relative.intersection(strengths):
            own = strengths[name]
            before = penalties[name]
            penalties[name] = before.model_copy(update=dict(own))
        self._asked = asked.model_copy(update={"penalties": penalties})
        for name, penalty in self._what_acts.penalties.items():
            options = penalties[name]
            if isinstance(penalty, ActiveGroups) and isinstance(options, GroupPenalty):
                penalty.options = options

    def close(self) -> None:
        """Takes everything off the network that was attached to it; its weights stay as they
        are."""
        self.acting.close()
        self._what_acts.close()
        if self._copy is not None:
            self._copy[1].close()
            self._copy = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self) -> None:
        epoch = self.step / self.steps_per_epoch
        self.acting.watch(self.step, epoch)
