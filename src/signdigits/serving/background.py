"""A thread for calls that may take minutes."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundThread:
    """A thread for calls that may block on the registry, made in order."""

    def __init__(self) -> None:
        self.calls = queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]]()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        future = Future[Result]()
        self.calls.put((future, function, arguments))
        return future

    def _run(self) -> None:
        while True:
            future, function, arguments = self.calls.get()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
