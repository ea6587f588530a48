"""Notify a URL of an event: a promotion, a refusal, drift.

A POST with JSON: `event`, `text` in words (the field that chat services show), and the facts. MLflow's own webhooks tell of
changes in the registry, such as `model_version_alias.created`; these tell of what came of them.
"""

import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping

log = logging.getLogger(__name__)

# Sent as bearer token; not an option, since options are seen in the list of processes.
TOKEN = "SIGN_DIGITS_NOTIFY_TOKEN"
ATTEMPTS, TIMEOUT = 3, 10.0  # seconds


def notify(url: str, event: str, text: str, facts: Mapping[str, str]) -> None:
    """Tell `url` of an event; only warn if it cannot be reached."""
    body = json.dumps({"event": event, "text": text, **facts}).encode()
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get(TOKEN):
        headers["Authorization"] = f"Bearer {token}"
    problem = ""
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=TIMEOUT):
                return
        except (OSError, ValueError) as error:  # HTTPError and URLError among them
            problem = str(error)
    host = urllib.parse.urlsplit(url).hostname  # the rest may be a secret
    log.warning("%s was not notified of: %s (%s)", host, text, problem)
