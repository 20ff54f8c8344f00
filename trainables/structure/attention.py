"""Attention as parts that can be made smaller one by one: projections that are linear layers, and
heads between them.

`nn.MultiheadAttention` holds its projections as one tensor and insists on heads of width embed_dim
/ heads, so that it cannot lose a head. A traced network that is to be changed or stored has each
taken apart by `split_attention`.

Torch-Pruning 1.6.1 is not used for heads: its `MultiheadAttentionPruner` takes single channels out
of the embedding and the projections together, which must still divide by a number of heads that
stays; and `prune_num_heads` ranks heads of networks whose projections are linear layers of their
own, which it must be told, and leaves the number in their code to the caller.
"""

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.errors import UserError
from slimfront.trainables.structure.attention_modules import Attention
from slimfront.trainables.structure.graph import module_of
from slimfront.trainables.structure.tracing.trace import RANK

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


@torch.no_grad()
def split_attention(network: GraphModule) -> list[str]:
    """Replaces every `nn.MultiheadAttention` by linear layers query, key, value and out around
    `heads`, in place; names them.

    Raises:
        UserError: if one uses what that cannot stand for: an attn_mask of inputs or heads of their
            own, weights as an output, `add_bias_kv`, `add_zero_attn`.
    """
    graph = network.graph
    calls = [(node, module_of(network, node)) for node in graph.nodes]
    split: list[str] = []
    for node, module in calls:
        if not isinstance(module, nn.MultiheadAttention):
            continue
        name = str(node.target)
        arguments = _arguments(network, node, module, name)
        if name not in split:
            network.delete_submodule(name)
            for part, layer in _parts(module).items():
                network.add_submodule(f"{name}.{part}", layer)
            split.append(name)
        with graph.inserting_before(node):
            out = _called(graph, name, arguments)
        for user in list(node.users):
            user.replace_all_uses_with(out)
            graph.erase_node(user)
        graph.erase_node(node)
    if split:
        network.recompile()
    return split


def _called(graph: fx.Graph, name: str, arguments: dict[str, Any]) -> Node:
    """Calls of the parts of an attention with the arguments that it was called with; the node of
    its output."""
    inputs = []
    for part in ("query", "key", "value"):
        given = arguments[part]
        projected = graph.call_module(f"{name}.{part}", (given,))
        inputs.append(projected)
    mask = arguments["attn_mask"]
    padding = arguments["key_padding_mask"]
    if mask is not None or padding is not None:
        inputs.append(mask)
    if padding is not None:
        inputs.append(padding)
    attended = graph.call_module(f"{name}.heads", tuple(inputs))
    return graph.call_module(f"{name}.out", (attended,))


def projections(network: nn.Module) -> set[nn.Module]:
    """The modules of a traced network that `Attention` reads the outputs of; none for a network
    that is not traced."""
    if not isinstance(network, GraphModule):
        return set()
    found = set()
    for node in network.graph.nodes:
        if not isinstance(module_of(network, node), Attention):
            continue
        for source in node.all_input_nodes:
            module = module_of(network, source)
            if module is not None:
                found.add(module)
    return found


def _arguments(
    network: GraphModule, node: Node, module: nn.MultiheadAttention, name: str
) -> dict[str, Any]:
    """The arguments of a call by name, all of them ones that `Attention` can stand for; the outputs
    that are not used go."""
    bound = _SIGNATURE.bind(
        module,
        *node.args,
        **node.kwargs,
    )
    bound.apply_defaults()
    mask = bound.arguments["attn_mask"]
    problem = None
    if module.bias_k is not None or module.add_zero_attn:
        problem = "uses add_bias_kv or add_zero_attn"
    elif mask is not None and not _is_matrix(network, mask):
        problem = "has an attn_mask that is not (L, S), the same for all inputs and heads"
    for user in list(node.users):
        if _takes_output(user):
            continue
        if user.users:
            problem = "has its attention weights read"
        else:
            network.graph.erase_node(user)
    if problem:
        raise UserError(f"the attention '{name}' {problem}, which its compact form cannot do")
    return bound.arguments


def _takes_output(user: Node) -> bool:
    """Whether a node takes the first of the outputs of an attention, and not its weights."""
    if user.target is not operator.getitem:
        return False
    _, place = user.args
    return bool(place == 0)


def _is_matrix(network: GraphModule, mask: object) -> bool:
    """Whether a mask is of two axes: a buffer, or what the code makes."""
    if not isinstance(mask, Node):
        return False
    if mask.op != "get_attr":
        return mask.meta.get(RANK) == 2
    name = str(mask.target)
    parent, _, leaf = name.rpartition(".")
    owner = network.get_submodule(parent)
    tensor: Tensor = getattr(owner, leaf)
    return tensor.dim() == 2


def _parts(module: nn.MultiheadAttention) -> dict[str, nn.Module]:
    """The linear layers and heads that do what the module does."""
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (
            module.q_proj_weight,
            module.k_proj_weight,
            module.v_proj_weight,
        )
    biases: Sequence[Tensor | None] = (None, None, None)
    if module.in_proj_bias is not None:
        biases = module.in_proj_bias.chunk(3)
    parts: dict[str, nn.Module] = {}
    for place, name in enumerate(("query", "key", "value")):
        weight = weights[place]
        bias = biases[place]
        parts[name] = _linear(weight, bias)
    parts["heads"] = Attention(
        module.num_heads,
        batch_first=module.batch_first,
        dropout=module.dropout,
    )
    out = module.out_proj
    parts["out"] = _linear(out.weight, out.bias)
    for part in parts.values():
        part.train(module.training)
    return parts


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of these parameters."""
    outputs, inputs = weight.shape
    layer = nn.Linear(
        inputs,
        outputs,
        bias=bias is not None,
        device="meta",
    )
    layer.weight = _copy_of(weight)
    if bias is not None:
        layer.bias = _copy_of(bias)
    return layer


def _copy_of(parameter: Tensor) -> nn.Parameter:
    values = parameter.detach()
    return nn.Parameter(values.clone())
