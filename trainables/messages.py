"""What the driver of a search and its trials say to each other; each message has its one form here.

Ray Tune passes dictionaries: `as_config` and `as_result` make them, `of` reads them, and leaves
alone what Ray Tune adds to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

Plain = dict[str, Any]


@dataclass(frozen=True)
class TrialOrder:
    """What a trial is to train, from the driver."""

    candidate: dict[str, Any]
    """A `Candidate` as plain data."""
    resources: dict[str, float]
    """What Ray sets aside for it, such as {"CPU": 1, "GPU": 0.5}."""
    number: int | None = None
    """None for the dense reference."""
    values: dict[str, Any] = field(default_factory=dict)
    """What the search chose, by dotted path."""
    processes: int = 1
    """It trains in so many, on a GPU each if there are any; they share the cores."""
    report_at: tuple[int, ...] = ()
    """Epochs after which it reports whatever `training.report_every` says: the rungs."""
    resume_from: str | None = None
    """The directory of a checkpoint that an earlier training goes on from."""
    teacher_from: str | None = None
    """The directory of a checkpoint whose network teaches this one: the baseline's."""
    teacher_model: dict[str, Any] | None = None
    """The baseline's `Model` as plain data."""
    front: list[dict[str, float]] = field(default_factory=list)
    """What the search judges of each network that was on its front when the trial began; empty
    where that cannot be known before a network is evaluated."""
    session: str = ""
    """Names this run of the driver: a data factory of the user's is called once in each."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "TrialOrder":
        """From Ray Tune's config of a trial."""
        known = {}
        for field_of in fields(cls):
            name = field_of.name
            if name in config:
                known[name] = config[name]
        report_at = known.get("report_at", ())
        known["report_at"] = tuple(report_at)
        return cls(**known)

    def as_config(self) -> Plain:
        """As Ray Tune's config of a trial."""
        plain: Plain = {}
        for field_of in fields(self):
            name = field_of.name
            plain[name] = getattr(self, name)
        plain["report_at"] = list(self.report_at)
        return plain


@dataclass(frozen=True)
class NetworkReport:
    """A network as it would ship: its measures by name, and the steps of its compaction."""

    measures: dict[str, float]
    compaction: list[list[str]]
    step: int = 0
    """See `Trained.step`."""

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "NetworkReport":
        """From what `as_plain` made."""
        measures = dict(plain["measures"])
        compaction = [list(step) for step in plain["compaction"]]
        return cls(measures, compaction, plain.get("step", 0))

    def as_plain(self) -> Plain:
        """As plain data."""
        return {"measures": self.measures, "compaction": self.compaction, "step": self.step}


@dataclass(frozen=True)
class Report:
    """What a trial has done since its last report."""

    history: list[dict[str, Any]]
    """The metrics of each epoch."""
    epoch: int | None = None
    """How many were trained in all, those of the refit included; None if it failed."""
    network: NetworkReport | None = None
    """Of this moment; None if it failed."""
    pruned: tuple[NetworkReport, ...] = ()
    """What one-shot pruning made of it, at the end and at the rungs."""
    failure: str | None = None
    """Why it cannot go on."""
    finished: bool = False
    """Whether all of its epochs are over."""

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "Report":
        """From Ray Tune's result of a trial."""
        measures = {}
        for name in result.get("measured", ()):
            if name in result:
                measures[name] = result[name]
        network = None
        if measures:
            compaction = [list(step) for step in result.get("compaction", [])]
            network = NetworkReport(measures, compaction)
        pruned = [NetworkReport.of(one) for one in result.get("pruned", [])]
        return cls(
            history=list(result.get("history", [])),
            epoch=result.get("epoch"),
            network=network,
            pruned=tuple(pruned),
            failure=result.get("failure"),
            finished=bool(result.get("finished", False)),
        )

    def as_result(self) -> Plain:
        """As Ray Tune's result of a trial: its measures stand beside the rest, where schedulers
        look for them."""
        if self.network is None:
            return {"history": self.history, "failure": self.failure, "done": True}
        return {
            "history": self.history,
            "epoch": self.epoch,
            "compaction": self.network.compaction,
            "pruned": [network.as_plain() for network in self.pruned],
            "finished": self.finished,
            "done": self.finished,
            "measured": list(self.network.measures),
            **self.network.measures,
        }
