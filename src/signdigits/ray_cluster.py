"""Ray: an existing cluster, or a temporary one on this machine."""

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Protocol

from signdigits.errors import UsageError, install_hint


class ClusterParameters(Protocol):
    """The number of worker processes and their cluster: parameters of a search or a batch prediction."""

    @property
    def workers(self) -> int: ...

    @property
    def ray_address(self) -> str: ...


def is_distributed(parameters: ClusterParameters) -> bool:
    return parameters.workers > 1 or bool(parameters.ray_address)


def describe_cluster(parameters: ClusterParameters) -> str:
    """Return the name and value of the cluster's parameter, for messages."""
    return f"ray_address={parameters.ray_address}" if parameters.ray_address else f"workers={parameters.workers}"


@contextlib.contextmanager
def connect_ray(parameters: ClusterParameters, cpus: int) -> Iterator[None]:
    """Connect to the cluster at `ray_address`, or start one on this machine for the duration of the block.

    Raises UsageError if that fails.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"{describe_cluster(parameters)}: needs Ray; {install_hint('cluster')}") from error
    local_options = {
        "address": "local",  # else Ray would look for a cluster already running on this machine, and require its token
        "num_cpus": parameters.workers * cpus, "include_dashboard": False, "_node_ip_address": "127.0.0.1",
    }  # fmt: skip
    options = {"address": parameters.ray_address} if parameters.ray_address else local_options
    previous_handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        signal.signal(signal.SIGTERM, previous_handler)  # Ray installs its own handler, which ends the process
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{describe_cluster(parameters)}: {reason}; check that it is up and that its token is in RAY_AUTH_TOKEN_PATH"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
