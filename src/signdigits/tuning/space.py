"""The search spaces: what the search draws each hyperparameter from. One that is not listed keeps its default."""

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

from signdigits.config import Hyperparameters, Number, Value, check_value
from signdigits.errors import UsageError

if TYPE_CHECKING:
    import optuna

AUTO = "auto"  # as a hyperparameter's value: what the search space says


@dataclass(frozen=True)
class Range:
    """The values from `low` to `high`, both included; drawn evenly in the logarithm if `log`.

    `start` is the value of the first trial; without one it is the hyperparameter's default.
    """

    low: Number
    high: Number
    log: bool = False
    start: Number | None = None

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"


# In both spaces the rate decays over the whole training: decay_rate is what is left of it at the end, whatever the number of
# epochs and of photographs.
NOTEBOOK: Mapping[str, Range | Value] = {
    "initial_learning_rate": Range(5e-4, 3e-3, log=True, start=1.5e-3),  # above, one refit in two learns nothing
    "decay_rate": Range(0.005, 0.3, log=True, start=0.015),
    "decay_steps": 0,
    "epochs": Range(30, 60, start=50),
    "precision": "auto",
}

EXTENDED: Mapping[str, Range | Value] = {
    "initial_learning_rate": Range(2.2e-3, 5e-3, log=True, start=3e-3),
    "decay_rate": Range(0.01, 0.1, log=True, start=0.03),
    "decay_steps": 0,
    "schedule": "cosine",
    "epochs": Range(36, 45, start=40),
    "batch_size": 32,
    "augmentation": Range(1.3, 1.9, start=1.6),
    "horizontal_flip": 0.5,  # for either hand
    "photometric": 1.0,
    "dropout": Range(0.1, 0.3, start=0.2),
    "conv_blocks": 4,
    "filters": Range(28, 40, start=32),
    "stem_stride": 2,
    "pooling": "average_max",
    "standardization": "image",
    "normalization": "batch",
    "weight_decay": 0.05,
    "ema_momentum": 0.99,
    "precision": "auto",
}

# With start_from: a head on the features of a network that is kept as it is.
TRANSFER: Mapping[str, Range | Value] = {
    "initial_learning_rate": Range(1e-3, 2e-2, log=True, start=5e-3),
    "decay_rate": Range(0.01, 0.3, log=True, start=0.05),
    "decay_steps": 0,
    "schedule": "cosine",
    "epochs": Range(10, 40, start=20),
    "batch_size": 32,
    "augmentation": 1.6,
    "horizontal_flip": 0.5,
    "photometric": 1.0,
    "dropout": Range(0.1, 0.6, start=0.4),
    "weight_decay": Range(0.01, 0.3, log=True, start=0.03),
    "frozen_blocks": 8,
}

SPACES = {"notebook": NOTEBOOK, "extended": EXTENDED, "transfer": TRANSFER}


def resolve_space(name: str, start_from: str) -> str:
    """Return the search space that `auto` means: transfer with a model to start from, else extended."""
    return name if name != AUTO else "transfer" if start_from else "extended"


# What `auto` means for a named data set, where it is not what the space says.
DATA_SET_VALUES: Mapping[tuple[str, str], Mapping[str, Range | Value]] = {
    ("extended", "handwritten-digits"): {
        "horizontal_flip": 0.0,  # the mirror image of a written 2 is no digit
        "epochs": Range(12, 18, start=15),  # written digits are learned sooner than photographed hands
    },
    ("transfer", "handwritten-digits"): {"horizontal_flip": 0.0},
}


@dataclass(frozen=True)
class Space:
    """A search space: a range or a fixed value of each hyperparameter; those of `given` replace the space's own."""

    name: str
    values: Mapping[str, Range | Value]
    given: frozenset[str]

    @classmethod
    def of(cls, space: str, **values: Range | Value) -> Self:
        """Return the space called `space`, with `values` (but for "auto") in place of its own.

        Raises UsageError for another name, or if a value, or an end of a range, lies outside the hyperparameter's limits.
        """
        if space not in SPACES:
            raise UsageError(f"space={space!r}: must be one of {', '.join(SPACES)}")
        declared = {f.name: f for f in fields(Hyperparameters)}
        given = {name: value for name, value in values.items() if value != AUTO}
        chosen = {name: search_default(f, space) for name, f in declared.items()} | given
        for name, value in chosen.items():
            ends = (value.low, value.high) if isinstance(value, Range) else (value,)
            for end in ends:
                check_value(declared[name], end)
            if isinstance(value, Range) and value.low > value.high:
                raise UsageError(f"{name}={value}: the range is empty; write LOW:HIGH")
        return cls(space, chosen, frozenset(given))

    def for_data_set(self, name: str) -> Self:
        """Return the space with its own values for the data set called `name`, where none are given."""
        own = DATA_SET_VALUES.get((self.name, name), {})
        return replace(self, values={**self.values, **own, **{key: self.values[key] for key in self.given}})

    @property
    def ranges(self) -> dict[str, Range]:
        """The hyperparameters that are searched."""
        return {name: value for name, value in self.values.items() if isinstance(value, Range)}

    @property
    def fixed(self) -> dict[str, Value]:
        """The hyperparameters that are not."""
        return {name: value for name, value in self.values.items() if not isinstance(value, Range)}

    def suggest(self, trial: "optuna.Trial") -> Hyperparameters:
        """Draw a value from each range; the other hyperparameters are fixed."""
        values: dict[str, Value] = {}
        for name, r in self.ranges.items():
            if _is_integer(name):
                values[name] = trial.suggest_int(name, int(r.low), int(r.high), log=r.log)
            else:
                values[name] = trial.suggest_float(name, r.low, r.high, log=r.log)
        return self.complete(values)

    def includes_mirror_images(self) -> bool:
        flip = self.ranges.get("horizontal_flip")
        return flip.high > 0 if flip else bool(self.fixed["horizontal_flip"])

    def complete(self, params: Mapping[str, Value]) -> Hyperparameters:
        """Return the hyperparameters of a trial with `params`."""
        return Hyperparameters(**{**self.fixed, **params})  # type: ignore[arg-type]

    def baseline(self) -> dict[str, Number]:
        """Return the parameters of the first trial: each range's start, or the default, moved into the range."""
        defaults = asdict(Hyperparameters())
        return self.clip({name: defaults[name] if r.start is None else r.start for name, r in self.ranges.items()})

    def clip(self, params: Mapping[str, Number]) -> dict[str, Number]:
        """Move values that lie outside their ranges to the nearest end."""
        return {name: min(max(value, self.ranges[name].low), self.ranges[name].high) for name, value in params.items()}


def search_default(declared: Field[Any], space: str) -> Range | Value:
    """Return the range or value of a hyperparameter in the search space called `space`."""
    default: Value = declared.default  # type: ignore[assignment]
    return SPACES[space].get(declared.name, default)


def is_logarithmic(name: str) -> bool:
    """Tell whether a range given for the hyperparameter is drawn from evenly in the logarithm."""
    return any(getattr(space.get(name), "log", False) for space in SPACES.values())


def format_value(value: Any) -> str:
    """Return the value of a hyperparameter for logs, with three digits if it is a float."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _is_integer(name: str) -> bool:
    return {f.name: f.type for f in fields(Hyperparameters)}[name] is int
