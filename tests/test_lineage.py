import dataclasses
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest

from signdigits import prepare
from signdigits.config import DataParameters, ReportParameters
from signdigits.data import lineage, loading, sources
from signdigits.data.loading import Data
from signdigits.errors import DataError, DownloadError, ModelError

from .conftest import SIZE


@pytest.fixture
def mine(photographs: Path, tmp_path: Path, store: str) -> Data:
    """The photographs in a folder that can be lost, with groups.csv, to be kept in the run."""
    folder = Path(shutil.copytree(photographs, tmp_path / "hands #1"))
    lines = [f"{path.relative_to(folder)},{path.stem}" for path in sorted(folder.rglob("*.JPG"))]
    (folder / "groups.csv").write_text("\n".join(["path,group", *lines]) + "\n")
    return loading.load_data(DataParameters(data=str(folder), image_size=SIZE, split="grouped", log_data=True))


def report(data: Data) -> str:
    return prepare.prepare(data, ReportParameters())


def tags(run_id: str) -> dict[str, str]:
    found: dict[str, str] = mlflow.get_run(run_id).data.tags
    return found


def test_photographs_are_kept_once(mine: Data) -> None:
    first, second = report(mine), report(mine)
    assert tags(first)["photographs"] == tags(second)["photographs"] == f"runs:/{first}/photographs.zip"
    client = mlflow.MlflowClient()
    assert "photographs.zip" in [artifact.path for artifact in client.list_artifacts(first)]
    assert "photographs.zip" not in [artifact.path for artifact in client.list_artifacts(second)]
    client.delete_run(first)
    assert tags(third := report(mine))["photographs"] == f"runs:/{third}/photographs.zip", "the first is deleted"


def test_run_is_repeated_without_folder(mine: Data) -> None:
    kept = report(mine)
    other = report(dataclasses.replace(mine, parameters=dataclasses.replace(mine.parameters, log_data=False)))
    assert "photographs" not in tags(other)
    shutil.rmtree(mine.dataset.folder)
    for run_id in (kept, other):  # the other run has the same digest
        again = loading.load_data(dataclasses.replace(mine.parameters, data=f"runs:/{run_id}"))
        assert (again.split.digest, again.dataset.name) == (mine.split.digest, "hands #1")
        assert again.dataset.folder.parent.parent == Path("data", "cache")


def test_repeated_digits_keep_their_size(photographs: Path, tmp_path: Path, store: str) -> None:
    folder = Path(shutil.copytree(photographs, tmp_path / sources.HANDWRITTEN_DIGITS))
    original = loading.load_data(DataParameters(data=str(folder), log_data=True))
    again = loading.load_data(DataParameters(data=f"runs:/{report(original)}"))
    assert again.image_size == original.image_size == 32


def test_changed_artifact_is_refused(mine: Data, tmp_path: Path) -> None:
    run_id = report(mine)
    mlflow.MlflowClient().set_tag(run_id, "photographs_digest", "0" * 32)
    with pytest.raises(DownloadError, match=r"photographs.zip: holds other files than were logged"):
        loading.load_data(DataParameters(data=f"runs:/{run_id}"))
    shutil.rmtree(mlflow.get_run(run_id).info.artifact_uri.removeprefix("file://"))
    with pytest.raises(DownloadError, match="restore the artifact, or pass --data a folder"):
        loading.load_data(DataParameters(data=f"runs:/{run_id}"))
    assert [path.suffix for path in tmp_path.glob("data/cache/*/*") if "photographs" not in path.parts] == [".lock"]


def test_run_without_photographs_is_refused(loaded: Data, store: str) -> None:
    run_id = report(loaded)
    with pytest.raises(DataError, match=f"run {run_id}: no run has logged its photographs; repeat it"):
        loading.load_data(DataParameters(data=f"runs:/{run_id}"))
    with pytest.raises(DataError, match="data=runs:/none: must be runs:/RUN"):
        loading.load_data(DataParameters(data="runs:/none"))
    with pytest.raises(ModelError, match="no such run"):
        loading.load_data(DataParameters(data=f"runs:/{'0' * 32}"))


def test_missing_photographs_are_downloaded_once(mine: Data) -> None:
    with mlflow.start_run() as run:
        lineage.upload_photographs(mine, run.info.run_id)
    shutil.rmtree(mine.dataset.folder)
    for _ in range(2):
        sent = lineage.load_study_data(mine.parameters, mine.split.digest, run.info.run_id)
        assert sent.dataset.name == mine.dataset.name
        np.testing.assert_array_equal(sent.fitting.x, mine.fitting.x)
        shutil.rmtree(run.info.artifact_uri.removeprefix("file://"), ignore_errors=True)  # not downloaded a second time


def test_local_photographs_are_preferred(mine: Data, photographs: Path) -> None:
    more = shutil.copytree(photographs, mine.dataset.folder.with_name("more"))
    joined = loading.load_data(dataclasses.replace(mine.parameters, data=f"{mine.dataset.source},{more}"))
    for data in (mine, joined):
        there = lineage.load_study_data(data.parameters, data.split.digest, "no run")
        assert there.split.digest == data.split.digest


def test_different_photographs_are_refused(mine: Data) -> None:
    next(mine.dataset.folder.rglob("*.JPG")).unlink()
    with pytest.raises(DataError, match="differs from the study's photographs"):
        lineage.load_study_data(mine.parameters, mine.split.digest, "no run")
