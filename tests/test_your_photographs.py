"""The page docs/your-photographs.md, walked: a telephone's photographs in three folders become a model of their own."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pillow_heif
import pytest
from PIL import Image

from signdigits import cli

pytestmark = pytest.mark.slow

FEW = ["--image_size", "16", "--space", "notebook", "--n_trials", "1", "--n_seeds", "1", "--epochs", "12"]
FAST = ["--batch_size", "8", "--initial_learning_rate", "0.003"]


def photograph(label: int, random: np.random.Generator) -> Image.Image:
    """A landscape photograph, 4:3, with a bright bar at a place per class."""
    pixels = random.integers(0, 80, (48, 64, 3), dtype=np.uint8)
    pixels[label * 16 : label * 16 + 12] += 150
    return Image.fromarray(pixels)


@pytest.fixture
def telephone(tmp_path: Path) -> Path:
    """Class folders of nine photographs each, every other one HEIC, the others JPEG that lie on their side."""
    random, folder = np.random.default_rng(0), tmp_path / "gestures"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for label, name in enumerate(("fist", "palm", "peace")):
        (folder / name).mkdir(parents=True)
        for number in range(9):
            image, path = photograph(label, random), folder / name / f"IMG_{number:04d}"
            if number % 2:
                image.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".jpg"), exif=exif, quality=95)
            else:
                pillow_heif.from_pillow(image).save(path.with_suffix(".HEIC"), quality=90)
        (folder / name / ".DS_Store").write_bytes(b"?")
    return folder


def test_telephone_photographs_become_a_model(telephone: Path, store: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "signdigits")
    data = ["--data", str(telephone)]
    assert cli.main(["prepare", *data]) == 0
    run = mlflow.last_active_run()
    report = json.loads(
        Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/data/report.json")).read_text()
    )
    assert report["classes"] == {"fist": 9, "palm": 9, "peace": 9}
    assert len(report["turned upright"]) == 12
    assert report["test accuracy"] == {"images": 6, "right": 5, "low": 0.436, "high": 0.97}
    assert run.data.tags["split"] == "stratified"
    assert "a model that reads 5 of the 6 test images has an accuracy of 0.44 to 0.97 (95 % confidence)" in caplog.text
    assert "fewer than 10 photographs: fist 9, palm 9, peace 9; add more" in caplog.text

    assert cli.main(["main", *data, "--model_name", "gestures", *FEW, *FAST]) == 0
    served = mlflow.pyfunc.load_model("models:/gestures@champion")
    files = [telephone / "peace" / "IMG_0000.HEIC", telephone / "fist" / "IMG_0001.jpg"]
    reply = served.predict(pd.DataFrame({"image": [path.read_bytes() for path in files]}))
    assert reply["label"].tolist() == ["peace", "fist"]
    assert set(reply["probabilities"][0]) == {"fist", "palm", "peace"}
