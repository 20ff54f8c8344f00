"""The command as a user types it: what goes to stdout, what to stderr, and the exit codes."""

import json
import re
import signal
import subprocess
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest
import yaml
from sqlalchemy import create_engine, inspect

from slimfront.search.cli import main
from slimfront.search.config.loading import load


def slimfront(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    monkeypatch.setattr(sys, "argv", [str(Path(sys.executable).with_name("slimfront")), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.trials=0", "'search.trials'"),
        ("penalties.layer.strength=-1", "'penalties.layer.strength'"),
        ("training.epoch=1", "did you mean 'epochs'?"),
        (
            "tracking.uri=http://127.0.0.1:9",
            "the tracking store at http://127.0.0.1:9 does not answer",
        ),
        (
            "tracking.uri=http://me:secret@127.0.0.1:9",
            "the tracking store at http://me@127.0.0.1:9 does not answer",
        ),
        ("tracking.uri=nonsense://x", "the tracking store at nonsense://x does not answer"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    expected: str,
) -> None:
    code, out, err = slimfront(capsys, monkeypatch, "search", str(config_file), "--set", override)
    assert code == 2
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert "secret" not in err
    assert "Traceback" not in err
    assert not Path("runs").exists()  # before any trial starts


@pytest.mark.usefixtures("ray_session")
def test_a_gpu_that_is_not_there_gets_one_sentence_and_exit_code_2(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = slimfront(
        *(capsys, monkeypatch, "search", str(config_file)),
        *("--set", "resources.gpu=64", "--set", "search.concurrency=auto"),
    )
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"Error: resources\.gpu: a trial asks for 64 GPU, and there is \d+ here; (set .* or "
        r"less|leave .* out, .*)\n",
        err,
    )


def test_a_missing_file_gets_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = slimfront(capsys, monkeypatch, "search", "nowhere.yaml")
    assert (code, out) == (2, "")
    assert err == "Error: cannot read the config nowhere.yaml: No such file or directory\n"


def test_the_version_is_told_both_ways(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [slimfront(capsys, monkeypatch, way)[:2] for way in ("--version", "version")]
    assert told[0] == told[1] == (0, f"{installed_version('slimfront')}\n")


def test_check_prints_the_resolved_config(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = slimfront(
        capsys, monkeypatch, "check", str(config_file), "--set", "training.epochs=5"
    )
    assert code == 0
    resolved = yaml.safe_load(out)
    assert resolved["training"]["epochs"] == 5
    assert resolved["search"]["sampler"] == "tpe"
    Path("resolved.yaml").write_text(out)
    assert load(Path("resolved.yaml")) == load(config_file, ["training.epochs=5"])


@pytest.mark.parametrize("command", ["check", "search"])
def test_links_in_a_circle_get_one_sentence(
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.symlink_to(other)
    other.symlink_to(one)
    code, out, err = slimfront(capsys, monkeypatch, command, str(one))
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: cannot read the config {one}: ")
    assert err.count("\n") == 1


def test_check_says_layer_by_layer_what_can_shrink_and_what_cannot(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (
        *("--set", "data={factory: 'tests.trainables.tasks.made:sentences'}"),
        *("--set", "model={factory: 'tests.trainables.tasks.made:Reader'}"),
        *("--set", "task={name: sequence, output: logits}"),
    )
    code, out, _ = slimfront(capsys, monkeypatch, "check", str(config_file), "--network", *changes)
    assert code == 0
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert set(rows) == {"embedding", "hidden", "head"}
    assert "channel, whole units go" in rows["embedding"]
    assert "node" in rows["hidden"] and "sparsifiers, whole units go" in rows["hidden"]
    assert "node" not in rows["head"] and "sparsifiers" in rows["head"]
    # 8 · 24 + 24 and 24 · 2 + 2, of 30 · 8 more.
    assert "266 of 506 parameters (52.6%)" in out


IMPOSSIBLE = {
    "data": ({"data": {"name": "factory", "factory": "nowhere:load"}}, "nowhere"),
    "network": (
        {"model": {"name": "factory", "factory": "torch.nn:Linear", "args": {"in_features": 3}}},
        "raised TypeError",
    ),
    "start": ({"search": {"start_from": "no-such-search"}}, "no-such-search"),
    "store": ({"tracking": {"uri": "http://127.0.0.1:1"}}, "does not answer"),
    "file": ({"tracking": {"uri": "sqlite:///nowhere/x.db"}}, "there is no folder"),
}


@pytest.mark.parametrize("part", ["data", "network", "start", "store", "file"])
def test_check_refuses_what_a_search_refuses_later(
    part: str,
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, named = IMPOSSIBLE[part]
    tree = yaml.safe_load(config_file.read_text())
    config_file.write_text(yaml.safe_dump(tree | change))
    answers = {}
    for command in ("check", "search"):
        code, out, answers[command] = slimfront(capsys, monkeypatch, command, str(config_file))
        assert (code, out) == (2, "")
    assert named in answers["check"]
    assert answers["check"] == answers["search"]
    assert slimfront(capsys, monkeypatch, "check", "--no-build", str(config_file))[0] == 0


def test_check_asks_the_database_of_the_study_unless_it_is_told_not_to(
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    postgres: str,
) -> None:
    def check(database: str, *more: str) -> tuple[int, str, str]:
        monkeypatch.setenv("SLIMFRONT_SET", f"search.storage={database}")
        return slimfront(capsys, monkeypatch, "check", str(config_file), *more)

    wrong = postgres.replace("secret", "wrong")
    code, _, err = check(wrong)
    assert code == 2
    assert "search.storage: the database of the study does not answer" in err
    assert "password authentication failed" in err
    assert err.count("\n") == 1
    assert check(wrong, "--no-stores")[0] == 0
    assert check(postgres)[0] == 0
    assert check("sqlite:///nowhere/study.db")[0] == 2
    assert check("sqlite:///study.db")[0] == 0
    assert sorted(path.name for path in Path().iterdir()) == ["slimfront.db", "small.yaml"]
    with create_engine(postgres).connect() as connection:
        assert inspect(connection).get_table_names() == []


def test_ui_without_a_search_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = slimfront(capsys, monkeypatch, "ui", "--no-browser")
    assert code == 2
    assert "run `slimfront search CONFIG` first" in err


@pytest.mark.usefixtures("ray_session")
def test_a_search_prints_its_front_as_a_table_and_the_next_command(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = slimfront(
        capsys, monkeypatch, "search", str(config_file), "--set", "search.trials=2"
    )
    assert code == 0
    assert "dense" in out
    assert "trial-00" in out
    search = re.search(r"slimfront ui (small-\d{8}-\d{6})", out)
    assert search is not None
    assert "2/2 trials, front" in err
    assert Path("slimfront.db").exists()
    assert Path("runs", search[1]).is_dir()


@pytest.mark.usefixtures("ray_session")
def test_exit_code_1_if_all_trials_failed(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = slimfront(
        capsys,
        monkeypatch,
        "search",
        str(config_file),
        "--set",
        "search.trials=2",
        "--set",
        "training.lr=1e30",
        "--json",
    )
    assert code == 1
    assert json.loads(out)["trials"] == {"completed": 0, "stopped": 0, "failed": 2, "repeated": 0}


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_json_in_a_process_of_its_own_is_the_only_line_on_stdout(config_file: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("slimfront")),
        "search",
        str(config_file),
        "--json",
        "--set",
        "search.trials=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["trials"]["completed"] == 2
    # Ray's chatter does not drown ours: all that is on stderr is our progress.
    # Before it stands what is done to the inputs, and, on a busy machine, that Ray is waited for.
    begun = done.stderr.find("The search small")
    lines = [line for line in done.stderr[begun:].splitlines() if line.strip()]
    before = re.sub(r"\s+", " ", done.stderr[:begun])
    said = r"INFO Inputs, float32 \(N, 1, 8, 8\), are normalised .* training split\. "
    assert re.fullmatch(rf"{said}(WARNING Ray has been starting for .*)?", before), done.stderr
    assert re.fullmatch(r"The search small-\d+-\d+ has begun", lines[0]), done.stderr
    assert all(
        re.match(r"\d+/2 trials|Measuring \d+ networks|Writing the rest to MLflow", line)
        for line in lines[1:]
    ), done.stderr


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "twice", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["once", "twice"]
)
def test_ctrl_c_exits_130_with_the_front_so_far_and_a_second_one_at_once(
    config_file: Path, twice: bool
) -> None:
    command = [
        str(Path(sys.executable).with_name("slimfront")),
        "search",
        str(config_file),
        "--json",
    ]
    command += [
        "--set",
        "search.trials=500",
        "--set",
        "training.epochs=4",
        "--set",
        "resources.pack=1",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        seen = ""
        while not re.match(r"[1-9]\d*/500 trials", seen):
            seen = running.stderr.readline()
            assert seen, "the search ended by itself"
        running.send_signal(signal.SIGINT)
        if twice:
            while "Ctrl-C again to quit at once" not in seen:
                seen += running.stderr.readline()
            running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in err
    if twice:
        assert out == ""  # it did not wait for the front
    else:
        result = json.loads(out)
        assert result["trials"]["completed"] >= 1
        assert result["front"]
