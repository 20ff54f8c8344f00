"""The pages of a finished search in MLflow's UI, in a real Chromium."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import ConsoleMessage, Error, Page, expect, sync_playwright

from slimfront.search.record.front.shown import shown
from slimfront.search.record.ledger import SearchResult
from slimfront.search.record.trials import MeasuredNetwork

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        CHROMIUM is None, reason="there is no Chromium here, and the set-up could not install it"
    ),
]


@dataclass
class Opened:
    """A browser's page at the parent run of a search, and what our own pages complained about."""

    page: Page
    url: str
    result: SearchResult
    complaints: list[str] = field(default_factory=list)

    @property
    def base(self) -> str:
        return self.url.partition("/#")[0]

    def hear(self, message: ConsoleMessage) -> None:
        ours = message.location["url"].startswith(("blob:", "file:"))
        # That one is expected: see the click below.
        if message.type == "error" and ours and "sandboxed" not in message.text:
            self.complaints.append(message.text)

    def fail(self, error: Error) -> None:
        self.complaints.append(str(error))


@pytest.fixture(scope="module")
def opened(finished: tuple[Path, SearchResult]) -> Iterator[Opened]:
    directory, result = finished
    port = 5611
    command = [
        str(Path(sys.executable).with_name("slimfront")),
        "ui",
        result.search,
        "--no-browser",
        f"--port={port}",
    ]
    command.append(f"--tracking-uri=sqlite:///{directory}/slimfront.db")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=CHROMIUM, args=["--no-sandbox"]
                )
                page = browser.new_context(viewport={"width": 1500, "height": 1000}).new_page()
                page.set_default_timeout(30_000)
                shown = Opened(page, url, result)
                page.on("console", shown.hear)
                page.on("pageerror", shown.fail)
                yield shown
                browser.close()
        finally:
            server.terminate()


def smallest_shown(result: SearchResult) -> tuple[int, MeasuredNetwork]:
    """The smallest member that the picture shows at first, and its place along the front."""
    front = sorted(result.front, key=lambda point: point.measures["nonzero_params"])
    inside = [point for point in front if result.ledger.region.holds(point)]
    chosen = (inside or front)[0]
    return front.index(chosen), chosen


def test_the_runs_page_has_one_row_for_a_search(opened: Opened) -> None:
    experiment = opened.url.partition("/experiments/")[2].partition("/")[0]
    opened.page.goto(f"{opened.base}/#/experiments/{experiment}/runs?workflowType=machine_learning")
    opened.page.get_by_role("link", name=opened.result.search).first.wait_for()
    assert opened.page.get_by_role("link", name="trial-", exact=False).count() == 0


def test_the_description_renders_and_its_links_reach_the_trials(opened: Opened) -> None:
    recommended = opened.result.ledger.front.recommended()
    assert recommended is not None
    opened.page.goto(opened.url)
    expect(
        opened.page.get_by_role("heading", name=f"Recommended: {recommended.name}")
    ).to_be_attached()
    opened.page.get_by_text("Show more").first.click()
    table = opened.page.get_by_role("table").filter(has_text="val acc")
    members = shown(opened.result.ledger, opened.result.front).members
    expect(table.get_by_role("row")).to_have_count(2 + len(members))
    with opened.page.context.expect_page() as opens:  # links of a description open a tab
        table.get_by_role("link", name=recommended.name, exact=True).first.click()
    trial = opens.value
    expect(trial).to_have_url(re.compile(f"/runs/{opened.result.run_ids[recommended.trial.label]}"))
    expect(trial.get_by_role("heading", name=recommended.trial.label)).to_be_visible(timeout=30_000)
    trial.close()


def test_front_html_renders_offline_with_its_points_and_a_click_on_one_names_its_run(
    opened: Opened,
) -> None:
    page = opened.page
    page.context.route(
        lambda url: not url.startswith((opened.base, "blob:", "file:")), lambda route: route.abort()
    )
    page.goto(opened.url.replace("?", "/artifacts?"))
    page.get_by_text("front.html", exact=True).first.click()
    frame = page.frame_locator("iframe")
    front = frame.locator("#front .scatterlayer .trace").nth(1).locator("path.point")
    expect(front).to_have_count(len(opened.result.front), timeout=30_000)
    expect(frame.locator("#values .parcoords")).to_be_visible()
    index, smallest = smallest_shown(opened.result)
    place = front.nth(index).bounding_box()
    assert place is not None
    page.mouse.click(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    link = frame.locator("#run a")
    expect(link).to_have_attribute(
        "href",
        f"{opened.base}/#/experiments/1/runs/{opened.result.run_ids[smallest.trial.label]}?workflowType=machine_learning",
    )
    page.context.unroute_all()


def test_a_click_on_a_point_of_the_downloaded_page_opens_the_run(
    opened: Opened, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    store = MlflowClient(opened.base)
    file = Path(store.download_artifacts(opened.result.run_ids[""], "front.html", str(tmp_path)))
    # The UI of this test has its own port.
    file.write_text(file.read_text().replace('"http://127.0.0.1:5000"', f'"{opened.base}"'))
    with opened.page.context.new_page() as page:
        page.on("pageerror", opened.fail)
        page.goto(file.as_uri())
        index, smallest = smallest_shown(opened.result)
        points = page.locator("#front .scatterlayer .trace").nth(1).locator("path.point")
        point = points.nth(index)
        place = point.bounding_box()
        assert place is not None
        with page.context.expect_page() as opens:
            page.mouse.click(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
        run = opens.value
        expect(run.get_by_role("heading", name=smallest.trial.label)).to_be_visible(timeout=30_000)
        run.close()


def test_none_of_our_pages_complained(opened: Opened) -> None:
    assert opened.complaints == []
