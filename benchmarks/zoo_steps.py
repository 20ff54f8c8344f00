"""What is done to one network of the zoo, step by step."""

import io
import logging
import math
import signal
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks import zoo_pruning
from benchmarks.zoo_networks import NETWORKS, Network
from slimfront.trainables.compaction import Compacted, compact
from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.errors import TrialFailure, UserError, first_line
from slimfront.trainables.inputs import Several, by_place, shape_of_one
from slimfront.trainables.models import adapted
from slimfront.trainables.models.factory import Factory
from slimfront.trainables.penalties import PENALTIES
from slimfront.trainables.shipping import formats, network_file
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.tracing.trace import traced_once

Row = dict[str, Any]
"""What is known of one network: plain data."""

BATCHES = (1, 7)
"""Exported files must take batches of these sizes."""
TOLERANCE = 1e-4
"""Outputs that differ by more than this, relative to the largest one, are others."""
_CALIBRATING, _PASSES, _SEEN = 16, 4, 8
"""Inputs of a pass that batch norms are calibrated by, such passes, and inputs that compaction
sees."""
_PRUNING_S, _TARGETS_S = 40, 40
"""Seconds that Torch-Pruning has, and the penalties have to find their targets."""

_TOOK_TOO_LONG = f"layers: Torch-Pruning took over {_PRUNING_S} s"


class _TooLong(Exception):
    """A step took longer than it may."""


class Zoo:
    """One network, and what is found out about it.

    Each step is tried whatever became of those before it, if it can be; `row` is passed to `told`
    before and after each.
    """

    def __init__(self, network: Network, told: Callable[[Row], None]) -> None:
        self.of = network
        self.told = told
        self.generator = Generator().manual_seed(zlib.crc32(network.name.encode()))
        self.row: Row = {
            **{"network": network.name, "library": network.library, "size": network.size},
            **{"refused": network.refused, "seconds": {}, "failures": {}, "faults": []},
        }

    @contextmanager
    def step(
        self, name: str, seconds: float = 0, refusals: tuple[type[Exception], ...] = ()
    ) -> Iterator[None]:
        """A step of that name; what it raises is noted, as a fault if it is no sentence of ours:
        neither an error of the user's, nor one of `refusals`."""
        self.row["at"] = name
        self.told(self.row)
        start = time.perf_counter()
        try:
            with _at_most(seconds):
                yield
        except (UserError, TrialFailure, *refusals) as error:
            self.row["failures"][name] = str(error)
        except _TooLong:
            self.row["failures"][name] = f"took over {seconds:g} s"
        except Exception as error:
            self.row["failures"][name] = f"{type(error).__name__}: {first_line(error, 300)}"
            self.row["faults"].append([name, traceback.format_exc(limit=-8)])
        self.row["seconds"][name] = round(time.perf_counter() - start, 2)
        self.told(self.row)

    def inputs(self, count: int) -> Tensor:
        """So many new inputs."""
        return self.of.inputs(count, self.generator)


def examine(name: str, told: Callable[[Row], None]) -> None:
    """Runs all steps on a network of the zoo; `told` is called with what is known so far."""
    zoo, messages = Zoo(NETWORKS[name], told), io.StringIO()
    handler = logging.StreamHandler(messages)
    logging.getLogger("slimfront").addHandler(handler)
    logging.getLogger("slimfront").propagate = False
    torch.manual_seed(0)
    network: nn.Module | None = None
    with zoo.step("build"):
        network = _calibrated(zoo)
    if network is not None:
        _zeroed(zoo, network)
        made = _compacted(zoo, network)
        if made is not None:
            _stored(zoo, made.network)
        _torch_pruning_alone(zoo, network)
        _exported(zoo, network if made is None else made.network)
        _targets(zoo, network)
    zoo.row["said"] = messages.getvalue().splitlines()
    zoo.row["at"] = "end"
    told(zoo.row)


@torch.no_grad()
def _calibrated(zoo: Zoo) -> nn.Module:
    """The network as a search calls it, in evaluation mode.

    Weights that all have the same value, such as those of norms, layer scales of 1e-6 and blocks
    that start as nothing, get others, so that each of them counts.
    """
    network = adapted(zoo.of.build(), zoo.of.call)
    for parameter in network.parameters():
        if parameter.numel() and parameter.min() == parameter.max():
            base = parameter.detach().clone()
            base[base.abs() < 0.05] = 0
            parameter.copy_(base + 0.1 * torch.randn(parameter.shape, generator=zoo.generator))
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    network.train()
    for _ in range(_PASSES if norms else 0):
        network(zoo.inputs(_CALIBRATING))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    zoo.row["before"] = _count(network)
    return network.eval()


def _zeroed(zoo: Zoo, network: nn.Module) -> None:
    """Half of the units of the network, in place."""
    zeros, inputs = None, zoo.inputs(2)
    with zoo.step("zero", _PRUNING_S):
        try:
            zeros = zoo_pruning.by_groups(network, zoo.of.call, inputs)
            zoo.row["zeroed_by"] = "groups"
        except _TooLong:
            zoo.row["zeroed_by"] = _TOOK_TOO_LONG
        except Exception as error:
            zoo.row["zeroed_by"] = f"layers: {type(error).__name__}: {first_line(error)}"
    with zoo.step("zero layers"):
        zeros = zoo_pruning.by_layers(network, inputs) if zeros is None else zeros
        zoo.row["units"] = zoo_pruning.zero(network, zeros)
        wanted = _outputs(network, zoo.inputs(5))
        spread = (wanted.amax(0) - wanted.amin(0)).max() / wanted.abs().max()
        zoo.row["spread"] = float(spread)


def _compacted(zoo: Zoo, network: nn.Module) -> Compacted | None:
    zoo.row["traced"] = False
    with zoo.step("trace"):
        traced_in_both_modes(network, zoo.inputs(3))
        zoo.row["traced"] = True
    made = None
    with zoo.step("compact"):
        made = compact(network, zoo.inputs(_SEEN))
        removed = [step for step in made.report.steps if "removed" in step[1]]
        counts = [step[2].split()[0].replace(",", "") for step in removed]
        zoo.row["found"] = sum(int(count) for count in counts if count.isdigit())
        zoo.row["after"] = _count(made.network)
    if made is not None:
        with zoo.step("compare"):
            zoo.row["difference"] = max(
                _difference(_outputs(network, batch), _outputs(made.network, batch))
                for batch in (zoo.inputs(5), *(zoo.inputs(1) for _ in range(4)))
            )
    return made


def _stored(zoo: Zoo, network: nn.Module) -> None:
    """Through a file, and back: the outputs must be the same to the bit."""
    model = Factory(factory="benchmarks.zoo_networks:built", args={"name": zoo.of.name})
    batch = zoo.inputs(3)
    with zoo.step("store", refusals=(ValueError,)), tempfile.TemporaryDirectory() as folder:
        wanted = _outputs(network, batch)
        stored = network_file.store(
            network, model, shape_of_one(batch), wanted.shape[-1], zoo.of.call
        )
        file = Path(folder, "network.pt")
        torch.save(stored, file)
        restored = network_file.restore(network_file.load_tensors(file), model)
        zoo.row["stored"] = torch.equal(_outputs(restored, batch), wanted)
        if not zoo.row["stored"]:
            zoo.row["failures"]["store"] = "what was stored computes something else"


def _exported(zoo: Zoo, network: nn.Module) -> None:
    """As pt2 and as ONNX: batches of 1 and 7 give the same outputs."""
    shipped = formats.Shipped(network, None, None).eval()
    for kind in ("pt2", "onnx"):
        with zoo.step(kind), tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"network.{kind}")
            formats.save(shipped, zoo.inputs(2), path, kind)
            loaded = formats.load(path)
            apart = max(
                _difference(_outputs(network, batch), _called(loaded, kind, batch))
                for batch in (zoo.inputs(count) for count in BATCHES)
            )
            zoo.row[kind] = apart <= TOLERANCE
            if not zoo.row[kind]:
                zoo.row["failures"][kind] = f"its outputs are off by {apart:.1e} of their size"


@torch.no_grad()
def _called(loaded: nn.Module, kind: str, batch: Tensor) -> Tensor:
    """What an exported file makes of inputs."""
    if kind == "onnx" or not isinstance(batch, Several):
        made: Tensor = loaded(batch)
        return made
    named = batch.named
    return loaded(*named.values()) if by_place(list(named)) else loaded(**named)


def _torch_pruning_alone(zoo: Zoo, network: nn.Module) -> None:
    if zoo.row.get("zeroed_by") == _TOOK_TOO_LONG:  # it would again
        zoo.row["failures"]["Torch-Pruning"] = f"took over {_PRUNING_S} s"
        return
    with zoo.step("Torch-Pruning", _PRUNING_S):
        try:
            made = zoo_pruning.pruned_alone(network, zoo.of.call, zoo.inputs(2))
            batch = zoo.inputs(5)
            apart = _difference(_outputs(network, batch), _outputs(made, batch))
            zoo.row["torch_pruning"] = _count(made)
            zoo.row["torch_pruning_difference"] = apart
        except _TooLong:
            raise
        except Exception as error:  # theirs are no faults of ours
            said = f"{type(error).__name__}: {first_line(error)}"
            zoo.row["failures"]["Torch-Pruning"] = said


def _targets(zoo: Zoo, network: nn.Module) -> None:
    """How many groups each penalty acts on; the message where it finds none of any network."""
    zoo.row["targets"] = {}
    batch = zoo.inputs(2)
    looked_at = copied(network)
    with zoo.step("targets", _TARGETS_S), traced_once():
        for name, kind in PENALTIES.items():
            try:
                active = kind(strength=1.0).attach(looked_at, batch)
                zoo.row["targets"][name] = active.targets
                active.close()
            except UserError as error:
                zoo.row["targets"][name] = str(error)


@torch.no_grad()
def _outputs(network: nn.Module, inputs: Tensor) -> Tensor:
    made: Tensor = network.forward(inputs)  # a traced network that is called prints a traceback
    return made


def _difference(wanted: Tensor, got: Tensor) -> float:
    """The largest difference of two outputs, relative to the largest of the first; infinite where
    their shapes or types are not the same, or one is no number."""
    if not isinstance(got, Tensor) or wanted.shape != got.shape or wanted.dtype != got.dtype:
        return float("inf")
    apart = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-30))
    return float("inf") if math.isnan(apart) else apart


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises _TooLong in what takes longer; 0 is no limit."""

    def stop(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
