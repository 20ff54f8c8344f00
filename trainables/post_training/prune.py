"""`slimfront.prune`: a trained network, smaller, without training."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import Compacted, Compaction, compact
from slimfront.trainables.compaction.report import Step
from slimfront.trainables.depth import OUTPUTS, Batch, Loss, find_criterion
from slimfront.trainables.depth.batch_norms import recalibrate as take_again
from slimfront.trainables.depth.removal import Asked, without_layers
from slimfront.trainables.errors import OF_USERS_CODE, UserError, first_line
from slimfront.trainables.inputs import Several
from slimfront.trainables.options import validated
from slimfront.trainables.post_training.amount import Amount
from slimfront.trainables.post_training.batches import (
    called_with,
    check_runs,
    on_device_of,
    read,
    sample_of,
)
from slimfront.trainables.post_training.scores import zero_channels, zero_weights
from slimfront.trainables.reconstruction import reconstruct
from slimfront.trainables.shipping.shipped import ByArguments
from slimfront.trainables.structure.copying import copied

_FEWEST = 16
"""Fitted to fewer examples, a network may well get worse."""

log = logging.getLogger(__name__)


def prune(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    channels: float | None = None,
    weights: float | None = None,
    layers: int | None = None,
    criterion: str | None = None,
    loss: Loss | None = None,
    output: str | int | None = None,
    exclude: Sequence[str] = (),
    fit: bool = True,
    recalibrate: bool | None = None,
    compaction: Compaction | Mapping[str, Any] | None = None,
) -> Compacted:
    """Makes a trained network smaller without training it; `network` is left as it is.

    What is worth least on the batches goes, what is left is fitted to what the whole network
    computes, and compaction takes out what is zero. One of `channels`, `weights` and `layers` says
    what goes:

    Args:
        network: a trained network, which torch.fx can trace, or torch.export.
        batches: an iterable that is read once: inputs (N, …), each a tensor, or a tuple or a
            mapping of tensors as `network` takes them; with `loss` pairs of inputs and targets. A
            tensor, or a mapping of tensors, is one batch.
            Some hundreds of examples are enough; all are in memory at once.
        channels: the share of the channels, units and heads that can be removed, of which those go
            that are worth least: by |w · ∂loss/∂w| with a loss, else by their norm.
        weights: the share of the weights of linear, convolutional and recurrent layers: by
            |w · ∂loss/∂w| with a loss, else by |w| · ‖x‖₂ with the inputs x that they see, within
            their layers. Their layers get smaller only where whole units are zero.
        layers: how many whole layers go, one by one, each time the one that `criterion` finds worth
            least: residual branches, layers between activations that keep the shape, and
            activations between layers that merge into one then.
        criterion: what layers are judged by: `outputs`, the change of the outputs without the layer
            (if left out); `loss`, the loss without it; `cosine` or `cka`, how alike its input and
            output are; `entropy` of its activations; or `batch_norm`, the scale of its last one.
        loss: a function of outputs and targets that gives a mean over the batch.
        output: which of several outputs counts, is given to `loss`, and is what the smaller network
            returns: a key, an attribute or a place; None: all of them.
        exclude: names of layers that stay.
        fit: whether the weights that are left are changed so that each linear and convolutional
            layer gives, of what it sees now, what it gave before, by least squares: see
            `reconstruction.reconstruct`. It needs no targets. Fewer examples than 16 are too few.
        recalibrate: whether the statistics of batch norms are taken again on the batches, after
            pruning and before compaction; None: where no layer was fitted.
        compaction: how it is made compact, as in a config; the defaults if None. `{"enabled":
            False}` leaves that out: a network without some of its `layers` keeps its batch norms
            then, so that it can be trained further as before, and made compact afterwards.

    Returns:
        The network, in evaluation mode, which is called as `network` is, and the report: its first
        steps, `pruned`, say by name what went.

    Raises:
        UserError: if nothing would go, or what is asked for cannot be done.
        TrialFailure: if compaction changes the outputs.
    """
    amount = Amount.chosen({"channels": channels, "weights": weights, "layers": layers})
    check_criterion(amount, criterion)
    if isinstance(compaction, Mapping):
        compaction = validated(Compaction, compaction, "prune: compaction")
    given = read(batches, with_targets=loss is not None)
    copy = copied(network).eval()
    copy.zero_grad()
    made = called_with(copy, given, output, with_targets=loss is not None)
    found = pruned(
        made,
        given,
        amount,
        None if loss is None else _explained(loss),
        criterion=criterion,
        exclude=tuple(exclude),
        fit=fit,
        recalibrate=recalibrate,
        compaction=compaction,
    )
    inputs = given[0].inputs
    if not isinstance(inputs, Several):
        return found
    return replace(found, network=ByArguments(found.network, list(inputs.named)).eval())


def _explained(loss: Loss) -> Loss:
    """The loss, whose mistakes are told in a sentence."""

    def explained(outputs: Any, targets: Any) -> Any:
        try:
            return loss(outputs, targets)
        except torch.OutOfMemoryError:
            raise
        except OF_USERS_CODE as error:
            kind = type(error).__name__
            raise UserError(f"prune: the loss raised {kind}: {first_line(error)}") from error

    return explained


def check_criterion(amount: Amount, criterion: str | None) -> None:
    """Raises UserError if there is no such criterion, or it is not of what goes."""
    if criterion is None:
        return
    find_criterion(criterion)
    if amount.kind != "layers":
        raise UserError(
            f"prune: criterion='{criterion}' judges whole layers, and {amount} is given"
        )


def pruned(
    network: nn.Module,
    batches: list[Batch],
    amount: Amount,
    loss: Loss | None = None,
    *,
    criterion: str | None = None,
    exclude: tuple[str, ...] = (),
    fit: bool = True,
    recalibrate: bool | None = None,
    compaction: Compaction | None = None,
) -> Compacted:
    """The same of a network of one argument, in evaluation mode, whose weights this changes.

    Raises:
        UserError: as `prune`.
        TrialFailure: as `prune`.
    """
    batches = on_device_of(network, batches)
    check_runs(network, batches)
    for parameter in network.parameters():
        # Taylor importance needs gradients of frozen ones too.
        parameter.requires_grad_(parameter.is_floating_point())
    inputs = [batch.inputs for batch in batches]
    whole = copied(network)
    smaller = network
    if amount.kind == "layers":
        smaller, steps = without_layers(
            network,
            batches,
            Asked(
                count=int(amount.value),
                words=str(amount),
                criterion=criterion or OUTPUTS,
                exclude=exclude,
            ),
            loss,
        )
    else:
        zero = zero_channels if amount.kind == "channels" else zero_weights
        steps = zero(network, batches, amount, loss, exclude)
    fitted = _fitted(whole, smaller, inputs) if fit else []
    steps = [*steps, *fitted]
    if recalibrate or (recalibrate is None and not fitted):
        take_again(smaller, inputs)
    made = compact(smaller, sample_of(batches), compaction)
    return replace(made, report=replace(made.report, steps=(*steps, *made.report.steps)))


def _fitted(whole: nn.Module, smaller: nn.Module, inputs: Sequence[Tensor]) -> list[Step]:
    """Fits what is left to what the whole network computes, where there are examples enough."""
    examples = sum(len(batch) for batch in inputs)
    if examples < _FEWEST:
        log.warning(
            "prune: what is left is not fitted to what the whole network computes, since there are "
            "%s examples; give at least %s, better some hundreds, or fit=False",
            examples,
            _FEWEST,
        )
        return []
    names = reconstruct(whole, smaller, inputs)
    return [(name, "fitted", "to what it gave in the whole network") for name in names]
