"""Tracing through torch's transformer encoders, whose own code torch.fx cannot follow: it chooses
between kernels."""

from typing import Any, TypeGuard

from torch import Tensor, fx, nn

from slimfront.trainables.torch_internals import FORWARD_HELPERS, NORM, of_any_rank

_CONTAINERS = (nn.Sequential, nn.TransformerEncoder, nn.TransformerEncoderLayer)
_OF_FORWARD = ("forward", "__call__", *FORWARD_HELPERS, "weight", "bias")
"""The forward of a module of torch.nn, and what it calls or reads of itself, which a subclass could
change."""


class Tracer(fx.Tracer):
    """torch.fx's tracer, which sees the layers within `nn.TransformerEncoderLayer` and
    `nn.TransformerEncoder`.

    A subclass of a module of torch.nn that computes what that does is one of them; of any other it
    sees the code.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether it is called as a whole."""
        if super().is_leaf_module(m, module_qualified_name):
            return True
        return plain_kind(m) is not None

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Follows an encoder by what it computes, and any other module as torch.fx does."""
        if type(m) is nn.TransformerEncoderLayer:
            return _layer(m, *args, **kwargs)
        if type(m) is nn.TransformerEncoder:
            return _encoder(m, *args, **kwargs)
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


def _encoder(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    for layer in encoder.layers:
        src = layer(
            src,
            src_mask=mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=bool(is_causal),
        )
    if encoder.norm is None:
        return src
    normed: Tensor = encoder.norm(src)
    return normed


def _layer(
    layer: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Vaswani et al. 2017, arXiv 1706.03762, section 3.1; with `norm_first`, Xiong et al. 2020,
    arXiv 2002.04745, fig. 1b."""

    def attend(x: Tensor) -> Tensor:
        masks: dict[str, Any] = {
            "attn_mask": src_mask,
            "key_padding_mask": src_key_padding_mask,
            "is_causal": is_causal,
        }
        attended = layer.self_attn(x, x, x, need_weights=False, **masks)[0]
        out: Tensor = layer.dropout1(attended)
        return out

    def feed_forward(x: Tensor) -> Tensor:
        hidden = layer.activation(layer.linear1(x))
        made = layer.linear2(layer.dropout(hidden))
        out: Tensor = layer.dropout2(made)
        return out

    if layer.norm_first:
        src = src + attend(layer.norm1(src))
        return src + feed_forward(layer.norm2(src))
    attended = src + attend(src)
    src = layer.norm1(attended)
    made = src + feed_forward(src)
    out: Tensor = layer.norm2(made)
    return out
