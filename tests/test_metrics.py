"""The metrics, and the alerts and the dashboard that are made of them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from signdigits.serving import metrics

DEPLOY = Path(__file__).parents[1] / "deploy"
ALERTS, DASHBOARD = DEPLOY / "prometheus" / "alerts.yml", DEPLOY / "grafana" / "dashboards" / "sign-digits.json"


def exported_names() -> set[str]:
    """Return the names of the samples, those of counters with _total."""
    families = [family for family in REGISTRY.collect() if family.name.startswith("signdigits")]
    names = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    return names | {f"{family.name}_bucket" for family in families if family.type == "histogram"}


@pytest.mark.parametrize("file", [ALERTS, DASHBOARD], ids=lambda file: file.name)
def test_expressions_use_exported_metrics(file: Path) -> None:
    used = set(re.findall(r"\bsigndigits_\w+", file.read_text()))
    assert used
    assert used <= exported_names()


def test_promtool_accepts_alerts() -> None:
    if not shutil.which("promtool"):
        pytest.skip("needs promtool (Debian: apt install prometheus)")
    checked = subprocess.run(["promtool", "check", "rules", str(ALERTS)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "5 rules found" in checked.stdout


def test_promtool_accepts_metrics() -> None:
    if not shutil.which("promtool"):
        pytest.skip("needs promtool (Debian: apt install prometheus)")
    rendered = metrics.render_metrics()
    checked = subprocess.run(["promtool", "check", "metrics"], input=rendered, capture_output=True)
    assert not [line for line in checked.stderr.decode().splitlines() if line.startswith("signdigits")]


def test_dashboard_shows_every_metric() -> None:
    shown = "".join(
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]
    )
    families = [family.name for family in REGISTRY.collect() if family.name.startswith("signdigits")]
    assert [name for name in families if name not in shown] == []
