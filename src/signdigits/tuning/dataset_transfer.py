"""Photographs for workers on other machines: from the same path, or from the artifacts of the study's run."""

import platform
from dataclasses import replace
from pathlib import Path

from signdigits.config import DataParameters
from signdigits.data import lineage, loading, sources
from signdigits.data.loading import Data
from signdigits.errors import DataError


def upload_photographs(loaded: Data, run_id: str) -> None:
    """Log the photographs to the study's run, unless they are logged or embedded."""
    if loaded.parameters.data != sources.HANDWRITTEN_DIGITS:
        lineage.log_photographs(loaded.dataset, run_id)


def load_study_data(parameters: DataParameters, digest: str, run_id: str) -> Data:
    """Load the photographs of the study `run_id` on this machine.

    Raises DataError if their digest differs from the study's.
    """
    here = parameters.data == sources.HANDWRITTEN_DIGITS or Path(parameters.data).is_dir()
    source = parameters if here else replace(parameters, data=f"runs:/{run_id}")
    loaded = loading.load_data(source)
    if loaded.split.digest != digest:
        raise DataError(
            f"{platform.node()}: {source.data} differs from the study's photographs (digest {loaded.split.digest}, "
            f"not {digest}); copy the same photographs to every machine, or remove that folder to download them"
        )
    return loaded
