"""The named data sets, embedded or downloaded, the photographs of a run, and joined folders: each a folder under `data/`, atomically."""

import hashlib
import logging
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import filelock
import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from PIL import Image

from signdigits import startup
from signdigits.data import joined
from signdigits.errors import DataError, DownloadError
from signdigits.files import atomic_folder, compute_digest
from signdigits.tracking import runs

log = logging.getLogger(__name__)

HANDWRITTEN_DIGITS = "handwritten-digits"
SIGN_LANGUAGE_DIGITS = "sign-language-digits"

# Zeynep Dikle, Arda Mavi and the students of Turkey Ankara Ayrancı Anadolu High School; Apache-2.0; arXiv:2011.08927.
SIGN_LANGUAGE_DIGITS_URL = "https://github.com/ardamavi/Sign-Language-Digits-Dataset/archive/4b09433.zip"
# `folder_digest` of the 2,062 photographs in their class folders: GitHub generates the archive on request, and its bytes vary.
SIGN_LANGUAGE_DIGITS_DIGEST = "c2f92fe1c000e2d67fb86a0ee3515303"

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


def resolve_source(data: str, home: Path = Path("data")) -> Path:
    """Return the folder that `data` names: a named data set, created under `home` if it is missing, a run's, or a path.

    Several with commas between them become one folder, unless there is a path of that name.
    """
    if "," in data and not Path(data).exists():
        return joined.join_folders([resolve_source(part, home) for part in data.split(",")], home / "cache")
    if data.startswith("runs:"):
        return download_photographs(_read_run_id(data), home / "cache")
    if data == HANDWRITTEN_DIGITS:
        return _write_handwritten_digits(home / HANDWRITTEN_DIGITS)
    if data == SIGN_LANGUAGE_DIGITS:
        return download_sign_language_digits(home / SIGN_LANGUAGE_DIGITS)
    return Path(data)


def default_image_size(folder: Path) -> int:
    """Return the `image_size` for the photographs in `folder`, in pixels; a joined folder has that of the first."""
    return IMAGE_SIZES.get(joined.name_original(folder.resolve().name), IMAGE_SIZE)


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
    startup.import_tensorflow()  # takes ten seconds, only on the first run
    from keras.utils import get_file

    log.info("Downloading the sign language digits, about 25 MB, from %s", url)
    with atomic_folder(target) as folder:
        try:
            # zipfile, which extracts, drops drive letters, leading slashes and ".." from names.
            extracted = Path(get_file("photographs.zip", url, extract=True, cache_dir=str(folder), cache_subdir=""))
        except Exception as error:  # get_file raises a bare Exception for an HTTP error
            raise DownloadError(
                f"{url}: {error}; check the connection and retry, or pass --data a folder of class folders"
            ) from error
        photographs = next(extracted.glob("*/Dataset"), None)
        checksum = folder_digest(photographs) if photographs else "no folder Dataset"
        if photographs is None or checksum != digest:
            raise DownloadError(
                f"{url}: the archive holds other files than expected (digest {checksum}, not {digest}); pass --data a folder "
                "of class folders"
            )
        _move_up(photographs, folder)
    return target


def _move_up(inner: Path, folder: Path) -> None:
    """Replace the content of `folder` with that of `inner`, a folder below it."""
    sibling = folder.with_name(folder.name + ".keep")
    inner.rename(sibling)
    shutil.rmtree(folder)
    sibling.rename(folder)


def folder_digest(folder: Path) -> str:
    """Return the digest of every file below `folder`."""
    return compute_digest(
        (path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    )


def _read_run_id(data: str) -> str:
    """Return the run of `runs:/RUN`, or of the URI of one of its artifacts."""
    if run := re.match(r"runs:/([0-9a-f]{32})(/|$)", data):
        return run[1]
    raise DataError(f"data={data}: must be runs:/RUN, with the 32 hexadecimal digits of a run with log_data")


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
        same = runs.search_runs(f"tags.dataset_digest = '{digest}' and tags.{PHOTOGRAPHS} LIKE 'runs:/%'")
        tags = same[0].data.tags if same else tags
    if PHOTOGRAPHS not in tags:
        raise DataError(
            f"run {run_id}: no run has logged its photographs; repeat it from their folder, with --log_data true"
        )
    return tags
