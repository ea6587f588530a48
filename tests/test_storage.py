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
def test_an_address_that_cannot_be_used_is_refused(address: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        storage.open_storage(address)


def test_a_password_in_an_address_is_refused_and_not_shown() -> None:
    with pytest.raises(StudyError, match="storage=postgresql://me:\\*\\*\\*@nowhere/db: a password") as raised:
        storage.open_storage("postgresql://me:secret@nowhere/db")
    assert "secret" not in str(raised.value)


class Dialect:
    """What SQLAlchemy hands to a listener of `do_connect`, of a database that is away for some attempts."""

    loaded_dbapi = sqlite3

    def __init__(self, *answers: Exception | str) -> None:
        self.answers = list(answers)

    def connect(self, *arguments: object, **options: object) -> str:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_connecting_waits_for_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    away = sqlite3.OperationalError("server closed the connection")
    assert storage.connect_with_retries(Dialect(away, away, "here again"), None, [], {}) == "here again"


def test_other_errors_are_raised_at_once() -> None:
    with pytest.raises(sqlite3.IntegrityError):
        storage.connect_with_retries(Dialect(sqlite3.IntegrityError("twice")), None, [], {})


def test_waiting_for_the_database_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_DOWNTIME", -1.0)
    away = sqlite3.OperationalError("server closed the connection")
    with pytest.raises(StorageError, match=r"away for -1 s .*server closed.*the same command continues"):
        storage.connect_with_retries(Dialect(away), None, [], {})
