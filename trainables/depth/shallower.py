"""A trained candidate without some of its layers."""

from torch import nn
from torch.fx import GraphModule

from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.options import Compaction
from slimfront.trainables.compaction.report import Step
from slimfront.trainables.data import Dataset
from slimfront.trainables.depth.base import Batch
from slimfront.trainables.depth.batch_norms import recalibrate
from slimfront.trainables.depth.options import Depth
from slimfront.trainables.depth.removal import Agree, Asked, without_layers
from slimfront.trainables.measures.latency import Latency
from slimfront.trainables.reconstruction import reconstruct

_EXAMPLES = 512
"""What layers are worth is judged on so many training examples."""
_BATCH = 128


def judged_on(data: Dataset) -> list[Batch]:
    """The training examples that layers are judged on, as the network sees them."""
    train = data.train
    stored = train.inputs[:_EXAMPLES]
    inputs = data.prepare(stored)
    targets = train.targets[:_EXAMPLES]
    targets = targets.to(data.device)
    pairs = zip(inputs.split(_BATCH), targets.split(_BATCH), strict=True)
    return [Batch(some, wanted) for some, wanted in pairs]


def asked_for(
    options: Depth,
    latency: Latency | None,
    *,
    at_most: bool,
    compaction: Compaction | None = None,
    agree: Agree | None = None,
) -> Asked:
    """What a candidate's options ask for.

    Args:
        latency: how times are taken.
        compaction: how the network will be made compact.
    """
    return Asked(
        count=options.layers,
        words=options.words,
        criterion=options.criterion,
        exclude=options.exclude,
        target=options.target,
        latency=latency,
        compaction=compaction,
        at_most=at_most,
        agree=agree,
    )


def shallower(
    network: nn.Module,
    data: Dataset,
    options: Depth,
    latency: Latency | None = None,
    *,
    at_most: bool = False,
    compaction: Compaction | None = None,
) -> tuple[GraphModule, list[Step]]:
    """The network without the layers that the options ask for, what is left fitted to what the
    whole network gives of training examples (see `reconstruction.reconstruct`), or, where nothing
    can be, its batch norms taken again on them; `network` stays as it is.

    Args:
        data: on the device of the network.
        latency: how times are taken, where they are to be reached.
        at_most: whether fewer go where there are not so many; there may be none left of a layer
            that training has made empty.
        compaction: how the network will be made compact.

    Returns:
        The network in evaluation mode, and what went by name, in the order of going.

    Raises:
        UserError: if the network cannot be traced, there are not so many, or the criterion judges
            none of those that are left.
    """
    batches = judged_on(data)
    asked = asked_for(options, latency, at_most=at_most, compaction=compaction)
    graph, steps = without_layers(network, batches, asked, data.task.loss)
    inputs = [batch.inputs for batch in batches]
    whole = traced_in_both_modes(network, inputs[0][:3])
    if not reconstruct(whole, graph, inputs):
        recalibrate(graph, inputs)
    return graph, steps
