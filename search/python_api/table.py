"""The front of a search as a table of pandas."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from slimfront.search.config.schema import Config
from slimfront.search.record.ledger import Ledger
from slimfront.trainables.measures.measure import MEASURES
from slimfront.trainables.training.finishing import ONE_SHOT_SHARE

if TYPE_CHECKING:
    from pandas import DataFrame

    from slimfront.search.python_api.found import Member

Row = dict[str, Any]
_FIRST = ("trial", "step", "epoch", "recommended", "knee")


def table(config: Config, ledger: Ledger, members: "Iterable[Member]") -> "DataFrame":
    """A row for each member, in their order; see `Search.front` for the columns."""
    import pandas  # late: it takes half a second, and not everyone looks at a table

    knee = ledger.front.knee()
    recommended = ledger.front.recommended()
    members = list(members)
    measured = _measured(config, members)
    rows = []
    names = []
    for member in members:
        names.append(member.name)
        network = member.measured
        row: Row = {
            "trial": member.trial,
            "step": member.step,
            "epoch": member.epoch,
            "recommended": network is recommended,
            "knee": network is knee,
        }
        for name in measured:
            row[name] = member.measures.get(name, math.nan)
        for path in config.space:
            row[path] = member.values.get(path)
        rows.append(row)
    columns = [*_FIRST, *measured, *config.space]
    index = pandas.Index(names, name="member", dtype=str)
    return pandas.DataFrame(rows, index=index, columns=columns)


def _measured(config: Config, members: "Iterable[Member]") -> list[str]:
    """The names of what is known of each network: the metrics, then the measures that the config
    asks for, then what a trainable of one's own measured beside them."""
    names = []
    metrics = config.task.described()
    for metric in metrics:
        names.append(f"val_{metric.name}")
        names.append(f"test_{metric.name}")
    quality = metrics[0].name
    names.append(f"val_{quality}_se")
    names.append(f"test_{quality}_se")
    candidate = config.candidate({})
    names += MEASURES
    names += candidate.asked_measures()
    for own in candidate.own_measures():
        names.append(own.name)
    names.append("layers_merged")
    names.append(ONE_SHOT_SHARE)
    for member in members:
        names += member.measures
    distinct = dict.fromkeys(names)
    return list(distinct)
