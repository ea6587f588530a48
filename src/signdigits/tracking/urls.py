"""Links to the pages of the MLflow UI."""

import json
import re
import shlex
import tempfile
from pathlib import Path
from urllib.parse import quote

import mlflow
from mlflow.entities import Run

from signdigits.config import LinkParameters
from signdigits.tracking import runs, store

MODE = "workflowType=machine_learning"  # without it the UI shows its pages for language models
MAX_COMPARED = 100  # trials in one link; browsers limit the length of a URL


def ui_url(port: int = LinkParameters().port) -> str:
    """Return the URL of the UI: the tracking server's, or for a local store the one that scripts/ui serves at `port`."""
    uri = mlflow.get_tracking_uri()
    return re.sub(r"//[^/@]*@", "//", uri).rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{port}"


def script_command(name: str) -> str:
    """Return the command of a script of the project for the tracking store; empty if the project's folder will not last."""
    script = Path("scripts", name)
    if script.is_file():
        return str(script)
    project = Path(__file__).parents[3]
    if is_temporary(project) or not (project / script).is_file():
        return ""
    return f"MLFLOW_TRACKING_URI={shlex.quote(store.store_address())} {shlex.quote(str(project / script))}"


def is_temporary(folder: Path) -> bool:
    """Tell whether a folder is a temporary clone, as `mlflow run` makes one of a git address."""
    is_inside = folder.resolve().parent == Path(tempfile.gettempdir()).resolve()
    return is_inside and folder.name.startswith(tempfile.gettempprefix())


def ui_command() -> str:
    """Return the command that starts the UI of the tracking store."""
    return script_command("ui") or f"mlflow ui --backend-store-uri {shlex.quote(store.store_address())}"


def experiment_url(ui: str, experiment_id: str) -> str:
    return f"{ui}/#/experiments/{experiment_id}/runs?{MODE}"


def run_url(ui: str, run: Run) -> str:
    return f"{ui}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?{MODE}"


def compare_url(ui: str, study: Run) -> str:
    """Return the link to the compare view of a study's finished trials, the most accurate ones if there are many."""
    trials = runs.search_runs(
        " and ".join(
            [
                store.equals(runs.PARENT, study.info.run_id),
                store.equals("tags.role", "trial"),
                store.equals("attributes.status", "FINISHED"),
            ]
        ),
        order_by=["metrics.val_accuracy DESC"],
        max_results=MAX_COMPARED,
    )
    chosen = quote(json.dumps([trial.info.run_id for trial in trials], separators=(",", ":")))
    return f"{ui}/#/compare-runs?runs={chosen}&experiments={quote(json.dumps([study.info.experiment_id]))}&{MODE}"


def model_url(ui: str, model_name: str) -> str:
    return f"{ui}/#/models/{quote(model_name)}"


def last_run_url() -> str:
    """Return the link to the run that this process opened last."""
    last = mlflow.last_active_run()
    return run_url(ui_url(), last) if last else "none"
