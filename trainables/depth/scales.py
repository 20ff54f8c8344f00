"""The scales of batch norms: a branch that ends in small ones adds little."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule

from slimfront.trainables.compaction.whole_layers import WholeLayer
from slimfront.trainables.depth.base import Criterion, criterion, within
from slimfront.trainables.structure.graph import BatchNorm


@criterion("batch_norm")
class Scales(Criterion):
    """The mean |γ| of the last batch norm of the layer (after network slimming, Liu et al. 2017,
    arXiv 1708.06519, where single channels go by it). A layer without one is not judged, and
    neither is data needed."""

    how = "the scales of their batch norms"

    def worth(self, graph: GraphModule, layers: Sequence[WholeLayer]) -> list[float]:
        """In the unit of γ."""
        return [_last_scale(graph, layer) for layer in layers]

    def told(self, worth: float) -> str:
        """The mean itself."""
        return f"the mean |γ| of its last batch norm is {worth:.3g}"


def _last_scale(graph: GraphModule, layer: WholeLayer) -> float:
    for node in reversed(within(layer)):
        if node.op != "call_module":
            continue
        module = graph.get_submodule(str(node.target))
        if not isinstance(module, BatchNorm):
            continue
        if module.weight is None:
            continue
        weight: Tensor = module.weight
        scales = weight.abs()
        return float(scales.mean())
    return math.inf
