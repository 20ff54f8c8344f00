"""Tracing through torch's transformer encoders, whose own code torch.fx cannot follow: it chooses
between kernels."""

from typing import Any

from torch import Tensor, fx, nn


class Tracer(fx.Tracer):
    """torch.fx's tracer, which sees the layers within `nn.TransformerEncoderLayer` and
    `nn.TransformerEncoder`."""

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Follows an encoder by what it computes, and any other module as torch.fx does."""
        if type(m) is nn.TransformerEncoderLayer:
            return _layer(m, *args, **kwargs)
        if type(m) is nn.TransformerEncoder:
            return _encoder(m, *args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


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
