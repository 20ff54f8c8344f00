"""Text by a tokenizer that is built here: read, trained on, and shipped."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from slimfront import Candidate, train
from slimfront.trainables.data import load_once
from slimfront.trainables.data.text import MASK, tokenized, trimmed
from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import Several
from slimfront.trainables.measures.latency import Latency
from slimfront.trainables.models import built
from slimfront.trainables.shipping import ship
from slimfront.trainables.shipping.card import card
from slimfront.trainables.shipping.formats import load
from slimfront.trainables.training.rehearsal import rehearse
from tests.marks import often

CPU = torch.device("cpu")
HERE = "tests.trainables.data.test_text"
WORDS = ["good", "bad", "the", "film", "was", "very", "not", "a"]


class Reader(nn.Module):
    """A transformer encoder under a padding mask; `fixed`: with a place for 10 tokens, always."""

    def __init__(self, outputs: int = 2, fixed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 16, padding_idx=0)
        self.places = nn.Parameter(torch.zeros(10, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, outputs)
        self.fixed = fixed

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if self.fixed:
            x = x + self.places
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        mask = attention_mask.unsqueeze(-1).to(x.dtype)
        made: Tensor = self.head((x * mask).sum(1) / mask.sum(1))
        return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Parquet files of sentences, and a tokenizer.json."""
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[CLS]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", vocabulary["[CLS]"])]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 160), ("test", 40)):
        rows: dict[str, list[Any]] = {"sentence": [], "mood": []}
        for number in range(count):
            length = int(torch.randint(1, 9, (1,), generator=draw))
            others = torch.randint(2, len(WORDS), (length,), generator=draw).tolist()
            words = [WORDS[number % 2], *(WORDS[n] for n in others)]
            rows["sentence"].append(" ".join(words))
            rows["mood"].append(("positive", "negative")[number % 2])
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{split}.parquet"))
    return tmp_path


def candidate(folder: Path, **args: Any) -> Candidate:
    return Candidate.model_validate(
        {
            "task": "sequence",
            "data": {
                "name": "huggingface",
                "path": str(folder),
                "text": "sentence",
                "label": "mood",
                "tokenizer": str(folder),
                "max_length": 12,
            },
            "model": {"factory": f"{HERE}:Reader", "args": args},
            "training": {"epochs": 8, "batch_size": 16, "lr": 0.01, "seed": 0},
            "sparsifier": {"name": "magnitude", "sparsity": 0.5},
            "one_shot": {"steps": 1},
        }
    )


def test_text_becomes_ids_and_a_mask_and_padding_is_the_tokenizers(folder: Path) -> None:
    made = tokenized(["good film", "bad", "a very new film"], str(folder / "tokenizer.json"), 4)
    assert made["input_ids"].tolist() == [[1, 3, 6, 0], [1, 4, 0, 0], [1, 10, 8, 2]]
    assert made[MASK].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_a_text_without_tokens_is_one_of_padding_so_that_no_mean_is_taken_of_nothing(
    folder: Path,
) -> None:
    plain = Tokenizer(WordLevel({"[PAD]": 0, "x": 1}, "[PAD]"))
    plain.pre_tokenizer = Whitespace()
    plain.save(str(folder / "plain.json"))
    made = tokenized(["", "x x"], str(folder / "plain.json"), 5)
    assert made[MASK].tolist() == [[1, 0], [1, 1]]
    assert made["input_ids"].tolist() == [[0, 0], [1, 1]]


def test_batches_lose_the_padding_that_all_of_them_have(folder: Path) -> None:
    inputs = tokenized(["good", "bad film", "a very new film"], str(folder), 12)
    some, targets = trimmed(inputs[:2], torch.tensor([0, 1]))
    assert some["input_ids"].shape == some[MASK].shape == (2, 3)
    assert targets.tolist() == [0, 1]
    tags = torch.arange(10).reshape(2, 5)
    _, cut = trimmed(inputs[:2], tags)
    assert cut.tolist() == tags[:, :3].tolist()
    whole, _ = trimmed(inputs, torch.zeros(3))
    assert whole["input_ids"].shape == (3, 5)


@pytest.mark.parametrize(
    "kind",
    often(["pt2", "onnx", "safetensors"], "pt2"),
)
def test_a_network_is_trained_on_text_and_ships_with_its_mask(
    folder: Path, tmp_path: Path, kind: Any
) -> None:
    made = candidate(folder)
    rehearse(made)
    done = train(made)
    assert done.measures["val_accuracy"] > 0.9
    data = load_once(made.data, CPU, made.task)
    assert data.names == ("negative", "positive")
    assert list(data.train.inputs.named) == ["input_ids", "attention_mask"]  # type: ignore[attr-defined]
    dense = built(made.model, data)
    few = Latency(runs=3, warm_up=0)
    network = done.compacted.network
    shipment = ship(network, dense, data, tmp_path / f"n.{kind}", kind, latency=few)
    assert shipment.scores["test_accuracy"] > 0.9
    said = card(shipment, "n", data, "text", {}, [])
    assert "Its outputs stand for: `negative`, `positive`." in said
    asked = {
        "pt2": "network(input_ids=input_ids, attention_mask=attention_mask)",
        "safetensors": "network(input_ids=input_ids, attention_mask=attention_mask)",
        "onnx": '{"input_ids": input_ids, "attention_mask": attention_mask}',
    }
    assert asked[kind] in said
    inputs = data.test.inputs[:5]
    assert isinstance(inputs, Several)
    with torch.no_grad():
        wanted = network(inputs)
        back = load(shipment.path)
        found = back(inputs) if kind == "onnx" else back(**inputs.named)
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_network_that_needs_batches_of_one_length_is_refused_before_training(
    folder: Path,
) -> None:
    with pytest.raises(UserError, match="a batch whose padding was cut off, `input_ids` int64"):
        rehearse(candidate(folder, fixed=True))


def test_text_and_tokenizer_go_together(folder: Path) -> None:
    data = candidate(folder).data.model_dump()
    with pytest.raises(ValidationError, match="give both, or neither"):
        Candidate.model_validate({"data": data | {"tokenizer": None}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "sentense"}, "no column 'sentense' .*did you mean 'sentence'"),
        ({"label": "modd"}, "no column 'modd' .*did you mean 'mood'"),
        ({"tokenizer": "/nowhere/tokenizer.json"}, "there is no file /nowhere/tokenizer.json"),
        ({"tokenizer": "train.parquet"}, "cannot be read as a tokenizer.json"),
        ({"limit": 1}, "hold 1 of its 2 kinds of targets"),
    ],
)
def test_what_is_wrong_with_text_is_one_sentence(
    folder: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    made = candidate(folder)
    wrong = Candidate.model_validate({"data": made.data.model_dump() | changes, "task": "sequence"})
    with pytest.raises(UserError, match=message) as caught:
        wrong.data.load(wrong.task)
    assert "\n" not in str(caught.value)


def test_a_column_of_numbers_is_no_text(folder: Path) -> None:
    rows = datasets.Dataset.from_dict({"sentence": [1, 2] * 9, "mood": ["a", "b"] * 9})
    for split in ("train", "test"):
        rows.to_parquet(str(folder / f"{split}.parquet"))
    made = candidate(folder)
    with pytest.raises(UserError, match="holds int among its training rows"):
        made.data.load(made.task)
