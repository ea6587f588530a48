"""Take the pictures in docs/ of the running MLflow UI and server.

scripts/ui                             # in one terminal
scripts/serve                          # in another
scripts/screenshots PHOTOGRAPH         # in a third
"""

import argparse
from pathlib import Path

from playwright.sync_api import Browser, expect

from signdigits import links
from signdigits.config import LinkParameters
from signdigits.tracking import store

from . import browser

DOCS = Path(__file__).parents[1] / "docs"
PLOTTED = ("initial_learning_rate", "decay_rate", "epochs")


def main() -> None:
    parser = argparse.ArgumentParser(prog="screenshots", description=__doc__.splitlines()[0])
    parser.add_argument("photograph", type=Path, help="what the page is shown reading")
    parser.add_argument("--ui_port", type=int, default=5000, help="where scripts/ui listens (default: %(default)s)")
    parser.add_argument("--url", default="http://127.0.0.1:5001", help="where the page is (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=DOCS, help="where the pictures go (default: docs)")
    given = parser.parse_args()
    store.connect_store()
    runs_url, study, trials, _ = (
        line.rpartition(" ")[2] for line in links.list_links(LinkParameters(port=given.ui_port))
    )
    with browser.chromium() as chromium:
        show_runs(chromium, runs_url, study.partition("/runs/")[2].partition("?")[0], given.folder / "runs.png")
        show_trials(chromium, trials, given.folder / "compare.png")
        show_page(chromium, given.url, given.photograph, given.folder / "page.png")


def show_runs(chromium: Browser, address: str, study: str, picture: Path) -> None:
    """The latest study with what is nested under it."""
    with browser.opened(chromium, address, viewport={"width": 1400, "height": 900}) as page:
        browser.expand(page, study)
        page.screenshot(path=picture)


def show_trials(chromium: Browser, address: str, picture: Path) -> None:
    """The parallel coordinates of its trials."""
    with browser.opened(chromium, address, viewport={"width": 1280, "height": 640}) as page:
        browser.plot(page, "val_accuracy", PLOTTED)
        page.screenshot(path=picture)


def show_page(chromium: Browser, address: str, photograph: Path, picture: Path) -> None:
    """A reading, and the parts of the photograph that it depends on."""
    page = chromium.new_page(viewport={"width": 1280, "height": 1120})
    page.goto(address)
    browser.read(page, photograph)
    page.keyboard.press("e")
    expect(page.locator("#overlay")).to_be_visible()
    page.screenshot(path=picture)


if __name__ == "__main__":
    main()
