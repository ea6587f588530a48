import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from signdigits.batch import inputs
from signdigits.config import DataParameters, SourceParameters
from signdigits.data import dataset, loading
from signdigits.errors import DataError

from .conftest import SIZE, write_photographs


def test_real_photographs_are_read(sign_digits: Path) -> None:
    found = dataset.scan_dataset(SourceParameters(data=str(sign_digits)))
    assert found.class_names == tuple("0123456789")
    assert list(found.counts().values()) == [205, 206, 206, 206, 207, 207, 207, 206, 208, 204]
    turned = [photograph for photograph in found.photographs if photograph.orientation != 1]
    assert [(photograph.path, photograph.size) for photograph in turned] == [
        (f"7/IMG_{number}.JPG", (3024, 3024)) for number in (5874, 5935, 5978)
    ]


def test_digest_depends_on_content(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bars")
    first, parameters = folder / "0" / "IMG_0000.JPG", SourceParameters(data=str(folder))
    before = dataset.scan_dataset(parameters).digest
    first.rename(first.with_name("IMG_9999.JPG"))
    renamed = dataset.scan_dataset(parameters).digest
    first.with_name("IMG_9999.JPG").write_bytes((folder / "0" / "IMG_0001.JPG").read_bytes())
    assert len({before, renamed, dataset.scan_dataset(parameters).digest}) == 3


def test_class_names_are_folder_names(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bars")
    (folder / "1").rename(folder / "paper")
    (folder / ".cache").mkdir()
    (folder / "0" / ".DS_Store").write_bytes(b"?")
    (folder / "notes.txt").write_text("beside the class folders")
    assert dataset.scan_dataset(SourceParameters(data=str(folder))).class_names == ("0", "2", "paper")


def no_class_folder(folder: Path) -> str:
    folder.mkdir()
    (folder / "photograph.jpg").write_bytes(b"?")
    return f"{folder}: no class folders"


def one_class(folder: Path) -> str:
    write_photographs(folder, classes=1)
    return f"{folder}: only one class folder, '0'"


def empty_class(folder: Path) -> str:
    (write_photographs(folder) / "9").mkdir()
    return f"{folder / '9'}: no photographs in this class folder"


def not_an_image(folder: Path) -> str:
    path = write_photographs(folder) / "1" / "notes.txt"
    path.write_text("five fingers")
    return f"{path}: not an image; remove it, or pass --skip_unreadable true"


def truncated(folder: Path) -> str:
    path = write_photographs(folder) / "1" / "IMG_0003.JPG"
    path.write_bytes(path.read_bytes()[:-200])
    return f"{path}: truncated or damaged"


def too_small(folder: Path) -> str:
    write_photographs(folder)
    (folder / "9").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "9" / "only.png")
    return f"{folder / '9'}: too few photographs to split: 1 in the class leave"


def too_few(folder: Path) -> str:
    write_photographs(folder, each=2)
    return "too few photographs to split"


@pytest.mark.parametrize(
    "spoil", [no_class_folder, one_class, empty_class, not_an_image, truncated, too_small, too_few]
)
def test_unusable_folder_is_refused(tmp_path: Path, spoil: object) -> None:
    assert callable(spoil)
    message = spoil(tmp_path / "bad")
    with pytest.raises(DataError) as raised:
        loading.load_data(DataParameters(data=str(tmp_path / "bad"), image_size=SIZE))
    assert message in str(raised.value)


def test_missing_folder_names_alternatives(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder; pass --data .* handwritten-digits and sign-language-digits"):
        dataset.scan_dataset(SourceParameters(data=str(tmp_path / "missing")))


def write_archive(folder: Path) -> Path:
    (folder / "photos.zip").write_bytes(b"PK")
    return folder / "photos.zip"


def write_photograph(folder: Path) -> Path:
    Image.new("RGB", (8, 8)).save(folder / "one.jpg")
    return folder / "one.jpg"


def write_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_archive, "photos.zip: an archive; unpack it, and pass the folder"),
        (write_photograph, "one.jpg: a single photograph; pass the folder that it lies in"),
        (write_pipe, "pipe: not a folder"),
        (lambda folder: "https://host/photos.zip", "https:/host/photos.zip: a URL; download it, and pass the folder"),
    ],
)
def test_what_is_no_folder_is_named(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    data = str(write(tmp_path))
    with pytest.raises(DataError, match=message):
        dataset.scan_dataset(SourceParameters(data=data))
    with pytest.raises(DataError, match=message.replace("not a folder", "neither a folder nor a table")):
        inputs.find_inputs(data, tmp_path / "out")


def test_classes_that_look_the_same_are_refused(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bars", classes=2)
    (folder / "0").rename(folder / "caf\u00e9")
    (folder / "1").rename(folder / "cafe\u0301")
    with pytest.raises(DataError, match=r"the names 'cafe\\u0301' and 'caf\\xe9' look the same; make them one class"):
        dataset.scan_dataset(SourceParameters(data=str(folder)))


def test_unreadable_files_can_be_skipped(tmp_path: Path) -> None:
    truncated(tmp_path / "bad")
    found = dataset.scan_dataset(SourceParameters(data=str(tmp_path / "bad"), skip_unreadable=True))
    assert list(found.unreadable) == ["1/IMG_0003.JPG"]
    assert found.counts() == {"0": 20, "1": 19, "2": 20}


def test_broken_link_is_reported(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bars")
    (folder / "0" / "lost.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match=r"lost.jpg: cannot be read \(No such file or directory\)"):
        dataset.scan_dataset(SourceParameters(data=str(folder)))
    found = dataset.scan_dataset(SourceParameters(data=str(folder), skip_unreadable=True))
    assert list(found.unreadable) == ["0/lost.jpg"]


@pytest.mark.parametrize("outer", [("train", "test"), ("alice", "bob"), ("fold1", "fold2", "fold3")])
def test_split_folders_are_refused(tmp_path: Path, outer: tuple[str, ...]) -> None:
    for name in outer:
        write_photographs(tmp_path / "bars" / name)
    with pytest.raises(DataError, match=r"all contain 0, 1, 2, which look like the classes; pass --data"):
        dataset.scan_dataset(SourceParameters(data=str(tmp_path / "bars")))


def test_nested_folders_are_read(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bars")
    for name in "012":
        for inner in ("train", "test"):
            (folder / name / inner).mkdir()
        for number, path in enumerate(sorted((folder / name).glob("*.JPG"))):
            path.rename(folder / name / ("train" if number % 2 else "test") / path.name)
    assert dataset.scan_dataset(SourceParameters(data=str(folder))).counts() == {"0": 20, "1": 20, "2": 20}


@pytest.mark.parametrize("name", [b"0/caf\xe9.JPG", b"0/caf\xe9/IMG.JPG", b"caf\xe9/IMG.JPG"])
def test_non_utf8_name_is_reported(tmp_path: Path, name: bytes) -> None:
    folder = write_photographs(tmp_path / "bars")
    path = folder / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    shutil.copy(folder / "0" / "IMG_0000.JPG", path)
    with pytest.raises(DataError, match=r"udce9.*name.* is not UTF-8.*; rename it"):
        dataset.scan_dataset(SourceParameters(data=str(folder)))
