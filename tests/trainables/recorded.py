"""CUDA graphs without CUDA: operations recorded with the numbers and the memory that they had, and
carried out again.

What a replay does not see is what a CUDA graph does not see: Python. A number that a step reads in
Python stays as it was when the step was recorded, and so does the memory that it read from. Reading
a tensor's number while recording is an error, as there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_READS = (
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
)


class ReadWhileRecording(RuntimeError):
    """A step asked for a number of a tensor, for which it would have to wait."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _READS:
            raise ReadWhileRecording(f"operation not permitted when stream is capturing: {name}")
        made = func(*args, **(kwargs or {}))
        tensors = [made_one for made_one in tree_flatten(made)[0] if isinstance(made_one, Tensor)]
        self.calls.append((func, args, kwargs or {}, tensors))
        return made


def record(take: Callable[[], None]) -> Callable[[], None]:
    """As `step_graphs.record_on_gpu`, on any device."""
    with _Recorder() as recorder:
        take()
    calls = recorder.calls

    def replay() -> None:
        with torch.no_grad():
            for func, args, kwargs, expected in calls:
                made = [
                    one for one in tree_flatten(func(*args, **kwargs))[0] if isinstance(one, Tensor)
                ]
                for old, new in zip(expected, made, strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    return replay
