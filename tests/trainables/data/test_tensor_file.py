import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from slimfront.trainables.data.cache import memory_bytes
from slimfront.trainables.data.tensor_file import TensorFile, read_tensors

TENSORS = {
    "images": torch.randint(
        256, (300, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ),
    "rows": torch.randn(
        1000, 700, generator=torch.Generator().manual_seed(1)
    ),  # more than is checked
    "labels": torch.arange(300),
    "constant": torch.tensor(0.1),
    "none": torch.empty(0, 4),
}


def write(path: Path) -> None:
    file = TensorFile(path)
    room = file.allocate(TENSORS["images"].shape, torch.uint8)
    room[:200] = TENSORS["images"][:200]  # in two steps, the others as they are
    room[200:] = TENSORS["images"][200:]
    file.finish(TENSORS | {"images": room}, {"classes": 3})
    file.close()


def test_tensors_come_back_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "a")
    found = read_tensors(tmp_path / "a")
    assert found is not None
    assert found[0].keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[0][name].dtype == tensor.dtype
        assert torch.equal(found[0][name], tensor)
    assert found[1] == {"classes": 3}


def test_who_writes_into_a_tensor_changes_it_for_nobody_else(tmp_path: Path) -> None:
    write(tmp_path / "a")
    mine, other = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "a")
    assert mine is not None and other is not None
    mine[0]["rows"].zero_()
    assert torch.equal(other[0]["rows"], TENSORS["rows"])
    again = read_tensors(tmp_path / "a")
    assert again is not None and torch.equal(again[0]["rows"], TENSORS["rows"])


def test_a_tensor_stays_readable_after_its_file_is_deleted(tmp_path: Path) -> None:
    write(tmp_path / "a")
    found = read_tensors(tmp_path / "a")
    (tmp_path / "a").unlink()
    assert found is not None and torch.equal(found[0]["rows"], TENSORS["rows"])


def test_views_of_a_room_are_written_as_what_they_are(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "a")
    room = file.allocate((10, 4), torch.float32)
    room.copy_(torch.arange(40.0).view(10, 4))
    views = {"first": room[:3], "later": room[4:], "across": room.T}
    file.finish(views, {})
    file.close()
    found = read_tensors(tmp_path / "a")
    assert found is not None
    assert all(torch.equal(found[0][name], view) for name, view in views.items())


def offset_of(path: Path, name: str) -> int:
    line = path.read_bytes()[: 64 * 1024].partition(b"\n")[0]
    return int(json.loads(line[9:])["tensors"][name]["offset"])


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "cut":
        content = content[:-1000]
    elif kind == "no header":
        content[: 64 * 1024] = bytes(64 * 1024)
    elif kind == "header":
        content[40] ^= 1
    elif kind == "empty":
        content = bytearray()
    else:
        content[offset_of(path, kind) + 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "kind", ["cut", "no header", "header", "empty", "images", "rows", "labels", "constant"]
)
def test_damage_is_seen(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "a")
    damage(tmp_path / "a", kind)
    assert read_tensors(tmp_path / "a") is None


def test_an_unfinished_file_is_not_read(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "a")
    file.allocate((10, 4), torch.float32).fill_(1)
    assert read_tensors(tmp_path / "a") is None
    file.close()


def test_room_is_taken_from_the_disk_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = TensorFile(tmp_path / "a")
    file.allocate((10_000_000,), torch.uint8)
    assert (tmp_path / "a").stat().st_blocks * 512 >= 10_000_000

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        file.allocate((10,), torch.uint8)
    file.close()


@pytest.mark.skipif(sys.platform != "linux", reason="others may refuse it")
def test_a_file_that_is_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "a")
    file.end += 2 * memory_bytes() // 2**16 * 2**16  # a hole, which takes no room on the disk
    file.finish({"labels": TENSORS["labels"]}, {})
    file.close()
    found = read_tensors(tmp_path / "a")
    assert found is not None and torch.equal(found[0]["labels"], TENSORS["labels"])
