"""The addresses in the MLflow UI that matter, and the command that prints them.

python -m signdigits links
"""

import json
import re
from urllib.parse import quote

import mlflow
from mlflow.entities import Run

from signdigits import register
from signdigits.config import LinkParameters

MODE = "workflowType=machine_learning"  # a bare link opens the pages for language models
COMPARED = 100  # trials in one link: a browser does not take an address of any length


def ui_url(parameters: LinkParameters | None = None) -> str:
    """Where the UI of the tracking store is: the server itself, or the one that scripts/ui starts for a local store."""
    uri = mlflow.get_tracking_uri()
    port = (parameters or LinkParameters()).port
    return re.sub(r"//[^/@]*@", "//", uri).rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{port}"


def runs_url(ui: str, experiment_id: str) -> str:
    return f"{ui}/#/experiments/{experiment_id}/runs?{MODE}"


def run_url(ui: str, run: Run) -> str:
    return f"{ui}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?{MODE}"


def compare_url(ui: str, study: Run) -> str:
    """The compare view of a study's finished trials, the most accurate of them if there are many.

    It plots their parameters against their metrics.
    """
    trials = mlflow.search_runs(
        [study.info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{study.info.run_id}' and tags.role = 'trial' and attributes.status = 'FINISHED'",
        order_by=["metrics.val_accuracy DESC"],
        max_results=COMPARED,
        output_format="list",
    )
    chosen = quote(json.dumps([trial.info.run_id for trial in trials], separators=(",", ":")))
    return f"{ui}/#/compare-runs?runs={chosen}&experiments={quote(json.dumps([study.info.experiment_id]))}&{MODE}"


def model_url(ui: str) -> str:
    return f"{ui}/#/models/{register.REGISTERED_MODEL}"


def failed_run_url() -> str:
    """The address of the run that this process opened last."""
    last = mlflow.last_active_run()
    return run_url(ui_url(), last) if last else "none"


def list_links(parameters: LinkParameters) -> list[str]:
    """A line for each address that matters after the latest study, or what to do if there is none."""
    studies = mlflow.search_runs(
        search_all_experiments=True,
        filter_string="tags.role = 'study'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
        output_format="list",
    )
    base = ui_url(parameters)
    if not studies:
        return [f"no study yet: run `mlflow run . -e main`; the UI is at {base}"]
    study = studies[0]
    return [
        f"all runs        {runs_url(base, study.info.experiment_id)}",
        f"latest study    {run_url(base, study)}",
        f"its trials      {compare_url(base, study)}",
        f"the registry    {model_url(base)}",
    ]
