"""What a GPU makes of smaller networks: removed channels, half precision, and 2:4 kernels, against
the dense network.

Networks have random weights, for times do not depend on them: half of the channels of a residual
network are zeroed and compacted, and the linear layers of a perceptron are masked 2:4. On a CPU,
`--quick` shows that it runs.
"""

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Outcome, run
from slimfront.trainables.compaction import Compaction, compact
from slimfront.trainables.measures.latency import Latency, Timing, time_networks
from slimfront.trainables.models import MODELS
from slimfront.trainables.shipping.kernels import has_2_of_4, try_kernels
from slimfront.trainables.sparsifiers.nm import nm_mask
from slimfront.trainables.structure.channel_groups import channel_groups

BATCHES = (1, 64, 1024)
SHARE = 0.5


def half_of_the_channels(network: nn.Module, inputs: Tensor) -> nn.Module:
    """The network without half of the channels of each group; the channels are zeroed, and
    compaction takes them out."""
    slim = copy.deepcopy(network)
    parameters = dict(slim.named_parameters())
    with torch.no_grad():
        for group in channel_groups(slim, inputs[:2]):
            for name, owners in group.writers.items():
                gone = (owners >= 0) & (owners < int(SHARE * group.units))
                parameters[name][gone.to(parameters[name].device)] = 0
    return compact(slim, inputs, Compaction()).network


def of_16_bits(network: nn.Module) -> nn.Module:
    """A copy in half precision (bfloat16 on a CPU, which may have no float16), that takes and gives
    float32."""

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kind = torch.float16 if next(network.parameters()).is_cuda else torch.bfloat16
            self.inner = copy.deepcopy(network).to(self.kind)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.inner(x.to(self.kind)).float()
            return made

    return Halved().eval()


def row(network: str, what: str, batch: int, timing: Timing) -> dict[str, Any]:
    """A row of the table."""
    low, high = timing.spread
    return {
        "network": network,
        "as": what,
        "batch": batch,
        "ms": f"{timing.latency_ms:.3f}",
        "speed-up": f"{timing.speedup:.2f}",
        "quartiles": f"{low:.2f} to {high:.2f}",
    }


def gpu_latency(arguments: argparse.Namespace) -> Outcome:
    """Latency of compact, half-precision and 2:4 networks on this device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = arguments.quick or device.type == "cpu"
    rows = []
    for width in (8,) if quick else (16, 64):
        dense = (
            MODELS.parse_named({"name": "resnet20", "width": width})
            .build((3, 32, 32), 10)
            .to(device)
            .eval()
        )
        inputs = torch.randn(64, 3, 32, 32, device=device)
        small = half_of_the_channels(dense, inputs)
        networks = {
            "dense": dense,
            "half of the channels": small,
            "dense, 16 bits": of_16_bits(dense),
        }
        networks["half of the channels, 16 bits"] = of_16_bits(small)
        for batch in BATCHES[:1] if quick else BATCHES:
            timings = time_networks(list(networks.values()), inputs, Latency(batch_size=batch))
            rows += [
                row(f"ResNet-20, width {width}", name, batch, one)
                for name, one in zip(networks, timings, strict=True)
            ]
    for width in (64,) if quick else (1024, 4096):
        linear = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
        network = nn.Sequential(*linear, nn.Linear(width, 10)).eval()
        with torch.no_grad():
            for module in network[:-1]:
                if isinstance(module, nn.Linear):
                    module.weight.mul_(nm_mask(module.weight, 2, 4))
        if not has_2_of_4():
            rows.append(
                {"network": f"MLP, width {width}", "as": "2:4: no kernels here"}
                | dict.fromkeys(list(rows[0])[2:], "")
            )
            continue
        (tried,) = [
            one for one in try_kernels(network, torch.randn(64, width)) if one.kernel == "2:4"
        ]
        rows += [
            row(f"MLP, width {width}", "2:4, against float16", batch, one)
            for batch, one in tried.timings.items()
        ]
    return Outcome(1, rows, [])


if __name__ == "__main__":
    run("gpu_latency", gpu_latency)
