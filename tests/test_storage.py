import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import IntegrityError, OperationalError

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
        storage.connect(address)


def test_a_password_in_an_address_is_refused_and_not_shown() -> None:
    with pytest.raises(StudyError, match="storage=postgresql://me:\\*\\*\\*@nowhere/db: a password") as raised:
        storage.connect("postgresql://me:secret@nowhere/db")
    assert "secret" not in str(raised.value)


def away() -> StorageInternalError:
    error = StorageInternalError("as Optuna says it")
    error.__cause__ = OperationalError("SELECT 1", None, Exception("server closed the connection"))
    return error


def test_a_call_is_repeated_until_the_database_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    answers: list[Exception | str] = [away(), away(), "here again"]

    def call() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert storage.patient(call)() == "here again"


def test_other_errors_are_not_waited_for() -> None:
    def call() -> None:
        raise IntegrityError("INSERT", None, Exception("twice"))

    with pytest.raises(IntegrityError):
        storage.patient(call)()


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", -1.0)

    def call() -> None:
        raise away()

    with pytest.raises(StorageError, match=r"away for -1 s .*server closed the connection.*the same command goes on"):
        storage.patient(call)()
