import stat
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from sqlalchemy import Connection, create_engine, event, text

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


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize")
def test_enqueued_trial_runs_once(tmp_path: Path) -> None:
    """Each process opens the storage itself, like the threads here; SQLite alone gives several the same trial."""
    address, each = f"sqlite:///{tmp_path}/optuna.db", 5
    study = optuna.create_study(study_name="shared", storage=storage.open_storage(address))
    for number in range(4 * each):
        study.enqueue_trial({"x": number})

    def take_trials(_: int) -> list[int]:
        own = optuna.load_study(study_name="shared", storage=storage.open_storage(address))
        return [own.ask().number for _ in range(each)]

    with ThreadPoolExecutor(4) as threads:
        taken = [number for numbers in threads.map(take_trials, range(4)) for number in numbers]
    assert sorted(taken) == list(range(4 * each))


def connect(database: Path, **options: object) -> Connection:
    """Connect as to a shared storage. Without its folder, SQLite says that it cannot open the file."""
    engine = create_engine(f"sqlite:///{database}", connect_args=options)
    event.listen(engine, "do_connect", storage.connect_with_retries)
    return engine.connect()


def test_connection_is_retried(tmp_path: Path) -> None:
    database = tmp_path / "later" / "optuna.db"
    timer = threading.Timer(0.5, database.parent.mkdir)
    timer.start()
    with connect(database) as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    timer.join()


def test_retries_end_after_max_downtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_DOWNTIME", -1.0)
    message = r"down for -1 s .*unable to open database file.*run the same command to continue"
    with pytest.raises(StorageError, match=message):
        connect(tmp_path / "never" / "optuna.db")


def test_other_errors_are_not_retried(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="sslmode"):
        connect(tmp_path / "optuna.db", sslmode="require")
