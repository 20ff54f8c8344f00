"""Networks that `torch.compile` makes faster in training steps, and whether that pays back within a
training.

What is compiled is the forward pass of a full batch in training, and the backward pass that belongs
to it: one code for each architecture, which all trainings of a process share, and which torch keeps
on disk for other processes. Smaller batches, batches whose features are compared (CKA-SR's hooks),
validation, refit, compaction and measures are computed as ever.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError, first_line
from slimfront.trainables.gpu import gpus_among
from slimfront.trainables.inputs import tensors
from slimfront.trainables.measures.latency import seconds_of
from slimfront.trainables.precision import forward_pass
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.torch_internals import allow_many_networks, compile_error

Compile = bool | Literal["auto"]

log = logging.getLogger(__name__)

LONG_S = 600.0
"""What takes less as it is stays so with `auto`: to compile takes up to a minute where torch has no
code on disk yet."""

_GAIN = 1.05
"""With `auto` a network stays compiled if its steps are so many times as fast."""

_ROUNDS = 3
"""So often both ways are measured, in turn; the fastest round counts."""

_ARCHITECTURES = 64
"""So many codes of one class of network are kept in a process; torch keeps eight, and computes
others as they are."""

_plain: dict[object, float] = {}
"""Seconds of a step as it is, by what decides them; measured once in a process."""

_found: dict[object, bool] = {}
"""The same: whether compiled ones are faster."""


class Compiled:
    """A network, compiled for batches of one size."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        """`model` shares its parameters and buffers with this; it compiles at the first batch of
        `batch_size`."""
        allow_many_networks(_ARCHITECTURES)
        options: dict[str, Any] = {
            "fallback_random": True,  # dropout as it is without compiling
            # Else a pool of processes as large as the machine.
            "compile_threads": torch.get_num_threads(),
        }
        self.model = model
        self.batch_size = batch_size
        self.fast = torch.compile(model, dynamic=False, options=options)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The outputs of `inputs` (N, …).

        Raises:
            UserError: if the network cannot be compiled, or there is no compiler.
        """
        if len(inputs) != self.batch_size:
            whole: Tensor = self.model(inputs)
            return whole
        try:
            outputs: Tensor = self.fast(inputs)
        except compile_error() as error:
            said = first_line(error)
            raise UserError(
                f"torch.compile fails for this network or on this machine ({said}); set "
                "training.compile to false"
            ) from error
        return outputs


def pays_back(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    *,
    bf16: bool,
) -> bool:
    """Whether so many steps on such a batch end sooner compiled: measured on a copy of the network,
    and remembered.

    Short trainings are not compiled, unless the code is there from another one of this process.

    Args:
        inputs: (N, …), what the network sees of a batch.
        targets: (N, …).
        loss: of outputs and targets.
    """
    network = (type(model).__qualname__, repr(model))
    key = (
        network,
        tuple((each.shape, each.dtype, each.stride()) for each in tensors(inputs).values()),
        inputs.device,
        torch.get_num_threads(),
        bf16,
    )
    if key in _found:
        return _found[key]

    def seconds(way: nn.Module | Compiled) -> float:
        def take() -> None:
            with forward_pass(inputs.device, bf16):
                outputs = way(inputs)
            loss(outputs, targets).backward()

        return seconds_of(take, inputs.device)

    with torch.random.fork_rng(devices=gpus_among(inputs.device)):
        try:
            if key not in _plain:
                _plain[key] = seconds(copied(model).train())
            if steps * _plain[key] < LONG_S:
                return False
            twin = copied(model).train()
            compiled = Compiled(twin, len(inputs))
            rounds = [(seconds(twin), seconds(compiled)) for _ in range(_ROUNDS)]
        except (UserError, torch.OutOfMemoryError) as error:
            log.warning("training.compile: auto: not compiled: %s", error)
            _found[key] = False
        else:
            plain, fast = (min(each) for each in zip(*rounds, strict=True))
            log.info(
                "training.compile: auto: a step takes %.1f ms, compiled %.1f ms",
                1e3 * plain,
                1e3 * fast,
            )
            _found[key] = plain >= _GAIN * fast
    return _found[key]
