"""Tracing through torch's transformer encoders, whose own code torch.fx cannot follow: it chooses
between kernels."""

from typing import Any

from torch import Tensor, fx, nn

from slimfront.trainables.torch_internals import FORWARD_HELPERS, NORM, of_any_rank

_HELPERS = (*FORWARD_HELPERS, "weight", "bias")
"""What the forward of a module of torch.nn calls or reads of itself, which a subclass could
change."""


class Tracer(fx.Tracer):
    """torch.fx's tracer, which sees the layers within `nn.TransformerEncoderLayer` and
    `nn.TransformerEncoder`.

    A subclass of a module of torch.nn that computes what that does is one of them; of any other it
    sees the code.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether it is called as a whole."""
        return super().is_leaf_module(m, module_qualified_name) or plain_kind(m) is not None

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Follows an encoder by what it computes, and any other module as torch.fx does."""
        if type(m) is nn.TransformerEncoderLayer:
            return _layer(m, *args, **kwargs)
        if type(m) is nn.TransformerEncoder:
            return _encoder(m, *args, **kwargs)
        if isinstance(m, NORM) and not self.is_leaf_module(m, self.path_of_module(m)):
            # It asks how many axes the inputs have, which tracing does not know.
            with of_any_rank(m):
                return super().call_module(m, forward, args, kwargs)
        return super().call_module(m, forward, args, kwargs)


def plain_kind(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn whose forward a module has, by itself or by inheritance; None where its
    own code computes something.

    None too for containers, which are what is in them.
    """
    if isinstance(module, nn.Sequential | nn.TransformerEncoder | nn.TransformerEncoderLayer):
        return None
    kinds = type(module).__mro__
    own = kinds[
        : next((n for n, kind in enumerate(kinds) if kind.__module__.startswith("torch.nn")), 0)
    ]
    plain = kinds[len(own)]
    if (
        not plain.__module__.startswith("torch.nn.modules")
        or plain is nn.Module
        or "forward" not in dir(plain)
    ):
        return None
    return (
        None
        if any(name in vars(kind) for kind in own for name in ("forward", "__call__", *_HELPERS))
        else plain
    )


def _encoder(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    for layer in encoder.layers:
        src = layer(
            src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal)
        )
    return src if encoder.norm is None else encoder.norm(src)


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
        attended: Tensor = layer.dropout1(layer.self_attn(x, x, x, need_weights=False, **masks)[0])
        return attended

    def feed_forward(x: Tensor) -> Tensor:
        made: Tensor = layer.dropout2(
            layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))
        )
        return made

    if layer.norm_first:
        src = src + attend(layer.norm1(src))
        return src + feed_forward(layer.norm2(src))
    src = layer.norm1(src + attend(src))
    out: Tensor = layer.norm2(src + feed_forward(src))
    return out
