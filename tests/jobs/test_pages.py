"""The jobs of docs/tasks.md, as they stand there: a search of each, and what it exports."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimfront.search.cli import main
from slimfront.trainables.shipping import load
from tests.conftest import empty_store

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Job:
    """What a user types."""

    config: str
    code: str

    @property
    def lines(self) -> list[str]:
        return [line for line in f"{self.config}{self.code}".splitlines() if line.strip()]


def own_job() -> Job:
    """The task, metric, measure and penalty of docs/python.md."""
    section = (PAGE.parent / "python.md").read_text().partition("of your own\n")[2]
    blocks = dict(re.findall(r"```(yaml|python)\n(.*?)```", section, re.DOTALL))
    return Job(blocks["yaml"], blocks["python"])


def jobs() -> dict[str, Job]:
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        blocks = dict(re.findall(r"```(yaml|python)\n(.*?)```", section, re.DOTALL))
        if blocks.get("yaml", "").startswith("name: "):
            name = yaml.safe_load(blocks["yaml"])["name"]
            found[name] = Job(blocks["yaml"], blocks.get("python", ""))
    return found


JOBS = jobs()


@pytest.fixture
def command(
    users_code: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """What a command prints, which must not fail."""
    monkeypatch.syspath_prepend(users_code)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["slimfront", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        return out

    return run


@pytest.fixture
def job(request: pytest.FixtureRequest, users_code: Path) -> Iterator[tuple[str, Job]]:
    """A job, with its Python where the processes of Ray find it."""
    name: str = request.param
    made = own_job() if name == "upper" else JOBS[name]
    (users_code / f"{name}.py").write_text(made.code)
    yield name, made
    sys.modules.pop(name, None)


def within(value: float, dense: float, described: dict[str, Any]) -> bool:
    """Whether a quality is at most 2 % worse: absolute where it is in [0, 1], else relative."""
    worse = dense - value if described["better"] == "larger" else value - dense
    return worse <= (0.02 if described["scale"] == "share" else 0.02 * abs(dense))


def test_the_page_has_the_six_jobs() -> None:
    assert list(JOBS) == ["diabetes", "tumours", "topics", "ink", "odd", "wine"]


OFTEN = ("wine",)
"""The other jobs take half a minute to a minute each."""


def often(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_takes_at_most_twenty_lines(name: str) -> None:
    assert len(JOBS[name].lines) <= 20
    assert max(map(len, JOBS[name].lines)) <= 100


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("job", often(JOBS), indirect=True)
def test_the_front_has_a_small_network_as_good_as_the_dense_one_which_is_exported(
    job: tuple[str, Job],
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    name, what = job
    monkeypatch.chdir(tmp_path)
    Path(f"{name}.yaml").write_text(what.config)
    Path("slimfront.db").write_bytes(empty_store())
    report = json.loads(command("search", f"{name}.yaml", "--json").splitlines()[-1])
    assert report["trials"]["failed"] == 0
    quality, dense = report["quality"], report["dense"]
    described = report["described"][quality]
    good = [m for m in report["front"] if within(m[quality], dense[quality], described)]
    smallest = min(good, key=lambda m: m["nonzero_params"], default=None)
    assert smallest is not None, (dense[quality], [m[quality] for m in report["front"]])
    share = smallest["nonzero_params"] / dense["nonzero_params"]
    seen = {"dense": dense[quality], "small": smallest[quality], "share": share}
    assert share <= 0.3, seen
    small = [m[quality] for m in good if m["nonzero_params"] <= 0.3 * dense["nonzero_params"]]
    seen["best"] = max(small) if described["better"] == "larger" else min(small)
    record_property(name, seen | {"seconds": report["wall_seconds"]})

    bound = ["--min-quality", repr(smallest[quality])]
    card = command("export", report["search"], "--output", "net.pt2", "--pick", "smallest", *bound)
    assert f"| non-zero parameters | {smallest['nonzero_params']:,.0f} |" in card
    assert callable(load(tmp_path / "net.pt2"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("job", ["upper"], indirect=True)
def test_a_task_a_metric_a_measure_and_a_penalty_of_the_users_go_through_a_search(
    job: tuple[str, Job], command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("upper.yaml").write_text(job[1].config)
    Path("slimfront.db").write_bytes(empty_store())
    report = json.loads(command("search", "upper.yaml", "--json").splitlines()[-1])
    assert report["trials"] == {"completed": 2, "stopped": 0, "failed": 0, "repeated": 0}
    assert report["objectives"] == ["val_missed", "nonzero_params", "onnx_kb"]
    assert report["described"]["val_missed"]["better"] == "smaller"
    assert all(0 <= member["val_missed"] <= 1 for member in report["front"])
    assert all(1 < member["onnx_kb"] < report["dense"]["onnx_kb"] for member in report["front"])
