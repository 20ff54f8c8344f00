"""Screenshots of a search in MLflow's UI for the docs, taken in Chromium:
`python -m benchmarks.screenshots docs/images`."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from benchmarks.common import chromium
from slimfront.search.config.loading import load
from slimfront.search.engine.runner import run_search

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"


def take(page: Page, url: str, folder: Path) -> None:
    """The runs page, the search's own run with its description, and front.html."""
    base, _, route = url.partition("/#")
    experiment = route.split("/")[2]
    page.goto(f"{base}/#/experiments/{experiment}/runs?workflowType=machine_learning")
    page.get_by_role("link", name="digits").first.wait_for()
    close = page.get_by_role("button", name="Close").last
    if close.count():
        close.click()  # MLflow's assistant
    page.wait_for_timeout(1500)
    page.screenshot(
        path=folder / "mlflow-runs.png", clip={"x": 0, "y": 0, "width": 1400, "height": 420}
    )
    page.goto(url)
    page.get_by_text("Show more").first.click()
    heading = page.get_by_role("heading", name="Recommended")
    heading.scroll_into_view_if_needed()
    heading.evaluate("element => element.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(1500)
    page.screenshot(path=folder / "mlflow-search.png")
    page.goto(url.replace("?", "/artifacts?"))
    page.get_by_text("front.html", exact=True).first.click()
    page.frame_locator("iframe").locator("#front .scatterlayer").wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=folder / "mlflow-front.png")


def main() -> None:
    """Runs the main job, serves its store, and takes the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screenshots", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as directory:
        uri = f"sqlite:///{directory}/slimfront.db"
        run_search(
            load(CONFIG, [f"search.storage_path={directory}/runs", f"tracking.uri={uri}"]),
            name="digits-example",
        )
        command = [
            str(Path(sys.executable).with_name("slimfront")),
            "ui",
            "--no-browser",
            "--port=5622",
            f"--tracking-uri={uri}",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                url = server.stdout.readline().strip()
                with sync_playwright() as playwright:
                    browser = playwright.chromium.launch(
                        executable_path=chromium(), args=["--no-sandbox"]
                    )
                    take(
                        browser.new_context(viewport={"width": 1400, "height": 900}).new_page(),
                        url,
                        folder,
                    )
                    browser.close()
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
