"""What a search's own run in MLflow shows: its description, pictures, tables and tags, as they are
at one moment."""

import hashlib
import json
import logging
import platform
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from torch import nn

from slimfront.search.config.objectives import Direction, losses
from slimfront.search.config.plain import as_plain, dump
from slimfront.search.config.schema import Config
from slimfront.search.config.space import flatten
from slimfront.search.record.front.pareto import ranks
from slimfront.search.record.ledger import Ledger, SearchResult
from slimfront.search.record.report import as_json
from slimfront.search.record.trials import MeasuredNetwork, Status
from slimfront.search.tracking.models import log_model, mark_front
from slimfront.search.tracking.story import describe
from slimfront.search.tracking.write_queue import WriteQueue, making, param, unless_impossible
from slimfront.trainables.data import load_once
from slimfront.trainables.redaction import redact_values
from slimfront.trainables.shipping.int8 import as_int8
from slimfront.trainables.shipping.shipped import shipped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from slimfront.search.tracking.charts import History

log = logging.getLogger(__name__)

UI_URL = "http://127.0.0.1:5000"
"""Where `slimfront ui` shows a store that has no server."""


_ENDED: tuple[Status, ...] = ("completed", "stopped", "failed")


def live_metrics(ledger: Ledger) -> dict[str, float]:
    """The state of a search in numbers.

    `METRIC_threshold` is the bound of the constraint on the quality, or else what is about as good
    as the dense network's; `smallest_NAME` is the smallest such size on the front that is as good.
    """
    found: dict[str, float] = {}
    for status in _ENDED:
        count = ledger.counts[status]
        found[f"trials_{status}"] = float(count)
    members = ledger.front.members()
    front = [point.measures for point in members]
    quality = ledger.quality
    name = quality.name
    found["hypervolume"] = ledger.front.hypervolume()
    found["hypervolume_full"] = ledger.front.hypervolume_full()
    found["front_size"] = float(len(front))
    if front:
        best = front[0]
        found[f"best_{name}"] = best[name]
    threshold = quality_threshold(ledger)
    if threshold is None:
        return found
    metric = name.removeprefix("val_")
    found[f"{metric}_threshold"] = threshold
    able = [measures for measures in front if quality.as_good(measures[name], threshold)]
    if not able:
        return found
    for objective in ledger.objectives:
        smaller_is_better = objective.direction is Direction.MINIMIZE
        if smaller_is_better and not objective.measure.quality:
            smallest = min(measures[objective.name] for measures in able)
            found[f"smallest_{objective.name}"] = float(smallest)
    return found


def quality_threshold(ledger: Ledger) -> float | None:
    """The quality that counts as good enough; see `live_metrics`. None while it is not known."""
    quality = ledger.quality
    for constraint in ledger.constraints:
        at_least = quality.direction is Direction.MAXIMIZE
        if constraint.name == quality.name and constraint.at_least == at_least:
            return constraint.bound
    if ledger.dense_network is None:
        return None
    return ledger.region.quality_within(1)


class Page:
    """Writes the parent run of one search. Everything can be written again: the last writing
    counts.

    `run_ids` are those of the search's runs by label, the parent's under ''; the recorder adds to
    them.
    """

    def __init__(
        self,
        client: MlflowClient,
        config: Config,
        search: str,
        experiment_id: str,
        run_ids: dict[str, str],
        write_queue: WriteQueue,
    ) -> None:
        self.client = client
        self.write_queue = write_queue
        self.config = config
        self.search = search
        self.experiment_id = experiment_id
        self.run_ids = run_ids

    @property
    def parent(self) -> str:
        """The run's id."""
        return self.run_ids[""]

    def begin(self) -> None:
        """What is known before the first trial: config, environment, data set."""
        text = dump(self.config)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        params = flatten(as_plain(self.config))
        params["tracking.uri"] = self.config.tracking.shown_uri()
        entries: list[Param | RunTag] = []
        for key, value in params.items():
            if value is None:
                continue
            entry = param(key, value)
            entries.append(entry)
        tags = {"slimfront.version": version("slimfront"), "slimfront.config_digest": digest}
        for key, tag in tags.items():
            entries.append(RunTag(key, tag))
        parent = self.parent
        self.write_queue.log("", parent, entries)
        self.client.log_text(parent, text, "config.yaml")
        packages = environment()
        self.client.log_text(parent, packages, "environment.txt")
        unless_impossible("the data set", self._log_data)

    def _log_data(self) -> None:
        """The data set with its splits, as an input of the run."""
        options = self.config.candidate({}).data
        cpu = torch.device("cpu")
        with making("the description of the data set"):
            data = load_once(options, cpu, self.config.task)
        shown = redact_values(options.model_dump(mode="json"))
        # Wherever it lies, it is the same.
        anywhere = dict(shown)
        anywhere.pop("in_memory", None)
        digest = hashlib.sha256(_compact(anywhere).encode())
        sizes = []
        for name in ("train", "validation", "test"):
            targets = getattr(data, name).targets
            content = targets.cpu().numpy().tobytes()
            digest.update(content)
            sizes.append(f'"{name}": {len(targets)}')
        profile = (
            f'{{{", ".join(sizes)}, "outputs": {data.head}, '
            f'"input_shape": {list(data.input_shape)}, "normalised": "{data.normalised}"}}'
        )
        logged = Dataset(
            name=options.name,
            digest=digest.hexdigest()[:16],
            source_type="slimfront",
            source=_compact(shown),
            profile=profile,
        )
        training = InputTag("mlflow.data.context", "training")
        as_input = DatasetInput(logged, [training])
        self.client.log_inputs(self.parent, [as_input])

    def refresh(self, ledger: Ledger, history: "History") -> None:
        """What people look at while the search runs."""
        # What draws is imported where it draws first: a search begins half a second earlier.
        from slimfront.search.tracking import charts, figures

        text = describe(
            search=self.search,
            config=self.config,
            ledger=ledger,
            experiment_id=self.experiment_id,
            run_ids=self.run_ids,
        )
        self.client.set_tag(self.parent, "mlflow.note.content", text)
        if ledger.front.members():
            self._draw("front.png", lambda: figures.front_png(ledger, self.search))
        if history:
            self._draw("history.png", lambda: charts.history_png(history, self.search))
        self._log_json(ledger, 0.0, interrupted=False)

    def _draw(self, name: str, make: "Callable[[], Figure]") -> None:
        """Logs a picture; what cannot be drawn is left out with a warning, since the rest of the
        page does not depend on it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)

            def draw() -> None:
                with making(f"the picture {name}"):
                    make().savefig(path)
                self.client.log_artifact(self.parent, str(path))

            unless_impossible(name, draw)

    def _log_json(self, ledger: Ledger, seconds: float, *, interrupted: bool) -> None:
        uri = self.config.tracking.shown_uri()
        result = SearchResult(
            search=self.search,
            ledger=ledger,
            front=ledger.front.members(),
            wall_seconds=seconds,
            tracking_uri=uri,
            interrupted=interrupted,
            run_ids=dict(self.run_ids),
        )
        self.client.log_dict(self.parent, as_json(result), "front.json")

    def finish(
        self,
        ledger: Ledger,
        history: "History",
        seconds: float,
        *,
        interrupted: bool,
    ) -> None:
        """Everything, with the front's models, when a session has ended."""
        front = ledger.front.members()
        self.refresh(ledger, history)
        self._log_json(ledger, seconds, interrupted=interrupted)
        unless_impossible("importance.png", lambda: self._log_importances(ledger))
        if front:
            unless_impossible("front.html", lambda: self._log_front(ledger))
            unless_impossible("models", lambda: self._log_networks(ledger, front))

    def _log_importances(self, ledger: Ledger) -> None:
        from slimfront.search.tracking import charts

        with making("the importance of what varies"):
            shares = charts.importances(ledger, self.config.distributions())
        if shares:
            self._draw("importance.png", lambda: charts.importance_png(shares, self.search))

    def _log_front(self, ledger: Ledger) -> None:
        from slimfront.search.tracking import figures

        uri = self.config.tracking.shown_uri()
        base_url = UI_URL
        if uri.startswith("http"):
            base_url = uri
        with making("the page front.html"):
            html = figures.front_html(
                ledger, self.search, self.experiment_id, self.run_ids, base_url
            )
        self.client.log_text(self.parent, html, "front.html")

    def _draw_layers(
        self, stored: Sequence[tuple[MeasuredNetwork, nn.Module]], dense: nn.Module
    ) -> "Figure":
        from slimfront.search.tracking import charts

        quality = self.config.quality()
        return charts.layers_png(stored, dense, self.search, quality.name)

    def _log_networks(self, ledger: Ledger, front: list[MeasuredNetwork]) -> None:
        """Models of the front's networks, and which layers they kept; those whose file is lost are
        left out."""
        from slimfront.search.tracking import charts

        stored = []
        for point in front:
            network = charts.load(point, self.config)
            if network is None:
                continue
            stored.append((point, network))
        dense = None
        if ledger.dense_network:
            dense = charts.load(ledger.dense_network, self.config)
        if stored and dense is not None:
            self._draw("layers.png", partial(self._draw_layers, stored, dense))
        with making("models of the front"):
            options = self.config.candidate({}).data
            cpu = torch.device("cpu")
            data = load_once(options, cpu, self.config.task)
        few = data.validation.inputs[:2]
        inputs = data.raw(few)

        def log_network(point: MeasuredNetwork, network: nn.Module) -> None:
            with making(f"the model of {point.name}"):
                ships = shipped(network, data)
                int8 = None
                if self.config.ships_int8(point.trial.number, point.trial.values):
                    int8 = as_int8(network, data).file
            log_model(
                client=self.client,
                experiment_id=self.experiment_id,
                run_id=self.run_ids[point.trial.label],
                point=point,
                network=ships,
                inputs=inputs,
                int8=int8,
            )

        for point, network in stored:
            log_this = partial(log_network, point, network)
            unless_impossible(f"the model of {point.name}", log_this)
        runs = set(self.run_ids.values())
        mark_front(self.client, self.experiment_id, runs, front)


def last_tags(ledger: Ledger) -> dict[str, dict[str, str]]:
    """Tags by label: `front`, `knee` and `rank` (by the network that a trial ended with) of each
    trial; the parent's knee."""
    on_front = {point.trial.label for point in ledger.front.members()}
    knee = ledger.front.knee()
    trials = [trial for trial in ledger.trials if trial.last]
    measures = [trial.measures for trial in trials]
    points = losses(measures, ledger.objectives, ledger.dense_sizes)
    fronts = ranks(points)
    tags = {}
    if knee is not None:
        tags[""] = {"slimfront.knee": knee.name}
    recommended = ledger.front.recommended()
    if recommended is not None:
        tags[""]["slimfront.recommended"] = recommended.name
    for trial, rank in zip(trials, fronts, strict=True):
        is_knee = knee is not None and trial is knee.trial
        is_member = trial.label in on_front
        tags[trial.label] = {
            "slimfront.front": _yes_or_no(is_member),
            "slimfront.knee": _yes_or_no(is_knee),
            "slimfront.rank": str(rank),
        }
    return tags


def _yes_or_no(value: bool) -> str:
    return str(value).lower()


def environment() -> str:
    """Python, the machine, and every installed package with its version."""
    packages = set()
    for package in distributions():
        name = package.metadata["Name"]
        packages.add(f"{name}=={package.version}")
    python = platform.python_version()
    machine = platform.platform()
    head = f"# Python {python} on {machine}"
    in_order = sorted(packages, key=str.lower)
    return "\n".join([head, *in_order, ""])


def _compact(plain: object) -> str:
    """JSON without blanks."""
    return json.dumps(plain, separators=(",", ":"))
