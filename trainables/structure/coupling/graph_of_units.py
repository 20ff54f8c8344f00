"""The walk with all handlers there are: a new kind of layer or operation is added to one of their
tables, or registered by its user."""

from torch import Tensor, nn
from torch.fx import GraphModule

from slimfront.trainables.structure.coupling import (
    attention,
    convolutions,
    entries,
    joining,
    layers,
    moves,
    products,
    recurrent,
    reductions,
)
from slimfront.trainables.structure.coupling.running import Handlers, walked
from slimfront.trainables.structure.coupling.walk import Handler, Walk

HANDLERS = Handlers(
    modules={
        **entries.MODULES,
        **moves.MODULES,
        **reductions.MODULES,
        **attention.MODULES,
        **layers.MODULES,
        **convolutions.MODULES,
        **recurrent.MODULES,
    },
    makers=moves.MAKERS,
    functions={
        **entries.FUNCTIONS,
        **moves.FUNCTIONS,
        **joining.FUNCTIONS,
        **reductions.FUNCTIONS,
        **products.FUNCTIONS,
        **attention.FUNCTIONS,
        **convolutions.FUNCTIONS,
    },
)


def register_handler(kind: type[nn.Module] | str, handler: Handler) -> None:
    """Teaches what a kind of layer of torch.nn, or a function or method of this name, does to the
    units of its inputs.

    Args:
        handler: of the walk over the network (`Walk`) and of a call (`Call`), whose arguments have
            a `Known` in the place of each tensor; it returns what is known of the output, in the
            output's structure, or `NotImplemented` for a form of the call that it does not know.
    """
    if isinstance(kind, str):
        HANDLERS.functions[kind] = handler
    else:
        HANDLERS.modules[kind] = handler


def units_of(graph: GraphModule, inputs: Tensor) -> Walk:
    """What is known of the units of a traced network, found with a few `inputs` (N, *input_shape)
    in evaluation mode."""
    return walked(graph, inputs, HANDLERS)
