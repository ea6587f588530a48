import dataclasses
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest

from signdigits.config import DataParameters
from signdigits.data import loading
from signdigits.errors import DataError
from signdigits.tuning import dataset_transfer

from .conftest import SIZE

pytestmark = pytest.mark.slow


@pytest.fixture
def mine(photographs: Path, tmp_path: Path, store: str) -> loading.Data:
    """The photographs in a folder that can be lost."""
    folder = tmp_path / "hands"
    shutil.copytree(photographs, folder)
    return loading.load_data(DataParameters(data=str(folder), image_size=SIZE))


def test_missing_photographs_are_downloaded_once(mine: loading.Data) -> None:
    with mlflow.start_run() as run:
        dataset_transfer.upload_photographs(mine, run.info.run_id)
    shutil.rmtree(mine.dataset.folder)
    for _ in range(2):
        sent = dataset_transfer.load_study_data(mine.parameters, mine.split.digest, run.info.run_id)
        assert sent.dataset.name == mine.dataset.name
        np.testing.assert_array_equal(sent.fitting.x, mine.fitting.x)
        shutil.rmtree(run.info.artifact_uri.removeprefix("file://"), ignore_errors=True)  # not downloaded a second time


def test_local_photographs_are_preferred(mine: loading.Data) -> None:
    assert (
        dataset_transfer.load_study_data(mine.parameters, mine.split.digest, "no run").split.digest == mine.split.digest
    )


def test_different_photographs_are_refused(mine: loading.Data) -> None:
    next(path for path in mine.dataset.folder.rglob("*.JPG")).unlink()
    with pytest.raises(DataError, match="differs from the study's photographs"):
        dataset_transfer.load_study_data(dataclasses.replace(mine.parameters), mine.split.digest, "no run")
