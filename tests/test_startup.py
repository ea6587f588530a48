import os
import signal
import subprocess
import sys

import pytest

from signdigits.startup import filtered_stderr

NOISE = b"I0000 00:00:17 port.cc:153] oneDNN custom operations are on.\n"
REASON = b"F0000 00:00:17 cpu_feature_guard.cc:1] your CPU has no AVX\n"


def run_python(code: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)


@pytest.mark.slow
def test_tensorflow_starts_silently() -> None:
    assert run_python("from signdigits import startup; startup.import_tensorflow()").stderr == b""


def test_real_warnings_are_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with filtered_stderr():
        os.write(2, NOISE)
        os.write(2, b"W0000 00:00:17 gpu.cc:1] your GPU is on fire\n")
        os.write(2, b"a Python warning\n")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err.splitlines() == [
        "W0000 00:00:17 gpu.cc:1] your GPU is on fire",
        "a Python warning",
        "afterwards",
    ]


def test_reason_of_abort_is_kept() -> None:
    code = f"""if True:
        import os
        from signdigits.startup import filtered_stderr
        with filtered_stderr():
            os.write(2, {NOISE + REASON!r})
            os.abort()
    """
    aborted = run_python(code)
    assert aborted.returncode == -signal.SIGABRT
    assert aborted.stderr == REASON
