import sqlite3

import pytest

from signdigits.errors import StorageError, StudyError
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
    with pytest.raises(StudyError, match=message):
        storage.open_storage(address)


def test_password_in_url_is_refused() -> None:
    with pytest.raises(StudyError, match="storage=postgresql://me:\\*\\*\\*@nowhere/db: passwords in URLs") as raised:
        storage.open_storage("postgresql://me:secret@nowhere/db")
    assert "secret" not in str(raised.value)


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
