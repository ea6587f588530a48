"""How far two tables of answers lie apart, column by column, as evidently measures and draws it.

Distances, not p-values: those cry the louder the longer the window is. Of numbers it is Wasserstein's distance as a
multiple of the reference's standard deviation, of labels Jensen and Shannon's, 0 to 1.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pandas as pd
import pandas.core.dtypes.common as pandas_types

from signdigits.config import MonitorParameters
from signdigits.errors import ParameterError

MISSING = "infer_dtype_from_object"


@dataclass(frozen=True)
class Drift:
    """The distance of every column, and those from which on it counts as drifted."""

    distances: dict[str, float]
    limits: dict[str, float]

    @property
    def drifted(self) -> list[str]:
        return [name for name, distance in self.distances.items() if distance >= self.limits[name]]

    @property
    def share(self) -> float:
        return len(self.drifted) / len(self.distances)


def measure_drift(reference: pd.DataFrame, window: pd.DataFrame, parameters: MonitorParameters, report: Path) -> Drift:
    """Compare two tables of the same columns, numbers but for `label`, and write evidently's report (HTML).

    Raises ParameterError if evidently is not installed.
    """
    numbers = [str(name) for name in reference if name != "label"]
    limits = dict.fromkeys(numbers, parameters.drift_distance) | {"label": parameters.drift_labels}
    with without_notice():
        evidently = load()
        from evidently.presets import DataDriftPreset

        columns = evidently.DataDefinition(numerical_columns=numbers, categorical_columns=["label"])
        preset = DataDriftPreset(
            drift_share=parameters.drift_share,
            num_method="wasserstein",
            num_threshold=parameters.drift_distance,
            cat_method="jensenshannon",
            cat_threshold=parameters.drift_labels,
        )
        then, now = (evidently.Dataset.from_pandas(table, data_definition=columns) for table in (reference, window))
        found = evidently.Report([preset]).run(now, then)
        found.save_html(str(report))
    told = {metric["config"].get("column"): metric["value"] for metric in found.dict()["metrics"]}
    return Drift({name: float(told[name]) for name in limits}, limits)


def load() -> ModuleType:
    """evidently, which reports on its use unless told not to.

    Version 0.7.23 imports a private name that pandas 3.1 no longer has, for a check of column types which is not made
    here: it is given the name for the time of the import.
    """
    os.environ["DO_NOT_TRACK"] = "true"
    try:
        with stand_in():
            import evidently
    except ModuleNotFoundError as error:
        raise ParameterError("monitor: needs evidently; uv pip install -e '.[monitor]'") from error
    return evidently


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    if hasattr(pandas_types, MISSING):
        yield
        return
    setattr(pandas_types, MISSING, None)
    try:
        yield
    finally:
        delattr(pandas_types, MISSING)


@contextlib.contextmanager
def without_notice() -> Iterator[None]:
    """Leave out what evidently and plotly say to their developers: names that NumPy and pandas are about to drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
