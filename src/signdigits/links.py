"""Print links to the latest study in the MLflow UI.

python -m signdigits links
"""

import logging

from signdigits.config import LinkParameters
from signdigits.tracking import runs, store, urls

log = logging.getLogger(__name__)


def print_links(parameters: LinkParameters) -> None:
    for line in list_links(parameters):
        log.info("%s", line)


def list_links(parameters: LinkParameters) -> list[str]:
    """Return one line per link: all runs, the latest study, its trials and the registry; a hint if there is no study."""
    ui = urls.ui_url(parameters.port)
    studies = runs.search_runs(
        store.equals("tags.role", "study"), order_by=["attributes.start_time DESC"], max_results=1
    )
    if not studies:
        return [f"no study yet: run `mlflow run . -e main`; the UI is at {ui}"]
    study = studies[0]
    return [
        f"all runs        {urls.experiment_url(ui, study.info.experiment_id)}",
        f"latest study    {urls.run_url(ui, study)}",
        f"its trials      {urls.compare_url(ui, study)}",
        f"the registry    {urls.model_url(ui, parameters.model_name)}",
    ]
