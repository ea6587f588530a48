"""Every parameter of the project, declared once: its name, default, limits and help.

The command line, the search spaces (tuning/space.py), docs/parameters.md and what MLflow records take their names and
defaults from here. The options of the server are in serving/options.py.
"""

import math
import re
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from signdigits.errors import UsageError, escape_undecodable

Number = int | float
Value = Number | str


DATA_SETS = HANDWRITTEN_DIGITS, SIGN_LANGUAGE_DIGITS = ("handwritten-digits", "sign-language-digits")
MODEL_NAME = "sign-digits"
SERVED_MODEL = f"models:/{MODEL_NAME}@champion"
# MLflow's own rule, which MLflow checks only when the alias is assigned, at the end of the job.
ALIAS = (r"(?![vV][0-9]+$|latest$)[A-Za-z0-9_-]{1,255}", "letters, digits, - and _, but not latest or v1, v2")
URL = (r"|https?://\S+", "an http or https URL")
FOLDER = (r"(?s).+", "a folder")


def parameter(
    default: Any,
    help: str,
    *,
    low: Number | None = None,
    above: Number | None = None,
    high: Number | None = None,
    choices: tuple[str, ...] = (),
    pattern: tuple[str, str] = (".*", ""),
    auto: bool = False,
    is_input: bool = False,
) -> Any:
    """Declare one parameter; the type of its default is its type.

    `low` and `high` are included in what is allowed, `above` is not. `pattern` is a regular expression that the whole
    text must match, and the same in words. With `auto`, the command line reads that word as 0. With `is_input`, the text is a
    path that is read (home.py).
    """
    limits = {"low": low, "above": above, "high": high, "choices": choices, "pattern": pattern, "auto": auto}
    return field(default=default, metadata={"help": help, "is_input": is_input, **limits})


def check_value(declared: Field[Any], value: Any) -> None:
    """Raise UsageError, naming the value and what is allowed, unless `value` suits the declaration."""
    rule, name, expected = declared.metadata, declared.name, type(declared.default)
    if type(value) is not expected and not (expected is float and type(value) is int):
        raise UsageError(f"{name}={value!r}: must be of type {expected.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name}={value}: must be a finite number")
    if isinstance(value, str) and escape_undecodable(value) != value:
        raise UsageError(f"{name}={value}: must be UTF-8 text")
    if rule["choices"] and value not in rule["choices"]:
        raise UsageError(f"{name}={value!r}: must be one of {', '.join(rule['choices'])}")
    if isinstance(value, str) and not re.fullmatch(rule["pattern"][0], value):
        raise UsageError(f"{name}={value!r}: must be {rule['pattern'][1]}")
    if rule["low"] is not None and value < rule["low"]:
        raise UsageError(f"{name}={value}: must be {rule['low']} or more")
    if rule["above"] is not None and value <= rule["above"]:
        raise UsageError(f"{name}={value}: must be greater than {rule['above']}")
    if rule["high"] is not None and value > rule["high"]:
        raise UsageError(f"{name}={value}: must be {rule['high']} or less")


class Checked:
    """Base of the groups of parameters below: every value is checked when a group is made."""

    def __post_init__(self) -> None:
        for declared in fields(self):  # type: ignore[arg-type]
            check_value(declared, getattr(self, declared.name))


@dataclass(frozen=True)
class SourceParameters(Checked):
    """The photographs."""

    data: str = parameter(
        HANDWRITTEN_DIGITS,
        "folder of class folders; a named data set: handwritten-digits (embedded) or sign-language-digits (downloaded); or "
        "runs:/RUN: the photographs of a run with log_data; A,B joins several",
        is_input=True,
    )
    skip_unreadable: bool = parameter(False, "leave out files that are not readable images, and list them in the run")


@dataclass(frozen=True)
class DataParameters(SourceParameters):
    """The photographs, their split and their preprocessing."""

    start_from: str = parameter(
        "",
        "model whose weights are the beginning, and whose image size and colors are used: models:/sign-digits@champion or another "
        "model of this project, runs:/RUN, or a Keras file; empty: train from nothing",
        is_input=True,
    )
    split: str = parameter(
        "auto",
        "random: the notebook's split; stratified: class by class; grouped: each group of groups.csv, such as a signer, is in "
        "one part only; folds: no parts, each photograph is tested once by a model that was trained on other folds; auto: random "
        "for the named data sets, folds with start_from and fewer than 30 photographs of a class, else stratified",
        choices=("auto", "random", "stratified", "grouped", "folds"),
    )
    image_size: int = parameter(
        0, "height and width after resizing, in pixels; 0: 100, or 32 for handwritten-digits", low=0, high=1024
    )
    color_mode: str = parameter(
        "rgb", "rgb: 3 channels, 0 to 255; grayscale: 1 channel, inverted, 1 - x/255", choices=("rgb", "grayscale")
    )
    memory_budget: int = parameter(
        500, "megabytes of decoded photographs kept in memory; more are read from data/cache while training", low=0
    )
    log_data: bool = parameter(
        False, "log the photographs as an artifact of the run, once per digest; data=runs:/RUN reads them back"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.image_size < 8:
            raise UsageError(f"image_size={self.image_size}: must be 8 or more, or 0")


@dataclass(frozen=True)
class ReportParameters(Checked):
    """The report on the photographs."""

    label_errors: bool = parameter(False, "rank the photographs by the probability of a wrong label, with cleanlab")


@dataclass(frozen=True)
class Hyperparameters(Checked):
    """The hyperparameters of one training. The defaults are the notebook's; their ranges are in tuning/space.py."""

    initial_learning_rate: float = parameter(
        1e-3, "Adam's learning rate at the first step, or after the warm-up of schedule=cosine", above=0, high=1
    )
    decay_rate: float = parameter(
        0.96, "factor by which the learning rate falls over decay_steps steps; 1.0: constant", above=0, high=1
    )
    decay_steps: int = parameter(
        1500, "steps (batches) over which the learning rate falls by decay_rate; 0: all steps of the training", low=0
    )
    schedule: str = parameter(
        "exponential",
        "schedule of the learning rate: exponential (ExponentialDecay, smooth), or cosine (CosineDecay after a linear warm-up "
        "over an eighth of the steps)",
        choices=("exponential", "cosine"),
    )
    epochs: int = parameter(20, "passes over the training images", low=1, high=10_000)
    batch_size: int = parameter(128, "images per step", low=1, high=65_536)
    augmentation: float = parameter(
        0.0,
        "strength of random rotation, shift and scale; 1: up to 20 degrees, 12 % and 0.64 to 1.16 times the size; 0: none",
        low=0,
        high=3,
    )
    horizontal_flip: float = parameter(
        0.0, "probability of mirroring a training image, to show the other hand", low=0, high=1
    )
    photometric: float = parameter(
        0.0,
        "strength of random brightness (at 1: 0.3 to 1.5 times), contrast, white balance, noise and blur; 0: none",
        low=0,
        high=3,
    )
    dropout: float = parameter(0.0, "dropout rate before the dense layer", low=0, high=0.9)
    conv_blocks: int = parameter(3, "convolution blocks, each with twice the filters of the one before", low=1, high=8)
    filters: int = parameter(16, "filters of the first convolution block", low=1, high=256)
    standardization: str = parameter(
        "none", "none, or image: each channel of an image gets mean 0 and variance 1", choices=("none", "image")
    )
    normalization: str = parameter(
        "none", "none, or batch: batch normalization of each block and of the dense layer", choices=("none", "batch")
    )
    stem_stride: int = parameter(
        1, "stride of the first block's convolution; 2: with a kernel of 4x4, faster for large images", low=1, high=2
    )
    pooling: str = parameter(
        "flatten",
        "how the last block becomes features: flatten (all positions), or average_max (average and maximum over the positions)",
        choices=("flatten", "average_max"),
    )
    weight_decay: float = parameter(0.0, "decoupled weight decay of Adam (AdamW), such as 0.05; 0: none", low=0, high=1)
    ema_momentum: float = parameter(
        0.0,
        "momentum of the moving average of the weights (Keras' use_ema), such as 0.99; 0: no average",
        low=0,
        high=0.9999,
    )
    frozen_blocks: int = parameter(
        0,
        "with start_from: convolution blocks, from the first, whose weights are kept; 8: all, and only the head is trained, on "
        "features that are computed once",
        low=0,
        high=8,
    )
    precision: str = parameter(
        "float32",
        "float32, mixed_bfloat16 (mixed precision), or auto: mixed_bfloat16 where the hardware has bfloat16",
        choices=("float32", "mixed_bfloat16", "auto"),
    )
    seed: int = parameter(
        1337, "seed of the weights, the shuffling, the augmentation and the sampler", low=0, high=2**31 - 1
    )


METRICS = ("val_accuracy", "val_loss", "val_brier", "robust_accuracy", "robust_brier")


@dataclass(frozen=True)
class StudyParameters(Checked):
    """The search."""

    space: str = parameter(
        "auto",
        "search space: notebook (initial_learning_rate, decay_rate, epochs), extended (also augmentation, dropout, filters) or "
        "transfer (those of the notebook, dropout and weight_decay of a head); auto: transfer with start_from, else extended",
        choices=("auto", "notebook", "extended", "transfer"),
    )
    n_trials: int = parameter(12, "total number of finished trials", low=1)
    timeout: float = parameter(0.0, "seconds after which no new trial starts; 0: no limit", low=0)
    study_name: str = parameter(
        "auto",
        "name of the study; the same name continues it. auto: derived from the data and the settings",
        pattern=(r".{1,200}", "1 to 200 characters"),
    )
    storage: str = parameter("sqlite:///optuna.db", "Optuna's storage, an SQLAlchemy URL")
    objective: str = parameter(
        "auto",
        "metric that the search optimizes, at the last epoch: val_accuracy, or the minimum of val_loss or val_brier (the Brier "
        "score); robust_accuracy and robust_brier count eight changed copies of each validation image as much as the image; auto: "
        "val_brier in the notebook's space, else robust_brier",
        choices=("auto", *METRICS),
    )
    pruner: str = parameter(
        "median",
        "pruner: median, percentile (prunes below the 75th percentile), hyperband or none",
        choices=("median", "percentile", "hyperband", "none"),
    )
    warm_start: str = parameter(
        "",
        "study in the same storage whose best trials are enqueued first; empty: none",
        pattern=(r".{0,200}", "up to 200 characters"),
    )
    workers: int = parameter(
        1,
        "parallel trials, each in a process of this machine or of the cluster; 1: no further process; auto or 0: one per CPU, at "
        "most a third of n_trials, and 1 with a GPU",
        low=0,
        auto=True,
    )
    ray_address: str = parameter("", "address of a Ray cluster, such as auto or HOST:6379; empty: this machine")
    cpus_per_trial: int = parameter(0, "CPUs per worker; 0: this machine's, divided by workers", low=0)
    gpus_per_trial: float = parameter(0.0, "GPUs, or fraction of one, per worker of a cluster", low=0)

    @property
    def metric(self) -> str:
        """The metric that the search optimizes."""
        if self.objective != "auto":
            return self.objective
        return "val_brier" if self.space == "notebook" else "robust_brier"

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """The direction in which the metric is optimized."""
        return "minimize" if self.metric.endswith(("loss", "brier")) else "maximize"


@dataclass(frozen=True)
class RefitParameters(Checked):
    """The refits of the chosen trial."""

    n_seeds: int = parameter(
        0,
        "refits with successive seeds, each scored on the test images; auto or 0: 3, and 1 where split=folds scores",
        low=0,
        high=100,
        auto=True,
    )
    ensemble: bool = parameter(
        True, "register the mean of the refits as one network; false: the first refit, smaller and faster"
    )
    examples: str = parameter(
        "auto",
        "log a typical training photograph of each class with the model, which the page shows to anybody who can open it; auto: "
        "true for the named data sets, which are public, else false. Photographs that data=A,B adds are never shown",
        choices=("auto", "true", "false"),
    )


@dataclass(frozen=True)
class ModelParameters(Checked):
    """A trained model: give one of the two."""

    run_id: str = parameter("", "run that trained the model")
    model_uri: str = parameter("", "URI of the model, such as models:/sign-digits@champion")


@dataclass(frozen=True)
class NameParameters(Checked):
    """The registered model."""

    model_name: str = parameter(
        MODEL_NAME,
        "name of the registered model",
        # What MLflow does not allow, or cannot search for.
        pattern=(
            r"(?s)(?!.*'.*\"|.*\".*'|.*\\$)[^/:@]{1,200}",
            "up to 200 characters without /, : and @, not with both ' and \", and without \\ at the end",
        ),
    )


@dataclass(frozen=True)
class RegistryParameters(NameParameters):
    """The registered model, the alias to assign, and the gate before it."""

    alias: str = parameter("champion", "alias to assign; the champion is served", pattern=ALIAS)
    gate: str = parameter(
        "better",
        "when a challenger replaces the champion: better (significantly), or not_worse (accuracy lower by less than margin), "
        "for a model that was trained on more photographs",
        choices=("better", "not_worse"),
    )
    significance_test: str = parameter(
        "log_loss",
        "test of gate=better: log_loss (permutation test, sensitive even where both models make few mistakes) or mcnemar "
        "(exact test of correct and wrong labels)",
        choices=("log_loss", "mcnemar"),
    )
    significance_level: float = parameter(
        0.05, "p-value below which a challenger replaces the champion", above=0, high=1
    )
    margin: float = parameter(
        0.01, "non-inferiority margin: the loss of accuracy that gate=not_worse must rule out", above=0, high=0.5
    )
    force: bool = parameter(False, "assign the alias regardless of the comparison")


@dataclass(frozen=True)
class VersionParameters(RegistryParameters):
    """A registered version."""

    version: int = parameter(
        0, "registered version that gets the alias, to promote or roll back; 0: register run_id", low=0
    )


@dataclass(frozen=True)
class PredictParameters(Checked):
    """The input, output, model and workers of a batch prediction."""

    images: str = parameter(
        "",
        "folder of photographs, searched recursively, or a CSV or Parquet table with a column path",
        pattern=(r"(?s).+", "a folder of photographs, or a CSV or Parquet table with a column path"),
        is_input=True,
    )
    output: str = parameter("predictions", "folder of the resulting tables", pattern=FOLDER)
    model_uri: str = parameter(SERVED_MODEL, "URI of the model")
    workers: int = parameter(1, "Ray worker processes with one CPU each; 1: threads of this process", low=1)
    ray_address: str = parameter("", "address of a Ray cluster, such as auto or HOST:6379; empty: this machine")


@dataclass(frozen=True)
class MonitorParameters(Checked):
    """The predictions that are compared with the test images, and the drift thresholds."""

    prediction_log: str = parameter(
        "prediction_log",
        "folder of the prediction log (SIGN_DIGITS_PREDICTION_LOG)",
        pattern=FOLDER,
        is_input=True,
    )
    model_uri: str = parameter(SERVED_MODEL, "URI of the model whose predictions and test images are compared")
    max_predictions: int = parameter(1000, "most recent predictions to compare, at most", low=1, high=1_000_000)
    window_hours: float = parameter(0.0, "maximum age of a prediction in hours; 0: no limit", low=0)
    min_predictions: int = parameter(100, "predictions needed; with fewer, exit code 4", low=2)
    # Of the Sign Language Digits, a hundred at random lie up to 0.3 from the 412 test images in one column, and up to
    # 0.12 in their labels; 150 of a few students, under one light, 0.4 to 1. A photograph made 15 % darker: 2.8.
    drift_distance: float = parameter(
        0.5, "Wasserstein distance, in standard deviations of the test images, at which a number has drifted", above=0
    )
    drift_labels: float = parameter(
        0.3, "Jensen-Shannon distance at which the predicted labels have drifted", above=0, high=1
    )
    drift_share: float = parameter(
        0.3, "fraction of the six columns that must drift for exit code 3; 0.3 is two of them", above=0, high=1
    )
    shadow: bool = parameter(
        False, "compare two versions that `serve --shadow` sent the same requests to, in place of the test images"
    )
    notify: str = parameter("", "webhook URL for drift (POST, JSON); empty: none", pattern=URL)


@dataclass(frozen=True)
class ReviewParameters(Checked):
    """The corrections from visitors, and the decisions on them."""

    corrections: str = parameter(
        "corrections", "folder of the corrections (serve --corrections)", pattern=FOLDER, is_input=True
    )
    accept: str = parameter("", "comma-separated ids of corrections to accept, or all; empty: none")
    drop: str = parameter(
        "",
        "comma-separated ids of corrections to remove, or all; all leaves out the ids of the other option; empty: none",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accept == self.drop == "all":
            raise UsageError("accept='all', drop='all': pass all to one of the two")


EXPORT_FORMATS = ("keras", "tflite", "tflite-int8", "onnx")


@dataclass(frozen=True)
class ExportParameters(Checked):
    """The model, the format, and the photographs for the comparison with the served model."""

    format: str = parameter("tflite", "format of the file: keras, tflite, tflite-int8 or onnx", choices=EXPORT_FORMATS)
    model_uri: str = parameter(SERVED_MODEL, "URI of the model")
    output: str = parameter("exported", "folder of the file", pattern=FOLDER)
    data: str = parameter(
        "",
        "photographs of the model's data set; empty: those that it names, or its input example if they cannot be found",
        is_input=True,
    )


@dataclass(frozen=True)
class LinkParameters(NameParameters):
    """The registered model, and the MLflow UI of a local store."""

    port: int = parameter(5000, "port of the MLflow UI", low=1, high=65_535)
