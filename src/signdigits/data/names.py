"""Names that look the same: composed and decomposed letters, invisible characters, `./`, `\\`, trailing separators.

macOS stores decomposed letters where keyboards type composed ones, its screenshots have narrow no-break spaces in their names, and
spreadsheets add byte order marks. What is meant is taken only if it is the only one; what is merely close is suggested.
"""

import difflib
import functools
import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath


def normalize_text(text: str) -> str:
    """Return `text` with composed letters and single spaces, without invisible characters."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFC", text) if c < "\x80" or unicodedata.category(c) != "Cf")
    return " ".join(text.split())


def _normalize_path(path: str) -> str:
    """Return a path as `normalize_text` does, with forward slashes, without `./` and trailing separators."""
    text = normalize_text(path)
    return posixpath.normpath((text.rstrip(" ,;") or text).replace("\\", "/"))


class Names:
    """Names of files, or their paths, that are also found by what looks the same."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self._alike, self._close = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
        for name in sorted(self.names):
            path = _normalize_path(name)
            self._alike[path].append(name)
            self._close[_simplify(path)].append(name)

    def find(self, name: str) -> str | None:
        """Return `name` if it is here, or the only one that looks the same."""
        if name in self.names:
            return name
        alike = self._alike.get(_normalize_path(name), [])
        return alike[0] if len(alike) == 1 else None

    def find_close(self, name: str) -> str | None:
        """Return the name that is closest to `name`, of another case, ending or folder; None if `name` is here."""
        candidates = [] if name in self.names else self._close.get(_simplify(_normalize_path(name)), [])
        return next(iter(difflib.get_close_matches(name, candidates, 1, 0)), None)

    def suggest(self, name: str) -> str:
        """Return a part of a message that suggests the closest name; empty if there is none."""
        close = self.find_close(name)
        return f"; perhaps {close} is meant" if close else ""


def _simplify(path: str) -> str:
    """Return the name of a file without folder, ending and case."""
    return posixpath.splitext(posixpath.basename(path))[0].casefold()


def locate(folder: Path, path: str) -> Path:
    """Return `folder / path` if it exists, or else what looks the same, folder by folder."""
    if os.path.lexists(folder / path):
        return folder / path
    found = folder
    for part in PurePosixPath(path.replace("\\", "/")).parts:
        found /= part if os.path.lexists(found / part) else _list_names(found).find(part) or part
    return found


def suggest_file(path: Path) -> str:
    """Return a part of a message that suggests a file in the folder of the missing `path`, as `Names.suggest` does."""
    return _list_names(path.parent).suggest(path.name)


def _list_names(folder: Path) -> Names:
    try:
        return _read_names(folder, folder.stat().st_mtime_ns)
    except OSError:  # no folder, or one that may not be read
        return Names([])


@functools.lru_cache(maxsize=16)  # a list may name thousands of files that a folder has not
def _read_names(folder: Path, modified: int) -> Names:
    return Names(entry.name for entry in folder.iterdir())
