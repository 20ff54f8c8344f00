"""How much larger the loss is without a layer: greedy removal."""

from collections.abc import Sequence

from torch.fx import GraphModule

from slimfront.trainables.compaction.whole_layers import WholeLayer, Without
from slimfront.trainables.depth.base import Batch, Criterion, Loss, criterion, finite
from slimfront.trainables.errors import UserError


@criterion("loss")
class LossWithout(Criterion):
    """The mean loss over the batches without the layer."""

    how = "the loss without them"

    def __init__(self, graph: GraphModule, batches: Sequence[Batch], loss: Loss | None) -> None:
        super().__init__(graph, batches, loss)
        if loss is None:
            raise UserError(
                "prune: the criterion 'loss' needs loss=…, a function of outputs and targets"
            )

    def worth(self, graph: GraphModule, layers: Sequence[WholeLayer]) -> list[float]:
        """In the unit of the loss; needs one run of the network for each layer."""
        return [self._without(graph, layer) for layer in layers]

    def _without(self, graph: GraphModule, layer: WholeLayer) -> float:
        assert self.loss is not None
        total = 0.0
        examples = 0
        for batch in self.batches:
            without = Without(graph, layer)
            outputs = without.run(batch.inputs.clone())
            loss = self.loss(outputs, batch.targets)
            size = len(batch.inputs)
            total += size * float(loss)
            examples += size
        return finite(total / examples)

    def told(self, worth: float) -> str:
        """The loss without it."""
        return f"the loss is {worth:.3g} without it"
