"""The home folder: it holds `data/`, the cache, the study and the output, and relative paths are relative to it.

Relative paths of input are looked for where the command was started, which is the project's folder under `mlflow run`, and then
in the home.

`mlflow run` starts a command in the project's folder, which for a git address is a temporary clone. What a command leaves
must not be lost with it, and a second start must find it again.
"""

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from signdigits.config import DATA_SETS
from signdigits.errors import UsageError
from signdigits.tracking import runs, store, urls

HOME = "SIGN_DIGITS_HOME"


def enter_home() -> None:
    """Change to the home folder. Raises UsageError if there is none that lasts.

    The folder is SIGN_DIGITS_HOME, else, under `mlflow run`, that of the SQLite tracking store, else the working directory.
    """
    store.make_absolute()
    home = find_home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        os.chdir(home)
    except OSError as error:
        raise UsageError(f"{home}: {error.strerror}; set {HOME} to a folder that can be used") from error


def find_inputs(groups: Sequence[Any], start: Path) -> list[Any]:
    """Return groups of parameters, with those relative paths of input absolute that exist in `start`, another folder than the home."""
    found = list(groups)
    if start != Path.cwd():
        for number, group in enumerate(groups):
            for declared in fields(group):
                if declared.metadata.get("is_input"):
                    path = _find_input(getattr(group, declared.name), start)
                    found[number] = replace(found[number], **{declared.name: path})
    return found


def _find_input(text: str, start: Path) -> str:
    """Return a path, or the paths that `data=A,B` joins, absolute if they exist in `start`."""

    def find(path: str) -> str:
        is_here = bool(path) and path not in DATA_SETS and (start / path).exists()
        return str(start / path) if is_here else path

    return find(text) if (start / text).exists() else ",".join(map(find, text.split(",")))


def find_home() -> Path:
    given, working = os.environ.get(HOME), Path.cwd()
    if given:
        if not Path(given).is_absolute():
            raise UsageError(f"{HOME}={given}: must be an absolute path")
        return Path(given)
    if runs.launched_run() is None:
        return working
    if database := store.database_file():
        if not database.exists():  # the launcher has created it, elsewhere
            raise UsageError(
                f"{database}: no such file; a relative MLFLOW_TRACKING_URI names another one in the project's folder than "
                "where `mlflow run` was started: write sqlite:////FOLDER/mlflow.db"
            )
        return database.parent
    if urls.is_temporary(working):
        raise UsageError(
            f"{working}: a temporary clone, where data and study would be lost; set {HOME} to a folder that keeps them"
        )
    return working
