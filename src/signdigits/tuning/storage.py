"""Where a study is kept: the database of Optuna's tables, which one search at a time uses and which may be restarted."""

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
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool

from signdigits.errors import StorageError, StudyError

MAX_DOWNTIME = 120.0  # seconds that a database may be away
HEARTBEAT = 10  # seconds between two signs of life of a trial on another process
GRACE = 60  # seconds without one, after which the trial counts as interrupted


def _parse_url(storage: str) -> URL:
    """The address, which must hold no password. Raises StudyError, which shows none either, if it is none or holds one."""
    try:
        url = make_url(storage)
    except ArgumentError as error:
        raise StudyError("storage: not an SQLAlchemy URL, such as sqlite:///optuna.db") from error
    if url.password is not None:
        raise StudyError(
            f"storage={url.render_as_string(hide_password=True)}: a password in an address ends up in logs and runs; "
            "leave it out, and put it into ~/.pgpass or PGPASSWORD"
        )
    return url


def is_shared(storage: str) -> bool:
    """Whether several processes can write to it at a time. SQLite lets one write, and turns the others away."""
    return _parse_url(storage).get_backend_name() != "sqlite"


def open_storage(storage: str) -> RDBStorage:
    """Open the database, with Optuna's tables. Raises StudyError if it cannot be used.

    In a shared database, trials have a heartbeat, and every connection waits while the database is away.
    """
    shared = is_shared(storage)
    options: dict[str, Any] = {
        "engine_kwargs": {"pool_pre_ping": True}, "heartbeat_interval": HEARTBEAT, "grace_period": GRACE,
    }  # fmt: skip
    try:
        with ignore_experimental_warnings():
            opened = RDBStorage(storage, **(options if shared else {}))
    except Exception as error:  # whatever Optuna, SQLAlchemy, a driver or the network have to say
        raise _unusable_storage(storage, error) from error
    if shared:
        event.listen(opened.engine, "do_connect", connect_with_retries)
    return opened


def connect_with_retries(dialect: Any, record: object, arguments: list[Any], options: dict[str, Any]) -> Any:
    """Connect, retrying every second while the database is away: SQLAlchemy's event `do_connect`."""
    deadline = time.monotonic() + MAX_DOWNTIME
    while True:
        try:
            return dialect.connect(*arguments, **options)
        except dialect.loaded_dbapi.OperationalError as error:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"the study's database has been away for {MAX_DOWNTIME:.0f} s ({first_line(error)}); once it is back, "
                    "the same command continues the study"
                ) from error
        time.sleep(1)


@contextmanager
def ignore_experimental_warnings() -> Iterator[None]:
    """Without the warnings that what has been in Optuna for years is still an experiment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@contextmanager
def lock_study(storage: str, name: str) -> Iterator[None]:
    """Hold the study called `name` alone. The lock goes with the process, also when it is killed.

    Raises StudyError if another process holds it: on any machine where the database is PostgreSQL, else on this one.
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
            connection.invalidate()  # nothing is left to be said over it; the database may have been restarted


@contextmanager
def _lock_file(url: URL, name: str) -> Iterator[None]:
    place = str(Path(url.database or "").resolve()) if url.get_backend_name() == "sqlite" else str(url)
    key = hashlib.sha256(f"{place}\0{name}".encode()).hexdigest()[:16]
    lock = filelock.FileLock(Path(tempfile.gettempdir(), f"signdigits-{key}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise _study_in_use(name) from error
    except OSError as error:  # somebody else's lock, or no room for one
        raise StudyError(f"study {name}: cannot lock {lock.lock_file} ({error}); remove it, or set TMPDIR") from error
    try:
        yield
    finally:
        lock.release()


def _unusable_storage(storage: str, error: Exception) -> StudyError:
    return StudyError(f"storage={storage}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """What the driver had to say, without the address and the links that SQLAlchemy and Optuna add."""
    return str(error.__cause__ or error).splitlines()[0]


def _study_in_use(name: str) -> StudyError:
    return StudyError(
        f"study {name}: another process is searching it; wait for it, stop it, or give another --study_name"
    )
