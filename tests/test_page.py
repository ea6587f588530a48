"""The page in Chromium, with a model trained for a few epochs."""

import base64
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlflow
import numpy as np
import pytest
from PIL import Image

from signdigits.config import MODEL_NAME, SERVED_MODEL
from signdigits.data import loading
from signdigits.serving.pages import PAGE
from signdigits.tracking import registry

from .conftest import store_like, wait_until
from .endpoint import Endpoint, serving_endpoint

pytest.importorskip("playwright", reason="needs the extra .[browser]")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, FilePayload, Locator, Page, Request, Route, expect

from . import browser
from .browser import beside, film, jpeg, png, visit, wait_for_the_camera

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not browser.CHROMIUM.exists(), reason="needs Chromium"),
]

TOKEN = "a-token-of-the-tests"
LIVE_SIDE = 256  # of page.js


@dataclass(frozen=True)
class Made:
    """A champion with examples in a store, and the photographs it was trained on."""

    folder: Path
    store: str
    photographs: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, loaded: loading.Data, champion_store: Path) -> Iterator[Made]:
    from signdigits.packaging import examples, package  # they import TensorFlow

    folder = tmp_path_factory.mktemp("page")
    with store_like(champion_store, folder) as store:
        network, calibration = package.read_model(registry.find_model("", SERVED_MODEL))
        with mlflow.start_run():
            chosen = examples.choose_examples(network, calibration, loaded)
            info = package.log_model(network, calibration, loaded, {}, chosen)
            version = mlflow.register_model(info.model_uri, MODEL_NAME, tags={"test_accuracy": "0.95"}).version
        mlflow.MlflowClient().set_registered_model_alias(MODEL_NAME, "champion", version)
        yield Made(folder, store, loaded.dataset.folder)


@contextmanager
def front(made: Made, *options: str) -> Iterator[Endpoint]:
    log = made.folder / "serve.log"
    with serving_endpoint(
        log, "--drain_timeout", "1", *options, cwd=made.folder, MLFLOW_TRACKING_URI=made.store
    ) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def plain(made: Made) -> Iterator[Endpoint]:
    with front(made) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(plain: Endpoint) -> str:
    return plain.url


@pytest.fixture(scope="module")
def window(made: Made) -> Iterator[Browser]:
    """A Chromium whose camera sees a photograph of class 1."""
    with browser.chromium(*film(made.folder, in_camera(made, "1"))) as opened:
        yield opened


def in_camera(made: Made, label: str) -> Image.Image:
    """A photograph in the middle of a camera's picture, which is wider than high."""
    return beside(Image.open(made.photographs / label / "IMG_0003.JPG"))


def stripes() -> Image.Image:
    """A picture that resembles no photograph of the tests."""
    rows = np.arange(480)[:, np.newaxis, np.newaxis] // 24 % 2
    return Image.fromarray((255 * np.broadcast_to(rows, (480, 480, 3))).astype(np.uint8))


@pytest.fixture
def page(window: Browser, url: str) -> Iterator[Page]:
    with visit(window, url) as opened:
        yield opened


def expect_answer(page: Page, label: str) -> None:
    """The reading of a photograph, everything that belongs to it, and nothing else."""
    expect(page.get_by_role("status")).to_contain_text(f"The hand signs {label}, with a probability of")
    expect(page.locator("#digit")).to_have_text(label)
    rows = page.get_by_role("table", name="Probability of each digit").locator("tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.locator("th")).to_have_text(["0", "1", "2"])
    expect(rows.filter(has_text="%")).to_have_count(3)
    expect(page.locator("tr.best th")).to_have_text(label)
    expect(
        page.get_by_text("Answered by version 2 of the model, which reads 95.0 % of its test photographs.")
    ).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def expect_trouble(page: Page, words: str) -> None:
    expect(page.get_by_role("alert")).to_contain_text(words)
    expect(page.get_by_role("status")).to_have_text("Not read.")
    expect(page.get_by_role("table")).to_be_hidden()


def choose(page: Page, file: Path | FilePayload) -> None:
    page.locator("main").wait_for()  # shown when the page is ready
    page.locator("#file").set_input_files(file)


def send_again(page: Page) -> None:
    """Press the button for as long as the page offers it."""
    again = page.get_by_role("button", name="Send it again")
    while again.is_visible():
        again.click()
        expect(page.get_by_role("status")).not_to_have_text("Reading …")


def file(name: str, content: bytes, kind: str = "image/jpeg") -> FilePayload:
    return FilePayload(name=name, mimeType=kind, buffer=content)


def bring_in(page: Page, content: bytes | None, *events: str) -> None:
    """Drop or paste a file, or for None a piece of text, somewhere on the page."""
    data = page.evaluate_handle(
        """content => {
            const data = new DataTransfer();
            if (content === null) data.setData("text/plain", "a word");
            else data.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], "hand.jpg", {type: "image/jpeg"}));
            return data;
        }""",
        None if content is None else base64.b64encode(content).decode(),
    )
    page.locator("main").wait_for()
    for event in events:
        page.evaluate(
            """([event, data]) => {
                const type = event === "paste" ? ClipboardEvent : DragEvent;
                document.body.dispatchEvent(new type(event, {clipboardData: data, dataTransfer: data, bubbles: true, cancelable: true}));
            }""",
            [event, data],
        )


DROP = ("dragenter", "dragover", "drop")


def sent(page: Page, act: Callable[[], None]) -> Image.Image:
    """The photograph that is sent to the model after `act`, but for those of the live reading."""
    with page.expect_request(
        lambda request: is_question(request) and photograph_in(request).width != LIVE_SIDE
    ) as request:
        act()
    return photograph_in(request.value)


def is_question(request: Request) -> bool:
    return request.url.endswith("/invocations")


def photograph_in(request: Request) -> Image.Image:
    (record,) = json.loads(request.post_data or "")["dataframe_records"]
    return Image.open(io.BytesIO(base64.b64decode(record["image"])))


def test_no_correction_is_offered_by_default(page: Page, made: Made, url: str) -> None:
    choose(page, made.photographs / "2" / "IMG_0000.JPG")
    expect_answer(page, "2")
    expect(page.get_by_role("heading", name="Correction")).to_be_hidden()
    assert page.request.post(f"{url}/corrections", data={"image": "", "label": "1"}).status in (404, 405)


def test_chosen_photograph_is_read(page: Page, made: Made) -> None:
    expect(page.get_by_role("status")).to_have_text("No photograph yet.")
    choose(page, made.photographs / "2" / "IMG_0000.JPG")
    expect_answer(page, "2")
    expect(page.get_by_alt_text("The photograph that is read")).to_be_visible()
    choose(page, made.photographs / "0" / "IMG_0000.JPG")
    expect_answer(page, "0")


def test_bars_show_probabilities(page: Page, made: Made) -> None:
    with page.expect_response("**/invocations") as response:
        choose(page, made.photographs / "2" / "IMG_0000.JPG")
    expect_answer(page, "2")
    (answer,) = response.value.json()["predictions"]
    shares = page.eval_on_selector_all(
        ".bar", "bars => bars.map(bar => bar.getBoundingClientRect().width / bar.parentElement.clientWidth)"
    )
    assert shares == pytest.approx(list(answer["probabilities"].values()), abs=0.01)


def test_small_photograph_is_sent_unchanged(page: Page, made: Made) -> None:
    path = made.photographs / "1" / "IMG_0002.JPG"
    with page.expect_request("**/invocations") as request:
        choose(page, path)
    (record,) = json.loads(request.value.post_data or "")["dataframe_records"]
    assert base64.b64decode(record["image"]) == path.read_bytes()
    expect_answer(page, "1")


def test_large_photograph_is_sent_smaller(page: Page, made: Made) -> None:
    """Held on its side: the bar of class 0, on top, is stored at the left with the EXIF orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(made.photographs / "0" / "IMG_0001.JPG").resize((3000, 4000))
    stored = jpeg(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    picture = sent(page, lambda: choose(page, file("telephone.jpg", stored)))
    assert picture.size == (768, 1024)
    assert 1 not in picture.getexif().values()
    expect_answer(page, "0")


def test_supported_format_is_sent_unchanged(page: Page, made: Made) -> None:
    buffer = io.BytesIO()
    Image.open(made.photographs / "2" / "IMG_0004.JPG").resize((96, 96)).save(buffer, "WEBP", quality=95)
    picture = sent(page, lambda: choose(page, file("hand.webp", buffer.getvalue(), "image/webp")))
    assert (picture.format, picture.size) == ("WEBP", (96, 96))
    expect_answer(page, "2")


def test_other_format_is_sent_as_jpeg(page: Page, made: Made) -> None:
    buffer = io.BytesIO()
    Image.open(made.photographs / "2" / "IMG_0004.JPG").resize((96, 96)).save(buffer, "ICO", sizes=[(96, 96)])
    picture = sent(page, lambda: choose(page, file("hand.ico", buffer.getvalue(), "image/x-icon")))
    assert (picture.format, picture.size) == ("JPEG", (96, 96))
    expect_answer(page, "2")


def test_dropped_or_pasted_photograph_is_read(page: Page, made: Made) -> None:
    bring_in(page, (made.photographs / "1" / "IMG_0005.JPG").read_bytes(), *DROP)
    expect_answer(page, "1")
    bring_in(page, (made.photographs / "0" / "IMG_0005.JPG").read_bytes(), "paste")
    expect_answer(page, "0")


def test_dropped_text_is_reported(page: Page) -> None:
    bring_in(page, None, *DROP)
    expect_trouble(page, "That was no file.")


def open_camera(page: Page) -> None:
    page.get_by_role("button", name="Use the camera").click()
    expect(page.get_by_label("Live view of the camera")).to_be_visible()


def test_camera_sends_the_framed_square(page: Page) -> None:
    open_camera(page)
    wait_for_the_camera(page)
    picture = sent(page, page.get_by_role("button", name="Take the picture").click)
    assert picture.size == (480, 480)
    expect_answer(page, "1")
    expect(page.get_by_label("Live view of the camera")).to_be_hidden()
    assert page.evaluate("document.querySelector('video').srcObject") is None, "the camera is off"


def test_camera_is_read_live(window: Browser, made: Made, url: str) -> None:
    flags = film(made.folder, in_camera(made, "1"), beside(stripes()), in_camera(made, "2"))
    with browser.launch(window.browser_type, *flags) as changing, visit(changing, url) as page:
        open_camera(page)
        for _ in range(2):
            expect(page.get_by_role("status")).to_have_text("The hand signs 1.")
            expect(page.locator("#digit")).to_have_text("1")
            expect(page.get_by_role("status")).to_have_text("No hand recognised.")
            expect(page.locator("#digit")).to_be_hidden()
            expect(page.get_by_role("table")).to_be_hidden()
            expect(page.get_by_role("status")).to_have_text("The hand signs 2.")
        page.get_by_role("button", name="Close the camera").click()
        expect(page.get_by_role("status")).to_have_text("No photograph yet.")


def test_live_reading_asks_one_question_at_a_time(page: Page) -> None:
    under_way, counts = [], []

    def count(route: Route) -> None:
        under_way.append(route)
        counts.append(len(under_way))
        route.fulfill(response=route.fetch())
        under_way.remove(route)

    page.route("**/invocations", count)
    open_camera(page)
    wait_until(lambda: page.evaluate("1") and len(counts) >= 6)
    page.unroute_all(behavior="wait")
    assert set(counts) == {1}


def test_live_reading_survives_refusals(page: Page) -> None:
    page.route("**/invocations", lambda route: route.fulfill(status=429, body="{}"))
    open_camera(page)
    expect_trouble(page, "Too many photographs in a short time.")
    expect(page.get_by_role("button", name="Send it again")).to_be_hidden()
    page.unroute("**/invocations")
    expect(page.get_by_role("status")).to_have_text("The hand signs 1.")


def test_live_reading_asks_for_the_token(page: Page) -> None:
    page.route("**/invocations", lambda route: route.fulfill(status=401, body="{}"))
    open_camera(page)
    expect_trouble(page, "This server answers only those who know its token.")
    expect(page.get_by_label("Live view of the camera")).to_be_hidden()
    page.unroute("**/invocations")
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    expect_answer(page, "1")


def test_only_the_preview_is_mirrored(page: Page, made: Made) -> None:
    open_camera(page)
    expect(page.get_by_label("Live view of the camera")).to_have_css("transform", "matrix(-1, 0, 0, 1, 0, 0)")
    wait_for_the_camera(page)
    picture = np.asarray(sent(page, page.get_by_role("button", name="Take the picture").click), float)
    seen = np.asarray(in_camera(made, "1").crop((80, 0, 560, 480)), float)
    assert np.abs(picture - seen).mean() < 10 < np.abs(picture - seen[:, ::-1]).mean()


def test_no_hand_is_recognised(page: Page) -> None:
    choose(page, file("stripes.jpg", jpeg(stripes())))
    expect(page.get_by_role("status")).to_have_text("No hand recognised.")
    expect(page.locator("#digit")).to_be_hidden()
    expect(page.get_by_role("table")).to_be_hidden()
    expect(page.get_by_text("It reads best")).to_be_visible()


def test_other_classes_have_neutral_words(page: Page, made: Made) -> None:
    """The same answers, of a model that calls its classes otherwise."""

    def rename(route: Route) -> None:
        renamed = {'"0"': '"fist"', '"1"': '"palm"', '"2"': '"peace"', '"reads_hands":true': '"reads_hands":false'}
        reply = route.fetch()
        body = reply.text()
        for name, other in renamed.items():
            body = body.replace(name, other)
        route.fulfill(response=reply, body=body)

    expect(page.get_by_role("heading", level=1)).to_have_text("Sign digits")
    page.route("**/settings.json", rename)
    page.route("**/invocations", rename)
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("Photograph reader")
    choose(page, made.photographs / "2" / "IMG_0000.JPG")
    expect(page.get_by_role("status")).to_contain_text("This is: peace, with a probability of")
    expect(page.get_by_role("table", name="Probability of each class").locator("tbody th")).to_have_text(
        ["fist", "palm", "peace"]
    )
    choose(page, file("stripes.jpg", jpeg(stripes())))
    expect(page.get_by_role("status")).to_have_text("Not recognised.")
    assert not re.search("hand|digit", page.locator("main").inner_text())


def sign(page: Page, label: str) -> Locator:
    """The button of the class's example."""
    return page.get_by_role("list", name="The signs").get_by_role("button", name=label, exact=True)


def test_example_is_read_at_once(page: Page) -> None:
    for label in ("1", "0", "2"):
        sign(page, label).click()
        expect_answer(page, label)
        expect(page.get_by_alt_text("The photograph that is read")).to_be_visible()


SCREENS = ((390, 844), (1280, 800), (844, 390))


@pytest.mark.parametrize(("width", "height"), SCREENS)
def test_first_screen_shows_signs_and_buttons(window: Browser, url: str, width: int, height: int) -> None:
    with visit(window, url, viewport={"width": width, "height": height}) as page:
        expect(page.get_by_text("Show a hand that signs a digit")).to_be_in_viewport(ratio=1)
        for label in "012":
            expect(sign(page, label)).to_be_in_viewport(ratio=1)
        for name in ("Use the camera", "Choose a file", "Practise"):
            expect(page.get_by_role("button", name=name)).to_be_in_viewport(ratio=1)
        expect(page.locator("#frame")).to_be_hidden()
        open_camera(page)
        expect(page.locator("#digit")).to_have_text("1")
        expect(page.get_by_role("button", name="Take the picture")).to_be_in_viewport(ratio=1)
        expect(page.get_by_label("Live view of the camera")).to_be_in_viewport(ratio=0.9)
        expect(page.locator("#digit")).to_be_in_viewport(ratio=0.9)


def test_exercise_asks_for_ten_signs(page: Page) -> None:
    """The camera shows a 1; the page asks for another class until it asks for that."""
    asked = page.locator("#asked")
    page.get_by_role("button", name="Practise").click()
    page.evaluate(
        """() => {
            window.seen = [];
            const asked = document.querySelector("#asked");
            new MutationObserver(() => window.seen.push(asked.textContent)).observe(asked, {childList: true});
        }"""
    )
    expect(page.get_by_text("1 of 10")).to_be_visible()

    def is_done() -> bool:
        if asked.inner_text() in ("Sign a 0", "Sign a 2"):
            page.get_by_role("button", name="Show how").click()
            expect(page.locator("#hint")).to_be_visible()
            page.get_by_role("button", name="Another one").click()
        return page.get_by_text("All ten are right. Well done.").is_visible()

    wait_until(is_done)
    assert page.evaluate("window.seen").count("Right: 1") == 10
    expect(page.get_by_label("Live view of the camera")).to_be_hidden()
    expect(page.get_by_role("button", name="Practise")).to_be_focused()
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_exercise_can_be_ended(page: Page) -> None:
    page.get_by_role("button", name="Practise").click()
    page.get_by_role("button", name="End", exact=True).click()
    expect(page.get_by_role("status")).to_have_text("No photograph yet.")
    expect(page.get_by_role("button", name="Practise")).to_be_focused()


def test_nothing_moves_while_reading_live(window: Browser, made: Made, url: str) -> None:
    """The cumulative layout shift while hands and other pictures come and go before the camera."""
    flags = film(made.folder, in_camera(made, "1"), beside(stripes()), in_camera(made, "2"))
    with (
        browser.launch(window.browser_type, *flags) as changing,
        visit(changing, url, viewport={"width": 390, "height": 844}) as page,
    ):
        open_camera(page)
        page.evaluate(
            """() => {
                window.shift = 0;
                const add = list => list.getEntries().forEach(entry => (window.shift += entry.value));
                new PerformanceObserver(add).observe({type: "layout-shift"});
            }"""
        )
        for words in ("The hand signs 1.", "No hand recognised.", "The hand signs 2."):
            expect(page.get_by_role("status")).to_have_text(words)
        assert page.evaluate("window.shift") <= 0.02


def test_shown_programs_ask_the_server(page: Page, made: Made, tmp_path: Path) -> None:
    page.get_by_text("Ask from a program").click()
    (tmp_path / "hand.jpg").write_bytes((made.photographs / "2" / "IMG_0000.JPG").read_bytes())
    for line in (
        ["bash", "-c", page.locator("#curl").inner_text()],
        [sys.executable, "-c", page.locator("#python").inner_text()],
    ):
        shown = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert re.search("['\"]label['\"]: ?['\"]2['\"]", shown.stdout), shown.stderr


def test_page_is_light() -> None:
    """What a visitor's browser fetches, compressed, without the examples."""
    assert sum(len(gzip.compress(path.read_bytes())) for path in PAGE.iterdir()) < 40_000


def test_explanation_lies_over_the_photograph(page: Page, made: Made) -> None:
    overlay = page.get_by_role("img", name="The parts that the reading depends on")
    key = page.get_by_text("The redder a part, the more the reading depends on it.")
    button = page.get_by_role("button", name="what it looks at")
    expect(button).to_be_hidden()
    choose(page, made.photographs / "2" / "IMG_0000.JPG")
    expect_answer(page, "2")
    expect(overlay).to_be_hidden()
    with page.expect_response("**/invocations") as response:
        page.keyboard.press("e")
    expect(overlay).to_be_visible()
    expect(key).to_be_visible()
    expect(button).to_have_text("Hide what it looks at")
    assert overlay.bounding_box() == page.get_by_alt_text("The photograph that is read").bounding_box()
    (answer,) = response.value.json()["predictions"]
    opacity = page.evaluate(
        """() => {
            const canvas = document.querySelector("#overlay");
            return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
        }"""
    )[3::4]
    cells = np.array(answer["explanation"]).ravel()
    np.testing.assert_allclose(opacity, 170 * np.clip(cells / cells.max(), 0, None), atol=1)
    button.click()
    expect(overlay).to_be_hidden()
    expect(key).to_be_hidden()
    expect(button).to_have_text("Show what it looks at")
    page.keyboard.press("e")
    expect(overlay).to_be_visible()
    choose(page, made.photographs / "0" / "IMG_0000.JPG")
    expect_answer(page, "0")
    expect(overlay).to_be_hidden()


def test_model_without_explanations_says_so(page: Page, made: Made) -> None:
    def forget(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        route.continue_(post_data=json.dumps({"dataframe_records": body["dataframe_records"]}))

    choose(page, made.photographs / "2" / "IMG_0000.JPG")
    expect_answer(page, "2")
    page.route("**/invocations", forget)
    page.get_by_role("button", name="Show what it looks at").click()
    expect_trouble(page, "This version of the model cannot show what it looks at.")


def test_camera_can_be_closed(page: Page) -> None:
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Close the camera").click()
    expect(page.get_by_role("status")).to_have_text("No photograph yet.")
    expect(page.get_by_role("button", name="Use the camera")).to_be_focused()


def test_refused_camera_is_reported(window: Browser, url: str) -> None:
    with visit(window, url, camera=False) as page:
        page.get_by_role("button", name="Use the camera").click()
        expect_trouble(page, "The camera was refused.")


def test_missing_camera_is_reported(window: Browser, url: str) -> None:
    flag = "--use-fake-device-for-media-stream=device-count=0"
    with browser.launch(window.browser_type, flag) as blind, visit(blind, url) as page:
        page.get_by_role("button", name="Use the camera").click()
        expect_trouble(page, "No camera was found.")


def test_invalid_file_shows_model_error(page: Page, made: Made) -> None:
    choose(page, file("notes.txt", b"no photograph", "text/plain"))
    expect_trouble(page, "The photograph cannot be read: not an image.")
    expect(page.get_by_role("button", name="Send it again")).to_be_hidden()
    choose(page, made.photographs / "2" / "IMG_0000.JPG")
    expect_answer(page, "2")


def test_limits_are_reported(window: Browser, made: Made) -> None:
    with front(made, "--max_body_mb", "1") as opened, visit(window, opened.url) as page:
        choose(page, file("noise.jpg", os.urandom(2_000_000)))
        expect_trouble(page, "The photograph is too large for this server.")
        page.route("**/invocations", lambda route: route.fulfill(status=429, body="{}"))  # nginx in front
        choose(page, made.photographs / "1" / "IMG_0000.JPG")
        expect_trouble(page, "Too many photographs in a short time.")
        page.unroute("**/invocations")
        send_again(page)
        expect_answer(page, "1")


def test_token_is_kept_for_the_tab(window: Browser, made: Made) -> None:
    kept = made.folder / "token"
    kept.write_text(TOKEN)
    with front(made, "--token_file", str(kept)) as opened, visit(window, opened.url) as page:
        expect(page.get_by_label("Token")).to_be_hidden()
        choose(page, made.photographs / "2" / "IMG_0000.JPG")
        expect_trouble(page, "This server answers only those who know its token.")
        expect(page.get_by_label("Token")).to_be_focused()
        page.keyboard.type("a guess")
        page.keyboard.press("Enter")
        expect_trouble(page, "The server does not know this token.")
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        expect_answer(page, "2")
        expect(page.get_by_label("Token")).to_be_hidden()
        page.reload()
        choose(page, made.photographs / "0" / "IMG_0000.JPG")
        expect_answer(page, "0")


@pytest.fixture(scope="module")
def correctable(made: Made) -> Iterator[Endpoint]:
    """A server that keeps corrections, a few."""
    options = ("--corrections", str(made.folder / "corrections"), "--corrections_mb", "1")
    with front(made, *options) as opened:
        yield opened


def correct(page: Page, label: str) -> None:
    page.get_by_label("Is the reading wrong?").select_option(label)
    page.get_by_role("button", name="Send the correction").click()


def test_correction_is_kept(window: Browser, correctable: Endpoint, made: Made) -> None:
    with visit(window, correctable.url) as page:
        choose(page, made.photographs / "0" / "IMG_0000.JPG")
        expect_answer(page, "0")
        page.get_by_role("button", name="Send the correction").click()
        expect(page.get_by_label("Is the reading wrong?")).to_be_focused()  # nothing is preselected: the browser asks
        assert Axe().run(page).violations_count == 0
        correct(page, "1")
        expect(page.get_by_text("Kept. Thank you.")).to_be_visible()
        expect_answer(page, "0")
        choose(page, file("stripes.jpg", jpeg(stripes())))
        expect(page.get_by_role("status").filter(has_text="No hand recognised.")).to_be_visible()
        correct(page, "no hand, or no sign")
        expect(page.get_by_text("Kept. Thank you.")).to_be_visible()
    pending = made.folder / "corrections" / "pending"
    (correction,) = pending.glob("1/*.jpeg")
    assert correction.read_bytes() == (made.photographs / "0" / "IMG_0000.JPG").read_bytes()
    facts = json.loads(correction.with_suffix(".json").read_text())
    assert (facts["label"], facts["prediction"], facts["version"]) == ("1", "0", "2")
    (no_sign,) = pending.glob("not-a-sign/*.jpeg")
    assert no_sign.read_bytes() == jpeg(stripes())


def test_correction_without_room_is_reported(window: Browser, correctable: Endpoint, made: Made) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    with visit(window, correctable.url) as page:
        choose(page, file("noise.png", png(Image.fromarray(noise)), "image/png"))
        correct(page, "2")
        expect(page.get_by_role("alert")).to_contain_text("The server has no room for more corrections")
        expect(page.get_by_role("table").or_(page.get_by_text("No hand recognised."))).to_be_visible()


def test_correction_is_sent_again(window: Browser, correctable: Endpoint, made: Made) -> None:
    """The folder is a file for a moment, which no account can write a photograph into."""
    folder, aside = made.folder / "corrections", made.folder / "aside"
    folder.mkdir(exist_ok=True)
    with visit(window, correctable.url) as page:
        choose(page, made.photographs / "1" / "IMG_0001.JPG")
        expect_answer(page, "1")
        folder.rename(aside)
        folder.touch()
        correct(page, "0")
        expect(page.get_by_role("alert")).to_contain_text("The server could not keep the correction.")
        expect(page.locator("#digit")).to_have_text("1")
        folder.unlink()
        aside.rename(folder)
        page.get_by_role("button", name="Send the correction").click()
        expect(page.get_by_text("Kept. Thank you.")).to_be_visible()
    assert len(list(folder.glob("pending/0/*.jpeg"))) == 1


def test_unreachable_server_is_reported(page: Page, made: Made) -> None:
    page.route("**/invocations", lambda route: route.abort("connectionrefused"))
    choose(page, made.photographs / "2" / "IMG_0000.JPG")
    expect_trouble(page, "The server does not answer.")
    page.unroute("**/invocations")
    send_again(page)
    expect_answer(page, "2")


def test_page_survives_model_restart(page: Page, plain: Endpoint, made: Made) -> None:
    page.wait_for_load_state("networkidle")
    (process,) = plain.workers()
    os.kill(process, signal.SIGSTOP)
    page.clock.install()
    with page.expect_request("**/invocations"):
        choose(page, made.photographs / "2" / "IMG_0000.JPG")
    expect(page.get_by_role("status")).to_have_text("Reading …")
    page.clock.fast_forward(30_000)
    expect_trouble(page, "No answer within 30 seconds.")
    os.kill(process, signal.SIGKILL)

    def is_answered() -> bool:
        if (again := page.get_by_role("button", name="Send it again")).is_visible():
            again.click()
        page.wait_for_timeout(500)
        return page.locator("#digit").inner_text() == "2"

    wait_until(is_answered)


def test_last_photograph_wins(page: Page, made: Made) -> None:
    for label in ("0", "1", "2", "1", "0", "2"):
        choose(page, made.photographs / label / "IMG_0006.JPG")
    expect_answer(page, "2")


def test_keyboard_is_enough(page: Page, made: Made) -> None:
    expect(sign(page, "0")).to_be_visible()
    with page.expect_file_chooser() as chooser:  # from the start: Playwright does not wait until it is set up
        page.keyboard.press("Tab")
        expect(sign(page, "0")).to_be_focused()
        page.keyboard.press("Enter")
        expect_answer(page, "0")
        for _ in range(4):
            page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Choose a file")).to_be_focused()
        page.keyboard.press("Enter")
    chooser.value.set_files(made.photographs / "2" / "IMG_0007.JPG")
    expect_answer(page, "2")
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="Use the camera")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Take the picture")).to_be_focused()
    wait_for_the_camera(page)
    page.keyboard.press("Enter")
    expect_answer(page, "1")
    expect(page.get_by_role("button", name="Use the camera")).to_be_focused()


def test_focus_is_visible(page: Page) -> None:
    expect(sign(page, "0")).to_be_visible()
    for _ in range(2):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        expect(focused).to_have_css("outline-style", "solid")
        expect(focused).to_have_css("outline-width", "3px")


STATES = ("first", "answer", "no hand", "trouble", "camera", "exercise")
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def bring(page: Page, state: str, made: Made) -> None:
    """Lead the page to one of its states."""
    if state == "answer":
        choose(page, made.photographs / "2" / "IMG_0000.JPG")
        expect_answer(page, "2")
        page.keyboard.press("e")
        expect(page.get_by_text("The redder a part")).to_be_visible()
    elif state == "no hand":
        choose(page, file("stripes.jpg", jpeg(stripes())))
        expect(page.get_by_text("No hand recognised.")).to_be_visible()
    elif state == "trouble":
        choose(page, file("notes.txt", b"no photograph", "text/plain"))
        expect_trouble(page, "not an image")
    elif state == "camera":
        page.get_by_role("button", name="Use the camera").click()
        expect(page.get_by_role("button", name="Take the picture")).to_be_visible()
        page.get_by_text("Ask from a program").click()
    elif state == "exercise":
        page.get_by_role("button", name="Close the camera").click()
        page.get_by_role("button", name="Practise").click()
        expect(page.get_by_text("1 of 10")).to_be_visible()
        page.get_by_role("button", name="Show how").click()


def test_page_fits_window(page: Page, made: Made) -> None:
    for state in STATES:
        bring(page, state, made)
        for width in (360, 390, 768, 844, 1280):
            page.set_viewport_size({"width": width, "height": 740})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (state, width)


def test_result_scrolls_into_view(window: Browser, url: str, made: Made) -> None:
    with visit(window, url, viewport={"width": 360, "height": 640}) as page:
        choose(page, made.photographs / "2" / "IMG_0000.JPG")
        expect(page.locator("#digit")).to_be_in_viewport(ratio=1)


def test_dark_mode(page: Page) -> None:
    lightness = {}
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness[scheme] = sum(int(part) for part in color.strip("rgb()").split(","))
    assert lightness["dark"] < 150 < 600 < lightness["light"]


def test_axe_finds_no_violation(window: Browser, url: str, made: Made) -> None:
    with visit(window, url, viewport={"width": 360, "height": 740}) as page:
        for state in STATES:
            bring(page, state, made)
            for scheme in SCHEMES:
                page.emulate_media(color_scheme=scheme)
                found = Axe().run(page)
                assert found.violations_count == 0, (state, scheme, found.generate_report())
