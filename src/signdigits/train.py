"""Train the network once.

python -m signdigits train --data FOLDER --initial_learning_rate 0.005 --decay_rate 0.96 --epochs 8
mlflow run . -e train -P epochs=8
"""

import logging
from dataclasses import asdict, replace

import mlflow

from signdigits import files
from signdigits.config import Hyperparameters
from signdigits.data import lineage, quality
from signdigits.data.loading import Data, load_data
from signdigits.errors import UsageError
from signdigits.model import training, transfer
from signdigits.packaging import package
from signdigits.tracking import runs

log = logging.getLogger(__name__)


def train(data: Data, hyperparameters: Hyperparameters) -> str:
    """Fit on the training images in a run of its own, log a model that can be served, and return the run's id.

    Raises TrainingDiverged if the loss becomes NaN or infinite; the run is then FAILED, with the reason as a tag.
    """
    if data.split.folds and data.parameters.split != "auto":
        raise UsageError("split=folds: one training has no folds; pass --split stratified, or use main")
    if data.split.folds:
        data = load_data(replace(data.parameters, split="stratified"))
    with runs.start_run("train", "train") as run:
        runs.log_params(asdict(data.parameters) | asdict(hyperparameters))
        lineage.log_data(data, parts=("training", "validation"))
        mlflow.log_text(files.to_csv(quality.tabulate_files(data)), runs.FILES)
        if data.parameters.log_data:
            lineage.log_photographs(data.dataset, run.info.run_id)
        runs.log_versions()
        data = transfer.freeze_features(data, hyperparameters)
        network = training.new_network(data, data.training, hyperparameters)
        fitted = training.fit_network(network, data.training, data.validation, hyperparameters)
        training.log_curves(fitted)
        runs.check_recorded(asdict(hyperparameters), "val_accuracy", hyperparameters.epochs)
        calibration = training.calibrate_network(fitted, data.training, data.validation)
        mlflow.log_metric("temperature", calibration.temperature)
        package.log_model(
            fitted.in_float32(data.start), calibration, data, {"val_accuracy": fitted.last("val_accuracy")}
        )
        score = [fitted.last("val_loss"), fitted.last("val_accuracy")]
        log.info("Validation score [loss, accuracy]: %s", [round(value, 4) for value in score])
        log.info("run %s; score it on the test images with: python -m signdigits evaluate --data %s --run_id %s",
            run.info.run_id, data.parameters.data, run.info.run_id)  # fmt: skip
        return run.info.run_id
