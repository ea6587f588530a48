"""The files of a folder and its subfolders, without what operating systems and archivers leave there."""

from collections.abc import Iterator
from pathlib import Path

JUNK_NAMES = ("__MACOSX", "Thumbs.db", "desktop.ini")


def find_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, in the order in which Keras lists them, without junk.

    A symbolic link to a file inside the folder is skipped: the file is listed anyway.
    """
    root = folder.resolve()
    for directory in _find_folders(folder):
        for path in sorted(directory.iterdir()):
            is_duplicate = path.is_symlink() and path.exists() and path.resolve().is_relative_to(root)
            if _is_file(path) and not is_junk(path) and not is_duplicate:
                yield path


def count_junk(folder: Path) -> int:
    """Return the number of hidden and junk files and folders that `find_files` skips."""
    return sum(is_junk(entry) for directory in _find_folders(folder) for entry in directory.iterdir())


def _find_folders(folder: Path) -> list[Path]:
    """Return `folder` and its subfolders, each once, however many symbolic links lead to it."""
    folders: dict[Path, Path] = {}
    pending, links = [folder], list[Path]()
    while pending or links:
        directory = pending.pop() if pending else links.pop(0)
        if directory.resolve() in folders:
            continue
        folders[directory.resolve()] = directory
        for entry in sorted(directory.iterdir()):
            if entry.is_dir() and not is_junk(entry):
                (links if entry.is_symlink() else pending).append(entry)
    return sorted(folders.values(), key=str)


def _is_file(path: Path) -> bool:
    """Return whether the path is a file, or a broken symbolic link, which is reported as unreadable."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def is_junk(path: Path) -> bool:
    """Return whether a file or folder is hidden, or left behind by an operating system or an archiver."""
    return path.name.startswith(".") or path.name in JUNK_NAMES
