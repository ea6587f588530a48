import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from signdigits.config import DataParameters, SourceParameters
from signdigits.data import cache, dataset, loading
from signdigits.data.cache import DiskArray
from signdigits.errors import DataError

from .conftest import SIZE, wait_until, write_photographs

READ = """
import sys
from signdigits.config import DataParameters
from signdigits.data import loading
loaded = loading.load_data(DataParameters(data=sys.argv[1], image_size=64, memory_budget=0))
print(loaded.fitting.x[:].sum())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which the cache is made."""
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


def cached(folder: Path) -> dict[Path, int]:
    """The files of the cache, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_photograph_is_decoded_once(folder: Path, parameters: DataParameters) -> None:
    loading.load_data(parameters)
    before = cached(folder)
    assert len(before) == 60
    again = loading.load_data(dataclasses.replace(parameters, split="stratified"))
    assert cached(folder) == before
    loading.load_data(dataclasses.replace(parameters, image_size=SIZE * 2))
    assert len(cached(folder)) == 120
    assert again.dataset == loading.load_data(parameters).dataset


def test_report_and_training_share_cache(folder: Path, photographs: Path) -> None:
    found = dataset.scan_dataset(SourceParameters(data=str(photographs)))
    before = cached(folder)
    assert loading.load_data(DataParameters(data=str(photographs))).dataset == found
    assert cached(folder) == before


def test_cache_follows_working_directory(
    folder: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.scan_dataset(SourceParameters(data=str(photographs)))
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    dataset.scan_dataset(SourceParameters(data=str(photographs)))
    assert len(cached(folder)) == len(cached(other / cache.FOLDER)) == 60


def test_changed_photograph_is_decoded_anew(folder: Path, tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "photographs")
    parameters = DataParameters(data=str(photographs), image_size=SIZE)
    loading.load_data(parameters)
    first, second = (photographs / "0" / "IMG_0000.JPG"), (photographs / "1" / "IMG_0000.JPG")
    Image.open(second).rotate(90).save(first)
    loaded = loading.load_data(parameters)
    assert len(cached(folder)) == 61
    shutil.rmtree(folder)
    np.testing.assert_array_equal(loading.load_data(parameters).fitting.x, loaded.fitting.x)


@pytest.mark.parametrize("damage", [b"", b"00000000\n", b"{}", b"\0" * 3000])
def test_damaged_file_is_replaced(folder: Path, parameters: DataParameters, damage: bytes) -> None:
    loaded = loading.load_data(parameters)
    pixels = loaded.fitting.x[:]
    path = next(iter(cached(folder)))
    content = path.read_bytes()
    for bad in (damage, content[:-1], content.replace(b"size", b"Size")):
        path.write_bytes(bad)
        again = loading.load_data(parameters)
        assert again.dataset == loaded.dataset
        np.testing.assert_array_equal(again.fitting.x[:], pixels)
        assert path.read_bytes() == content


@pytest.mark.slow
def test_killed_scan_is_continued(folder: Path, tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "photographs", each=150)
    line = [sys.executable, "-c", READ, str(photographs)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    wait_until(lambda: cached(folder) or process.poll() is not None)
    process.kill()
    process.wait()
    before = cached(folder)
    assert 0 < len(before) < 450
    again = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    assert before.items() <= cached(folder).items(), "what was decoded is not decoded again"
    shutil.rmtree(folder)
    assert int(again) == loading.load_data(DataParameters(data=str(photographs), image_size=64)).fitting.x[:].sum()


@pytest.mark.slow
def test_two_processes_share_cache(folder: Path, photographs: Path) -> None:
    line = [sys.executable, "-c", READ, str(photographs)]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(sums) == 1
    assert len(cached(folder)) == 60


def test_missing_file_is_reported(folder: Path, parameters: DataParameters) -> None:
    loaded = loading.load_data(parameters)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"data/cache/photographs/.*: was removed; run the same command to continue"):
        loaded.fitting.x[:1]


def test_unwritable_cache_is_reported(parameters: DataParameters, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(
        DataError, match=r"data/cache/.*: Not a directory; free some space, or make the folder writable"
    ):
        loading.load_data(parameters)
