"""Optuna's storage: a database that one search locks for its study, and that its workers share."""

import hashlib
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool

from signdigits.errors import StorageError, UsageError, install_hint

MAX_DOWNTIME = 120.0  # seconds of retries while the database is down
HEARTBEAT_INTERVAL = 10  # seconds
GRACE_PERIOD = 60  # seconds without a heartbeat after which a trial counts as interrupted
LOCK_TIMEOUT = 60.0  # seconds for which SQLite waits for another process's transaction, which takes milliseconds


def _parse_url(storage: str) -> URL:
    """Return the parsed URL. Raises UsageError, without the password, if it is malformed or holds a password."""
    try:
        url = make_url(storage)
    except ArgumentError as error:
        raise UsageError("storage: not an SQLAlchemy URL, such as sqlite:///optuna.db") from error
    if url.password is not None:
        raise UsageError(
            f"storage={url.render_as_string(hide_password=True)}: passwords in URLs end up in logs and runs; "
            "put it into ~/.pgpass or PGPASSWORD"
        )
    return url


def _sqlite_file(storage: str) -> Path | None:
    """Return the file of a SQLite storage; None for a server, or a database in memory."""
    url = _parse_url(storage)
    in_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(url.database or "").absolute() if in_file else None


def is_in_memory(storage: str) -> bool:
    return not is_server(storage) and _sqlite_file(storage) is None


def is_server(storage: str) -> bool:
    """Tell whether other machines can reach the storage."""
    return _parse_url(storage).get_backend_name() != "sqlite"


def open_storage(storage: str) -> RDBStorage:
    """Open the storage, and create its tables if needed. Raises UsageError if it cannot be used.

    Several processes can write to it, unless it is in memory. Trials have a heartbeat then. Connections to a server are
    retried while it is down.
    """
    warnings.filterwarnings("ignore", category=ExperimentalWarning)  # heartbeats are, since 2021
    server, in_memory = is_server(storage), is_in_memory(storage)
    options: dict[str, Any] = {"heartbeat_interval": HEARTBEAT_INTERVAL, "grace_period": GRACE_PERIOD}
    options["engine_kwargs"] = {"pool_pre_ping": True} if server else {"connect_args": {"timeout": LOCK_TIMEOUT}}
    try:
        opened = RDBStorage(storage, **({} if in_memory else options))
    except Exception as error:  # of Optuna, SQLAlchemy, the driver or the network
        raise _unusable_storage(storage, error) from error
    if server:
        event.listen(opened.engine, "do_connect", connect_with_retries)
    elif not in_memory:
        event.listen(opened.engine, "begin", begin_with_lock)
    return opened


def begin_with_lock(connection: Connection) -> None:
    """Begin a transaction of SQLite with the write lock: SQLAlchemy's event `begin`.

    Optuna reads a trial's state before it changes it. SQLite ignores the SELECT ... FOR UPDATE that should lock the trial
    in between, so that two processes would run the same enqueued trial.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def connect_with_retries(dialect: Any, record: object, arguments: list[Any], options: dict[str, Any]) -> Any:
    """Connect, with a retry every second while the database is down: SQLAlchemy's event `do_connect`."""
    deadline = time.monotonic() + MAX_DOWNTIME
    while True:
        try:
            return dialect.connect(*arguments, **options)
        except dialect.loaded_dbapi.OperationalError as error:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"the study's database has been down for {MAX_DOWNTIME:.0f} s ({first_line(error)}); once it is back, "
                    "run the same command to continue"
                ) from error
        time.sleep(1)


@contextmanager
def lock_study(storage: str, name: str) -> Iterator[None]:
    """Lock the study called `name`. The lock ends with the process, also when it is killed.

    Raises UsageError if another process holds it: on any machine where the database is PostgreSQL, else on this one.
    """
    url = _parse_url(storage)
    with _lock_in_database(url, name) if url.get_backend_name() == "postgresql" else _lock_file(url, name):
        yield


@contextmanager
def _lock_in_database(url: URL, name: str) -> Iterator[None]:
    """PostgreSQL's advisory lock, which belongs to a connection."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    try:
        connected = create_engine(url, poolclass=NullPool).connect()
    except Exception as error:
        raise _unusable_storage(str(url), error) from error
    with connected as connection:
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": key}):
            raise _study_in_use(name)
        connection.commit()
        try:
            yield
        finally:
            connection.invalidate()  # the database may have been restarted


@contextmanager
def _lock_file(url: URL, name: str) -> Iterator[None]:
    """A lock beside the SQLite database, for all who may write to that; else in the temporary folder."""
    database = _sqlite_file(str(url))
    if database:
        file = database.with_name(f"{database.name}-{_digest(name)}.lock")
    else:
        file = Path(tempfile.gettempdir(), f"signdigits-{_digest(f'{url}{name}')}.lock")
    mode: dict[str, Any] = {"mode": database.stat().st_mode & 0o777} if database and database.exists() else {}
    try:
        lock = filelock.FileLock(file, timeout=0, **mode).acquire()
    except filelock.Timeout as error:
        raise _study_in_use(name) from error
    except OSError as error:  # no such folder, another account's lock, or a full disk
        raise UsageError(
            f"study {name}: cannot lock {file} ({error.strerror}); choose a folder that you can write to in --storage, or "
            "remove the lock if no search is running"
        ) from error
    with lock:
        yield


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unusable_storage(storage: str, error: Exception) -> UsageError:
    remedy = f"; {install_hint('cluster')}" if isinstance(error, ImportError) else ""  # the driver is missing
    return UsageError(f"storage={storage}: {first_line(error)}{remedy}")


def first_line(error: Exception) -> str:
    """Return the first line of the driver's message, without what SQLAlchemy and Optuna add."""
    return str(error.__cause__ or error).splitlines()[0]


def _study_in_use(name: str) -> UsageError:
    return UsageError(
        f"study {name}: another process is searching it; wait for it, stop it, or give another --study_name"
    )
