"""How small or how fast a network has to be before no more of its layers go."""

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from slimfront.trainables.compaction import Compaction, compact
from slimfront.trainables.measures.latency import Latency, time_networks
from slimfront.trainables.measures.measure import measure
from slimfront.trainables.options import Options


class Target(Options):
    """What a network is to reach by going without layers: at most so many `layers`, `params`,
    `flops`, or milliseconds of `latency_ms`, and at least so much `speedup` over the whole network.

    Each is of the network as it is made compact. Times are taken in torch, with the batch size and
    threads of `latency`.
    """

    layers: int | None = Field(None, ge=1)
    params: int | None = Field(None, ge=1)
    flops: int | None = Field(None, ge=1)
    latency_ms: float | None = Field(None, gt=0)
    speedup: float | None = Field(None, gt=1)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.wanted():
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"it names none of {known}; name one, or leave it out")
        return self

    @property
    def of_time(self) -> bool:
        """Whether it depends on how fast this machine is."""
        return self.latency_ms is not None or self.speedup is not None

    def wanted(self) -> dict[str, float]:
        """Those that are given, by name."""
        fields: Mapping[str, float | None] = self.model_dump()
        return {name: value for name, value in fields.items() if value is not None}

    def __str__(self) -> str:
        wanted = [f"{name}: {value:,}" for name, value in self.wanted().items()]
        return ", ".join(wanted)

    def misses(self, found: Mapping[str, float]) -> list[str]:
        """What is not reached yet by a network with these measures, in words."""
        missed = []
        for name, wanted in self.wanted().items():
            reached = found[name] >= wanted if name == "speedup" else found[name] <= wanted
            if not reached:
                missed.append(f"{name} is {_shown(found[name])}")
        return missed


class Judge:
    """Measures networks by a target."""

    def __init__(
        self,
        target: Target,
        whole: nn.Module,
        inputs: Tensor,
        latency: Latency | None,
        compaction: Compaction | None = None,
    ) -> None:
        """
        Args:
            whole: the network with all its layers.
            inputs: (N, *input_shape), real inputs, on the device of the networks.
            latency: how times are taken.
            compaction: how networks are made compact; the defaults if None.
        """
        self.target = target
        self.compaction = compaction
        self.inputs = inputs
        self.latency = latency
        self.whole: nn.Module | None = None
        if target.of_time:
            self.whole = compact(whole, inputs, compaction).network

    def missed(self, network: nn.Module) -> list[str]:
        """What a network does not reach yet, in words; empty if it reaches all."""
        small = compact(network, self.inputs, self.compaction).network
        found = dict(measure(small, self.inputs))
        if self.whole is not None:
            times = time_networks([self.whole, small], self.inputs, self.latency)
            found["latency_ms"] = times[1].latency_ms
            found["speedup"] = times[1].speedup
        return self.target.misses(found)


def _shown(value: float) -> str:
    """Whole numbers in full, others to three digits."""
    if value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"
