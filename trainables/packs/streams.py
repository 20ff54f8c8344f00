"""Packs on a GPU: each member's recorded steps are replayed on a stream of its own, so that their
kernels run beside each other.

Nothing is stacked, and each member computes what it computes alone, bit by bit. One process
launches a whole step of a member at once, so that sixteen members keep a GPU busy which one alone
would leave idle most of the time.
"""

from collections.abc import Sequence

import torch

from slimfront.trainables.errors import TrialFailure
from slimfront.trainables.training.finishing import Number
from slimfront.trainables.training.loop import Training

Result = dict[str, Number] | TrialFailure
"""The metrics of an epoch, as `Training.run_epoch` gives them, or why the training cannot go on."""
Results = dict[Training, Result]


def can_stream(members: Sequence[Training]) -> bool:
    """Whether they can: steps that turn out not to be recordable are taken on these streams all the
    same."""
    return all(member.graphs is not None for member in members)


def run_epoch(members: Sequence[Training]) -> Results:
    """Trains each member one epoch; they have batches of one size and train on the same data. This
    process waits once.

    Returns:
        The metrics of each, as `Training.run_epoch` gives them, or why it cannot go on.
    """
    steps = [member.steps() for member in members]
    for _ in zip(*steps, strict=True):
        pass
    numbers = [member.numbers() for member in members]
    numbers_of_each = torch.stack(numbers).tolist()
    return end_epochs(members, numbers_of_each)


def end_epochs(members: Sequence[Training], numbers_of_each: Sequence[list[float]]) -> Results:
    """Ends an epoch of each member, of which the numbers are known."""
    results: Results = {}
    for member, numbers in zip(members, numbers_of_each, strict=True):
        try:
            results[member] = member.end_epoch(numbers)
        except TrialFailure as failure:
            results[member] = failure
    return results
