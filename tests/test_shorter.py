import dataclasses

import mlflow
import numpy as np
import pytest
from optuna.testing.pruners import DeterministicPruner
from optuna.trial import TrialState

from signdigits import search, train
from signdigits.hyperparameters import Hyperparameters, Range, Space, StudyParameters
from signdigits.photographs import data
from signdigits.study.shorter import Shorter

SPACE = Space.of("notebook", epochs=Range(2, 6), batch_size=16)
TWO = StudyParameters(n_trials=2, pruner="none")


def histories(run_id: str, metric: str) -> list[float]:
    return [point.value for point in mlflow.MlflowClient().get_metric_history(run_id, metric)]


@pytest.mark.parametrize("augmentation", [0.0, 1.0])
def test_a_training_contains_the_shorter_ones(store: str, loaded: data.Data, augmentation: float) -> None:
    four = Hyperparameters(epochs=4, batch_size=16, augmentation=augmentation, decay_rate=0.5, decay_steps=3)
    shorter = Shorter("val_loss", 2)
    long = train.fit(loaded.training, loaded.validation, 3, four, callbacks=[shorter])
    inferred = shorter.inferred(loaded.validation)
    short = train.fit(loaded.training, loaded.validation, 3, dataclasses.replace(four, epochs=shorter.epochs))
    for metric, values in short.history.items():
        assert values == long.history[metric][: shorter.epochs]
    for kept, trained in zip(shorter.weights, short.trained.get_weights(), strict=True):
        np.testing.assert_array_equal(kept, trained)
    if inferred:
        assert inferred["temperature"] == pytest.approx(short.temperature)


def test_what_a_trial_says_about_shorter_ones_is_marked_and_may_be_the_best(store: str, loaded: data.Data) -> None:
    opened = search.search(loaded, SPACE, TWO)
    known = []
    for trial in opened.study.trials:
        run = mlflow.get_run(trial.user_attrs["mlflow_run_id"])
        curves = zip(histories(run.info.run_id, "val_accuracy"), histories(run.info.run_id, "val_loss"), strict=True)
        reached = [(accuracy, -loss, epochs) for epochs, (accuracy, loss) in enumerate(curves, start=1)]
        assert run.data.metrics["val_accuracy"] == trial.value == reached[-1][0], "a trial is what was trained"
        best = max(reached[1:])  # of equally accurate epochs, that of the lowest loss
        known.append(best)
        inferred = {name: run.data.metrics.get(f"inferred_{name}") for name in ("val_accuracy", "val_loss", "epochs")}
        if best != reached[-1]:
            assert tuple(inferred.values()) == (best[0], -best[1], best[2])
        else:
            assert set(inferred.values()) == {None}
    assert (opened.best.val_accuracy, -opened.best.val_loss, opened.best_hyperparameters.epochs) == max(known)
    study = mlflow.get_run(opened.run_id).data
    assert study.metrics["best_val_accuracy"] == opened.best_value
    assert study.metrics["best_epochs"] == opened.best_hyperparameters.epochs
    assert study.tags["best_is_inferred"] == str(opened.best.inferred)


def test_a_trial_that_was_pruned_still_answers_for_the_epochs_it_had(store: str, loaded: data.Data) -> None:
    with search.open_study(loaded, Space.of("notebook", epochs=Range(1, 3), batch_size=16), TWO) as opened:
        opened.study.pruner = DeterministicPruner(True)
        search.run_trials(dataclasses.replace(opened, parameters=dataclasses.replace(TWO, n_trials=1)))
    (trial,) = opened.study.get_trials(states=[TrialState.PRUNED])
    (answer,) = search.answers(trial)
    assert (answer.inferred, answer.params["epochs"]) == (True, 1)
    assert opened.best == answer


def test_where_the_epochs_are_fixed_there_is_nothing_to_infer(store: str, loaded: data.Data) -> None:
    opened = search.search(loaded, Space.of("notebook", epochs=2, batch_size=16), TWO)
    assert not any(answer.inferred for answer in opened.answers)
