"""The networks of the zoo, by name: how each is built, and what it takes.

Libraries are imported when a network of theirs is built; those of `plain` need torch alone. All
weights are random.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks import zoo_plain
from slimfront.trainables.inputs import Call, Several

Inputs = Callable[[int, Generator], Tensor]
"""Makes so many inputs (N, …) with a generator."""


@dataclass(frozen=True)
class Network:
    """A network of the zoo."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    size: str
    """What one input is, in words."""
    call: Call = Call()  # noqa: RUF009 (frozen, too)
    library: str = "torch"
    """The library that it needs."""
    refused: bool = False
    """Whether it must be refused, since no graph holds it."""


def built(name: str) -> nn.Module:
    """The network of that name, freshly initialised: what a config has as `factory`."""
    return NETWORKS[name].build()


def _normal(*shape: int) -> Inputs:
    return lambda count, generator: torch.randn(count, *shape, generator=generator)


def _whole(most: int, *shape: int) -> Inputs:
    return lambda count, generator: torch.randint(1, most, (count, *shape), generator=generator)


def _several(**each: Inputs) -> Inputs:
    return lambda count, generator: Several(
        {name.removeprefix("at_"): make(count, generator) for name, make in each.items()}
    )


def _ones(*shape: int) -> Inputs:
    return lambda count, _: torch.ones(count, *shape, dtype=torch.long)


def _plain() -> list[Network]:
    images, tokens = _normal(3, 32, 32), _whole(50, 12)
    table, picture = "32 features", "3 × 32 × 32"
    recurrent = zoo_plain.Recurrent
    made: list[tuple[str, Callable[[], nn.Module], Inputs, str]] = [
        ("mlp", zoo_plain.mlp, _normal(32), table),
        ("autoencoder", zoo_plain.autoencoder, _normal(256), "256 features"),
        ("unet", zoo_plain.UNet, images, picture),
        ("gru", partial(recurrent, "GRU"), tokens, "12 tokens"),
        ("lstm", partial(recurrent, "LSTM"), tokens, "12 tokens"),
        (
            "lstm-2-both-ways",
            partial(recurrent, "LSTM", num_layers=2, bidirectional=True),
            tokens,
            "12 tokens",
        ),
        ("lstm-cell", zoo_plain.Cell, tokens, "12 tokens"),
        ("gru-2-from-zeros", zoo_plain.Stateful, tokens, "12 tokens"),
        ("blurred", zoo_plain.Blurred, images, picture),
        ("conv1d", zoo_plain.conv1d_net, _normal(8, 64), "8 × 64"),
        ("conv3d", zoo_plain.conv3d_net, _normal(1, 16, 16, 16), "1 × 16 × 16 × 16"),
        ("mobilenet-v2-like", zoo_plain.mobilenet_v2_like, images, picture),
        ("mobilenet-v3-like", zoo_plain.mobilenet_v3_like, images, picture),
        ("tied-embeddings", zoo_plain.TiedEmbeddings, tokens, "12 tokens"),
        ("group-norm-resnet", zoo_plain.group_norm_resnet, images, picture),
        ("prelu", zoo_plain.prelu_net, images, picture),
        ("encoder-pre-norm", partial(zoo_plain.Encoder, first=True), tokens, "12 tokens"),
        ("encoder-post-norm", partial(zoo_plain.Encoder, first=False), tokens, "12 tokens"),
        ("channel-shuffle", zoo_plain.Shuffled, images, picture),
        ("mixer", zoo_plain.Mixer, images, picture),
        ("convnext-like", zoo_plain.convnext_like, images, picture),
        ("squeeze-excite", zoo_plain.squeeze_net, images, picture),
        ("dense-block", zoo_plain.dense_net, images, picture),
        ("repvgg-like", zoo_plain.repvgg_like, images, picture),
        ("depth-multiplier", zoo_plain.depth_multiplier, images, picture),
        ("pixel-shuffle", zoo_plain.super_resolution, images, picture),
        ("chunks", zoo_plain.Chunks, images, picture),
        ("looped", zoo_plain.Looped, images, picture),
        ("called-twice", zoo_plain.Twice, images, picture),
        ("weight-norm", zoo_plain.weight_norm_net, _normal(32), table),
    ]
    image_and_table = _several(image=images, table=_normal(12))
    by_place = _several(at_0=_normal(16), at_1=_normal(12))
    return [
        *(Network(*each) for each in made),
        Network(
            "two-inputs",
            zoo_plain.TwoInputs,
            image_and_table,
            f"{picture}, 12 features",
            Call(("image", "table")),
        ),
        Network("bilinear", zoo_plain.Bilinear, by_place, "16 and 12 features", Call(("0", "1"))),
        Network("dict-outputs", zoo_plain.DictOutputs, images, picture, Call(output="logits")),
        Network("control-flow-on-data", zoo_plain.OnData, _normal(32), table, refused=True),
    ]


def _torchvision(family: str, name: str, **options: Any) -> nn.Module:
    module = importlib.import_module(f"torchvision.models{family}")
    network: nn.Module = getattr(module, name)(**({"num_classes": 10} | options))
    return network


_CLASSIFIERS: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (64, {}),
    "vgg11_bn": (32, {}),
    "resnet18": (64, {}),
    "resnet50": (64, {}),
    "resnext50_32x4d": (64, {}),
    "squeezenet1_1": (64, {}),
    "densenet121": (64, {}),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "shufflenet_v2_x1_0": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "mobilenet_v3_large": (64, {}),
    "mnasnet0_5": (64, {}),
    "regnet_y_400mf": (64, {}),
    "efficientnet_b0": (64, {}),
    "efficientnet_v2_s": (64, {}),
    "convnext_tiny": (64, {}),
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    "maxvit_t": (224, {}),
}
"""Of torchvision, with the side of their images."""

_VISION_TRANSFORMER = {
    **{"image_size": 64, "patch_size": 16, "num_layers": 4, "num_heads": 3},
    **{"hidden_dim": 192, "mlp_dim": 768},
}
_SEGMENTATION = (
    *("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large"),
    "lraspp_mobilenet_v3_large",
)
_VIDEO = {"r3d_18": 48, "mc3_18": 48, "r2plus1d_18": 48, "swin3d_t": 64}
_FRAMES = 8


def _of_torchvision() -> list[Network]:
    made = []
    for name, (side, options) in _CLASSIFIERS.items():
        build = partial(_torchvision, "", name, **options)
        size = f"3 × {side} × {side}"
        made.append(Network(name, build, _normal(3, side, side), size, library="torchvision"))
    build = partial(_torchvision, "", "VisionTransformer", **_VISION_TRANSFORMER)
    size = "3 × 64 × 64"
    made.append(
        Network("VisionTransformer", build, _normal(3, 64, 64), size, library="torchvision")
    )
    for name in _SEGMENTATION:
        build = partial(_torchvision, ".segmentation", name, weights=None, weights_backbone=None)
        made.append(
            Network(
                name,
                build,
                _normal(3, 64, 64),
                "3 × 64 × 64",
                Call(output="out"),
                "torchvision",
            )
        )
    for name, side in _VIDEO.items():
        made.append(
            Network(
                name,
                partial(_torchvision, ".video", name),
                _normal(3, _FRAMES, side, side),
                f"3 × {_FRAMES} × {side} × {side}",
                library="torchvision",
            )
        )
    return made


def _timm(name: str, **options: Any) -> nn.Module:
    module = importlib.import_module("timm")
    network: nn.Module = module.create_model(name, pretrained=False, num_classes=10, **options)
    return network


_TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18d": (64, {}),
    "resnetv2_50": (64, {}),
    "res2net50_26w_4s": (64, {}),
    "resnest14d": (64, {}),
    "skresnet18": (64, {}),
    "legacy_seresnet18": (64, {}),
    "eca_resnext26ts": (64, {}),
    "repvgg_a0": (64, {}),
    "mobileone_s0": (64, {}),
    "ese_vovnet19b_dw": (64, {}),
    "ghostnet_100": (64, {}),
    "hrnet_w18_small": (64, {}),
    "dla34": (64, {}),
    "dpn68": (64, {}),
    "cspresnet50": (64, {}),
    "cspdarknet53": (64, {}),
    "efficientnet_lite0": (64, {}),
    "mixnet_s": (64, {}),
    "rexnet_100": (64, {}),
    "selecsls42b": (64, {}),
    "tinynet_e": (64, {}),
    "lcnet_050": (64, {}),
    "xception41": (64, {}),
    "inception_v4": (96, {}),
    "nf_resnet26": (64, {}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "inception_next_atto": (64, {}),
    "poolformer_s12": (64, {}),
    "starnet_s1": (64, {}),
    "repghostnet_050": (64, {}),
    "mambaout_femto": (64, {}),
    "edgenext_xx_small": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "fastvit_t8": (64, {}),
    "pvt_v2_b0": (64, {}),
    "vit_tiny_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "deit_tiny_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 4}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "gmlp_s16_224": (64, {"img_size": 64}),
    "levit_128s": (224, {}),
    "swin_s3_tiny_224": (64, {"img_size": 64, "window_size": 2}),
}


def _of_timm() -> list[Network]:
    return [
        Network(
            f"timm {name}",
            partial(_timm, name, **options),
            _normal(3, side, side),
            f"3 × {side} × {side}",
            library="timm",
        )
        for name, (side, options) in _TIMM.items()
    ]


def _transformers(config: str, model: str, **options: Any) -> nn.Module:
    module = importlib.import_module("transformers")
    network: nn.Module = getattr(module, model)(getattr(module, config)(**options))
    return network


_BERT = {
    **{"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 64, "max_position_embeddings": 32, "num_labels": 5},
}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "pad_token_id": 0, "use_cache": False}
_GPT2 = {
    **{"vocab_size": 100, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4},
    **{"num_labels": 5, "pad_token_id": 0, "use_cache": False},
    **{"bos_token_id": 1, "eos_token_id": 2},
}
_T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_VIT = {**_BERT, "image_size": 32, "patch_size": 8}
_WAV2VEC2 = {
    **{**_BERT, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2)},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    "num_feat_extract_layers": 2,
}
_TEXT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _BERT),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", {**_BERT, "pad_token_id": 0}),
    "electra": (
        "ElectraConfig",
        "ElectraForSequenceClassification",
        {**_BERT, "embedding_size": 32},
    ),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", {**_BERT, "embedding_size": 16}),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {
            **{"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
            **{"max_position_embeddings": 32, "num_labels": 5},
        },
    ),
    "gpt2-classifier": ("GPT2Config", "GPT2ForSequenceClassification", _GPT2),
    "llama-classifier": ("LlamaConfig", "LlamaForSequenceClassification", _LLAMA),
}
"""Those that take `input_ids` and `attention_mask`, and give `logits`."""
_OTHERS: dict[str, tuple[str, str, dict[str, Any], Inputs, str, Call]] = {
    "gpt2": (
        *("GPT2Config", "GPT2LMHeadModel", _GPT2, _whole(100, 12), "12 tokens"),
        Call(output="logits"),
    ),
    "llama": (
        *("LlamaConfig", "LlamaForCausalLM", _LLAMA, _whole(100, 12), "12 tokens"),
        Call(output="logits"),
    ),
    "t5-encoder": (
        *("T5Config", "T5EncoderModel", _T5, _whole(100, 12), "12 tokens"),
        Call(output="last_hidden_state"),
    ),
    "vit": (
        *("ViTConfig", "ViTForImageClassification", _VIT, _normal(3, 32, 32), "3 × 32 × 32"),
        Call(output="logits"),
    ),
    "deit": (
        *("DeiTConfig", "DeiTForImageClassification", _VIT, _normal(3, 32, 32), "3 × 32 × 32"),
        Call(output="logits"),
    ),
    "wav2vec2": (
        *("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", _WAV2VEC2),
        *(_normal(800), "800 samples", Call(output="logits")),
    ),
}


def _of_transformers() -> list[Network]:
    text = _several(input_ids=_whole(100, 12), attention_mask=_ones(12))
    call = Call(("input_ids", "attention_mask"), "logits")
    return [
        *(
            Network(
                f"transformers {name}",
                partial(_transformers, config, model, **options),
                text,
                "12 tokens and their mask",
                call,
                "transformers",
            )
            for name, (config, model, options) in _TEXT.items()
        ),
        *(
            Network(
                f"transformers {name}",
                partial(_transformers, config, model, **options),
                inputs,
                size,
                call,
                "transformers",
            )
            for name, (config, model, options, inputs, size, call) in _OTHERS.items()
        ),
    ]


def _smp(architecture: str, encoder: str) -> nn.Module:
    module = importlib.import_module("segmentation_models_pytorch")
    network: nn.Module = getattr(module, architecture)(
        encoder_name=encoder, encoder_weights=None, classes=4
    )
    return network


_SMP = (
    *(("Unet", "resnet18"), ("Unet", "mobilenet_v2"), ("Unet", "efficientnet-b0")),
    *(("UnetPlusPlus", "resnet18"), ("MAnet", "resnet18"), ("Linknet", "resnet18")),
    *(("FPN", "resnet18"), ("DeepLabV3Plus", "resnet18")),
)


def _of_smp() -> list[Network]:
    return [
        Network(
            f"smp {architecture} {encoder}",
            partial(_smp, architecture, encoder),
            _normal(3, 64, 64),
            "3 × 64 × 64",
            library="segmentation_models_pytorch",
        )
        for architecture, encoder in _SMP
    ]


NETWORKS = {
    network.name: network
    for network in (
        *_plain(),
        *_of_torchvision(),
        *_of_transformers(),
        *_of_smp(),
        *_of_timm(),
    )
}
"""All, in the order of the table."""

PLAIN = tuple(name for name, network in NETWORKS.items() if network.library == "torch")
"""The names of those that need torch alone."""
