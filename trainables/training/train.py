"""One candidate from its options to the compact network, with torch alone and in this process."""

from collections.abc import Callable
from dataclasses import replace

import torch

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import said_once
from slimfront.trainables.training.finishing import Number, Trained
from slimfront.trainables.training.own_loop import training_of
from slimfront.trainables.training.rehearsal import rehearse


@said_once()
def train(
    candidate: Candidate,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[dict[str, Number]], None] | None = None,
) -> Trained:
    """Trains, compacts and measures one candidate, in this process, once a step on a copy has shown
    that it can be done.

    Args:
        on_epoch: called with the metrics of each epoch, as `Training.run_epoch` returns them.

    Raises:
        UserError: before training, if the network cannot be trained, made compact, kept or shipped:
            see `rehearsal.rehearse`.
        TrialFailure: if the loss diverges, or compaction changes the outputs.
    """
    rehearse(candidate, device)
    training = training_of(candidate, device)
    history = []
    try:
        while not training.done:
            metrics = training.run_epoch()
            if not metrics:
                continue  # a function of the user's has returned
            history.append(metrics)
            if on_epoch:
                on_epoch(metrics)
        finished = training.finish()
    finally:
        training.close()
    return replace(finished, history=history + finished.history)
