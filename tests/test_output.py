import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from signdigits.batch.output import BatchJob, lock_output
from signdigits.errors import UsageError

JOB = BatchJob("m-1", "1", "some", "digest", 4)
ROWS = pd.DataFrame(
    {"path": ["a", "b"], "label": ["1", None], "probability": [0.9, None], "reason": [None, "empty"]}
).assign(is_outlier=pd.array([True, None], "boolean"))


def test_tables_keep_part_order(tmp_path: Path) -> None:
    with lock_output(tmp_path / "out", JOB) as output:
        output.write_part(1, ROWS.assign(path=["c", "d"]))
        output.write_part(0, ROWS)
        output.write_csv()
        output.finish()
    assert pd.read_parquet(output.parquet)["path"].tolist() == ["a", "b", "c", "d"]
    lines = ["path,label,probability,reason,is_outlier", "a,1,0.9,,True", "b,,,empty,", "c,1,0.9,,True", "d,,,empty,"]
    assert output.csv.read_text().splitlines() == lines


def test_unreadable_part_keeps_schema(tmp_path: Path) -> None:
    with lock_output(tmp_path, JOB) as output:
        output.write_part(0, ROWS[1:])
        output.write_part(1, ROWS[:1])
    assert pq.read_schema(output.part(0)).equals(pq.read_schema(output.part(1)))


def test_partial_file_is_not_visible(tmp_path: Path) -> None:
    """A process that may write no more than 4,096 bytes to a file, as where a disk is full."""
    script = f"""
import resource, signal
from pathlib import Path
import pandas as pd
from signdigits.batch import output as parts
from signdigits.errors import UsageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with parts.lock_output(Path({str(tmp_path)!r}), parts.BatchJob("m-1", "1", "some", "digest", 4)) as output:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        output.write_part(0, pd.DataFrame({{"path": [f"{{n}} {{n ** 7}}" for n in range(10000)]}}))
    except UsageError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "000000.parquet: " in done.stdout
    assert "File too large; free some space" in done.stdout
    assert not list((tmp_path / "parts").glob("0*"))


def test_lock_ends_with_block(tmp_path: Path) -> None:
    with (
        lock_output(tmp_path, JOB),
        pytest.raises(UsageError, match="another process"),
        lock_output(tmp_path, JOB),
    ):
        pass
    with lock_output(tmp_path, JOB):
        pass


def test_unreadable_job_is_kept(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(UsageError, match=r"job\.json cannot be read"), lock_output(tmp_path, JOB):
        pass
    assert (tmp_path / "job.json").read_text() == "{"
