"""Candidates drawn at random over tasks, data, networks and options: each trains, or is refused in
one sentence before training."""

import copy
import logging
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from pydantic import ValidationError
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data import load_once
from slimfront.trainables.errors import UserError
from slimfront.trainables.training.rehearsal import rehearse
from slimfront.trainables.training.train import train

HERE = "tests.trainables.test_random_candidates"

INPUTS = ("table", "whole", "images", "floats", "series", "ids", "masked", "pair")
TARGETS = (
    "classes",
    "names",
    "shifted",
    "column",
    "one_hot",
    "rare",
    "numbers",
    "two_numbers",
    "bits",
    "pixels",
    "places",
    "gap",
    "constant",
)
NETWORKS = ("mlp", "lenet", "vgg", "resnet", "dense", "conv", "named", "tuple", "gru", "encoder")


def make_data(inputs: str, targets: str, count: int) -> tuple[Any, Any]:
    """Inputs and targets of these kinds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator)
    kind = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    length = 8
    ids = torch.randint(1, 20, (count, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(2, 9, (count, 1), generator=generator)).long()
    square = torch.randn(count, 1, 8, 8, generator=generator)
    made: dict[str, Any] = {
        "table": x,
        "whole": (x * 10).long(),
        "images": (square * 40 + 128).clamp(0, 255).to(torch.uint8),
        "floats": square.expand(count, 3, 8, 8),
        "series": torch.randn(count, 2, length, generator=generator),
        "ids": ids,
        "masked": {"input_ids": ids * mask, "attention_mask": mask},
        "pair": (x, x[:, :2].abs()),
    }
    rare = torch.zeros(count, dtype=torch.int64)
    rare[0] = 1
    wanted: dict[str, Any] = {
        "classes": kind,
        "names": [("low", "mid", "high")[k] for k in kind.tolist()],
        "shifted": kind + 1,
        "column": kind.float().unsqueeze(1),
        "one_hot": nn.functional.one_hot(kind, 3),
        "rare": rare,
        "numbers": 100 + x[:, 0] * 7,
        "two_numbers": x[:, :2],
        "bits": (x[:, :3] > 0).long(),
        "pixels": (square[:, 0] > 0).long(),
        "places": ids % 2,
        "gap": kind * 2,
        "constant": torch.ones(count),
    }
    return made[inputs], wanted[targets]


class Net(nn.Module):
    """A small network of a kind, which may fit the inputs and the targets or not."""

    def __init__(self, kind: str, outputs: int) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(20, 8) if kind in ("gru", "encoder") else None
        if kind == "dense":
            self.body: nn.Module = nn.Sequential(nn.LazyLinear(12), nn.GELU(), nn.Linear(12, 8))
        elif kind == "conv":
            self.body = nn.Sequential(nn.LazyConv2d(6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU())
        elif kind == "gru":
            self.body = nn.GRU(8, 8, batch_first=True)
        elif kind == "encoder":
            self.body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        else:
            self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.head = nn.Conv2d(6, outputs, 1) if kind == "conv" else nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "gru":
            return self.head(self.body(self.embedding(x))[0].mean(1))
        if self.kind == "encoder":
            return self.head(self.body(self.embedding(x)).mean(1))
        out = self.head(self.body(x))
        return {"named": {"logits": out}, "tuple": (out, x)}.get(self.kind, out)


class Masked(nn.Module):
    """Takes ids with a mask, and gives an output for each sequence or for each token."""

    def __init__(self, outputs: int, each: bool = False) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head, self.each = nn.Linear(8, outputs), each

    def forward(self, input_ids: Tensor, attention_mask: Tensor, factor: float = 1.0) -> Tensor:
        x = torch.relu(self.hidden(self.embedding(input_ids))) * factor
        if not self.each:
            mask = attention_mask.unsqueeze(-1)
            x = (x * mask).sum(1) / mask.sum(1).clamp_min(1)
        made: Tensor = self.head(x)
        return made


class Two(nn.Module):
    """Takes two tables by their places."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(2, 8), nn.Linear(8, outputs)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        made: Tensor = self.head(torch.relu(self.a(first) + self.b(second)))
        return made


class Places(nn.Module):
    """Gives outputs for each token of ids."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(torch.relu(self.embedding(x)))
        return made


def net(kind: str, outputs: int, each: bool = False) -> nn.Module:
    """The network of a kind; lazy layers see the data they usually see."""
    if kind == "masked":
        return Masked(outputs, each)
    if kind == "two":
        return Two(outputs)
    if kind == "places":
        return Places(outputs)
    made = Net(kind, outputs)
    if kind == "dense":
        made(torch.zeros(2, 6))
    if kind == "conv":
        made(torch.zeros(2, 1, 8, 8))
    return made


TASKS: list[Any] = [
    "classification",
    {"name": "classification", "class_weights": "balanced"},
    {"name": "classification", "label_smoothing": 0.1, "metrics": ["f1", "accuracy"]},
    {"name": "classification", "classes": 3, "metrics": "auroc"},
    {"name": "classification", "output": "logits"},
    {"name": "classification", "output": 0},
    "regression",
    {"name": "regression", "loss": "huber", "metrics": ["mae", "r2"]},
    {"name": "regression", "standardise": False, "metrics": "spearman"},
    "multilabel",
    {"name": "multilabel", "class_weights": "balanced", "metrics": "exact_match"},
    "segmentation",
    {"name": "segmentation", "ignore": 0},
    "sequence",
    "tokens",
]


def own(kind: str, outputs: int, **args: Any) -> dict[str, Any]:
    """A network of this file, as plain data."""
    return {"factory": f"{HERE}:net", "args": {"kind": kind, "outputs": outputs, **args}}


MLP = {"name": "mlp", "depth": 1, "width": 8}

FITTING: list[tuple[Any, str, str, Any]] = [
    ("classification", "table", "names", MLP),
    (TASKS[1], "table", "shifted", own("dense", 3)),
    (TASKS[2], "images", "one_hot", {"name": "lenet"}),
    (TASKS[3], "floats", "classes", MLP),
    (TASKS[4], "table", "column", own("named", 3)),
    (TASKS[5], "table", "classes", own("tuple", 3)),
    ("regression", "table", "numbers", MLP),
    (TASKS[7], "series", "two_numbers", MLP),
    (TASKS[8], "pair", "numbers", own("two", 1)),
    ("multilabel", "table", "bits", MLP),
    (TASKS[10], "pair", "bits", own("two", 3)),
    ("segmentation", "images", "pixels", own("conv", 2)),
    ("sequence", "ids", "classes", own("encoder", 3)),
    ("sequence", "masked", "names", own("masked", 3)),
    ("tokens", "masked", "places", own("masked", 2, each=True)),
    ("tokens", "ids", "places", own("places", 2)),
]
"""Tasks, inputs, targets and networks that go together, so that many candidates are right."""

NORMALISE = ["auto"] * 3 + ["per_feature", "per_channel", "global", "none"]
DIVISION = ["auto"] * 9 + ["random", "order", "stratified", "groups"]
PENALTIES = ("layer", "node", "channel", "connection", "cka", "block")
SPARSIFIERS = ("magnitude", "rigl", "set", "snip", "channels", "random", "granet")
KINDS = ["dense", "conv", "named", "tuple", "gru", "encoder", "masked", "two", "places"]
NAMED = [
    MLP,
    {"name": "lenet"},
    {"name": "vgg", "depth": 11, "width": 4},
    {"name": "resnet", "depth": 8, "width": 4},
]


@st.composite
def candidates(draw: st.DrawFn) -> dict[str, Any]:
    """A candidate as plain data: two in three of parts that go together."""
    if draw(st.integers(0, 2)):
        task, inputs, targets, model = draw(st.sampled_from(FITTING))
    else:
        task, inputs = draw(st.sampled_from(TASKS)), draw(st.sampled_from(INPUTS))
        targets, model = draw(st.sampled_from(TARGETS)), draw(st.sampled_from(NAMED))
        if draw(st.booleans()):
            model = own(draw(st.sampled_from(KINDS)), draw(st.integers(1, 4)))
    how: list[Any] = [*NORMALISE, {"mean": 0.5, "std": 2}]
    count = draw(st.sampled_from([24, 40, 61]))
    data: dict[str, Any] = {
        "factory": f"{HERE}:make_data",
        "args": {"inputs": inputs, "targets": targets, "count": count},
        "normalise": draw(st.sampled_from(how)),
        "division": draw(st.sampled_from(DIVISION)),
    }
    if draw(st.integers(0, 5)) == 0:
        data["augment"] = {"flip": True}
    pressed = [{name: {"strength": 0.01}} for name in PENALTIES]
    sparse: list[Any] = [{"name": name, "sparsity": 0.5} for name in SPARSIFIERS]
    for one in sparse:
        if one["name"] in ("rigl", "set", "granet"):
            one |= {"every": draw(st.sampled_from([1, 50])), "start": 0, "end": 1}
    return {
        "task": copy.deepcopy(task),
        "data": data,
        "model": copy.deepcopy(model),
        "training": {
            "epochs": 1,
            "batch_size": draw(st.sampled_from([8, 16, 35, 64])),
            "optimizer": draw(st.sampled_from(["adam", "sgd", "adamw"])),
            "seed": 0,
        },
        "penalties": draw(st.sampled_from([{}] * 4 + pressed)),
        "sparsifier": draw(st.sampled_from([None] * 4 + sparse + [{"name": "nm"}])),
        "compaction": {"enabled": draw(st.sampled_from([True, True, True, False]))},
        "refit": {"epochs": draw(st.sampled_from([0, 0, 1]))},
        "one_shot": {"steps": draw(st.sampled_from([0, 0, 2]))},
        "measures": draw(st.sampled_from([[], ["bytes_compressed"]])),
    }


def outcome(plain: dict[str, Any]) -> str:
    """ "trained", or why it was refused; anything else is raised."""
    try:
        candidate = Candidate.model_validate(plain)
        rehearse(candidate)
    except ValidationError:
        return "refused by the config"
    except UserError as error:
        text = str(error)
        assert "\n" not in text.strip() and len(text) > 20, text
        return text
    finally:
        load_once.cache_clear()
    measures = train(candidate).measures
    quality = f"val_{candidate.task.described()[0].name}"
    assert quality in measures
    return "trained"


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(candidates())
def test_a_random_candidate_trains_or_is_refused_before_training(plain: dict[str, Any]) -> None:
    logging.disable(logging.WARNING)
    try:
        outcome(plain)
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("number", range(len(FITTING)))
def test_what_goes_together_trains(number: int) -> None:
    task, inputs, targets, model = FITTING[number]
    plain = {
        "task": task,
        "data": {
            "factory": f"{HERE}:make_data",
            "args": {"inputs": inputs, "targets": targets, "count": 61},
        },
        "model": model,
        "training": {"epochs": 1, "batch_size": 16, "seed": 0},
        "one_shot": {"steps": 0},
    }
    assert outcome(plain) == "trained"


@pytest.mark.slow
@settings(
    max_examples=500,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
    derandomize=True,
)
@given(candidates())
def test_five_hundred_random_candidates_train_or_are_refused(plain: dict[str, Any]) -> None:
    logging.disable(logging.WARNING)
    try:
        outcome(plain)
    finally:
        logging.disable(logging.NOTSET)
