import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from signdigits.config import DataParameters
from signdigits.data import loading, sources

from .conftest import SIZE


def test_loading_is_deterministic(loaded: loading.Data, source: DataParameters) -> None:
    again = loading.load_data(source)
    assert again.dataset.digest == loaded.dataset.digest
    np.testing.assert_array_equal(again.training.x, loaded.training.x)
    np.testing.assert_array_equal(again.split.testing, loaded.split.testing)


@pytest.mark.parametrize(("color_mode", "channels", "dtype"), [("rgb", 3, np.uint8), ("grayscale", 1, np.float32)])
def test_arrays_have_requested_shape(photographs: Path, color_mode: str, channels: int, dtype: type) -> None:
    loaded = loading.load_data(DataParameters(data=str(photographs), image_size=SIZE, color_mode=color_mode))
    assert loaded.training.x.shape[1:] == (SIZE, SIZE, channels)
    assert loaded.training.x.dtype == dtype
    assert len(loaded.training) == len(loaded.training.x)


def test_embedded_digits_have_32_pixels(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photographs, Path("data", sources.HANDWRITTEN_DIGITS))  # fewer
    digits = DataParameters(data="handwritten-digits")
    assert loading.load_data(digits).image_shape == (32, 32, 3)
    assert loading.load_data(replace(digits, image_size=48)).image_shape == (48, 48, 3)


def test_photographs_have_100_pixels(photographs: Path) -> None:
    assert loading.load_data(DataParameters(data=str(photographs))).image_size == 100


@pytest.mark.parametrize(
    ("folder", "size"),
    [
        ("data/handwritten-digits", 32),
        ("cache/handwritten-digits+accepted", 32),
        ("cache/handwritten-digits+accepted+more", 32),
        ("cache/accepted+handwritten-digits", 100),
    ],
)
def test_folder_name_decides_the_size(folder: str, size: int) -> None:
    assert sources.default_image_size(Path(folder)) == size


def test_each_photograph_is_read_once(photographs: Path) -> None:
    script = f"""
import sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
from signdigits.config import DataParameters
from signdigits.data import loading, quality
quality.find_issues(loading.load_data(DataParameters(data={str(photographs)!r}, image_size=16)))
print(sum(name.endswith(".JPG") for name in opened))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "60", done.stderr
