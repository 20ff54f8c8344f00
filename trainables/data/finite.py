"""Inputs that are no numbers are found, and named by their places."""

from torch import Tensor

from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import tensors

_PIECE = 2**24
"""So many numbers are looked at at once."""


def refuse_no_numbers(inputs: Tensor, where: str = "", reason: str = "") -> None:
    """Raises UserError if an input (N, …) has NaN or infinite numbers.

    Args:
        where: which inputs they are, such as " of train".
        reason: where else that may come from.
    """
    for tensor in tensors(inputs).values():
        if tensor.is_floating_point() and len(tensor):
            _refuse(tensor, where, reason)


def _refuse(tensor: Tensor, where: str, reason: str) -> None:
    numbers = tensor[0].numel()
    step = max(1, _PIECE // max(numbers, 1))
    first = 0
    for part in tensor.split(step):
        if bool(part.isfinite().all()):
            first += len(part)
            continue
        by_example = part.reshape(len(part), -1)
        wrong = ~by_example.isfinite()
        example = int(wrong.any(1).nonzero()[0])
        of_example = wrong[example]
        many = ""
        if numbers > 1:
            count = int(of_example.sum())
            place = int(of_example.nonzero()[0])
            many = f", {count} of {numbers}, the first at {place}"
        raise UserError(
            f"the data: input {first + example}{where} has NaN or infinite numbers"
            f"{many}{reason}; leave such examples out, or fill them in"
        )
