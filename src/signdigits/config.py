"""Every parameter of the project, declared once: its name, default, limits and, where searched, its range.

The command line, the Optuna search space, the `MLproject` file and what MLflow records all take their names
and defaults from here.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

from signdigits.errors import ParameterError, escape_undecodable

if TYPE_CHECKING:
    import optuna

Number = int | float
Value = Number | str


SPACES = ("notebook", "extended")
# MLflow's own rule, which it would only apply at the end of the work.
ALIAS = (r"(?![vV][0-9]+$|latest$)[A-Za-z0-9_-]{1,255}", "letters, digits, - and _, but not latest or v1, v2")
AUTO = "auto"  # given for a hyperparameter: what the chosen search space says


@dataclass(frozen=True)
class Range:
    """The values from `low` to `high`, both included, that a search draws from; evenly in the logarithm if `log`.

    `start` is what the first trial takes; without one, the parameter's default.
    """

    low: Number
    high: Number
    log: bool = False
    start: Number | None = None

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"


def parameter(
    default: Any,
    help: str,
    *,
    low: Number | None = None,
    above: Number | None = None,
    high: Number | None = None,
    choices: tuple[str, ...] = (),
    pattern: tuple[str, str] = (".*", ""),
    notebook: Range | Value | None = None,
    extended: Range | Value | None = None,
) -> Any:
    """Declare one parameter.

    `low` and `high` are included in what is allowed, `above` is not. `pattern` is a regular expression that the whole
    text must match, and the same in words. `notebook` and `extended` are what the search spaces of
    these names use, a value or a range, where that is not the default.
    """
    limits = {"low": low, "above": above, "high": high, "choices": choices, "pattern": pattern}
    spaces = {"notebook": notebook, "extended": extended}
    return field(default=default, metadata={"help": help, "spaces": spaces, **limits})


def check_value(declared: Field[Any], value: Any) -> None:
    """Raise ParameterError, naming the value and what is allowed, unless `value` suits the declaration."""
    rule, name = declared.metadata, declared.name
    if type(value) is not declared.type and not (declared.type is float and type(value) is int):
        raise ParameterError(f"{name}={value!r}: must be of type {type_name(declared)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ParameterError(f"{name}={value}: must be a finite number")
    if isinstance(value, str) and escape_undecodable(value) != value:
        raise ParameterError(f"{name}={value}: must be UTF-8 text")
    if rule["choices"] and value not in rule["choices"]:
        raise ParameterError(f"{name}={value!r}: must be one of {', '.join(rule['choices'])}")
    if isinstance(value, str) and not re.fullmatch(rule["pattern"][0], value):
        raise ParameterError(f"{name}={value!r}: must be {rule['pattern'][1]}")
    if rule["low"] is not None and value < rule["low"]:
        raise ParameterError(f"{name}={value}: must be {rule['low']} or more")
    if rule["above"] is not None and value <= rule["above"]:
        raise ParameterError(f"{name}={value}: must be greater than {rule['above']}")
    if rule["high"] is not None and value > rule["high"]:
        raise ParameterError(f"{name}={value}: must be {rule['high']} or less")


def type_name(declared: Field[Any]) -> str:
    """The name of the type that `declared` takes, for people: `int`, `float`, `str` or `bool`."""
    return declared.type.__name__ if isinstance(declared.type, type) else str(declared.type)


class Checked:
    """Base of the groups of parameters below: every value is checked when a group is made."""

    def __post_init__(self) -> None:
        for declared in fields(self):  # type: ignore[arg-type]
            check_value(declared, getattr(self, declared.name))


@dataclass(frozen=True)
class SourceParameters(Checked):
    """Which photographs."""

    data: str = parameter(
        "handwritten-digits",
        "a folder of class folders, or one of the names handwritten-digits (embedded) and sign-language-digits "
        "(downloaded)",
    )
    skip_unreadable: bool = parameter(False, "leave out files that are no readable image, and list them in the run")


@dataclass(frozen=True)
class DataParameters(SourceParameters):
    """Which photographs, how they are split, and how the network sees them."""

    split: str = parameter(
        "random",
        "random: the notebook's; grouped: no group of groups.csv (a signer, say) is in two parts",
        choices=("random", "grouped"),
    )
    image_size: int = parameter(
        100, "height and width that every photograph is resized to, in pixels", low=8, high=1024
    )
    color_mode: str = parameter(
        "rgb", "rgb: 3 channels, 0 to 255; grayscale: 1 channel, inverted, 1 - x/255", choices=("rgb", "grayscale")
    )
    memory_budget: int = parameter(
        500, "megabytes of decoded photographs that are held in memory; more are read from a file in data/cache", low=0
    )


@dataclass(frozen=True)
class Hyperparameters(Checked):
    """What one training is made with. The defaults are the notebook's."""

    initial_learning_rate: float = parameter(
        1e-3,
        "Adam's learning rate at the first step",
        above=0,
        high=1,
        notebook=Range(1e-4, 5e-3, log=True),  # up to the notebook's highest: above it one refit in two learns nothing
        extended=Range(5e-4, 2e-3, log=True),
    )
    decay_rate: float = parameter(
        0.96,
        "the learning rate is multiplied by this every decay_steps steps, smoothly; 1.0 keeps it constant",
        above=0,
        high=1,
        notebook=Range(0.1, 1.0),
        extended=Range(0.01, 0.2, log=True, start=0.02),
    )
    # 0.96 in 1,500 steps, the notebook's setting, lowers the rate by 0.6 % over its 20 epochs: a search over
    # decay_rate would look for something that cannot matter. 100 steps are 9 epochs of the 1,320 training
    # photographs: after 20 epochs, 0.1 has lowered the rate to a 160th, and 1.0 has kept it.
    decay_steps: int = parameter(
        1500,
        "steps (batches) in which the rate falls by decay_rate",
        low=1,
        notebook=100,
        extended=Range(1000, 3000, log=True, start=1500),
    )
    epochs: int = parameter(
        20,
        "passes over the training images",
        low=1,
        high=10_000,
        notebook=Range(10, 40),
        extended=Range(60, 100, start=80),
    )
    batch_size: int = parameter(128, "images per step", low=1, high=65_536, extended=Range(32, 128, log=True, start=64))
    augmentation: float = parameter(
        0.0,
        "strength of the random rotation, shift and zoom of training images; at 1 up to 20 degrees, 12 % and a "
        "factor of 1.22; 0: none",
        low=0,
        high=3,
        extended=Range(0.5, 1.5, start=1.0),
    )
    dropout: float = parameter(
        0.0,
        "share of the inputs of the dense layer left out in training",
        low=0,
        high=0.9,
        extended=Range(0.2, 0.6, start=0.4),
    )
    conv_blocks: int = parameter(
        3,
        "convolution blocks, each with twice the filters of the one before, from 16 on",
        low=1,
        high=8,
        extended=Range(3, 5, start=5),
    )
    ema_momentum: float = parameter(
        0.0,
        "momentum of the moving average of the weights that is validated and kept in the end (Keras' use_ema), such as "
        "0.99; 0: the weights themselves",
        low=0,
        high=0.9999,
    )
    precision: str = parameter(
        "float32",
        "what the training computes in: float32, mixed_bfloat16, or auto (bfloat16 where the processor has it)",
        choices=("float32", "mixed_bfloat16", "auto"),
        notebook="auto",
        extended="auto",
    )
    seed: int = parameter(
        1337,
        "seeds the weights, the order of the batches, the augmentation and the sampler",
        low=0,
        high=2**31 - 1,
    )


@dataclass(frozen=True)
class StudyParameters(Checked):
    """How a search is run."""

    space: str = parameter(
        "extended",
        "what is searched: notebook (initial_learning_rate, decay_rate, epochs) or extended (also decay_steps, "
        "batch_size, augmentation, dropout, conv_blocks)",
        choices=SPACES,
    )
    n_trials: int = parameter(12, "finished trials that the study should have in the end", low=1)
    timeout: float = parameter(0.0, "seconds after which no further trial is started; 0: no limit", low=0)
    study_name: str = parameter(
        "auto",
        "name of the study; the same name continues it. auto: derived from the data and the search's settings",
        pattern=(r".{1,200}", "1 to 200 characters"),
    )
    storage: str = parameter("sqlite:///optuna.db", "where Optuna keeps the study: any SQLAlchemy URL")
    objective: str = parameter(
        "val_accuracy",
        "what the search improves, at the last epoch: val_accuracy (up) or val_loss (down)",
        choices=("val_accuracy", "val_loss"),
    )
    pruner: str = parameter(
        "percentile",
        "what ends hopeless trials early: percentile (what is worse than three quarters of the complete ones were), "
        "median (than half of them), hyperband or none",
        choices=("percentile", "median", "hyperband", "none"),
    )
    warm_start: str = parameter(
        "",
        "a study of the same storage whose best trials are this study's first; empty: none",
        pattern=(r".{0,200}", "up to 200 characters"),
    )
    workers: int = parameter(1, "trials that run at once, each in a process that Ray starts; 1: this process", low=1)
    ray_address: str = parameter("", "the Ray cluster to run them on, such as auto or HOST:6379; empty: this machine")
    cpus_per_trial: int = parameter(0, "processors of each trial's process; 0: this machine's, shared evenly", low=0)
    gpus_per_trial: float = parameter(0.0, "GPUs, or the share of one, of each trial's process", low=0)


@dataclass(frozen=True)
class RefitParameters(Checked):
    """How the best trial is fitted again."""

    repeats: int = parameter(
        3, "refits with successive seeds, each scored on the test images; the first is registered", low=1, high=100
    )


@dataclass(frozen=True)
class ModelParameters(Checked):
    """Which trained model: one of the two."""

    run_id: str = parameter("", "the run that trained the model")
    model_uri: str = parameter("", "the model's address, such as models:/sign-digits@champion")


@dataclass(frozen=True)
class RegistryParameters(Checked):
    """Which name of the registered model to move, and what it takes."""

    alias: str = parameter(
        "champion",
        "alias to give: champion is what is served",
        pattern=ALIAS,
    )
    significance_level: float = parameter(
        0.05,
        "the champion gives way only if chance alone would favour the challenger this strongly less often than this",
        above=0,
        high=1,
    )
    force: bool = parameter(False, "give the alias whatever the comparison says")


@dataclass(frozen=True)
class VersionParameters(RegistryParameters):
    """Which registered version, where one is registered already."""

    version: int = parameter(0, "registered version to move the alias to, forwards or back; 0: register run_id", low=0)


SERVED_MODEL = "models:/sign-digits@champion"


@dataclass(frozen=True)
class PredictParameters(Checked):
    """What a prediction reads, with which model, and who does it."""

    images: str = parameter(
        "",
        "a folder of photographs, with its subfolders, or a CSV or Parquet table with a column path",
        pattern=(r"(?s).+", "a folder of photographs, or a CSV or Parquet table with a column path"),
    )
    output: str = parameter("predictions", "the folder that the tables are written to", pattern=(r"(?s).+", "a folder"))
    model_uri: str = parameter(SERVED_MODEL, "the model's address")
    workers: int = parameter(
        1, "processes that work at once, each with one processor, started by Ray; 1: this process, in threads", low=1
    )
    ray_address: str = parameter("", "the Ray cluster to run them on, such as auto or HOST:6379; empty: this machine")


@dataclass(frozen=True)
class MonitorParameters(Checked):
    """Which answers are compared with the test images, and what counts as drift."""

    answers: str = parameter(
        "answers", "the folder of the endpoint's log (SIGN_DIGITS_ANSWERS)", pattern=(r"(?s).+", "a folder")
    )
    model_uri: str = parameter(SERVED_MODEL, "the model whose answers and test images are compared")
    last: int = parameter(1000, "answers that are compared, at most: the latest", low=1, high=1_000_000)
    hours: float = parameter(0.0, "only answers of the last hours; 0: no limit", low=0)
    min_answers: int = parameter(100, "answers below which nothing can be said (exit code 4)", low=2)
    # Of the Sign Language Digits, a hundred at random lie up to 0.3 from the 412 test images in one column, and up to
    # 0.1 in their labels; 150 of a few students, under one light, 0.4 to 1. A photograph made 15 % darker: 2.8.
    drift_distance: float = parameter(
        0.5,
        "how far from the test images a number counts as drifted: Wasserstein's distance, in their standard deviations",
        above=0,
    )
    drift_labels: float = parameter(
        0.25, "how far from them the labels do: Jensen and Shannon's distance, 0 to 1", above=0, high=1
    )
    drift_share: float = parameter(
        0.3,
        "share of the six columns from which on it counts as drift: 0.3 is two of them (exit code 3)",
        above=0,
        high=1,
    )


@dataclass(frozen=True)
class LinkParameters(Checked):
    """Where the UI of a local store is served."""

    port: int = parameter(5000, "port that the MLflow UI listens on", low=1, high=65_535)


@dataclass(frozen=True)
class ServeParameters(Checked):
    """What is served, where, by how many processes, and what the front before them lets through."""

    host: str = parameter(
        "127.0.0.1",
        "address to listen on: this machine only, unless told otherwise; 0.0.0.0 for every network it is in",
        pattern=(r"[0-9A-Za-z:.-]+", "a host name or an address"),
    )
    port: int = parameter(5001, "port to listen on", low=1, high=65_535)
    alias: str = parameter("champion", "alias of the version that is served", pattern=ALIAS)
    processes: int = parameter(1, "processes that answer for a version", low=1, high=256)
    poll: float = parameter(2.0, "seconds between two looks at the alias", above=0)
    start_timeout: float = parameter(120.0, "seconds that a version has to start in", above=0)
    timeout: int = parameter(60, "seconds after which a request is given up", low=1)
    drain: float = parameter(60.0, "seconds that the version before has to finish its requests in", low=0)
    client_timeout: int = parameter(10, "seconds that a client may be silent while it sends or takes", low=1)
    max_body: int = parameter(64, "megabytes that a request may have", low=1)
    requests_per_second: int = parameter(0, "requests of one client's address a second; 0: no limit", low=0)
    burst: int = parameter(20, "requests that a client may be ahead of that rate", low=0)
    connections_per_client: int = parameter(0, "requests of one client's address at once; 0: no limit", low=0)
    token_file: str = parameter("", "file with the token that a request must bear; empty: none is asked for")
    certificate: str = parameter("", "file with the certificate for HTTPS, and those up to the root (PEM)")
    key: str = parameter("", "file with the certificate's key (PEM)")
    access_log: str = parameter("", "file that gets a line for every request; empty: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.certificate) != bool(self.key):
            raise ParameterError(f"certificate={self.certificate!r}, key={self.key!r}: give both, or neither")


@dataclass(frozen=True)
class Space:
    """What a search draws (`ranges`) and what it keeps (`fixed`)."""

    ranges: Mapping[str, Range]
    fixed: Mapping[str, Value]

    @classmethod
    def of(cls, space: str, **values: Range | Value) -> Self:
        """The space called `space`, with `values` (but for "auto") in place of what it says.

        Raises ParameterError if a value, or an end of a range, lies outside the parameter's limits.
        """
        declared = {f.name: f for f in fields(Hyperparameters)}
        given = {name: value for name, value in values.items() if value != AUTO or name == "precision"}
        chosen = {name: search_default(f, space) for name, f in declared.items()} | given
        for name, value in chosen.items():
            ends = (value.low, value.high) if isinstance(value, Range) else (value,)
            for end in ends:
                check_value(declared[name], end)
            if isinstance(value, Range) and value.low > value.high:
                raise ParameterError(f"{name}={value}: the range is empty; write LOW:HIGH")
        ranges = {name: value for name, value in chosen.items() if isinstance(value, Range)}
        return cls(ranges, {name: value for name, value in chosen.items() if not isinstance(value, Range)})

    def suggest(self, trial: "optuna.Trial") -> Hyperparameters:
        """Draw a value from each range; the other hyperparameters are fixed."""
        drawn: dict[str, Value] = {}
        for name, r in self.ranges.items():
            if is_integer(name):
                drawn[name] = trial.suggest_int(name, int(r.low), int(r.high), log=r.log)
            else:
                drawn[name] = trial.suggest_float(name, r.low, r.high, log=r.log)
        return self.complete(drawn)

    def ends(self, name: str) -> tuple[int, int]:
        """The smallest and the largest value that an integer hyperparameter can take."""
        if name in self.ranges:
            return int(self.ranges[name].low), int(self.ranges[name].high)
        return int(self.fixed[name]), int(self.fixed[name])

    def complete(self, drawn: Mapping[str, Value]) -> Hyperparameters:
        """The hyperparameters of a trial that drew `drawn`."""
        return Hyperparameters(**{**self.fixed, **drawn})  # type: ignore[arg-type]

    def baseline(self) -> dict[str, Number]:
        """What the first trial takes: each range's start, or the default, moved into the range where it lies outside."""
        defaults = asdict(Hyperparameters())
        return self.clip({name: defaults[name] if r.start is None else r.start for name, r in self.ranges.items()})

    def clip(self, params: Mapping[str, Number]) -> dict[str, Number]:
        """Move values that lie outside their ranges to the nearest end."""
        return {name: min(max(value, self.ranges[name].low), self.ranges[name].high) for name, value in params.items()}


def search_default(declared: Field[Any], space: str) -> Range | Value:
    """The value or range that the search space called `space` uses for a parameter unless told otherwise."""
    found: Range | Value | None = declared.metadata["spaces"][space]
    default: Any = declared.default
    return default if found is None else found


def is_searched_in_logarithm(declared: Field[Any]) -> bool:
    """Whether a range that is given for the parameter is drawn from evenly in the logarithm."""
    return any(getattr(found, "log", False) for found in declared.metadata["spaces"].values())


def is_integer(name: str) -> bool:
    return {f.name: f.type for f in fields(Hyperparameters)}[name] is int
