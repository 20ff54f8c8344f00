"""No password of a config is printed or recorded, and a search that had one goes on when it is
given again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slimfront.search.cluster.submission import checked
from slimfront.search.config.loading import load
from slimfront.search.config.plain import as_plain, dump, secret_paths
from slimfront.search.config.schema import Config
from slimfront.search.record.events import TrialEnded
from slimfront.search.record.journal import Journal
from slimfront.search.record.session import begin, open_existing
from slimfront.trainables.errors import UserError
from tests.conftest import SMALL_CONFIG

ROOT = Path(__file__).parents[2]
SECRETS = {
    "tracking": {"uri": "http://hunter2@host:5000/x?token=hunter2"},
    "search": {
        "trials": 4,
        "storage": "postgresql://anna@host/optuna?password=hunter2",
        "storage_path": "s3://KEYhunter2:hun/ter2@bucket/searches?region=x",
    },
    "data": {
        "name": "factory",
        "factory": "mine:data",
        "args": {
            "url": "https://me:hunter2@host/x",
            "password": "hunter2",
            "all": ["ftp://a:hunter2@b"],
            "n": 5,
        },
    },
}


def test_a_resolved_config_has_no_secrets_and_its_stores_stay_usable() -> None:
    config = Config.model_validate(SMALL_CONFIG | SECRETS)
    assert "ter2" not in dump(config)
    plain = as_plain(config)
    assert plain["tracking"]["uri"] == "http://host:5000/x"
    assert plain["search"]["storage"] == "postgresql://anna@host/optuna"
    assert plain["search"]["storage_path"] == "s3://bucket/searches?region=x"
    args = {"url": "https://me:***@host/x", "password": "***", "all": ["ftp://a:***@b"], "n": 5}
    assert plain["data"]["args"] == args
    found = [
        "data.args.url",
        "data.args.password",
        "data.args.all",
        "search.storage_path",
        "search.storage",
        "tracking.uri",
    ]
    assert sorted(secret_paths(config)) == sorted(found)


def test_check_prints_no_secret_of_a_file_or_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(SMALL_CONFIG | SECRETS))
    command = [sys.executable, "-m", "slimfront", "check", "--no-build", str(file)]
    environment = {
        "PYTHONPATH": str(ROOT),
        "SLIMFRONT_SET": "tracking.uri=http://me:hunter2@other\n\ntraining.epochs=9\n",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "ter2" not in done.stdout + done.stderr
    printed = yaml.safe_load(done.stdout)
    assert printed["tracking"]["uri"] == "http://me@other"
    assert printed["training"]["epochs"] == 9


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=[http://hunter2@host]",
        "tracking.uri=http://me:hunter2@host: x",
        "tracking.experiment={a: http://hunter2@h}",
        "training.epochs=http://hunter2@host",
        "training.epochs='https://host/x?api_key=hunter2'",
        "training.optimizer=s3://KEY:hunter2@bucket",
        "http://hunter2@host",
        "password=hunter2",
        "search.sampler=http://hunter2@host",
        "search.time=http://hunter2@host",
        "search.start_from=[{x: 'http://hunter2@host'}]",
        "model.name=http://hunter2@host",
    ],
)
def test_a_message_repeats_no_secret(config_file: Path, override: str) -> None:
    with pytest.raises(UserError) as caught:
        load(config_file, [override])
    assert "hunter2" not in str(caught.value)


def test_secrets_may_not_vary(config_file: Path) -> None:
    wanted = ["model={factory: a:b}", "space.model.args.url={choices: ['http://hunter2@host', x]}"]
    with pytest.raises(UserError, match=r"space 'model\.args\.url': varies in secrets") as caught:
        load(config_file, wanted)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UserError, match=r"space 'model\.args\.password': varies in secrets"):
        load(
            config_file,
            ["model={factory: a:b}", "space.model.args.password={choices: [hunter2, hunter3]}"],
        )


def test_a_search_goes_on_when_its_secrets_are_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stores = {"search": SECRETS["search"] | {"storage_path": "runs"}}
    session = begin(Config.model_validate(SMALL_CONFIG | SECRETS | stores), "mine", {}, [])
    session.journal.close()
    assert "ter2" not in Path("runs/mine/journal.jsonl").read_text()

    with pytest.raises(
        UserError,
        match=(
            r"data\.args\.url of mine had a secret, which is not recorded; give it "
            r"again: SLIMFRONT_SET="
        ),
    ):
        open_existing("mine", "runs")
    again = [
        "data.args.url=https://me:hunter2@host/x",
        "data.args.password=hunter2",
        "data.args.all=['ftp://a:hunter2@b']",
    ]
    again += ["tracking.uri=http://hunter2@host:5000/x?token=hunter2"]
    taken = open_existing(
        "mine", "runs", [*again, "search.storage=postgresql://anna@host/optuna?password=hunter2"]
    )
    taken.journal.close()
    assert taken.config.data.model_dump()["args"] == SECRETS["data"]["args"]
    assert taken.config.tracking.uri == SECRETS["tracking"]["uri"]
    assert taken.config.search.storage == SECRETS["search"]["storage"]
    for other in (
        "data.args.url=https://me:hunter2@elsewhere/x",
        "tracking.uri=http://hunter2@elsewhere",
    ):
        with pytest.raises(
            UserError, match=r"only its secret can be given again|stays there"
        ) as caught:
            open_existing("mine", "runs", [*again, other])
        assert "hunter2" not in str(caught.value)


def test_a_reason_is_recorded_without_secrets(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    event = journal.append(
        TrialEnded(
            number=0,
            status="failed",
            reason="OSError: https://me:hunter2@host/x?sig=hunter2 password=hunter2",
        )
    )
    journal.close()
    assert event.reason == "OSError: https://me:***@host/x?sig=*** password=***"
    assert "hunter2" not in (tmp_path / "journal.jsonl").read_text()


def test_a_user_that_was_recorded_is_the_same_store_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begin(
        Config.model_validate(SMALL_CONFIG | {"tracking": {"uri": "http://me:hunter2@host/x"}}),
        "mine",
        {},
        [],
    ).journal.close()
    for again in ([], ["tracking.uri=http://me:other@host/x"], ["tracking.uri=http://host/x"]):
        open_existing("mine", "runs", again).journal.close()


def test_a_job_gets_no_secrets(config_file: Path) -> None:
    for override in (
        "data={factory: a:b, args: {url: 'http://hunter2@h'}}",
        "search.storage_path=s3://KEY:hunter2@bucket/x",
    ):
        overrides = [override, "search.storage=postgresql://anna@h/x"]
        with pytest.raises(
            UserError, match="is given with a password, which everyone who sees"
        ) as caught:
            checked(config_file, overrides)
        assert "hunter2" not in str(caught.value)


FACTORY = """
import torch

def data(url, password):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(300, 1, 8, 8, generator=generator)
    return inputs, torch.randint(0, 10, (300,), generator=generator)
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_no_file_of_a_search_has_what_its_factory_was_given_as_a_secret(tmp_path: Path) -> None:
    given = {"url": "https://me:hunter2@host/x", "password": "hunter2"}
    data = {"name": "factory", "factory": "mine:data", "args": given}
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "mine.py").write_text(FACTORY)
    config = SMALL_CONFIG | {"data": data, "search": {"trials": 3}}
    (tmp_path / "given" / "c.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "slimfront", "search", "given/c.yaml", "--name", "secret"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in files if file.name == "training.pt"]
    found = [file for file in files if b"hunter2" in file.read_bytes()]
    assert found == [tmp_path / "given" / "c.yaml"]
