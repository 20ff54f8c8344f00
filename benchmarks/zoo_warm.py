"""Imported by the process that those of the zoo are forked from: exports a network, so that what
torch's exporters import and set up is there."""

import io

import torch
import tqdm
from torch import nn

from benchmarks import zoo_steps
from slimfront.trainables.shipping.formats import need_onnx

__all__ = ["zoo_steps"]

need_onnx()
tqdm.tqdm.monitor_interval = 0  # no thread, which forks would lack
torch.set_num_threads(1)
_exported = torch.export.export(nn.Linear(2, 2), (torch.zeros(2, 2),))
torch.onnx.export(_exported, (), io.BytesIO(), dynamo=True, verbose=False)
