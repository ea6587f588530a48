"""The addresses in the MLflow UI that matter, and the command that prints them.

    python -m signdigits links
"""

import json
from collections.abc import Sequence
from urllib.parse import quote

import mlflow
from mlflow.entities import Run

from signdigits import register

UI = "http://127.0.0.1:5000"  # where scripts/ui serves a local store
COMPARED = 100  # trials in one link: a browser does not take an address of any length


def base() -> str:
    """Where the UI of the tracking store is: the server itself, or the one that scripts/ui starts."""
    uri = mlflow.get_tracking_uri()
    return uri.rstrip("/") if uri.startswith("http") else UI


def runs(experiment_id: str) -> str:
    """The experiment's runs; a bare link would open MLflow's pages for language models."""
    return f"{base()}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def run(experiment_id: str, run_id: str) -> str:
    return f"{base()}/#/experiments/{experiment_id}/runs/{run_id}"


def compare(experiment_id: str, run_ids: Sequence[str]) -> str:
    """The compare view of some runs, where their parameters are plotted against their metrics."""
    chosen, experiments = quote(json.dumps(list(run_ids)[:COMPARED])), quote(json.dumps([experiment_id]))
    return f"{base()}/#/compare-runs?runs={chosen}&experiments={experiments}"


def model() -> str:
    return f"{base()}/#/models/{register.REGISTERED_MODEL}"


def compare_study(study: Run) -> str:
    """The compare view of a study's finished trials, the best `COMPARED` of them by validation accuracy."""
    trials = mlflow.search_runs(
        [study.info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{study.info.run_id}' and tags.role = 'trial' and attributes.status = 'FINISHED'",
        order_by=["metrics.val_accuracy DESC"],
        max_results=COMPARED,
        output_format="list",
    )
    return compare(study.info.experiment_id, [trial.info.run_id for trial in trials])


def latest() -> list[str]:
    """A line for each address that matters after the latest study, or what to do if there is none."""
    studies = mlflow.search_runs(
        search_all_experiments=True,
        filter_string="tags.role = 'study'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
        output_format="list",
    )
    if not studies:
        return [f"no study yet: run `mlflow run . -e main`; the UI is at {base()}"]
    info = studies[0].info
    return [
        f"all runs:       {runs(info.experiment_id)}",
        f"latest study:   {run(info.experiment_id, info.run_id)}",
        f"its trials:     {compare_study(studies[0])}",
        f"the registry:   {model()}",
    ]
