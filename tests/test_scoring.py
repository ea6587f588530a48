import os
from pathlib import Path

import pytest

from signdigits.batch import scoring
from signdigits.batch.scoring import Chunk, Scorer
from signdigits.data import images
from signdigits.errors import DataError

from .conftest import store_like

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory, champion_store: Path) -> Scorer:
    with store_like(champion_store, tmp_path_factory.mktemp("scoring")):
        return Scorer("models:/sign-digits@champion")


def test_bad_photograph_is_isolated(scorer: Scorer, photographs: Path) -> None:
    good = (photographs / "1" / "IMG_0000.JPG").read_bytes()
    alone = scorer.predict([good])[0]
    mixed = scorer.predict([good, b"five fingers", good, "cannot be read (gone)", good[:-100], good])
    assert [mixed[index] for index in (0, 2, 5)] == [alone] * 3
    assert mixed[1] == "not an image"
    assert mixed[3] == "cannot be read (gone)"
    assert str(mixed[4]).startswith("truncated or damaged")


def test_many_bad_photographs_have_reasons(scorer: Scorer) -> None:
    assert scorer.predict([b"five fingers"] * 32) == ["not an image"] * 32


def test_special_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert scoring.read_photograph(tmp_path / "pipe") == "cannot be read (not a file)"
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10 * images.MAX_BYTES)
    assert len(scoring.read_photograph(tmp_path / "large")) == images.MAX_BYTES + 1, (
        "enough for the decoder to refuse it"
    )
    assert scoring.read_photograph(tmp_path / ("n" * 300)) == "cannot be read (File name too long)"


def test_missing_folder_makes_no_row(scorer: Scorer) -> None:
    with pytest.raises(DataError, match=r"/nowhere: no such folder on .*; every worker needs it at the same path"):
        scorer.score(Chunk(0, "/nowhere", ("a.jpg",)))
