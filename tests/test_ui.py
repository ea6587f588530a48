"""The MLflow UI of a finished study in Chromium, by the links of `python -m signdigits links`."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from signdigits import links
from signdigits.config import LinkParameters

from .conftest import answers, copy_stores, free_port, wait_until

pytest.importorskip("playwright", reason="needs the extra .[browser]")

from playwright.sync_api import Browser, expect

from . import browser

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not browser.CHROMIUM.exists(), reason="needs Chromium")]

SEARCHED = {"decay_rate", "initial_learning_rate", "epochs"}


@dataclass(frozen=True)
class Finished:
    """A study, refitted and registered; its pictures; and the addresses that the UI shows it at."""

    study: Run
    pictures: list[str]
    runs: str
    latest: str
    trials: str
    registry: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, finished_job: Path) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("ui")
    port = free_port()
    with copy_stores(finished_job, folder) as store:
        found = mlflow.search_runs(filter_string="tags.role = 'study'", output_format="list")[0]
        kept = [item.path for item in mlflow.MlflowClient().list_artifacts(found.info.run_id, "study")]
        pictures = [Path(path).name for path in kept if path.endswith(".png")]
        addresses = [line.rpartition(" ")[2] for line in links.list_links(LinkParameters(port=port))]
        line = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--workers", "1"]
        log = (folder / "ui.log").open("w")
        server = subprocess.Popen([*line, "--port", str(port)], stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"))
            yield Finished(found, pictures, *addresses)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)
            log.close()


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser.chromium() as opened:
        yield opened


def test_trials_are_nested_under_study(window: Browser, finished: Finished) -> None:
    nested = [
        "ensemble, seeds 1337, 1338",
        "refit, seed 1338",
        "refit, seed 1337",
        "refit, seed 1337",
        "trial-001",
        "trial-000",
    ]
    study = finished.study.info.run_name
    with browser.opened(window, finished.runs) as page:
        names = page.locator('[role="gridcell"] a[href*="/runs/"]')
        expect(names).to_have_text([study])
        browser.expand(page, finished.study.info.run_id)
        expect(names).to_have_text([study, *nested])


def test_compare_view_plots_searched_parameters(window: Browser, finished: Finished) -> None:
    with browser.opened(window, finished.trials) as page:
        expect(page.get_by_role("heading", name="Comparing 2 Runs from 1 Experiment")).to_be_visible()
        axes = browser.plot(page, "val_accuracy", sorted(SEARCHED))
        assert {*SEARCHED, "val_accuracy"} == set(axes.all_text_contents())


def test_study_run_shows_plots(window: Browser, finished: Finished) -> None:
    assert len(finished.pictures) >= 4
    with browser.opened(window, finished.latest) as page:
        page.get_by_role("tab", name="Artifacts").click()
        page.get_by_text("study", exact=True).click()
        for name in finished.pictures:
            page.get_by_text(name, exact=True).first.click()
            picture = page.get_by_role("img", name=f"study/{name}")
            expect(picture).to_be_visible()
            assert picture.evaluate("image => image.naturalWidth") > 100


def test_registry_shows_alias(window: Browser, finished: Finished) -> None:
    with browser.opened(window, finished.registry) as page:
        version = page.get_by_role("row").filter(has=page.get_by_role("link", name="Version 1"))
        expect(version).to_contain_text("champion")
        version.get_by_role("link", name="Version 1").click()
        expect(page.get_by_role("main")).to_contain_text("champion")
