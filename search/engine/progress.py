"""Shows how a search goes: a live bar in a terminal or a notebook, a line now and then elsewhere;
always on stderr."""

import time
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Self

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from slimfront.search.record.ledger import Ledger

_LINE_EVERY_S = 5.0

BEGUN = "The search {search} has begun"
"""How the line begins that says so."""

_DOING = " …"
"""How the lines end that say what is done after the last trial."""


def said_last(text: str) -> str:
    """Of what a search has printed, the last line that says how it goes, or what it does after its
    last trial; empty if there is none."""
    lines = [
        line
        for line in text.splitlines()
        if (" trials, " in line and "hypervolume" in line) or line.endswith(_DOING)
    ]
    if lines:
        return lines[-1]
    return ""


class Progress:
    """Whoever shows how the search goes; this one shows nothing."""

    def begun(self, search: str, page: str | None) -> None:
        """Called before the first trial, with the page of the search in an MLflow server, if there
        is one."""

    def update(self, ledger: "Ledger") -> None:
        """Called when a trial starts, reports or ends."""

    def finishing(self, what: str) -> None:
        """Called after the last trial, with what is being done."""


class ProgressDisplay(Progress):
    """Trials done, front size, hypervolume and time left: a bar in a terminal and in a notebook
    with ipywidgets, lines elsewhere. A context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.first_end: float | None = None
        self.first_done = 0
        self.last_line = time.monotonic()
        self.bar = rich.progress.Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
        )
        self.task = self.bar.add_task("starting", total=None, state="")

    @property
    def live(self) -> bool:
        """Whether there is a bar that moves: in a terminal, and in a notebook that can change what
        it shows."""
        if self.console.is_jupyter:
            return find_spec("ipywidgets") is not None
        return self.console.is_terminal

    def __enter__(self) -> Self:
        if self.live:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.bar.refresh()  # in a notebook, stopping does not show the last state
            self.bar.stop()

    def begun(self, search: str, page: str | None) -> None:
        """Says that a search has begun, and where it can be watched, if anywhere."""
        watch = ""
        if page:
            watch = f"; watch it at {page}"
        self.console.print(
            f"{BEGUN.format(search=search)}{watch}", markup=False, highlight=False, soft_wrap=True
        )

    def update(self, ledger: "Ledger") -> None:
        """Shows the present state; without a bar, at most one line every few seconds."""
        done = len(ledger.trials) - ledger.counts["running"]
        if self.live:
            self.bar.update(
                self.task,
                completed=done,
                total=ledger.planned,
                description="searching",
                state=self._state(ledger, done),
            )
        elif time.monotonic() - self.last_line >= _LINE_EVERY_S or done == ledger.planned:
            self.console.print(self._state(ledger, done), highlight=False)
            self.last_line = time.monotonic()

    def finishing(self, what: str) -> None:
        """Says what is being done after the last trial."""
        self.console.print(f"{what}{_DOING}", markup=False, highlight=False, soft_wrap=True)

    def _state(self, ledger: "Ledger", done: int) -> str:
        stopped = ledger.counts["stopped"]
        failed = ledger.counts["failed"]
        parts = [f"{done}/{ledger.planned} trials"]
        if stopped:
            parts.append(f"{stopped} stopped early")
        if failed:
            parts.append(f"{failed} failed")
        if ledger.repeated:
            parts.append(f"{len(ledger.repeated)} repeated and not trained")
        parts.append(f"front {len(ledger.front.members())}")
        parts.append(f"hypervolume {ledger.front.hypervolume():.4f}")
        # The first trials wait for processes to start, so the rate counts from the first end of a
        # trial.
        if done and self.first_end is None:
            self.first_end = time.monotonic()
            self.first_done = done
        elif self.first_end is not None and done > self.first_done:
            per_trial = (time.monotonic() - self.first_end) / (done - self.first_done)
            parts.append(f"about {per_trial * (ledger.planned - done):.0f} s left")
        return ", ".join(parts)
