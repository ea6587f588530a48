import optuna
import pytest

from signdigits.tuning import study


@pytest.mark.parametrize(("pruner", "last"), [("percentile", 25), ("median", 25), ("hyperband", 50), ("none", None)])
def test_pruner_ends_a_bad_trial(pruner: str, last: int | None) -> None:
    """The last trial is worse than nine others, and is pruned at the rung `last`."""
    optimized = optuna.create_study(
        study_name="halved", direction="maximize", pruner=study.make_pruner(pruner), sampler=study.make_sampler(0)
    )
    pruned: list[int | None] = []
    for accuracy in (0.9, 0.8, 0.9, 0.8, 0.9, 0.8, 0.9, 0.8, 0.9, 0.1):
        trial = optimized.ask()
        pruned.append(next((rung for rung in study.RUNGS if report(trial, accuracy, rung)), None))
        optimized.tell(trial, accuracy)
    assert pruned[: study.MIN_COMPLETE_TRIALS] == [None] * study.MIN_COMPLETE_TRIALS, "too few to compare with"
    assert pruned[-1] == last


def report(trial: optuna.Trial, accuracy: float, rung: int) -> bool:
    trial.report(accuracy, rung)
    return trial.should_prune()
