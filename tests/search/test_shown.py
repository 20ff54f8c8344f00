from slimfront.search.record.front.shown import shown
from slimfront.search.record.ledger import Ledger
from tests.search.test_ledger import begin, ledger, point, region_ledger


def labels(book: Ledger, *, everything: bool = False) -> list[str]:
    chosen = shown(book, book.front.members(), everything=everything)
    return [member.trial.label for member in chosen.members]


def test_what_nobody_may_ship_is_left_out_and_counted() -> None:
    book = region_ledger()
    assert labels(book) == ["trial-000", "trial-001", "trial-002"]
    chosen = shown(book, book.front.members())
    assert chosen.left_out(book) == "2 more than 0.05 below dense"
    assert len(labels(book, everything=True)) == 5


def test_equal_networks_are_one_row() -> None:
    book = region_ledger()
    for number in (7, 8):
        begin(book, number)
        point(book, number, 3, 0.975, 200)
    assert len(book.front.members()) == 7
    assert labels(book) == ["trial-000", "trial-001", "trial-002"]
    chosen = shown(book, book.front.members())
    assert chosen.left_out(book) == "2 more than 0.05 below dense and 2 equal to one above"


def test_all_are_shown_where_none_is_in_the_region() -> None:
    book = ledger()
    begin(book, None)
    point(book, None, 3, 0.98, 1000)
    for number, (accuracy, size) in enumerate([(0.5, 30), (0.4, 20)]):
        begin(book, number)
        point(book, number, 3, accuracy, size)
    chosen = shown(book, book.front.members())
    assert len(chosen.members) == 2
    assert chosen.left_out(book) == ""


def test_all_are_shown_before_the_baseline_is_trained() -> None:
    book = ledger()
    begin(book, 0)
    point(book, 0, 3, 0.5, 30)
    assert labels(book) == ["trial-000"]
