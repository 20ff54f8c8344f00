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

_FIRST = ("trial", "step", "epoch", "recommended", "knee")


def table(config: Config, ledger: Ledger, members: "Iterable[Member]") -> "DataFrame":
    """A row for each member, in their order; see `Search.front` for the columns."""
    import pandas  # late: it takes half a second, and not everyone looks at a table

    knee = ledger.front.knee()
    recommended = ledger.front.recommended()
    rows = []
    names = []
    members = list(members)
    measured = _measured(config, members)
    for member in members:
        names.append(member.name)
        measured_as = member.measured
        marks = (measured_as is recommended, measured_as is knee)
        first = (member.trial, member.step, member.epoch, *marks)
        row: dict[str, Any] = dict(zip(_FIRST, first, strict=True))
        row |= {name: member.measures.get(name, math.nan) for name in measured}
        row |= {path: member.values.get(path) for path in config.space}
        rows.append(row)
    columns = [*_FIRST, *measured, *config.space]
    index = pandas.Index(names, name="member", dtype=str)
    return pandas.DataFrame(rows, index=index, columns=columns)


def _measured(config: Config, members: "Iterable[Member]") -> list[str]:
    """The names of what is known of each network: the metrics, then the measures that the config
    asks for, then what a trainable of one's own measured beside them."""
    names = []
    for metric in config.task.described():
        names += [f"val_{metric.name}", f"test_{metric.name}"]
    quality = config.task.described()[0].name
    names += [f"val_{quality}_se", f"test_{quality}_se"]
    candidate = config.candidate({})
    names += MEASURES
    names += candidate.asked_measures()
    names += [own.name for own in candidate.own_measures()]
    names += ["layers_merged", ONE_SHOT_SHARE]
    for member in members:
        names += member.measures
    return list(dict.fromkeys(names))
