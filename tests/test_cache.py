import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from signdigits.config import DataParameters
from signdigits.data import cache, loading
from signdigits.data.cache import DiskArray
from signdigits.errors import DataError

from .conftest import SIZE, write_photographs

READ = """
import sys
from signdigits.config import DataParameters
from signdigits.data import loading
loaded = loading.load_data(DataParameters(data=sys.argv[1], image_size=64, memory_budget=0))
print(loaded.fitting.x[:].sum())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which the file is made."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / cache.FOLDER


@pytest.fixture
def parameters(photographs: Path) -> DataParameters:
    return DataParameters(data=str(photographs), image_size=SIZE, memory_budget=0)


@pytest.mark.parametrize("color_mode", ["rgb", "grayscale"])
def test_disk_array_equals_memory(photographs: Path, color_mode: str) -> None:
    parameters = DataParameters(data=str(photographs), image_size=SIZE, color_mode=color_mode)
    held = loading.load_data(parameters).fitting
    kept = loading.load_data(dataclasses.replace(parameters, memory_budget=0)).fitting
    assert isinstance(held.x, np.ndarray)
    assert isinstance(kept.x, DiskArray)
    assert (kept.x.shape, kept.x.dtype, kept.shape) == (held.x.shape, held.x.dtype, held.shape)
    np.testing.assert_array_equal(kept.x[:], held.x)
    some = np.array([7, 2, 2])
    np.testing.assert_array_equal(kept.x[some], held.x[some])
    middle = kept.part(slice(10, 20))
    assert isinstance(middle.x, DiskArray)
    np.testing.assert_array_equal(middle.x[3:5], held.x[13:15])
    np.testing.assert_array_equal(middle.y, held.y[10:20])


def test_cache_file_per_image_size(folder: Path, parameters: DataParameters) -> None:
    loading.load_data(parameters)
    (made,) = folder.glob("*.raw")
    before = made.stat().st_mtime_ns
    loading.load_data(parameters)
    assert made.stat().st_mtime_ns == before
    loading.load_data(DataParameters(data=parameters.data, image_size=SIZE * 2, memory_budget=0))
    assert len(list(folder.glob("*.raw"))) == 2


def test_changed_photograph_invalidates_cache(folder: Path, tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "photographs")
    parameters = DataParameters(data=str(photographs), image_size=SIZE, memory_budget=0)
    loading.load_data(parameters)
    for path in (photographs / "0").iterdir():
        path.write_bytes((photographs / "1" / path.name).read_bytes())
    loading.load_data(parameters)
    assert len(list(folder.glob("*.raw"))) == 2


def test_partial_cache_is_ignored(folder: Path, tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "photographs", each=300)
    line = [sys.executable, "-c", READ, str(photographs)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    while not list(folder.glob("*.part")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not list(folder.glob("*.raw"))
    again = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    held = loading.load_data(DataParameters(data=str(photographs), image_size=64)).fitting.x
    assert int(again) == held[:].sum()
    assert not list(folder.glob("*.part"))


def test_two_processes_share_one_file(folder: Path, photographs: Path) -> None:
    line = [sys.executable, "-c", READ, str(photographs)]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(sums) == 1
    assert len(list(folder.glob("*.raw"))) == 1


def test_unwritable_cache_is_reported(parameters: DataParameters, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(DataError, match=r"data/cache/.*\.part: .*; free some space, or raise --memory_budget"):
        loading.load_data(parameters)
