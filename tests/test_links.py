import json
import subprocess
import sys
from urllib.parse import parse_qs, unquote

import mlflow
import pytest

from signdigits import links
from signdigits.config import LinkParameters
from signdigits.tracking import urls

pytestmark = pytest.mark.slow


def test_no_study_names_next_step(store: str) -> None:
    assert links.list_links(LinkParameters()) == [
        "no study yet: run `mlflow run . -e main`; the UI is at http://127.0.0.1:5000"
    ]


def test_links_lead_to_latest_study(store: str) -> None:
    with mlflow.start_run(tags={"role": "study"}) as study:
        for accuracy in (0.5, 0.9):
            with mlflow.start_run(nested=True, tags={"role": "trial"}):
                mlflow.log_metric("val_accuracy", accuracy)
        with mlflow.start_run(nested=True, tags={"role": "refit"}):
            pass
    everything, latest, trials, registry = links.list_links(LinkParameters(port=5050))
    experiment = study.info.experiment_id
    assert everything.endswith(f"http://127.0.0.1:5050/#/experiments/{experiment}/runs?workflowType=machine_learning")
    assert latest.endswith(f"/runs/{study.info.run_id}?workflowType=machine_learning")
    assert registry.endswith("/#/models/sign-digits")
    query = parse_qs(trials.partition("?")[2])
    best, worst = (mlflow.get_run(run_id) for run_id in json.loads(unquote(query["runs"][0])))
    assert [run.data.metrics["val_accuracy"] for run in (best, worst)] == [0.9, 0.5]
    assert json.loads(query["experiments"][0]) == [experiment]


def test_tracking_server_is_the_ui(monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    mlflow.set_tracking_uri("http://tracking.example:8080/")
    assert urls.ui_url() == "http://tracking.example:8080"
    mlflow.set_tracking_uri(store)


def test_quick_commands_import_little() -> None:
    """Neither TensorFlow, nor, for a rollback, what compares versions."""
    code = (
        "import sys, signdigits.cli, signdigits.links, signdigits.register\n"
        "assert 'signdigits.promotion' not in sys.modules\n"
        "import signdigits.prepare\n"
        "assert 'tensorflow' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
