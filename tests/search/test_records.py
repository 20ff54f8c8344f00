from search.objectives import OBJECTIVES
from search.records import Ledger, Status, TrialRecord


def record(number: int | None, accuracy: float, size: float, status: Status = "completed") -> TrialRecord:
    return TrialRecord(number, {}, 0, status, measures={"val_accuracy": accuracy, "nonzero_params": size})


def ledger(*records: TrialRecord) -> Ledger:
    book = Ledger([OBJECTIVES["val_accuracy"], OBJECTIVES["nonzero_params"]], {"nonzero_params": 1000})
    for item in records:
        book.add(item)
    return book


def test_the_front_is_of_completed_trials_only_most_accurate_first() -> None:
    book = ledger(
        record(None, 1.0, 1),  # the dense reference is not a member, however good
        record(0, 0.8, 100),
        record(1, 0.9, 200),
        record(2, 0.7, 150),
        record(3, 0.99, 1, "stopped"),
        record(4, 0.99, 1, "failed"),
    )
    assert [trial.number for trial in book.front()] == [1, 0]


def test_a_trial_without_measures_is_not_on_the_front() -> None:
    assert ledger(TrialRecord(0, {}, 0, "completed")).front() == []


def test_hypervolume_grows_with_the_front_and_not_with_dominated_trials() -> None:
    book = ledger(record(0, 0.8, 100))
    alone = book.hypervolume()
    book.add(record(1, 0.7, 150))
    assert book.hypervolume() == alone > 0
    book.add(record(2, 0.9, 200))
    assert book.hypervolume() > alone


def test_labels_are_sortable() -> None:
    assert [record(n, 0, 0).label for n in (None, 7, 1234)] == ["dense", "trial-007", "trial-1234"]
