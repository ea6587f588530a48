"""Atomic writes, and digests of many files."""

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary file name, which becomes `target` if the block succeeds and is removed if it fails."""
    partial_file = target.with_name(f".{target.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        yield partial_file
        partial_file.replace(target)
    finally:
        partial_file.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `target` if the block succeeds and is removed if it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary_folder:
        folder = Path(temporary_folder) / target.name
        folder.mkdir()
        yield folder
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # another process may have created the same folder meanwhile
                raise


def compute_digest(entries: Iterable[tuple[str, str]]) -> str:
    """Return SHA-256 over sorted pairs of relative path and checksum, shortened to 32 hexadecimal digits."""
    sha256 = hashlib.sha256()
    for path, checksum in sorted(entries):
        sha256.update(os.fsencode(f"{path}\0{checksum}\n"))
    return sha256.hexdigest()[:32]
