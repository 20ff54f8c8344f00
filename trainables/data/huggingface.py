"""Images and text with targets, through Hugging Face `datasets`: from the hub, from parquet files,
from folders of images."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from slimfront.trainables.data.base import (
    CLASSIFICATION,
    DATA,
    Data,
    Dataset,
    Split,
    encoded_dataset,
    hold_out,
    split_indices,
)
from slimfront.trainables.data.cache import files_state
from slimfront.trainables.data.images import CHUNK, Rows, decode_into
from slimfront.trainables.data.tensor_file import Allocator, in_process
from slimfront.trainables.data.text import tokenized
from slimfront.trainables.errors import UserError, first_line_of, shorten
from slimfront.trainables.options import Options, suggest
from slimfront.trainables.tasks import Encoded, Task

if TYPE_CHECKING:  # imported where data is loaded: it takes a second that other data need not pay
    import datasets

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "fine_label")
_TEST_SHARE = 0.2  # where the data has no test split and the config does not say


def _absolute(path: str) -> str:
    """The path of a file or folder that is there, made absolute: the processes of a search work in
    other directories."""
    try:
        local = Path(path).expanduser()
        if local.exists():
            return str(local.absolute())
    except (RuntimeError, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"'{shorten(path)}' cannot be a path: {reason}") from None
    return path


class DataFiles(Options):
    """Local parquet files of the splits; without `test`, the test set is split off the training
    rows."""

    train: str
    test: str | None = None

    @field_validator("train", "test")
    @classmethod
    def _from_anywhere(cls, path: str | None) -> str | None:
        return path and _absolute(path)


@DATA.register("huggingface")
class HuggingFace(Data):
    """Images or text, with targets: `path` is a name on the hub (its subset: `config`), or a local
    folder.

    A folder holds parquet files named after their splits (`train.parquet`, `test.parquet`), or
    images as `train/CLASS/x.png`; `data_files` names parquet files instead. Relative paths count
    from the working directory.

    `text` names a column of text, of which `tokenizer`, a tokenizer.json of the library tokenizers,
    makes `input_ids` and `attention_mask`, of at most `max_length` tokens.

    `image` and `label` name the columns, where they are not found: the only Image and the only
    ClassLabel column, or the usual names. `train_split` and `test_split` name the splits. A split
    `test` is the test set if there is one, and `validation` is a fraction of the training rows;
    otherwise all three are split off the training rows, and `test` is the fraction (left out: 0.2).
    `limit` uses only the first so many training rows; `size` resizes all images to a square of so
    many pixels.
    """

    name: Literal["huggingface"] = "huggingface"
    path: str | None = None
    config: str | None = None
    data_files: DataFiles | None = None
    image: str | None = None
    text: str | None = None
    tokenizer: str | None = None
    max_length: int = Field(512, ge=1)
    label: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    test: float | None = Field(None, gt=0, lt=1)  # type: ignore[assignment] # wider than the base's; None: see the class
    size: int | None = Field(None, ge=1)
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _text_has_a_tokenizer(self) -> Self:
        if (self.text is None) != (self.tokenizer is None):
            raise ValueError(
                "'text' names a column of text, and 'tokenizer' the tokenizer.json that makes "
                "token ids of it; give both, or neither"
            )
        return self

    @field_validator("path", "tokenizer")
    @classmethod
    def _from_anywhere(cls, path: str | None) -> str | None:
        return path and _absolute(path)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.data_files is None):
            raise ValueError(
                "give either 'path' (a name on the Hugging Face hub, or a folder) or 'data_files'"
            )
        if self.config is not None and self.data_files is not None:
            raise ValueError(
                "'config' names a subset on the Hugging Face hub, so it does not go together with "
                "'data_files'"
            )
        return self

    @property
    def _where(self) -> str:
        source = self.path
        if not source and self.data_files:
            source = self.data_files.train
        return f"the data set '{source}'"

    def load(self, task: Task = CLASSIFICATION, allocate: Allocator = in_process) -> Dataset:
        train, test = self._splits()
        label = self._column(train.features, "label", _LABEL_NAMES)
        if self.text is not None:
            return self._load_text(task, train, test, label)
        image = self._column(train.features, "image", _IMAGE_NAMES)
        encoded, targets, test_targets = self._targets(task, train, test, label)
        if self.limit is not None:
            train, targets = self._limited(task, train, targets)
        places = self._places(task, targets, encoded, own_test=test is not None)
        training_rows = self._rows(train, image, "training", places)
        sources = [training_rows]
        targets_of_splits = [targets[indices] for indices in places]
        if test is not None and test_targets is not None:
            everything = torch.arange(len(test_targets))
            test_rows = self._rows(test, image, "test", [everything])
            sources.append(test_rows)
            targets_of_splits.append(test_targets)
        inputs_of_splits = decode_into(sources, _decoder(), self.size, allocate)
        splits = []
        for inputs, own in zip(inputs_of_splits, targets_of_splits, strict=True):
            splits.append(Split(inputs, own))
        return encoded_dataset(self, task, splits, encoded)

    def _places(
        self, task: Task, targets: Tensor, encoded: Encoded, *, own_test: bool
    ) -> list[Tensor]:
        """Which training rows are in the training split, in the validation split and, unless the
        data has a test split of its own, in the test split."""
        if own_test:
            everything = torch.arange(len(targets))
            held = hold_out(
                options=self,
                task=task,
                indices=everything,
                targets=targets,
                fraction=self.validation,
                names=encoded.names,
            )
            return list(held)
        shares = self.model_copy(update={"test": self.test or _TEST_SHARE})
        return list(
            split_indices(
                options=shares, task=task, targets=targets, groups=None, names=encoded.names
            )
        )

    def _load_text(
        self,
        task: Task,
        train: "datasets.Dataset",
        test: "datasets.Dataset | None",
        label: str,
    ) -> Dataset:
        """Token ids and masks of a column of text."""
        encoded, targets, test_targets = self._targets(task, train, test, label)
        if self.limit is not None:
            train, targets = self._limited(task, train, targets)
        texts = self._texts(train, "training")
        count = len(texts)
        if test is not None:
            texts += self._texts(test, "test")
        inputs = tokenized(texts, str(self.tokenizer), self.max_length)
        places = self._places(task, targets, encoded, own_test=test is not None)
        if test_targets is not None:
            places.append(torch.arange(count, len(texts)))
            targets = torch.cat([targets, test_targets])
        splits = [Split(inputs[indices], targets[indices]) for indices in places]
        return encoded_dataset(self, task, splits, encoded)

    def _refuse_no_column(
        self, rows: "datasets.Dataset", column: str, which: str, key: str = ""
    ) -> None:
        if column not in rows.features:
            raise UserError(
                f"the {which} rows of {self._where} have no column '{column}'{key}; "
                f"{suggest(column, rows.features)}"
            )

    def _texts(self, rows: "datasets.Dataset", which: str) -> list[str]:
        column = str(self.text)
        self._refuse_no_column(rows, column, which, " ('text')")
        texts = list(rows.select_columns([column])[:][column])
        for text in texts:
            if not isinstance(text, str):
                raise UserError(
                    f"the column '{column}' of {self._where} holds {type(text).__name__} among its "
                    f"{which} rows, and 'text' names a column of strings"
                )
        return texts

    def fingerprint(self) -> str | None:
        """Of the local files; of a name on the hub, of the files that `datasets` downloaded for its
        newest revision."""
        files = self._files()
        # Loading says what is missing.
        if all(file.is_file() for file in files):
            return files_state(files)
        return None

    def _files(self) -> list[Path]:
        if self.data_files is not None:
            named = [self.data_files.train, self.data_files.test]
            return [Path(file) for file in named if file]
        folder = Path(self.path or "")
        if folder.is_dir():
            named = list(_parquet_files(self).values())
            if named:
                return [Path(file) for file in named if file]
            return [file for file in folder.rglob("*") if file.is_file()]
        files = []
        for rows in _read(self).values():
            for part in rows.cache_files:
                files.append(Path(part["filename"]))
        return files

    def _splits(self) -> "tuple[datasets.Dataset, datasets.Dataset | None]":
        """The training rows, and the test rows if the data has some of its own."""
        found = _read(self)
        for name in (self.train_split, self.test_split):
            if name is not None and name not in found:
                raise UserError(f"{self._where} has no split '{name}'; {suggest(name, found)}")
        train = found[self.train_split]
        test_name = self.test_split or "test"
        test = None
        if test_name in found and test_name != self.train_split:
            test = found[test_name]
        for name, rows in ((self.train_split, train), (test_name, test)):
            if rows is not None and not len(rows):
                raise UserError(f"the split '{name}' of {self._where} has no rows")
        if test is not None and self.test is not None:
            raise UserError(
                f"{self._where} has a test split of its own, '{test_name}', so leave out 'test: "
                f"{self.test}'"
            )
        return train, test

    def _column(
        self, features: Mapping[str, object], key: Literal["image", "label"], usual: Sequence[str]
    ) -> str:
        """The name of the image or label column."""
        import datasets

        chosen = getattr(self, key)
        if chosen is not None:
            if chosen not in features:
                raise UserError(
                    f"{self._where} has no column '{chosen}' ('{key}'); {suggest(chosen, features)}"
                )
            return str(chosen)
        kind = datasets.ClassLabel
        if key == "image":
            kind = datasets.Image
        of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(of_kind) == 1:
            return of_kind[0]
        candidates = of_kind or list(features)
        named = [name for name in usual if name in candidates]
        if len(named) == 1:
            return named[0]
        problem = f"no {key} column that can be recognised"
        if of_kind:
            problem = f"{len(of_kind)} {key} columns"
        choices = ", ".join(candidates)
        raise UserError(
            f"{self._where} has {problem}; set '{key}' to the name of one of its columns: {choices}"
        )

    def _targets(
        self,
        task: Task,
        train: "datasets.Dataset",
        test: "datasets.Dataset | None",
        column: str,
    ) -> tuple[Encoded, Tensor, Tensor | None]:
        """The targets, and those of the training and test rows, as the task trains on them."""
        import datasets

        feature = train.features[column]
        named = []
        if isinstance(feature, datasets.ClassLabel):
            named = feature.names
        given = self._values(train, column, "training", len(named))
        held = []
        if test is not None:
            held = self._values(test, column, "test", len(named))
        if not named:
            self._refuse_unknown(given, held, column)
        try:
            encoded = task.encode([*given, *held], named)
        except UserError as error:
            raise UserError(
                f"the column '{column}' of {self._where} is {feature}: {error}"
            ) from None
        targets, test_targets = encoded.targets.split([len(given), len(held)])
        if test is None:
            return encoded, targets, None
        return encoded, targets, test_targets

    def _refuse_unknown(self, given: list[Any], held: list[Any], column: str) -> None:
        """Raises UserError for a name or number of a test row that no training row has."""
        known = {value for value in given if isinstance(value, int | str)}
        if not known:
            return
        for value in held:
            if isinstance(value, int | str) and value not in known:
                raise self._no_target(value, column, "test")

    def _values(self, rows: "datasets.Dataset", column: str, which: str, named: int) -> list[Any]:
        """A column of these rows as it is; `named` is how many names its values have, 0 for
        none."""
        self._refuse_no_column(rows, column, which)
        everything = rows.select_columns([column])[:]
        values: list[Any] = list(everything[column])
        if not named:
            return values
        numbers = {value for value in values if isinstance(value, int)}
        for number in numbers:
            if not 0 <= number < named:
                raise self._no_target(number, column, which)
        return values

    def _no_target(self, value: object, column: str, which: str) -> UserError:
        return UserError(
            f"{self._where} has {which} rows with the label {value!r} in '{column}', which is no "
            "class; use a split whose rows are all labelled"
        )

    def _limited(
        self, task: Task, train: "datasets.Dataset", targets: Tensor
    ) -> "tuple[datasets.Dataset, Tensor]":
        """The first `limit` rows."""
        assert self.limit is not None
        first = targets[: self.limit]
        strata = task.strata(targets)
        if strata is not None:
            kinds = len(strata.unique())
            kept = len(strata[: self.limit].unique())
            if kept < kinds:
                raise UserError(
                    f"the first {self.limit} training rows of {self._where} hold "
                    f"{kept} of its {kinds} kinds of "
                    "targets; make 'limit' larger, or leave it out where the rows are in the order "
                    "of their targets"
                )
        return train.select(range(len(first))), first

    def _rows(
        self, rows: "datasets.Dataset", column: str, which: str, parts: Sequence[Tensor]
    ) -> Rows:
        """The encoded images of these rows."""
        import datasets

        self._refuse_no_column(rows, column, which)
        undecoded = datasets.Image(decode=False)
        try:
            encoded = rows.select_columns([column]).cast_column(column, undecoded)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"the column '{column}' of {self._where} does not hold images: {error}"
            ) from None

        def chunks() -> Iterator[list[Any]]:
            for batch in encoded.iter(batch_size=CHUNK):
                yield batch[column]

        return Rows(chunks, f"the {which} rows of {self._where}", parts)


def _decoder() -> Any:
    import datasets

    return datasets.Image().decode_example


def _read(options: HuggingFace) -> "Mapping[str, datasets.Dataset]":
    """The splits by name.

    Raises:
        UserError: if the data is not there, or `datasets` cannot read it.
    """
    import datasets

    path = options.path or ""
    if options.data_files is not None:
        _refuse_missing_files(options.data_files)
    else:
        _refuse_no_folder(path)
    try:
        with _quiet():
            if options.data_files is not None:
                named = options.data_files.model_dump(exclude_none=True)
            else:
                named = _parquet_files(options)
            if named:
                return datasets.load_dataset("parquet", data_files=named)  # type: ignore[no-any-return]
            return datasets.load_dataset(path, options.config)  # type: ignore[no-any-return]
    except Exception as error:  # of many kinds, from the hub, the network, and readers of files
        reason = first_line_of(str(error)) or type(error).__name__
        raise UserError(
            f"{options._where} cannot be loaded: {reason}; 'path' is a name on the Hugging Face "
            "hub that can be reached from here, or a folder with parquet files or images"
        ) from error


def _refuse_missing_files(files: DataFiles) -> None:
    for file in (files.train, files.test):
        if file is not None and not Path(file).is_file():
            raise UserError(
                f"data_files: there is no file {file}; its folder is counted from {Path.cwd()}"
            )


def _refuse_no_folder(path: str) -> None:
    """Raises UserError for a path that is neither a folder nor a name on the hub."""
    if Path(path).is_file():
        raise UserError(
            f"data.path: {path} is a file; give its folder, or 'data_files: {{train: {path}}}'"
        )
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise UserError(
            f"data.path: there is no folder {path}; relative paths count from {Path.cwd()}"
        )


def _parquet_files(options: HuggingFace) -> dict[str, str]:
    """The files by split in a folder with `train.parquet`; none if it is another kind of folder.

    Named here, since `datasets` would take whatever else lies in the folder, and below, to be part
    of the data.
    """
    found = {}
    for name in (options.train_split, options.test_split or "test"):
        file = Path(options.path or "", f"{name}.parquet")
        if file.is_file():
            found[name] = str(file)
    if options.train_split not in found:
        return {}
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, which several processes would write over each other."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
