"""The operations and modules that a stored network may have, by name.

They are what torch says can be done with tensors, the layers of `torch.nn` and our own, and plain
arithmetic. A name in a file is looked up among these alone, so that it can never stand for anything
else: nothing here reads or writes a file, loads code or takes a function.
"""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator
from types import ModuleType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import get_overridable_functions

from slimfront.trainables.structure.attention_modules import Attention, ScaledDotProduct
from slimfront.trainables.structure.counting import CountingGroupNorm, CountingNorm
from slimfront.trainables.torch_internals import OpOverload, signature

Function = Callable[..., Any]

ATTRIBUTES = ("shape", "dtype", "device", "ndim", "T", "mT", "is_cuda", "real", "imag")
"""What a network's code may read of a tensor."""

_OPERATORS = (
    *("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "floordiv", "ifloordiv"),
    *("matmul", "imatmul", "neg", "pos", "pow", "ipow", "getitem", "eq", "ne", "lt", "le", "gt"),
    *("ge", "and_", "iand", "or_", "ior", "xor", "ixor", "invert", "not_", "mod", "imod", "abs"),
)
_OF_NUMBERS = ("sqrt", "floor", "ceil", "trunc", "log", "log2", "exp", "prod")
"""Functions of `math`."""
_FACTORIES = (
    *("arange", "linspace", "eye", "zeros", "ones", "full", "empty", "scalar_tensor", "tensor"),
    *("rand", "randn", "rand_like", "randn_like", "tril_indices", "triu_indices"),
)
"""What makes tensors of numbers, which torch does not count among what is done with them."""
_NOT_OVERRIDABLE = ("hardswish", "hardsigmoid", "sigmoid", "tanh", "upsample", "unflatten")
"""Operations on tensors that torch leaves out of its list."""
_NAMESPACES: dict[str, ModuleType] = {
    "torch.linalg.": torch.linalg,
    "torch.fft.": torch.fft,
    "torch.special.": torch.special,
    "torch.": torch,
    "": F,
}
"""Where a function is looked up, by how its name begins; longer beginnings first."""
_ATEN = "aten."
_NEVER = frozenset(
    {
        *("apply_", "map_", "map2_", "backward", "register_hook", "module_load", "record_stream"),
        *("register_post_accumulate_grad_hook", "numpy", "storage", "untyped_storage", "data_ptr"),
        *("const_data_ptr", "share_memory_", "set_", "resize_", "resize_as_", "retain_grad"),
        *("item", "tolist", "pin_memory", "requires_grad_", "from_file", "save", "load"),
    }
)
"""What is done with memory, gradients or Python rather than with numbers."""
_OWN_METHODS = ("unflatten", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "type")
_NO_LAYERS = (
    *(nn.Module, nn.Container, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList),
    *(nn.ParameterDict, nn.RNNBase, nn.RNNCellBase),
)
_NO_LAYER_BEGINS = ("Transformer", "Lazy", "DataParallel")
_OWN_MODULES: tuple[type[nn.Module], ...] = (
    Attention,
    ScaledDotProduct,
    CountingNorm,
    CountingGroupNorm,
)


@functools.cache
def _functions() -> dict[str, Function]:
    """All functions by the name that they are stored under."""
    found: dict[str, Function] = {}
    for name in _OPERATORS:
        found[name] = getattr(operator, name)
    for name in _OF_NUMBERS:
        found[f"math.{name}"] = getattr(math, name)
    for name in _FACTORIES:
        found[f"torch.{name}"] = getattr(torch, name)
    listed = get_overridable_functions()
    for beginning, namespace in _NAMESPACES.items():
        functions = [
            *listed.get(namespace, ()),
            *_further(namespace),
        ]
        found |= dict(_named(beginning, namespace, functions, found))
    allowed = {}
    for name, function in found.items():
        _, _, last = name.rpartition(".")
        if last not in _NEVER:
            allowed[name] = function
    return allowed


def _further(namespace: ModuleType) -> Iterator[Function]:
    """Functions of a namespace that torch lists elsewhere, or not at all."""
    if namespace is torch:
        yield from get_overridable_functions()[torch.functional]
    for name in _NOT_OVERRIDABLE:
        if hasattr(namespace, name):
            yield getattr(namespace, name)


def _named(
    beginning: str, namespace: ModuleType, functions: Iterable[Function], taken: dict[str, Function]
) -> Iterator[tuple[str, Function]]:
    for function in functions:
        for name in _names_in(namespace, function):
            full_name = beginning + name
            if name.startswith("_") or full_name in taken:
                continue
            yield full_name, function


@functools.cache
def _names_in(namespace: ModuleType, function: Function) -> tuple[str, ...]:
    """What a namespace calls a function: its own name, or else another."""
    own = getattr(function, "__name__", "")
    if getattr(namespace, own, None) is function:
        return (own,)
    found = []
    for name, value in _members(namespace):
        if value is function:
            found.append(name)
    return tuple(found)


@functools.cache
def _members(namespace: ModuleType) -> tuple[tuple[str, Any], ...]:
    return tuple(vars(namespace).items())


@functools.cache
def _names() -> dict[object, str]:
    found: dict[object, str] = {}
    for name, function in reversed(_functions().items()):
        found[function] = name
    return found


def name_of(function: object) -> str | None:
    """The name under which a function is stored; None if it is none of those."""
    if isinstance(function, OpOverload):
        name = str(function)
        if _aten(name) is function:
            return name
        return None
    if not isinstance(function, Hashable):
        return None
    if not callable(function):
        return None
    return _names().get(function)


def function_of(name: object) -> Function | None:
    """The function of a name; None if there is none."""
    if not isinstance(name, str):
        return None
    if name.startswith(_ATEN):
        return _aten(name)
    return _functions().get(name)


def _aten(name: str) -> Function | None:
    """An overload of an operation of torch's own library, such as `aten.add.Tensor`."""
    parts = name.split(".")
    if len(parts) != 3:
        return None
    if not all(part.isidentifier() for part in parts):
        return None
    _, packet, overload = parts
    if packet.startswith("__") or packet in _NEVER:
        return None
    if overload.startswith("__"):
        return None
    overloads = getattr(torch.ops.aten, packet, None)
    found = getattr(overloads, overload, None)
    if not isinstance(found, OpOverload):
        return None
    if not _computes(found):
        return None
    return found


def _computes(operation: OpOverload) -> bool:
    """Whether an operation makes tensors and numbers of tensors, or of numbers alone; some others
    of the library read files."""
    name, kinds = signature(operation)
    if name in (*_FACTORIES, "full", "sym_size"):
        return True
    return any("Tensor" in kind for kind in kinds)


@functools.cache
def methods() -> frozenset[str]:
    """The names of tensors' methods that may be called."""
    found = set(_OWN_METHODS)
    for method in get_overridable_functions()[torch.Tensor]:
        name = getattr(method, "__name__", "")
        if name and not name.startswith("_"):
            found.add(name)
    return frozenset(found - _NEVER)


@functools.cache
def _kinds() -> dict[str, type[nn.Module]]:
    """The kinds of modules by name, in small letters."""
    kinds: list[type[nn.Module]] = []
    for kind in vars(nn).values():
        if inspect.isclass(kind) and _is_layer(kind):
            kinds.append(kind)
    kinds += _OWN_MODULES
    found = {}
    for kind in kinds:
        name = kind.__name__.lower()
        found[name] = kind
    return found


def _is_layer(kind: type) -> TypeGuard[type[nn.Module]]:
    """Whether a class of torch.nn is a layer, and no base of others, container or loss."""
    if not issubclass(kind, nn.Module):
        return False
    if kind in _NO_LAYERS:
        return False
    name = kind.__name__
    if name.startswith(_NO_LAYER_BEGINS):
        return False
    return "Loss" not in name


def kind_of(name: object) -> type[nn.Module] | None:
    """The kind of module of a name, as version 0.1 wrote it too (`batch_norm2d`); None if there is
    none."""
    if not isinstance(name, str):
        return None
    plain = name.replace("_", "").lower()
    return _kinds().get(plain)


def is_kind(module: nn.Module) -> bool:
    """Whether a module is of a kind that may be stored, and of no class of its own."""
    kind = type(module)
    name = kind.__name__.lower()
    return _kinds().get(name) is kind


def arguments_of(module: nn.Module) -> dict[str, Any]:
    """The arguments that make a module of this kind and these sizes.

    Raises:
        ValueError: if the module does not tell one that it needs.
    """
    if isinstance(module, nn.MultiheadAttention):
        return _arguments_of_attention(module)
    found: dict[str, Any] = {}
    signature = inspect.signature(type(module).__init__)
    for name, parameter in signature.parameters.items():
        if name.startswith("_") or name in ("self", "device", "dtype"):
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            found |= _of_base(module)
        elif hasattr(module, name):
            found[name] = _value_of(module, name)
        elif parameter.default is parameter.empty:
            raise ValueError(f"it does not tell its '{name}'")
    return found


def _value_of(module: nn.Module, name: str) -> Any:
    """The argument that an attribute was made of."""
    value = getattr(module, name)
    if name != "bias":
        return value
    if isinstance(value, bool):
        return value
    return value is not None  # the argument said whether there is one


def _of_base(module: nn.Module) -> dict[str, Any]:
    """The arguments of the base class, to which a recurrent layer hands on what it is given."""
    if not isinstance(module, nn.RNNBase):
        return {}
    found = {
        "input_size": module.input_size,
        "hidden_size": module.hidden_size,
        "num_layers": module.num_layers,
        "bias": module.bias,
        "batch_first": module.batch_first,
        "dropout": module.dropout,
        "bidirectional": module.bidirectional,
    }
    if isinstance(module, nn.LSTM):
        found["proj_size"] = module.proj_size
    if isinstance(module, nn.RNN):
        found["nonlinearity"] = module.nonlinearity
    return found


def _arguments_of_attention(module: nn.MultiheadAttention) -> dict[str, Any]:
    return {
        "embed_dim": module.embed_dim,
        "num_heads": module.num_heads,
        "dropout": module.dropout,
        "bias": module.in_proj_bias is not None,
        "add_bias_kv": module.bias_k is not None,
        "add_zero_attn": module.add_zero_attn,
        "kdim": module.kdim,
        "vdim": module.vdim,
        "batch_first": module.batch_first,
    }
