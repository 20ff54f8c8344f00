"""What training needs to know of a GPU: the share of its memory that a process has, and copies to
it that nobody waits for."""

import torch
from torch import Tensor


def take_share(gpus: float) -> None:
    """From now on this process takes at most so much of its GPU's memory; nothing changes for 0, or
    whole ones."""
    if 0 < gpus < 1:
        torch.cuda.set_per_process_memory_fraction(gpus)


def free_memory(device: torch.device) -> int:
    """Bytes of the GPU that are free, and no more than this process's share of it."""
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device.index)
    return min(free, int(share * total))


def gpus_among(device: torch.device) -> list[torch.device]:
    """The device if it is a GPU, none else: whose random numbers `fork_rng` is to keep besides the
    CPU's."""
    if device.type == "cuda":
        return [device]
    return []


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy from a CPU to a GPU goes through pinned memory, and this process
    does not wait for it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
