"""A search has one name, however it is typed."""

from pathlib import Path

import pytest

from slimfront.search.config.names import check_name, is_name
from slimfront.search.config.schema import Config
from slimfront.search.engine.runner import sync_search
from slimfront.search.record.locate import locate, name_in_store
from slimfront.search.record.session import begin, open_existing, read_search
from slimfront.search.tracking.store import connect
from slimfront.trainables.errors import UserError
from tests.search.test_cli import slimfront


@pytest.fixture
def begun(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The storage path of a search called `mine`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    begin(config, "mine", {}, []).journal.close()
    (tmp_path / "runs" / "link").symlink_to("mine")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path / "runs"


WAYS = [
    "mine",
    "mine/",
    "mine//",
    "runs/mine",
    "runs/mine/",
    "./runs/mine",
    "runs/../runs/mine",
    "../runs/mine",
    "link",
    "runs/link/",
]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_search_leads_to_its_name(begun: Path, way: str) -> None:
    assert locate(way, "runs") == ("mine", str(begun))
    session = open_existing(way, "runs")
    session.journal.close()
    assert (session.folder.search, session.directory) == ("mine", begun / "mine")
    assert read_search(str(begun / "mine"), "elsewhere")[0] == session.config


@pytest.mark.parametrize(
    "nonsense",
    [
        "",
        ".",
        "..",
        "runs",
        "../mine/..",
        "nothing/at/all",
        "a b",
        "loop",
        "mine\x00",
        "x" * 5_000,
        "-",
    ],
)
def test_what_leads_to_no_search_is_refused(begun: Path, nonsense: str) -> None:
    with pytest.raises(
        UserError,
        match=r"is neither the name of a search nor the path of its directory|there is no search",
    ):
        open_existing(nonsense, "runs")
    assert sorted(path.name for path in begun.iterdir()) == ["link", "mine"]


def test_a_bare_name_is_looked_for_in_the_storage_path_alone(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(begun)
    assert locate("mine", "runs") == ("mine", "runs")
    assert locate("./mine", "runs") == ("mine", str(begun))
    assert locate(".", "mine") == ("mine", str(begun))


def test_in_a_bucket_there_are_only_names() -> None:
    assert locate("mine/", "s3://b/x") == ("mine", "s3://b/x")
    with pytest.raises(UserError, match="neither the name"):
        locate("../mine", "s3://b/x")


def test_a_store_is_asked_by_name(begun: Path) -> None:
    assert [name_in_store(way) for way in ("mine", "mine/", "runs/mine/", "other")] == [
        "mine",
        "mine",
        "mine",
        "other",
    ]
    with pytest.raises(UserError, match="neither the name"):
        name_in_store("runs/../other")


def test_names_fit_a_directory() -> None:
    assert [name for name in ("a", "A-1_b.c", "x" * 100) if not is_name(name)] == []
    assert [
        name for name in ("", ".", "..", "a/b", "a b", "-a", "x" * 101, "a\n") if is_name(name)
    ] == []
    with pytest.raises(UserError, match="--name: 'a/b' cannot name a directory"):
        check_name("a/b")


def test_a_search_has_one_run_in_mlflow_however_it_was_typed(begun: Path, config: Config) -> None:
    for way in ("mine", "mine/", "runs/../runs/mine", "runs/link"):
        sync_search(way)
    client = connect(config.tracking.absolute_uri())
    runs = client.search_runs(
        [e.experiment_id for e in client.search_experiments()], "tags.`slimfront.role` = 'search'"
    )
    assert [run.data.tags["slimfront.search"] for run in runs] == ["mine"]


@pytest.mark.parametrize(
    "command", ["resume", "sync", "front", "register --name m", "export --output x.onnx"]
)
def test_commands_refuse_what_leads_to_no_search(
    begun: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    word, *options = command.split()
    code, out, err = slimfront(capsys, monkeypatch, word, "../mine", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "neither the name of a search nor the path of its directory" in err
    assert not [path for path in begun.iterdir() if path.name not in ("link", "mine")]
