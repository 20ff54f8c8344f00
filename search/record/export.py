"""Exports a network of a search's front: picks it, ships it, and writes its card beside it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimfront.search.config.schema import Config
from slimfront.search.record.front.picks import member_name, pick
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.locate import locate
from slimfront.search.record.report import as_json
from slimfront.search.record.session import read_result
from slimfront.search.record.trials import MeasuredNetwork, replicated
from slimfront.trainables import markdown
from slimfront.trainables.data import load_once
from slimfront.trainables.errors import UserError
from slimfront.trainables.measures.latency import SPEEDS
from slimfront.trainables.models import built
from slimfront.trainables.shipping import FORMATS, Format, Shipment, ship
from slimfront.trainables.shipping.card import card
from slimfront.trainables.shipping.network_file import read
from slimfront.trainables.shipping.shipment import SearchedTimes, card_beside
from slimfront.trainables.shipping.shipped import shipped

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """A shipped network and its card, which is at `card_path`."""

    shipment: Shipment
    card: str
    card_path: Path


def export(
    search: str,
    storage_path: str,
    wanted: str,
    output: Path,
    kind: str | None = None,
    *,
    min_quality: float | None = None,
    int8: bool = False,
) -> Exported:
    """Writes the network that `wanted` names (see `picks.pick`) to `output`, and its card to the
    same name with .md.

    Args:
        kind: one of `FORMATS`; what `output`'s suffix says if None.

    Raises:
        UserError: if there is no such search or network, its file is lost, or it cannot be written.
    """
    chosen = format_of(output, kind)
    card_beside(output)
    config, result = read_result(*locate(search, storage_path))
    report = as_json(result)
    member = pick(report, wanted, min_quality)
    point = result.front[report["front"].index(member)]
    return export_member(config, result.search, result.ledger, point, output, chosen, int8=int8)


def export_member(
    config: Config,
    search: str,
    ledger: Ledger,
    point: MeasuredNetwork,
    output: Path,
    kind: str | None = None,
    *,
    int8: bool = False,
) -> Exported:
    """The same of a network of a search that was read.

    Raises:
        UserError: if its file is lost, or it cannot be written.
    """
    chosen = format_of(output, kind)
    card_path = card_beside(output)
    network = read_member(config, point)
    base = config.candidate({})
    data = load_once(base.data, torch.device("cpu"), base.task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = built(base.model, data).eval()
    name = _name(point)
    searched = config.ships_int8(point.trial.number, point.trial.values)
    if searched and chosen != "onnx":
        raise UserError(
            f"--output {output}: {name} was measured as an int8 network, and those ship as onnx"
        )
    shipment = ship(
        network, dense, data, output, chosen, int8=int8 or searched, latency=base.latency
    )
    shipment = replace(shipment, searched=_searched_times(config, point))
    text = card(
        shipment,
        f"{name} of {search}",
        data,
        base.data.name,
        _trained(config, point),
        point.compaction,
        beside=_beside(ledger, point),
        note=_note(ledger, point),
    )
    card_path.write_text(text, encoding="utf-8")
    return Exported(shipment, text, card_path)


def _beside(ledger: Ledger, point: MeasuredNetwork) -> dict[str, dict[str, float]]:
    """The metrics of the dense network, and the means of what was trained anew."""
    found = {}
    dense = ledger.dense_network
    if dense is not None:
        found["the dense network"] = dense.measures | (dense.tested or {})
    for what, network in (("the dense network", dense), ("this recipe", point)):
        if network is not None and network.replicas:
            means = {name: mean for name, (mean, _) in replicated(network).items()}
            found[f"{what}, mean of {len(network.replicas)} seeds"] = means
    return found


def _note(ledger: Ledger, point: MeasuredNetwork) -> str:
    """That this one network is worse than the means that it was chosen by."""
    region = ledger.region
    quality = region.quality
    if not point.replicas or not region.is_near(point):
        return ""
    if quality.as_good(point.measures[quality.name], region.quality_within(1)):
        return ""
    return (
        f" By its mean over seeds this recipe is within {region.text(1)} of the dense network; "
        "this one network of it is not."
    )


def _searched_times(config: Config, point: MeasuredNetwork) -> SearchedTimes | None:
    """The times that the search took of a network; None if it took none."""
    during = {}
    for name in SPEEDS:
        if name in point.measures:
            during[name] = point.measures[name]
    if not during:
        return None
    in_quiet = point.timed_again or {}
    return SearchedTimes(config.latency.taken, during, in_quiet)


def read_member(config: Config, point: MeasuredNetwork) -> nn.Module:
    """The compact network of a member, on the CPU and in evaluation mode.

    Raises:
        UserError: if its file is lost or damaged.
    """
    try:
        model = config.model_of(point.trial.values)
        return read(point.file, model).eval()
    except UserError as error:
        raise UserError(f"the network of {_name(point)} cannot be read any more: {error}") from None


def read_shipped(config: Config, point: MeasuredNetwork) -> nn.Module:
    """The same network as it ships: it takes inputs as the data has them, and gives outputs in the
    unit of the targets.

    Raises:
        UserError: if its file is lost or damaged, or the data cannot be read.
    """
    network = read_member(config, point)
    base = config.candidate({})
    data = load_once(base.data, torch.device("cpu"), base.task)
    return shipped(network, data)


def kind_of(config: Config, point: MeasuredNetwork, otherwise: Format) -> Format:
    """The format that a network ships as: onnx where it was measured as int8."""
    if config.ships_int8(point.trial.number, point.trial.values):
        return "onnx"
    return otherwise


def _name(point: MeasuredNetwork) -> str:
    member = {"trial": point.trial.label, "epoch": point.epoch, "one_shot": point.step}
    return member_name(member)


def format_of(output: Path, kind: str | None) -> Format:
    """The format that a file is written in: `kind`, or what its suffix says.

    Raises:
        UserError: if the suffix is that of no format, or of another one.
    """
    by_suffix: Mapping[str, Format] = {f".{name}": name for name in FORMATS}
    found = by_suffix.get(output.suffix)
    if kind is not None and found != kind:
        raise UserError(f"--output {output}: a file of the format {kind} ends in .{kind}")
    if found is None:
        known = ", ".join(by_suffix)
        raise UserError(f"--output {output}: it ends in none of {known}")
    return found


def _trained(config: Config, point: MeasuredNetwork) -> dict[str, Any]:
    values = {}
    for path, value in point.trial.values.items():
        shown = f"{value:.4g}" if isinstance(value, float) else markdown.text(value)
        values[markdown.code(path)] = shown
    names = [markdown.code(name) for name in config.varied_penalties()]
    penalties = ", ".join(names) or "none"
    sparsifier = "none"
    if config.sparsifier is not None:
        sparsifier = markdown.code(config.sparsifier.name)
    how: dict[str, Any] = {
        "network": markdown.code(config.model.name),
        "penalties": penalties,
        "sparsifier": sparsifier,
        "epochs": point.epoch,
        "seed": point.trial.seed,
    }
    if point.step:
        how["one-shot pruning"] = f"step {point.step}"
    return how | values
