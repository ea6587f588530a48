"""The examples of a model that was refitted; tests/test_main.py looks at those of the champion."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms
from sklearn.preprocessing import normalize

from signdigits.config import Hyperparameters
from signdigits.data import loading
from signdigits.data.images import decode_image
from signdigits.model import architecture, training
from signdigits.model.calibration import Calibration
from signdigits.packaging import examples, package
from signdigits.tracking import registry

from .conftest import SIZE, calibrate, copy_stores

if TYPE_CHECKING:
    import keras

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def refit(finished_job: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[tuple[keras.Model, Calibration]]":
    """Yield network and calibration of the first refit of a finished job."""
    with copy_stores(finished_job, tmp_path_factory.mktemp("refit")):
        (run, *_) = mlflow.search_runs(
            filter_string="tags.seed = '1337'", search_all_experiments=True, output_format="list"
        )
        yield package.read_model(registry.find_model(run.info.run_id, ""))


def show(example: bytes) -> np.ndarray:
    return decode_image(example, SIZE, "rgb").astype(float)


def test_examples_are_typical_training_photographs(
    refit: "tuple[keras.Model, Calibration]", loaded: loading.Data
) -> None:
    """Of those that the network reads right, the nearest to the mean of the class."""
    chosen = examples.choose_examples(*refit, loaded)
    assert chosen
    images, labels = loaded.training.x[:].astype(np.float32), loaded.training.y
    logits, features = np.split(architecture.with_features(refit[0])(images).numpy(), [3], axis=1)
    for label, example in chosen.items():
        differences = np.abs(loaded.fitting.x[:] - show(example)).mean(axis=(1, 2, 3))
        shown = differences.argmin()
        assert differences[shown] < np.partition(differences, 1)[1] / 2, "the JPEG is much like one of them"
        usable = np.flatnonzero((labels == label) & (logits.argmax(axis=1) == label))
        own = normalize(features[labels == label]).mean(axis=0)
        distances = np.linalg.norm(normalize(features[usable]) - own, axis=1)
        assert shown == usable[distances.argmin()]


def test_class_that_is_not_read_has_no_example(loaded: loading.Data) -> None:
    network = architecture.build_network(loaded.training.shape, 3)  # untrained
    chosen = examples.choose_examples(network, calibrate(network, loaded), loaded)
    read = network(loaded.training.x[:].astype(np.float32)).numpy().argmax(axis=1)
    assert chosen.keys() <= set(read[read == loaded.training.y])
    assert len(chosen) < 3


def test_added_photographs_are_not_shown(
    refit: "tuple[keras.Model, Calibration]", photographs: Path, loaded: loading.Data, tmp_path: Path
) -> None:
    for path in photographs.rglob("*.JPG"):
        target = tmp_path / "added" / path.relative_to(photographs)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.resize((40, 40)).save(target)
    data = loading.load_data(replace(loaded.parameters, data=f"{photographs},{tmp_path / 'added'}"))
    network, calibration = refit
    detector = training.fit_detector(training.Fit(network, {}, Hyperparameters()), data.fitting)
    calibration = replace(calibration, detector=detector.with_threshold(calibration.detector.threshold))
    chosen = examples.choose_examples(network, calibration, data)
    assert chosen
    assert {Image.open(io.BytesIO(example)).size for example in chosen.values()} == {(24, 24)}


@pytest.mark.parametrize(
    ("data", "is_public"),
    [
        ("handwritten-digits", True),
        ("sign-language-digits,corrections/accepted", True),
        ("sign-language-digits/", False),
    ],
)
def test_named_data_sets_are_public(loaded: loading.Data, data: str, is_public: bool) -> None:
    assert examples.is_public(replace(loaded, parameters=replace(loaded.parameters, data=data))) is is_public


def test_named_photographs_are_public_in_any_folder(loaded: loading.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples.sources, "SIGN_LANGUAGE_DIGITS_DIGEST", loaded.dataset.digest)
    assert examples.is_public(loaded)


def test_example_is_small_upright_and_without_metadata() -> None:
    """Of a large photograph with noise, a profile, a comment, and the place and orientation that a telephone writes."""
    pixels = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    pixels[:, :400] //= 8  # dark on the left
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (52.0, 31.0, 12.0)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=exif, icc_profile=profile, comment=b"Sam, at home")
    example = examples._encode_example(file.getvalue())
    assert len(example) <= examples.MAX_BYTES
    with Image.open(io.BytesIO(example)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (192, 256))
        assert image.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        upper, lower = np.asarray(image)[:100].mean(), np.asarray(image)[-100:].mean()
        assert upper < 30 < 100 < lower


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16"])
def test_small_picture_keeps_its_size(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (8, 6)).save(file, "PNG")
    with Image.open(io.BytesIO(examples._encode_example(file.getvalue()))) as image:
        assert (image.mode, image.size) == ("RGB", (8, 6))
