"""Settings of MLflow, and TensorFlow and LiteRT without their start-up chatter.

TensorFlow 2.21 prints a dozen informative lines before it reads TF_CPP_MIN_LOG_LEVEL, and an error line about a
GPU that nobody asked for. They pass through a filter here; everything else reaches the terminal, even if the
import itself aborts the process.
"""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NOISE = "|".join(
    [
        r"^WARNING: All log messages before absl::InitializeLog",
        r"^I[0-9]{4} ",
        r"^To enable the following instructions",
        r"^E[0-9]{4} .*failed call to cuInit",
        r"^W[0-9]{4} .*Ignored (output_format|drop_control_dependency)",  # what Keras asks the converter for
        r"^INFO: Created TensorFlow Lite XNNPACK delegate",
    ]
)

MLFLOW_SETTINGS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # bars of a millisecond
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nobody is told what is done here
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a server's store prints two lines a run
    # Autologging writes metrics from a thread that, without this, sleeps a second at the end of every fit; with it,
    # the epochs of a second are written at once, and the end wakes it.
    "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1",
}


def configure_mlflow() -> None:
    """Leave MLflow's warnings, drop its chatter, and let a run end without a second's wait. What is set is kept."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    # It loses parameters and epochs of runs that end while it still writes.
    os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"
    import mlflow  # noqa: F401, it sets its own levels when imported

    for name in ("mlflow", "alembic"):  # alembic tells of making tables
        logging.getLogger(name).setLevel(logging.WARNING)


def import_tensorflow(threads: int = 0) -> None:
    """Import TensorFlow and let it look for devices, its chatter left out. A second call costs nothing.

    With `threads` it shares the machine with others: it computes on so many, and takes of a GPU what it needs.
    """
    if "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # leaves out information, keeps warnings and errors
    with filtered_stderr():
        import tensorflow as tf  # ten seconds that most commands do not need

        if threads:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
            for gpu in tf.config.list_physical_devices("GPU"):
                tf.config.experimental.set_memory_growth(gpu, True)
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
    sieve = subprocess.Popen([grep, "-vE", "--line-buffered", NOISE], stdin=subprocess.PIPE, stdout=terminal)
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
