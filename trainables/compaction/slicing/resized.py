"""Layers whose parameters were made smaller: they learn their new sizes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def parameter_like(before: Tensor, after: Tensor) -> Tensor:
    """A parameter in the place of a parameter."""
    after = after.clone(memory_format=torch.contiguous_format)
    if not isinstance(before, nn.Parameter):
        return after
    return nn.Parameter(after, before.requires_grad)


def replace_tensors(network: nn.Module, new: dict[int, Tensor]) -> None:
    """Puts tensors in the place of others, wherever those are."""
    for module in network.modules():
        held = [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for leaf, tensor in held:
            replacement = new.get(id(tensor))
            if replacement is not None:
                setattr(module, leaf, replacement)


def _settle_linear(module: nn.Linear) -> None:
    outputs, inputs = module.weight.shape
    module.out_features = outputs
    module.in_features = inputs


def _settle_conv(module: Any) -> None:
    rows, columns, *_ = module.weight.shape
    if isinstance(module, _TRANSPOSED):
        module.in_channels = rows
        module.out_channels = columns * module.groups
    else:
        module.out_channels = rows
        module.in_channels = columns * module.groups


def _settle_norm(module: Any) -> None:
    for leaf in ("weight", "running_mean"):
        tensor = getattr(module, leaf, None)
        if tensor is not None:
            module.num_features = len(tensor)


def _settle_recurrent(module: Any) -> None:
    ending = ""
    if isinstance(module, nn.RNNBase):
        ending = "_l0"
    _, inputs = getattr(module, f"weight_ih{ending}").shape
    _, hidden = getattr(module, f"weight_hh{ending}").shape
    module.input_size = inputs
    module.hidden_size = hidden


def _settle_embedding(module: nn.Embedding | nn.EmbeddingBag) -> None:
    _, width = module.weight.shape
    module.embedding_dim = width


def _settle_bilinear(module: nn.Bilinear) -> None:
    outputs, first_inputs, second_inputs = module.weight.shape
    module.out_features = outputs
    module.in1_features = first_inputs
    module.in2_features = second_inputs


def _settle_prelu(module: nn.PReLU) -> None:
    module.num_parameters = len(module.weight)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_CHANNEL_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_SETTLE: Sequence[tuple[Any, Callable[[Any], None]]] = (
    (nn.Linear, _settle_linear),
    (_CONVS, _settle_conv),
    (_CHANNEL_NORMS, _settle_norm),
    ((nn.RNNBase, nn.RNNCellBase), _settle_recurrent),
    ((nn.Embedding, nn.EmbeddingBag), _settle_embedding),
    (nn.Bilinear, _settle_bilinear),
    (nn.PReLU, _settle_prelu),
)


def settle(module: nn.Module) -> None:
    """Tells a layer whose parameters were made smaller its new sizes."""
    for kinds, tell in _SETTLE:
        if isinstance(module, kinds):
            tell(module)
            return
