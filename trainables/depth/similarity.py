"""How alike what goes into a layer and what comes out of it are: a layer that changes little is
worth little. One run of the network judges all layers.

Both compare whole examples: what an example is at the beginning and at the end of a layer. Layers
whose ends have other shapes are not judged.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from slimfront.trainables.compaction.whole_layers import WholeLayer
from slimfront.trainables.depth.base import (
    Criterion,
    Ends,
    Nodes,
    criterion,
    ends,
    finite,
)
from slimfront.trainables.depth.features import Features, features_at
from slimfront.trainables.penalties.cka import pairwise_cka


class Similarity(Criterion):
    """1 less the similarity of beginning and end, the mean over batches; of a layer of several ends
    the largest."""

    def worth(self, graph: GraphModule, layers: Sequence[WholeLayer]) -> list[float]:
        """From 0, for a layer that changes nothing."""
        of_layers = []
        nodes: Nodes = set()
        for layer in layers:
            pairs = list(ends(layer))
            of_layers.append(pairs)
            for pair in pairs:
                nodes.update(pair)
        features = features_at(graph, nodes, self.batches)
        found = []
        for pairs in of_layers:
            changes = [self._change(pair, features) for pair in pairs]
            found.append(max(changes))
        return found

    def _change(self, pair: Ends, features: Sequence[Features]) -> float:
        beginning, end = pair
        total = 0.0
        examples = 0
        for heard in features:
            before = heard.get(beginning)
            after = heard.get(end)
            if before is None or after is None:
                return math.inf
            if before.shape != after.shape:
                return math.inf
            size = len(before)
            similarity = self.similarity(before.flatten(1), after.flatten(1))
            change = 1 - similarity
            total += size * change
            examples += size
        return finite(total / examples)

    @abstractmethod
    def similarity(self, before: Tensor, after: Tensor) -> float:
        """Of features (N, F) each; 1 for equal ones."""


@criterion("cosine")
class Cosine(Similarity):
    """The cosine between the two, the mean over examples: the block influence of ShortGPT (Men et
    al. 2024, arXiv 2403.03853, section 2.2), there for each token."""

    how = "the cosine of their inputs and outputs"

    def similarity(self, before: Tensor, after: Tensor) -> float:
        """From -1 to 1."""
        cosines = F.cosine_similarity(before, after, dim=1)
        return float(cosines.mean())

    def told(self, worth: float) -> str:
        """The cosine itself."""
        cosine = 1 - worth
        return f"the cosine of its input and output is {cosine:.3f}"


@criterion("cka")
class Cka(Similarity):
    """Linear CKA of the two (Kornblith et al. 2019, arXiv 1905.00414, eq. 3), biased: the
    similarity that CKA-SR pushes down (arXiv 2307.07389) chooses the layer that is least needed."""

    how = "the CKA of their inputs and outputs"

    def similarity(self, before: Tensor, after: Tensor) -> float:
        """From 0 to 1; of a batch of one example, which tells nothing, 0."""
        if len(before) == 1:
            return 0.0
        similarities = pairwise_cka([before, after], unbiased=False)
        return float(similarities[0, 1])

    def told(self, worth: float) -> str:
        """CKA itself."""
        similarity = 1 - worth
        return f"the CKA of its input and output is {similarity:.3f}"
