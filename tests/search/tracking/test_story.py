"""The description of a search is Markdown in which values are no markup."""

import html
import re
from typing import Any

from slimfront.search.config.schema import Config
from slimfront.search.record.events import NetworkMeasured, TrialBegan
from slimfront.search.record.ledger import Ledger
from slimfront.search.tracking.story import describe
from tests.conftest import SMALL_CONFIG
from tests.search.test_ledger import end

HOSTILE = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "a | b",
    "`x`",
    "<img src=x onerror=y>",
]


def test_values_of_a_config_are_neither_html_nor_links_nor_cells() -> None:
    path = "model.args.<b>|`p`"
    space: dict[str, Any] = {
        path: {"choices": HOSTILE},
        "sparsifier.sparsity": {"low": 0.1, "high": 0.9},
    }
    config = Config.model_validate(SMALL_CONFIG | {"model": {"factory": "a:b"}, "space": space})
    book = Ledger(config.chosen_objectives(), {"nonzero_params": 1000})
    for number, value in enumerate(HOSTILE):
        book.apply(
            TrialBegan(number=number, values={path: value, "sparsifier.sparsity": 0.5}, seed=0)
        )
        measures = {
            "val_accuracy": 0.9 - number / 10,
            "nonzero_params": 900 - number,
            "params": 1e6,
            "layers": 5,
            "flops": 2e6,
        }
        book.apply(
            NetworkMeasured(number=number, epoch=1, measures=measures, compaction=[], checkpoint="")
        )
        end(book, number)
    story = describe("mine", config, book, "1", {})
    outside = re.sub(r"(?<!\\)(`+)(?!`).+?(?<!`)\1(?!`)", "", story)  # code is shown as it is
    assert "<" not in outside
    assert "](javascript" not in outside
    assert "alert" in story
    rows = [
        line
        for line in story.splitlines()
        if line.startswith("| ") and "p" in line and "varied" not in line
    ]
    varied = [row for row in rows if "sparsity" in row or "args" in row]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in varied] == [3, 3]


def test_no_choice_is_lost() -> None:
    space = {
        "training.optimizer": {"choices": ["adam", "sgd"]},
        "sparsifier.sparsity": {"low": 0.1, "high": 0.9},
    }
    config = Config.model_validate(SMALL_CONFIG | {"space": space})
    story = describe(
        "mine", config, Ledger(config.chosen_objectives(), {"nonzero_params": 1000}), "1", {}
    )
    assert "| `training.optimizer` | adam, sgd |" in story
    assert "| `sparsifier.sparsity` | 0.1 to 0.9 |" in story


def test_what_depends_on_what_in_a_space_is_told() -> None:
    space: dict[str, Any] = {
        "sparsifier": {"choices": [{"name": "rigl", "sparsity": 0.9}, None]},
        "sparsifier.drop": {"low": 0.1, "high": 0.5, "when": {"sparsifier.name": ["rigl"]}},
        "training.lr": {"low": 0.1, "high": 1, "log": True},
        "refit.lr": {"same_as": "training.lr", "factor": 0.5},
    }
    changes = {"refit": {"epochs": 1}, "space": space}
    config = Config.model_validate(SMALL_CONFIG | changes)
    book = Ledger(config.chosen_objectives(), {"nonzero_params": 1000})
    described = html.unescape(describe("s", config, book, "1", {}))
    assert "| `sparsifier` | {name: rigl, sparsity: 0.9}, None |" in described
    assert "| `sparsifier.drop` | 0.1 to 0.5, where `sparsifier.name` is rigl |" in described
    assert "| `refit.lr` | 0.5 times `training.lr` |" in described
