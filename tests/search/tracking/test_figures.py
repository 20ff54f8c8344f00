from itertools import product

import pytest
from matplotlib.figure import Figure

from search.objectives import OBJECTIVES
from search.records import Ledger, TrialRecord
from search.tracking.figures import front_html, front_png

MEASURES = {"val_accuracy": 0.9, "params": 200, "nonzero_params": 100, "layers": 2, "flops": 400, "bytes": 900}


def ledger(objectives: list[str], *, dense: bool = True) -> Ledger:
    book = Ledger([OBJECTIVES[name] for name in objectives], dict.fromkeys(MEASURES, 1000.0))
    book.add(TrialRecord(0, {"sparsifier.sparsity": 0.5}, 0, "completed", measures=dict(MEASURES)))
    book.add(TrialRecord(1, {}, 0, "failed", reason="diverged"))
    book.add(TrialRecord(None, {}, 0, "completed" if dense else "failed", measures=dict(MEASURES) if dense else {}))
    return book


@pytest.mark.parametrize(
    ("objectives", "dense"),
    list(product([["val_accuracy", "nonzero_params"], ["layers", "flops"], ["val_accuracy", "layers", "bytes"]], [True, False])),
)
def test_every_choice_of_objectives_has_its_pictures(objectives: list[str], dense: bool) -> None:
    book = ledger(objectives, dense=dense)
    figure = front_png(book, book.objectives, "a search")
    assert isinstance(figure, Figure)
    assert len(figure.axes) == max(1, sum(name != "val_accuracy" for name in objectives) - ("val_accuracy" not in objectives))
    page = front_html(book, book.objectives, "a search")
    assert "trial-000" in page
    assert "sparsifier.sparsity = 0.5" in page
    assert "<script src=" not in page
