import sqlite3
import stat
import sys
from pathlib import Path

import pytest

from signdigits.errors import StorageError, UsageError
from signdigits.tuning import storage


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("not a url", "storage: not an SQLAlchemy URL"),
        ("sqlite:///missing/folder/optuna.db", "unable to open database file"),
        ("postgresql+nodriver://me@nowhere/db", "storage=postgresql\\+nodriver://me@nowhere/db"),
    ],
)
def test_unusable_storage_is_refused(address: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        storage.open_storage(address)


def test_password_in_url_is_refused() -> None:
    with pytest.raises(UsageError, match="storage=postgresql://me:\\*\\*\\*@nowhere/db: passwords in URLs") as raised:
        storage.open_storage("postgresql://me:secret@nowhere/db")
    assert "secret" not in str(raised.value)


def test_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(
        UsageError, match=r"storage=postgresql://nowhere/db: .*psycopg.*\.\[cluster\].*--env-manager uv"
    ):
        storage.open_storage("postgresql://nowhere/db")


def test_lock_lies_beside_database(tmp_path: Path) -> None:
    """Every account that may write the database may lock its studies."""
    database = tmp_path / "optuna.db"
    database.touch()
    database.chmod(0o660)
    with storage.lock_study(f"sqlite:///{database}", "mine"):
        (lock,) = tmp_path.glob("optuna.db-*.lock")
        assert stat.S_IMODE(lock.stat().st_mode) == 0o660


def test_memory_has_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with storage.lock_study("sqlite:///:memory:", "mine"):
        assert not list(tmp_path.iterdir())


class Dialect:
    """A dialect as SQLAlchemy passes it to `do_connect`, of a database that is down for some attempts."""

    loaded_dbapi = sqlite3

    def __init__(self, *answers: Exception | str) -> None:
        self.answers = list(answers)

    def connect(self, *arguments: object, **options: object) -> str:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_connection_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    away = sqlite3.OperationalError("server closed the connection")
    assert storage.connect_with_retries(Dialect(away, away, "here again"), None, [], {}) == "here again"


def test_other_errors_are_not_retried() -> None:
    with pytest.raises(sqlite3.IntegrityError):
        storage.connect_with_retries(Dialect(sqlite3.IntegrityError("twice")), None, [], {})


def test_retries_end_after_max_downtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_DOWNTIME", -1.0)
    away = sqlite3.OperationalError("server closed the connection")
    with pytest.raises(StorageError, match=r"down for -1 s .*server closed.*run the same command to continue"):
        storage.connect_with_retries(Dialect(away), None, [], {})
