"""The features of layers, for penalties that compare them: which layers, and their outputs caught
by forward hooks."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimfront.trainables.errors import UserError
from slimfront.trainables.options import suggest
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.torch_internals import forward_hooks

ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Tanh,
    nn.Sigmoid,
)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
"""Shapes per example of what modules give, by name."""
_OURS = "keeps_features"


class _Hook:
    """A forward hook of `Features` on one module. Copies and files of the network have an idle one
    in its place."""

    keeps_features = True

    def __init__(self, features: "Features", name: str) -> None:
        self.features = features
        self.name = name

    def __call__(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.features.see(self.name, output)

    def __deepcopy__(self, _memo: object) -> "_IdleHook":
        return _IdleHook()

    def __reduce__(self) -> tuple[type["_IdleHook"], tuple[()]]:
        return _IdleHook, ()


class _IdleHook:
    """What a copy of a network has of a hook."""

    keeps_features = True

    def __call__(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        """Nothing."""


class Features:
    """While `watching`, forward hooks on named modules keep outputs, the first `samples` of a batch
    (−1: all), of passes with gradients.

    Else there are no hooks, so that `torch.compile` sees the network alone, unless they are to
    `stay`.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], samples: int = -1, *, any_pass: bool = False
    ) -> None:
        """With `any_pass`, those of passes without gradients too."""
        self.samples = samples
        self.any_pass = any_pass
        self.kept: dict[str, Tensor] = {}
        self.hooks = []
        for name in names:
            module = model.get_submodule(name)
            self.hooks.append((module, _Hook(self, name)))
        self.handles: list[RemovableHandle] = []
        self.watching = False
        """Whether the coming batch is kept."""
        self.stays = False

    def stay(self) -> None:
        """Leaves the hooks on the network until `close`: a network that is compiled has those of
        its first run for good."""
        self.stays = True
        self._attach()

    def see(self, name: str, output: Tensor) -> None:
        """Keeps what a module has just given, where this pass is watched."""
        if not self.watching:
            return
        if not self.any_pass and not torch.is_grad_enabled():
            return
        if self.samples != -1:
            output = output[: self.samples]
        self.kept[name] = output

    def watch(self, watching: bool) -> None:
        """Forgets what was kept, and keeps the coming batch or does not."""
        self.kept.clear()
        self.watching = watching
        if watching:
            self._attach()
        elif not self.stays:
            self._detach()

    def _attach(self) -> None:
        if self.handles:
            return
        for module, hook in self.hooks:
            handle = module.register_forward_hook(hook)
            self.handles.append(handle)

    def _detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def take(self) -> dict[str, Tensor]:
        """What was kept of the batch, by name; nothing is kept any longer."""
        taken = dict(self.kept)
        self.watch(False)
        return taken

    def close(self) -> None:
        """Removes the hooks and what was kept."""
        self.stays = False
        self.watch(False)


def remove_hooks(copied: nn.Module) -> None:
    """Takes the hooks of `Features` off a copy of a network in training, whose own hooks stay."""
    for module in copied.modules():
        hooks = forward_hooks(module)
        ours = [number for number, hook in hooks.items() if hasattr(hook, _OURS)]
        for number in ours:
            del hooks[number]


def output_shapes(model: nn.Module, sample: Tensor) -> Shapes:
    """Shapes per sample of the modules that give one tensor once in a forward pass of `sample` (N,
    …), in order of calls."""
    calls: dict[str, list[object]] = defaultdict(list)

    def listen(name: str, module: nn.Module) -> RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            calls[name].append(output)

        return module.register_forward_hook(hook)

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(listen(name, module))
    try:
        with evaluating(model), torch.no_grad():
            model(sample[:2])
    finally:
        for handle in handles:
            handle.remove()
    shapes = {}
    for name, outputs in calls.items():
        if len(outputs) != 1:
            continue
        (output,) = outputs
        if isinstance(output, Tensor) and output.dim() > 1:
            _, *shape = output.shape
            shapes[name] = tuple(shape)
    return shapes


def by_shape(names: Iterable[str], shapes: Shapes) -> list[list[str]]:
    """The stages: two or more of the layers with outputs of one shape, in order."""
    groups: defaultdict[Shape, list[str]] = defaultdict(list)
    for name in names:
        shape = shapes[name]
        groups[shape].append(name)
    stages = []
    for group in groups.values():
        if len(group) > 1:
            stages.append(group)
    return stages


def find_layers(model: nn.Module, shapes: Shapes) -> list[str]:
    """The layers whose features are compared: blocks if the network is made of them, else
    activations, else weight layers.

    Blocks are modules of a user's class (not `nn.Sequential` and the like) that hold weights and at
    least two of which have outputs of one shape; of blocks within blocks, the outermost. In a
    residual network these are the residual blocks.

    Args:
        shapes: as `output_shapes` gives them.
    """
    modules = {name: model.get_submodule(name) for name in shapes}
    blocks = _blocks(modules, shapes)
    if len(blocks) > 1:
        return blocks
    activations = []
    weighted = []
    for name, module in modules.items():
        if isinstance(module, ACTIVATIONS):
            activations.append(name)
        if isinstance(module, WEIGHTED):
            weighted.append(name)
    if len(activations) > 1:
        return activations
    return weighted


def _blocks(modules: dict[str, nn.Module], shapes: Shapes) -> list[str]:
    """The blocks among the modules, as `find_layers` says what they are."""
    kinds: dict[type, list[str]] = defaultdict(list)
    for name, module in modules.items():
        if _may_be_block(module):
            kinds[type(module)].append(name)
    repeated: set[str] = set()
    for names in kinds.values():
        if by_shape(names, shapes):
            repeated.update(names)
    prefixes = tuple(f"{name}." for name in repeated)
    outermost = []
    for name in modules:
        if name not in repeated:
            continue
        is_inner = name.startswith(prefixes)
        if not is_inner:
            outermost.append(name)
    return outermost


def _may_be_block(module: nn.Module) -> bool:
    """Whether it is of a user's class that has parts, and weights among them."""
    if isinstance(module, CONTAINERS):
        return False
    if not list(module.children()):
        return False
    return any(isinstance(inner, WEIGHTED) for inner in module.modules())


def check_layers(names: Sequence[str], shapes: Shapes) -> None:
    """Raises UserError if a named layer has no features: it is not there, or does not give one
    tensor once."""
    for name in names:
        if name not in shapes:
            hint = suggest(name, shapes)
            raise UserError(
                f"penalties: '{name}' is not a module that gives one tensor once in a forward "
                f"pass; {hint}"
            )
