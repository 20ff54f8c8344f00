"""`slimfront export` on a finished search, as a user types it."""

import sys
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from slimfront.search.cli import main
from slimfront.search.engine.runner import run_search
from slimfront.search.record.ledger import SearchResult
from slimfront.trainables.data import Digits
from slimfront.trainables.shipping import load
from tests.conftest import small_config

Finished = tuple[Path, SearchResult]

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def export(
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # type: ignore[no-untyped-def]
    """Exit code, stdout and stderr of `slimfront export SEARCH …` in an empty directory."""
    directory, result = finished
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, search: str = result.search) -> tuple[int, str, str]:
        storage = ["--storage-path", str(directory / "runs")]
        monkeypatch.setattr(sys, "argv", ["slimfront", "export", search, *storage, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_the_recommended_is_written_with_its_card_beside_it(
    export, finished: Finished, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    _, result = finished
    recommended = result.ledger.front.recommended()
    assert recommended is not None
    code, out, err = export("--output", "recommended.pt2")
    assert (code, err) == (0, "")
    card = Path("recommended.md").read_text()
    assert out.startswith(card)
    assert out.endswith("Written to recommended.pt2; this card is recommended.md.\n")
    assert card.startswith(f"# {recommended.trial.label}@{recommended.epoch}")
    assert (
        f"| the trained network | {recommended.measures['val_accuracy']:.4f} | "
        f"{recommended.tested['test_accuracy']:.4f} |" in card
    )
    dense = result.ledger.dense_network
    assert dense is not None
    assert (
        f"| the dense network | {dense.measures['val_accuracy']:.4f} | "
        f"{dense.tested['test_accuracy']:.4f} |" in card
    )
    assert f"| parameters | {recommended.measures['params']:,.0f} |" in card
    for path, value in recommended.trial.values.items():
        assert f"- `{path}`: {value:.4g}" in card
    data = Digits().load()
    with torch.no_grad():
        right = (
            load(tmp_path / "recommended.pt2")(data.raw(data.validation.inputs)).argmax(1)
            == data.validation.targets
        )
    assert float(right.float().mean()) == pytest.approx(
        recommended.measures["val_accuracy"], abs=1e-6
    )


@pytest.mark.parametrize("kind", ["onnx", "safetensors"])
def test_other_formats_by_suffix_and_other_picks(export, finished: Finished, kind: str) -> None:  # type: ignore[no-untyped-def]
    smallest = min(
        finished[1].front, key=lambda p: (p.measures["nonzero_params"], -p.measures["val_accuracy"])
    )
    code, out, _ = export("--output", f"small.{kind}", "--pick", "smallest")
    assert code == 0
    assert f"| non-zero parameters | {smallest.measures['nonzero_params']:,.0f} |" in out
    assert load(Path(f"small.{kind}"))(Digits().load().test.inputs[:2]).shape == (2, 10)


def test_each_format_of_one_name_has_a_card_of_its_own(export, finished: Finished) -> None:  # type: ignore[no-untyped-def]
    for kind in ("pt2", "safetensors"):
        code, _, err = export("--output", f"small.{kind}")
        assert code == 0, err
    assert "small.pt2" in Path("small.md").read_text()
    assert "small.safetensors" in Path("small.safetensors.md").read_text()


def test_a_trial_by_name_and_int8(export, finished: Finished) -> None:  # type: ignore[no-untyped-def]
    member = finished[1].front[0]
    code, out, _ = export("--output", "network.onnx", "--pick", member.trial.label, "--int8")
    assert code == 0
    assert out.startswith(f"# {member.trial.label}@")
    assert "int8" in out


@pytest.mark.slow
def test_an_int8_network_of_a_search_is_measured_recorded_and_shipped_as_int8(
    tmp_path: Path,
    ray_session: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small_config(
        tmp_path,
        space={"int8": {"choices": [True]}},
        objectives=["val_accuracy", "bytes"],
        one_shot={"steps": 0},
        search={"trials": 1},
    )
    result = run_search(config)
    [point, *_] = result.front
    client = MlflowClient(config.tracking.uri)
    model_id = next(
        value
        for key, value in client.get_run(result.run_ids["trial-000"]).data.tags.items()
        if key == f"slimfront.model/trial-000-epoch-{point.epoch}"
    )
    mlflow.set_tracking_uri(config.tracking.uri)
    data = Digits().load()
    logits = mlflow.pyfunc.load_model(f"models:/{model_id}").predict(
        data.raw(data.test.inputs).numpy()
    )["output"]
    right = torch.tensor(logits).argmax(1) == data.test.targets
    assert float(right.float().mean()) == pytest.approx(point.tested["test_accuracy"], abs=1e-6)
    monkeypatch.chdir(tmp_path)
    for name, code in (("network.pt2", 2), ("network.onnx", 0)):
        monkeypatch.setattr(
            sys,
            "argv",
            ["slimfront", "export", result.search, "--pick", "trial-000", "--output", name],
        )
        with pytest.raises(SystemExit) as ended:
            main()
        assert int(ended.value.code or 0) == code
    assert "was measured as an int8 network, and those ship as onnx" in capsys.readouterr().err
    # Names of nodes differ.
    assert Path("network.onnx").stat().st_size == pytest.approx(point.measures["bytes"], abs=64)
    assert (
        f"| this file | {point.measures['val_accuracy']:.4f} | "
        f"{point.tested['test_accuracy']:.4f} |" in Path("network.md").read_text()
    )


def test_mistakes_get_one_sentence_exit_code_2_and_leave_nothing(export, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    Path("there.pt2").write_text("mine")
    Path("taken.md").write_text("mine")
    Path("taken.pt2.md").write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, expected in [
        (
            ("--output", "x.pt2", "--pick", "trial-999"),
            "--pick trial-999: it is not on the front; choose recommended",
        ),
        (
            ("--output", "x.pt2", "--min-accuracy", "1.5"),
            "no network of the front has validation accuracy 1.5 or larger; the best has",
        ),
        (("--output", "there.pt2"), "there.pt2 is there already; choose another name"),
        (("--output", "taken.pt2"), "taken.pt2.md is there already"),
        (("--output", "nowhere/x.pt2"), "there is no directory nowhere"),
        (("--output", "x.pkl"), "--output x.pkl: it ends in none of .pt2, .onnx, .safetensors"),
        (
            ("--output", "x.pt2", "--format", "onnx"),
            "--output x.pt2: a file of the format onnx ends in .onnx",
        ),
        (("--output", "x.pt2", "--int8"), "int8 networks ship as onnx, and this is to be pt2"),
    ]:
        code, out, err = export(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith(f"Error: {expected}")
        assert err.count("\n") == 1
    code, _, err = export("--output", "x.pt2", search="nonsense")
    assert code == 2
    assert err.startswith("Error: there is no search 'nonsense' in ")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert Path("there.pt2").read_text() == "mine"
