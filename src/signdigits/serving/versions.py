"""The versions that a process serves: the live one, a shadow, and the switch to others.

The server's parent process looks at the registry and writes a file per version to serve, `live` and `shadow`; each process
that answers requests watches these files, loads what they name, and switches between two requests.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE

from signdigits.files import atomic_file
from signdigits.serving import metrics
from signdigits.serving.options import LIVE, PROCESSES, SHADOW, ServeParameters
from signdigits.serving.shadow import Shadow
from signdigits.serving.version import INVOCATION, Publication, Version, VersionFailed

log = logging.getLogger(__name__)

WATCH_INTERVAL = 0.1  # seconds between two looks at the files
HEALTH_INTERVAL = 2.0  # seconds for which an answer to the input example proves health


class Delegate:
    """The model of MLflow's scoring server: the version of the request that it works on."""

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow

    @property
    def metadata(self) -> Any:
        return INVOCATION.get().served.model.metadata

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        invocation = INVOCATION.get()
        served = invocation.served
        try:
            predictions = served.predict(data, params, invocation)
        except MlflowException as error:
            if served.owns(error):
                invocation.problem = error.message
                raise
            columns = ", ".join(self.metadata.get_input_schema().input_names())
            invocation.problem = f"wrong columns, types or params; send rows with the column {columns} of base64 text"
            raise MlflowException("", INVALID_PARAMETER_VALUE) from error
        except Exception as error:
            log.warning("version %s fails: %s: %s", served.number, type(error).__name__, error)
            invocation.problem = f"the model failed ({type(error).__name__}); the server's log says why"
            raise MlflowException("", INTERNAL_ERROR) from error
        if isinstance(predictions, pd.DataFrame) and "is_outlier" in predictions:
            metrics.count_predictions(predictions)
            self.shadow.offer(data, params, predictions, invocation)
        return predictions


class Versions:
    """The live version of a process, and its shadow; they follow the files that the parent process writes."""

    def __init__(self, home: Path, parameters: ServeParameters) -> None:
        self.home, self.supervised, self.timeout = home, parameters.supervise, parameters.timeout
        self.live: Version
        self.shadow = Shadow(parameters.shadow_share)
        self.failed: dict[str, Publication] = {}
        self.health: asyncio.Task[str] | None = None

    @contextlib.asynccontextmanager
    async def follow(self) -> AsyncIterator[None]:
        """Load the live version, and follow the files until the block is left. Raises VersionFailed if unsupervised."""
        while not await self.refresh():
            await asyncio.sleep(WATCH_INTERVAL)
        following = asyncio.create_task(self.watch(os.getppid()))
        try:
            yield
        finally:
            following.cancel()

    async def watch(self, parent: int) -> None:
        """Follow the files; end the process if its parent has ended, or if the model has not answered for `timeout` seconds."""
        healthy = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            await self.refresh()
            if await self.is_healthy():
                healthy = time.monotonic()
            elif time.monotonic() - healthy > self.timeout:
                log.error("version %s has not answered for %d seconds: exiting", self.live.number, self.timeout)
                os._exit(1)  # its threads do not end
            if self.supervised and os.getppid() != parent:
                log.warning("the parent process is gone: stopping")
                signal.raise_signal(signal.SIGTERM)
                return

    async def refresh(self) -> bool:
        """Switch to the versions that the files name, and tell whether there is a live one."""
        present = getattr(self, "live", None)
        if live := await self.load(LIVE, present):
            self.live = live
            for name in live.class_names:
                metrics.PREDICTIONS.labels(name)  # from the start, at 0
            self.report(live.number)
        if shadow := await self.load(SHADOW, self.shadow.version):
            self.shadow.replace(shadow)
        return hasattr(self, "live")

    async def load(self, name: str, present: Version | None) -> Version | None:
        """Load what a file names, unless it is present, or has failed. The present version answers meanwhile."""
        wanted = Publication.read(self.home / name)
        if wanted is None or wanted == self.failed.get(name) or (present and wanted == present.publication):
            return None
        try:
            return await asyncio.to_thread(Version, wanted)
        except VersionFailed as failure:
            if not self.supervised:
                raise
            log.warning("version %s: %s", wanted.version, failure)
            self.failed[name] = wanted
            if name == LIVE:
                self.report(f"{wanted.version}: {failure}")
            return None

    def report(self, text: str) -> None:
        """Tell the parent process which version this one serves, or why it does not."""
        with atomic_file(self.home / PROCESSES / str(os.getpid())) as partial_file:
            partial_file.write_text(text)

    async def is_healthy(self) -> bool:
        """Tell whether the model has answered its input example within the last seconds, or does so now."""
        live = self.live
        if time.monotonic() - live.answered > HEALTH_INTERVAL:
            if self.health is None or self.health.done():
                self.health = asyncio.create_task(asyncio.to_thread(live.find_problem))
            await asyncio.wait((self.health,), timeout=HEALTH_INTERVAL / 2)
        return time.monotonic() - live.answered <= HEALTH_INTERVAL
