"""The tracking store: its address, and a SQLite database that is created atomically."""

import contextlib
import os
import re
import tempfile
from pathlib import Path

import mlflow

from signdigits.errors import TrackingError


def connect_store() -> None:
    """Raise TrackingError if the tracking store cannot be used. A SQLite store that is not there is created."""
    try:
        _create_database()
        mlflow.search_experiments(max_results=1)
    except Exception as error:  # whatever MLflow, SQLAlchemy, a driver or the network have to say
        file = _database_file()
        if file and re.search("already exists|no such table|Can't locate revision", str(error)):
            raise TrackingError(
                f"{file}: its tables are not whole: the start that made them was killed, or it is of another version of "
                f"MLflow; if no run is in it, remove it, else run `mlflow db upgrade {store_address()}`"
            ) from error
        raise TrackingError(
            f"{store_address()}: {str(error).splitlines()[0]}; set MLFLOW_TRACKING_URI to a store that can be used"
        ) from error


def _create_database() -> None:
    """Create a SQLite store beside its place, and move it there when it is whole.

    MLflow makes its tables in hundreds of steps; a start that is killed between two of them would leave a file that no
    later start can use.
    """
    file = _database_file()
    if file is None or file.exists() or not file.parent.is_dir():
        return
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as folder:
        whole = Path(folder, file.name)
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{whole}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another process was quicker
            os.link(whole, file)


def _database_file() -> Path | None:
    """The file of the tracking store, if that is SQLite."""
    scheme, _, path = mlflow.get_tracking_uri().partition(":///")
    return Path(path) if scheme == "sqlite" and path else None


def store_address() -> str:
    """The address of the tracking store, without a password that stands in it."""
    return re.sub(r"://([^:/@]*):[^/@]*@", r"://\1:***@", mlflow.get_tracking_uri())
