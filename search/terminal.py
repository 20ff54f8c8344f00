"""What goes to the terminal: text as it is, in tables as narrow as the terminal.

Values of users stand in what is printed. Rich would read `[d]` in them as markup and `:x:` as a
picture, so every console is made here.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from slimfront.trainables.errors import one_line

_LONGEST_CELL = 60


def console(**options: Any) -> Console:
    """A console that prints text as it is; `options` as of rich's `Console`."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def cell(value: object) -> str:
    """A value in a table: on one line, with escapes for what cannot be printed, and without the
    middle where it is long."""
    return one_line(str(value), _LONGEST_CELL)


@dataclass(frozen=True)
class Column:
    """A column of a table; its head may have several lines."""

    head: str
    cells: Sequence[str]
    left: bool = False

    @property
    def width(self) -> int:
        """Characters of its widest line."""
        lines = []
        for text in (self.head, *self.cells):
            lines += text.split("\n")
        return max(cell_len(line) for line in lines)


def as_tables(
    title: str, columns: Sequence[Column], width: int, sections: Sequence[int] = ()
) -> list[Table]:
    """Tables that fit into `width`: as many columns as fit in the first, the others below, each
    after the first column again.

    Args:
        sections: the rows that a line is drawn below.
    """
    first, *others = columns
    parts: list[list[Column]] = [[first]]
    for column in others:
        part = parts[-1]
        wider = [*part, column]
        if len(part) > 1 and not fits(wider, width):
            part = [first]
            parts.append(part)
        part.append(column)
    tables = []
    shown_title: str | None = title
    for part in parts:
        table = _table(shown_title, part, sections)
        tables.append(table)
        shown_title = None
    return tables


def fits(columns: Sequence[Column], width: int) -> bool:
    """Whether one table of these columns is narrow enough."""
    needed = 1
    for column in columns:
        needed += column.width + 3  # a blank on each side, and a line
    return needed <= width


def _table(title: str | None, columns: Sequence[Column], sections: Sequence[int]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(
            column.head,
            justify="left" if column.left else "right",
            overflow="fold",
            vertical="bottom",
        )
    cells = [column.cells for column in columns]
    for number, row in enumerate(zip(*cells, strict=True)):
        table.add_row(*row, end_section=number in sections)
    return table


def as_text(tables: Sequence[Table], width: int) -> str:
    """Tables as text."""
    text = io.StringIO()
    printed = console(file=text, width=width)
    for table in tables:
        printed.print(table)
    return text.getvalue()
