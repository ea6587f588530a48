"""The home folder: it holds `data/`, the cache, the study and the output, and relative paths are relative to it.

`mlflow run` starts a command in the project's folder, which for a git address is a temporary clone. What a command leaves
must not be lost with it, and a second start must find it again.
"""

import os
import tempfile
from pathlib import Path

from signdigits.errors import UsageError
from signdigits.tracking import runs, store

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
    if working.parent == Path(tempfile.gettempdir()).resolve() and working.name.startswith(tempfile.gettempprefix()):
        raise UsageError(
            f"{working}: a temporary clone, where data and study would be lost; set {HOME} to a folder that keeps them"
        )
    return working
