"""A compact network as plain data and tensors, so that a checkpoint loads with `weights_only=True` and no pickled code."""

from typing import Any

import torch
from torch import Tensor, fx, nn

# The modules that may appear in a compact network, with the constructor arguments that rebuild them.
_MODULES: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "linear": (nn.Linear, ("in_features", "out_features")),
    "relu": (nn.ReLU, ()),
    "flatten": (nn.Flatten, ("start_dim", "end_dim")),
    "identity": (nn.Identity, ()),
    "dropout": (nn.Dropout, ("p",)),
}
_KINDS = {cls: kind for kind, (cls, _) in _MODULES.items()}


def to_plain(network: fx.GraphModule) -> dict[str, Any]:
    """A network whose graph is a sequence of modules, as a dictionary of plain data and tensors.

    Raises:
        ValueError: if the network holds a module of another kind, or is not a sequence.
    """
    layers = []
    previous: fx.Node | None = None
    for node in network.graph.nodes:
        if node.op == "call_module" and list(node.args) == [previous]:
            module = network.get_submodule(str(node.target))
            if type(module) not in _KINDS:
                raise ValueError(f"cannot store a {type(module).__name__} ('{node.target}') as plain data")
            kind = _KINDS[type(module)]
            arguments = {name: getattr(module, name) for name in _MODULES[kind][1]}
            if isinstance(module, nn.Linear):
                arguments["bias"] = module.bias is not None
            state = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
            layers.append({"kind": kind, "name": str(node.target), "arguments": arguments, "state": state})
        elif node.op not in ("placeholder", "output"):
            raise ValueError(f"cannot store '{node.name}' ({node.op} {node.target}) as plain data: not a sequence of modules")
        previous = node
    return {"format": 1, "layers": layers}


def from_plain(plain: dict[str, Any]) -> nn.Sequential:
    """The network that `to_plain` stored, in evaluation mode on the CPU, with bit-identical weights."""
    modules: list[nn.Module] = []
    for layer in plain["layers"]:
        cls, _ = _MODULES[layer["kind"]]
        state: dict[str, Tensor] = layer["state"]
        with torch.device("meta"):
            module = cls(**layer["arguments"])
        module.load_state_dict(state, assign=True)
        modules.append(module)
    return nn.Sequential(*modules).eval()
