import numpy as np
import optuna
import pytest

from signdigits import plots


def test_learning_curves_have_both_parts() -> None:
    history = {name: [0.5, 0.7] for name in ("accuracy", "loss", "val_accuracy", "val_loss")}
    accuracy, loss = plots.plot_learning_curves(history).axes
    assert [line.get_label() for line in accuracy.lines] == ["training", "validation"]
    assert loss.get_title() == "Loss"


def test_refit_has_no_validation_curve() -> None:
    accuracy, _ = plots.plot_learning_curves({"accuracy": [0.5], "loss": [1.0]}).axes
    assert [line.get_label() for line in accuracy.lines] == ["training"]


@pytest.mark.parametrize(("shape", "dtype"), [((8, 8, 3), np.uint8), ((8, 8, 1), np.float32)])
def test_photographs_of_both_modes(shape: tuple[int, ...], dtype: type) -> None:
    figure = plots.plot_photographs([np.zeros(shape, dtype)] * 5, list("abcde"), "Sample")
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c", "d", "e", ""]


@pytest.mark.parametrize(("trials", "pictures"), [(1, 2), (3, 5)])
def test_study_plots_depend_on_trials(trials: int, pictures: int) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: trial.suggest_float("decay_rate", 0, 1), n_trials=trials)
    assert len(plots.plot_study(study, "val_loss")) == pictures
