"""Debian's Chromium on the page and the MLflow UI, for the tests and the pictures in docs/.

What it waits for is text, never time.
"""

import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from playwright.sync_api import Browser, BrowserType, Locator, Page, expect, sync_playwright

from .conftest import wait_until

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
    page.locator("main").wait_for()  # shown when the page is ready
    page.locator("#file").set_input_files(photograph)
    expect(page.get_by_role("status")).to_contain_text("The hand")
    expect(page.locator("#digit")).to_be_visible()


def film(folder: Path, *scenes: Image.Image, seconds: float = 3) -> tuple[str, str]:
    """Chromium's flags for a camera that sees the scenes in turn, each for some seconds.

    Chromium takes a film's levels, 0 to 255, for those of video, 16 to 235.
    """
    frames = round(30 * seconds)
    content = b"".join(jpeg(scene.point(lambda level: 16 + level * 219 / 255)) * frames for scene in scenes)
    path = folder / f"camera-{zlib.crc32(content)}.mjpeg"
    path.write_bytes(content)
    return "--use-fake-device-for-media-stream", f"--use-file-for-fake-video-capture={path}"


@contextmanager
def visit(window: Browser, url: str, camera: bool = True, **options: Any) -> Iterator[Page]:
    """The page in a window of its own; afterwards, nothing may stand in its console, and no other host was asked."""
    context = window.new_context(**options)
    if camera:
        context.grant_permissions(["camera"], origin=url)
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: complaints.append(f"{message.location}: {message.text}") if is_complaint(message) else None,
    )
    page.goto(url)
    try:
        yield page
    finally:
        context.close()
    assert not complaints, complaints
    assert {urlsplit(address).netloc for address in asked if not address.startswith("blob:")} == {urlsplit(url).netloc}


def is_complaint(message: Any) -> bool:
    """Chromium notes every refused request in the console; those of photographs belong to the tests."""
    path = urlsplit(message.location["url"]).path
    return message.type in ("error", "warning") and path not in (
        "/invocations",
        "/corrections",
        "/photographs",
        "/folder.json",
    )


def beside(square: Image.Image) -> Image.Image:
    """The square in the middle of a camera's picture, with black on either side."""
    picture = Image.new("RGB", (640, 480))
    picture.paste(square.resize((480, 480)), (80, 0))
    return picture


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def wait_for_the_camera(page: Page) -> None:
    """Wait for some frames: Chromium's first one may be blank. The page's policy allows no wait inside the page."""
    frames = "document.querySelector('video').getVideoPlaybackQuality().totalVideoFrames"
    wait_until(lambda: page.evaluate(frames) >= 3)
