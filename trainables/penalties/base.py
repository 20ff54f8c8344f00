"""What every penalty offers to the training loop."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Generic, Literal, Protocol, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.options import Options, Registry, suggest
from slimfront.trainables.structure.tracing.trace import traced_once


class ActivePenalty(Protocol):
    """A penalty at work on one network."""

    @property
    def targets(self) -> int:
        """How many groups of weights, or stages of layers, it acts on."""

    def before_batch(self, step: int, scale: float) -> None:
        """Called before the forward pass of training step `step` (from 0); `scale` is the share of
        the full strength now."""

    def loss(self) -> Tensor | None:
        """Called after the forward pass: a scalar to add to the task loss, or None."""

    def proximal(self, step_size: float | Tensor) -> None:
        """Called after the optimiser's step of size `step_size`, a number or a scalar on the
        device: the penalty's exact step."""

    def close(self) -> None:
        """Takes away whatever was attached to the network."""


class Penalty(Options):
    """Options of a penalty. `strength` is its factor (λ or β); 0 switches it off.

    It is 0 for the first `warmup` epochs, and rises to the full strength over the next `ramp`
    epochs: linearly from 0, or by the same factor in each epoch from `ramp_from` of the full
    strength, so that one training passes through a whole range of strengths.
    """

    nothing_to_do: ClassVar[str] = "there is no layer in this network that it acts on"
    least_batch: ClassVar[int] = 1
    """The smallest batch that it can look at."""

    strength: float = Field(0.0, ge=0)
    warmup: float = Field(0.0, ge=0)
    ramp: float = Field(0.0, ge=0)
    ramp_from: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _a_ramp_has_a_length(self) -> Self:
        if self.ramp_from and not self.ramp:
            raise ValueError(
                "ramp_from says where a ramp begins, and ramp is 0; set ramp to the epochs over "
                "which the strength rises"
            )
        return self

    @property
    def on(self) -> bool:
        """Whether the strength is above 0."""
        return self.strength > 0

    def scale(self, epoch: float) -> float:
        """The share of the full strength at an epoch (from 0, fractional within an epoch)."""
        if epoch < self.warmup:
            return 0.0
        if self.ramp == 0:
            return 1.0
        since_warmup = epoch - self.warmup
        risen = min(since_warmup / self.ramp, 1.0)
        if self.ramp_from:
            left = 1 - risen
            return float(self.ramp_from**left)
        return risen

    def attach(self, model: nn.Module, sample: Tensor) -> ActivePenalty:
        """The penalty on `model`; `sample` (N, *input_shape) is a batch of real inputs to look at
        shapes with.

        Raises:
            UserError: if the penalty must trace the network, and that fails.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it is attached")


PENALTIES: Registry[Penalty] = Registry("penalty")

GroupT = TypeVar("GroupT")

Tensors = Sequence[Tensor]
StepSize = float | Tensor
"""How long the optimiser's step is: a number, or a scalar on the device."""


class StepSizes:
    """How long the optimiser's step is for each parameter that it trains, or for all of them."""

    def __init__(self, sizes: StepSize | Mapping[int, StepSize]) -> None:
        """`sizes` are by `id` of the parameter, where those that are not trained are left out; or
        one size, of all parameters."""
        self.of_all: StepSize | None = None
        self.of_parameters: Mapping[int, StepSize] = {}
        if isinstance(sizes, Mapping):
            self.of_parameters = sizes
        else:
            self.of_all = sizes

    def __call__(self, tensors: Tensors) -> StepSize | None:
        """That of the largest of some parameters; None if one of them is not trained."""
        if self.of_all is not None:
            return self.of_all
        if not tensors:
            return self.largest
        for tensor in tensors:
            if id(tensor) not in self.of_parameters:
                return None
        largest = max(tensors, key=Tensor.numel)
        return self.of_parameters[id(largest)]

    @property
    def largest(self) -> StepSize:
        """The largest of all."""
        if self.of_all is not None:
            return self.of_all
        return max(self.of_parameters.values(), default=0.0)


@dataclass(frozen=True)
class ParameterRef:
    """A parameter by the module that holds it: what is held there changes where many candidates are
    trained at once."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        """The parameter, as it is now."""
        tensor: Tensor = getattr(self.module, self.name)
        return tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameter alone."""
        return (self.tensor,)


def parameter_ref(model: nn.Module, name: str) -> ParameterRef:
    """The parameter of that name."""
    path, _, leaf = name.rpartition(".")
    holder = model.get_submodule(path)
    return ParameterRef(holder, leaf)


RELATIVE_RANGE = {"low": 0.3, "high": 10.0, "log": True}
"""Of strengths in units of the training: something begins to go at about 1."""


class GroupPenalty(Penalty):
    """A penalty on groups of weights, by its closed-form proximal step (`form: proximal`) or its
    gradient.

    `layers` gives single groups a strength of their own, by the name of the layer. With `relative`
    strengths are in units of the training: see `penalties.relative`.
    """

    form: Literal["proximal", "gradient"] = "proximal"
    relative: bool = False
    layers: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)

    @property
    def on(self) -> bool:
        """Whether any strength is above 0."""
        of_layers = self.layers.values()
        strongest = max([self.strength, *of_layers])
        return strongest > 0

    def range_of(self, name: str) -> dict[str, float | bool] | None:
        """Of `strength`, in units of the training alone: from where nothing goes yet to where a
        network of one's own is hardly left."""
        if name != "strength":
            return None
        if not self.relative:
            raise ValueError(
                "how strong is strong differs from training to training; it has a range of its own "
                "in units of the training alone: set relative to true"
            )
        return dict(RELATIVE_RANGE)

    def strength_of(self, layer: str) -> float:
        """The full strength for the group of a layer."""
        return self.layers.get(layer, self.strength)


class ActiveGroups(Generic[GroupT]):
    """A group penalty at work: `norm` gives the penalty of a group, `shrink` takes its proximal
    step in place.

    Where groups are single parameters (`ParameterRef`) and the operator takes each entry by itself,
    `shrink_entries` is the same for a tensor and a number, and faster.
    """

    def __init__(
        self,
        options: GroupPenalty,
        groups: dict[str, GroupT],
        norm: Callable[[GroupT], Tensor],
        shrink: Callable[[GroupT, Tensor], None],
        shrink_entries: Callable[[Tensor, float], None] | None = None,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        """`groups` are by the name of their layer, and so are `factors` of their strengths, which
        are 1 if left out; raises UserError if `options.layers` names none of them."""
        check_names(options, groups)
        self.options = options
        self.groups = groups
        self.norm = norm
        self.shrink = shrink
        self.shrink_entries = shrink_entries
        self.factors = factors or {}
        self.scale = 1.0

    @property
    def targets(self) -> int:
        """The number of groups."""
        return len(self.groups)

    def strengths(self, options: GroupPenalty) -> list[float]:
        """The full strengths that `options` give its groups, 0 where they are off."""
        return [self.factor(name) * options.strength_of(name) for name in self.groups]

    def factor(self, name: str) -> float:
        """What the strength of a group is multiplied by."""
        return self.factors.get(name, 1.0)

    def strength(self, name: str) -> float:
        """The present strength for a group."""
        return self.scale * self.factor(name) * self.options.strength_of(name)

    def before_batch(self, step: int, scale: float) -> None:
        """Takes the share of the full strength."""
        self.scale = scale

    def loss(self) -> Tensor | None:
        """Σ strength · norm over the groups in the gradient form; None in the proximal form."""
        if self.options.form == "proximal":
            return None
        if not self.groups or self.scale == 0:
            return None
        strengths = [self.strength(name) for name in self.groups]
        return self.weighted(strengths)

    def weighted(self, strengths: Sequence[float | Tensor]) -> Tensor:
        """Σ strength · norm over the groups, of one strength (a scalar) each; a scalar."""
        terms = []
        groups = self.groups.values()
        for strength, group in zip(strengths, groups, strict=True):
            norm = self.norm(group)
            weighted = strength * norm
            terms.append(weighted)
        all_terms = torch.stack(terms)
        return all_terms.sum()

    @torch.no_grad()
    def proximal(self, step_size: StepSize) -> None:
        """One proximal step with threshold `step_size` · strength on each group, in place; nothing
        in the gradient form."""
        if self.options.form == "gradient":
            return
        self.proximal_of_each(StepSizes(step_size))

    @torch.no_grad()
    def proximal_of_each(self, sizes: StepSizes) -> None:
        """As `proximal`, each group with the step size of its parameters; those that are not
        trained stay."""
        if self.options.form == "gradient":
            return
        thresholds: dict[Hashable, Tensor] = {}
        for name, group in self.groups.items():
            strength = self.strength(name)
            size = sizes.of_all
            if size is None:
                size = sizes(_tensors(group))
            if strength == 0 or size is None:
                continue
            threshold = size * strength
            key: Hashable = threshold
            if isinstance(threshold, Tensor):
                key = (id(size), strength)
            elif threshold == 0:
                continue
            elif self.shrink_entries is not None:
                assert isinstance(group, ParameterRef)
                self.shrink_entries(group.tensor, threshold)
                continue
            if key not in thresholds:
                thresholds[key] = torch.as_tensor(threshold).float()
            self.shrink(group, thresholds[key])

    def not_trained(self, sizes: StepSizes) -> list[str]:
        """The groups that have a parameter which the optimiser does not train."""
        found = []
        for name, group in self.groups.items():
            size = sizes(_tensors(group))
            if size is None:
                found.append(name)
        return found

    @torch.no_grad()
    def finish_where(self, other: "ActiveGroups[GroupT]") -> None:
        """Makes those groups zero, by the penalty's norm, that are zero in `other`, the same
        penalty on a network of the same structure."""
        for name, group in other.groups.items():
            size = _size(group)
            # In half precision so many epsilons are half of the size.
            precision = min(torch.finfo(size.dtype).eps, torch.finfo(torch.float32).eps)
            rounding = _ROUNDING * precision * size
            norm = other.norm(group)
            is_zero = norm <= rounding
            if not is_zero:
                continue
            mine = self.groups[name]
            first = _tensors(mine)[0]
            device = first.device
            everything = torch.full_like(size, math.inf, device=device)
            self.shrink(mine, everything)

    def phase(self, step: int, scale: float) -> Hashable:
        """Equal for two training steps in which it computes the same; see `graphs`."""
        return scale

    def close(self) -> None:
        """Nothing was attached."""


_ROUNDING = 64
"""A norm down to so many machine epsilons of a group's size is rounding."""


def _tensors(group: object) -> Tensors:
    """The parameters of a group of weights; a plug-in's groups may be anything, of which none is
    known."""
    if hasattr(group, "parameters"):
        # What `tensors` gives may be views of them.
        return [parameter.tensor for parameter in group.parameters]
    if isinstance(group, list):
        found: list[Tensor] = []
        for member in group:
            found.extend(_tensors(member))
        return found
    return tuple(getattr(group, "tensors", ()))


def _size(group: object) -> Tensor:
    """The ℓ2 norm of all parameters of a group, a scalar."""
    squares = []
    for tensor in _tensors(group):
        of_tensor = tensor.square().sum()
        squares.append(of_tensor)
    total = torch.stack(squares).sum()
    return total.sqrt()


def check_penalties(penalties: Mapping[str, Penalty], model: nn.Module, sample: Tensor) -> None:
    """Finds out before training if every penalty has something to act on; `sample` as in
    `Penalty.attach`.

    Raises:
        UserError: if one has not, cannot trace the network, or names a layer that is not there.
    """
    with traced_once():
        for name, options in penalties.items():
            active = options.attach(model, sample)
            active.close()
            if active.targets == 0:
                raise UserError(
                    f"penalties.{name}: {options.nothing_to_do}; leave it out, or choose another "
                    "model"
                )


def check_names(options: GroupPenalty, groups: dict[str, GroupT]) -> None:
    """Raises UserError if `options.layers` names a layer that the penalty does not act on."""
    for name in options.layers:
        if name in groups:
            continue
        penalty = type(options).__name__
        hint = suggest(name, groups)
        raise UserError(f"penalties: '{name}' is not a layer that {penalty} acts on; {hint}")


def root(squares: Tensor) -> Tensor:
    """The square roots of norms squared, any shape; the gradient of what is 0 is 0, not NaN."""
    positive = squares > 0
    safe = torch.where(positive, squares, 1)
    return safe.sqrt() * positive


def shrink_factor(norms: Tensor, threshold: Tensor) -> Tensor:
    """What the proximal operator of `threshold` · norm multiplies a group by: max(0, 1 − threshold
    / norm), in the shape of `norms`."""
    least = torch.finfo(norms.dtype).tiny
    positive = norms.clamp_min(least)
    taken = threshold / positive
    factors = 1 - taken
    return factors.clamp(min=0)
