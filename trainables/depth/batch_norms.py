"""Statistics of batch norms, taken again on a network from which something went.

What went was part of the means and variances of training. Taking them again costs a forward pass
and no gradients: it is the cheapest of the corrections after pruning (Li et al. 2020, EagleEye,
arXiv 2007.02491).
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.structure.graph import BatchNorm
from slimfront.trainables.tasks.evaluating import evaluating

_FEW = 64

log = logging.getLogger(__name__)


def recalibrate(network: nn.Module, batches: Sequence[Tensor]) -> None:
    """Takes running means and variances of all batch norms again, in place: the mean over the
    batches, each of which counts the same. All else is in evaluation mode.

    Raises:
        UserError: if a batch has too few examples for a variance.
    """
    norms = [
        m for m in network.modules() if isinstance(m, BatchNorm) and m.running_mean is not None
    ]
    if not norms:
        return
    examples = sum(len(batch) for batch in batches)
    if examples < _FEW:
        log.warning(
            "the statistics of batch norms are taken again on %s examples, which are few; give "
            "more, or recalibrate=False",
            examples,
        )
    momenta = [norm.momentum for norm in norms]
    with evaluating(network), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        try:
            for batch in batches:
                network(batch.clone())
        except ValueError as error:
            raise UserError(
                "prune: the statistics of batch norms cannot be taken again on these batches "
                f"({first_line(error)}); give larger ones, or recalibrate=False"
            ) from None
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
