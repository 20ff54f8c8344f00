"""A model traced in evaluation mode and in training mode.

torch.fx writes what `self.training` was into the graph. So the model is traced in both modes. Where
they differ by dropout alone, the graph gets modules for it, which follow the mode that they are in;
where they differ otherwise, the compact network stays what the model is in evaluation mode, and a
warning names the module whose code it is.
"""

import logging

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from slimfront.trainables.compaction.modes.comparing import first_difference
from slimfront.trainables.compaction.modes.dropout import follow_mode
from slimfront.trainables.compaction.modes.plain_modules import as_modules
from slimfront.trainables.errors import UserError
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.tracing.trace import trace
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.torch_internals import forget_load_hooks

log = logging.getLogger(__name__)


def traced_in_both_modes(model: nn.Module, sample: Tensor | None = None) -> GraphModule:
    """A traced copy of the model in evaluation mode, whose dropout follows the mode that it is in.

    With a `sample` (N, *input_shape) a network that torch.fx cannot trace is exported.

    Raises:
        UserError: if the model cannot be traced.
    """
    if isinstance(model, GraphModule):
        return copied(model).eval()
    model = _with_plain_weights(model)
    with evaluating(model):
        evaluated = copied(trace(model, sample)).eval()
    as_modules(evaluated)
    # Whose statistics an inlined batch norm may count on while it is traced.
    other = copied(model).train()
    try:
        with torch.random.fork_rng(devices=[]):
            trained = copied(trace(other, sample))
        as_modules(trained)
        followed = follow_mode(trained)
        own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        apart = first_difference(evaluated, trained, followed, own)
    except UserError:
        apart, followed, own = "", set(), set()
    if apart is not None:
        log.warning(
            "the compact network stays as in evaluation mode when it is trained further, by a "
            "refit or by you: in training mode %s does something else, which compaction keeps only "
            "where a module of torch.nn does it",
            apart or f"{type(model).__name__}.forward",
        )
        return evaluated
    if not followed:
        return evaluated
    state = trained.state_dict()
    for name, value in evaluated.state_dict().items():
        if name in own or _is_of_layer(trained, name):
            state[name] = value
    trained.load_state_dict(state)
    return trained.eval()


def _is_of_layer(network: GraphModule, name: str) -> bool:
    """Whether a tensor is a layer's, as of one that was made of a function: constants, which are
    held by the graph itself, have other names in each graph, and are equal."""
    owner, _, _ = name.rpartition(".")
    return type(network.get_submodule(owner)) not in (GraphModule, nn.Module)


def _with_plain_weights(model: nn.Module) -> nn.Module:
    """The model, or a copy of it whose weights are what its parametrisations compute now."""
    if not any(is_parametrized(module) for module in model.modules()):
        return model
    plain = copied(model)
    for module in list(plain.modules()):
        if is_parametrized(module):
            _compute_weights(module)
    return plain


def _compute_weights(module: nn.Module) -> None:
    """Makes a module's parametrised weights plain ones, in place.

    torch's own way takes the weight off the class, which copies of the module share.
    """
    names = list(module.parametrizations)  # type: ignore[arg-type]
    weights = {}
    for name in names:
        weight: Tensor = getattr(module, name)
        weights[name] = weight.detach()
    kind = type_before_parametrizations(module)
    del module.parametrizations
    forget_load_hooks(module)
    module.__class__ = kind
    for name, values in weights.items():
        parameter = nn.Parameter(values.clone())
        module.register_parameter(name, parameter)
