"""The shadow: another version that answers a copy of some requests; its replies are compared, and discarded."""

import contextlib
import logging
import os
import queue
import random
import sys
import threading
from dataclasses import replace
from typing import Any

import pandas as pd

from signdigits.serving import metrics
from signdigits.serving.version import Invocation, Version

log = logging.getLogger(__name__)

WAITING = 8  # copies of requests; the next one is dropped
NICENESS = 10  # of the thread: the live version comes first


class Shadow:
    """A version in a thread of its own, at a low priority, behind a bounded queue."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.version: Version | None = None
        self.copies = queue.Queue[tuple[Any, Any, pd.DataFrame, Invocation]](WAITING)

    def replace(self, version: Version) -> None:
        if self.version is None:
            threading.Thread(target=self.work, daemon=True).start()
        self.version = version

    def offer(self, data: Any, params: Any, predictions: pd.DataFrame, invocation: Invocation) -> None:
        """Take a copy of a request and its reply, by chance and if there is room."""
        if self.version and random.random() < self.share:
            with contextlib.suppress(queue.Full):
                self.copies.put_nowait((data, params, predictions, invocation))

    def work(self) -> None:
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            data, params, predictions, asked = self.copies.get()
            version = self.version
            assert version is not None
            try:
                answers = version.predict(data, params, replace(asked, served=version, cancelled=threading.Event()))
                metrics.SHADOW_ROWS.inc(len(answers))
                metrics.SHADOW_AGREEMENTS.inc(int((answers["label"].array == predictions["label"].array).sum()))
            except Exception as error:
                log.warning("shadow, version %s: %s: %s", version.number, type(error).__name__, error)
