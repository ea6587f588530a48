"""Drives Debian's Chromium through the page and the MLflow UI: for the tests, and for the pictures in docs/.

What it waits for is text, never time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def read(page: Page, photograph: Path) -> Locator:
    """Choose a photograph on the page, and wait for its digit."""
    page.locator("#file").set_input_files(photograph)
    digit = page.locator("#digit")
    expect(digit).not_to_be_empty()
    expect(page.get_by_role("status")).to_contain_text("The hand signs")
    return digit
