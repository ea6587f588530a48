import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import requests

from signdigits.startup import filtered_stderr, set_environment

from .conftest import settings_of_others

NOISE = b"I0000 00:00:17 port.cc:153] oneDNN custom operations are on.\n"
REASON = b"F0000 00:00:17 cpu_feature_guard.cc:1] your CPU has no AVX\n"


def run_python(code: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)


def test_settings_of_others_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings_of_others(tmp_path).items():
        monkeypatch.setenv(name, value)
    set_environment()
    keras = {name: value for name, value in os.environ.items() if "KERAS" in name}
    assert keras == {"KERAS_BACKEND": "tensorflow", "KERAS_HOME": os.devnull}
    assert os.environ["MPLBACKEND"] == "agg"
    assert (os.environ["PYTHONOPTIMIZE"], os.environ["PYTHONWARNINGS"]) == ("", "ignore::UserWarning")


@pytest.mark.parametrize("other", ["", "*", "registry.example", "localhost,.example"])
def test_loopback_needs_no_proxy(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", other)
    set_environment()
    for host in ("localhost:5001", "127.0.0.1:5001", "[::1]:5001", *([other] if other.isalpha() else [])):
        assert urllib.request.proxy_bypass(host)
        assert requests.utils.should_bypass_proxies(f"http://{host}", no_proxy=None)
    assert bool(urllib.request.proxy_bypass("hands.example")) == (other in ("*", "localhost,.example"))


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
