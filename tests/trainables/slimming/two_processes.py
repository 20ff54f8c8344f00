"""A loop of a user's with DistributedDataParallel, as one of its processes runs it."""

import sys

import torch
import torch.distributed as dist
from torch import nn

import slimfront as sf
from tests.trainables.slimming.loops import INPUTS, TARGETS, perceptron


def main(rank: int, size: int, meeting: str, result: str) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    network: nn.Module = perceptron().double()
    inputs, targets = INPUTS.double(), TARGETS
    if size > 1:
        network = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    slim = sf.Slimming(
        network,
        optimizer,
        inputs,
        steps=50,
        penalties={
            "layer": {"strength": 0.5},
            "node": {"strength": 0.01, "form": "gradient"},
        },
        sparsifier={"name": "rigl", "sparsity": 0.6, "every": 5},
        # Each process draws other masks: those of the first count.
        seed=rank,
    )
    mine = slice(rank * len(inputs) // size, (rank + 1) * len(inputs) // size)
    for _ in range(50):
        loss = nn.functional.cross_entropy(network(inputs[mine]), targets[mine]) + slim.loss()
        optimizer.zero_grad()
        loss.backward()
        slim.before_step()
        optimizer.step()
        slim.after_step()
    torch.save(slim.network.state_dict(), f"{result}.{rank}")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
