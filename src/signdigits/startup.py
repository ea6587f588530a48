"""Import TensorFlow without its start-up chatter.

TensorFlow 2.21 prints a dozen informative lines before it reads TF_CPP_MIN_LOG_LEVEL, and an error line about a
GPU that nobody asked for. They pass through a filter here; everything else reaches the terminal, even if the
import itself aborts the process.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

CHATTER = "|".join(
    [
        r"^WARNING: All log messages before absl::InitializeLog",
        r"^I[0-9]{4} ",
        r"^To enable the following instructions",
        r"^E[0-9]{4} .*failed call to cuInit",
    ]
)


def import_tensorflow() -> None:
    """Import TensorFlow and let it look for devices, its chatter left out. A second call costs nothing."""
    if "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # leaves out information, keeps warnings and errors
    with filtered_stderr():
        import tensorflow as tf  # ten seconds that most commands do not need

        tf.config.list_logical_devices()


@contextmanager
def filtered_stderr() -> Iterator[None]:
    """Pass what this process, native code included, writes to standard error through grep, without the chatter."""
    grep = shutil.which("grep")
    if grep is None:
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    sieve = subprocess.Popen([grep, "-vE", "--line-buffered", CHATTER], stdin=subprocess.PIPE, stdout=terminal)
    assert sieve.stdin is not None
    os.dup2(sieve.stdin.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
        sieve.stdin.close()
        sieve.wait()
