import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from slimfront import Candidate, train
from slimfront.trainables.data import DataFiles, HuggingFace, load_once
from slimfront.trainables.errors import UserError
from tests.trainables.data import made

ROOT = Path(__file__).parents[3]
REAL = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left in the cache of whoever runs the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def decoded_rows(inputs: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in inputs}


@pytest.mark.parametrize("channels", [1, 3])
def test_parquet_files_with_pngs_are_decoded_exactly(channels: int, tmp_path: Path) -> None:
    made.write_splits(tmp_path, channels)
    data = HuggingFace(path=str(tmp_path)).load()
    assert data.input_shape == (channels, 8, 8)
    assert data.head == 3
    images, labels = made.pictures(30, channels, seed=1)
    expected = torch.from_numpy(images).reshape(30, 8, 8, channels).permute(0, 3, 1, 2)
    assert torch.equal(data.test.inputs, expected)
    assert data.test.targets.tolist() == labels.tolist()
    wanted = (
        torch.from_numpy(made.pictures(60, channels)[0])
        .reshape(60, 8, 8, channels)
        .permute(0, 3, 1, 2)
    )
    assert decoded_rows(torch.cat([data.train.inputs, data.validation.inputs])) == decoded_rows(
        wanted.contiguous()
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_folders_of_images_are_decoded_exactly(channels: int, tmp_path: Path) -> None:
    made.write_folder(tmp_path, channels)
    data = HuggingFace(path=str(tmp_path)).load()
    images, labels = made.pictures(30, channels, seed=1)
    expected = torch.from_numpy(images).reshape(30, 8, 8, channels).permute(0, 3, 1, 2)
    in_memory = {
        (image.numpy().tobytes(), int(label))
        for image, label in zip(data.test.inputs, data.test.targets, strict=True)
    }
    # A folder's classes are in the order of their names: bright, dark, grey.
    number = {
        0: 1,
        1: 2,
        2: 0,
    }
    assert in_memory == {
        (i.contiguous().numpy().tobytes(), number[int(y)])
        for i, y in zip(expected, labels, strict=True)
    }


def test_images_stay_uint8_in_memory(tmp_path: Path) -> None:
    made.write_splits(tmp_path, 3)
    data = load_once(HuggingFace(path=str(tmp_path)), torch.device("cpu"))
    assert {part.inputs.dtype for part in (data.train, data.validation, data.test)} == {torch.uint8}
    assert data.train.inputs.nbytes == 48 * 3 * 8 * 8


def test_a_process_decodes_every_image_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.write_splits(tmp_path, 1)
    count, decode = [0], datasets.Image.decode_example

    def counting(self: datasets.Image, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(datasets.Image, "decode_example", counting)
    plain = {
        "data": {"name": "huggingface", "path": str(tmp_path)},
        "model": {"name": "mlp", "depth": 1, "width": 4},
        "training": {"epochs": 3},
    }
    train(Candidate.model_validate(plain))
    plain["data"]["augment"] = {"crop": 1, "flip": True}  # type: ignore[index]
    train(Candidate.model_validate(plain))
    assert count[0] == 60 + 30


def test_a_test_split_of_its_own_is_the_test_set_and_validation_is_taken_from_training(
    tmp_path: Path,
) -> None:
    made.write_splits(tmp_path, 1, train=60, test=30)
    data = HuggingFace(path=str(tmp_path), validation=0.25).load()
    assert [len(part.targets) for part in (data.train, data.validation, data.test)] == [45, 15, 30]
    assert data.validation.targets.bincount().tolist() == [5, 5, 5]
    again, other = (
        HuggingFace(path=str(tmp_path), validation=0.25).load(),
        HuggingFace(path=str(tmp_path), seed=1).load(),
    )
    assert torch.equal(data.train.inputs, again.train.inputs)
    assert not torch.equal(data.train.inputs, other.train.inputs[:45])


def test_without_a_test_split_all_three_are_split_off_the_training_rows(tmp_path: Path) -> None:
    made.write_splits(tmp_path, 1, train=60, test=None)
    data = HuggingFace(path=str(tmp_path)).load()
    assert [len(part.targets) for part in (data.train, data.validation, data.test)] == [36, 12, 12]
    data = HuggingFace(path=str(tmp_path), test=0.4).load()
    assert [len(part.targets) for part in (data.train, data.validation, data.test)] == [24, 12, 24]


def test_a_test_fraction_beside_a_test_split_is_refused(tmp_path: Path) -> None:
    made.write_splits(tmp_path, 1)
    with pytest.raises(
        UserError, match=r"has a test split of its own, 'test', so leave out 'test: 0\.3'"
    ):
        HuggingFace(path=str(tmp_path), test=0.3).load()


def test_other_files_beside_the_parquet_files_of_the_splits_do_not_matter(tmp_path: Path) -> None:
    made.write_splits(tmp_path, 1)
    made.write_splits(tmp_path / "test" / "older", 3)
    (tmp_path / "test.csv").write_text("a,b\n1,2\n")
    assert HuggingFace(path=str(tmp_path)).load().input_shape == (1, 8, 8)


def test_parquet_files_may_be_called_after_other_splits(tmp_path: Path) -> None:
    made.write_splits(tmp_path, 1)
    (tmp_path / "train.parquet").rename(tmp_path / "small.parquet")
    (tmp_path / "test.parquet").rename(tmp_path / "held_out.parquet")
    data = HuggingFace(path=str(tmp_path), train_split="small", test_split="held_out").load()
    assert [len(part.targets) for part in (data.train, data.validation, data.test)] == [48, 12, 30]


def test_data_files_name_the_files_of_the_splits(tmp_path: Path) -> None:
    made.write_splits(tmp_path, 1)
    (tmp_path / "test.parquet").rename(tmp_path / "other.parquet")
    files = DataFiles(train=str(tmp_path / "train.parquet"), test=str(tmp_path / "other.parquet"))
    assert len(HuggingFace(data_files=files).load().test.targets) == 30


def test_relative_paths_are_made_absolute_when_the_config_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.write_splits(tmp_path / "here", 1)
    monkeypatch.chdir(tmp_path)
    options = HuggingFace(path="here")
    files = HuggingFace(data_files=DataFiles(train="here/train.parquet"))
    monkeypatch.chdir("/")  # as the processes of a search do
    assert len(options.load().test.targets) == 30
    assert len(files.load().test.targets) == 12
    assert HuggingFace(path="ylecun/mnist").path == "ylecun/mnist"  # not there: a name on the hub


def test_changed_files_are_read_anew(tmp_path: Path) -> None:
    made.write_splits(tmp_path / "data", 1, test=30)
    assert len(HuggingFace(path=str(tmp_path / "data")).load().test.targets) == 30
    made.write_splits(tmp_path / "data", 1, test=33)
    assert len(HuggingFace(path=str(tmp_path / "data")).load().test.targets) == 33


def test_limit_uses_the_first_training_rows_only_and_the_whole_test_set(tmp_path: Path) -> None:
    made.write_splits(tmp_path, 1)
    data = HuggingFace(path=str(tmp_path), limit=30).load()
    assert [len(part.targets) for part in (data.train, data.validation, data.test)] == [24, 6, 30]
    first = torch.from_numpy(made.pictures(60, 1)[0][:30]).unsqueeze(1)
    assert decoded_rows(torch.cat([data.train.inputs, data.validation.inputs])) == decoded_rows(
        first
    )


def test_a_limit_that_leaves_out_classes_is_refused(tmp_path: Path) -> None:
    made.write_folder(tmp_path, 1)
    with pytest.raises(
        UserError, match=r"the first 10 training rows of .* hold 1 of its 3 kinds of targets"
    ):
        HuggingFace(path=str(tmp_path), limit=10).load()


def test_images_of_different_sizes_are_refused_unless_they_are_resized(tmp_path: Path) -> None:
    made.write_splits(tmp_path, 3, test=None)
    made.write_splits(tmp_path / "large", 3, train=30, test=None, size=12)
    (tmp_path / "large" / "train.parquet").rename(tmp_path / "test.parquet")
    with pytest.raises(UserError, match=r"different sizes \(8×8 and 12×12, say\).* add 'size: 32'"):
        HuggingFace(path=str(tmp_path)).load()
    assert HuggingFace(path=str(tmp_path), size=10).load().input_shape == (3, 10, 10)


def test_grey_images_among_coloured_ones_become_rgb(tmp_path: Path) -> None:
    grey, labels = made.pictures(30, 1)
    coloured, _ = made.pictures(30, 3)
    encoded = [made.png(coloured[row] if row % 2 else grey[row]) for row in range(30)]
    made.write_parquet(tmp_path / "train.parquet", encoded, labels)
    made.write_parquet(tmp_path / "test.parquet", [made.png(pixels) for pixels in grey], labels)
    data = HuggingFace(path=str(tmp_path)).load()
    assert data.input_shape == (3, 8, 8)
    assert torch.equal(data.test.inputs, torch.from_numpy(grey).unsqueeze(1).expand(-1, 3, -1, -1))


@pytest.mark.parametrize(("mode", "channels"), [("LA", 1), ("1", 1), ("RGBA", 3), ("P", 3)])
def test_other_modes_become_grey_or_rgb(mode: str, channels: int, tmp_path: Path) -> None:
    images, labels = made.pictures(30, 3)
    made.write_parquet(
        tmp_path / "train.parquet", [made.png(pixels, mode) for pixels in images], labels
    )
    assert HuggingFace(path=str(tmp_path)).load().input_shape == (channels, 8, 8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            b"no image at all",
            "row 4 of the training rows of the data set .* is not an image that Pillow can read",
        ),
        (
            made.png(np.full((8, 8), 900, dtype=np.uint16)),
            "row 4 of .* has more than 8 bits per channel",
        ),
    ],
)
def test_images_that_cannot_be_used_are_named(bad: bytes, message: str, tmp_path: Path) -> None:
    images, labels = made.pictures(30, 1)
    encoded = [made.png(pixels) for pixels in images]
    encoded[4] = bad
    made.write_parquet(tmp_path / "train.parquet", encoded, labels)
    with pytest.raises(UserError, match=message):
        HuggingFace(path=str(tmp_path)).load()


def test_unlabelled_rows_are_refused(tmp_path: Path) -> None:
    made.write_splits(tmp_path, 1, test=None)
    images, labels = made.pictures(6, 1)
    made.write_parquet(
        tmp_path / "test.parquet", [made.png(pixels) for pixels in images], np.full_like(labels, -1)
    )
    with pytest.raises(
        UserError, match="has test rows with the label -1 in 'label', which is no class"
    ):
        HuggingFace(path=str(tmp_path)).load()


def write_columns(folder: Path, columns: dict[str, Any]) -> None:
    images, labels = made.pictures(30, 1)
    encoded = [{"bytes": made.png(pixels), "path": None} for pixels in images]
    rows = {
        name: encoded if isinstance(feature, datasets.Image) else labels.tolist()
        for name, feature in columns.items()
    }
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).to_parquet(
        str(folder / "train.parquet")
    )


IMAGE, CLASS, NUMBER = (
    datasets.Image(),
    datasets.ClassLabel(names=["a", "b", "c"]),
    datasets.Value("int64"),
)


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"img": IMAGE, "kind": CLASS}, {}),  # the only ones of their type
        ({"img": IMAGE, "fine_label": CLASS, "coarse_label": CLASS}, {}),  # the usual names
        ({"left": IMAGE, "image": IMAGE, "label": NUMBER, "age": NUMBER}, {}),
        ({"left": IMAGE, "right": IMAGE, "a": CLASS, "b": CLASS}, {"image": "right", "label": "b"}),
        (
            {"picture": IMAGE, "age": NUMBER},
            {"label": "age"},
        ),  # whole numbers that are not called classes
    ],
)
def test_the_columns_are_found_or_named(
    columns: dict[str, Any], options: dict[str, str], tmp_path: Path
) -> None:
    write_columns(tmp_path, columns)
    data = HuggingFace(path=str(tmp_path), **options).load()  # type: ignore[arg-type]
    assert data.head == 3
    assert data.train.targets.bincount().tolist() == [6, 6, 6]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"left": IMAGE, "right": IMAGE, "label": CLASS},
            {},
            "has 2 image columns; set 'image' to .* left, right",
        ),
        (
            {"image": IMAGE, "x": CLASS, "y": CLASS},
            {},
            "has 2 label columns; set 'label' to the name of one .*: x, y",
        ),
        (
            {"image": IMAGE, "age": NUMBER},
            {},
            "has no label column that can be recognised; set 'label' .*: image, age",
        ),
        (
            {"image": IMAGE, "label": CLASS},
            {"image": "imag"},
            r"has no column 'imag' \('image'\); did you mean 'image'",
        ),
        (
            {"image": IMAGE, "label": CLASS},
            {"image": "label"},
            "the column 'label' of .* does not hold images",
        ),
        (
            {"image": IMAGE, "label": CLASS},
            {"train_split": "training"},
            "has no split 'training'; did you mean 'train'",
        ),
        (
            {"image": IMAGE, "label": CLASS},
            {"test_split": "test"},
            "has no split 'test'; known: train",
        ),
    ],
)
def test_what_is_missing_or_ambiguous_is_said_with_the_choices(
    columns: dict[str, Any], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    write_columns(tmp_path, columns)
    with pytest.raises(UserError, match=message):
        HuggingFace(path=str(tmp_path), **options).load()  # type: ignore[arg-type]


def test_names_of_classes_are_numbered_in_their_order(tmp_path: Path) -> None:
    images, _ = made.pictures(30, 1)
    rows = {
        "image": [{"bytes": made.png(p), "path": None} for p in images],
        "label": ["cat", "ant", "bee"] * 10,
    }
    features = datasets.Features({"image": IMAGE, "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    data = HuggingFace(path=str(tmp_path)).load()
    assert data.train.targets.bincount().tolist() == [6, 6, 6]
    # The darkest class.
    cat = int(data.train.targets[(data.train.inputs.float().mean((1, 2, 3)) < 60)][0])
    assert cat == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "./nowhere"}, "there is no folder ./nowhere; relative paths count from"),
        ({"data_files": {"train": "nowhere.parquet"}}, "there is no file nowhere.parquet"),
        ({"path": __file__}, "is a file; give its folder, or 'data_files"),
    ],
)
def test_missing_files_are_refused_with_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HuggingFace.model_validate(options).load()


def test_an_empty_folder_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError,
        match=(
            r"the data set '.*empty' cannot be loaded: .*or a folder with parquet "
            r"files or images"
        ),
    ):
        HuggingFace(path=str(tmp_path / "empty")).load()


def test_a_source_is_needed_and_only_one() -> None:
    for options in ({}, {"path": "a", "data_files": DataFiles(train="b")}):
        with pytest.raises(ValidationError, match="give either 'path'"):
            HuggingFace(**options)  # type: ignore[arg-type]


def test_a_name_on_the_hub_that_cannot_be_reached_is_a_sentence_and_not_a_traceback(
    tmp_path: Path,
) -> None:
    program = """
from slimfront.trainables.data import HuggingFace
from slimfront.trainables.errors import UserError
import sys
assert "datasets" not in sys.modules  # imported only where such data is loaded
try:
    HuggingFace(path="nobody/nothing").load()
except UserError as error:
    print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the data set 'nobody/nothing' cannot be loaded: ")
    assert done.stdout.count("\n") == 1


def test_the_splits_are_read_quietly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made.write_splits(tmp_path, 1)
    capfd.readouterr()
    HuggingFace(path=str(tmp_path)).load()
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data is not beside this clone")
@pytest.mark.parametrize(
    ("name", "rows", "shape", "options"),
    [("mnist", 2000, (1, 28, 28), {}), ("cifar10", 1000, (3, 32, 32), {"seed": 1})],
)
def test_real_images_are_read(
    name: str, rows: int, shape: tuple[int, ...], options: dict[str, int]
) -> None:
    data = HuggingFace(path=str(REAL / name), limit=rows, **options).load()  # type: ignore[arg-type]
    assert data.input_shape == shape
    assert data.head == 10
    assert [len(part.targets) for part in (data.train, data.validation, data.test)] == [
        rows * 0.8,
        rows * 0.2,
        10_000,
    ]
    assert 20 < float(data.mean.mean()) < 140  # type: ignore[union-attr]
