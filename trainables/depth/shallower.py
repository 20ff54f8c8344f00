"""A trained candidate without some of its layers."""

from torch import nn
from torch.fx import GraphModule

from slimfront.trainables.compaction.report import Step
from slimfront.trainables.data import Dataset
from slimfront.trainables.depth.base import Batch
from slimfront.trainables.depth.batch_norms import recalibrate
from slimfront.trainables.depth.options import Depth
from slimfront.trainables.depth.removal import Asked, without_layers

_EXAMPLES = 512
"""What layers are worth is judged on so many training examples."""
_BATCH = 128


def judged_on(data: Dataset) -> list[Batch]:
    """The training examples that layers are judged on, as the network sees them."""
    inputs = data.prepare(data.train.inputs[:_EXAMPLES])
    targets = data.train.targets[:_EXAMPLES].to(data.device)
    pairs = zip(inputs.split(_BATCH), targets.split(_BATCH), strict=True)
    return [Batch(some, wanted) for some, wanted in pairs]


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
    batches = judged_on(data)
    asked = Asked(
        count=options.layers,
        words=f"depth.layers: {options.layers}",
        criterion=options.criterion,
        exclude=options.exclude,
        at_most=at_most,
    )
    graph, steps = without_layers(network, batches, asked, data.task.loss)
    recalibrate(graph, [batch.inputs for batch in batches])
    return graph, steps
