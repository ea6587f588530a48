"""Ray: an existing cluster, or a temporary one on this machine."""

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Protocol

from signdigits.errors import ClusterError


class ClusterParameters(Protocol):
    """The number of worker processes and their cluster: parameters of a search or a batch prediction."""

    @property
    def workers(self) -> int: ...

    @property
    def ray_address(self) -> str: ...


def is_distributed(parameters: ClusterParameters) -> bool:
    return parameters.workers > 1 or bool(parameters.ray_address)


def describe_cluster(parameters: ClusterParameters) -> str:
    """Return the given parameter as messages name it."""
    return f"ray_address={parameters.ray_address}" if parameters.ray_address else f"workers={parameters.workers}"


@contextlib.contextmanager
def connect_ray(parameters: ClusterParameters, cpus: int) -> Iterator[None]:
    """Connect to the cluster at `ray_address`, or start one on this machine for the duration of the block.

    Raises ClusterError if that fails.
    """
    try:
        import ray
    except ImportError as error:
        raise ClusterError(f"workers={parameters.workers}: needs Ray; uv pip install -e '.[cluster]'") from error
    here = {
        "address": "local",  # else Ray would look for one that somebody has started on this machine, and want its token
        "num_cpus": parameters.workers * cpus, "include_dashboard": False, "_node_ip_address": "127.0.0.1",
    }  # fmt: skip
    place = {"address": parameters.ray_address} if parameters.ray_address else here
    interrupted = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**place, log_to_driver=False, logging_level=logging.ERROR)
        signal.signal(signal.SIGTERM, interrupted)  # Ray takes it for itself, and ends the process by it
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ClusterError(
            f"{describe_cluster(parameters)}: {reason}; is it up, and is its token in RAY_AUTH_TOKEN_PATH?"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
