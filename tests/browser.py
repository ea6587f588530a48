"""Debian's Chromium on the page and the MLflow UI, for the tests and the pictures in docs/.

What it waits for is text, never time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserType, Locator, Page, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")  # as root, and without a screen
PATIENCE = 60_000  # milliseconds: a busy machine is slow, and a failure is rare

expect.set_options(timeout=PATIENCE)


@contextmanager
def chromium(*flags: str) -> Iterator[Browser]:
    with sync_playwright() as playwright, launch(playwright.chromium, *flags) as browser:
        yield browser


def launch(kind: BrowserType, *flags: str) -> Browser:
    return kind.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])


@contextmanager
def opened(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """A page of the MLflow UI in a window of its own, without the assistant that stands open at a first visit."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.get_by_role("button", name="Close", exact=True).click()
    try:
        yield page
    finally:
        context.close()


def expand(page: Page, run_id: str) -> None:
    """Unfold a study in the list of runs, so that those nested under it are shown."""
    study = page.locator(f'a[href$="/runs/{run_id}"]')
    page.get_by_role("gridcell").filter(has=study).get_by_role("button").click()
    expect(page.get_by_role("link", name="trial-").first).to_be_visible()


def plot(page: Page, metric: str, parameters: Sequence[str] = ()) -> Locator:
    """The parallel coordinates of the compare view; by itself, MLflow takes the parameters and the metric that come first."""
    shown = page.get_by_role("tabpanel", name="Parallel Coordinates Plot")
    if parameters:
        choose(page, shown.get_by_role("combobox").first, parameters)
    choose(page, shown.get_by_role("combobox").last, [metric])
    axes = shown.locator(".axis-title")
    expect(axes.last).to_have_text(metric)
    return axes


def choose(page: Page, box: Locator, names: Sequence[str]) -> None:
    """Mark these options of a list, and no other."""
    box.click()
    chosen = page.locator(".du-bois-light-select-item-option-selected:visible")
    for name in chosen.all_inner_texts():
        if name not in names:
            pick(page, name)
    for name in names:
        if name not in chosen.all_inner_texts():
            box.fill(name)  # a long list shows only a part of itself
            pick(page, name)
            box.fill("")
    box.press("Escape")
    box.blur()


def pick(page: Page, option: str) -> None:
    """Mark an option of the list that is open, or take its mark away."""
    page.locator(".du-bois-light-select-item-option:visible").get_by_text(option, exact=True).click()


def read(page: Page, photograph: Path) -> None:
    """Choose a photograph on the page, and wait for its digit."""
    page.locator("#file").set_input_files(photograph)
    expect(page.get_by_role("status")).to_contain_text("The hand")
    expect(page.locator("#digit")).to_be_visible()
