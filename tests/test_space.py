from dataclasses import FrozenInstanceError, asdict, fields
from typing import Any

import optuna
import pytest

from signdigits.config import Hyperparameters
from signdigits.errors import UsageError
from signdigits.tuning.space import SPACES, Range, Space, is_logarithmic

EXTENDED_START = {
    "initial_learning_rate": 0.003,
    "decay_rate": 0.03,
    "epochs": 40,
    "augmentation": 1.6,
    "dropout": 0.2,
    "filters": 32,
}


TRANSFER_START = {
    "initial_learning_rate": 0.005,
    "decay_rate": 0.05,
    "epochs": 20,
    "dropout": 0.4,
    "weight_decay": 0.03,
}


def draw(space: Space, number: int = 1) -> list[optuna.Trial]:
    """Draw from the space, seeded, and return the trials."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(number)]
    for trial in trials:
        space.suggest(trial)
    return trials


@pytest.mark.parametrize(
    ("name", "data_set", "first"),
    [
        ("notebook", "bars", {"initial_learning_rate": 0.0015, "decay_rate": 0.015, "epochs": 50}),
        ("extended", "bars", EXTENDED_START),
        ("extended", "handwritten-digits", EXTENDED_START | {"epochs": 15}),
        ("transfer", "bars", TRANSFER_START),
    ],
)
def test_first_trial_of_each_space(name: str, data_set: str, first: dict[str, Any]) -> None:
    assert Space.of(name).for_data_set(data_set).baseline() == first


@pytest.mark.parametrize("name", SPACES)
def test_rates_are_drawn_logarithmically(name: str) -> None:
    (trial,) = draw(Space.of(name))
    drawn = {searched for searched, distribution in trial.distributions.items() if distribution.log}  # type: ignore[attr-defined]
    assert drawn - {"weight_decay"} == {"initial_learning_rate", "decay_rate"}


def test_given_range_is_drawn_like_the_spaces() -> None:
    """A range on the command line says no more than its ends."""
    logarithmic = {declared.name for declared in fields(Hyperparameters) if is_logarithmic(declared.name)}
    assert logarithmic == {"initial_learning_rate", "decay_rate", "weight_decay"}


def test_ends_of_a_range_are_drawn() -> None:
    space = Space.of("extended", epochs=Range(4, 6))
    assert {trial.params["epochs"] for trial in draw(space, 30)} == {4, 5, 6}
    assert all(5e-3 >= trial.params["initial_learning_rate"] >= 2.2e-3 for trial in draw(space, 30))
    assert (space.ranges["epochs"].low, space.ranges["epochs"].high) == (4, 6)
    assert Space.of("extended", epochs=4).fixed["epochs"] == 4


def test_spaces_cannot_be_changed() -> None:
    space = Space.of("extended")
    with pytest.raises(FrozenInstanceError):
        space.name = "notebook"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        space.ranges["epochs"].high = 1000  # type: ignore[misc]


def test_range_may_be_one_value() -> None:
    (trial,) = draw(Space.of("notebook", epochs=Range(3, 3)))
    assert trial.params["epochs"] == 3


def test_given_value_holds_for_every_data_set() -> None:
    space = Space.of("extended", epochs=Range(50, 55), horizontal_flip="auto").for_data_set("handwritten-digits")
    assert space.ranges["epochs"] == Range(50, 55)
    assert space.fixed["horizontal_flip"] == 0
    assert space.fixed["ema_momentum"] == 0.99


@pytest.mark.parametrize(
    ("flip", "mirrors"), [("auto", True), (0.0, False), (Range(0.0, 0.5), True), (Range(0.0, 0.0), False)]
)
def test_probability_decides_the_mirror_images(flip: Any, mirrors: bool) -> None:
    assert Space.of("extended", horizontal_flip=flip).includes_mirror_images() is mirrors


def test_values_move_to_the_nearest_end() -> None:
    """Trials of another study may lie outside."""
    space = Space.of("notebook")
    assert space.clip({"epochs": 9, "decay_rate": 0.001}) == {"epochs": 30, "decay_rate": 0.005}
    assert space.clip({"epochs": 61, "decay_rate": 0.2}) == {"epochs": 60, "decay_rate": 0.2}


@pytest.mark.parametrize("name", SPACES)
def test_values_of_a_trial_complete_the_space(name: str) -> None:
    space = Space.of(name, filters=8)
    completed = space.complete({"epochs": 45})
    assert (completed.epochs, completed.filters) == (45, 8)
    assert completed.normalization == {"notebook": "none", "extended": "batch", "transfer": "none"}[name]


def test_space_has_every_hyperparameter() -> None:
    space = Space.of("notebook")
    assert set(space.ranges) | set(space.fixed) == {declared.name for declared in fields(Hyperparameters)}


@pytest.mark.parametrize("name", SPACES)
def test_rate_decays_over_the_whole_training(name: str) -> None:
    assert Space.of(name).fixed["decay_steps"] == 0


def test_written_digits_are_not_mirrored() -> None:
    space = Space.of("extended").for_data_set("handwritten-digits")
    assert space.fixed["horizontal_flip"] == 0
    assert not space.includes_mirror_images()
    assert Space.of("extended").for_data_set("photographs") == Space.of("extended")
    assert Space.of("extended").includes_mirror_images()
    assert Space.of("extended", horizontal_flip=0.5).for_data_set("handwritten-digits").includes_mirror_images()
    assert str(space.ranges["epochs"]) == "12:18", "learned sooner"
    assert Space.of("notebook").for_data_set("handwritten-digits") == Space.of("notebook")


def test_auto_is_the_space_default() -> None:
    assert Space.of("extended", epochs="auto", dropout=0.1).ranges["epochs"] == Range(36, 45, start=40)
    assert Space.of("extended", dropout=0.1).fixed["dropout"] == 0.1


def test_range_can_be_replaced() -> None:
    space = Space.of("notebook", epochs=Range(2, 3), decay_rate=0.5)
    assert str(space.ranges["epochs"]) == "2:3"
    assert space.fixed["decay_rate"] == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": Range(0, 3)}, "epochs=0: must be 1 or more"),
        ({"epochs": Range(5, 3)}, "epochs=5:3: the range is empty"),
        ({"decay_rate": 2.0}, "decay_rate=2.0: must be 1 or less"),
        ({"dropout": Range(0.5, 0.95)}, "dropout=0.95: must be 0.9 or less"),
    ],
)
def test_invalid_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Space.of("notebook", **values)
    assert message in str(raised.value)


def test_suggest_stays_in_ranges() -> None:
    space = Space.of("notebook", batch_size=64)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        drawn = asdict(space.suggest(study.ask()))
        assert all(r.low <= drawn[name] <= r.high for name, r in space.ranges.items())
        assert drawn["batch_size"] == 64
        assert isinstance(drawn["epochs"], int)


def test_baseline_is_the_clipped_default() -> None:
    assert Space.of("notebook", epochs=Range(2, 3), decay_rate=1.0).baseline() == {
        "initial_learning_rate": 1.5e-3,
        "epochs": 3,
    }
