import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from signdigits.config import DataParameters, SourceParameters
from signdigits.data import loading, sources, split
from signdigits.data.dataset import Dataset, scan_dataset
from signdigits.errors import DataError, ModelError

from .conftest import SIZE, write_photographs


def keras_subset(folder: Path, subset: str) -> list[str]:
    """The files that the notebook's call gives, relative to `folder`."""
    batches = keras.utils.image_dataset_from_directory(
        folder, validation_split=0.2, subset=subset, seed=1337, image_size=(100, 100), batch_size=128, verbose=False
    )
    return [Path(path).relative_to(folder).as_posix() for path in batches.file_paths]


def paths(dataset: Dataset, indices: np.ndarray) -> list[str]:
    return [dataset.photographs[i].path for i in indices]


def check_split_is_that_of_keras(folder: Path, name: str = "random") -> split.Split:
    dataset = scan_dataset(SourceParameters(data=str(folder)))
    made = split.split_dataset(dataset, name)
    assert paths(dataset, made.testing) == keras_subset(folder, "validation")
    assert sorted(paths(dataset, made.fitting)) == sorted(keras_subset(folder, "training"))
    return made


def test_testing_is_keras_validation_subset(photographs: Path) -> None:
    check_split_is_that_of_keras(photographs)


def test_real_testing_matches_the_notebook(sign_digits: Path) -> None:
    made = check_split_is_that_of_keras(sign_digits, "auto")  # wherever the photographs lie
    assert made.name == "random"
    assert [len(made.training), len(made.validation), len(made.testing)] == [1320, 330, 412]


def test_parts_are_disjoint_and_complete(loaded: loading.Data) -> None:
    split = loaded.split
    everything = np.concatenate([split.training, split.validation, split.testing])
    assert sorted(everything) == list(range(60))


def test_validation_is_stratified(loaded: loading.Data) -> None:
    fractions = np.bincount(loaded.validation.y) / np.bincount(loaded.dataset.labels[loaded.split.fitting])
    np.testing.assert_allclose(fractions, 0.2, atol=0.05)


def test_every_class_is_in_every_part(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bars", classes=10, each=8)
    for path in sorted((folder / "2").iterdir())[3:]:
        path.unlink()
    dataset = scan_dataset(SourceParameters(data=str(folder)))
    made = split.split_dataset(dataset, "stratified")
    counts = {part: np.bincount(dataset.labels[indices]).tolist() for part, indices in made.parts.items()}
    assert counts == {
        "training": [5, 5, 1, *[5] * 7],
        "validation": [1] * 10,
        "testing": [2, 2, 1, *[2] * 7],
    }
    assert sorted(np.concatenate(list(made.parts.values()))) == list(range(75))
    (folder / "2" / "IMG_0000.JPG").unlink()
    with pytest.raises(DataError, match="2: too few photographs to split: 2 in the class"):
        split.split_dataset(scan_dataset(SourceParameters(data=str(folder))), "stratified")


def test_random_split_of_few_is_refused(tmp_path: Path) -> None:
    dataset = scan_dataset(SourceParameters(data=str(write_photographs(tmp_path / "bars", each=3))))
    with pytest.raises(DataError, match="too few photographs to split"):
        split.split_dataset(dataset, "random")


def test_auto_keeps_named_splits(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photographs, Path("data", sources.HANDWRITTEN_DIGITS))  # fewer
    digits = scan_dataset(SourceParameters(data="handwritten-digits"))
    assert split.split_dataset(digits, "auto").digest == split.split_dataset(digits, "random").digest
    other = scan_dataset(SourceParameters(data=str(write_photographs(tmp_path / "bars"))))
    assert split.split_dataset(other, "auto").name == "stratified"
    digests = {split.split_dataset(other, name).digest for name in ("auto", "stratified", "random")}
    assert len(digests) == 2


def write_groups(folder: Path, size: int) -> np.ndarray:
    """groups.csv with `size` neighbouring photographs of each class in a group; returns the groups."""
    dataset = scan_dataset(SourceParameters(data=str(folder)))
    table = pd.DataFrame({"path": [photograph.path for photograph in dataset.photographs]})
    table["group"] = [f"signer {int(path[-8:-4]) // size}" for path in table["path"]]
    table.to_csv(folder / split.GROUPS, index=False)
    return table["group"].to_numpy()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_groups_are_never_split(tmp_path: Path, size: int) -> None:
    folder = write_photographs(tmp_path / "bars", each=40)
    found = write_groups(folder, size)
    made = split.split_dataset(scan_dataset(SourceParameters(data=str(folder))), "grouped")
    of_part = [set(found[indices]) for indices in made.parts.values()]
    assert sum(map(len, of_part)) == len(set().union(*of_part)) == len(set(found))
    assert sorted(np.concatenate(list(made.parts.values()))) == list(range(120))
    labels = scan_dataset(SourceParameters(data=str(folder))).labels
    for indices in made.parts.values():
        counts = np.bincount(labels[indices])
        assert counts.max() - counts.min() <= size, "as even as the groups allow"


def test_split_changes_the_digest(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bars")
    digests = []
    for size in (1, 2):
        write_groups(folder, size)
        dataset = scan_dataset(SourceParameters(data=str(folder)))
        digests.append(split.split_dataset(dataset, "grouped").digest)
    digests.append(split.split_dataset(dataset, "random").digest)
    assert len(set(digests)) == 3


def test_real_students_are_never_split(sign_digits: Path) -> None:
    loaded = loading.load_data(DataParameters(data=str(sign_digits), split="grouped", image_size=SIZE))
    found = split.read_groups(loaded.dataset)
    assert [len(indices) for indices in loaded.split.parts.values()] == [1319, 331, 412]
    assert [len(set(found[indices])) for indices in loaded.split.parts.values()] == [143, 34, 43]
    assert len(set(found)) == 220


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "groups.csv: needed by split=grouped, with the columns path and group"),
        ("name;group\n", r"groups.csv: no column path \(columns: name, group\)"),
        ("path,group\n0/IMG_0000.JPG,a\n", "no group for 59 photographs, the first of them 0/IMG_0001.JPG"),
    ],
)
def test_unusable_groups_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    folder = write_photographs(tmp_path / "bars")
    if content is not None:
        (folder / split.GROUPS).write_text(content)
    with pytest.raises(DataError, match=message):
        split.split_dataset(scan_dataset(SourceParameters(data=str(folder))), "grouped")


def list_groups(folder: Path, form: Callable[[str], str]) -> list[str]:
    """Write a group for each photograph, as groups.csv with paths in another form, and read them."""
    dataset = scan_dataset(SourceParameters(data=str(folder)))
    rows = [f"{form(photograph.path)};Zo\u00eb {i % 8};" for i, photograph in enumerate(dataset.photographs)]
    (folder / split.GROUPS).write_text("\r\n".join(["\ufeffpath;group", *rows, ";;", rows[0]]))
    return list(split.read_groups(dataset))


@pytest.mark.parametrize(
    "form",
    [
        lambda path: path,
        lambda path: unicodedata.normalize("NFC", path),
        lambda path: f"./{path}",
        lambda path: path.replace("/", "\\"),
    ],
)
def test_forms_of_names_have_groups(tmp_path: Path, form: Callable[[str], str]) -> None:
    folder = write_photographs(tmp_path / "bars", classes=2)
    (folder / "1").rename(folder / "cafe\u0301")
    assert list_groups(folder, form) == [f"Zo\u00eb {i % 8}" for i in range(40)]


@pytest.mark.parametrize(
    "form", [str.lower, lambda path: path.replace(".JPG", ".jpeg"), lambda path: f"bars/{path}", lambda path: path[2:]]
)
def test_close_name_is_suggested(tmp_path: Path, form: Callable[[str], str]) -> None:
    folder = write_photographs(tmp_path / "bars", classes=2)
    with pytest.raises(
        DataError,
        match=f"no group for 40 photographs, the first of them 0/IMG_0000.JPG; line .* has {form('0/IMG_0000.JPG')}",
    ):
        list_groups(folder, form)


def test_groups_of_one_name_are_one(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "bars", classes=2, each=2)
    rows = [
        "0/IMG_0000.JPG,Zo\u00eb A",
        "0/IMG_0001.JPG,Zoe\u0308  A ",
        "1/IMG_0000.JPG,Zo\u00eb\u00a0A",
        "1/IMG_0001.JPG,B",
    ]
    (folder / split.GROUPS).write_text("\n".join(["path,group", *rows]))
    dataset = scan_dataset(SourceParameters(data=str(folder)))
    assert split.read_groups(dataset).tolist() == ["Zo\u00eb A"] * 3 + ["B"]
    (folder / split.GROUPS).write_text("\n".join(["path,group", *rows, "./0/IMG_0001.JPG,B"]))
    with pytest.raises(DataError, match=r"lines 3 and 6: 0/IMG_0001.JPG is in the groups Zo\u00eb A and B; keep one"):
        split.read_groups(dataset)


def test_added_photographs_are_divided_by_checksum(photographs: Path) -> None:
    """A fifth of the possible checksums is for the test, and a fifth of the others for validation."""
    alone = scan_dataset(SourceParameters(data=str(photographs)))
    found = {
        "00000000": "testing", "33333333": "testing", "33333334": "validation",
        "5c28f5c2": "validation", "5c28f5c3": "training", "ffffffff": "training",
    }  # fmt: skip
    added = [
        replace(alone.photographs[0], path=f"0/+more/{checksum}.jpeg", checksum=checksum.ljust(64, "0"))
        for checksum in found
    ]
    joined = replace(alone, name="bars+more", photographs=(*alone.photographs, *added))
    made = split.split_dataset(joined, "stratified")
    parts = {
        part: {path[-13:-5] for path in paths(joined, indices) if "+" in path} for part, indices in made.parts.items()
    }
    assert parts == {part: {c for c, where in found.items() if where == part} for part in made.parts}
    for part, indices in split.split_dataset(alone, "stratified").parts.items():
        assert [path for path in paths(joined, made.parts[part]) if "+" not in path] == paths(alone, indices)


def test_split_of_a_model_is_repeated(photographs: Path) -> None:
    dataset = scan_dataset(SourceParameters(data=str(photographs)))
    made = {name: split.split_dataset(dataset, name) for name in ("random", "stratified")}
    tags = {"split": "stratified", "dataset_digest": made["stratified"].digest}
    assert paths(dataset, split.repeat_split(dataset, "bars", tags).testing) == paths(
        dataset, made["stratified"].testing
    )
    assert split.repeat_split(dataset, "bars", {"dataset_digest": made["random"].digest}).name == "random"
    for other in ("0" * 32, "f" * 32, made["random"].digest):
        with pytest.raises(ModelError, match="pass --data the photographs that the model was trained on"):
            split.repeat_split(dataset, "bars", tags | {"dataset_digest": other})


def test_class_is_cut_by_a_fifth_twice(tmp_path: Path) -> None:
    """Of 13, 3 are for the test; of the 10 others, 2 for validation."""
    dataset = scan_dataset(SourceParameters(data=str(write_photographs(tmp_path / "bars", each=13))))
    made = split.split_dataset(dataset, "stratified")
    counts = {part: np.bincount(dataset.labels[indices]).tolist() for part, indices in made.parts.items()}
    assert counts == {"training": [8] * 3, "validation": [2] * 3, "testing": [3] * 3}
    assert paths(dataset, made.fitting) == paths(dataset, made.training) + paths(dataset, made.validation)
    for indices in made.parts.values():
        assert list(dataset.labels[indices]) != sorted(dataset.labels[indices]), "not class by class"


def test_odd_count_is_split_as_keras(tmp_path: Path) -> None:
    """A fifth of 42 is 8.4; one image of class 0 is enough for the test, and none is not."""
    made = check_split_is_that_of_keras(write_photographs(tmp_path / "bars", each=14))
    assert (len(made.training), len(made.validation), len(made.testing)) == (27, 7, 8)
    dataset = scan_dataset(SourceParameters(data=str(write_photographs(tmp_path / "few" / "bars", each=12))))
    with pytest.raises(
        DataError, match="bars/0: too few photographs to split: 12 in the class leave 0 for test; add more"
    ):
        split.split_dataset(dataset, "random")


def split_by_groups(folder: Path, groups: Sequence[str]) -> dict[str, set[str]]:
    """Split the photographs of three classes by the groups of each class' files, and return the groups of each part."""
    dataset = scan_dataset(SourceParameters(data=str(folder)))
    table = pd.DataFrame({"path": [p.path for p in dataset.photographs], "group": [*"".join(groups)]})
    table.to_csv(folder / split.GROUPS, index=False)
    made = split.split_dataset(dataset, "grouped")
    for indices in made.parts.values():
        assert set(dataset.labels[indices]) == {0, 1, 2}
    return {part: set(table["group"][indices]) for part, indices in made.parts.items()}


@pytest.mark.parametrize(
    "groups",
    [
        ["abc", "abc", "abc"],
        ["abcabc", "abcabc", "cbacba"],
        ["aaaaab", "abcabc", "abcccc"],
        ["abcdef", "abcdef", "abcdef"],
        ["abc", "abd", "abd"],  # only c and d together have every class
    ],
)
def test_three_groups_suffice(tmp_path: Path, groups: list[str]) -> None:
    if groups[0] == "aaaaab":
        groups = ["aaaabc", *groups[1:]]
    parts = split_by_groups(write_photographs(tmp_path / "bars", each=len(groups[0])), groups)
    assert sorted(group for part in parts.values() for group in part) == sorted(set("".join(groups)))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            ["abab", "abab", "abab"],
            "bars: 2 groups, and class 0 has photographs of 2; split=grouped needs three groups",
        ),
        (["abcd", "abcd", "abab"], "bars: 4 groups, and class 2 has photographs of 2; .* add those of another group"),
    ],
)
def test_two_groups_are_refused(tmp_path: Path, groups: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_by_groups(write_photographs(tmp_path / "bars", each=4), groups)


@pytest.fixture
def students(tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Six photographs that count as the sign language digits, whose file names tell the order in which they were taken."""
    folder = tmp_path / "digits"
    for number, label in enumerate("012022", start=8):
        (folder / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(photographs / label / f"IMG_{number:04d}.JPG", folder / label / f"IMG_{number}.JPG")
    dataset = scan_dataset(SourceParameters(data=str(folder)))
    monkeypatch.setattr(sources, "SIGN_LANGUAGE_DIGITS_DIGEST", dataset.digest)
    return dataset


def test_students_are_inferred(students: Dataset) -> None:
    """The label rises from one photograph of a student to the next: 0, 1, 2 are of the first, 0, 2 and 2 of others."""
    groups = dict(zip(paths(students, np.arange(6)), split.read_groups(students), strict=True))
    assert groups == {
        "0/IMG_8.JPG": "student 000", "1/IMG_9.JPG": "student 000", "2/IMG_10.JPG": "student 000",
        "0/IMG_11.JPG": "student 001", "2/IMG_12.JPG": "student 001", "2/IMG_13.JPG": "student 002",
    }  # fmt: skip
    assert not (students.folder / split.GROUPS).exists()


def test_inferred_students_are_written_once(students: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    inferred = split.read_groups(students).tolist()
    split.write_groups(students)
    assert "3 groups, written for --split grouped" in caplog.text
    assert split.read_groups(students).tolist() == inferred
    file = students.folder / split.GROUPS
    assert len(file.read_text().splitlines()) == 7
    file.write_text(file.read_text().replace("student 002", "student 001"))
    split.write_groups(students)
    assert set(split.read_groups(students)) == {"student 000", "student 001"}, "as edited"


def test_other_groups_are_not_inferred(students: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SIGN_LANGUAGE_DIGITS_DIGEST", "0" * 32)
    split.write_groups(students)
    assert not (students.folder / split.GROUPS).exists()
    with pytest.raises(DataError, match=r"groups\.csv: needed by split=grouped"):
        split.read_groups(students)


def test_read_only_folder_stays_unchanged(students: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    """Even by root, who could write there."""
    caplog.set_level("INFO")
    students.folder.chmod(0o555)
    split.write_groups(students)
    assert "not written (the folder is read-only)" in caplog.text
    assert not (students.folder / split.GROUPS).exists()
    assert len(set(split.read_groups(students))) == 3


def test_photograph_without_group_is_named(photographs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photographs, tmp_path / "bars"))
    write_groups(folder, 2)
    file = folder / split.GROUPS
    file.write_text(file.read_text().replace("2/IMG_0019.JPG,signer 9", "2/IMG_0019.JPG,"))
    with pytest.raises(DataError, match=r"no group for 1 photographs, the first of them 2/IMG_0019\.JPG"):
        split.read_groups(scan_dataset(SourceParameters(data=str(folder))))
