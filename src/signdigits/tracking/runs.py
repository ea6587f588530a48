"""MLflow runs: open, describe and end them with their true status."""

import contextlib
import importlib.metadata
import logging
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from signdigits.errors import ModelError, UsageError
from signdigits.tracking import store

if TYPE_CHECKING:  # commands that draw nothing need not wait for matplotlib
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

EXPERIMENT = "sign-digits"

EXPERIMENT_DESCRIPTION = """\
**Classifying photographs, such as of hands that sign digits.** Each *study* is one run that holds its trials as nested runs:
every trial trains the same small network with another `initial_learning_rate`, `decay_rate` and number of `epochs`.
The best is fitted again (*refit*), scored once on test images that nothing before has seen, and registered. Select a study's trials and press **Compare** to plot these against `val_accuracy`.
"""

# The packages that the result of a run depends on; the run records their versions.
PACKAGES = ("mlflow", "tensorflow", "keras", "optuna", "numpy", "pillow", "pandas", "scikit-learn")

# The tag with the process that works on a run, as host:pid:start.
PROCESS = "process"

# MLflow's tag of a nested run, in a filter.
PARENT = "tags.`mlflow.parentRunId`"

# The artifact with the predictions of the test images, which the champion/challenger comparison reads.
PREDICTIONS = "test/predictions.csv"

# The artifacts with the scores under each corruption, and of pictures of something else, which the model card shows.
ROBUSTNESS, OUTLIERS = "test/robustness.csv", "test/outliers.csv"

# The artifact with a row per photograph: path, class, part of the split, size, mode, orientation and checksum.
FILES = "data/files.csv"

# The artifact with the same images in the columns of the prediction log, which `monitor` reads.
REFERENCE = "test/reference.csv"


@contextlib.contextmanager
def start_run(
    role: str,
    name: str,
    run_id: str | None = None,
    *,
    parent_run_id: str | None = None,
    tags: Mapping[str, Any] | None = None,
) -> Iterator[mlflow.ActiveRun]:
    """Open a run and end it with its true status: FINISHED, FAILED with the reason, or KILLED when interrupted.

    Continues `run_id` if given; otherwise the run that `mlflow run` created for this process, if any; otherwise starts a new
    one, nested under `parent_run_id` or the active run, if any. `role` becomes a tag: prepare, train, study, trial, refit,
    ensemble, evaluate, register, predict, monitor, review or export.
    """
    described = {name: str(value) for name, value in (tags or {}).items()} | {"role": role, PROCESS: _this_process()}
    active = _open_run(name, run_id, parent_run_id, described)
    try:
        yield active
    except KeyboardInterrupt:
        _end_run(active, "KILLED", "interrupted")  # if `mlflow run` launched it, MLflow makes it FAILED
        raise
    except BaseException as error:
        _end_run(active, "FAILED", f"{type(error).__name__}: {error}")
        if isinstance(error, MlflowException) and is_deleted(active.info.run_id):
            raise deleted_error(active.info.run_id) from error
        raise
    _end_run(active, "FINISHED")


def _end_run(active: mlflow.ActiveRun, status: str, reason: str = "") -> None:
    """End the active run. Raises UsageError for a run that should be FINISHED and was deleted in the meantime."""
    with contextlib.suppress(MlflowException):  # of a run that was deleted
        if reason:
            mlflow.set_tag("failure_reason", reason[:5000])
    try:
        mlflow.end_run(status)
    except MlflowException as error:
        if not is_deleted(active.info.run_id):
            raise
        if status == "FINISHED":
            raise deleted_error(active.info.run_id) from error


def is_deleted(run_id: str) -> bool:
    """Tell whether a run or its experiment was deleted, for example in the UI."""
    run = mlflow.get_run(run_id)
    stages = (run.info.lifecycle_stage, mlflow.get_experiment(run.info.experiment_id).lifecycle_stage)
    return "deleted" in stages


def deleted_error(run_id: str) -> UsageError:
    return UsageError(
        f"run {run_id} or its experiment was deleted; restore it with `mlflow runs restore --run-id {run_id}` "
        "(or `mlflow experiments restore`), then run the same command to continue"
    )


def _open_run(name: str, run_id: str | None, parent_run_id: str | None, tags: dict[str, str]) -> mlflow.ActiveRun:
    """Start or continue the run; raises UsageError if the store does not hold a run that it should.

    The run has its tags from the beginning, so that a run that is left by a killed process can be attributed.
    """
    try:
        if run_id is None:
            run_name = None if launched_run() else name  # `mlflow run --run-name` may have named it
            nested = mlflow.active_run() is not None
            return mlflow.start_run(run_name=run_name, nested=nested, parent_run_id=parent_run_id, tags=tags)
        known = mlflow.get_run(run_id)
        if is_deleted(run_id):
            raise deleted_error(run_id)
        mark_resumed(known)
        mlflow.set_experiment(experiment_id=known.info.experiment_id)  # MLflow refuses a run of another experiment
        continued = mlflow.start_run(run_id=run_id, tags=tags)
        if "failure_reason" in known.data.tags:
            mlflow.delete_tag("failure_reason")  # what ended it the last time is over
        return continued
    except MlflowException as error:
        raise UsageError(
            f"{store.store_address()}: {error.message}; start in the project's folder, set MLFLOW_TRACKING_URI to the store that "
            "holds the run, or begin anew: a search with another --study_name, a prediction with another --output"
        ) from error


def launched_run() -> str | None:
    """The run that `mlflow run` opened for this process, until it is used."""
    return os.environ.get("MLFLOW_RUN_ID")


def mark_resumed(continued: Run) -> None:
    """Mark the run that `mlflow run` created as one that resumes the run `continued`, and use it no further.

    Otherwise MLflow would open it as the next run.
    """
    launched = os.environ.pop("MLFLOW_RUN_ID", None)
    if launched is None or launched == continued.info.run_id:
        return
    name, run_id = continued.info.run_name, continued.info.run_id
    link = f"#/experiments/{continued.info.experiment_id}/runs/{run_id}"
    tags = {"role": "resume", "continued_by": run_id, "mlflow.runName": f"resume {name}"}
    tags["mlflow.note.content"] = f"This start continued the run [{name}]({link})."
    for tag, value in tags.items():
        mlflow.MlflowClient().set_tag(launched, tag, value)


def nested_runs(run_id: str, role: str = "") -> list[Run]:
    """Return the nested runs of a run, oldest first, without deleted ones, optionally of one `role`."""
    nested = store.equals(PARENT, run_id)
    return search_runs(f"{nested} and {store.equals('tags.role', role)}" if role else nested)


def search_runs(filter_string: str, **options: Any) -> list[Run]:
    """Return the runs of all experiments that match, oldest first unless `order_by` says otherwise."""
    options = {"order_by": ["attributes.start_time ASC"], "search_all_experiments": True} | options
    return list(mlflow.search_runs(filter_string=filter_string, output_format="list", **options))


def close_interrupted(run: Run) -> None:
    """End the run of a killed process."""
    client = mlflow.MlflowClient()
    client.set_tag(run.info.run_id, "failure_reason", "interrupted")
    client.set_terminated(run.info.run_id, "KILLED")


def open_experiment(role: str) -> None:
    """Activate the experiment of the environment, or the project's, and describe it unless it has a description.

    A run that `mlflow run` created for this process gets its `role` at once; the runs of killed processes are ended.
    """
    store.connect_store()
    _close_stale_runs()
    client = mlflow.MlflowClient()
    try:
        if run_id := launched_run():
            experiment_id = client.get_run(run_id).info.experiment_id
            client.set_tag(run_id, "role", role)
            client.set_tag(run_id, PROCESS, _this_process())
        elif experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            mlflow.set_experiment(experiment_id=experiment_id)
        else:
            experiment_id = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT).experiment_id
    except MlflowException as error:
        raise UsageError(
            f"{store.store_address()}: {error.message}; run the command in the project's folder, set MLFLOW_TRACKING_URI to the "
            "store that holds the run, or MLFLOW_EXPERIMENT_NAME to an experiment that is not deleted"
        ) from error
    if "mlflow.note.content" not in client.get_experiment(experiment_id).tags:
        client.set_experiment_tag(experiment_id, "mlflow.note.content", EXPERIMENT_DESCRIPTION)


def _this_process() -> str:
    return f"{platform.node()}:{os.getpid()}:{process_start(os.getpid())}"


def process_start(process: int) -> str:
    """Return the start of a process, as boot id and clock ticks since boot; empty if there is no such process.

    The pid is not unique: in a container every command is process 1. Without /proc it has to suffice.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{boot}-{Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    except OSError:
        return ""


def is_alive(identity: str) -> bool:
    """Tell whether a process of this machine, as `this_process` identifies it, is still running."""
    _, number, start = identity.split(":")
    if start:
        return process_start(int(number)) == start
    try:
        os.kill(int(number), 0)  # signal 0 only checks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _close_stale_runs() -> None:
    """End the runs that killed processes of this machine left RUNNING, as KILLED."""
    for left in search_runs(f"tags.{PROCESS} LIKE '%:%' and {store.equals('attributes.status', 'RUNNING')}"):
        process = left.data.tags[PROCESS]
        if process.startswith(f"{platform.node()}:") and not is_alive(process):  # in LIKE, a name's _ is any letter
            close_interrupted(left)


def note_failure(error: Exception) -> None:
    """Record the reason on the run that `mlflow run` created for this process, unless it has one."""
    if (database := store.database_file()) and not database.exists():
        return  # a client would create it
    client, run_id = mlflow.MlflowClient(), os.environ["MLFLOW_RUN_ID"]
    if "failure_reason" not in client.get_run(run_id).data.tags:
        client.set_tag(run_id, "failure_reason", f"{type(error).__name__}: {error}"[:5000])


def log_figure(path: str, draw: Callable[[], "Figure"], **options: Any) -> None:
    """Log a figure to the active run; only warn if it cannot be drawn."""
    try:
        mlflow.log_figure(draw(), path, **options)
    except Exception as error:  # a name or a picture that matplotlib cannot draw
        log.warning("%s: not drawn (%s)", path, error)


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; the first row is its header."""
    head, *body = [f"| {' | '.join(map(escape_cell, row))} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def escape_cell(value: Any) -> str:
    """Return a value as a cell of a Markdown table, with Markdown's special characters escaped."""
    return re.sub(r"([\\`|*_<>])", r"\\\1", " ".join(str(value).split()))


def set_description(text: str) -> None:
    """Set the description of the active run (Markdown)."""
    mlflow.set_tag("mlflow.note.content", text)


def log_params(params: Mapping[str, Any]) -> None:
    """Log `params` to the active run, without those that `mlflow run` has logged."""
    logged = mlflow.get_run(mlflow.active_run().info.run_id).data.params
    mlflow.log_params({name: value for name, value in params.items() if name not in logged})


def check_recorded(params: Mapping[str, Any], metric: str, steps: int) -> None:
    """Raise UsageError unless the active run holds all `params` and `steps` values of `metric`.

    Some of MLflow's settings, such as asynchronous logging, can lose them silently.
    """
    run_id = mlflow.active_run().info.run_id
    missing = sorted(params.keys() - mlflow.get_run(run_id).data.params.keys())
    recorded = len(mlflow.MlflowClient().get_metric_history(run_id, metric))
    if missing or recorded < steps:
        raise UsageError(
            f"run {run_id}: MLflow recorded {recorded} of {steps} values of {metric}, missing parameters: "
            f"{', '.join(missing) or 'none'}; check the MLFLOW_ variables of the environment"
        )


def log_versions() -> None:
    """Log the versions of Python and the packages that the result depends on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    mlflow.log_dict({"python": platform.python_version(), **versions}, "versions.json")


def find_run(run_id: str) -> Run:
    try:
        return mlflow.get_run(run_id)
    except MlflowException as error:
        raise ModelError(
            f"run_id={run_id}: no such run in {store.store_address()}; copy the id from the MLflow UI"
        ) from error
