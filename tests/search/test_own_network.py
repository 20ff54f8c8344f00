"""`slimfront compact` on a network of the user's, as they type it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from slimfront.search.cli import main
from slimfront.trainables.data import Digits
from slimfront.trainables.shipping import load as load_file

pytestmark = pytest.mark.timeout(120)

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(8 * 16, 32), nn.Linear(32, 10)
    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))

def load():
    print("loading")
    net = Net()
    net.load_state_dict(torch.load("net.pt", weights_only=True))
    return net

network = Net()
number = 3

def wrong():
    return 3

def broken():
    raise OSError("no such checkpoint")

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def other():
    return nn.Linear(5, 10)

class Draws(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)
"""

DATA = {"data": {"name": "digits"}, "task": {"name": "classification", "metrics": ["accuracy"]}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network's, and its module."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_networks.py").write_text(MODULE)
    names: dict[str, Any] = {}
    exec(MODULE, names)
    from slimfront.trainables.candidate import Candidate
    from slimfront.trainables.data import load_once

    data = load_once(Digits(), torch.device("cpu"), Candidate().task)
    torch.manual_seed(0)
    net = names["Net"]()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    x, y = data.prepare(data.train.inputs), data.train.targets
    for _ in range(8):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    torch.save(net.state_dict(), folder / "net.pt")
    return folder


@pytest.fixture
def here(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("own_networks.py", "net.pt"):
        (tmp_path / name).write_bytes((weights / name).read_bytes())
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(DATA))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return tmp_path


@pytest.fixture
def compact(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Exit code, stdout and stderr of `slimfront compact …`."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slimfront", "compact", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_a_share_of_the_channels_goes_and_the_card_compares_with_the_network_given(
    compact: Any, here: Path
) -> None:
    code, out, err = compact(
        *("own_networks:load", "--prune", "channels=0.3"),
        *("--data", "data.yaml", "--output", "small.onnx"),
    )
    assert code == 0, err
    assert "loading" in err
    card = Path("small.md").read_text()
    assert out.startswith(card)
    assert card.startswith("# own\\_networks&#58;load\n")
    rows = {
        row.split("|")[1].strip(): [float(n) for n in re.findall(r"\d\.\d{4}", row)]
        for row in card.splitlines()
        if row.startswith("| th")
    }
    assert list(rows) == ["the network given", "the compact network", "this file"]
    assert all(len(numbers) == 2 for numbers in rows.values())
    assert rows["the network given"][0] > 0.95
    assert rows["the compact network"][0] > 0.7
    assert rows["this file"] == rows["the compact network"]
    assert "| | this network | given | ratio |" in card
    assert "- pruned: channels=0.3 on 512 training examples" in card
    assert re.search(r"- pruned: `(conv`, `)?hidden`\n", card)
    assert "Written to small.onnx; this card is small.md.\n" in out
    assert out.rstrip().splitlines()[-1].startswith("val accuracy")
    assert Path("small.onnx").stat().st_size > 1000


def test_compaction_is_as_the_config_says(compact: Any, here: Path) -> None:
    Path("eights.yaml").write_text(yaml.safe_dump(DATA | {"compaction": {"multiple": 8}}))
    command = ("own_networks:load", "--prune", "channels=0.3", "--output", "small.pt2")
    code, _, err = compact(*command, "--data", "eights.yaml")
    assert code == 0, err
    widths = [len(p) for p in torch.export.load("small.pt2").parameters() if p.dim() > 1]
    assert len(widths) == 3
    assert all(width % 8 == 0 for width in widths[:-1])

    Path("small.pt2").unlink()
    Path("small.md").unlink()
    code, _, err = compact(*command, "--data", "data.yaml", "--set", "compaction.enabled=false")
    assert code == 2
    assert "compaction.enabled is false" in err


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
def test_the_command_of_the_config_times_the_file_and_that_of_the_network_given(
    compact: Any, here: Path, int8: bool
) -> None:
    Path("size.py").write_text("import os, sys; print(os.stat(sys.argv[1]).st_size / 1000)")
    latency = {"command": f"{shlex.quote(sys.executable)} size.py {{file}}", "runs": 3}
    Path("timed.yaml").write_text(yaml.safe_dump(DATA | {"latency": latency}))
    code, out, err = compact(
        *("own_networks:load", "--prune", "channels=0.5", "--data", "timed.yaml"),
        *("--output", "small.onnx", "--json", *(["--int8"] if int8 else [])),
    )
    assert code == 0, err
    times = json.loads(out)["times"]
    assert times["latency_ms"] == pytest.approx(Path("small.onnx").stat().st_size / 1000, rel=0.02)
    assert times["speedup"] > 1.2
    card = Path("small.md").read_text()
    assert f"- `latency_ms` by latency.command: {times['latency_ms']:.4g}" in card


def test_a_command_that_fails_leaves_no_file(compact: Any, here: Path) -> None:
    latency = {"command": f"{shlex.quote(sys.executable)} -c 'exit(3)' {{file}}"}
    Path("timed.yaml").write_text(yaml.safe_dump(DATA | {"latency": latency}))
    code, _, err = compact(
        *("own_networks:load", "--prune", "channels=0.5", "--data", "timed.yaml"),
        *("--output", "small.onnx"),
    )
    assert code == 2
    assert "ended with exit code 3" in " ".join(err.split())
    assert not Path("small.onnx").exists()


@pytest.mark.parametrize("kind", ["pt2", "onnx", "safetensors"])
def test_json_is_one_object_with_what_was_before_and_after(
    compact: Any, here: Path, kind: str
) -> None:
    output = f"small.{kind}"
    code, out, _ = compact(
        *("own_networks:load", "--prune", "weights=0.5", "--data", "data.yaml"),
        *("--output", output, "--json"),
    )
    assert code == 0
    assert out.count("\n") == 1
    found = json.loads(out)
    assert found["output"] == output
    assert found["card"] == "small.md"
    assert found["format"] == kind
    before, after = found["given"], found["compact"]
    assert before["val_accuracy"] > 0.95
    assert {"test_accuracy", "params", "flops"} <= before.keys() & after.keys()
    assert after["nonzero_params"] < 0.6 * before["nonzero_params"]
    assert found["file"]["val_accuracy"] == pytest.approx(after["val_accuracy"], abs=0.01)
    assert found["difference"] < 1e-4
    assert any(step[1] == "pruned" for step in found["steps"])
    data = Digits().load()
    with torch.no_grad():
        made = load_file(here / output)(data.raw(data.validation.inputs))
    accuracy = float((made.argmax(1) == data.validation.targets).float().mean())
    assert accuracy == pytest.approx(found["file"]["val_accuracy"], abs=1e-6)


def test_without_pruning_it_is_only_made_compact_and_a_dense_one_loses_nothing(
    compact: Any, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, out, _ = compact(
        "own_networks:load", "--data", "data.yaml", "--output", "same.pt2", "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert found["compact"]["val_accuracy"] == found["given"]["val_accuracy"]
    nothing = "compaction found nothing to remove in the network; prune it by --prune"
    assert nothing in caplog.text
    caplog.clear()
    state = torch.load("net.pt", weights_only=True)
    state["hidden.weight"][:16] = 0
    state["hidden.bias"][:16] = 0
    torch.save(state, "net.pt")
    code, out, _ = compact(
        "own_networks:load", "--data", "data.yaml", "--output", "less.pt2", "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert found["compact"]["params"] < 0.7 * found["given"]["params"]
    assert found["compact"]["val_accuracy"] == found["given"]["val_accuracy"]
    assert nothing not in caplog.text


@pytest.mark.parametrize(
    ("criterion", "how"),
    [((), "the outputs change by"), (("--criterion", "loss"), "the loss is")],
)
def test_a_layer_goes_and_is_named(
    compact: Any, here: Path, criterion: tuple[str, ...], how: str
) -> None:
    code, out, _ = compact(
        *("own_networks:load", "--prune", "layers=1", "--data", "data.yaml"),
        *("--output", "shallow.safetensors", "--json", *criterion),
    )
    assert code == 0
    found = json.loads(out)
    assert found["steps"][0][:2] == ["hidden", "pruned"]
    assert how in found["steps"][0][2]
    assert found["compact"]["layers"] == 2


def test_the_config_of_a_search_says_the_data_too(compact: Any, here: Path) -> None:
    search = {
        **DATA,
        "name": "mine",
        "model": {"name": "mlp"},
        "space": {"training.lr": {"low": 1e-4, "high": 1e-2}},
    }
    Path("search.yaml").write_text(yaml.safe_dump(search))
    code, out, _ = compact(
        *("own_networks:load", "--data", "search.yaml", "--set", "data.seed=3"),
        *("--prune", "channels=0.2", "--examples", "64", "--output", "a.pt2", "--json"),
    )
    assert code == 0
    assert json.loads(out)["given"]["val_accuracy"] > 0.95


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--prune": "channels"}, "--prune channels: it needs a form such as channels=0.5"),
        (
            {"--prune": "chanels=0.5"},
            "--prune chanels=0.5: there is no 'chanels' to prune; did you",
        ),
        ({"--prune": "channels=half"}, "--prune channels=half: 'half' is no number"),
        ({"--prune": "layers=nan"}, "layers=nan: it is how many layers go, 1 or more"),
        ({"--prune": "layers=inf"}, "layers=inf: it is how many layers go, 1 or more"),
        ({"--prune": "channels=nan"}, "channels=nan: it is a share, more than 0 and less than 1"),
        ({"--prune": "channels=2"}, "channels=2: it is a share, more than 0 and less than 1"),
        ({"--prune": "layers=9"}, "layers=9: no more than 1 can be taken out of this network"),
        ({"--prune": "channels=0.001"}, "channels=0.001: that is none of the 40 channels"),
        ({"--prune": "layers=1", "--criterion": "ckaa"}, "there is no criterion 'ckaa'; did you"),
        ({"--criterion": "cka"}, "--criterion says which layers go; give --prune layers=NUMBER b"),
        (
            {"--prune": "channels=0.5", "--criterion": "cka"},
            "criterion='cka' judges whole layers, and channels=0.5 is given",
        ),
        ({"network": "own_networks"}, "network 'own_networks': an import path has the form"),
        ({"network": "nowhere:load"}, "network 'nowhere:load': there is no module 'nowhere'"),
        ({"network": "own_networks:wrong"}, "network 'own_networks:wrong' returned a int"),
        ({"network": "own_networks:broken"}, "network 'own_networks:broken' raised OSError: no s"),
        ({"network": "own_networks:number"}, "network 'own_networks:number': it is a int"),
        (
            {"network": "own_networks:narrow"},
            "the network gives 3 logits, and the data set has 10 classes",
        ),
        ({"network": "own_networks:other"}, "the network cannot be run on the data of data.yaml"),
        ({"network": "own_networks:Draws"}, "Draws.forward cannot be traced"),
        ({"--output": "small.pkl"}, "--output small.pkl: it ends in none of .pt2, .onnx, .safet"),
        ({"--output": "there.pt2"}, "there.pt2 is there already"),
        ({"--data": "nowhere.yaml"}, "cannot read the config nowhere.yaml"),
        ({"--data": "empty.yaml"}, "empty.yaml: it has no 'data' section"),
        ({"--data": "typo.yaml"}, "did you mean 'data'?"),
        ({"--data": "wrong.yaml"}, "'data.test'"),
        ({"--examples": "0"}, "Invalid value for '--examples'"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    compact: Any, here: Path, changes: dict[str, str], sentence: str
) -> None:
    Path("there.pt2").write_text("mine")
    Path("empty.yaml").write_text("name: mine\n")
    Path("typo.yaml").write_text("dota: {name: digits}\n")
    Path("wrong.yaml").write_text("data: {name: digits, test: 3}\n")
    before = sorted(here.iterdir())
    given = {"network": "own_networks:load", "--data": "data.yaml", "--output": "small.pt2"}
    given |= changes
    network = given.pop("network")
    options = [text for pair in given.items() for text in pair]
    code, out, err = compact(network, *options)
    assert (code, out) == (2, "")
    said = re.sub(r"\s+", " ", err)
    assert sentence in said
    assert "Traceback" not in err
    if "Invalid value" not in err:
        assert sum(line.startswith("Error: ") for line in err.splitlines()) == 1
    assert [path for path in sorted(here.iterdir()) if path.name != "__pycache__"] == [
        path for path in before if path.name != "__pycache__"
    ]


@pytest.mark.slow
def test_in_a_process_of_its_own_json_is_the_only_line_on_stdout(here: Path) -> None:
    command = [
        *(str(Path(sys.executable).with_name("slimfront")), "compact", "own_networks:load"),
        *("--prune", "channels=0.5", "--data", "data.yaml", "--output", "small.onnx", "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["format"] == "onnx"
    assert "Traceback" not in done.stderr
    assert "are normalised" in done.stderr
