"""What a search prints: values as they are, in tables that fit the terminal."""

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest

from slimfront.search import terminal
from slimfront.search.config.objectives import OBJECTIVES, Constraint, Objective
from slimfront.search.record import report
from slimfront.search.record.events import NetworkMeasured, TrialBegan
from slimfront.search.record.ledger import Ledger, SearchResult
from slimfront.search.terminal import Column
from slimfront.trainables.measures.described import Measure
from slimfront.trainables.tasks.metrics import Better
from tests.search.test_ledger import end, ledger, region_ledger

ROOT = Path(__file__).parents[2]
WIDE = {f"model.args.value_{n}": n / 7 for n in range(40)}


def result(values: dict[str, Any], trials: int = 3, reason: str | None = None) -> SearchResult:
    book: Ledger = ledger()
    for number in (None, *range(trials)):
        book.apply(TrialBegan(number=number, values={} if number is None else values, seed=0))
        index = 0 if number is None else number + 1
        measures = {
            "val_accuracy": 0.9 - index / 10,
            "nonzero_params": 900_000 - 100 * index,
            "params": 1e6,
            "layers": 5,
            "flops": 2e6,
        }
        if reason is None:
            content = {"epoch": 30, "measures": measures, "compaction": [], "checkpoint": ""}
            book.apply(NetworkMeasured(number=number, **content))
        end(book, number, "failed" if reason else "completed", reason)
    return SearchResult(
        "mine", book, book.front.members(), 1.0, "sqlite:///x.db", interrupted=False
    )


@pytest.mark.parametrize(
    "value", ["c=[d]", "[/x]", "[red]", "[link=https://x]y[/link]", ":smile:", "\\[a]", "[/]"]
)
def test_values_are_printed_as_they_are(value: str) -> None:
    text = report.as_text(result({"model.args.c": value}), "slimfront", 160)
    assert text.count(value) == 3
    assert "\x1b" not in text


def test_what_cannot_be_printed_is_escaped_and_what_is_long_is_cut() -> None:
    text = report.as_text(result({"a": "x\n\x1b[31my", "b": "z" * 5_000}), "slimfront", 160)
    assert "x\\n\\x1b[31my" in text
    assert "zz … zz" in text
    assert max(map(len, text.splitlines()[:-2])) <= 160


def test_the_reason_of_a_failure_is_printed_as_it_is() -> None:
    text = report.as_text(result({}, reason="KeyError: [/x]\nmore"), "slimfront", 80)
    assert "(most often: KeyError: [/x]\\nmore)" in text


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_a_front_of_forty_values_fits_the_terminal_with_every_cell_whole(width: int) -> None:
    shown = result(WIDE)
    text = report.as_text(shown, "slimfront", width)
    tables = text[: text.index("Trials: ")]
    assert max(map(len, tables.splitlines())) <= width
    for cell in ("trial-000", "0.8000", "899,900", "1,000,000", "2,000,000"):
        assert cell in tables
    for n, value in enumerate(WIDE.values()):
        assert f"value_{n} " in tables
        assert f" {value:.3g} " in tables


def test_one_table_has_everything_where_there_is_room() -> None:
    text = report.as_text(result({"sparsifier.sparsity": 0.5}), "slimfront", 160)
    assert text.partition("Trials:")[0].count("trial-000") == 1
    assert "Their values" not in text
    narrow = report.as_text(result({"sparsifier.sparsity": 0.5}), "slimfront", 80)
    assert narrow.index("val acc") < narrow.index("Their values") < narrow.index("sparsity")


def test_the_first_column_is_that_of_every_table_and_a_single_wide_one_is_folded() -> None:
    columns = [
        Column("name", ["a", "b"], left=True),
        Column("x", ["1" * 50, "2"]),
        Column("y", ["3" * 30, "4"]),
    ]
    tables = terminal.as_tables("t", columns, 40)
    assert [[column.header for column in table.columns] for table in tables] == [
        ["name", "x"],
        ["name", "y"],
    ]
    assert max(map(len, terminal.as_text(tables, 40).splitlines())) <= 40


def test_every_console_is_made_in_one_place() -> None:
    for file in [*(ROOT / "search").rglob("*.py"), *(ROOT / "trainables").rglob("*.py")]:
        calls = [
            node.func
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call)
        ]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        assert "Console" not in names or file.name == "terminal.py", file


def unjudged(value: float, *constraints: Constraint, better: Better = "smaller") -> SearchResult:
    """A search of one trial by the mean squared error, which has this value."""
    quality = Objective(Measure("val_mse", better, scale="relative", quality=True))
    book = Ledger([quality, OBJECTIVES["nonzero_params"]], {"nonzero_params": 9.0}, constraints)
    for number in (None, 0):
        book.apply(TrialBegan(number=number, values={}, seed=0))
        measures = {"val_mse": value, "nonzero_params": 5.0, "params": 9.0}
        sizes = {"layers": 2.0, "flops": 20.0}
        content = {"epoch": 3, "compaction": [], "checkpoint": "", "pruned": []}
        book.apply(NetworkMeasured(number=number, measures=measures | sizes, **content))
        end(book, number, "completed")
    return SearchResult(
        "mine", book, book.front.members(), 1.0, "sqlite:///x.db", interrupted=False
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_quality_that_is_no_number_is_told_and_is_null_in_json(value: float) -> None:
    found = unjudged(value)
    assert found.front == []
    text = report.as_text(found, "slimfront")
    assert f"Trials: 1 completed (val_mse was {value} for every network); front 0" in text
    plain = report.as_json(found)
    assert plain["dense"]["val_mse"] is None
    json.dumps(plain, allow_nan=False)


def test_constraints_that_no_network_keeps_are_told_with_the_nearest() -> None:
    bounds = (Constraint("nonzero_params", False, 100.0), Constraint("val_mse", False, 2.5))
    text = report.as_text(unjudged(3.25, *bounds), "slimfront")
    assert "(no network keeps val_mse <= 2.5; the nearest has 3.25)" in text


def test_what_is_no_quality_is_a_dash() -> None:
    assert [report.show_quality(value) for value in (None, math.nan, -0.5, -12345.678)] == [
        "-",
        "-",
        "-0.5000",
        "-12346",
    ]


def test_what_is_not_shown_is_counted_with_the_command_that_shows_it() -> None:
    book = region_ledger()
    for point in (*book.front.members(), book.dense_network):
        assert point is not None
        point.measures |= {"params": 1000.0, "layers": 3.0, "flops": 2000.0}
    found = SearchResult(
        "mine", book, book.front.members(), 1.0, "sqlite:///x.db", interrupted=False
    )
    text = report.as_text(found, "slimfront", 160)
    shows = "see them: slimfront front mine --all --tracking-uri sqlite:///x.db"
    assert f"Not shown: 2 more than 0.05 below dense; {shows}\n" in text
    assert "trial-004" not in text
    everything = report.as_text(found, "slimfront", 160, everything=True)
    assert "Not shown" not in everything
    assert "trial-004" in everything
