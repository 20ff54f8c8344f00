"""What we use of torch although it does not document it, behind names of ours.

`tests/test_undocumented.py` says with the version of torch what is gone. Tried with torch 2.13.
"""

import io
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_map, tree_unflatten
from torch.utils.flop_counter import _FlopCounterMode

Dropout = _DropoutNd
"""The base of all dropouts, which users' own have too; `p` is the rate."""

NORM = _NormBase
"""The base of batch and instance norms, which users' own have too."""

FORWARD_HELPERS = ("_conv_forward", "_check_input_dim")
"""Methods that the forward of a module of torch.nn calls, which a subclass could change."""

OpOverload = torch._ops.OpOverload
"""An operation of torch's own library for arguments of certain kinds."""

_IN_PLACE = (
    *("iadd", "isub", "imul", "itruediv", "ipow", "imatmul", "ifloordiv", "iand", "ior", "ixor"),
    "setitem",
)
"""Operators of Python that change what they are given."""
_FX_CHECKS = ("_assert_is_none", "_assert")


_LOADS_COMPILER = (
    torch.optim.Optimizer.add_param_group,
    torch.optim.Optimizer.state_dict,
    torch.optim.Optimizer.load_state_dict,
    _FlopCounterMode.__torch_dispatch__,
)
"""Functions that torch wraps so that they load its compiler where they are called first."""
_CALLED = "__dynamo_disable"
"""The attribute of the wrapped function that has what is called."""
_entering = threading.Lock()
_within: list[int] = []
"""The threads that are within `without_compiler`."""


@contextmanager
def without_compiler() -> Iterator[None]:
    """Within, optimisers and the counter of FLOPs do not load torch's compiler, which takes more
    than a second: a process that compiles nothing has no use for it. Once it is loaded, nothing is
    different. Several threads may be within at once."""
    if "torch._dynamo" in sys.modules:
        yield
        return
    with _entering:
        _within.append(threading.get_ident())
        for original in _originals():
            # Where the wrapper keeps what it calls.
            setattr(original, _CALLED, original)
    try:
        yield
    finally:
        with _entering:
            _within.pop()
            if not _within:
                for original in _originals():
                    delattr(original, _CALLED)


def _originals() -> list[Any]:
    """What the wrappers of `_LOADS_COMPILER` wrap."""
    found = []
    for function in _LOADS_COMPILER:
        if hasattr(function, "__wrapped__"):
            found.append(function.__wrapped__)
    return found


def function_name(node: Node) -> str:
    """What a node calls, by a name that a function, a method, and an operator of Python share."""
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.removeprefix("aten::").rstrip("_")
    name = getattr(node.target, "__name__", "")
    return (name[1:] if name in _IN_PLACE[:-1] else name).strip("_")


def signature(operation: Any) -> tuple[str, list[str]]:
    """The name of an operation of torch's own library, and the kinds of its arguments."""
    schema = operation._schema
    return schema.name.removeprefix("aten::"), [str(one.type) for one in schema.arguments]


def repeats_itself(node: Node) -> bool:
    """Whether a node calls an operation of torch's own library that draws no numbers."""
    if not isinstance(node.target, OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def writes_to(tensor: Tensor) -> int:
    """How often a tensor was written to in place, as autograd counts it."""
    return tensor._version


def writes_in_place(node: Node) -> bool:
    """Whether a node changes a tensor that it is given."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in _IN_PLACE


def flattened(outputs: object) -> tuple[list[Any], object]:
    """What is in nested lists, tuples, dictionaries and dataclass objects, and their structure,
    which can be compared."""
    return tree_flatten(_opened(outputs))


def _opened(outputs: object) -> object:
    """Nested values with a dictionary in the place of each object of a dataclass."""

    def of_fields(leaf: Any) -> Any:
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        values = {field.name: getattr(leaf, field.name) for field in fields(leaf)}
        return {"class": type(leaf), "fields": _opened(values)}

    return tree_map(of_fields, outputs)


def register_container(
    kind: type,
    parts: Callable[[Any], tuple[list[Any], Any]],
    made: Callable[[Iterable[Any], Any], Any],
    name: str,
) -> None:
    """Has `vmap` and exporters see the tensors within objects of a class.

    Args:
        parts: the tensors of an object, and what else it is made of.
        made: the object of both.
        name: what exported programs call the class.
    """
    register_pytree_node(kind, parts, made, serialized_type_name=name)


def is_check(node: Node) -> bool:
    """Whether torch.fx put a node in to check that an optional argument is what it was."""
    return getattr(node.target, "__name__", "") in _FX_CHECKS


@contextmanager
def of_any_rank(norm: nn.Module) -> Iterator[None]:
    """Within, a norm does not ask how many axes its inputs have."""
    vars(norm)["_check_input_dim"] = lambda _inputs: None
    try:
        yield
    finally:
        del vars(norm)["_check_input_dim"]


def forget_load_hooks(module: nn.Module) -> None:
    """Takes away what translates state dicts when a module loads one, as torch's `weight_norm`
    leaves it behind: it cannot be pickled."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        function = getattr(hook, "hook", hook)
        if function.__module__.startswith("torch.nn.utils"):
            del hooks[key]


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """The forward hooks of a module, as it has them: what is deleted here is off the module.

    A copied module has the hooks of the original, whose handles do not know it.
    """
    return module._forward_hooks


def hooks_that_change(network: nn.Module, run: Callable[[], object]) -> list[str]:
    """The names of the modules with forward hooks, neither torch's nor ours, that change what is
    computed in `run`: they return something, or write to what they are given. The name of the
    network itself is empty. Those that only look at what passes, as libraries have, are left
    out."""
    changing: dict[str, None] = {}
    watched: list[tuple[dict[int, Any], int, Any]] = []
    for name, module in network.named_modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                home = getattr(hook, "__module__", None) or type(hook).__module__
                if home.partition(".")[0] not in ("torch", "slimfront"):
                    hooks[key] = _Watched(hook, name, changing)
                    watched.append((hooks, key, hook))
    try:
        if watched:
            run()
    finally:
        for hooks, key, hook in watched:
            hooks[key] = hook
    return list(changing)


class _Watched:
    """A hook that is noted by the name of its module when it changes something."""

    def __init__(self, hook: Callable[..., Any], name: str, changing: dict[str, None]) -> None:
        self.hook = hook
        self.name = name
        self.changing = changing

    def __call__(self, *given: Any) -> Any:
        tensors = [one for one in tree_flatten(given)[0] if isinstance(one, Tensor)]
        before = [writes_to(tensor) for tensor in tensors]
        returned = self.hook(*given)
        after = [writes_to(tensor) for tensor in tensors]
        if returned is not None or before != after:
            self.changing[self.name] = None
        return returned


def allow_many_networks(most: int) -> None:
    """Has torch.compile keep up to `most` codes of one class of network, and look at hooks.

    The hooks of the user's are traced with the network they are on, and another network of the
    class may have others.
    """
    import torch._dynamo

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.recompile_limit = most


def compile_error() -> type[Exception]:
    """What torch.compile raises at the first call where it cannot compile."""
    import torch._dynamo

    return torch._dynamo.exc.TorchDynamoException


def abort_process_group() -> None:
    """Ends the process group, whatever state the others are in: `destroy_process_group` may wait
    for ranks that are gone."""
    torch.distributed.distributed_c10d._abort_process_group()


def count_up(steps: list[Tensor]) -> None:
    """Adds 1 to each, in one call."""
    torch._foreach_add_(steps, 1)


def fused_sgd() -> Any:
    """The kernel of SGD's step."""
    return torch._fused_sgd_


def fused_adam(group: Mapping[str, Any]) -> Any:
    """The kernel of Adam's step; of AdamW's, where weight decay is decoupled."""
    return torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_


def mapped_tree(value: object, change: Callable[[Any], Any]) -> Any:
    """Nested lists, tuples and dictionaries with each of what is in them changed."""
    return tree_map(change, value)


def unflattened(leaves: list[Any], structure: Any) -> Any:
    """What `flattened` took apart."""
    return tree_unflatten(leaves, structure)


def fixes_the_batch(error: Exception) -> bool:
    """Whether torch.export says that the code of a network makes the number of inputs a
    constant."""
    return "Constraints violated" in str(error)


def decides_by_values(error: Exception) -> bool:
    """Whether torch.export says that the code of a network decides by the values of its inputs."""
    return "data-dependent" in str(error)


@contextmanager
def quiet_export() -> Iterator[None]:
    """Within, torch.export says nothing: it logs the whole graph that it gave up on."""
    disabled = logging.root.manager.disable
    logging.disable()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        finally:
            logging.disable(disabled)
