import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from slimfront.search.config.schema import Config
from slimfront.search.record.events import (
    KINDS,
    CheckpointMoved,
    EpochsReported,
    NetworkMeasured,
    NetworkReplicated,
    NetworksPruned,
    NetworkTested,
    NetworkTimed,
    ProposalRepeated,
    RungReached,
    SearchBegan,
    SessionBegan,
    SessionEnded,
    TrialBegan,
    TrialContinued,
    TrialEnded,
    TrialInterrupted,
    parse,
)
from slimfront.search.record.journal import JOURNAL_FILE, Journal, read_events
from slimfront.search.record.session import begin, open_existing, read_search
from slimfront.trainables.errors import UserError
from slimfront.trainables.models import Factory

EXAMPLES = {
    example.kind: example
    for example in (
        SearchBegan(search="s", config="name: s", dense_sizes={"params": 3.0}, starts=[{"a.b": 1}]),
        SessionBegan(session=2),
        ProposalRepeated(number=2, values={"a": 0.5}, first=0),
        TrialBegan(number=None, values={"a.b": 0.5}, seed=3),
        EpochsReported(number=0, history=[{"epoch": 1, "train_loss": 0.5}]),
        NetworkMeasured(
            number=0,
            epoch=1,
            measures={"params": 2.0},
            compaction=[["1", "removed", "3 units"]],
            checkpoint="c",
            pruned=[{"measures": {"params": 1.0}, "compaction": []}],
        ),
        NetworksPruned(number=0, epoch=1, pruned=[{"measures": {"params": 1.0}, "compaction": []}]),
        CheckpointMoved(number=0, epoch=1, checkpoint="d"),
        TrialEnded(number=0, status="completed", reason=None),
        TrialInterrupted(number=0),
        TrialContinued(number=0),
        NetworkTested(number=0, epoch=1, step=1, metrics={"test_accuracy": 0.5}),
        NetworkReplicated(number=0, epoch=1, step=1, seed=7, measures={"val_accuracy": 0.5}),
        NetworkTimed(number=0, epoch=1, step=1, times={"latency_ms": 0.5}),
        RungReached(entry={"level": 0}),
        SessionEnded(status="completed", seconds=1.5),
    )
}


def kinds(directory: Path) -> list[str]:
    return [event.kind for event in read_events(directory / JOURNAL_FILE)]


def test_what_was_appended_is_read_back_in_order_with_its_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    ended = TrialEnded(number=1, status="failed", reason="ä\n")
    written = [journal.append(ended), journal.append(SessionBegan(session=2))]
    # Before it is closed: each event is safe at once.
    assert list(read_events(tmp_path / JOURNAL_FILE)) == written
    assert written[0].time <= written[1].time
    assert [event.n for event in written] == [1, 2]
    journal.close()


@pytest.mark.parametrize("torn", [b'{"event": "thr', b"{", b'{"event": "three"}'])
def test_a_last_line_that_a_crash_cut_off_is_left_out_and_cut_off(
    tmp_path: Path, torn: bytes
) -> None:
    journal = Journal(tmp_path)
    journal.append(SessionBegan(session=1))
    journal.close()
    with (tmp_path / JOURNAL_FILE).open("ab") as file:
        file.write(torn)
    assert kinds(tmp_path) == ["session"]
    journal = Journal(tmp_path)
    journal.append(TrialContinued(number=0))
    journal.close()
    assert kinds(tmp_path) == ["session", "continued"]


def test_an_event_of_a_kind_that_this_version_does_not_know_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ['{"event": "session", "session": 1}', '{"event": "celebrated"}']
    (tmp_path / JOURNAL_FILE).write_text("\n".join([*lines, lines[0], ""]))
    assert kinds(tmp_path) == ["session", "session"]
    assert "line 2 of the journal" in caplog.text
    assert "'celebrated' are unknown" in caplog.text


def test_every_kind_of_event_is_read_back_as_it_was_written() -> None:
    assert len(KINDS) == len({cls.__name__ for cls in KINDS.values()}) == 16
    for kind, cls in KINDS.items():
        example = EXAMPLES[kind]
        assert isinstance(example, cls)
        assert parse(json.loads(json.dumps(example.as_plain()))) == example
        with pytest.raises(ValidationError, match="frozen"):
            example.time = 3  # type: ignore[misc]


def test_a_damaged_line_within_the_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_text('{"event": "session", "session": 1}\nnonsense\n')
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
    monkeypatch.setattr("slimfront.search.record.journal.time.time_ns", lambda: now[0])
    ticks = [100.0]
    monkeypatch.setattr("slimfront.search.record.journal.time.monotonic", lambda: ticks[0])
    session = begin(config, "timed", {}, [])
    session.journal.append(SessionBegan(session=1))
    now[0] -= 3600 * 10**9  # someone sets the clock back by an hour
    ticks[0] += 20
    session.journal.append(TrialBegan(number=0, values={}, seed=1))
    session.journal.close()
    ticks[0] = 5.0  # after a reboot
    again = open_existing("timed", config.search.storage_path)
    assert again.seconds_before() == 20
    again.journal.append(SessionBegan(session=2))
    now[0] += 9000 * 10**9
    ticks[0] += 7
    again.journal.append(TrialEnded(number=0, status="failed", reason="x"))
    again.journal.close()
    third = open_existing("timed", config.search.storage_path)
    assert third.seconds_before() == 27
    third.journal.close()


def written_search(config: Config) -> Path:
    """The journal of a search that ended."""
    session = begin(config, "kept", {"nonzero_params": 100.0}, [])
    for kind, content in (
        ("session", {"session": 1}),
        ("trial", {"number": 0, "values": {"sparsifier.sparsity": 0.5}, "seed": 1}),
        ("epochs", {"number": 0, "history": [{"epoch": 1, "val_accuracy": 0.5}]}),
        (
            "point",
            {
                "number": 0,
                "epoch": 1,
                "measures": {"val_accuracy": 0.98, "nonzero_params": 9},
                "compaction": [],
                "checkpoint": None,
            },
        ),
        ("ended", {"number": 0, "status": "completed", "reason": None}),
        ("finished", {"status": "completed", "seconds": 1.0}),
    ):
        session.journal.append(KINDS[kind](**content))
    session.journal.close()
    return session.directory / JOURNAL_FILE


def test_a_flipped_byte_anywhere_in_a_journal_is_noticed(config: Config) -> None:
    file = written_search(config)
    whole = file.read_bytes()
    for place in range(0, len(whole) - 1, 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x04]) + whole[place + 1 :])
        with pytest.raises(
            UserError,
            match=r"is damaged in line \d+; restore it from a copy, or start a new search \(.*\)$",
        ):
            open_existing("kept", config.search.storage_path)


@pytest.mark.parametrize("line", range(7))
def test_a_line_that_is_missing_or_there_twice_is_noticed(config: Config, line: int) -> None:
    file = written_search(config)
    lines = file.read_bytes().splitlines(keepends=True)
    for changed in ([*lines[:line], *lines[line + 1 :]], [*lines[: line + 1], *lines[line:]]):
        if changed == lines[:-1]:
            continue  # the last events of a journal may be missing: that is what a crash does
        file.write_bytes(b"".join(changed))
        with pytest.raises(
            UserError, match=r"missing, or there twice|does not say what was searched"
        ):
            read_search("kept", config.search.storage_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"event": 3}',
        "[]",
        "null",
        '{"event": "ended", "time": 1, "number": 0}',
        '{"event": "ended", "time": 1, "number": 17, "status": "completed", "reason": null}',
        '{"event": "moved", "time": 1, "number": 0, "epoch": 9, "checkpoint": "x"}',
        '{"event": "epochs", "time": 1, "number": 0, "history": 3}',
        '{"event": "point", "time": 1, "number": 0, "epoch": 1, "measures": [], "compaction": [], '
        '"checkpoint": null}',
        "[" * 100_000,
        '{"event": "trial", "time": 1, "number": {}, "values": {}, "seed": 0}',
        "\x00\x01",
    ],
)
def test_whatever_stands_in_a_journal_is_refused_in_one_sentence(config: Config, line: str) -> None:
    file = written_search(config)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:5], line, *lines[6:]]) + "\n")
    for read in (read_search, open_existing):
        with pytest.raises(UserError, match="is damaged in line 6; restore it") as caught:
            read("kept", config.search.storage_path)
        assert "\n" not in str(caught.value)


def test_a_journal_of_version_0_1_is_read(config: Config) -> None:
    file = written_search(config)
    events = list(read_events(file))
    file.write_text(
        "".join(
            json.dumps({"event": event.kind, "time": event.time} | event.content()) + "\n"
            for event in events
        )
    )
    assert [event.kind for event in read_events(file)] == [event.kind for event in events]
    session = open_existing("kept", config.search.storage_path)
    session.journal.append(SessionBegan(session=2))
    session.journal.close()
    assert len(read_search("kept", config.search.storage_path)[1].trials) == 1


def test_a_lock_that_is_a_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(
        UserError,
        match=r"the lock .*/lock cannot be taken \(Is a directory\); remove what is there",
    ):
        Journal(tmp_path)


@pytest.mark.parametrize("how", ["others may write to it", "it belongs to another user"])
def test_a_journal_that_others_may_have_written_runs_no_code_that_it_names(
    config: Config, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = config.model_copy(update={"model": Factory(factory="os:getcwd")})
    session = begin(named, "planted", {}, [])
    session.journal.close()
    file = session.directory / JOURNAL_FILE
    read_search("planted", config.search.storage_path)
    if how == "others may write to it":
        file.chmod(0o666)
    else:
        os.chown(file, 12345, 12345) if os.getuid() == 0 else monkeypatch.setattr(
            "os.getuid", lambda: 54321
        )
    for read in (read_search, open_existing):
        with pytest.raises(
            UserError,
            match=rf"names code to run \(os:getcwd\), and {how}; make it yours if you trust it",
        ):
            read("planted", config.search.storage_path)
    own = begin(config, "own", {}, [])
    own.journal.close()
    (own.directory / JOURNAL_FILE).chmod(0o666)
    read_search("own", config.search.storage_path)  # it names nothing
