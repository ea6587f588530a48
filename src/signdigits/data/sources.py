"""Where photographs come from: folders, the named data sets, embedded or downloaded, and the photographs of a run.

What is written or downloaded becomes a folder under `data/`, atomically.
"""

import hashlib
import http.client
import logging
import re
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import filelock
import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from PIL import Image
from tqdm import tqdm

from signdigits.config import HANDWRITTEN_DIGITS, SIGN_LANGUAGE_DIGITS
from signdigits.data.names import locate
from signdigits.errors import DataError, DownloadError
from signdigits.files import atomic_folder, compute_digest
from signdigits.tracking import runs, store

log = logging.getLogger(__name__)

# Zeynep Dikle, Arda Mavi and the students of Turkey Ankara Ayrancı Anadolu High School; Apache-2.0; arXiv:2011.08927.
SIGN_LANGUAGE_DIGITS_URL = "https://github.com/ardamavi/Sign-Language-Digits-Dataset/archive/4b09433.zip"
# `folder_digest` of the 2,062 photographs in their class folders: GitHub generates the archive on request, and its bytes vary.
SIGN_LANGUAGE_DIGITS_DIGEST = "c2f92fe1c000e2d67fb86a0ee3515303"

ADDED = "+"  # between the names of joined folders, and before that of one that adds a photograph (dataset.py)

IMAGE_SIZE = 100  # the notebook's
IMAGE_SIZES = {HANDWRITTEN_DIGITS: 32}  # they are 8x8 images: more pixels show no more

ARCHIVE = "photographs.zip"  # artifact; not named after the data set, because MLflow cuts names at a #
# Tags of a run with `log_data`: the URI of its or another run's archive, and the `folder_digest` of what is in it.
PHOTOGRAPHS = "photographs"
PHOTOGRAPHS_DIGEST = "photographs_digest"

LICENCES = {
    HANDWRITTEN_DIGITS: "E. Alpaydin and C. Kaynak, 1998, as shipped with scikit-learn (BSD-3-Clause)",
    SIGN_LANGUAGE_DIGITS: "Apache-2.0, Zeynep Dikle, Arda Mavi and the students of Turkey Ankara Ayrancı Anadolu High School",
}


def resolve_source(data: str, home: Path = Path("data")) -> tuple[Path, ...]:
    """Return the folder, or the folders, that `data` names."""
    return tuple(_resolve_folder(part, home) for part in split_source(data))


def split_source(data: str) -> list[str]:
    """Return the parts of `data`: several if it has commas, unless there is a path of that name."""
    parts = [] if Path(data).exists() else [part.strip() for part in data.split(",")]
    return [part for part in parts if part] or [data]


def _resolve_folder(data: str, home: Path) -> Path:
    """Return the folder of a named data set, created under `home` if it is missing, of a run's photographs, or of a path."""
    if data.startswith("runs:"):
        if run := re.match(r"runs:/([0-9a-f]{32})(/|$)", data):  # or the URI of one of its artifacts
            return download_photographs(run[1], home / "cache")
        raise DataError(f"data={data}: must be runs:/RUN, with the 32 hexadecimal digits of a run with log_data")
    if data == HANDWRITTEN_DIGITS:
        return _write_handwritten_digits(home / HANDWRITTEN_DIGITS)
    if data == SIGN_LANGUAGE_DIGITS:
        return download_sign_language_digits(home / SIGN_LANGUAGE_DIGITS)
    return locate(Path(), data)


def default_image_size(folder: Path) -> int:
    """Return the `image_size` for the photographs in `folder`, in pixels."""
    return IMAGE_SIZES.get(name_original(folder.resolve().name), IMAGE_SIZE)


def name_original(name: str) -> str:
    """Return the name of the first of the folders that a data set called `name` joins; of any other data set, `name`."""
    return name.partition(ADDED)[0]


def _write_handwritten_digits(target: Path, image_size: int = 100) -> Path:
    """Write scikit-learn's 1,797 handwritten digits as PNG files, dark ink on white, into `target`/0 to `target`/9.

    They are 8x8 images with 17 levels of ink, from 43 people (UCI ML hand-written digits, test set; E. Alpaydin,
    C. Kaynak, 1998), resized to `image_size` pixels (Lanczos). Does nothing if `target` exists.
    """
    if target.exists():
        return target
    from sklearn.datasets import load_digits  # takes a second, only on the first run

    digits = load_digits()
    log.info("Writing scikit-learn's %d handwritten digits to %s", len(digits.images), target)
    with atomic_folder(target) as folder:
        for number, (ink, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            picture = Image.fromarray(np.uint8(255 - ink * (255 / 16)))
            picture = picture.resize((image_size, image_size), Image.Resampling.LANCZOS)
            path = folder / str(label) / f"digit_{number:04d}.png"
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
    return target


def download_sign_language_digits(
    target: Path, url: str = SIGN_LANGUAGE_DIGITS_URL, digest: str = SIGN_LANGUAGE_DIGITS_DIGEST
) -> Path:
    """Download the photographs from `url`, verify their `digest`, and move their class folders to `target`.

    Does nothing if `target` exists. Raises DownloadError, leaving nothing behind, if the archive cannot be downloaded or
    extracted, or holds other files.
    """
    if target.exists():
        return target
    log.info("Downloading the sign language digits, about 25 MB, from %s", url)
    with atomic_folder(target) as folder, tempfile.TemporaryDirectory() as place:
        packed = Path(place, ARCHIVE)
        try:
            _download_file(url, packed)
            with zipfile.ZipFile(packed) as archive:
                for member in archive.infolist():
                    _, _, member.filename = member.filename.partition("/Dataset/")
                    if member.filename and not member.is_dir():
                        archive.extract(member, folder)  # drops leading slashes and ".." from names
        except (OSError, http.client.HTTPException, zipfile.BadZipFile) as error:
            raise DownloadError(
                f"{url}: {error}; check the connection and retry, or pass --data a folder of class folders"
            ) from error
        if (found := folder_digest(folder)) != digest:
            raise DownloadError(
                f"{url}: the archive holds other files than expected (digest {found}, not {digest}); pass --data a folder of "
                "class folders"
            )
    return target


def _download_file(url: str, target: Path) -> None:
    """Download `url` to `target`, with a progress bar on a terminal."""
    with tqdm(desc="downloading", unit="B", unit_scale=True, disable=None) as bar:

        def show(blocks: int, block_size: int, total: int) -> None:
            bar.total = total if total > 0 else None
            bar.update(blocks * block_size - bar.n)

        urllib.request.urlretrieve(url, target, show)


def folder_digest(folder: Path) -> str:
    """Return the digest of every file below `folder`."""
    return compute_digest(
        (path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    )


def download_photographs(run_id: str, home: Path) -> Path:
    """Return the folder of the photographs of a run, downloaded to `home`, and verified, on first use.

    Raises DataError if none are logged for the run, and DownloadError, leaving nothing behind, if they cannot be read.
    """
    tags = _find_logged_photographs(run_id)
    uri, digest = tags[PHOTOGRAPHS], tags[PHOTOGRAPHS_DIGEST]
    target = home / digest / Path(tags["dataset"]).name
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_name(f"{target.name}.lock")):
        if not target.exists():
            log.info("downloading %s to %s", uri, target)
            with atomic_folder(target) as folder, tempfile.TemporaryDirectory() as place:
                try:
                    with zipfile.ZipFile(mlflow.artifacts.download_artifacts(uri, dst_path=place)) as archive:
                        archive.extractall(folder)  # drops leading slashes and ".." from names
                except (OSError, MlflowException, zipfile.BadZipFile) as error:
                    raise DownloadError(f"{uri}: {error}; restore the artifact, or pass --data a folder") from error
                if (found := folder_digest(folder)) != digest:
                    raise DownloadError(f"{uri}: holds other files than were logged (digest {found}, not {digest})")
    return target


def _find_logged_photographs(run_id: str) -> dict[str, str]:
    """Return the tags of a run whose photographs are logged: `run_id`, or another with the same `dataset_digest`."""
    tags: dict[str, str] = runs.find_run(run_id).data.tags
    if PHOTOGRAPHS not in tags and (digest := tags.get("dataset_digest")):
        same = runs.search_runs(f"{store.equals('tags.dataset_digest', digest)} and tags.{PHOTOGRAPHS} LIKE 'runs:/%'")
        tags = same[0].data.tags if same else tags
    if PHOTOGRAPHS not in tags:
        raise DataError(
            f"run {run_id}: no run has logged its photographs; repeat it from their folder, with --log_data true"
        )
    return tags
