"""What networks take: one tensor, or several by name.

Inside of slimfront a network always has one argument. Several tensors are `Several`, which has
those parts of a tensor's interface that batches need, so that what passes inputs along takes
either. A network whose forward takes each tensor as an argument of its own is given one argument by
`models.adapted`. Tensors that forward takes by their places are named "0", "1", ….
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimfront.trainables.errors import UserError
from slimfront.trainables.torch_internals import register_container

if TYPE_CHECKING:
    _Base = Tensor  # for type checkers it is a tensor, since it goes wherever inputs go
else:
    _Base = object


Change = Callable[[Tensor], Tensor]
"""Makes another tensor of one."""


class Several(_Base):
    """Tensors by name, of the same number of examples N: their first axis."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.named = dict(named)

    def __getitem__(self, chosen: Any) -> Any:
        """A tensor by its name, or some of the examples."""
        if isinstance(chosen, str):
            return self.named[chosen]
        return self.each(lambda tensor: tensor[chosen])

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.first)

    def each(self, change: Change) -> "Several":
        """The same with every tensor changed."""
        changed = {}
        for name, tensor in self.named.items():
            changed[name] = change(tensor)
        return Several(changed)

    @property
    def tensors(self) -> Collection[Tensor]:
        """All of them, without their names."""
        return self.named.values()

    @property
    def first(self) -> Tensor:
        """The first tensor."""
        return next(iter(self.tensors))

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where they are."""
        return self.first.device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """Whether that is a GPU."""
        return self.first.is_cuda

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """How many bytes all have."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def numel(self) -> int:
        """How many numbers all have."""
        return sum(tensor.numel() for tensor in self.tensors)

    def split(self, size: int) -> Iterator["Several"]:  # type: ignore[override]
        """The examples in batches of `size`, the last one smaller."""
        examples = len(self)
        for start in range(0, examples, size):
            end = start + size
            yield self[start:end]

    def tensor_split(self, parts: int) -> "list[Several]":  # type: ignore[override]
        """The examples in so many parts of about the same size."""
        by_name = {}
        for name, tensor in self.named.items():
            by_name[name] = tensor.tensor_split(parts)
        split = []
        for number in range(parts):
            own = {name: pieces[number] for name, pieces in by_name.items()}
            split.append(Several(own))
        return split

    def index_select(self, dim: int, indices: Tensor) -> "Several":
        """The examples at these places."""
        return self.each(lambda tensor: tensor.index_select(dim, indices))

    def to(self, *args: Any, **options: Any) -> "Several":
        """As of a tensor, each."""
        return self.each(lambda tensor: tensor.to(*args, **options))

    def cpu(self) -> "Several":  # type: ignore[override]
        """As of a tensor, each."""
        return self.each(lambda tensor: tensor.cpu())

    def clone(self) -> "Several":  # type: ignore[override]
        """As of a tensor, each."""
        return self.each(lambda tensor: tensor.clone())


register_container(
    Several,
    lambda several: (list(several.named.values()), list(several.named)),
    lambda values, names: Several(dict(zip(names, values, strict=True))),
    "slimfront.Several",
)


@dataclass(frozen=True)
class Call:
    """How a network of the user's is called: with tensors of these names, and which of its outputs
    counts. See `models.adapted`."""

    names: tuple[str, ...] | None = None
    """None: with one tensor."""
    output: str | int | None = None
    """A key of what forward returns, or a place in it; None: it returns one tensor."""

    def as_plain(self) -> dict[str, Any]:
        """As plain data."""
        names = None
        if self.names is not None:
            names = list(self.names)
        return {"names": names, "output": self.output}

    @classmethod
    def of(cls, plain: Mapping[str, Any] | None) -> "Call":
        """What `as_plain` made; None: as networks of version 0.1."""
        if plain is None:
            return cls()
        names = plain["names"]
        if names is not None:
            names = tuple(names)
        return cls(names, plain["output"])


def each(inputs: Tensor, change: Change) -> Tensor:
    """The same inputs with every tensor changed."""
    if isinstance(inputs, Several):
        return inputs.each(change)
    return change(inputs)


def tensors(inputs: Tensor) -> dict[str, Tensor]:
    """All tensors of the inputs by name; a single one has none."""
    if isinstance(inputs, Several):
        return inputs.named
    return {"": inputs}


def as_one(inputs: Any) -> Tensor:
    """Inputs as a user calls a network with them, as one argument.

    Args:
        inputs: a tensor (N, …), a sequence of tensors by their places, or a mapping of tensors by
            the names of forward's arguments.

    Raises:
        UserError: if they are something else.
    """
    if isinstance(inputs, Tensor | Several):
        return inputs
    if isinstance(inputs, Mapping):
        named: dict[str, Tensor] = dict(inputs)
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
        named = {str(place): tensor for place, tensor in enumerate(inputs)}
    else:
        named = {"": inputs}
    for name, tensor in named.items():
        if isinstance(tensor, Tensor):
            continue
        where = "the inputs"
        if name:
            where = f"'{name}' of the inputs"
        kind = type(tensor).__name__
        raise UserError(
            f"{where} is a {kind}; inputs are a tensor, a sequence of "
            "tensors, or a mapping of tensors by the names of forward's arguments"
        )
    if not named:
        raise UserError("the inputs are empty; give a batch of real inputs")
    refuse_without_examples(named)
    if list(named) == ["0"]:
        alone: Tensor = named["0"]
        return alone
    return Several(named)


def refuse_without_examples(named: Mapping[str, Tensor]) -> None:
    """Raises UserError for tensors that cannot be cut into batches, such as the edges of a graph:
    they are looked at a few examples at a time."""
    first, *_ = named
    for name, tensor in named.items():
        if tensor.dim() == 0:
            raise UserError(
                f"'{name}' of the inputs is a number, and each is a tensor whose first axis is "
                "that of the examples; give it the shape (N,) or (1,)"
            )
        count = len(tensor)
        wanted = len(named[first])
        if count != wanted and 1 not in (count, wanted):
            raise UserError(
                f"'{name}' of the inputs has {count:,} examples and '{first}' {wanted:,}: networks "
                "are looked at with a few examples, so that the first axis of each input must be "
                "that of the examples; keep what is the same for all of them, such as the edges of "
                "a graph, as a buffer of the network"
            )


def by_place(names: Sequence[str]) -> bool:
    """Whether tensors of these names are given by their places."""
    return all(name.isdigit() for name in names)


def joined(first: Tensor, second: Tensor) -> Tensor:
    """The examples of the first, and then those of the second."""
    if not isinstance(first, Several):
        return torch.cat([first, second])
    others = tensors(second)
    together = {}
    for name, tensor in first.named.items():
        other = others[name]
        together[name] = torch.cat([tensor, other])
    return Several(together)


def repeated(inputs: Tensor, count: int) -> Tensor:
    """The same inputs for `count` networks: (count, N, …)."""

    def of_all(tensor: Tensor) -> Tensor:
        own_shape = tensor.shape
        return tensor.expand(count, *own_shape)

    return each(inputs, of_all)


def shape_of_one(inputs: Tensor) -> tuple[int, ...]:
    """The shape of one example, without the batch; of the first tensor where there are several."""
    tensor = inputs
    if isinstance(inputs, Several):
        tensor = inputs.first
    shape = tensor.shape[1:]
    return tuple(shape)


def in_float64(inputs: Tensor) -> Tensor:
    """The same in float64; whole numbers, which may be indices, stay."""
    return each(inputs, _in_float64)


def _in_float64(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.double()
    return tensor


def described(inputs: Tensor) -> str:
    """Types and shapes in words: `float32 (N, 3, 8, 8)`."""
    if isinstance(inputs, Several):
        parts = []
        for name, tensor in inputs.named.items():
            in_words = described(tensor)
            parts.append(f"`{name}` {in_words}")
        return ", ".join(parts)
    dtype = str(inputs.dtype)
    dtype = dtype.removeprefix("torch.")
    sizes = shape_of_one(inputs)
    shape = ", ".join(map(str, sizes))
    if shape:
        return f"{dtype} (N, {shape})"
    return f"{dtype} (N,)"
