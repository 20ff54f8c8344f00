"""The share of a GPU that a process has: what it may take of the memory."""

import torch


def take_share(gpus: float) -> None:
    """From now on this process takes at most so much of its GPU's memory; nothing changes for 0, or whole ones."""
    if 0 < gpus < 1:
        torch.cuda.set_per_process_memory_fraction(gpus)


def free_memory(device: torch.device) -> int:
    """Bytes of the GPU that are free, and no more than this process's share of it."""
    free, total = torch.cuda.mem_get_info(device)
    return min(free, int(torch.cuda.get_per_process_memory_fraction(device.index) * total))
