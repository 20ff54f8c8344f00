"""Makes a network of the user's compact, pruned first if asked for, and ships it: no search."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.search.config.loading import load_sections
from slimfront.search.record.export import format_of
from slimfront.search.record.front.told import show_quality
from slimfront.search.record.report import finite
from slimfront.trainables import markdown
from slimfront.trainables.compaction import Compacted, Compaction, compact
from slimfront.trainables.data import Dataset
from slimfront.trainables.data.look import looked_at
from slimfront.trainables.depth import OUTPUTS, Batch, find_criterion
from slimfront.trainables.errors import TrialFailure, UserError, first_line
from slimfront.trainables.importing import import_by_path
from slimfront.trainables.measures.latency import SPEEDS
from slimfront.trainables.models import adapted
from slimfront.trainables.post_training import Amount, check_criterion, pruned
from slimfront.trainables.shipping import Shipment, ship
from slimfront.trainables.shipping.card import card
from slimfront.trainables.shipping.int8 import as_int8
from slimfront.trainables.shipping.shipment import card_beside
from slimfront.trainables.shipping.stopwatch import Stopwatch
from slimfront.trainables.structure.copying import copied

SECTIONS = ("plugins", "task", "data", "latency", "compaction")
"""The sections of a config that are read."""
_BATCH = 64
_CHECKED = 1024
"""Compaction is checked on at most so many validation inputs, as in a search."""

log = logging.getLogger(__name__)


Metrics = Mapping[str, float]
"""Metrics, measures and times, by name."""


@dataclass(frozen=True)
class Shipped:
    """A network of the user's as it was shipped, and its card, which is at `card_path`."""

    shipment: Shipment
    given: Metrics
    """The metrics of the network that was given, on the validation and the test split."""
    compacted: Compacted
    times: Metrics
    """What `latency` of the config takes besides the card's table: of the file in a runtime, or by
    a command; empty where it names neither."""
    card: str
    card_path: Path

    def as_json(self) -> dict[str, Any]:
        """As plain data: metrics and measures before and after, and what was done."""
        shipment = self.shipment
        before = {**self.given, **shipment.dense_measures}
        after = {**shipment.trained_scores, **shipment.measures}
        plain = {
            "output": str(shipment.path),
            "card": str(self.card_path),
            "format": shipment.kind,
            "int8": shipment.int8,
            "given": _finite(before),
            "compact": _finite(after),
            "file": _finite(shipment.scores),
            "difference": finite(shipment.difference),
            "steps": [list(step) for step in self.compacted.report.steps],
        }
        if self.times:
            plain["times"] = dict(self.times)
        return plain

    def summary(self) -> str:
        """Quality and size before and after, on one line."""
        parts = []
        for name, before in self.given.items():
            called = name.replace("_", " ", 1)
            now = show_quality(self.shipment.scores[name])
            parts.append(f"{called} {show_quality(before)} → {now}")
        for name in ("params", "nonzero_params", "flops"):
            size = self.shipment.dense_measures[name]
            smaller = self.shipment.measures[name]
            parts.append(f"{name} {size:,.0f} → {smaller:,.0f}")
        return ", ".join(parts)


def _finite(numbers: Metrics) -> dict[str, float | None]:
    return {name: finite(value) for name, value in numbers.items()}


def compact_own(
    path: str,
    config: Path,
    output: Path,
    prune: str | None = None,
    kind: str | None = None,
    *,
    criterion: str | None = None,
    overrides: Sequence[str] = (),
    examples: int = 512,
    int8: bool = False,
) -> Shipped:
    """Writes a network of the user's to `output`, smaller, and its card to the same name with .md.

    Args:
        path: the import path of a function that returns a trained network.
        config: a config whose sections `SECTIONS` say what its data and its task are.
        prune: what goes first, such as `channels=0.5`: see `post_training.prune`; None: it is only
            made compact.
        criterion: what layers that go are chosen by: see `post_training.prune`.
        kind: one of `FORMATS`; what `output`'s suffix says if None.
        overrides: `path=value`, of the config.
        examples: how many training examples decide what goes.
        int8: whether to quantise the network; for onnx.

    Raises:
        UserError: if the network, the data or the output is not right, or nothing would go.
    """
    amount = None if prune is None else Amount.parse(prune)
    if criterion is not None and amount is None:
        raise UserError("--criterion says which layers go; give --prune layers=NUMBER beside it")
    if amount is not None:
        check_criterion(amount, criterion)
    chosen = format_of(output, kind)
    card_path = card_beside(output)
    base = load_sections(config, SECTIONS, overrides)
    if not base.compaction.enabled:
        raise UserError(
            f"{config}: compaction.enabled is false, and all that is done here is compaction; "
            "leave it out, or set it to true by --set"
        )
    found = _network(path)
    data = looked_at(base.data, torch.device("cpu"), base.task)
    network = adapted(found, data.call)
    given = _scores(network, data, config)
    batches = _batches(data, examples)
    made = _smaller(network, data, amount, criterion, batches, base.compaction)
    times = _times(made.network, Stopwatch(data, base.latency, network), int8=int8)
    shipment = ship(made.network, network, data, output, chosen, int8=int8, latency=base.latency)
    origin = _origin(path, amount, criterion, batches)
    for name, value in times.items():
        origin[f"{markdown.code(name)} {base.latency.taken}"] = f"{value:.4g}"
    text = card(
        shipment,
        path,
        data,
        base.data.name,
        origin,
        made.report.steps,
        given=given,
    )
    card_path.write_text(text, encoding="utf-8")
    return Shipped(shipment, given, made, times, text, card_path)


def _times(network: nn.Module, stopwatch: Stopwatch, *, int8: bool) -> dict[str, float]:
    """The times of a network, or of what it is as int8, where they are of a file.

    Raises:
        UserError: if they cannot be taken.
    """
    if not stopwatch.latency.of_file:
        return {}
    data = stopwatch.data
    try:
        if int8:
            quantised = as_int8(network, data)
            return stopwatch.measure_file(quantised.file, SPEEDS)
        inputs = data.prepare(data.validation.inputs[:8])
        return stopwatch.measure(network, inputs, SPEEDS)
    except TrialFailure as error:
        raise UserError(str(error)) from None


def _network(path: str) -> nn.Module:
    """What the function at an import path returns, in evaluation mode on the CPU."""
    function = import_by_path(path, "network")
    made: object = function
    if not isinstance(function, nn.Module):
        try:
            made = function()
        except Exception as error:
            raise UserError(
                f"network '{path}' raised {type(error).__name__}: {first_line(error)}"
            ) from error
    if not isinstance(made, nn.Module):
        raise UserError(
            f"network '{path}' returned a {type(made).__name__}; it must be a torch.nn.Module"
        )
    return made.cpu().eval()


def _scores(network: nn.Module, data: Dataset, config: Path) -> dict[str, float]:
    """The metrics on the validation and the test split.

    Raises:
        UserError: if the network does not take the inputs, or gives what the task does not take.
    """
    sample = data.validation.inputs[:8]
    targets = data.validation.targets[:8]
    try:
        with torch.no_grad():
            outputs = network(data.prepare(sample))
    except Exception as error:  # of the user's code
        raise UserError(
            f"the network cannot be run on the data of {config}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    data.task.options.check_outputs(outputs, targets, data.head)
    task = data.task
    validation = task.evaluate(network, *data.validation, split="val", prepare=data.prepare)
    test = task.evaluate(network, *data.test, split="test", prepare=data.prepare)
    return validation | test


def _batches(data: Dataset, examples: int) -> list[Batch]:
    """Training examples that are drawn by a fixed seed, as networks see them, without
    augmentation."""
    count = len(data.train.targets)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(count, generator=generator)[:examples]
    batches = []
    for stored, targets in data.batches(chosen.split(_BATCH)):
        batches.append(Batch(data.prepare(stored), targets))
    return batches


def _smaller(
    network: nn.Module,
    data: Dataset,
    amount: Amount | None,
    criterion: str | None,
    batches: list[Batch],
    compaction: Compaction,
) -> Compacted:
    """The network made compact, pruned first if an amount is given; `network` stays as it is."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return data.task.loss(outputs, targets)

    try:
        if amount is not None:
            return pruned(
                copied(network),
                batches,
                amount,
                loss,
                criterion=criterion,
                compaction=compaction,
            )
        inputs = data.prepare(data.validation.inputs[:_CHECKED])
        made = compact(network, inputs, compaction)
    except TrialFailure as error:
        raise UserError(f"the network cannot be made compact: {error}") from None
    done = [action for _, action, *_ in made.report.steps]
    if not any(action in _REMOVES for action in done):
        log.warning(
            "compaction found nothing to remove in the network; prune it by --prune, such as "
            "channels=0.5"
        )
    return made


_REMOVES = ("merged", "units removed", "heads removed", "removed", "block removed")


def _origin(
    path: str, amount: Amount | None, criterion: str | None, batches: list[Batch]
) -> dict[str, object]:
    """What the card says of how the network came about."""
    origin: dict[str, object] = {"network": markdown.code(path)}
    if amount is None:
        return origin | {"pruned": "not at all; only made compact"}
    examples = sum(len(batch.inputs) for batch in batches)
    how = "Taylor importance"
    if amount.kind == "layers":
        chosen = find_criterion(criterion or OUTPUTS)
        how = chosen.how
    text = f"{amount} on {examples:,} training examples, by {how}, without training"
    return origin | {"pruned": text}
