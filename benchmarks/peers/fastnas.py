"""ModelOpt's FastNAS (`nvidia-modelopt`): a trained network is pruned within a bound on parameters,
by how sensitive each layer is on the validation split, and trained on."""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.width_networks import (
    NETWORKS,
    Recipe,
    Splits,
    accuracy,
    batches,
    cosine,
    normalised,
    steps_of,
)


def _train(network: nn.Module, splits: Splits, seed: int, epochs: int) -> None:
    """A training of its own, on a cosine."""
    recipe = Recipe()
    steps = steps_of(splits, recipe, epochs)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    network.train()
    for step, inputs, labels in batches(splits, recipe, seed, epochs):
        for group in optimizer.param_groups:
            group["lr"] = cosine(recipe, step, steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()


def trained(job: dict[str, Any], splits: Splits) -> nn.Module:
    """The compact network of a job: `network`, `seed`, `share` and `epochs`."""
    import modelopt.torch.prune as prune

    torch.manual_seed(job["seed"])
    example = splits["train"][0][:1]
    network = NETWORKS[job["network"]](example.shape[1])
    dense_epochs = job["epochs"] // 2
    _train(network, splits, job["seed"], dense_epochs)
    validation = splits["validation"]
    inputs, labels = splits["train"]
    loader = list(zip(inputs.split(128)[:25], labels.split(128)[:25], strict=True))
    config = prune.fastnas.FastNASConfig().model_dump()
    for layers in config.values():  # these networks have fewer channels than its default of 32
        for options in layers.values():
            for name in options.keys() & {"channel_divisor", "feature_divisor"}:
                options[name] = 1
    with tempfile.TemporaryDirectory() as folder:
        pruned, _ = prune.prune(
            model=network,
            mode=[("fastnas", config)],
            constraints={"params": f"{100 * job['share']:.0f}%"},
            dummy_input=torch.zeros_like(example),
            config={
                "data_loader": loader,
                "score_func": lambda model: accuracy(model, validation),
                "checkpoint": str(Path(folder, "search.pth")),
                "collect_func": lambda batch: batch[0],
            },
        )
    small: nn.Module = pruned
    _train(small, splits, job["seed"] + 1, job["epochs"] - dense_epochs)
    return small.eval()


def main() -> None:
    """Gets the job, the file of the splits and that of the network."""
    job, data, output = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    splits = normalised(torch.load(data))
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        network = trained(job, splits)
    torch.save(network, output)


if __name__ == "__main__":
    main()
