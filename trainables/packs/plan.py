"""The numbers of each step of an epoch that differ from member to member: learning rates,
strengths, thresholds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimfront.trainables.packs.step import Step, Tensors
from slimfront.trainables.penalties.cka import FeaturePenalty
from slimfront.trainables.training.loop import Training


class Plan:
    """The coming epoch of K members: `rates` by step and member, and what `Step` takes of
    penalties, by step.

    `entries` are the thresholds of the penalty `step.entries`, by step, member and parameter, where
    it acts.
    """

    def __init__(self, members: Sequence[Training], step: Step, batches: int, like: Tensor) -> None:
        """`like` says where the tensors go, and of which kind they are."""
        numbers = [range(member.step, member.step + batches) for member in members]
        self.rates = [
            [m.learning_rate(s) for m, s in zip(members, row, strict=True)]
            for row in zip(*numbers, strict=True)
        ]
        self.strengths: list[Tensors] = [{} for _ in range(batches)]
        self.thresholds: list[Tensors] = [{} for _ in range(batches)]
        self.entries: list[list[list[float]] | None] = [None for _ in range(batches)]
        sizes = [
            [m.proximal_step(lr) for m, lr in zip(members, row, strict=True)] for row in self.rates
        ]
        for name in step.penalties:
            options = [member.candidate.penalties[name] for member in members]
            full = torch.tensor(
                [step.strengths(name, each) for each in options], dtype=torch.float64
            )  # (K, groups)
            if not full.any():
                continue
            scales = torch.tensor(
                [
                    [_scale(o, s, s / batches) for s in steps]
                    for o, steps in zip(options, numbers, strict=True)
                ],
                dtype=torch.float64,
            ).T  # (batches, K)
            by_proximal = step.by_proximal(name)
            scaled = scales * torch.tensor(sizes, dtype=torch.float64) if by_proximal else scales
            values = scaled[:, :, None] * full  # (batches, K, groups)
            if step.entries and name == step.entries[0]:
                self.entries = values.tolist()
                continue
            values = values.to(like)
            for number in values.flatten(1).any(1).nonzero().flatten().tolist():
                (self.thresholds if by_proximal else self.strengths)[number][name] = values[number]


def _scale(options: object, step: int, epoch: float) -> float:
    """The share of the full strength in a step; 0 where CKA-SR does not look."""
    scale: float = options.scale(epoch)  # type: ignore[attr-defined]
    return scale if not isinstance(options, FeaturePenalty) or step % options.every == 0 else 0.0
