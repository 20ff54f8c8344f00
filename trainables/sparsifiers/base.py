"""What every sparsifier offers to the training loop: masks of the weights that may be non-zero, and
when they change."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.options import Options, Registry, suggest
from slimfront.trainables.sparsifiers.masks import Tensors, cloned
from slimfront.trainables.structure.channel_groups import UnitGroup

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Bilinear), ("weight",)),
    **dict.fromkeys(_TRANSPOSED, ("weight",)),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
_MASK_STREAM = 0x6A09E667F3BCC909
"""Added to a training's seed for its masks, which must not repeat the numbers of its initial
weights."""


State = dict[str, Any]
"""All that a sparsifier needs to go on."""


@dataclass(frozen=True)
class Setting:
    """The training that a sparsifier is attached to.

    `examples(n)` gives n training examples, inputs (n, …) and targets (n, …), the same ones for the
    same seed; `loss` is the task's, of outputs and targets. `broadcast_from_rank0` makes tensors
    the same, in place, in all processes that share the training. `trained` says that the model
    begins with trained weights.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    total_steps: int
    seed: int
    examples: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    broadcast_from_rank0: Callable[[Iterable[Tensor]], None] = lambda _tensors: None
    trained: bool = False
    stays: Callable[[Sequence[UnitGroup]], Collection[str]] | None = None
    """Says of which of these groups of units compaction would leave zeros, by their names."""


def prunable_weights(model: nn.Module) -> Tensors:
    """The weights that may be dropped, by parameter name, in order.

    Those of linear, bilinear, convolutional and recurrent layers, and the projections of attention,
    which are linear layers in all but name, as are layers that are not of torch and have a `weight`
    of two axes or more and a `bias`; what several layers share is there once.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        for leaf in _weights_of(module):
            weight = getattr(module, leaf)
            if weight is None:
                continue
            full_name = leaf
            if name:
                full_name = f"{name}.{leaf}"
            found.setdefault(id(weight), (full_name, weight))
    return dict(found.values())


def _weights_of(module: nn.Module) -> tuple[str, ...]:
    """The names of a layer's own weights."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        own = []
        for name, _ in module.named_parameters(recurse=False):
            if name.startswith("weight_"):
                own.append(name)
        return tuple(own)
    for kind, names in _WEIGHTS.items():
        if isinstance(module, kind):
            return names
    if is_own_layer(module):
        return ("weight",)
    return ()


def is_own_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of a library's or a user's own that multiplies by a matrix, such
    as the Conv1D of transformers: it has a `weight` and a `bias`, which may be None. Tables have
    none, and the weights of norms have one axis, or others of size 1."""
    if any(kind.__module__.startswith("torch.nn.") for kind in type(module).__mro__[:-2]):
        return False
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or not hasattr(module, "bias"):
        return False
    return sum(size > 1 for size in weight.shape) > 1


def computed_weights(model: nn.Module) -> list[str]:
    """The layers whose weight is computed anew in each forward (weight_norm and other
    parametrisations), by name.

    What is set to zero in it is lost at once, so that nothing can act on it.
    """
    layers: tuple[type[nn.Module], ...] = (
        *_WEIGHTS,
        nn.RNNBase,
        nn.Embedding,
    )
    computed = []
    for name, module in model.named_modules():
        if not isinstance(module, layers):
            continue
        weight = getattr(module, "weight", None)
        held = isinstance(weight, nn.Parameter | None)
        parametrised = torch.nn.utils.parametrize.is_parametrized(module)
        if parametrised or not held:
            computed.append(name)
    return computed


def why_not_computed(sparsifier: str, weight: str) -> str:
    """Why a sparsifier does not act on a weight that is computed from others."""
    return (
        f"sparsifier {sparsifier}: '{weight}' is computed from other parameters, by weight_norm, "
        "torch.nn.utils.parametrize and the like, and does not stay 0; take that off, as with "
        "parametrize.remove_parametrizations, exclude the layer, or take another sparsifier"
    )


def frozen_growth(options: "Sparsifier", model: nn.Module) -> list[str]:
    """The weights that a sparsifier would move and that are not trained: what grows there stays
    0."""
    if not options.grows:
        return []
    weights = taking_part(model, options.exclude)
    return [f"'{name}'" for name, weight in weights.items() if not weight.requires_grad]


def out_of_reach(model: nn.Module, masked: Iterable[str] = ()) -> dict[str, int]:
    """The matrices that no sparsifier acts on, by parameter name with their number of weights:
    embeddings and the like; those that are `masked` are acted on all the same."""
    weights = prunable_weights(model)
    reached = {id(weight) for weight in weights.values()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    reached.update(id(parameters[name]) for name in masked)
    left = {}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1
        if not is_matrix:
            continue
        if id(parameter) in reached:
            continue
        left[name] = parameter.numel()
    return left


def taking_part(model: nn.Module, exclude: tuple[str, ...]) -> Tensors:
    """The prunable weights but for those excluded: by the name of the layer, or the `first` or the
    `last`.

    Raises:
        UserError: if a name is not that of a layer with prunable weights, or no layer is left.
    """
    weights = prunable_weights(model)
    layers = [name.removesuffix(".weight") for name in weights]
    shorthand = {"first": layers[:1], "last": layers[-1:]}
    left = dict(zip(layers, weights.items(), strict=True))
    for name in exclude:
        for layer in shorthand.get(name, [name]):
            if layer not in layers:
                hint = suggest(name, [*layers, *shorthand])
                raise UserError(
                    f"sparsifier.exclude: '{name}' is not a linear or convolutional layer; {hint}"
                )
            left.pop(layer, None)
    if not left:
        raise UserError(
            "sparsifier: there is no linear or convolutional layer in this network for it, or all "
            "are excluded"
        )
    return dict(left.values())


class Sparsifier(Options):
    """Options of a sparsifier. `exclude` names layers that stay dense: `first`, `last`, or by name.
    Biases are never dropped."""

    grows: ClassVar[bool] = False
    """Whether weights that were 0 may be trained later, so that it makes no sense for frozen
    ones."""
    needs_training: ClassVar[bool] = False
    """Whether it chooses by what happens in a training, so that it cannot act on a network that is
    not trained."""

    name: str
    exclude: tuple[str, ...] = ()

    @property
    def on(self) -> bool:
        """Whether it drops anything."""
        return True

    def refuse_computed(self, model: nn.Module) -> None:
        """Raises UserError where it would act on weights that are computed from others, in which
        masks do not last."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in taking_part(model, self.exclude):
            if name not in parameters:
                raise UserError(why_not_computed(self.name, name))

    def attach(self, setting: Setting) -> "ActiveSparsifier":
        """The sparsifier at work on a network that is about to be trained.

        Raises:
            UserError: if it cannot work on this network, or in a training of this length.
        """
        raise NotImplementedError(f"the sparsifier '{self.name}' does not say how it is attached")


class TargetSparsifier(Sparsifier):
    """A sparsifier with a free target: `sparsity` is the share of exactly zero weights in the
    layers that take part."""

    sparsity: float = Field(0.0, ge=0, lt=1)

    @property
    def on(self) -> bool:
        """Whether the target is above 0."""
        return self.sparsity > 0

    def range_of(self, name: str) -> dict[str, float | bool] | None:
        """Of `sparsity`: from half of the weights on."""
        if name != "sparsity":
            return None
        return {"low": 0.5, "high": 0.98}


SPARSIFIERS: Registry[Sparsifier] = Registry("sparsifier")


def all_kept(weight: Tensor) -> Tensor:
    """A mask that drops nothing."""
    return torch.ones_like(weight, dtype=torch.bool)


_OF_EACH_ENTRY = frozenset(
    (
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_diff", "exp_inf", "momentum_buffer"),
        *("square_avg", "grad_avg", "acc_delta", "sum", "prev", "step_size", "ax", "mu", "eta"),
        *("z", "momentum", "velocity", "m", "v", "previous_grad", "old", "slow_buffer", "slow"),
    )
)
"""What optimisers call what they remember of each entry of a weight."""


def _is_square(weight: Tensor) -> bool:
    return weight.dim() == 2 and weight.shape[0] == weight.shape[1]


def optimizers_within(optimizer: Any) -> list[Any]:
    """An optimiser, and those that it is made of, as Lookahead and SAM are."""
    found = [optimizer]
    for value in vars(optimizer).values():
        if isinstance(value, torch.optim.Optimizer) and value is not optimizer:
            found.append(value)
    return found


class ActiveSparsifier:
    """A sparsifier at work on one network. Its `masks`, by parameter name, are True where a weight
    may be non-zero.

    A kind of sparsifier overrides `due` and `update`, which sets the masks. Dropped weights are
    exactly 0 after every
    step: their gradients are zeroed before the optimiser sees them, and the moments that it kept of
    them once they are dropped.
    """

    begins_anew: ClassVar[bool] = False
    """Whether training has several rounds, each of which begins with weights of before."""

    def __init__(self, options: Sparsifier, setting: Setting) -> None:
        self.setting = setting
        self.weights = taking_part(setting.model, options.exclude)
        self.masks = {}
        for name, weight in self.weights.items():
            self.masks[name] = all_kept(weight)
        seed = setting.seed + _MASK_STREAM
        self.generator = torch.Generator()
        self.generator.manual_seed(seed % 2**63)

    def before_batch(self, step: int) -> None:
        """Called before the forward pass of training step `step`, of each part of its batch."""

    def close(self) -> None:
        """Called when it is not needed any more: leaves the network as it is."""

    def before_step(self, step: int) -> None:
        """Called between the backward pass and the optimiser's step of training step `step` (from
        0)."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                gradient = weight.grad
                if gradient is not None:
                    gradient.mul_(self.masks[name])

    def after_step(self, step: int) -> None:
        """Called after the optimiser's step: updates the masks when due, and zeroes what they
        drop."""
        with torch.no_grad():
            if self.due(step):
                self.update(step)
            for name, weight in self.weights.items():
                weight.mul_(self.masks[name])

    def due(self, step: int) -> bool:
        """Whether anything but masking happens in training step `step`."""
        return False

    def update(self, step: int) -> None:
        """Sets new masks by `set_masks`; called after a step that is due, without gradients."""

    @torch.no_grad()
    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Takes new masks: zeroes the weights that they drop, and what the optimiser remembers of
        them."""
        self.setting.broadcast_from_rank0(masks.values())
        for name, mask in masks.items():
            weight = self.weights[name]
            own_mask = self.masks[name]
            own_mask.copy_(mask)
            weight.mul_(mask)
            for moment in self._moments(weight):
                moment.mul_(mask)

    def _moments(self, weight: Tensor) -> Iterator[Tensor]:
        """What the optimiser, and those within it, remember of each entry of a weight."""
        for optimizer in optimizers_within(self.setting.optimizer):
            remembered = optimizer.state.get(weight, {})
            for name, value in remembered.items():
                if not isinstance(value, Tensor) or value.shape != weight.shape:
                    continue
                if _is_square(weight) and name not in _OF_EACH_ENTRY:
                    continue  # it may be of the rows, and of the columns, as Shampoo's
                yield value

    def random_scores(self) -> Tensors:
        """Independent uniform numbers in the shape of each weight, the same for the same seed on
        any device."""
        scores = {}
        for name, weight in self.weights.items():
            drawn = torch.rand(weight.shape, generator=self.generator)
            scores[name] = drawn.to(weight.device)
        return scores

    def progress(self, step: int) -> float:
        """How far the schedule of the learning rate is at `step`, 0 to 1."""
        return step / self.setting.total_steps

    def state_dict(self) -> State:
        """All that continuing needs: copies of the masks and the state of the random numbers."""
        masks = cloned(self.masks)
        random_state = self.generator.get_state()
        return {"masks": masks, "generator": random_state}

    def load_state_dict(self, state: State) -> None:
        """Continues bit-exactly where `state_dict` was taken.

        Raises:
            KeyError, ValueError: if it has other masks than this one; nothing is changed then.
        """
        masks = state["masks"]
        for name, mask in self.masks.items():
            if masks[name].shape != mask.shape:
                raise ValueError(
                    f"the mask of '{name}' is {tuple(masks[name].shape)}, and the weight "
                    f"{tuple(mask.shape)}"
                )
        for name, mask in self.masks.items():
            mask.copy_(masks[name])
        random_state = state["generator"]
        self.generator.set_state(random_state.cpu())
