import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from slimfront.trainables.data.ahead import Progress, ahead


def threads() -> int:
    return sum(thread.name.startswith("slimfront-ahead") for thread in threading.enumerate())


def test_results_come_in_the_order_of_the_items() -> None:
    assert list(ahead(lambda n: n * n, range(50), depth=5)) == [n * n for n in range(50)]
    assert list(ahead(lambda n: n * n, range(50), 5, lambda: ThreadPoolExecutor(4))) == [
        n * n for n in range(50)
    ]
    assert threads() == 0


def test_no_more_is_made_ahead_than_was_asked_for() -> None:
    made, full = [], threading.Event()

    def make(n: int) -> int:
        made.append(n)
        if n == 4:
            full.set()
        return n

    with closing(ahead(make, range(100), depth=4)) as results:
        assert next(results) == 0
        assert full.wait(60)  # it does work ahead
        for taken, _ in enumerate(results, start=2):
            assert len(made) <= taken + 4
    assert len(made) == 100


def test_what_a_maker_raises_is_raised_in_its_turn_and_ends_the_thread() -> None:
    results = ahead(lambda n: 1 / (n - 7), range(100), depth=20)
    for _ in range(7):
        next(results)
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threads() == 0


def test_closing_ends_the_thread_and_what_was_not_begun_is_not_made() -> None:
    made: list[int] = []
    with closing(ahead(made.append, range(1000), depth=3)) as results:
        next(results)
    assert threads() == 0
    assert len(made) <= 4


def test_progress_is_logged_from_time_to_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    quiet = Progress("decoding flowers", 2000)
    quiet.next += 1e6  # the time has not come
    quiet.advance(1000)
    assert not caplog.messages
    monkeypatch.setattr(Progress, "SECONDS", 0.0)
    shown = Progress("decoding flowers", 2000)
    shown.advance(500)
    shown.advance(1000)
    assert caplog.messages == ["decoding flowers: 25 % of 2,000", "decoding flowers: 75 % of 2,000"]
