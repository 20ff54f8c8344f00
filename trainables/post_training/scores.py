"""What channels and weights are worth, over batches; those that are worth least become zero."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from slimfront.trainables.compaction.report import Step
from slimfront.trainables.depth.base import Batch, Loss
from slimfront.trainables.errors import UserError
from slimfront.trainables.post_training.amount import Amount
from slimfront.trainables.sparsifiers.base import Setting, taking_part
from slimfront.trainables.sparsifiers.channels import ActiveChannels, Channels
from slimfront.trainables.sparsifiers.masks import choose_masks
from slimfront.trainables.training.one_shot import layer_adaptive, weight_scores

Scores = dict[str, Tensor]


def zero_channels(
    network: nn.Module,
    batches: Sequence[Batch],
    amount: Amount,
    loss: Loss | None,
    exclude: tuple[str, ...] = (),
) -> list[Step]:
    """Sets the channels and heads to zero that are worth least, in place: the share `amount` of
    those that can be removed, all compared with each other.

    With a loss by Taylor importance, |w · ∂loss/∂w|, the mean over the batches; else by norm: see
    `sparsifiers.channels`.

    Returns:
        How many went of each group, by the name of the layer.

    Raises:
        UserError: if there are none, or so small a share is none of them.
    """
    importance = "norm" if loss is None else "taylor"
    options = Channels(
        sparsity=amount.value,
        of="channels",
        start=0,
        end=0,
        importance=importance,
        exclude=exclude,
    )
    sgd = torch.optim.SGD(network.parameters(), lr=0.0)
    first = batches[0]

    def examples(count: int) -> tuple[Tensor, Tensor]:
        return first.inputs[:count], first.targets

    setting = Setting(
        network,
        sgd,
        total_steps=1,
        seed=0,
        examples=examples,
        loss=loss or _no_loss,
    )
    try:
        active = ActiveChannels(options, setting)
        scores = _mean(active.scores() for _ in _gradients(network, batches, loss))
    except UserError as error:
        raise UserError(f"{amount}: {_in_words_of_prune(error)}") from None
    before = _alive_channels(active)
    _check_share(amount, before.values(), "channels")
    active.drop(scores, amount.value)
    return _told(before, _alive_channels(active), "channels")


def _alive_channels(active: ActiveChannels) -> Scores:
    return {group.name: group.alive(active.weights) for group in active.groups}


def zero_weights(
    network: nn.Module,
    batches: Sequence[Batch],
    amount: Amount,
    loss: Loss | None,
    exclude: tuple[str, ...] = (),
) -> list[Step]:
    """Sets the weights to zero that are worth least, in place: the share `amount` of those of all
    layers that sparsifiers act on, compared with each other; biases stay.

    With a loss by |w · ∂loss/∂w|, the mean over the batches; else by |w| · ‖x‖₂ with the inputs x
    that a weight sees, within its layer (see `training.one_shot`), and by |w| in the layers where
    that is not known.

    Returns:
        How many went of each layer, by its name.

    Raises:
        UserError: if there are none, or so small a share is none of them.
    """
    try:
        weights = taking_part(network, exclude)
    except UserError as error:
        raise UserError(f"{amount}: {_in_words_of_prune(error)}") from None
    before = _alive_weights(weights)
    _check_share(amount, before.values(), "weights")
    if loss is None:
        scores = _by_inputs(network, weights, batches)
    else:
        scores = _mean(_taylor(weights) for _ in _gradients(network, batches, loss))
    masks = choose_masks(scores, amount.value, "global")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(masks[name])
    steps = []
    for name, action, text in _told(before, _alive_weights(weights), "weights"):
        layer = name.removesuffix(".weight")
        steps.append((layer, action, text))
    return steps


def _alive_weights(weights: Scores) -> Scores:
    return {name: weight.detach() != 0 for name, weight in weights.items()}


def _no_loss(_outputs: Tensor, _targets: Tensor) -> Tensor:
    raise AssertionError("importance by norm needs no loss")


def _gradients(network: nn.Module, batches: Sequence[Batch], loss: Loss | None) -> Iterator[Batch]:
    """Each batch in turn, while the parameters have its gradients; without a loss the first one,
    and no gradients."""
    if loss is None:
        yield batches[0]
        return
    for batch in batches:
        network.zero_grad()
        with torch.enable_grad():
            value = loss(network(batch.inputs.clone()), batch.targets)
            _check_loss(value)
            value.backward()
        for parameter in network.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        yield batch
    network.zero_grad()


def _check_loss(value: object) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        found = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise UserError(
            "the loss is to be one number that has gradients, a mean over the batch, and it is "
            f"{found}"
        )
    if not value.isfinite():
        raise UserError(f"the loss is {float(value.detach())}, and it is to be finite")


def _taylor(weights: Scores) -> Scores:
    scores = {}
    for name, weight in weights.items():
        assert weight.grad is not None
        scores[name] = (weight * weight.grad).abs().detach()
    return scores


def _by_inputs(network: nn.Module, weights: Scores, batches: Sequence[Batch]) -> Scores:
    """|w| · ‖x‖₂ over all batches, |w| where the inputs are not known, so that layers can be
    compared: see `layer_adaptive`."""
    squares: Scores = {}
    for batch in batches:
        for name, score in weight_scores(network, batch.inputs).items():
            before = squares.get(name, torch.zeros_like(score))
            squares[name] = before + score.square()
    return layer_adaptive({name: squares[name].sqrt() for name in weights})


def _mean(scores: Iterator[Scores]) -> Scores:
    total: Scores = {}
    for found in scores:
        for name, score in found.items():
            # A group whose gradients are all zero has no mean to be relative to.
            score = score.detach().nan_to_num()
            total[name] = total[name] + score if name in total else score
    return total


def _check_share(amount: Amount, alive: Collection[Tensor], what: str) -> None:
    total = 0
    zero = 0
    for each in alive:
        total += each.numel()
        zero += each.numel() - int(each.sum())
    wanted = round(amount.value * total)
    if wanted < 1:
        raise UserError(
            f"{amount}: that is none of the {total:,} {what} that can go; {1 / total:.2g} is one"
        )
    if wanted <= zero:
        raise UserError(
            f"{amount}: {zero:,} of {total:,} {what} are zero already, so that no more would go"
        )


def _told(before: Scores, after: Scores, what: str) -> list[Step]:
    steps: list[Step] = []
    for name, alive in before.items():
        left = after[name]
        gone = int(alive.sum()) - int(left.sum())
        if gone:
            detail = f"{gone:,} of {alive.numel():,} {what}"
            steps.append((name, "pruned", detail))
    return steps


def _in_words_of_prune(error: UserError) -> str:
    """What the sparsifier says, which has options of a config."""
    said = str(error).removeprefix("sparsifier: ")
    said = said.replace("sparsifier.exclude", "exclude")
    said = said.replace("set exclude: ", "give exclude=")
    return said.replace("take another one than channels", "prune weights instead")
