"""The page of the recorder in Chromium, with a filmed camera."""

import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from PIL import Image

from signdigits import cli
from signdigits.config import SourceParameters
from signdigits.data.dataset import scan_dataset

from .conftest import write_photographs
from .endpoint import Endpoint, recording, short_of_space

pytest.importorskip("playwright", reason="needs the extra .[browser]")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from . import browser
from .browser import beside, film, visit, wait_for_the_camera

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not browser.CHROMIUM.exists(), reason="needs Chromium"),
]

GESTURES = {"fist": "0", "open hand": "1", "ok": "2"}  # and the generated photographs that the camera sees of each


@dataclass(frozen=True)
class Recorded:
    """A folder that was recorded in Chromium, and the command that the page shows in the end."""

    folder: Path
    command: str


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("record-page")
    write_photographs(folder / "seen", each=4)
    with recording(folder / "gestures", folder / "record.log") as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(endpoint: Endpoint) -> Path:
    return endpoint.log.parent / "gestures"


@pytest.fixture(scope="module")
def window(endpoint: Endpoint) -> Iterator[Browser]:
    """A Chromium whose camera sees the first gesture."""
    with browser.chromium(*film_gesture(endpoint, "fist")) as opened:
        yield opened


def film_gesture(endpoint: Endpoint, name: str) -> tuple[str, str]:
    """Chromium's flags for a camera that sees photographs of a gesture, each for half a second."""
    photographs = sorted((endpoint.log.parent / "seen" / GESTURES[name]).iterdir())
    return film(endpoint.log.parent, *(beside(Image.open(path)) for path in photographs), seconds=0.5)


@pytest.fixture(scope="module")
def recorded(endpoint: Endpoint, folder: Path, window: Browser) -> Recorded:
    """Three gestures that were recorded from nothing, each in a Chromium whose camera sees it."""

    def record(camera: Browser, name: str, frames: int) -> str:
        with visit(camera, endpoint.url) as page:
            open_camera(page, name)
            hold(page, name, frames)
            return page.get_by_role("region", name="Train").inner_text()

    record(window, "fist", 20)
    for name in ("open hand", "ok"):
        with browser.launch(window.browser_type, *film_gesture(endpoint, name)) as camera:
            command = record(camera, name, 6)
    return Recorded(folder, command)


def test_gestures_become_a_served_model(champion: str, recorded: Recorded, tmp_path: Path) -> None:
    """From the recorded folder, with the options that the page shows, in the store of the champion."""
    options = shlex.split(recorded.command.replace("\\\n", " ").partition("-e main")[2])
    shown = dict(option.split("=", 1) for option in options if "=" in option)
    assert (shown["start_from"], shown["model_name"]) == ("models:/sign-digits@champion", "gestures")
    shutil.copytree(recorded.folder, tmp_path / "gestures")
    shown["data"] = str(tmp_path / "gestures")
    given = [text for name, value in shown.items() for text in (f"--{name}", value)]
    assert cli.main(["main", *given, "--n_trials", "1"]) == 0
    served = mlflow.pyfunc.load_model("models:/gestures@champion")
    photographs = sorted((tmp_path / "gestures").rglob("*.jpeg"))
    reply = served.predict(pd.DataFrame({"image": [path.read_bytes() for path in photographs]}))
    assert (reply["label"] == [path.parent.name for path in photographs]).mean() > 0.8


@pytest.fixture
def page(window: Browser, endpoint: Endpoint, recorded: Recorded) -> Iterator[Page]:
    with visit(window, endpoint.url, viewport={"width": 1280, "height": 800}) as opened:
        yield opened


def open_camera(page: Page, name: str) -> None:
    """Name a class and open the camera, by the keyboard alone."""
    page.keyboard.press("Tab")
    expect(page.get_by_label("Class")).to_be_focused()
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Open the camera")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Hold to record")).to_be_focused()
    wait_for_the_camera(page)


def hold(page: Page, name: str, frames: int) -> None:
    """Hold the button until there are so many photographs of the class, and release it."""
    page.get_by_role("button", name="Hold to record").hover()
    page.mouse.down()
    browser.wait_until(lambda: int(count(page, name) or 0) >= frames)
    page.mouse.up()
    # The frame of the moment may still arrive.
    browser.wait_until(
        lambda: page.get_by_role("status").inner_text() == f"{count(page, name)} frames of {name} recorded."
    )


def count(page: Page, name: str) -> str:
    """The number of photographs that the page shows for a class."""
    row = page.get_by_role("row").filter(has=page.get_by_role("button", name=name, exact=True))
    return row.locator("td").inner_text() if row.count() else ""


def frames(page: Page) -> list[str]:
    items = page.get_by_role("list").get_by_role("listitem")
    return [item.get_attribute("data-name") or "" for item in items.all()]


def test_gestures_become_photographs(recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # of the cache
    dataset = scan_dataset(SourceParameters(data=str(recorded.folder)))
    counts = dataset.counts()
    assert list(counts) == sorted(GESTURES)
    assert counts["fist"] == 20
    assert all(6 <= counts[name] < 20 for name in ("open hand", "ok"))
    assert {photograph.size for photograph in dataset.photographs} == {(480, 480)}
    assert len({photograph.checksum for photograph in dataset.photographs}) >= 3 * 3, "the camera's picture moves"
    assert recorded.command == (
        f"mlflow run . -e main --env-manager local -P data={recorded.folder} -P model_name=gestures "
        "-P start_from=models:/sign-digits@champion"
    )


def test_held_key_records_and_release_ends(page: Page, recorded: Recorded) -> None:
    before = int(count(page, "ok"))
    open_camera(page, "ok")
    page.keyboard.down("Space")
    browser.wait_until(lambda: int(count(page, "ok")) >= before + 2)
    page.keyboard.down("Space")  # repeats, as a key that is held does
    page.keyboard.up("Space")
    expect(page.get_by_role("status")).to_contain_text("frames of ok recorded.")
    after = int(count(page, "ok"))
    assert after == len(list((recorded.folder / "ok").iterdir())) < before + 20
    page.get_by_role("button", name="Close the camera").click()
    assert page.evaluate("document.querySelector('video').srcObject") is None, "the camera is off"


def test_click_deletes_a_frame(page: Page, recorded: Recorded) -> None:
    page.get_by_role("button", name="fist", exact=True).click()
    expect(page.get_by_role("heading", name="The last frames of fist")).to_be_visible()
    newest, second, *_ = before = frames(page)
    assert before == sorted((path.name for path in (recorded.folder / "fist").iterdir()), reverse=True)
    page.get_by_role("listitem").first.get_by_role("button").click()
    expect(page.get_by_role("status")).to_have_text("1 frame deleted.")
    assert frames(page) == before[1:]
    assert count(page, "fist") == str(len(before) - 1)
    assert not (recorded.folder / "fist" / newest).exists()
    page.keyboard.press("Enter")  # the next one has the focus
    expect(page.get_by_role("listitem")).to_have_count(len(before) - 2)
    assert not (recorded.folder / "fist" / second).exists()


def test_trouble_is_shown_in_words(page: Page, endpoint: Endpoint, recorded: Recorded) -> None:
    alert = page.get_by_role("alert")
    page.get_by_role("button", name="Open the camera").click()
    wait_for_the_camera(page)
    page.get_by_role("button", name="Hold to record").click()
    expect(alert).to_have_text("Name the class first.")
    expect(page.get_by_label("Class")).to_be_focused()
    page.keyboard.type("../elsewhere")
    page.get_by_role("button", name="Hold to record").click()
    expect(alert).to_contain_text("'../elsewhere' cannot be a class")
    page.get_by_label("Class").fill("full")
    with short_of_space(endpoint):
        page.get_by_role("button", name="Hold to record").click()
        expect(alert).to_contain_text("File too large. Free some space, or make the folder writable")
    page.route("**/photographs?*", lambda route: route.abort("connectionrefused"))
    page.get_by_role("button", name="Hold to record").click()
    expect(alert).to_have_text("The recorder does not answer. Start scripts/record again.")
    expect(page.get_by_role("status")).to_have_text("0 frames of full recorded.")
    assert not (recorded.folder / "full").exists()


def test_missing_camera_is_reported(window: Browser, endpoint: Endpoint) -> None:
    with visit(window, endpoint.url, camera=False) as page:
        page.get_by_role("button", name="Open the camera").click()
        expect(page.get_by_role("alert")).to_contain_text("The camera was refused.")


def test_page_fits_and_axe_finds_no_violation(page: Page) -> None:
    for is_open in (False, True):
        if is_open:
            open_camera(page, "fist")
            expect(page.get_by_role("button", name="Hold to record")).to_be_in_viewport(ratio=1)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for width, height in ((390, 844), (1280, 800)):
                page.set_viewport_size({"width": width, "height": height})
                assert page.evaluate("document.documentElement.scrollWidth") <= width, (is_open, width)
                found = Axe().run(page)
                assert found.violations_count == 0, (is_open, scheme, width, found.generate_report())
            color = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, color.strip("rgb()").split(","))) < 150) == (scheme == "dark")
