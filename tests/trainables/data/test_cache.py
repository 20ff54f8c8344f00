import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from slimfront.trainables.data import Dataset, Digits, Factory, HuggingFace, cache
from slimfront.trainables.data.cache import load_shared
from slimfront.trainables.data.factory import SESSION
from slimfront.trainables.errors import UserError
from tests.trainables.data import made

ROOT = Path(__file__).parents[3]
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, in a search of its own."""
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setenv(SESSION, "one")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    cache.entries.warn_once.cache_clear()
    return tmp_path / "cache"


def counted(tmp_path: Path, **changes: Any) -> Factory:
    """A factory that writes into `tmp_path/log` whenever it is called."""
    args = {"log": str(tmp_path / "log")} | changes.pop("args", {})
    return Factory(factory="tests.trainables.data.made:counted", args=args, **changes)


def calls(tmp_path: Path) -> int:
    return len((tmp_path / "log").read_text().split()) if (tmp_path / "log").exists() else 0


def assert_same(one: Dataset, other: Dataset) -> None:
    for name in SPLITS:
        for tensor, wanted in zip(getattr(one, name), getattr(other, name), strict=True):
            assert tensor.dtype == wanted.dtype
            assert torch.equal(tensor, wanted)
    assert (one.outputs, one.standardised_by, one.augment) == (
        other.outputs,
        other.standardised_by,
        other.augment,
    )
    assert (one.mean is None) == (other.mean is None)
    if (
        one.mean is not None
        and other.mean is not None
        and one.std is not None
        and other.std is not None
    ):
        assert torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std)


def mapped(path: Path) -> bool:
    """Whether this process has the file mapped into memory."""
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("kind", ["digits", "images", "ready", "parquet"])
def test_what_comes_from_the_cache_is_bit_identical(
    kind: str, tmp_path: Path, folder: Path
) -> None:
    if kind == "parquet":
        made.write_splits(tmp_path / "data", 3)
    options = {
        "digits": Digits(),
        "images": Factory(factory="tests.trainables.data.made:image_tensors"),
        "ready": Factory(
            factory="tests.trainables.data.made:ready_dataset", args={"dtype": "float32"}
        ),
        "parquet": HuggingFace(path=str(tmp_path / "data")) if kind == "parquet" else Digits(),
    }[kind]
    written, read = load_shared(options), load_shared(options)
    assert_same(written, options.load())
    assert_same(read, options.load())
    (entry,) = folder.glob("*.data")
    assert mapped(entry)
    assert not written.streamed


PROGRAM = """
import sys, json, hashlib
from pathlib import Path
import torch
from slimfront.trainables.data import Factory
from slimfront.trainables.data.cache import load_shared
options = Factory.model_validate_json(sys.argv[1])
Path(sys.argv[2]).touch()
data = load_shared(options)
maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if ".data" in line]
digest = hashlib.sha256(data.train.inputs.numpy().tobytes()).hexdigest()
print(json.dumps([digest, maps[0].split()[3:]]))
"""


@pytest.mark.slow
def test_two_processes_that_ask_at_once_decode_once_and_share_the_file(tmp_path: Path) -> None:
    ready = [str(tmp_path / name) for name in ("first", "second")]
    options = counted(tmp_path, args={"wait_for": ready})  # so nobody is done before both are there
    command = [sys.executable, "-c", PROGRAM, options.model_dump_json()]
    processes = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for name in ready
    ]
    said = {process.communicate(timeout=100)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert calls(tmp_path) == 1
    assert len(said) == 1  # the same content, and the same inode of the same device
    assert (
        hashlib.sha256(load_shared(options).train.inputs.numpy().tobytes()).hexdigest()
        in said.pop()
    )


DYING = """
import sys, time
from slimfront.trainables.data import Factory
from slimfront.trainables.data.cache import load_shared
from slimfront.trainables.data.tensor_file import TensorFile
def hang(self, *args):
    print("half", flush=True)
    time.sleep(1000)
TensorFile.finish = hang
load_shared(Factory.model_validate_json(sys.argv[1]))
"""


def test_a_process_that_is_killed_while_it_writes_neither_blocks_nor_poisons(
    tmp_path: Path, folder: Path
) -> None:
    options = counted(tmp_path)
    command = [sys.executable, "-c", DYING, options.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        found: list[Dataset] = []
        waiting = threading.Thread(target=lambda: found.append(load_shared(options)))
        waiting.start()
        assert list(folder.glob("*.part")) and not list(folder.glob("*.data"))
        process.send_signal(signal.SIGKILL)
    waiting.join(100)
    assert_same(found[0], options.load())
    assert [file.suffix for file in sorted(folder.iterdir())] == [".data", ".lock"]


def test_changed_files_are_decoded_again(tmp_path: Path, folder: Path) -> None:
    made.write_splits(tmp_path / "data", 1)
    options = HuggingFace(path=str(tmp_path / "data"))
    load_shared(options)
    state = (tmp_path / "data" / "train.parquet").stat()
    images, labels = made.pictures(60, 1, seed=7)
    made.write_parquet(
        tmp_path / "data" / "train.parquet", [made.png(pixels) for pixels in images], labels
    )
    # An instant later.
    os.utime(tmp_path / "data" / "train.parquet", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert_same(load_shared(options), options.load())
    assert len(list(folder.glob("*.data"))) == 2


def test_a_name_on_the_hub_is_decoded_again_when_other_files_were_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def downloaded(revision: int) -> dict[str, datasets.Dataset]:
        made.write_splits(tmp_path / f"{revision}", 1, train=30 * revision)
        return datasets.load_dataset(
            "parquet", data_files={"train": str(tmp_path / f"{revision}" / "train.parquet")}
        )

    first, second = downloaded(1), downloaded(2)
    options = HuggingFace(path="someone/flowers")
    prints = []
    for rows in (first, first, second):
        monkeypatch.setattr(
            "slimfront.trainables.data.huggingface._read", lambda _, rows=rows: rows
        )
        prints.append(options.fingerprint())
    assert prints[0] is not None and prints[0] == prints[1] != prints[2]


def test_a_changed_module_or_another_search_calls_the_factory_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "my_flowers.py"
    module.write_text(
        "from tests.trainables.data.made import counted\ndef load():\n    return "
        f"counted({str(tmp_path / 'log')!r})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = Factory(factory="my_flowers:load")
    for _ in range(2):
        load_shared(options)
    assert calls(tmp_path) == 1
    os.utime(module, ns=(1, 1))
    load_shared(options)
    assert calls(tmp_path) == 2
    monkeypatch.setenv(SESSION, "two")
    load_shared(options)
    assert calls(tmp_path) == 3


@pytest.mark.parametrize("why", ["no search", "no file", "in memory"])
def test_what_may_be_something_else_next_time_is_not_kept(
    why: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = counted(tmp_path, in_memory=True if why == "in memory" else "auto")
    if why == "no search":
        monkeypatch.delenv(SESSION)
    if why == "no file":
        monkeypatch.delattr(made, "__file__")  # as in a notebook
    for _ in range(2):
        load_shared(options)
    assert calls(tmp_path) == 2
    assert not folder.exists()


def test_data_that_cannot_be_kept_can_still_be_on_disk_while_it_is_used(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SESSION)
    options = counted(tmp_path, in_memory=False)
    data = load_shared(options)
    assert data.streamed
    assert ".part (deleted)" in Path("/proc/self/maps").read_text()
    assert not list(folder.iterdir())
    assert_same(data, options.load())


@pytest.mark.parametrize("kind", ["cut", "flipped"])
def test_a_damaged_entry_is_decoded_again(
    kind: str, tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = counted(tmp_path)
    load_shared(options)
    (entry,) = folder.glob("*.data")
    content = bytearray(entry.read_bytes())
    content[64 * 1024] ^= 1  # the first pixel
    entry.write_bytes(content[:-1] if kind == "cut" else content)
    assert_same(load_shared(options), options.load())
    assert "is damaged: the data set is decoded again" in caplog.text
    before = calls(tmp_path)
    load_shared(options)
    assert calls(tmp_path) == before


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("why", ["no folder", "no room", "no room at the end", "another's folder"])
def test_without_a_cache_that_can_be_written_a_process_loads_for_itself_and_says_so_once(
    why: str,
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if why == "no folder":
        folder.write_text("a file")
    elif why == "no room":
        monkeypatch.setattr(os, "posix_fallocate", full)
    elif why == "no room at the end":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.delenv(cache.FOLDER)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.setattr(os, "getuid", lambda: 4321)
    options = counted(tmp_path)
    wanted = options.load()
    for number in range(2):
        data = load_shared(options)
        assert_same(data, wanted)
        assert calls(tmp_path) == number + 2  # the factory is not called twice over
    assert sum("cannot be put into the cache" in message for message in caplog.messages) == 1
    assert not list(tmp_path.glob("**/*.data")) and not list(tmp_path.glob("**/*.part"))


def test_data_that_has_to_be_on_disk_and_cannot_is_a_mistake_in_one_sentence(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prepare in (
        lambda: folder.write_text("a file"),
        lambda: (folder.unlink(), monkeypatch.setenv(cache.LIMIT, "1e-6")),
    ):
        prepare()
        with pytest.raises(
            UserError,
            match="set SLIMFRONT_CACHE to a folder with room, or leave out 'in_memory: false'",
        ) as caught:
            load_shared(counted(tmp_path, in_memory=False))
        assert "\n" not in str(caught.value)


def test_what_was_not_used_for_longest_goes_when_the_cache_is_full(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(count: int) -> Path:
        before = set(folder.glob("*.data"))
        load_shared(counted(tmp_path, args={"count": count}))
        return next(iter(set(folder.glob("*.data")) - before), folder)

    first, second = use(3000), use(3001)
    os.utime(first, (2, 2))
    os.utime(second, (1, 1))
    # Of a process that was killed, of a data set that nobody wants any more.
    orphan = folder / f"{0:032x}.part"
    orphan.write_bytes(bytes(100_000))
    os.utime(orphan, (0, 0))
    one = first.stat().st_blocks * 512
    monkeypatch.setenv(cache.LIMIT, str(2.5 * one / 1e9))
    assert use(3000) == folder  # no new one; and now it is the one that was used last
    third = use(3002)
    assert {file.name for file in folder.glob("*.*") if file.suffix != ".lock"} == {
        first.name,
        third.name,
    }
    assert {lock.stem for lock in folder.glob("*.lock")} == {first.stem, third.stem}


def test_an_entry_in_use_stays_readable_when_it_is_thrown_away(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_shared(counted(tmp_path, args={"count": 3000}))
    (entry,) = folder.glob("*.data")
    monkeypatch.setenv(cache.LIMIT, str(1.5 * entry.stat().st_blocks * 512 / 1e9))
    load_shared(counted(tmp_path, args={"count": 3001}))
    assert not entry.exists()
    assert_same(data, counted(tmp_path, args={"count": 3000}).load())


def test_nothing_of_the_cache_is_left_open_or_locked(tmp_path: Path, folder: Path) -> None:
    load_shared(counted(tmp_path))
    (lock,) = folder.glob("*.lock")
    with cache.entries.locked(lock, wait=False):
        pass
    opened = {str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()}
    assert not any(name.endswith((".lock", ".part")) for name in opened)


def test_a_folder_that_others_made_or_may_write_to_is_not_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(cache.FOLDER)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    planted = tmp_path / "tmp" / f"slimfront-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", None)
    load_shared(counted(tmp_path))
    assert list(planted.iterdir()) == []
    assert "others may write to it" in caplog.text


def test_making_room_deletes_nothing_but_entries_of_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_shared(counted(tmp_path))
    (own,) = folder.glob("*.data")
    mine, outside = folder / "thesis.data", tmp_path / "other.data"
    for file in (mine, outside):
        file.write_bytes(b"x" * 100_000)
        os.utime(file, (0, 0))
    link = folder / f"{'0' * 32}.data"
    link.symlink_to(outside)
    monkeypatch.setenv(cache.LIMIT, "0.000001")
    with pytest.raises(OSError, match="do not fit"):
        cache.entries.make_room(folder, 10**9)
    assert mine.exists() and outside.exists() and link.is_symlink()
    assert not own.exists()
