"""The environment of every process, the settings of MLflow, and the import of TensorFlow without its start-up noise.

TensorFlow 2.21 prints a dozen informative lines before it reads TF_CPP_MIN_LOG_LEVEL, and an error line if there is no
GPU. A filter removes them; everything else reaches the terminal, even if the import aborts the process.
"""

import logging
import os
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
        r"^W[0-9]{4} .*Ignored (output_format|drop_control_dependency)",  # from Keras' export
        r"^W[0-9]{4} .*Skipping runtime version metadata",
        r"^fully_quantize: ",
        r"^INFO: Created TensorFlow Lite XNNPACK delegate",
    ]
)

# Read by these packages when they are imported.
ENVIRONMENT = {
    "MPLBACKEND": "agg",  # draws without a screen; a Jupyter kernel sets its own for every process that it starts
    "KERAS_BACKEND": "tensorflow",
    "KERAS_HOME": os.devnull,  # no keras.json, which may name another precision, image format or backend
}
REMOVED = (
    "KERAS_",
    "TF_USE_LEGACY_KERAS",
)  # the beginnings of names; KERAS_MAX_EPOCHS, for example, shortens every training
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")  # the last for urllib

MLFLOW_SETTINGS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # bars that last a millisecond
    "MLFLOW_DISABLE_TELEMETRY": "true",  # no usage data leaves the machine
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines per run with a tracking server
    # Without it, autologging's thread sleeps for a second at the end of every fit; with it, the epochs of a second are
    # written together, and the end of the fit wakes the thread.
    "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1",
}


def set_environment() -> None:
    """Replace settings that other projects leave in the environment, here and for the processes that this one starts.

    The package calls it when it is imported, before a module that reads them. A process with `-m` whose interpreter has read
    PYTHONOPTIMIZE (MLflow formats its docstrings) or errors in PYTHONWARNINGS starts again without.
    """
    for name in [name for name in os.environ if name.startswith(REMOVED)]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)
    # Nothing on this machine is asked for through a proxy. Of the two spellings, all programs prefer the lower case.
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if direct != "*":
        os.environ["no_proxy"] = ",".join(dict.fromkeys([*filter(None, direct.split(",")), *LOOPBACK]))
    warnings = os.environ.get("PYTHONWARNINGS", "").split(",")
    kept = ",".join(option for option in warnings if not option.strip().startswith("e"))  # error, or short for it
    started = {name: os.environ.get(name, "") for name in ("PYTHONOPTIMIZE", "PYTHONWARNINGS")}
    wanted = {"PYTHONOPTIMIZE": "", "PYTHONWARNINGS": kept}
    if started != wanted:
        os.environ.update(wanted)
        if sys.argv[0] == "-m":  # as long as Python locates the module to run
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def configure_mlflow() -> None:
    """Configure MLflow: warnings without noise, and no wait at the end of a run. Existing environment variables are kept."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Asynchronous logging loses parameters and epochs of runs that end while it is writing.
    os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"
    import mlflow  # noqa: F401, it sets its own levels when imported

    for name in ("mlflow", "alembic"):  # alembic logs the creation of tables
        logging.getLogger(name).setLevel(logging.WARNING)


def import_tensorflow(threads: int = 0) -> None:
    """Import TensorFlow and initialize its devices, without the noise. A second call does nothing.

    With `threads`, it computes on that many threads, and allocates GPU memory as needed, to share the machine.
    """
    if "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # hides information, keeps warnings and errors
    with filtered_stderr():
        import tensorflow as tf  # takes ten seconds, and most commands do not need it

        if threads:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
            for gpu in tf.config.list_physical_devices("GPU"):
                tf.config.experimental.set_memory_growth(gpu, True)
        tf.config.list_logical_devices()


@contextmanager
def filtered_stderr() -> Iterator[None]:
    """Filter the noise from what this process, including native code, writes to standard error.

    A process of its own filters, because a thread ends with this process, and would lose the reason for its abort.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with subprocess.Popen(["grep", "-vE", "--line-buffered", NOISE], stdin=subprocess.PIPE, stdout=terminal) as grep:
        assert grep.stdin is not None
        os.dup2(grep.stdin.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
