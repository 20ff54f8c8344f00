"""Empty residual blocks: a branch that adds nothing is taken out."""

import torch
from torch import fx

from trainables.graph import residual_branches


@torch.no_grad()
def drop_empty_branches(graph: fx.GraphModule) -> list[str]:
    """Replaces `shortcut + branch` by `shortcut` where the branch's last layer is all zero (batch norms folded).

    Returns the names of those last layers; what fed them is dead code then, and goes with the next clean-up.
    """
    dropped: list[str] = []
    while True:
        empty = (
            branch
            for branch in residual_branches(graph)
            if branch.last.norm is None and not any(p.any() for p in branch.last.layer.parameters())
        )
        branch = next(empty, None)  # one at a time: the next branch's shortcut may be the addition that goes
        if branch is None:
            return dropped
        branch.addition.replace_all_uses_with(branch.shortcut)
        graph.graph.erase_node(branch.addition)
        graph.graph.eliminate_dead_code()
        dropped.append(branch.last.name)
