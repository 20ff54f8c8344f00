"""What a search without a terminal prints of how it goes, and what `slimfront status` finds of
that."""

import io
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from slimfront.search.config.objectives import OBJECTIVES
from slimfront.search.engine.progress import ProgressDisplay, said_last
from slimfront.search.record.ledger import Ledger


def test_after_the_last_trial_status_tells_what_the_search_does_then() -> None:
    printed = io.StringIO()
    ledger = Ledger([OBJECTIVES["val_accuracy"]], {"val_accuracy": 1.0})
    ledger.planned = 0
    with ProgressDisplay(Console(file=printed)) as progress:
        assert said_last(printed.getvalue()) == ""
        progress.begun("mine", None)
        progress.update(ledger)
        assert said_last(printed.getvalue()).startswith("0/0 trials, front 0, hypervolume")
        progress.finishing("Writing the rest to MLflow, with the models of 17 networks")
    text = printed.getvalue() + "WARNING  MLflow did not take a write (gone)\n"
    assert said_last(text) == "Writing the rest to MLflow, with the models of 17 networks …"


def begun(console: Console) -> str:
    """What is shown of a search that has begun and is being finished, on a console."""
    ledger = Ledger([OBJECTIVES["val_accuracy"]], {"val_accuracy": 1.0})
    ledger.planned = 0
    with ProgressDisplay(console) as progress:
        progress.begun("mine", None)
        progress.update(ledger)
        progress.finishing("Measuring")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_what_is_no_terminal_gets_lines_without_control_codes() -> None:
    shown = begun(Console(file=io.StringIO()))
    assert "0/0 trials, front 0" in shown
    assert not set(shown) & {"\x1b", "\r", "\b"}


def notebook(monkeypatch: pytest.MonkeyPatch, *, widgets: bool) -> list[Any]:
    """Stands in for IPython; with `widgets` for ipywidgets too. What is displayed is in the list
    that is returned."""
    shown: list[Any] = []

    def display(what: Any, *_: Any, **__: Any) -> None:
        shown.append(what)

    class Output:
        def clear_output(self, **_: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    ipython, module = ModuleType("IPython"), ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    made = None
    if widgets:
        made = ModuleType("ipywidgets")
        made.Output = Output  # type: ignore[attr-defined]
        made.__spec__ = ModuleSpec("ipywidgets", None)
    monkeypatch.setitem(sys.modules, "ipywidgets", made)
    return shown


@pytest.mark.filterwarnings("error")
def test_a_notebook_gets_lines_where_it_has_no_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    displayed = notebook(monkeypatch, widgets=False)
    assert begun(Console(file=io.StringIO(), force_jupyter=True)) == ""
    texts = "".join(each.data["text/plain"] for each in map(bundle, displayed))
    assert "The search mine has begun" in texts
    assert "0/0 trials, front 0" in texts
    assert "\x1b" not in texts


@pytest.mark.filterwarnings("error")
def test_a_notebook_with_widgets_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    displayed = notebook(monkeypatch, widgets=True)
    assert begun(Console(file=io.StringIO(), force_jupyter=True)) == ""
    texts = "".join(each.data["text/plain"] for each in map(bundle, displayed) if each.data)
    assert "searching" in texts
    assert "0/0 trials, front 0" in texts


@dataclass(frozen=True)
class Bundle:
    data: dict[str, str]


def bundle(displayed: Any) -> Bundle:
    """What IPython would make of an object that is displayed."""
    if not hasattr(displayed, "_repr_mimebundle_"):
        return Bundle({})
    return Bundle(displayed._repr_mimebundle_([], []))
