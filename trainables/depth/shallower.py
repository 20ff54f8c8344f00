"""A trained candidate without some of its layers."""

from torch import nn
from torch.fx import GraphModule

from slimfront.trainables.compaction.report import Step
from slimfront.trainables.data import Dataset
from slimfront.trainables.depth.base import Batch
from slimfront.trainables.depth.batch_norms import recalibrate
from slimfront.trainables.depth.options import Depth
from slimfront.trainables.depth.removal import without_layers

_EXAMPLES = 512
"""What layers are worth is judged on so many training examples."""
_BATCH = 128


def shallower(
    network: nn.Module, data: Dataset, options: Depth, *, at_most: bool = False
) -> tuple[GraphModule, list[Step]]:
    """The network without as many layers as the options say, its batch norms taken again on
    training examples; `network` stays as it is.

    Args:
        data: on the device of the network.
        at_most: whether fewer go where there are not so many; there may be none left of a layer
            that training has made empty.

    Returns:
        The network in evaluation mode, and what went by name, in the order of going.

    Raises:
        UserError: if the network cannot be traced, there are not so many, or the criterion judges
            none of those that are left.
    """
    train = data.train
    stored = train.inputs[:_EXAMPLES]
    inputs = data.prepare(stored)
    targets = train.targets[:_EXAMPLES]
    targets = targets.to(data.device)
    pairs = zip(inputs.split(_BATCH), targets.split(_BATCH), strict=True)
    batches = [Batch(some, wanted) for some, wanted in pairs]
    graph, steps = without_layers(
        network,
        batches,
        options.layers,
        data.task.loss,
        exclude=options.exclude,
        criterion=options.criterion,
        asked=f"depth.layers: {options.layers}",
        at_most=at_most,
    )
    recalibrate(graph, [batch.inputs for batch in batches])
    return graph, steps
