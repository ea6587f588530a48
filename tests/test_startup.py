import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

IMPORT = "from signdigits import startup; startup.import_tensorflow()"


def stderr_of(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stderr


def test_tensorflow_starts_silently() -> None:
    assert stderr_of(IMPORT) == ""


def test_real_warnings_are_kept() -> None:
    code = (
        "import os, sys\nfrom signdigits.startup import filtered_stderr\n"
        "with filtered_stderr():\n"
        "    os.write(2, b'I0000 00:00:17 port.cc:153] oneDNN custom operations are on.\\n')\n"
        "    os.write(2, b'W0000 00:00:17 gpu.cc:1] your GPU is on fire\\n')\n"
        "    print('a Python warning', file=sys.stderr)\n"
        "print('afterwards', file=sys.stderr)\n"
    )
    assert stderr_of(code).splitlines() == [
        "W0000 00:00:17 gpu.cc:1] your GPU is on fire",
        "a Python warning",
        "afterwards",
    ]
