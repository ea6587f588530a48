"""The metrics of a server in Prometheus' format, merged over its processes (prometheus_client's multiprocess mode).

Names and units follow https://prometheus.io/docs/practices/naming. The environment variable PROMETHEUS_MULTIPROC_DIR, a folder,
is set before this module is imported: each process keeps its values in files there. Without it they are this process's.
"""

import os
from collections import Counter as Counts

import pandas as pd
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

FOLDER = "PROMETHEUS_MULTIPROC_DIR"

# Of every process that answers requests. What the server itself asks of a model, such as its input example, is not counted.
REQUESTS = Counter("signdigits_requests", "Requests to /invocations", ["status"])
SECONDS = Histogram(
    "signdigits_request_duration_seconds",
    "Time that a version takes for a request, from the end of its body to the reply",
    ["version"],
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
WAITING = Gauge("signdigits_waiting_requests", "Requests waiting for a turn", multiprocess_mode="livesum")
ROWS = Counter("signdigits_rows", "Photographs answered")
PREDICTIONS = Counter("signdigits_predictions", "Photographs by predicted label, without outliers", ["label"])
OUTLIERS = Counter("signdigits_outliers", "Photographs that resemble none of the training images")
SHADOW_ROWS = Counter("signdigits_shadow_rows", "Photographs that the shadow answered, too")
SHADOW_AGREEMENTS = Counter("signdigits_shadow_agreements", "Photographs for which the shadow gave the same label")

# Of the parent process.
VERSION = Gauge("signdigits_served_version", "Version that is served", multiprocess_mode="mostrecent")
CREATED = Gauge(
    "signdigits_served_version_created_timestamp_seconds",
    "Registration of the version that is served",
    multiprocess_mode="mostrecent",
)
IS_CURRENT = Gauge(
    "signdigits_alias_served", "1 if the version of the alias is served, else 0", multiprocess_mode="mostrecent"
)
PENDING = Gauge("signdigits_pending_corrections", "Corrections that wait for a review", multiprocess_mode="mostrecent")
PROMOTIONS = Counter("signdigits_promotions", "Versions that went live")
REFUSALS = Counter("signdigits_refusals", "Versions that were refused")
RESTARTS = Counter("signdigits_restarts", "Processes restarted after they exited or hung")

for status in (200, 400, 413, 503, 504):
    REQUESTS.labels(status)  # from the start, at 0


def count_predictions(predictions: pd.DataFrame) -> None:
    """Count the rows of a reply, by label."""
    labels = Counts(
        label for label, outlier in zip(predictions["label"], predictions["is_outlier"], strict=True) if not outlier
    )
    ROWS.inc(len(predictions))
    OUTLIERS.inc(len(predictions) - labels.total())
    for label, count in labels.items():
        PREDICTIONS.labels(label).inc(count)


def render_metrics() -> bytes:
    """Return the metrics of all processes."""
    if FOLDER not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return generate_latest(registry)


def forget_process(pid: int) -> None:
    """Leave the gauges of a process that has exited out of the sums."""
    if FOLDER in os.environ:
        multiprocess.mark_process_dead(pid)
