"""Normalisation of inputs: what networks see is (x − mean) / std of the training split."""

from typing import Literal

import torch
from pydantic import field_validator
from torch import Tensor

from slimfront.trainables.data.transforms import channel_statistics
from slimfront.trainables.errors import UserError
from slimfront.trainables.options import Options

Numbers = float | tuple[float, ...]


class Constants(Options):
    """Mean and standard deviation of the user's own: one number, or one for each feature or
    channel."""

    mean: Numbers
    std: Numbers

    @field_validator("std")
    @classmethod
    def _above_zero(cls, std: Numbers) -> Numbers:
        values = std if isinstance(std, tuple) else (std,)
        if any(value <= 0 for value in values):
            raise ValueError("every standard deviation must be above 0")
        return std


_ROUNDING = 1e-6
"""A standard deviation of less than this share of the mean is what rounding made of a constant."""


Normalise = Literal["auto", "per_feature", "per_channel", "global", "none"] | Constants


def is_image(inputs: Tensor) -> bool:
    """Whether inputs are images as they are stored: uint8, (N, channels, height, width)."""
    return inputs.dtype == torch.uint8 and inputs.dim() == 4


def is_whole(inputs: Tensor) -> bool:
    """Whether inputs are whole numbers that are no images: token ids, say."""
    return not inputs.is_floating_point() and not is_image(inputs)


def chosen(asked: Normalise, inputs: Tensor) -> Normalise:
    """What is done to inputs: what was asked for, or what `auto` stands for."""
    if asked != "auto":
        return asked
    if is_image(inputs):
        return "per_channel"
    if is_whole(inputs):
        return "none"
    if inputs.dim() == 2:
        return "per_feature"
    return "global"


def stored_type(inputs: Tensor, asked: Normalise) -> torch.dtype:
    """The type that inputs are stored in: images as uint8, truths as bool and whole numbers as
    int64 unless they are to be normalised, else float32."""
    if is_image(inputs):
        return torch.uint8
    if not is_whole(inputs) or chosen(asked, inputs) != "none":
        return torch.float32
    if inputs.dtype == torch.bool:
        return torch.bool
    return torch.int64


def constants(how: Normalise, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, in a shape that goes with inputs (N, *input_shape)."""
    if isinstance(how, Constants):
        return _given(how.mean, inputs), _given(how.std, inputs)
    if is_image(inputs):
        return _of_images(how, inputs)
    if how == "global":
        mean = inputs.mean()
        std = inputs.std()
        # Constant inputs become zeros, not NaN.
        return mean, torch.where(std > 0, std, 1.0)
    over = [0]
    if how == "per_channel":
        if inputs.dim() < 3:
            raise UserError(
                f"data.normalise is per_channel, and inputs of the shape {tuple(inputs.shape[1:])} "
                "have no channels; set it to per_feature"
            )
        over += range(2, inputs.dim())
    mean = inputs.mean(over, keepdim=True)[0]
    std = inputs.std(over, keepdim=True)[0]
    rounding = _ROUNDING * mean.abs()
    varies = std > rounding
    return mean, torch.where(varies, std, 1.0)


def _of_images(how: Normalise, inputs: Tensor) -> tuple[Tensor, Tensor]:
    if how == "none":
        return torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    if how == "per_feature":
        raise UserError(
            "data.normalise is per_feature, and uint8 images are normalised per_channel or global"
        )
    if how == "per_channel":
        return channel_statistics(inputs)
    as_one_channel = inputs.reshape(len(inputs), 1, -1, inputs.shape[3])
    return channel_statistics(as_one_channel)


def _given(constants: Numbers, inputs: Tensor) -> Tensor:
    values = torch.tensor(constants)
    if values.dim() == 0:
        return values
    count = len(values)
    shape = tuple(inputs.shape[1:])
    features = shape[0]
    if count != features:
        raise UserError(
            f"data.normalise has {count} numbers, and inputs of the shape "
            f"{shape} have {features} features or channels"
        )
    places = [1] * (len(shape) - 1)
    return values.reshape(-1, *places)
