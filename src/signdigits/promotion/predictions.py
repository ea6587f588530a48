"""The predictions of challenger and champion on the same test images.

Where the champion was tested on other images, its own artifact predicts the challenger's. Those that it may have been trained
on are left out: a model knows its training images.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from signdigits import files
from signdigits.batch.scoring import Scorer
from signdigits.config import SourceParameters
from signdigits.data.dataset import Dataset, scan_dataset
from signdigits.data.names import normalize_text
from signdigits.errors import DataError, IncomparableError, ModelError
from signdigits.tracking import runs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictions:
    """Two tables of predictions of the same test images.

    `known` holds the paths of further test images, left out because the champion may have been trained on them; None if its
    training images are not recorded.
    """

    challenger: pd.DataFrame
    champion: pd.DataFrame
    description: str
    known: frozenset[str] | None = frozenset()

    @property
    def n_known(self) -> str:
        return "unknown" if self.known is None else str(len(self.known))

    def to_table(self) -> pd.DataFrame:
        """Return a row per test image of the challenger: path, label and both predictions; none for those left out."""
        table = self.challenger[["path", "label", "prediction"]].rename(columns={"prediction": "challenger"})
        table["champion"] = table["path"].map(self.champion.set_index("path")["prediction"])
        table["champion_trained_on"] = "unknown" if self.known is None else False
        left_out = pd.DataFrame({"path": sorted(self.known or ())}).assign(champion_trained_on=True)
        return pd.concat([table, left_out])


def collect_predictions(version: ModelVersion, champion: ModelVersion) -> Predictions:
    """Return the predictions of both versions on the test images of `version`, the challenger.

    Raises IncomparableError if the classes differ or the champion was trained on all of the images, and ModelError if
    predictions, photographs or the champion's artifact cannot be read.
    """
    challenger = read_predictions(version)
    if champion.tags.get("test_digest") == version.tags["test_digest"]:
        return Predictions(challenger, read_predictions(champion), f"the same {len(challenger)} images")
    scorer = _load_scorer(champion)
    _check_classes(scorer, challenger, champion)
    dataset = _scan_photographs(version, set(challenger["path"]))
    fitted = find_fitted_checksums(champion.run_id)
    known = None if fitted is None else frozenset(p.path for p in dataset.photographs if p.checksum in fitted)
    unseen = challenger[~challenger["path"].isin(known or ())].reset_index(drop=True)
    if unseen.empty:
        raise IncomparableError(
            f"version {champion.version} was trained on all of the {len(challenger)} test images, and cannot be compared; "
            "--force true assigns the alias anyway"
        )
    photographs = {photograph.path: photograph for photograph in dataset.photographs}
    predicted = _predict_images(scorer, unseen, lambda path: dataset.read(photographs[path]))
    return Predictions(unseen, predicted, _describe_images(champion, unseen, known), known)


def read_predictions(version: ModelVersion) -> pd.DataFrame:
    """Return the predictions that `evaluate` recorded for a version, a row per test image."""
    run_id = version.tags.get("test_run_id", "")
    try:
        text = mlflow.artifacts.load_text(f"runs:/{run_id}/{runs.PREDICTIONS}")
    except (MlflowException, OSError) as error:
        raise ModelError(
            f"version {version.version}: its predictions are missing from run {run_id!r}; evaluate it again "
            f"(python -m signdigits evaluate --model_uri {version.source}), or pass --force true"
        ) from error
    return files.read_csv(text, files.is_probability)


def list_classes(table: pd.DataFrame) -> list[str]:
    """Return the sorted class names of a table of predictions, from its columns `p(CLASS)`."""
    return sorted(column[2:-1] for column in map(str, table) if column.startswith("p("))


def find_fitted_checksums(run_id: str) -> set[str] | None:
    """Return the SHA-256 of the photographs that the model of a run was trained or calibrated on; None if not recorded.

    The run has the table of files, or the study that its refit belongs to.
    """
    try:
        run = mlflow.get_run(run_id)
    except MlflowException:  # deleted for good, or the version was registered without a run
        return None
    for run_id in (run.info.run_id, run.data.tags.get("mlflow.parentRunId")):
        try:
            text = mlflow.artifacts.load_text(f"runs:/{run_id}/{runs.FILES}")
        except (MlflowException, OSError):
            continue
        table = files.read_csv(text)
        return set(table.loc[table["part"] != "testing", "sha256"])
    return None


def _load_scorer(champion: ModelVersion) -> Scorer:
    try:
        return Scorer(f"models:/{champion.name}/{champion.version}")
    except (MlflowException, OSError, AttributeError) as error:  # AttributeError: a model of another kind
        raise ModelError(
            f"version {champion.version}: its model cannot be loaded ({error}); pass --force true to replace it without a "
            "comparison"
        ) from error


def _check_classes(scorer: Scorer, challenger: pd.DataFrame, champion: ModelVersion) -> None:
    """Raise IncomparableError if the champion knows other classes than the challenger."""
    names, others = list_classes(challenger), sorted(scorer.class_names)
    if {*map(normalize_text, names)} != {*map(normalize_text, others)}:
        raise IncomparableError(
            f"version {champion.version} knows other classes ({', '.join(others)}; not {', '.join(names)}), and cannot be "
            "compared; --model_name NAME gives these classes a champion of their own, --force true assigns the alias anyway"
        )


def _scan_photographs(version: ModelVersion, paths: set[str]) -> Dataset:
    """Return the test images of a version, which lie at `paths` in the folders that its evaluation recorded.

    Raises ModelError if one is missing or has changed.
    """
    try:
        inputs = mlflow.get_run(version.tags["test_run_id"]).inputs.dataset_inputs
        (tested,) = [item for item in inputs if any(tag.value == "testing" for tag in item.tags)]
        data = mlflow.data.get_source(tested).to_dict()["uri"]
        dataset = scan_dataset(SourceParameters(data=data, skip_unreadable=True))
    except (MlflowException, ValueError, DataError) as error:
        raise ModelError(
            f"version {version.version}: its test images cannot be read ({error}); evaluate it again (python -m signdigits "
            f"evaluate --data FOLDER --model_uri {version.source}), or pass --force true"
        ) from error
    chosen = replace(dataset, photographs=tuple(p for p in dataset.photographs if p.path in paths))
    if chosen.digest != version.tags["test_digest"]:
        raise ModelError(
            f"data={data}: test images of version {version.version} are missing or have changed; restore them, or pass "
            "--force true"
        )
    return chosen


def _predict_images(scorer: Scorer, challenger: pd.DataFrame, read: Callable[[str], bytes]) -> pd.DataFrame:
    """Return the champion's predictions; a photograph that it refuses is wrong, and all its classes equally probable."""
    log.info("predicting %d test images of the challenger with the champion", len(challenger))
    table = scorer.score_photographs(list(challenger["path"]), read)
    probabilities = [f"p({name})" for name in scorer.class_names]
    table.loc[table["label"].isna(), probabilities] = 1 / len(probabilities)
    spellings = {normalize_text(name): name for name in list_classes(challenger)}
    classes = {name: spellings.get(normalize_text(name), name) for name in scorer.class_names}
    table["prediction"] = table["label"].map(classes)
    table = table.rename(columns={f"p({name})": f"p({spelling})" for name, spelling in classes.items()})
    return table.assign(path=challenger["path"], label=challenger["label"])


def _describe_images(champion: ModelVersion, unseen: pd.DataFrame, known: frozenset[str] | None) -> str:
    tags: Mapping[str, str] = champion.tags
    tested = f"tested on {tags['dataset']}, split {tags['split']}" if "test_digest" in tags else "never tested"
    if known is None:
        overlap = "whether it was trained on some of them is unknown"
    elif known:
        overlap = f"{len(known)} more are left out, because it was trained on them"
    else:
        overlap = "it was trained on none of them"
    return f"{len(unseen)} test images of the challenger, about which the champion ({tested}) was asked: {overlap}"
