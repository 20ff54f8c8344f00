"""What is measured on a compact network: numbers of the network as it would ship."""

import io
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

MEASURES = ("params", "nonzero_params", "layers", "flops", "bytes")
"""The names of the measures, all of them better when smaller."""


@torch.no_grad()
def measure(network: nn.Module, inputs: Tensor) -> dict[str, int]:
    """The measures of a network.

    Args:
        network: the network as it would ship.
        inputs: (N, *input_shape), at least one real input.

    Returns:
        `params`: entries of all parameters; `nonzero_params`: those that are not exactly 0; `layers`: linear and
        convolutional layers; `flops`: floating-point operations for one input (a multiply-add is two, zeros count),
        by torch's counter; `bytes`: size of the saved state dict, dense, uncompressed.
    """
    parameters = list(network.parameters())
    training = network.training
    network.eval()
    try:
        with FlopCounterMode(display=False) as counter:
            network(inputs[:1])
    finally:
        network.train(training)
    saved = io.BytesIO()
    torch.save(network.state_dict(), saved)
    return {
        "params": sum(p.numel() for p in parameters),
        "nonzero_params": sum(int(p.count_nonzero()) for p in parameters),
        "layers": sum(isinstance(module, _WEIGHT_LAYERS) for module in network.modules()),
        "flops": counter.get_total_flops(),
        "bytes": saved.tell(),
    }


@torch.no_grad()
def accuracy(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    batch_size: int = 4096,
    prepare: Callable[[Tensor], Tensor] = lambda inputs: inputs,
) -> float:
    """The share of examples whose largest logit is at the label, in evaluation mode; `inputs` (N, …), `labels` (N,).

    `prepare` makes what the network sees of a batch of inputs: `Dataset.prepare`, for inputs as a data set stores them.
    """
    training = network.training
    network.eval()
    try:
        correct = sum(
            int((network(prepare(x)).argmax(1).to(y.device) == y).sum())
            for x, y in zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
        )
    finally:
        network.train(training)
    return correct / len(labels)
