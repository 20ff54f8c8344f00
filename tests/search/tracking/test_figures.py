import io
from itertools import product

import pytest
from matplotlib.figure import Figure

from slimfront.search.config.objectives import OBJECTIVES
from slimfront.search.record.events import NetworkMeasured, TrialBegan, TrialEnded
from slimfront.search.record.ledger import Ledger
from slimfront.search.tracking.figures import _axis, front_html, front_png
from tests.search.test_ledger import region_ledger

MEASURES = {
    "val_accuracy": 0.9,
    "params": 200,
    "nonzero_params": 100,
    "layers": 2,
    "flops": 400,
    "bytes": 900,
}
MEASURES |= {"speedup": 2.0, "latency_ms": 0.01, "bytes_compressed": 300.0}


def ledger(objectives: list[str], *, dense: bool = True) -> Ledger:
    book = Ledger([OBJECTIVES[name] for name in objectives], dict.fromkeys(MEASURES, 1000.0))
    for number, values in ((0, {"sparsifier.sparsity": 0.5}), (1, {}), (None, {})):
        book.apply(TrialBegan(number=number, values=values, seed=0))
    for number in (0, None) if dense else (0,):
        book.apply(
            NetworkMeasured(
                number=number, epoch=3, measures=MEASURES, compaction=[], checkpoint=None
            )
        )
    book.apply(TrialEnded(number=1, status="failed", reason="diverged"))
    return book


@pytest.mark.parametrize(
    ("objectives", "dense"),
    list(
        product(
            [
                ["val_accuracy", "nonzero_params"],
                ["layers", "flops"],
                ["val_accuracy", "layers", "bytes"],
                ["speedup", "val_accuracy"],
                ["latency_ms", "bytes_compressed", "val_accuracy"],
                ["speedup", "params"],
            ],
            [True, False],
        )
    ),
)
def test_every_choice_of_objectives_has_its_pictures(objectives: list[str], dense: bool) -> None:
    book = ledger(objectives, dense=dense)
    figure = front_png(book, "a search")
    assert isinstance(figure, Figure)
    figure.savefig(io.BytesIO())
    assert len(figure.axes) == max(
        1, sum(name != "val_accuracy" for name in objectives) - ("val_accuracy" not in objectives)
    )
    page = front_html(book, "a search")
    assert "trial-000" in page
    assert "sparsifier.sparsity = 0.5" in page
    assert "<script src=" not in page


def test_the_pictures_show_the_region_that_matters() -> None:
    book = region_ledger()
    for point in (*book.front.members(), book.dense_network):
        assert point is not None
        point.measures |= {"params": 1.0, "layers": 1.0, "flops": 1.0}
    (axes,) = front_png(book, "a search").axes
    low, high = axes.get_ylim()
    assert 0.91 < low < 0.93
    assert 0.985 < high < 1
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["trials", "front", "knee", "recommended", "dense network"]
    page = front_html(book, "a search")
    assert '"label":"what matters"' in page
    assert 'role="img" aria-label="A front of 5 networks. Recommended: trial-001, ' in page


def test_without_a_network_in_the_region_the_whole_front_is_shown() -> None:
    book = ledger(["val_accuracy", "nonzero_params"], dense=False)
    assert "what matters" not in front_html(book, "a search")


def test_numbers_that_some_networks_do_not_have_are_an_axis_of_numbers() -> None:
    """As of a value that varies only with some sparsifiers."""
    assert _axis("some", [0.2, None, 0.6]) == {
        "label": "some",
        "values": [0.2, pytest.approx(0.12), 0.6],
        "tickvals": [pytest.approx(0.12), *(pytest.approx(0.2 + 0.1 * n) for n in range(5))],
        "ticktext": ["none", "0.2", "0.3", "0.4", "0.5", "0.6"],
    }
    assert _axis("one", [None, 2])["ticktext"] == ["none", "2"]
    assert _axis("all", [1, 2]) == {"label": "all", "values": [1, 2]}
    assert _axis("choices", ["a", True, None])["ticktext"] == ["None", "True", "a"]
