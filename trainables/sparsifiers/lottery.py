"""Lottery tickets by iterative magnitude pruning with rewinding.

Frankle, Carbin 2019, The lottery ticket hypothesis, arXiv 1803.03635, with late rewinding as in
Frankle et al. 2020, Linear mode connectivity and the lottery ticket hypothesis, arXiv 1912.05671:
train; drop the smallest weights; set the others back to what they were at the start (or a little
later), and train again, round after round. We differ in that the rounds share the length of one
training, so that a ticket costs as much as any other candidate, and that `sparsity` is met in
`rounds` equal factors instead of 20 % a round.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from slimfront.trainables.errors import UserError
from slimfront.trainables.sparsifiers.base import (
    SPARSIFIERS,
    ActiveSparsifier,
    Setting,
    State,
    TargetSparsifier,
)
from slimfront.trainables.sparsifiers.magnitude import magnitudes
from slimfront.trainables.sparsifiers.masks import Densities, Tensors, choose_masks, cloned


@SPARSIFIERS.register("lottery")
class LotteryTicket(TargetSparsifier):
    """Prunes `rounds` times, so that there are `rounds` + 1 trainings of equal length within
    `training.epochs`.

    `rewind` is the share of the first of them to whose end the weights are set back (0: the initial
    weights). The schedule of the learning rate is gone through in each, from there on.
    """

    needs_training: ClassVar[bool] = True

    name: Literal["lottery"] = "lottery"
    densities: Densities = "global"
    rounds: int = Field(3, ge=1)
    rewind: float = Field(0.0, ge=0, lt=1)

    def attach(self, setting: Setting) -> "ActiveLotteryTicket":
        return ActiveLotteryTicket(self, setting)


class ActiveLotteryTicket(ActiveSparsifier):
    """Iterative magnitude pruning with rewinding at work on one network."""

    begins_anew = True

    def __init__(self, options: LotteryTicket, setting: Setting) -> None:
        super().__init__(options, setting)
        self.options = options
        trainings = options.rounds + 1
        self.length = setting.total_steps // trainings
        if self.length == 0:
            raise UserError(
                f"sparsifier.rounds ({options.rounds}) needs {trainings} trainings, and "
                "there are only "
                f"{setting.total_steps} steps; set it lower, or train longer"
            )
        self.rewind_to = int(options.rewind * self.length)
        self.ticket: Tensors = {}
        if self.rewind_to == 0:
            self._keep_ticket()

    def _keep_ticket(self) -> None:
        now = self.setting.model.state_dict()
        self.ticket = {}
        for name, value in now.items():
            self.ticket[name] = value.detach().clone()

    def due(self, step: int) -> bool:
        """Whether the weights to rewind to are kept, or a round may end."""
        done = step + 1
        if done == self.rewind_to:
            return True
        return done % self.length == 0

    def update(self, step: int) -> None:
        """Keeps the weights to rewind to; at the end of each round but the last, prunes and
        rewinds."""
        options = self.options
        done = step + 1
        if done == self.rewind_to:
            self._keep_ticket()
        number, rest = divmod(done, self.length)
        if rest != 0:
            return
        if not 1 <= number <= options.rounds:
            return
        share_of_rounds = number / options.rounds
        kept = (1 - options.sparsity) ** share_of_rounds
        sparsity = 1 - kept
        scores = magnitudes(self)
        masks = choose_masks(scores, sparsity, options.densities)
        setting = self.setting
        setting.model.load_state_dict(self.ticket)
        setting.optimizer.state.clear()
        self.set_masks(masks)

    def progress(self, step: int) -> float:
        """The first round goes from 0 to 1, the others from where the weights were rewound to."""
        rounds = self.options.rounds
        number = min(step // self.length, rounds)
        begun = number * self.length
        length = self.length
        if number == rounds:
            length = self.setting.total_steps - begun
        start = 0.0
        if number:
            start = self.rewind_to / self.length
        done = step - begun
        return start + (1 - start) * done / length

    def state_dict(self) -> State:
        """The masks and the weights to rewind to."""
        state = super().state_dict()
        state["ticket"] = cloned(self.ticket)
        return state

    def load_state_dict(self, state: State) -> None:
        """Continues bit-exactly."""
        super().load_state_dict(state)
        own = self.setting.model.state_dict()
        self.ticket = {}
        ticket = state["ticket"]
        for name, value in ticket.items():
            device = own[name].device
            copy = torch.clone(value)
            self.ticket[name] = copy.to(device)
