"""The numbers of each step of an epoch that differ from member to member: learning rates,
strengths, thresholds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimfront.trainables.packs.step import Step, Tensors
from slimfront.trainables.penalties.cka import FeaturePenalty
from slimfront.trainables.training.loop import Training

PerStep = list[list[float]]
"""A number by step and member."""
PerParameter = list[list[float]]
"""A number by member and parameter."""


class Plan:
    """The coming epoch of K members: `rates` by step and member, and what `Step` takes of
    penalties, by step.

    `entries` are the thresholds of the penalty `step.entries`, by step, member and parameter, where
    it acts.
    """

    def __init__(self, members: Sequence[Training], step: Step, batches: int, like: Tensor) -> None:
        """`like` says where the tensors go, and of which kind they are."""
        self.rates: PerStep = []
        self.strengths: list[Tensors] = []
        self.thresholds: list[Tensors] = []
        self.entries: list[PerParameter | None] = []
        sizes: PerStep = []
        for number in range(batches):
            self.strengths.append({})
            self.thresholds.append({})
            self.entries.append(None)
            rates = []
            proximal = []
            for member in members:
                step_of_member = member.step + number
                rate = member.learning_rate(step_of_member)
                size = member.proximal_step(rate)
                rates.append(rate)
                proximal.append(size)
            self.rates.append(rates)
            sizes.append(proximal)
        for name in step.penalties:
            self._add(name, step, members, sizes, like)

    def _add(
        self,
        name: str,
        step: Step,
        members: Sequence[Training],
        sizes: PerStep,
        like: Tensor,
    ) -> None:
        """Adds the strengths of a penalty; `sizes` are those of proximal steps."""
        options = [member.candidate.penalties[name] for member in members]
        strengths = [step.strengths(name, own) for own in options]
        full = torch.tensor(strengths, dtype=torch.float64)  # (K, groups)
        if not full.any():
            return
        scales = _scales(members, options, len(sizes))
        acting = self.strengths
        if step.by_proximal(name):
            acting = self.thresholds
            scales = scales * torch.tensor(sizes, dtype=torch.float64)
        values = scales[:, :, None] * full  # (batches, K, groups)
        if step.entries and name == step.entries[0]:
            self.entries = values.tolist()
            return
        values = values.to(like)
        acts = values.flatten(1).any(1)
        acting_steps = acts.nonzero().flatten()
        for number in acting_steps.tolist():
            acting[number][name] = values[number]


def _scales(members: Sequence[Training], options: Sequence[object], batches: int) -> Tensor:
    """The shares of the full strengths (batches, K) of each member's own `options` of a penalty."""
    by_member = []
    for member, own in zip(members, options, strict=True):
        scales = []
        for number in range(batches):
            step = member.step + number
            epoch = step / batches
            scale = _scale(own, step, epoch)
            scales.append(scale)
        by_member.append(scales)
    table = torch.tensor(by_member, dtype=torch.float64)
    return table.T


def _scale(options: object, step: int, epoch: float) -> float:
    """The share of the full strength in a step; 0 where CKA-SR does not look."""
    if isinstance(options, FeaturePenalty):
        since_looked = step % options.every
        if since_looked != 0:
            return 0.0
    scale: float = options.scale(epoch)  # type: ignore[attr-defined]
    return scale
