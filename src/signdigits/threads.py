"""A parallel map over threads."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK_SIZE = 1024  # items submitted ahead of the consumer: bounds the memory


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item], title: str) -> Iterator[Result]:
    """Yield `function` of each item, in order, computed by one thread per CPU; with a progress bar on a terminal.

    Reading, decoding, resizing and hashing release the GIL.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads, tqdm(total=len(items), desc=title, disable=None) as bar:
        for start in range(0, len(items), CHUNK_SIZE):
            for result in threads.map(function, items[start : start + CHUNK_SIZE]):
                bar.update()
                yield result
