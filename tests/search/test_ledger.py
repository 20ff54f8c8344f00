import math
from typing import Any

import pytest

from slimfront.search.config.objectives import OBJECTIVES, Constraint, Objective
from slimfront.search.record.events import (
    CheckpointMoved,
    EpochsReported,
    NetworkMeasured,
    NetworkReplicated,
    NetworksPruned,
    NetworkTested,
    TrialBegan,
    TrialContinued,
    TrialEnded,
    TrialInterrupted,
)
from slimfront.search.record.ledger import Ledger
from slimfront.search.record.trials import label
from slimfront.trainables.measures.described import Measure
from slimfront.trainables.tasks.metrics import Better


def ledger(*constraints: Constraint) -> Ledger:
    objectives = [OBJECTIVES["val_accuracy"], OBJECTIVES["nonzero_params"]]
    return Ledger(objectives, {"nonzero_params": 1000}, constraints)


def begin(book: Ledger, number: int | None) -> None:
    book.apply(TrialBegan(number=number, values={}, seed=0))


def point(
    book: Ledger,
    number: int | None,
    epoch: int,
    accuracy: float,
    size: float,
    checkpoint: str | None = "",
) -> None:
    measures = {"val_accuracy": accuracy, "nonzero_params": size}
    content: dict[str, Any] = {
        "epoch": epoch,
        "measures": measures,
        "compaction": [],
        "checkpoint": checkpoint,
    }
    book.apply(NetworkMeasured(number=number, **content))


def end(
    book: Ledger, number: int | None, status: str = "completed", reason: str | None = None
) -> None:
    book.apply(TrialEnded(number=number, status=status, reason=reason))


def names(book: Ledger) -> list[str]:
    return [p.name for p in book.front.members()]


def test_the_front_is_over_the_networks_that_all_trials_passed_through_most_accurate_first() -> (
    None
):
    book = ledger()
    for number in (None, 0, 1, 2, 3):
        begin(book, number)
    point(book, None, 1, 1.0, 1)  # the dense reference is not a member, however good
    point(book, 0, 1, 0.80, 100)
    point(book, 0, 2, 0.90, 300)  # the trial grew: both of its networks can ship
    point(book, 1, 1, 0.85, 200)
    point(book, 1, 2, 0.70, 200)  # it got worse and then failed: its first network stays
    point(book, 2, 1, 0.79, 150)
    for number, status in ((None, "completed"), (0, "completed"), (1, "failed"), (2, "stopped")):
        end(book, number, status)
    assert names(book) == ["trial-000", "trial-001@1", "trial-000@1"]


def test_a_network_as_good_as_an_earlier_one_of_its_trial_is_left_out_and_of_another_not() -> None:
    book = ledger()
    for number in (0, 1):
        begin(book, number)
        for epoch in (1, 2):
            point(book, number, epoch, 0.8, 100)
    assert sorted(names(book)) == ["trial-000@1", "trial-001@1"]


def test_networks_pruned_in_one_shot_are_candidates_of_their_own_that_share_a_checkpoint() -> None:
    book = ledger()
    begin(book, 0)
    pruned = [
        {"val_accuracy": 0.85, "nonzero_params": 50},
        {"val_accuracy": 0.3, "nonzero_params": 60},
    ]
    measures = {"val_accuracy": 0.9, "nonzero_params": 100}
    content = {"epoch": 4, "measures": measures, "compaction": [], "checkpoint": "here"}
    content["pruned"] = [{"measures": m, "compaction": []} for m in pruned]
    book.apply(NetworkMeasured(number=0, **content))
    end(book, 0)
    assert names(book) == ["trial-000", "trial-000/1"]
    assert [str(p.file) for p in book.front.members()] == ["here/network.pt", "here/network-1.pt"]
    # The trial's own network is the one that was trained.
    assert book.trials[0].measures == measures
    book.apply(NetworkTested(number=0, epoch=4, step=1, metrics={"test_accuracy": 0.8}))
    assert [p.tested for p in book.front.members()] == [None, {"test_accuracy": 0.8}]
    book.apply(CheckpointMoved(number=0, epoch=4, checkpoint="there"))
    assert [str(p.file) for p in book.front.members()] == ["there/network.pt", "there/network-1.pt"]


def test_networks_keep_their_steps_where_those_before_were_not_evaluated() -> None:
    book = ledger()
    begin(book, 0)
    content = {"epoch": 4, "measures": {"val_accuracy": 0.9, "nonzero_params": 100}}
    pruned = [
        {"measures": {"val_accuracy": 0.8, "nonzero_params": 50}, "compaction": [], "step": 3},
        {"measures": {"val_accuracy": 0.7, "nonzero_params": 30}, "compaction": [], "step": 4},
    ]
    book.apply(NetworkMeasured(number=0, compaction=[], checkpoint="c", pruned=pruned, **content))
    end(book, 0)
    assert names(book) == ["trial-000", "trial-000/3", "trial-000/4"]
    files = [str(p.file) for p in book.front.members()]
    assert files == ["c/network.pt", "c/network-3.pt", "c/network-4.pt"]


@pytest.mark.parametrize(
    ("objectives", "told"),
    [
        (["val_accuracy", "nonzero_params"], [{"val_accuracy": 0.9, "nonzero_params": 100}]),
        (["val_accuracy", "latency_ms"], []),  # not known before it is taken
        (["val_accuracy", "val_loss", "nonzero_params"], []),  # two metrics
        (["nonzero_params"], []),
    ],
)
def test_trials_are_told_of_the_front_where_sizes_decide(
    objectives: list[str], told: list[dict[str, float]]
) -> None:
    known = OBJECTIVES | {"val_loss": Objective(Measure("val_loss", quality=True))}
    book = Ledger([known[name] for name in objectives], {"nonzero_params": 1000}, [])
    begin(book, 0)
    measures = {"val_accuracy": 0.9, "nonzero_params": 100, "latency_ms": 1.0, "val_loss": 0.3}
    book.apply(
        NetworkMeasured(number=0, epoch=1, measures=measures, compaction=[], checkpoint="here")
    )
    assert book.front.told_to_trials() == told


def test_a_network_that_turns_out_to_be_the_last_is_pruned_then() -> None:
    book = ledger()
    begin(book, 0)
    point(book, 0, 4, 0.9, 100, "here")
    pruned = {"measures": {"val_accuracy": 0.85, "nonzero_params": 50}, "compaction": []}
    book.apply(NetworksPruned(number=0, epoch=4, pruned=[pruned]))
    assert names(book) == ["trial-000@4", "trial-000@4/1"]
    assert [str(p.file) for p in book.front.members()] == ["here/network.pt", "here/network-1.pt"]


def test_a_network_with_nan_or_that_breaks_a_constraint_is_not_on_the_front() -> None:
    book = ledger(
        Constraint.parse("val_accuracy", ">= 0.7"), Constraint.parse("nonzero_params", "<= 500")
    )
    begin(book, 0)
    point(book, 0, 1, float("nan"), 10)
    point(book, 0, 2, 0.69, 10)
    point(book, 0, 3, 0.99, 501)
    assert names(book) == []
    assert book.front.hypervolume() == 0
    point(book, 0, 4, 0.7, 500)
    assert names(book) == ["trial-000@4"]


def test_hypervolume_grows_with_the_front_and_not_with_dominated_networks() -> None:
    book = ledger()
    begin(book, 0)
    point(book, 0, 1, 0.8, 100)
    alone = book.front.hypervolume()
    point(book, 0, 2, 0.7, 150)
    assert book.front.hypervolume() == alone > 0
    point(book, 0, 3, 0.9, 200)
    assert book.front.hypervolume() > alone


def test_a_network_that_is_kept_elsewhere_counts_once() -> None:
    book = ledger()
    begin(book, 0)
    point(book, 0, 5, 0.8, 100, "first")
    assert book.trials[0].points[0].checkpoint == "first"
    book.place = "/moved"
    book.apply(CheckpointMoved(number=0, epoch=5, checkpoint="second"))
    assert [p.checkpoint for p in book.trials[0].points] == ["/moved/second"]
    assert len(book.front.members()) == 1


def test_an_interrupted_trial_is_unfinished_until_it_has_ended() -> None:
    book = ledger()
    begin(book, 0)
    trial = book.trials[0]
    assert trial.unfinished
    book.apply(TrialInterrupted(number=0))
    assert trial.unfinished
    assert (trial.status, trial.reason) == ("stopped", "interrupted")
    book.apply(TrialContinued(number=0))
    assert (trial.status, trial.reason) == ("running", None)
    end(book, 0, "stopped", "stopped early after 3 epochs")
    assert not trial.unfinished


def test_the_counts_are_those_of_the_trials_with_each_status() -> None:
    book = ledger()
    for number in (0, 1, 2, None):
        begin(book, number)
    end(book, 0, "failed", "it broke")
    end(book, None)
    for event, counts in (
        (TrialInterrupted, {"running": 1, "stopped": 1, "failed": 1}),
        (TrialContinued, {"running": 2, "failed": 1}),
        (TrialContinued, {"running": 2, "failed": 1}),
    ):
        book.apply(event(number=1))
        assert {status: len(book.with_status(status)) for status in counts} == counts
        assert +book.counts == counts


def test_the_last_reported_epoch_is_remembered() -> None:
    book = ledger()
    begin(book, 0)
    book.apply(EpochsReported(number=0, history=[{"epoch": 1}, {"epoch": 2}]))
    book.apply(EpochsReported(number=0, history=[{"epoch": 1}]))
    assert book.trials[0].epoch == 2


def test_labels_are_sortable() -> None:
    assert [label(n) for n in (None, 7, 1234)] == ["dense", "trial-007", "trial-1234"]


@pytest.mark.parametrize("text", ["0.9", "> 0.9", ">= much", "== 1", ""])
def test_a_constraint_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r'it needs the form ">= 0\.9" or "<= 3"'):
        Constraint.parse("layers", text)


def test_a_constraint_on_something_else_is_refused_and_a_missing_measure_breaks_it() -> None:
    with pytest.raises(ValueError, match="'layer' is not a measure; did you mean 'layers'"):
        Constraint.parse("layer", "<= 3")
    bound = Constraint.parse("layers", "<=3e0")
    assert bound.met_by({"layers": 3})
    assert bound.violation({"layers": 5}) == 2
    assert not bound.met_by({})


def test_what_would_not_join_the_front_now_is_known_before_it_is_kept_and_never_joins_it() -> None:
    book = ledger(Constraint.parse("val_accuracy", ">= 0.5"))
    for number in (None, 0, 1):
        begin(book, number)
    point(book, 0, 1, 0.8, 100, "here")

    def joins(number: int | None, accuracy: float, size: float) -> bool:
        measures = {"val_accuracy": accuracy, "nonzero_params": size}
        return book.front.would_join(book.by_label[label(number)], measures)

    assert [joins(1, 0.9, 200), joins(1, 0.6, 50), joins(1, 0.8, 100)] == [True, True, True]
    assert [joins(1, 0.7, 100), joins(1, 0.4, 10), joins(0, 0.8, 100), joins(1, math.nan, 1)] == [
        False
    ] * 4
    assert not joins(None, 1.0, 1)  # the dense reference is not a member
    before = names(book)
    point(book, 1, 1, 0.7, 100)
    assert names(book) == before
    point(book, 1, 2, 0.9, 100)  # takes the place of the first, and dominates all that it dominated
    assert not joins(0, 0.7, 100)


def test_a_trial_goes_on_from_the_last_of_its_networks_that_was_kept() -> None:
    book = ledger()
    begin(book, 0)
    assert book.trials[0].resumable is None
    for epoch, kept in ((1, "first"), (2, "second"), (3, None)):
        point(book, 0, epoch, 0.5, 100, kept)
    assert book.trials[0].last is not None
    assert book.trials[0].resumable is not None
    assert (book.trials[0].last.epoch, book.trials[0].resumable.epoch) == (3, 2)


def regression_ledger(quality: str = "val_mse", better: Better = "smaller") -> Ledger:
    metric = Objective(Measure(quality, better, scale="relative", quality=True))
    sizes = {"nonzero_params": 1000.0, quality: 80.0}  # of the untrained dense network
    return Ledger([metric, OBJECTIVES["nonzero_params"]], sizes)


def measured(book: Ledger, number: int | None, epoch: int, error: float, size: float) -> None:
    measures = {book.quality.name: error, "nonzero_params": size}
    content: dict[str, Any] = {"measures": measures, "compaction": [], "checkpoint": ""}
    book.apply(NetworkMeasured(number=number, epoch=epoch, **content))


ERRORS = [(0, 1, 4.0, 300), (1, 1, 9.0, 100), (0, 2, 2.0, 400), (1, 2, 30.0, 20), (2, 1, 3.0, 350)]


@pytest.mark.parametrize("when", range(len(ERRORS) + 1))
def test_the_front_and_its_hypervolume_do_not_depend_on_when_the_dense_network_comes(
    when: int,
) -> None:
    """A journal is replayed in the order in which things happened, which is another each time."""
    books = []
    for place in (0, when):
        book = regression_ledger()
        for number in (None, 0, 1, 2):
            begin(book, number)
        for step, one in enumerate(ERRORS):
            if step == place:
                measured(book, None, 1, 5.0, 1000)
            measured(book, *one)
        if place == len(ERRORS):
            measured(book, None, 1, 5.0, 1000)
        books.append(book)
    assert (
        names(books[0])
        == names(books[1])
        == ["trial-000@2", "trial-002@1", "trial-000@1", "trial-001@1", "trial-001@2"]
    )
    assert books[0].front.hypervolume() == pytest.approx(books[1].front.hypervolume(), rel=1e-12)
    assert 0 < books[0].front.hypervolume() < 1
    knees = [book.front.knee() for book in books]
    assert knees[0] is not None and knees[1] is not None
    assert knees[0].name == knees[1].name


@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_networks_are_judged_where_the_untrained_dense_one_has_no_metric(unknown: float) -> None:
    books = [regression_ledger(), regression_ledger()]
    books[1].dense_sizes["val_mse"] = unknown
    for book in books:
        for number in (None, 0, 1, 2):
            begin(book, number)
        for one in ERRORS:
            measured(book, *one)
        assert math.isfinite(book.front.hypervolume())
        measured(book, None, 1, 5.0, 1000)
    assert names(books[0]) == names(books[1])
    assert books[0].front.hypervolume() == books[1].front.hypervolume() > 0
    measured(books[1], None, 2, unknown, 1000)
    assert books[0].front.hypervolume() == books[1].front.hypervolume()


def test_a_metric_that_is_better_when_smaller_puts_the_smallest_first() -> None:
    book = regression_ledger()
    for number in (None, 0):
        begin(book, number)
    measured(book, 0, 1, 9.0, 100)
    measured(book, 0, 2, 2.0, 400)
    measured(book, 0, 3, 9.5, 400)  # worse and larger
    assert [point.epoch for point in book.front.members()] == [2, 1]


def test_a_negative_metric_that_is_better_when_larger_has_its_front() -> None:
    book = regression_ledger("val_likelihood", "larger")
    for number in (None, 0):
        begin(book, number)
    measured(book, None, 1, -2.0, 1000)
    for epoch, (value, size) in enumerate([(-2.5, 100), (-1.5, 400), (-3.0, 200)], 1):
        measured(book, 0, epoch, value, size)
    assert [point.epoch for point in book.front.members()] == [2, 1]
    assert book.front.hypervolume() > 0
    assert not book.front.would_join(
        book.trials[0], {"val_likelihood": -3.0, "nonzero_params": 300}
    )


def region_ledger(tolerance: float = 0.01) -> Ledger:
    """Beside a baseline of 0.98 at 1,000 weights: three networks in the region that ends at 0.93,
    and two below it."""
    objectives = [OBJECTIVES["val_accuracy"], OBJECTIVES["nonzero_params"]]
    book = Ledger(objectives, {"nonzero_params": 1000}, tolerance=tolerance)
    begin(book, None)
    point(book, None, 3, 0.98, 1000)
    found = [(0.985, 500), (0.975, 200), (0.935, 60), (0.90, 12), (0.30, 2)]
    for number, (accuracy, size) in enumerate(found):
        begin(book, number)
        point(book, number, 3, accuracy, size)
        end(book, number)
    return book


def test_the_hypervolume_ends_at_five_tolerances_below_the_baseline() -> None:
    book = region_ledger()
    # By hand: the losses (1 - q) / 0.07 and log(1 + size) / log(1001) of the three in the region.
    errors = [0.015 / 0.07, 0.025 / 0.07, 0.065 / 0.07]
    sizes = [math.log1p(size) / math.log1p(1000) for size in (500, 200, 60)]
    ends = [*errors[1:], 1.0]
    expected = 0.0
    for error, end_of_it, size in zip(errors, ends, sizes, strict=True):
        expected += (end_of_it - error) * (1 - size)
    assert book.front.hypervolume() == pytest.approx(expected, rel=1e-9)
    inside = book.front.hypervolume()
    full = book.front.hypervolume_full()
    begin(book, 9)
    point(book, 9, 3, 0.5, 3)
    assert book.front.hypervolume() == inside
    assert book.front.hypervolume_full() > full


def test_a_gain_below_the_region_is_none_once_something_is_in_it() -> None:
    book = ledger()
    begin(book, None)
    point(book, None, 3, 0.98, 1000)
    for number, (accuracy, size) in enumerate([(0.5, 30), (0.6, 30), (0.96, 300), (0.7, 30)]):
        begin(book, number)
        point(book, number, 3, accuracy, size)
        end(book, number)
        assert book.since_gain == (1 if number == 3 else 0), number


def test_what_no_network_gains_by_does_not_hide_what_they_gain_otherwise() -> None:
    """All have as many layers as the dense network, so that no hypervolume is above 0."""
    objectives = [OBJECTIVES[name] for name in ("val_accuracy", "nonzero_params", "layers")]
    dense = {"val_accuracy": 0.98, "nonzero_params": 1000.0, "params": 1000.0, "layers": 3.0}
    book = Ledger(objectives, dense)
    gains = []
    networks = [(0.6, 300), (0.7, 400), (0.97, 600), (0.96, 300), (0.96, 290), (0.95, 400)]
    for number, (accuracy, size) in enumerate([(0.98, 1000), *networks]):
        trial = number - 1 if number else None
        sizes = {"nonzero_params": size, "params": size, "layers": 3}
        begin(book, trial)
        book.apply(
            NetworkMeasured(
                number=trial,
                epoch=1,
                measures={"val_accuracy": accuracy} | sizes,
                compaction=[],
                checkpoint="c",
            )
        )
        end(book, trial)
        gains.append(book.since_gain)
    assert book.front.hypervolume() == book.front.hypervolume_full() == 0
    assert gains == [0, 0, 0, 0, 0, 0, 1]


def test_the_knee_is_in_the_region() -> None:
    knee = region_ledger().front.knee()
    assert knee is not None
    assert knee.measures["val_accuracy"] >= 0.93
    of_all = region_ledger(tolerance=1).front.knee()
    assert of_all is not None
    assert of_all.measures["val_accuracy"] < 0.93


def test_without_a_network_in_the_region_the_knee_is_that_of_the_front() -> None:
    book = ledger()
    begin(book, None)
    point(book, None, 3, 0.98, 1000)
    begin(book, 0)
    point(book, 0, 3, 0.5, 30)
    knee = book.front.knee()
    assert knee is not None
    assert knee.name == "trial-000@3"


def test_the_hypervolume_of_a_tolerance_of_nothing_is_nothing() -> None:
    book = ledger()
    book.region.tolerance = 0.0
    begin(book, None)
    point(book, None, 3, 1.0, 1000)
    begin(book, 0)
    point(book, 0, 3, 1.0, 10)
    assert book.front.hypervolume() == 0
    assert book.front.hypervolume_full() > 0
    assert book.front.recommended() is not None


def test_a_trial_is_held_to_the_baseline_at_the_same_epoch() -> None:
    book = ledger()
    begin(book, None)
    assert book.region.missed_by(3, {"val_accuracy": 0.1}) == 0
    point(book, None, 3, 0.6, 1000)
    point(book, None, 9, 0.98, 1000)
    assert book.region.missed_by(3, {"val_accuracy": 0.58}) <= 0
    assert book.region.missed_by(3, {"val_accuracy": 0.5}) == pytest.approx(0.05)
    assert book.region.missed_by(9, {"val_accuracy": 0.5}) == pytest.approx(0.43)
    assert book.region.missed_by(5, {"val_accuracy": 0.1}) == 0
    assert book.region.missed_by(9, {"val_accuracy": math.nan}) == math.inf


def test_an_error_is_held_to_a_share_of_the_baselines() -> None:
    book = regression_ledger()
    begin(book, None)
    measured(book, None, 3, 5.0, 1000)
    assert book.region.missed_by(3, {"val_mse": 5.2}) <= 0
    assert book.region.missed_by(3, {"val_mse": 5.5}) == pytest.approx(0.25)


@pytest.mark.parametrize("zeros_save_time", [False, True])
def test_networks_of_one_architecture_are_equally_fast_unless_zeros_save_time(
    *, zeros_save_time: bool
) -> None:
    objectives = [OBJECTIVES["val_accuracy"], OBJECTIVES["speedup"]]
    book = Ledger(objectives, {"speedup": 1.0}, zeros_save_time=zeros_save_time)
    for number, (accuracy, speedup, nonzero) in enumerate(
        [(0.9, 1.05, 100.0), (0.8, 1.18, 50.0), (0.95, 0.98, 70.0)]
    ):
        begin(book, number)
        sizes = {"params": 100.0, "layers": 2.0, "flops": 10.0, "nonzero_params": nonzero}
        measures = {"val_accuracy": accuracy, "speedup": speedup} | sizes
        content: dict[str, Any] = {"epoch": 1, "compaction": [], "checkpoint": ""}
        book.apply(NetworkMeasured(number=number, measures=measures, **content))
        end(book, number)
    best = ["trial-002"]
    if zeros_save_time:
        best = ["trial-002", "trial-000", "trial-001"]
    assert names(book) == best
    # Each keeps the time that was measured of it.
    assert book.trials[2].measures["speedup"] == 0.98


def test_replicas_that_drew_what_the_trials_had_drawn_count_no_more() -> None:
    book = region_ledger()
    for seed in (7, 2**40 + 1):
        measures = {"val_accuracy": 0.5}
        book.apply(NetworkReplicated(number=0, epoch=3, seed=seed, measures=measures))
    (member,) = [one for one in book.front.members() if one.trial.number == 0]
    assert list(member.replicas) == [7]
