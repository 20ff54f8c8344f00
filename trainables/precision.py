"""How exactly networks compute: bfloat16 in the forward pass of training steps that ask for it, and
all of float32 in checks.

bfloat16 comes by torch's autocast; all else stays as it is. It has the range of float32, so that no
scaling of the loss is needed, and 8 bits of precision.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from slimfront.trainables.errors import UserError

Precision = Literal["auto", "float32", "bf16"]


def forward_pass(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """Around the forward pass of a training step on `device`."""
    if bf16:
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


@contextmanager
def all_of_float32() -> Iterator[None]:
    """Within, products and convolutions of float32 on a GPU have all its 24 bits of precision.

    As torch has it by default, convolutions round what they multiply to TF32's 11 bits: two
    networks that are the same function, one with its batch norms folded, then differ by more than
    compaction tolerates.
    """
    with _of_precision("ieee", "ieee"):
        yield


@contextmanager
def as_torch_has_it() -> Iterator[None]:
    """Within, it is as it was before all: torch's exporter raises an error else."""
    with _of_precision(*_USUAL):
        yield


_KINDS = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
_USUAL = tuple(kind.fp32_precision for kind in _KINDS)


@contextmanager
def _of_precision(*wanted: str) -> Iterator[None]:
    before = [kind.fp32_precision for kind in _KINDS]
    try:
        for kind, precision in zip(_KINDS, wanted, strict=True):
            kind.fp32_precision = precision
        yield
    finally:
        for kind, precision in zip(_KINDS, before, strict=True):
            kind.fp32_precision = precision


def to_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, if it is of a type with fewer bits; itself if not."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor


def check_bf16(device: torch.device) -> None:
    """Raises UserError if the device has no arithmetic for bfloat16; a CPU may be slow at it, but
    has it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            "training.precision: bf16 needs a GPU that computes in bfloat16 (NVIDIA's since "
            "Ampere), and the "
            f"{torch.cuda.get_device_name(device)} does not; set it to float32"
        )
