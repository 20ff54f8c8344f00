"""OTO's HESSO (`only-train-once`): groups of channels that are redundant go step by step while it
trains."""

import importlib
import json
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
    batches,
    cosine,
    normalised,
    steps_of,
)

START, END, PERIODS = 0.1, 0.7, 10
"""When pruning begins and ends, as shares of the training, as ours; and in how many periods."""


def _fit_to_torch() -> None:
    """What the library wants of torch and is elsewhere now, or needs a GPU."""
    optimizers = importlib.import_module("torch.optim.optimizer")
    if not hasattr(optimizers, "required"):
        optimizers.required = object()  # type: ignore[attr-defined]
    exporter = "torch.onnx._internal.torchscript_exporter"
    sys.modules["torch.onnx._globals"] = importlib.import_module(f"{exporter}._globals")
    utils = importlib.import_module(f"{exporter}.utils")
    for name in ("_optimize_graph", "OperatorExportTypes"):
        if not hasattr(torch.onnx, name):
            there = utils if hasattr(utils, name) else torch._C._onnx
            setattr(torch.onnx, name, getattr(there, name))
    torch.Tensor.cuda = lambda self, *_args, **_options: self  # type: ignore[method-assign]


def trained(job: dict[str, Any], splits: Splits) -> nn.Module:
    """The compact network of a job: `network`, `seed`, `share` and `epochs`."""
    from only_train_once import OTO

    recipe = Recipe()
    torch.manual_seed(job["seed"])
    example = splits["train"][0][:1]
    network = NETWORKS[job["network"]](example.shape[1])
    oto = OTO(network, torch.zeros_like(example))
    steps = steps_of(splits, recipe, job["epochs"])
    optimizer = oto.hesso(
        variant="sgd",
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        first_momentum=recipe.momentum,
        target_group_sparsity=job["share"],
        start_pruning_step=int(START * steps),
        pruning_steps=int((END - START) * steps),
        pruning_periods=PERIODS,
    )
    network.train()
    for step, inputs, labels in batches(splits, recipe, job["seed"], job["epochs"]):
        for group in optimizer.param_groups:
            group["lr"] = cosine(recipe, step, steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        oto.construct_subnet(out_dir=folder)
        compact: nn.Module = torch.load(oto.compressed_model_path, weights_only=False)
    return compact.eval()


def main() -> None:
    """Gets the job, the file of the splits and that of the network."""
    job, data, output = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    _fit_to_torch()
    splits = normalised(torch.load(data))
    torch.save(trained(job, splits), output)


if __name__ == "__main__":
    main()
