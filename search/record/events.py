"""What a journal can say: one frozen class for each kind of event, which checks what it is given.

An event is written as one JSON object: `event` is its kind, `n` its number from 1, `time` its time
in ms, `elapsed` the ms since the process of its session opened the journal, on a clock that nobody
sets; the rest are the fields of its class.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

Ending = Literal["completed", "stopped", "failed"]
"""How a trial ends by itself."""


Values = dict[str, Any]
"""The values of a candidate, by dotted path."""


class Event(BaseModel):
    """What all events have. Keys that a class does not know are left out when one is read."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: ClassVar[str]

    time: int = 0
    n: int | None = None
    """None in journals of version 0.1."""
    elapsed: int | None = None
    """None in journals of version 0.1, which have the time of day alone."""

    def content(self) -> dict[str, Any]:
        """The fields that only this kind has, as plain data."""
        found = {}
        for name in type(self).model_fields:
            if name not in Event.model_fields:
                found[name] = getattr(self, name)
        return found

    def as_plain(self) -> dict[str, Any]:
        """All of it, as it is written."""
        head = {"event": self.kind, "n": self.n, "time": self.time, "elapsed": self.elapsed}
        return head | self.content()


class OfTrial(Event):
    """An event about a trial, by its number; the dense reference has none."""

    number: int | None


class SearchBegan(Event):
    """A search begins: its config as YAML, sizes of the dense network by measure, values to try,
    and the folders beside whose configs it found modules of the user's."""

    kind = "begun"
    search: str = ""
    config: str = ""
    dense_sizes: dict[str, float]
    starts: list[Values] = []
    beside: list[str] = []


class SessionBegan(Event):
    """A process takes the search up: the first, 1, or one that resumes it."""

    kind = "session"
    session: int


class TrialBegan(OfTrial):
    """A trial begins: its values by dotted path, and the seed of its training."""

    kind = "trial"
    values: Values
    seed: int


class ProposalRepeated(Event):
    """The sampler proposed, as trial `number`, the values of trial `first`: it is not trained, and
    the study is told how the first ended."""

    kind = "repeated"
    number: int
    values: Values
    first: int


class EpochsReported(OfTrial):
    """A trial reported: metrics of each epoch since its last report."""

    kind = "epochs"
    history: list[dict[str, Any]]


class NetworkMeasured(OfTrial):
    """The network of a trial was measured as it would ship, and those pruned from it."""

    kind = "point"
    epoch: int
    measures: dict[str, float]
    compaction: list[Any]
    checkpoint: str | None
    """Below the folder of the search; None where it is kept nowhere."""
    pruned: list[dict[str, Any]] = []
    """`measures` and `compaction` of each."""


class NetworksPruned(OfTrial):
    """A network that was measured before, without knowing that it was the trial's last, was pruned
    in one shot."""

    kind = "pruned"
    epoch: int
    pruned: list[dict[str, Any]]
    """`measures` and `compaction` of each."""


class CheckpointMoved(OfTrial):
    """The checkpoint of a network that was measured before is kept elsewhere."""

    kind = "moved"
    epoch: int
    checkpoint: str | None


class TrialEnded(OfTrial):
    """A trial ended by itself."""

    kind = "ended"
    status: Ending
    reason: str | None


class TrialInterrupted(OfTrial):
    """A trial was cut off with the search."""

    kind = "interrupted"


class TrialContinued(OfTrial):
    """A trial that had been cut off was taken up again."""

    kind = "continued"


class NetworkTested(OfTrial):
    """A network's metrics on the test split, and the standard errors of its quality on both; `step`
    is that of one-shot pruning, 0 for none."""

    kind = "tested"
    epoch: int
    step: int = 0
    metrics: dict[str, float]
    """By name, such as `test_f1`."""

    @model_validator(mode="before")
    @classmethod
    def _of_version_0_1(cls, plain: Any) -> Any:
        """There the only metric stood by itself."""
        if not isinstance(plain, dict) or "metrics" in plain:
            return plain
        metrics = {}
        for name, value in plain.items():
            if name.startswith("test_"):
                metrics[name] = value
        if metrics:
            return {**plain, "metrics": metrics}
        return plain


class NetworkTimed(OfTrial):
    """A network was timed again when the search was over, and nothing ran beside it."""

    kind = "timed"
    epoch: int
    step: int = 0
    times: dict[str, float]
    """By measure, such as `latency_ms`; the means of several times."""
    each: list[dict[str, float]] = []
    """Those times, where there are several."""


class RungReached(Event):
    """Early stopping compared a trial at a rung: see `MultiObjectiveASHA`."""

    kind = "rung"
    entry: dict[str, Any]


class NetworkReplicated(OfTrial):
    """A network was trained anew with another seed: its measures, and metrics on both splits."""

    kind = "replicated"
    epoch: int
    step: int = 0
    seed: int
    measures: dict[str, float]


class SessionEnded(Event):
    """A session ended, `seconds` after the search began, sessions before it included."""

    kind = "finished"
    status: Literal["completed", "interrupted", "failed"]
    seconds: float


KINDS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        SearchBegan,
        SessionBegan,
        TrialBegan,
        ProposalRepeated,
        EpochsReported,
        NetworkMeasured,
        NetworksPruned,
        CheckpointMoved,
        TrialEnded,
        TrialInterrupted,
        TrialContinued,
        NetworkTested,
        NetworkReplicated,
        NetworkTimed,
        RungReached,
        SessionEnded,
    )
}


class UnknownKind(ValueError):
    """An event of a kind that this version does not know."""


def parse(plain: dict[str, Any]) -> Event:
    """The event that `as_plain` wrote.

    Raises:
        UnknownKind: if it is of a kind that this version does not know.
        ValueError: if a field is missing, or not of its type.
    """
    kind = plain.get("event")
    if not isinstance(kind, str):
        raise ValueError("it is no event")
    if kind not in KINDS:
        raise UnknownKind(f"events of the kind '{kind}' are unknown")
    try:
        return KINDS[kind].model_validate(plain)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
    first = mistakes[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        raise ValueError(f"its event '{kind}' has no '{where}'")
    raise ValueError(f"its event '{kind}' has a wrong '{where}': {first['msg']}")


def seconds_spent(events: Iterable[Event]) -> float:
    """Seconds of wall time that the sessions of a journal took, up to their last sign of life."""
    spent = 0.0
    begun: float | None = None
    last = 0.0
    for event in events:
        now = float(event.time)
        # Journals of version 0.1 have the time of day alone.
        if event.elapsed is not None:
            now = float(event.elapsed)
        if isinstance(event, SessionBegan):
            spent += _between(begun, last)
            begun = now
        last = now
    spent += _between(begun, last)
    return spent / 1000


def _between(begun: float | None, last: float) -> float:
    if begun is None:
        return 0.0
    return max(last - begun, 0.0)
