"""What a network computes and nobody reads: taken out."""

from torch.fx import GraphModule, Node

from slimfront.trainables.structure.graph import module_of
from slimfront.trainables.torch_internals import writes_in_place


def drop_unread(network: GraphModule) -> list[str]:
    """Takes out of a network, in place, what leads to no output; the names of the modules with
    parameters that it calls no more."""
    before = _called(network)

    def has_effects(node: Node) -> bool:
        if node.op in ("placeholder", "output"):
            return True
        module = module_of(network, node)
        return writes_in_place(node) or bool(getattr(module, "inplace", False))

    network.graph.eliminate_dead_code(has_effects)
    after = set(_called(network))
    return [name for name in before if name not in after]


def _called(network: GraphModule) -> list[str]:
    """The modules with parameters that a network calls, by name."""
    found = []
    for node in network.graph.nodes:
        module = module_of(network, node)
        if module is not None and next(module.parameters(), None) is not None:
            found.append(str(node.target))
    return list(dict.fromkeys(found))
