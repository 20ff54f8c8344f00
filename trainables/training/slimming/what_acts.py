"""What Slimming was asked for and does not happen: refused when it begins, or said, once and by
name, when it is seen."""

import logging
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimfront.trainables.errors import UserError, first_few
from slimfront.trainables.penalties import ActivePenalty, Penalty
from slimfront.trainables.penalties.base import ActiveGroups, GroupPenalty
from slimfront.trainables.penalties.cka import ActiveFeatures
from slimfront.trainables.sparsifiers.base import (
    frozen_growth,
    optimizers_within,
    out_of_reach,
)
from slimfront.trainables.training.optimizers import step_sizes
from slimfront.trainables.training.slimming.acting import Acting, Asked

log = logging.getLogger(__name__)

STEPS_UNTIL_COMPARED = 50
"""After so many calls of `after_step` they are compared with the steps of the optimiser."""


class RisingRate:
    """How far the learning rate rises above what it was when strengths were made relative to it, as
    in a warm-up: they act so many times as strongly then."""

    def __init__(self, optimizer: torch.optim.Optimizer, penalties: Mapping[str, Penalty]) -> None:
        self.optimizer = optimizer
        self.names = []
        for name, options in penalties.items():
            if isinstance(options, GroupPenalty) and options.relative and options.on:
                self.names.append(f"'{name}'")
        self.first = self._highest()

    def _highest(self) -> float:
        """The highest learning rate of those that are plain numbers; of those that a schedule
        begins with where all are 0, as in a warm-up."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        if not any(rates):
            rates = [group.get("initial_lr", 0.0) for group in groups]
        return max((float(rate) for rate in rates if not isinstance(rate, Tensor)), default=0.0)

    def say_if_far(self) -> None:
        """Warns, once, where the learning rate is more than twice what it was."""
        if not self.names:
            return
        now = self._highest()
        if now <= 2 * self.first:
            return
        log.warning(
            "the learning rate has risen from %g to %g since Slimming was made, and the strength "
            "of %s is relative to steps as long as they were then, so that it acts up to %.3g "
            "times as strongly; make Slimming while the optimizer has the mean learning rate of "
            "the training, or give strengths that are not relative",
            self.first,
            now,
            " and ".join(self.names),
            now / self.first if self.first else float("inf"),
        )
        self.names = []


class StepsTaken:
    """The steps of the optimiser beside the calls of `after_step`: each step wants one call."""

    def __init__(self, optimizer: Any) -> None:
        self.calls = 0
        """Since they were compared last."""
        self.steps: Counter[int] = Counter()
        """Of the optimiser, and of each that it is made of: in one as SAM the latter alone step."""
        self.said = False
        self.handles: list[RemovableHandle] = []
        for place, each in enumerate(optimizers_within(optimizer)):
            if hasattr(each, "_optimizer_step_post_hooks"):  # as torch's own make it
                count = partial(self._count, place)
                self.handles.append(each.register_step_post_hook(count))

    def _count(self, place: int, *_: object) -> None:
        self.steps[place] += 1

    def called(self) -> None:
        """Counts a call of `after_step`."""
        self.calls += 1
        if self.calls == STEPS_UNTIL_COMPARED:
            self.say_if_apart()

    def say_if_apart(self) -> None:
        """Warns, once, where there were more than twice as many of the one as of the other since
        the last time; a scaler of gradients may leave a few steps out."""
        calls = self.calls
        steps = max(self.steps.values(), default=0)
        self.calls = 0
        self.steps.clear()
        if not self.handles or self.said or calls == 0:
            return
        least, most = sorted((calls, steps))
        if most <= 2 * least + 10:
            return
        self.said = True
        log.warning(
            "after_step was called %d times, and the optimizer that Slimming was made with has "
            "taken %d steps meanwhile, so that penalties and schedules do not act as asked; give "
            "Slimming the optimizer that trains the network, and call after_step once after each "
            "step of it",
            calls,
            steps,
        )

    def close(self) -> None:
        """Takes the hooks off the optimiser."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


class Rounds:
    """Compares learning rates between the rounds of a training that begins anew several times, as
    with `lottery`: a schedule that does not begin anew has the later ones train at what is left."""

    def __init__(self) -> None:
        self.rates: list[tuple[float, float]] = []
        """Progress and learning rate of each step of the first round."""
        self.is_first = True
        self.last = 0.0
        self.is_said = False

    def stepped(self, progress: float, rate: float) -> None:
        """Called after each step; warns at the first one of a round, once."""
        begins_anew = progress < self.last
        self.last = progress
        if begins_anew:
            self.is_first = False
        if self.is_first:
            self.rates.append((progress, rate))
        if self.is_said or not begins_anew:
            return
        _, before = min(self.rates, key=lambda one: abs(one[0] - progress))
        if rate < before / 2:
            self.is_said = True
            log.warning(
                "the sparsifier has set the weights back to those of an earlier step, and the "
                "learning rate, %.2g, was %.2g then; have the schedule follow Slimming.progress, "
                "which begins anew with each round",
                rate,
                before,
            )


class WhatActs:
    """Compares what was asked of Slimming with what acts."""

    def __init__(
        self, asked: Asked, network: nn.Module, optimizer: torch.optim.Optimizer, acting: Acting
    ) -> None:
        """Warns of what does nothing.

        Raises:
            UserError: if a penalty has no target, or none that is trained.
        """
        self.network = network
        self.acting = acting
        self.parameters = dict(network.named_parameters())
        names = [name for name, options in asked.penalties.items() if options.on]
        self.penalties: dict[str, ActivePenalty] = dict(zip(names, acting.penalties, strict=True))
        self._unseen: set[str] = set()
        self._loss_was_asked = False
        for name, penalty in self.penalties.items():
            _refuse_idle(name, penalty, asked.penalties[name], optimizer)
        self._say_what_is_off(asked)
        self._say_what_stays_dense(asked)
        self.steps = StepsTaken(optimizer)

    @property
    def targets(self) -> dict[str, int]:
        """On how many groups of weights, or stages of layers, each penalty acts."""
        return {name: penalty.targets for name, penalty in self.penalties.items()}

    def _say_what_is_off(self, asked: Asked) -> None:
        for name, options in asked.penalties.items():
            if not options.on:
                log.warning("penalties.%s does nothing: its strength is 0", name)
        sparsifier = asked.sparsifier
        if sparsifier is not None and not sparsifier.on:
            log.warning("the sparsifier does nothing: its sparsity is 0")

    def _say_what_cannot_grow(self, asked: Asked) -> None:
        assert asked.sparsifier is not None
        frozen = frozen_growth(asked.sparsifier, self.network)
        if frozen:
            log.warning(
                "the sparsifier moves weights, and what it grows in layers that are not trained "
                "stays 0; exclude them: %s",
                first_few(frozen),
            )

    def _say_what_stays_dense(self, asked: Asked) -> None:
        if self.acting.sparsifier is None:
            return
        self._say_what_cannot_grow(asked)
        dense = out_of_reach(self.network, self.acting.sparsifier.masks)
        if dense:
            log.warning(
                "%s weights stay dense, whatever the sparsity: no sparsifier acts on %s",
                f"{sum(dense.values()):,}",
                first_few([f"'{name}'" for name in dense]),
            )

    def loss_asked(self) -> None:
        """Called where the loop asks for the penalties' loss: warns of features that no forward
        pass was seen to compute."""
        self._loss_was_asked = True
        for name, penalty in self.penalties.items():
            if not isinstance(penalty, ActiveFeatures) or name in self._unseen:
                continue
            if penalty.features.watching and not penalty.features.kept:
                self._unseen.add(name)
                log.warning(
                    "penalties.%s has seen no features of this batch: call loss() after a forward "
                    "pass with gradients, and make Slimming before a compiled network is first run",
                    name,
                )

    def before_compaction(self, step: int, steps: int) -> None:
        """Warns of what the training that is behind should have done, after `step` of `steps`."""
        self._say_if_replaced()
        self.steps.say_if_apart()
        if step == 0 and self.penalties:
            log.warning(
                "penalties have done nothing: after_step was never called; call it after each step "
                "of the optimizer"
            )
        elif step and not self._loss_was_asked:
            self._say_what_had_no_gradient()
        self._say_if_early(step, steps)

    def _say_what_had_no_gradient(self) -> None:
        names = []
        for name, penalty in self.penalties.items():
            if isinstance(penalty, ActiveFeatures) or penalty.loss() is not None:
                names.append(f"'{name}'")
        if names:
            log.warning(
                "penalties have done nothing by their gradient, since loss() was never called; add "
                "it to the loss of each batch: %s",
                first_few(names),
            )

    def is_replaced(self, name: str) -> bool:
        """Whether a parameter is another one than when Slimming was made."""
        now = dict(self.network.named_parameters())
        return name in self.parameters and now.get(name) is not self.parameters[name]

    def _say_if_replaced(self) -> None:
        now = dict(self.network.named_parameters())
        replaced = [
            f"'{name}'" for name, own in self.parameters.items() if now.get(name) is not own
        ]
        if replaced:
            log.warning(
                "parameters were replaced after Slimming was made, and nothing acts on the new "
                "ones; make Slimming when the network has the parameters that are trained: %s",
                first_few(replaced),
            )

    def _say_if_early(self, step: int, steps: int) -> None:
        sparsifier = self.acting.sparsifier
        if sparsifier is None or step >= steps:
            return
        left = [later for later in range(step, steps) if sparsifier.due(later)]
        if left:
            log.warning(
                "the sparsifier is not at its target: %d of %d steps were taken, and it changes "
                "its masks until step %d",
                step,
                steps,
                left[-1] + 1,
            )

    def close(self) -> None:
        """Takes off what was attached to the optimiser."""
        self.steps.close()


def _refuse_idle(
    name: str, penalty: ActivePenalty, options: Penalty, optimizer: torch.optim.Optimizer
) -> None:
    """Raises UserError for a penalty without a target that is trained, and names what it leaves
    alone."""
    if penalty.targets == 0:
        raise UserError(f"penalties.{name}: {options.nothing_to_do}; leave it out")
    if not isinstance(penalty, ActiveGroups):
        return
    frozen = penalty.not_trained(step_sizes(optimizer))
    if len(frozen) == penalty.targets:
        raise UserError(
            f"penalties.{name}: all that it acts on is not trained: it requires no gradient, or is "
            "in no parameter group of the optimiser; leave it out"
        )
    if frozen:
        log.warning(
            "penalties.%s leaves alone what is not trained: %s",
            name,
            first_few([f"'{group}'" for group in frozen]),
        )
