"""Tracing through torch's transformers, encoders and decoders, whose own code torch.fx cannot
follow: it chooses between kernels, and by masks."""

from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any, TypeGuard

from torch import Tensor, fx, nn

from slimfront.trainables.structure.tracing.while_tracing import Counted, WhileTracing
from slimfront.trainables.torch_internals import FORWARD_HELPERS, NORM, of_any_rank

Masks = dict[str, Any]
"""The arguments of attention that say what it may look at."""

_CONTAINERS = (
    *(nn.Sequential, nn.Transformer),
    *(nn.TransformerEncoder, nn.TransformerEncoderLayer),
    *(nn.TransformerDecoder, nn.TransformerDecoderLayer),
)
_OF_FORWARD = ("forward", "__call__", *FORWARD_HELPERS, "weight", "bias")
"""The forward of a module of torch.nn, and what it calls or reads of itself, which a subclass could
change."""


class Tracer(fx.Tracer):
    """torch.fx's tracer, which sees the layers within `nn.Transformer` and its parts.

    A subclass of a module of torch.nn that computes what that does is one of them; of any other it
    sees the code. With a `sample` (N, *input_shape), shapes can be unpacked.
    """

    def __init__(self, sample: Tensor | None = None) -> None:
        super().__init__()
        self.sample = sample
        self.running: WhileTracing | None = None

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The sizes of a shape one by one, and what else has as many parts for all inputs."""
        parts: Any = obj
        return iter([parts[place] for place in range(self.count(obj))])

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for what a node makes."""
        return Counted(node, self)

    def count(self, obj: fx.Proxy) -> int:
        """How long a shape is, or what else is as long for all inputs.

        Raises:
            fx.proxy.TraceError: if that is not known.
        """
        running = self._running()
        count = None if running is None else running.count(obj.node)
        if count is None:
            raise fx.proxy.TraceError(f"how long '{obj.node}' is follows from the inputs")
        return count

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Which way the code goes, where that is the same whatever the sizes of inputs are."""
        return bool(self.number(obj))

    def number(self, obj: fx.Proxy) -> bool | int | float:
        """A number that is the same whatever the sizes of the inputs are.

        Raises:
            fx.proxy.TraceError: if that is not so.
        """
        running = self._running()
        number = None if running is None else running.number(obj.node)
        if number is None:
            super().to_bool(obj)
            raise fx.proxy.TraceError(f"'{obj.node}' is read as a number")
        return number

    def is_number_of_inputs(self, obj: fx.Proxy) -> bool:
        """Whether it is a number that follows from the sizes of the inputs."""
        running = self._running()
        return running is not None and running.follows_inputs(obj.node)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """What a module holds: itself while the part that there is runs, else what stands for
        it."""
        if self._is_running():
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _is_running(self) -> bool:
        return self.running is not None and self.running.runs

    def _running(self) -> WhileTracing | None:
        if self.running is None and self.sample is not None:
            self.running = WhileTracing(self.root, self.graph, self.sample)
        return self.running

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether it is called as a whole."""
        if super().is_leaf_module(m, module_qualified_name):
            return True
        return plain_kind(m) is not None

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Follows a transformer by what it computes, and any other module as torch.fx does."""
        if self._is_running():
            return forward(*args, **kwargs)
        computed = _COMPUTED.get(type(m))
        if computed is not None:
            given = signature(m.forward).bind(*args, **kwargs)
            given.apply_defaults()
            return computed(m, **given.arguments)
        follow = super().call_module
        if isinstance(m, NORM):
            name = self.path_of_module(m)
            if not self.is_leaf_module(m, name):
                # It asks how many axes the inputs have, which tracing does not know.
                with of_any_rank(m):
                    return follow(m, forward, args, kwargs)
        return follow(m, forward, args, kwargs)


def plain_kind(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn whose forward a module has, by itself or by inheritance; None where its
    own code computes something.

    None too for containers, which are what is in them.
    """
    if isinstance(module, _CONTAINERS):
        return None
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn"):
            return kind if _is_layer(kind) else None
        if not vars(kind).keys().isdisjoint(_OF_FORWARD):
            return None
    return None


def _is_layer(kind: type) -> TypeGuard[type[nn.Module]]:
    """Whether a class of torch.nn is a layer with a forward."""
    if kind is nn.Module:
        return False
    if not kind.__module__.startswith("torch.nn.modules"):
        return False
    return "forward" in dir(kind)


def _encoder(encoder: nn.TransformerEncoder, *, src: Tensor, mask: Any, **masks: Any) -> Tensor:
    masks["is_causal"] = bool(masks["is_causal"])
    for layer in encoder.layers:
        src = layer(src, src_mask=mask, **masks)
    return _normed(encoder.norm, src)


def _layer(layer: nn.TransformerEncoderLayer, *, src: Tensor, **masks: Any) -> Tensor:
    """Vaswani et al. 2017, arXiv 1706.03762, section 3.1; with `norm_first`, Xiong et al. 2020,
    arXiv 2002.04745, fig. 1b."""
    own = _masks(masks, "src", is_causal="is_causal")

    def attend(x: Tensor) -> Tensor:
        return _attended(layer.self_attn, layer.dropout1, x, x, own)

    def feed_forward(x: Tensor) -> Tensor:
        return _fed_forward(layer, layer.dropout2, x)

    src = _branch(attend, layer.norm1, src, norm_first=layer.norm_first)
    return _branch(feed_forward, layer.norm2, src, norm_first=layer.norm_first)


def _decoder(
    decoder: nn.TransformerDecoder, *, tgt: Tensor, memory: Tensor, **masks: Any
) -> Tensor:
    masks["tgt_is_causal"] = bool(masks["tgt_is_causal"])
    for layer in decoder.layers:
        tgt = layer(tgt, memory, **masks)
    return _normed(decoder.norm, tgt)


def _decoder_layer(
    layer: nn.TransformerDecoderLayer, *, tgt: Tensor, memory: Tensor, **masks: Any
) -> Tensor:
    """As `_layer`, with attention to `memory` between the two branches."""
    own = _masks(masks, "tgt", is_causal="tgt_is_causal")
    across = _masks(masks, "memory", is_causal="memory_is_causal")

    def attend(x: Tensor) -> Tensor:
        return _attended(layer.self_attn, layer.dropout1, x, x, own)

    def look(x: Tensor) -> Tensor:
        return _attended(layer.multihead_attn, layer.dropout2, x, memory, across)

    def feed_forward(x: Tensor) -> Tensor:
        return _fed_forward(layer, layer.dropout3, x)

    tgt = _branch(attend, layer.norm1, tgt, norm_first=layer.norm_first)
    tgt = _branch(look, layer.norm2, tgt, norm_first=layer.norm_first)
    return _branch(feed_forward, layer.norm3, tgt, norm_first=layer.norm_first)


def _transformer(
    transformer: nn.Transformer, *, src: Tensor, tgt: Tensor, src_mask: Any, **masks: Any
) -> Tensor:
    padding = masks.pop("src_key_padding_mask")
    is_causal = masks.pop("src_is_causal")
    memory = transformer.encoder(
        src, mask=src_mask, src_key_padding_mask=padding, is_causal=is_causal
    )
    made: Tensor = transformer.decoder(tgt, memory, **masks)
    return made


def _masks(masks: Masks, what: str, is_causal: str) -> Masks:
    """The masks of what attention looks at, of those of a layer, as attention calls them."""
    return {
        "attn_mask": masks[f"{what}_mask"],
        "key_padding_mask": masks[f"{what}_key_padding_mask"],
        "is_causal": masks[is_causal],
    }


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """With the norm at the end, if there is one."""
    if norm is None:
        return x
    normed: Tensor = norm(x)
    return normed


def _branch(
    compute: Callable[[Tensor], Tensor], norm: nn.Module, x: Tensor, *, norm_first: bool
) -> Tensor:
    """A residual branch with its norm, before it or behind the addition."""
    if norm_first:
        return x + compute(norm(x))
    added = x + compute(x)
    normed: Tensor = norm(added)
    return normed


def _attended(
    attention: nn.Module, dropout: nn.Module, x: Tensor, memory: Tensor, masks: Masks
) -> Tensor:
    attended = attention(x, memory, memory, need_weights=False, **masks)[0]
    out: Tensor = dropout(attended)
    return out


def _fed_forward(layer: Any, dropout: nn.Module, x: Tensor) -> Tensor:
    hidden = layer.activation(layer.linear1(x))
    made = layer.linear2(layer.dropout(hidden))
    out: Tensor = dropout(made)
    return out


_COMPUTED: Mapping[type[nn.Module], Callable[..., Tensor]] = {
    nn.Transformer: _transformer,
    nn.TransformerEncoder: _encoder,
    nn.TransformerEncoderLayer: _layer,
    nn.TransformerDecoder: _decoder,
    nn.TransformerDecoderLayer: _decoder_layer,
}
"""What a transformer and its parts compute."""
