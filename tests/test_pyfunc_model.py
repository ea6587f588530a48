"""The served model, behind one server for the whole file."""

import base64
import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import mlflow
import mlflow.cli
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModelContext
from PIL import Image

from signdigits import startup
from signdigits.config import MODEL_NAME
from signdigits.data import images, loading
from signdigits.model import outliers
from signdigits.packaging import prediction_log, pyfunc_model
from signdigits.packaging.pyfunc_model import SignDigits, softmax, to_bytes
from signdigits.packaging.reply import FIELDS
from signdigits.serving.version import Invocation
from signdigits.tracking import registry

from .conftest import serving, store_like
from .test_prediction_log import KEYS, lines

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Served:
    """A model in a store, and the address that answers for it."""

    model_uri: str
    store: str
    url: str
    loaded: loading.Data
    log: Path  # the prediction log

    def photographs(self, *paths: str) -> list[str]:
        """Files of the data set as base64 text."""
        return [base64.b64encode((self.loaded.dataset.folder / path).read_bytes()).decode() for path in paths]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, loaded: loading.Data, champion_store: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with store_like(champion_store, folder) as store, ExitStack() as servers:
        model_uri = f"models:/{MODEL_NAME}@{registry.CHAMPION}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(prediction_log.FOLDER, str(folder / "log"))
            patch.setenv(prediction_log.VERSION, "1")
            url = servers.enter_context(serving(model_uri, folder / "server.log"))
        yield Served(model_uri, store, url, loaded, folder / "log")


def post(url: str, body: Any) -> tuple[int, Any]:
    """Status and JSON reply of a request to the endpoint."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/invocations", content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def records(*images: Any) -> dict[str, Any]:
    return {"dataframe_records": [{"image": image} for image in images]}


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_reply_has_label_and_probabilities(served: Served) -> None:
    status, reply = post(served.url, records(*served.photographs("0/IMG_0000.JPG", "2/IMG_0001.JPG")))
    assert status == 200
    first, second = reply["predictions"]
    assert (first["label"], second["label"]) == ("0", "2")
    for row in (first, second):
        assert list(row) == ["label", "probability", "probabilities", "outlier_score", "is_outlier"]
        assert row["is_outlier"] == (row["outlier_score"] > 1)
        assert list(row["probabilities"]) == ["0", "1", "2"]
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["probability"] == max(row["probabilities"].values()) == row["probabilities"][row["label"]]


def test_picture_of_something_else_is_outlier(served: Served) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    others = [text(encode(Image.fromarray(pixels), "PNG")) for pixels in (noise, np.full_like(noise, (200, 30, 30)))]
    status, reply = post(served.url, records(*served.photographs("0/IMG_0000.JPG", "1/IMG_0001.JPG"), *others))
    assert status == 200
    assert [row["is_outlier"] for row in reply["predictions"]] == [False, False, True, True]


def test_explanation_points_at_what_decides(served: Served) -> None:
    """Class 2 is a bright bar in the lower third of its photographs."""
    status, reply = post(served.url, records(*served.photographs("2/IMG_0001.JPG")) | {"params": {"explain": True}})
    assert status == 200
    lost = np.array(reply["predictions"][0]["explanation"])
    assert lost.shape == (10, 10)
    assert lost[7:].sum() > lost[:7].sum()
    plain = post(served.url, records(*served.photographs("2/IMG_0001.JPG")) | {"params": {"explain": False}})[1]
    assert "explanation" not in plain["predictions"][0]


@pytest.mark.parametrize(
    ("rows", "params", "reason"),
    [
        (17, {"explain": True}, "17 rows are more than the 16 allowed with explain=true"),
        (1, {"explain": "perhaps"}, "explain"),
    ],
)
def test_bad_explain_is_400(served: Served, rows: int, params: dict[str, Any], reason: str) -> None:
    status, reply = post(served.url, records(*served.photographs("2/IMG_0001.JPG") * rows) | {"params": params})
    assert status == 400
    assert reason in reply["message"]


def test_dataframe_forms_are_equivalent(served: Served) -> None:
    images = served.photographs("0/IMG_0000.JPG", "1/IMG_0001.JPG")
    split = {"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}}
    assert post(served.url, split) == post(served.url, records(*images))


def test_all_interfaces_agree(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", served.store)
    mlflow.set_tracking_uri(served.store)
    images = served.photographs("0/IMG_0002.JPG", "1/IMG_0002.JPG", "2/IMG_0002.JPG")
    loaded = mlflow.pyfunc.load_model(served.model_uri).predict(pd.DataFrame({"image": images})).to_dict("records")

    (tmp_path / "in.json").write_text(json.dumps(records(*images)))
    line = ["models", "predict", "-m", served.model_uri, "--env-manager", "local"]
    line += ["-i", str(tmp_path / "in.json"), "-o", str(tmp_path / "out.json")]
    done = CliRunner().invoke(mlflow.cli.cli, line)
    assert done.exit_code == 0, done.output
    predicted = json.loads((tmp_path / "out.json").read_text())["predictions"]

    _, answered = post(served.url, records(*images))
    assert predicted == answered["predictions"] == loaded


def test_served_preprocessing_matches_training(served: Served) -> None:
    """The probabilities of the endpoint are those of the Keras network on the arrays of the training reader."""
    mlflow.set_tracking_uri(served.store)
    files = Path(mlflow.artifacts.download_artifacts(served.model_uri))
    network = keras.saving.load_model(files / "artifacts" / "network.keras", compile=False)
    temperature = json.loads((files / "artifacts" / "settings.json").read_text())["temperature"]
    dataset, indices = served.loaded.dataset, served.loaded.split.training[:20]
    direct = keras.ops.softmax(network(served.loaded.training.x[:20]) / temperature)
    images = served.photographs(*[dataset.photographs[i].path for i in indices])
    _, reply = post(served.url, records(*images))
    answered = [list(row["probabilities"].values()) for row in reply["predictions"]]
    np.testing.assert_allclose(answered, direct, rtol=1e-4, atol=1e-6)


def test_any_size_and_mode_predicts_alike(served: Served) -> None:
    with Image.open(served.loaded.dataset.folder / "2" / "IMG_0003.JPG") as photograph:
        photograph.load()
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = [
        encode(photograph, "PNG"),
        encode(photograph.resize((480, 480)), "JPEG"),
        encode(photograph.convert("RGBA"), "PNG"),
        encode(photograph.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif),
    ]
    status, reply = post(served.url, records(*map(text, forms)))
    assert status == 200
    assert [row["label"] for row in reply["predictions"]] == ["2"] * 4
    assert reply["predictions"][0] == reply["predictions"][2] == reply["predictions"][3]


def test_thousand_photographs_keep_order(served: Served) -> None:
    images = served.photographs("0/IMG_0000.JPG", "1/IMG_0000.JPG", "2/IMG_0000.JPG", "1/IMG_0001.JPG") * 250
    status, reply = post(served.url, records(*images))
    assert status == 200
    assert [row["label"] for row in reply["predictions"]] == ["0", "1", "2", "1"] * 250


GOOD = text(encode(Image.new("RGB", (20, 20)), "PNG"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (records("not base64!"), "row 0: not base64"),
        (records(GOOD, "not base64!"), "row 1: not base64"),
        (records(GOOD, text(b"five fingers"), "?"), "row 1: not an image; row 2: not base64"),
        (records(""), "row 0: empty"),
        (records(None), "row 0: not base64 text of a photograph but NoneType"),
        (records(5), "row 0: not base64 text of a photograph but int"),
        (records({"a": 1}), "row 0: not base64 text of a photograph but dict"),
        (records(text(encode(Image.new("RGB", (99, 99), "red"), "JPEG")[:-100])), "row 0: truncated or damaged"),
        (records(text(encode(Image.new("RGB", (9, 9)), "PPM"))), "row 0: format PPM is not one of AVIF, BMP, GIF"),
        (records(*[GOOD] * 1001), "1001 rows are more than the 1000 allowed"),
        ({"dataframe_records": []}, "Model is missing inputs ['image']"),
        ({"dataframe_split": {"columns": ["image"], "data": []}}, "no rows: send one photograph or more"),
        ({"dataframe_records": [{"photo": GOOD}]}, "Model is missing inputs ['image']"),
        ({"pictures": []}, "dataframe_records"),
        (b'{"dataframe_records": [{"image"', "Ensure that input is a valid JSON"),
    ],
)
def test_bad_request_is_400_with_row(served: Served, body: Any, reason: str) -> None:
    assert_refused(served, body, reason)


def assert_refused(served: Served, body: Any, reason: str) -> None:
    status, reply = post(served.url, body)
    assert status == 400
    assert reason in reply["message"]
    assert "Traceback" not in json.dumps(reply)
    assert "stack_trace" not in reply


def blank(width: int, height: int) -> str:
    return text(encode(Image.new("1", (width, height)), "PNG"))


def noise() -> str:
    """A picture of 41.1 MB: PNG does not compress noise."""
    return text(encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (3700, 3700, 3), np.uint8)), "PNG"))


@pytest.mark.parametrize(
    ("make_images", "reason"),
    [
        (lambda: [blank(11_000, 11_000)], "row 0: 11000x11000 pixels are more than"),
        (lambda: [blank(20_000, 20_000)], "row 0: not a readable image"),
        (
            lambda: [GOOD, *[blank(10_000, 9_000)] * 3],
            "270,000,400 pixels in 4 rows are more than the 240,000,000 allowed",
        ),
        (lambda: [noise()], "row 0: more than the 40,000,000 bytes allowed"),
    ],
)
def test_large_image_is_400(served: Served, make_images: Callable[[], list[str]], reason: str) -> None:
    """The images are made here, and not in each process that collects the tests: that takes three seconds."""
    assert_refused(served, records(*make_images()), reason)


def test_endpoint_logs_every_prediction(served: Served) -> None:
    (image,) = served.photographs("2/IMG_0000.JPG")
    before = len(lines(served.log))
    status, reply = post(served.url, records(image, image))
    assert status == 200
    assert post(served.url, records(image, "not base64!"))[0] == 400
    first, second = lines(served.log)[before:]
    assert set(first) == KEYS
    assert (first["version"], first["width"], first["height"]) == ("1", 24, 24)
    answered = reply["predictions"][0]["probabilities"]
    assert first["probabilities"] == {name: round(share, 6) for name, share in answered.items()}
    assert (first["row"], second["row"]) == (0, 1)
    assert {**first, "time": "", "row": 0} == {**second, "time": "", "row": 0}
    assert all(image[:40] not in file.read_text() for file in served.log.iterdir())


def test_model_pins_its_requirements(served: Served) -> None:
    mlflow.set_tracking_uri(served.store)
    model = mlflow.models.get_model_info(served.model_uri)
    folder = Path(mlflow.artifacts.download_artifacts(served.model_uri))
    pins = dict(line.split("==") for line in (folder / "requirements.txt").read_text().split())
    assert set(pins) == {
        "mlflow", "ai-edge-litert", "numpy", "pandas", "pillow", "pillow-heif", "uvloop", "httptools", "threadpoolctl"
    }  # fmt: skip
    assert model.signature.inputs.input_names() == ["image"]
    assert model.signature.outputs.input_names() == [field.name for field in FIELDS]
    assert model.signature.outputs.optional_input_names() == ["explanation"]
    assert not list(folder.rglob("*.pkl")), "nothing is pickled"
    example = json.loads((folder / "serving_input_example.json").read_text())
    assert post(served.url, example)[0] == 200


def test_bytes_are_accepted(served: Served) -> None:
    mlflow.set_tracking_uri(served.store)
    model = mlflow.pyfunc.load_model(served.model_uri)
    content = (served.loaded.dataset.folder / "1" / "IMG_0000.JPG").read_bytes()
    as_bytes = model.predict(pd.DataFrame({"image": [content]}))
    as_text = model.predict(pd.DataFrame({"image": [text(content)]}))
    pd.testing.assert_frame_equal(as_bytes, as_text)
    with pytest.raises(MlflowException, match="row 0: not an image"):
        model.predict(pd.DataFrame({"image": [b"five fingers"]}))


def test_client_prints_a_table(served: Served, tmp_path: Path) -> None:
    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "signdigits.serving.client", *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=60)

    folder = served.loaded.dataset.folder
    good = ask(str(folder / "0" / "IMG_0000.JPG"), str(folder / "1" / "IMG_0000.JPG"), "--url", served.url)
    assert good.returncode == 0
    assert [line.split()[1] for line in good.stdout.splitlines()] == ["label", "0", "1"]

    bad = tmp_path / "notes.txt"
    bad.write_text("five fingers")
    refused = ask(str(bad), "--url", served.url)
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith(f"rejected the request: {bad}: not an image")
    missing = ask(str(tmp_path / "missing.jpg"), "--url", served.url)
    assert missing.returncode == 2
    assert "missing.jpg: No such file or directory" in missing.stderr
    nobody = ask(str(bad), "--url", "http://127.0.0.1:9")
    assert nobody.returncode == 2
    assert "does not reply" in nobody.stderr
    assert "start scripts/serve" in nobody.stderr
    nonsense = ask(str(bad), "--url", "localhost")
    assert (nonsense.returncode, "Traceback" in nonsense.stderr) == (2, False)


@pytest.fixture(scope="module")
def pinpoint(tmp_path_factory: pytest.TempPathFactory) -> SignDigits:
    """A loaded model of gray photographs of 20 x 20; each of its three classes has a hundredth of one pixel as logit."""
    folder = tmp_path_factory.mktemp("pinpoint")
    network = keras.Sequential([keras.Input((20, 20, 1)), keras.layers.Flatten(), keras.layers.Dense(5)])
    weights = np.zeros((400, 5), np.float32)
    weights[[20 * row + column for row, column in PINPOINTS], [0, 1, 2]] = 1
    network.set_weights([weights, np.array([0, 0, 0, 1, 0], np.float32)])  # the last two are the features
    with startup.filtered_stderr():
        network.export(folder / "network.tflite", format="litert", verbose=False)
    outliers.Detector(np.array([[0, 1]], np.float32), threshold=2**0.5).save(folder / "detector.npz")
    settings: dict[str, Any] = {
        "class_names": list("abc"),
        "image_size": 20,
        "color_mode": "grayscale",
        "temperature": 0.5,
    }
    settings |= {"logged_fields": ["label"], "handwriting": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    artifacts = {
        "network": str(folder / "network.tflite"),
        "settings": str(folder / "settings.json"),
        "detector": str(folder / "detector.npz"),
        "images": images.__file__,
        "outliers": outliers.__file__,
        "prediction_log": prediction_log.__file__,
    }
    model = SignDigits()
    model.load_context(PythonModelContext(artifacts, {}))
    return model


PINPOINTS = [(0, 0), (5, 12), (19, 19)]


def dotted(*points: tuple[int, int]) -> bytes:
    """A white photograph with black pixels at rows and columns."""
    pixels = np.full((20, 20), 255, np.uint8)
    for point in points:
        pixels[point] = 0
    return encode(Image.fromarray(pixels), "PNG")


def ask(model: SignDigits, *photographs: bytes, **params: Any) -> Any:
    """The rows of the reply to a request in this process."""
    table = pd.DataFrame({"image": list(photographs)})
    return model.predict(None, table, params).to_dict("records")


def test_probabilities_are_a_softmax(pinpoint: SignDigits) -> None:
    """With the temperature 0.5 a logit of 1 counts twice; the photograph without black has none."""
    found = ask(pinpoint, dotted((5, 12)), dotted((0, 0), (19, 19)), dotted())
    e = np.e**2
    assert list(found[0]["probabilities"].values()) == pytest.approx([1 / (e + 2), e / (e + 2), 1 / (e + 2)])
    assert list(found[1]["probabilities"].values()) == pytest.approx(
        [e / (1 + 2 * e), 1 / (1 + 2 * e), e / (1 + 2 * e)]
    )
    assert list(found[2]["probabilities"].values()) == pytest.approx([1 / 3] * 3)
    assert (found[0]["label"], found[0]["probability"]) == ("b", pytest.approx(e / (e + 2)))
    assert softmax(np.array([[1000.0, 1000.0], [0.0, -1000.0]])).tolist() == [[0.5, 0.5], [1, 0]]


def test_score_of_1_is_no_outlier(pinpoint: SignDigits) -> None:
    (found,) = ask(pinpoint, dotted())
    assert found["outlier_score"] == pytest.approx(1)
    assert not found["is_outlier"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinpoint, "detector", pinpoint.detector.with_threshold(1.3))
        assert ask(pinpoint, dotted())[0]["is_outlier"], "1.09"


@pytest.mark.parametrize(
    ("label", "rows", "columns"), [(0, [0], [0]), (1, [2, 3], [5, 6]), (2, [9], [9])], ids=["corner", "inside", "last"]
)
def test_explanation_is_where_the_pixel_is(
    pinpoint: SignDigits, label: int, rows: list[int], columns: list[int]
) -> None:
    """A patch covers four twentieths of the side, from one before its cell of two to one behind it."""
    (found,) = ask(pinpoint, dotted(PINPOINTS[label]), explain=True)
    assert found["label"] == "abc"[label]
    lost = np.array(found["explanation"])
    expected = np.zeros((10, 10), bool)
    expected[np.ix_(rows, columns)] = True
    np.testing.assert_array_equal(lost > 1, expected)
    mean = 1 / 400
    np.testing.assert_allclose(lost[expected], (1 - mean) / 0.5, atol=1e-3)
    assert np.abs(lost[~expected]).max() < 0.01


def test_sixteen_rows_can_be_explained(pinpoint: SignDigits) -> None:
    assert len(ask(pinpoint, *[dotted((0, 0))] * 16, explain=True)) == 16
    with pytest.raises(MlflowException, match="17 rows are more than the 16 allowed"):
        ask(pinpoint, *[dotted((0, 0))] * 17, explain=True)


def test_pixels_of_a_request_are_limited(pinpoint: SignDigits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyfunc_model, "MAX_REQUEST_PIXELS", 800)
    assert len(ask(pinpoint, dotted(), dotted())) == 2
    with pytest.raises(MlflowException, match="1,200 pixels in 3 rows are more than the 800 allowed"):
        ask(pinpoint, dotted(), dotted(), dotted())


@pytest.mark.parametrize(("bad", "is_cut"), [(10, False), (11, True)])
def test_ten_reasons_are_given(pinpoint: SignDigits, bad: int, is_cut: bool) -> None:
    with pytest.raises(MlflowException) as raised:
        ask(pinpoint, dotted(), *[b"five fingers"] * bad)
    reasons = raised.value.message.split("; ")
    assert reasons[:10] == [f"row {row}: not an image" for row in range(1, 11)]
    assert reasons[10:] == ["..."] * is_cut


def test_one_large_request_at_a_time(pinpoint: SignDigits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where a request has a time limit, as in a server; others are answered meanwhile."""
    large, small = base64.b64decode(blank(4001, 4000)), base64.b64decode(blank(4000, 4000))
    with pinpoint.large_request:
        assert len(ask(pinpoint, large)) == 1, "without a limit"
        monkeypatch.setattr(pinpoint, "timeout", 600.0)
        assert len(ask(pinpoint, small)) == 1
        with pytest.raises(MlflowException, match="busy with other large photographs; try again"):
            ask(pinpoint, large)
    assert len(ask(pinpoint, large)) == 1
    assert not pinpoint.large_request.locked()


def test_log_has_the_duration(pinpoint: SignDigits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = prediction_log.PredictionLog.from_environ({prediction_log.FOLDER: str(tmp_path)})
    monkeypatch.setattr(pinpoint, "prediction_log", log)
    ask(pinpoint, dotted((5, 12)), dotted())
    (file,) = tmp_path.iterdir()
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["label"], first["row"], second["row"]) == ("b", 0, 1)
    assert 0 < first["seconds"] < 10
    assert first["request_id"] == ""


def test_late_request_is_given_up(pinpoint: SignDigits, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Invocation("seven", served=None)  # type: ignore[arg-type]
    token = pinpoint.request.set(request)
    try:
        assert len(ask(pinpoint, dotted())) == 1
        assert not pinpoint.start_timer()()
        request.cancelled.set()
        assert pinpoint.start_timer()()
        with pytest.raises(MlflowException, match="cancelled"):
            ask(pinpoint, dotted())
    finally:
        pinpoint.request.reset(token)
    monkeypatch.setattr(pinpoint, "timeout", 0.0)
    with pytest.raises(MlflowException, match="cancelled"):
        ask(pinpoint, dotted())
    opened = pinpoint.open(dotted(), lambda: False)
    assert pinpoint.infer(opened, lambda: True) == "no time left"


@pytest.mark.parametrize(
    ("value", "content"), [("data:image/png;base64,aGFuZA==", b"hand"), (" aGFu\nZA==\n", b"hand"), (b"hand", b"hand")]
)
def test_base64_in_any_form_is_read(value: str | bytes, content: bytes) -> None:
    assert to_bytes(value) == content
