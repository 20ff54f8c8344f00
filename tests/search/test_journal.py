from pathlib import Path

import pytest

from search.config import Config
from search.journal import JOURNAL_FILE, Journal, read_events
from search.session import begin, take_up
from trainables.errors import UserError


def kinds(directory: Path) -> list[str]:
    return [event["event"] for event in read_events(directory / JOURNAL_FILE)]


def test_what_was_appended_is_read_back_in_order_with_its_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    written = [journal.append("one", number=1, text="ä\n"), journal.append("two")]
    assert list(read_events(tmp_path / JOURNAL_FILE)) == written  # before it is closed: each event is safe at once
    assert written[0]["time"] <= written[1]["time"]
    journal.close()


@pytest.mark.parametrize("torn", [b'{"event": "thr', b"{", b'{"event": "three"}'])
def test_a_last_line_that_a_crash_cut_off_is_left_out_and_cut_off(tmp_path: Path, torn: bytes) -> None:
    journal = Journal(tmp_path)
    journal.append("one")
    journal.close()
    with (tmp_path / JOURNAL_FILE).open("ab") as file:
        file.write(torn)
    assert kinds(tmp_path) == ["one"]
    journal = Journal(tmp_path)
    journal.append("two")
    journal.close()
    assert kinds(tmp_path) == ["one", "two"]


def test_a_damaged_line_within_the_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_text('{"event": "one"}\nnonsense\n{"event": "two"}\n')
    with pytest.raises(UserError, match="is damaged in line 2; restore it from a copy"):
        kinds(tmp_path)


def test_a_journal_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        kinds(tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    with pytest.raises(UserError, match="is running in another process"):
        Journal(tmp_path)
    first.close()
    Journal(tmp_path).close()


def test_the_time_that_a_search_took_does_not_depend_on_the_clock_of_the_machine(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_800_000_000 * 10**9]
    monkeypatch.setattr("search.journal.time.time_ns", lambda: now[0])
    ticks = [100.0]
    monkeypatch.setattr("search.journal.time.monotonic", lambda: ticks[0])
    session = begin(config, "timed", {}, [])
    session.journal.append("session", session=1)
    now[0] -= 3600 * 10**9  # someone sets the clock back by an hour
    ticks[0] += 20
    session.journal.append("trial", number=0, values={}, seed=1)
    session.journal.close()
    ticks[0] = 5.0  # after a reboot
    again = take_up("timed", config.search.storage_path)
    assert again.seconds_before() == 20
    again.journal.append("session", session=2)
    now[0] += 9000 * 10**9
    ticks[0] += 7
    again.journal.append("ended", number=0, status="failed", reason="x")
    again.journal.close()
    third = take_up("timed", config.search.storage_path)
    assert third.seconds_before() == 27
    third.journal.close()
