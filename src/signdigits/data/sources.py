"""The two named data sets: one embedded, one downloaded; each ends as a folder of class folders under `data/`.

Both are all or nothing: they are made in a folder beside their place and moved there when complete.
"""

import hashlib
import logging
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from signdigits import startup
from signdigits.errors import DownloadError
from signdigits.files import atomic_folder, compute_digest

log = logging.getLogger(__name__)

HANDWRITTEN_DIGITS = "handwritten-digits"
SIGN_LANGUAGE_DIGITS = "sign-language-digits"

# Zeynep Dikle, Arda Mavi and the students of Turkey Ankara Ayrancı Anadolu High School; Apache-2.0; arXiv:2011.08927.
SIGN_LANGUAGE_DIGITS_URL = "https://github.com/ardamavi/Sign-Language-Digits-Dataset/archive/4b09433.zip"
# GitHub packs the archive anew at every request, so its own bytes prove nothing: this is `folder_digest` of what
# it holds, the 2,062 photographs in their class folders.
SIGN_LANGUAGE_DIGITS_DIGEST = "c2f92fe1c000e2d67fb86a0ee3515303"


def resolve_source(data: str, home: Path = Path("data")) -> Path:
    """The folder of class folders that `data` names: one of the two names, made under `home` if missing, or a path."""
    if data == HANDWRITTEN_DIGITS:
        return _write_handwritten_digits(home / HANDWRITTEN_DIGITS)
    if data == SIGN_LANGUAGE_DIGITS:
        return download_sign_language_digits(home / SIGN_LANGUAGE_DIGITS)
    return Path(data)


def _write_handwritten_digits(target: Path, image_size: int = 100) -> Path:
    """Write scikit-learn's 1,797 handwritten digits as PNG files, dark ink on white, into `target`/0 to `target`/9.

    They are 8x8 images with 17 levels of ink, from 43 people (UCI ML hand-written digits, test set; E. Alpaydin,
    C. Kaynak, 1998), resized to `image_size` pixels (Lanczos). Does nothing where `target` exists.
    """
    if target.exists():
        return target
    from sklearn.datasets import load_digits  # one second that only the first start needs

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
    """Fetch the photographs from `url`, check them against `digest`, and put their class folders into `target`.

    Does nothing where `target` exists. Raises DownloadError, leaving nothing behind, if the archive cannot be
    fetched or unpacked, or does not hold the photographs that it should.
    """
    if target.exists():
        return target
    startup.import_tensorflow()  # ten seconds that only the first start needs
    from keras.utils import get_file

    log.info("Downloading the sign language digits, about 25 MB, from %s", url)
    with atomic_folder(target) as folder:
        try:
            # zipfile, which does the unpacking, drops drive letters, leading slashes and ".." from names.
            unpacked = Path(get_file("photographs.zip", url, extract=True, cache_dir=str(folder), cache_subdir=""))
        except Exception as error:  # get_file raises a bare Exception where the server says no
            raise DownloadError(
                f"{url}: {error}; check the connection and start again, or pass --data a folder of class folders"
            ) from error
        photographs = next(unpacked.glob("*/Dataset"), None)
        found = folder_digest(photographs) if photographs else "no folder Dataset"
        if photographs is None or found != digest:
            raise DownloadError(f"{url}: the archive holds other files than expected (digest {found}, not {digest})")
        _move_up(photographs, folder)
    return target


def _move_up(inner: Path, folder: Path) -> None:
    """Make what lies in `inner`, deep inside `folder`, the whole content of `folder`."""
    keep = folder.with_name(folder.name + ".keep")
    inner.rename(keep)
    shutil.rmtree(folder)
    keep.rename(folder)


def folder_digest(folder: Path) -> str:
    """Return the digest of every file below `folder`."""
    return compute_digest(
        (path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    )
