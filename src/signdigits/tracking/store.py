"""The tracking store: its address, and a SQLite database that is created atomically."""

import contextlib
import os
import re
import tempfile
from pathlib import Path

import mlflow

from signdigits.errors import UsageError


def connect_store() -> None:
    """Raise UsageError if the tracking store cannot be used. A SQLite store that is not there is created."""
    try:
        _create_database()
        if re.match(r"(postgresql|mysql|mssql)", uri := mlflow.get_tracking_uri()):
            from sqlalchemy import create_engine  # which the image does not have: it follows an HTTP server
            from sqlalchemy.pool import NullPool

            create_engine(uri, poolclass=NullPool).connect().close()  # MLflow would retry for two minutes
        mlflow.search_experiments(max_results=1)
    except Exception as error:  # whatever MLflow, SQLAlchemy, a driver or the network have to say
        file = database_file()
        if file and re.search("already exists|no such table|Can't locate revision", str(error)):
            raise UsageError(
                f"{file}: incomplete tables, from an interrupted start or another version of MLflow; remove the file if it "
                f"holds no run, else run `mlflow db upgrade {store_address()}`"
            ) from error
        raise UsageError(
            f"{store_address()}: {str(error).splitlines()[0]}; set MLFLOW_TRACKING_URI to a store that can be used"
        ) from error


def _create_database() -> None:
    """Create a SQLite store atomically: in a temporary folder beside its place, then linked into place.

    MLflow creates its tables in hundreds of steps; a process killed between two of them would leave an unusable file.
    """
    file = database_file()
    if file is None or file.exists() or not file.parent.is_dir():
        return
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as folder:
        whole = Path(folder, file.name)
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{whole}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another process was quicker
            os.link(whole, file)


def database_file() -> Path | None:
    """Return the file of the tracking store if that is SQLite."""
    scheme, _, path = mlflow.get_tracking_uri().partition(":///")
    return Path(path) if scheme == "sqlite" and path else None


def make_absolute() -> None:
    """Make the address of a SQLite store absolute: it is to name the same file from any folder and in any process."""
    if (file := database_file()) and not file.is_absolute():
        mlflow.set_tracking_uri(f"sqlite:///{file.absolute()}")


def equals(field: str, text: str) -> str:
    """Return MLflow's filter for a field that is `text`.

    MLflow has no escape: a text with both quotation marks, or with a backslash at its end, cannot be searched for
    (`NameParameters` refuses it).
    """
    mark = '"' if "'" in text else "'"
    return f"{field} = {mark}{text}{mark}"


def store_address() -> str:
    """Return the address of the tracking store, its password masked."""
    return re.sub(r"://([^:/@]*):[^/@]*@", r"://\1:***@", mlflow.get_tracking_uri())
