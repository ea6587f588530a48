from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from signdigits import config as hp
from signdigits.errors import UsageError


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        (hp.Hyperparameters, {"initial_learning_rate": 0.0}, "initial_learning_rate=0.0: must be greater than 0"),
        (hp.Hyperparameters, {"initial_learning_rate": float("nan")}, "initial_learning_rate=nan: must be a finite"),
        (hp.Hyperparameters, {"decay_rate": 1.5}, "decay_rate=1.5: must be 1 or less"),
        (hp.Hyperparameters, {"epochs": 0}, "epochs=0: must be 1 or more"),
        (hp.Hyperparameters, {"epochs": 2.5}, "epochs=2.5: must be of type int"),
        (hp.Hyperparameters, {"epochs": True}, "epochs=True: must be of type int"),
        (hp.Hyperparameters, {"batch_size": "128"}, "batch_size='128': must be of type int"),
        (hp.Hyperparameters, {"seed": -1}, "seed=-1: must be 0 or more"),
        (hp.DataParameters, {"image_size": 7}, "image_size=7: must be 8 or more, or 0"),
        (hp.DataParameters, {"color_mode": "sepia"}, "color_mode='sepia': must be one of rgb, grayscale"),
        (
            hp.StudyParameters,
            {"objective": "accuracy"},
            "objective='accuracy': must be one of auto, val_accuracy, val_loss, val_brier, robust_accuracy, robust_brier",
        ),
        (hp.StudyParameters, {"timeout": -1.0}, "timeout=-1.0: must be 0 or more"),
        (hp.Hyperparameters, {"dropout": True}, "dropout=True: must be of type float"),
        (hp.Hyperparameters, {"dropout": float("inf")}, "dropout=inf: must be a finite number"),
        (hp.StudyParameters, {"study_name": "\udcff"}, "must be UTF-8 text"),
    ],
)
def test_invalid_value_is_refused(group: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        group(**values)
    assert message in str(raised.value)


@pytest.mark.parametrize("group", hp.Checked.__subclasses__(), ids=lambda group: group.__name__)
def test_defaults_have_the_declared_type(group: type) -> None:
    """The command line reads a parameter by the type of its default."""
    assert all(type(declared.default) is declared.type for declared in fields(group))


# What each parameter accepts, and the nearest that it refuses.
LIMITS: dict[type, dict[str, tuple[list[Any], list[Any]]]] = {
    hp.DataParameters: {"image_size": ([0, 8, 1024], [-1, 1, 7, 1025]), "memory_budget": ([0], [-1])},
    hp.Hyperparameters: {
        "initial_learning_rate": ([1e-9, 1.0], [0.0, 1.1]),
        "decay_rate": ([1e-9, 1.0], [0.0, 1.1]),
        "decay_steps": ([0], [-1]),
        "epochs": ([1, 10_000], [0, 10_001]),
        "batch_size": ([1, 65_536], [0, 65_537]),
        "augmentation": ([0.0, 3.0], [-0.1, 3.1]),
        "horizontal_flip": ([0.0, 1.0], [-0.1, 1.1]),
        "photometric": ([0.0, 3.0], [-0.1, 3.1]),
        "dropout": ([0.0, 0.9], [-0.1, 0.91]),
        "conv_blocks": ([1, 8], [0, 9]),
        "filters": ([1, 256], [0, 257]),
        "stem_stride": ([1, 2], [0, 3]),
        "weight_decay": ([0.0, 1.0], [-0.1, 1.1]),
        "ema_momentum": ([0.0, 0.9999], [-0.1, 1.0]),
        "seed": ([0, 2_147_483_647], [-1, 2_147_483_648]),
    },
    hp.StudyParameters: {
        "n_trials": ([1], [0]),
        "timeout": ([0.0], [-0.1]),
        "study_name": (["a", "a" * 200], ["", "a" * 201]),
        "warm_start": (["", "a" * 200], ["a" * 201]),
        "workers": ([0, 1], [-1]),
        "cpus_per_trial": ([0], [-1]),
        "gpus_per_trial": ([0.0, 0.5], [-0.1]),
    },
    hp.RefitParameters: {"n_seeds": ([0, 1, 100], [-1, 101])},
    hp.VersionParameters: {
        "model_name": (
            ["a", "a" * 200, "sam's", 'the "best"', "a\\'b"],
            ["", "a" * 201, "a/b", 'sam\'s "best"', '"a" of sam\'s', "a\\"],
        ),
        "significance_level": ([1e-9, 1.0], [0.0, 1.1]),
        "margin": ([1e-9, 0.5], [0.0, 0.51]),
        "version": ([0, 1], [-1]),
    },
    hp.PredictParameters: {"images": (["photographs"], [""]), "output": (["a"], [""]), "workers": ([1], [0])},
    hp.MonitorParameters: {
        "max_predictions": ([1, 1_000_000], [0, 1_000_001]),
        "window_hours": ([0.0], [-0.1]),
        "min_predictions": ([2], [1]),
        "drift_distance": ([1e-9], [0.0]),
        "drift_labels": ([1e-9, 1.0], [0.0, 1.1]),
        "drift_share": ([1e-9, 1.0], [0.0, 1.1]),
        "notify": (["", "https://example.org"], ["example.org"]),
    },
    hp.LinkParameters: {"port": ([1, 65_535], [0, 65_536])},
}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, limits in LIMITS.items() for name in limits])
def test_limits_of_parameters(group: type, name: str) -> None:
    needed = {"images": "photographs"} if group is hp.PredictParameters else {}
    allowed, refused = LIMITS[group][name]
    for value in allowed:
        assert getattr(group(**{**needed, name: value}), name) == value
    for value in refused:
        with pytest.raises(UsageError, match=f"^{name}="):
            group(**{**needed, name: value})


@pytest.mark.parametrize("group", [*LIMITS, hp.SourceParameters, hp.RegistryParameters, hp.ReviewParameters])
def test_checked_values_cannot_change(group: type) -> None:
    made = group(images="photographs") if group is hp.PredictParameters else group()
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(group)[0].name, None)


def test_all_is_for_one_decision() -> None:
    hp.ReviewParameters(accept="all", drop="b")
    hp.ReviewParameters(accept="b", drop="all")
    with pytest.raises(UsageError, match="pass all to one of the two"):
        hp.ReviewParameters(accept="all", drop="all")


@pytest.mark.parametrize(
    ("space", "objective", "metric"),
    [
        ("extended", "auto", "robust_brier"),
        ("notebook", "auto", "val_brier"),
        ("extended", "val_loss", "val_loss"),
        ("notebook", "robust_accuracy", "robust_accuracy"),
    ],
)
def test_space_decides_the_metric(space: str, objective: str, metric: str) -> None:
    assert hp.StudyParameters(space=space, objective=objective).metric == metric


def test_int_is_accepted_as_float() -> None:
    assert hp.Hyperparameters(decay_rate=1).decay_rate == 1
