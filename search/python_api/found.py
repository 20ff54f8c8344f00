"""A search as Python sees it: its front as a table, and the members of that as networks."""

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimfront.search.config.schema import Config
from slimfront.search.python_api.table import table
from slimfront.search.record.front.picks import member_name, pick
from slimfront.search.record.ledger import Ledger, SearchResult
from slimfront.search.record.report import as_json
from slimfront.search.record.trials import MeasuredNetwork, label

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import nn

    from slimfront.search.record.export import Exported
    from slimfront.trainables.shipping import Format

_CARD_OF: "Format" = "safetensors"
"""The format of the file that a card is about where none was exported."""


class Member:
    """A network of a front.

    `name` is what `Search.pick` and `--pick` take: trial-007@30, and /2 behind it where it was
    pruned in one shot. `trial` is the label of its trial, `epoch` the epochs that it was trained
    for, `step` the step of one-shot pruning (0: none). `measures` are its metrics and measures by
    name, those of the test split among them once they were taken; `values` are the searched
    values of its trial by dotted path. `timed_again` are the measures that are times, taken in
    quiet when the search that recommends it was over; None where they were not.
    """

    def __init__(self, search: "Search", measured: MeasuredNetwork) -> None:
        self.measured = measured
        self.trial = measured.trial.label
        self.epoch = measured.epoch
        self.step = measured.step
        self.name = member_name(
            {"trial": self.trial, "epoch": self.epoch, "one_shot": self.step},
        )
        self.measures: Mapping[str, float] = {**measured.measures, **(measured.tested or {})}
        self.timed_again: Mapping[str, float] | None = measured.timed_again
        self.values: Mapping[str, Any] = measured.trial.values
        self._search = search

    def __repr__(self) -> str:
        quality = self._search.ledger.quality.name
        return (
            f"Member({self.name} of {self._search.name}: {quality} "
            f"{self.measures[quality]:.4g}, {self.measures['nonzero_params']:,.0f} non-zero "
            "parameters)"
        )

    def network(self, *, shipped: bool = False) -> "nn.Module":
        """The compact network, on the CPU and in evaluation mode; a new one in each call.

        It takes inputs as training gave them to it, normalised where the config says so, and gives
        what it was trained to give: standardised numbers in a regression.

        Args:
            shipped: with it the network is what exported files are: it takes inputs as the data has
                them, and gives outputs in the unit of the targets. The data is read for that.

        Raises:
            UserError: if its file is lost or damaged, or the data cannot be read.
        """
        from slimfront.search.record.export import read_member, read_shipped

        config = self._search.config
        if shipped:
            return read_shipped(config, self.measured)
        return read_member(config, self.measured)

    def export(
        self, path: str | Path, kind: str | None = None, *, int8: bool = False
    ) -> "Exported":
        """Writes the network to a file that is checked in a fresh process, with its card beside it,
        as `slimfront export` does.

        Args:
            path: the file to write; the card has the same name with the suffix .md.
            kind: pt2, onnx or safetensors; left out, what the suffix of `path` says.
            int8: whether to quantise the network after training; for onnx.

        Returns:
            The shipment, the card and where that is.

        Raises:
            UserError: if the network is lost, or cannot be written there.
        """
        from slimfront.search.record.export import export_member

        exported = export_member(
            self._search.config,
            self._search.name,
            self._search.ledger,
            self.measured,
            Path(path),
            kind,
            int8=int8,
        )
        self.__dict__["card"] = exported.card
        return exported

    @cached_property
    def card(self) -> str:
        """The model card, in Markdown: that of the last file that `export` wrote; before, that of a
        file that is written and checked for it, which takes seconds, and not kept.

        Raises:
            UserError: if the network is lost.
        """
        from slimfront.search.record.export import export_member, kind_of

        config = self._search.config
        kind = kind_of(config, self.measured, _CARD_OF)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{self._search.name}.{kind}")
            search = self._search
            return export_member(config, search.name, search.ledger, self.measured, path).card


class Search:
    """A search that has ended, or, as `load` reads it, one that may be running.

    `name` is that of the search; `config` is what was searched; `ledger` is all that is known of
    its trials.
    """

    def __init__(self, config: Config, result: SearchResult) -> None:
        self.config = config
        self.result = result

    def __repr__(self) -> str:
        return f"Search({self.name}: front {len(self.result.front)})"

    @property
    def front(self) -> "DataFrame":
        """The non-dominated networks, best first, as a new table.

        The index, `member`, has the names that `pick` takes. Columns: `trial`, `step` of one-shot
        pruning (0: none), `epoch`, whether it is `recommended` or the `knee`; the metrics of the
        task on the validation and the test split, the quality first; the measures; and the searched
        values by dotted path. A search has the same columns in the same order at all times. What
        was not taken, such as metrics of the test split while the search runs, is NaN.
        """
        return table(self.config, self.ledger, self.members)

    @cached_property
    def members(self) -> Sequence[Member]:
        """The networks of the front, best first."""
        return tuple(Member(self, measured) for measured in self.result.front)

    def pick(self, which: str | int = "recommended", min_quality: float | None = None) -> Member:
        """A network of the front.

        Args:
            which: recommended, knee, smallest or best; or a trial of the front, such as trial-007
                or 7, with @EPOCH and /STEP behind it where it is there more than once.
            min_quality: only networks of this quality, the first metric of the task, or better are
                looked at.

        Raises:
            UserError: if there is none.
        """
        wanted = which
        if isinstance(which, int):
            wanted = label(which)
        report = as_json(self.result)
        chosen = pick(report, str(wanted), min_quality, option="pick '{wanted}'")
        place: int = report["front"].index(chosen)
        return self.members[place]

    def network(self, member: Member | MeasuredNetwork) -> "nn.Module":
        """The compact network of a member of the front, on the CPU and in evaluation mode.

        Raises:
            UserError: if its file is lost or damaged.
        """
        from slimfront.search.record.export import read_member

        measured = member.measured if isinstance(member, Member) else member
        return read_member(self.config, measured)

    @property
    def name(self) -> str:
        """The name of the search."""
        return self.result.search

    @property
    def search(self) -> str:
        """The same."""
        return self.result.search

    @property
    def ledger(self) -> Ledger:
        """All that is known of the trials."""
        return self.result.ledger

    @property
    def dense(self) -> Mapping[str, float]:
        """The measures of the dense network that the front is compared with; empty before it was
        trained."""
        network = self.ledger.dense_network
        if network is None:
            return {}
        return {**network.measures, **(network.tested or {})}

    @property
    def hypervolume(self) -> float:
        """The front's hypervolume in the region that matters, from 0 (nothing there is smaller than
        dense) to 1."""
        return self.ledger.front.hypervolume()

    @property
    def wall_seconds(self) -> float:
        """Seconds that the search took, or has taken until now."""
        return self.result.wall_seconds

    @property
    def tracking_uri(self) -> str:
        """The MLflow store, without a password."""
        return self.result.tracking_uri

    @property
    def interrupted(self) -> bool:
        """Whether the search was cut off: `slimfront resume` continues it."""
        return self.result.interrupted

    @property
    def undelivered(self) -> bool:
        """Whether the tracking store did not take everything when the search ended; known of
        searches that were run here, and false of those that were loaded."""
        return self.result.undelivered

    @property
    def run_ids(self) -> Mapping[str, str]:
        """MLflow run ids by the trials' labels; empty for a search that was loaded."""
        return self.result.run_ids

    @property
    def all_failed(self) -> bool:
        """Whether no trial completed or was stopped early, though none was cut off."""
        return self.result.all_failed
