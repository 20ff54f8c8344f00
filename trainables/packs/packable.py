"""What can be trained in packs, and what together: the one place that says so."""

import json

import torch
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.inputs import repeated
from slimfront.trainables.packs.step import Step, Tensors, step_of
from slimfront.trainables.penalties.base import ActiveGroups, GroupPenalty, Penalty
from slimfront.trainables.penalties.cka import ActiveFeatures
from slimfront.trainables.torch_internals import Dropout
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.own_loop import OwnTraining, training_of
from slimfront.trainables.training.ranks import Solo

_OWN = {"strength", "warmup", "ramp"}
"""The options of a penalty that each member of a pack may have its own of, and `layers`, if they
are strengths too."""


def pack_key(candidate: Candidate) -> str:
    """What candidates must have in common to be trained in one pack: those with equal keys can
    be."""
    return json.dumps(_shared(candidate), sort_keys=True)


def _shared(candidate: Candidate) -> dict[str, object]:
    """By key of the config: data, model, batch size, precision, and of each penalty all but its
    strengths and their schedule."""
    return {
        "data": candidate.data.model_dump(mode="json"),
        "model": candidate.model.model_dump(mode="json"),
        "training.batch_size": candidate.training.batch_size,
        "training.precision": "bf16" if candidate.training.bf16 else "float32",
        "distill": candidate.distill and candidate.distill.model_dump(mode="json"),
        "penalties": [
            [name, _but_strengths(options)] for name, options in candidate.penalties.items()
        ],
    }


def _but_strengths(options: Penalty) -> dict[str, object]:
    own = _OWN
    if isinstance(options, GroupPenalty):
        own = _OWN | {"layers"}
    return options.model_dump(mode="json", exclude=own)


def check_together(first: Candidate, second: Candidate) -> None:
    """Raises UserError if the two cannot be in one pack."""
    one = _shared(first)
    other = _shared(second)
    different = [key for key in one if one[key] != other[key]]
    if different:
        raise UserError(
            "a pack trains candidates of one architecture, and these differ in "
            f"{' and '.join(different)}; fix what differs, or set resources.pack to 1"
        )


def packable(candidate: Candidate, device: torch.device | str = "cpu") -> str | None:
    """Why a candidate cannot be trained in a pack, in one sentence; None if it can. It is tried out
    on a few examples."""
    return packable_training(training_of(candidate, device))


def unpackable_setting(training: Training) -> str | None:
    """The same, as far as it may differ between trainings of one key."""
    if isinstance(training, OwnTraining):
        return "a training by a function of your own cannot be in a pack; set resources.pack to 1"
    if type(training.ranks) is not Solo:
        return (
            "a training of several processes cannot be in a pack; set processes to 1, or "
            "resources.pack to 1"
        )
    if training.options.out_of_memory == "halve" or training.parts > 1:
        return (
            "training.out_of_memory: halve cannot be in a pack, whose memory is shared; set it to "
            "fail, or resources.pack to 1"
        )
    if training.closing is not None:
        return (
            "layers that go while training cannot be in a pack, whose networks are alike; set "
            "depth.when to trained, or resources.pack to 1"
        )
    if training.options.lr_factors:
        return (
            "training.lr_factors cannot be in a pack, which has one learning rate for each member; "
            "set resources.pack to 1"
        )
    if training.teacher is not None and not training.teacher.cached:
        return (
            "distill with data.augment, or with data that are read from disk, cannot be in a pack, "
            "since the teacher sees each batch; set resources.pack to 1"
        )
    if training.options.compile is True and training.graphs is None:
        return (
            "training.compile: true cannot be in a pack, which is not compiled; set it to auto or "
            "false, or resources.pack to 1"
        )
    return None


def packable_training(training: Training) -> str | None:
    """The same of a training, of which nothing changes."""
    if training.graphs is not None:  # nothing is stacked
        return unpackable_setting(training)
    return unpackable_setting(training) or _of_network(training.model) or _of_step(training)


def _of_network(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if isinstance(module, (Dropout, nn.MultiheadAttention)) and _rate(module) > 0:
            return (
                f"the model's '{name}' drops at random, which packs cannot repeat; set its rate "
                "to 0, or resources.pack to 1"
            )
    parameters = list(model.parameters())
    if any(not parameter.requires_grad for parameter in parameters):
        return (
            "the model has parameters that are not trained, which packs do not leave out; set "
            "resources.pack to 1"
        )
    if len({parameter.dtype for parameter in parameters}) > 1:
        return (
            "the model has parameters of several types, which packs do not stack; set "
            "resources.pack to 1"
        )
    return None


def _rate(module: nn.Module) -> float:
    rate: float = module.p if isinstance(module, Dropout) else module.dropout  # type: ignore[assignment]
    return rate


def _of_step(training: Training) -> str | None:
    """Tries one step of two of the same kind, on copies."""
    penalties: dict[str, Penalty] = training.candidate.penalties
    data = training.data
    count = 2
    for options in penalties.values():
        count = max(count, options.least_batch)
    inputs = data.prepare(data.train.inputs[:count])
    targets = training.taught.train.targets[:count].to(training.device)
    try:
        step = step_of(training, inputs)
    except UserError as error:
        # Of a penalty that is off, and so was not attached before.
        return f"a pack needs all penalties of its candidates, even if their strength is 0: {error}"
    return _of_penalties(step) or _of_losses(step, training, inputs, targets)


def _of_penalties(step: Step) -> str | None:
    for name, penalty in step.penalties.items():
        if not isinstance(penalty, (ActiveGroups, ActiveFeatures)):
            kind = type(penalty).__name__
            return (
                f"penalties.{name} cannot be in a pack: {kind} acts on neither groups nor "
                "features; set resources.pack to 1"
            )
    return None


def _of_losses(step: Step, training: Training, inputs: Tensor, targets: Tensor) -> str | None:
    """Tries the functions of a step on two copies of the network."""
    model = training.model
    first = next(model.parameters())
    parameters: Tensors = {}
    for name, parameter in model.named_parameters():
        parameters[name] = _twice(parameter.detach()).requires_grad_()
    buffers = {name: _twice(buffer) for name, buffer in model.named_buffers()}
    by_loss: Tensors = {}
    by_proximal: Tensors = {}
    for name, options in training.candidate.penalties.items():
        if not step.penalties[name].targets:
            continue
        strengths = by_proximal if step.by_proximal(name) else by_loss
        groups = len(step.strengths(name, options))
        strengths[name] = first.new_ones(2, groups)
    two = repeated(inputs, 2)
    try:
        task, extra = step.losses(parameters, buffers, two, repeated(targets, 2), by_loss)
        loss = (task + extra).sum()
        leaves = list(parameters.values())
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        detached = {name: leaf.detach() for name, leaf in parameters.items()}
        step.proximal(detached, buffers, by_proximal)
        step.outputs(detached, buffers, inputs)
    except UserError as error:
        return str(error)
    except RuntimeError as error:
        # vmap's rules for some functions want one type for all.
        if not training.options.bf16 or isinstance(error, torch.OutOfMemoryError):
            raise
        return (
            f"this network does not pack in bf16 ({first_line(error)}); set training.precision to "
            "float32, or resources.pack to 1"
        )
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            return (
                f"the model does not use its parameter '{name}', which packs do not leave out; "
                "set resources.pack to 1"
            )
    return None


def _twice(tensor: Tensor) -> Tensor:
    return tensor.expand(2, *tensor.shape).clone()
