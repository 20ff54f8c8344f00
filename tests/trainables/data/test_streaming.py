"""Data on disk: the same training as in memory, little memory, and nothing left running."""

import json
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
import torch
from joblib.externals.loky import ProcessPoolExecutor

from slimfront import Candidate
from slimfront.trainables.data import Dataset, HuggingFace, base, cache, images, load_once
from slimfront.trainables.errors import UserError
from slimfront.trainables.tasks import Classification, Encoded
from slimfront.trainables.training.loop import Training
from tests.conftest import SMALL_CANDIDATE
from tests.trainables.data import made

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


def threads() -> int:
    return sum(thread.name.startswith("slimfront-ahead") for thread in threading.enumerate())


def candidate(tmp_path: Path, in_memory: bool | str, **data: Any) -> Candidate:
    tree = SMALL_CANDIDATE | {
        "data": {"name": "huggingface", "path": str(tmp_path / "data"), "in_memory": in_memory}
        | data
    }
    tree["training"] = {"epochs": 3, "batch_size": 32, "lr": 0.01, "seed": 1}
    return Candidate.model_validate(tree | {"refit": {"epochs": 1}})


def finish(training: Training) -> list[Any]:
    history: list[Any] = []
    while not training.done:
        history.append(training.run_epoch())
    trained = training.finish()
    state = {name: tensor.tolist() for name, tensor in training.model.state_dict().items()}
    return [
        history,
        trained.history,
        trained.measures,
        state,
        training.shuffler.get_state().tolist(),
    ]


@pytest.mark.parametrize("augment", [{}, {"crop": 2, "flip": True}], ids=["plain", "augmented"])
def test_training_from_disk_is_bit_identical_to_training_in_memory(
    augment: dict[str, Any], tmp_path: Path
) -> None:
    made.write_splits(tmp_path / "data", 3, train=300)
    here = Training(candidate(tmp_path, True, augment=augment))
    there = Training(candidate(tmp_path, False, augment=augment))
    assert (here.data.streamed, there.data.streamed) == (False, True)
    wanted = finish(here)
    first = there.run_epoch()
    assert threads() == 0
    torch.save(there.state_dict(), tmp_path / "state.pt")
    resumed = Training(candidate(tmp_path, False, augment=augment))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    found = finish(resumed)
    assert [[first, *found[0]], *found[1:]] == wanted
    assert threads() == 0


def test_a_training_that_fails_leaves_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.write_splits(tmp_path / "data", 1, train=300)
    training = Training(candidate(tmp_path, False))
    seen = []

    def failing(*_: Any) -> Any:
        seen.append(threads())
        raise RuntimeError("out of luck")

    monkeypatch.setattr(training, "train_batch", failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        training.run_epoch()
    assert seen == [1]
    assert threads() == 0


def test_batches_are_read_ahead_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.write_splits(tmp_path / "data", 1, train=300)
    data = load_once(HuggingFace(path=str(tmp_path / "data"), in_memory=False), CPU)
    given: list[int] = []

    def chosen() -> Any:
        for number, indices in enumerate(torch.arange(240).split(10)):
            given.append(number)
            yield indices

    with closing(data.batches(chosen())) as batches:
        for taken, batch in enumerate(batches, start=1):
            assert torch.equal(batch.inputs, data.train.inputs[10 * taken - 10 : 10 * taken])
            assert len(given) <= taken + base.PREFETCH
    assert len(given) == 24


def test_data_of_more_than_half_of_the_memory_is_streamed_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.write_splits(tmp_path / "data", 1)
    options = HuggingFace(path=str(tmp_path / "data"))
    size = 90 * 64 + 90 * 8
    assert not cache.load_shared(options).streamed
    for memory, streamed in ((2 * size, False), (2 * size - 1, True)):
        monkeypatch.setattr(cache.datasets, "memory_bytes", lambda memory=memory: memory)
        assert cache.load_shared(options).streamed == streamed
        assert not cache.load_shared(options.model_copy(update={"in_memory": True})).streamed


def test_a_broken_image_is_the_failure_of_the_trial_and_leaves_no_thread(tmp_path: Path) -> None:
    pictures, labels = made.pictures(300, 1)
    encoded = [made.png(pixels) for pixels in pictures]
    encoded[201] = b"no image"
    made.write_parquet(tmp_path / "data" / "train.parquet", encoded, labels)
    for in_memory in (True, "auto", False):
        with pytest.raises(UserError, match=r"row 201 of the training rows of .* is not an image"):
            Training(candidate(tmp_path, in_memory))
        assert threads() == 0
    assert not list(tmp_path.glob("cache/*.data")) and not list(tmp_path.glob("cache/*.part"))


def test_a_coloured_image_late_among_grey_ones_makes_all_rgb(tmp_path: Path) -> None:
    grey, labels = made.pictures(300, 1)
    coloured, _ = made.pictures(300, 3)
    encoded = [made.png(coloured[row] if row == 250 else grey[row]) for row in range(300)]
    made.write_parquet(tmp_path / "data" / "train.parquet", encoded, labels)
    for in_memory in (True, "auto"):
        data = cache.load_shared(HuggingFace(path=str(tmp_path / "data"), in_memory=in_memory))  # type: ignore[arg-type]
        found = torch.cat([data.train.inputs, data.validation.inputs, data.test.inputs])
        assert found.shape == (300, 3, 8, 8)
        wanted = {grey[row].tobytes() * 3 for row in range(300) if row != 250} | {
            coloured[250].transpose(2, 0, 1).tobytes()
        }
        assert {image.numpy().tobytes() for image in found} == wanted


@pytest.mark.slow
@pytest.mark.skipif(images.usable_cores() == 1, reason="there is one core only")
def test_what_takes_long_is_decoded_by_processes_with_the_same_result_and_none_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, labels = made.pictures(500, 1)
    encoded = [made.png(pixels) for pixels in pictures]
    made.write_parquet(tmp_path / "data" / "train.parquet", encoded, labels)
    wanted = HuggingFace(path=str(tmp_path / "data")).load()
    started = []

    def pool(*args: Any, **kwargs: Any) -> Any:
        started.append(ProcessPoolExecutor(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(images, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(images, "LONG", 0.0)
    monkeypatch.setattr(images, "usable_cores", lambda: 2)
    found = cache.load_shared(HuggingFace(path=str(tmp_path / "data"), in_memory=False))
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(found, name).inputs, getattr(wanted, name).inputs)
    encoded[401] = b"no image"
    made.write_parquet(tmp_path / "data" / "train.parquet", encoded, labels)
    with pytest.raises(UserError, match=r"row 401 of the training rows of .* is not an image"):
        cache.load_shared(HuggingFace(path=str(tmp_path / "data"), in_memory=False))
    assert len(started) == 2
    left = [
        child for child in psutil.Process().children() if "popen_loky" in " ".join(child.cmdline())
    ]
    assert not left


MEASURED = """
import json, sys, threading
from pathlib import Path
import datasets
from slimfront.trainables.data import HuggingFace, images
from slimfront.trainables.data.cache import load_shared
images.LONG = 1e9  # in this process
def anonymous():  # bytes that only this process has, and that the kernel could not take back
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024
def peak(options):
    before, most, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    data = load_shared(options)
    done.set()
    watcher.join()
    most[0] = max(most[0], anonymous())
    parts = (data.train, data.validation, data.test)
    return most[0] - before, sum(part.inputs.nbytes for part in parts)
HuggingFace(path=sys.argv[1], limit=64).load()  # imports, and what is allocated once
print(json.dumps(peak(HuggingFace(path=sys.argv[1], in_memory=sys.argv[2] == "memory"))))
"""


@pytest.mark.slow
def test_decoding_to_disk_takes_far_less_memory_than_the_data(tmp_path: Path) -> None:
    labels = np.arange(700) % 3
    few = [made.png(np.full((256, 256, 3), 80 * label, dtype=np.uint8)) for label in range(3)]
    made.write_parquet(
        tmp_path / "data" / "train.parquet", [few[label] for label in labels], labels
    )

    def measured(where: str) -> tuple[int, int]:
        # Each in a process of its own: what the first had freed would count for the second.
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "data"), where]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=110)
        assert done.returncode == 0, done.stderr
        most, size = json.loads(done.stdout.splitlines()[-1])
        return most, size

    on_disk, size = measured("disk")
    in_memory, same_size = measured("memory")
    assert size == same_size > 75e6
    assert in_memory > 0.8 * size  # so it is seen
    assert on_disk < 0.5 * size


def test_accuracy_is_taken_in_batches_that_fit_into_memory() -> None:
    class Network(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            sizes.append(inputs.nbytes)
            return inputs.flatten(1)[:, :2]

    sizes: list[int] = []
    inputs, labels = (
        torch.zeros(1, 3, 512, 512).expand(300, -1, -1, -1),
        torch.zeros(300, dtype=torch.int64),
    )
    task = Classification()
    active = task.attach(labels, Encoded(labels, 2))
    assert active.evaluate(Network(), inputs, labels) == {"val_accuracy": 1}
    assert max(sizes) <= 64 * 2**20
    assert sum(sizes) == 300 * 3 * 512 * 512 * 4


def test_a_memory_mapped_array_of_a_factory_gives_the_same_on_disk_as_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float64, (600, 50))
    rows[:] = np.random.default_rng(0).normal(3, 2, rows.shape)
    rows.flush()
    array = f"np.load({str(tmp_path / 'rows.npy')!r}, mmap_mode='r')"
    (tmp_path / "my_rows.py").write_text(
        f"import numpy as np\ndef load():\n    return {array}, np.arange(600) % 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = {"name": "factory", "factory": "my_rows:load"}

    def loaded(in_memory: bool) -> Dataset:
        return load_once(
            Candidate.model_validate({"data": data | {"in_memory": in_memory}}).data, CPU
        )

    here, there = loaded(True), loaded(False)
    assert there.train.inputs.dtype == torch.float32
    assert torch.equal(here.train.inputs, there.train.inputs) and torch.equal(
        here.test.inputs, there.test.inputs
    )
    assert here.standardised_by is not None and there.standardised_by is not None
    for one, other in zip(here.standardised_by, there.standardised_by, strict=True):
        assert torch.equal(one, other)
