import optuna
import pytest

from signdigits.tuning import study
from signdigits.tuning.space import Range, Space

LONGEST = 40
SPACE = Space.of("notebook", epochs=Range(10, LONGEST))


@pytest.mark.parametrize(("pruner", "last"), [("percentile", 8), ("median", 8), ("hyperband", 27), ("none", None)])
def test_pruner_ends_a_bad_trial(pruner: str, last: int | None) -> None:
    """The last trial is worse than nine others, and is pruned after its epoch `last`."""
    optimized = optuna.create_study(
        study_name="pruned",
        direction="maximize",
        pruner=study.make_pruner(pruner, SPACE),
        sampler=study.make_sampler(0),
    )
    pruned: list[int | None] = []
    for accuracy in (0.9, 0.8, 0.9, 0.8, 0.9, 0.8, 0.9, 0.8, 0.9, 0.1):
        trial = optimized.ask()
        pruned.append(next((epoch for epoch in range(1, LONGEST + 1) if report(trial, accuracy, epoch)), None))
        optimized.tell(trial, accuracy)
    assert pruned[: study.MIN_COMPLETE_TRIALS] == [None] * study.MIN_COMPLETE_TRIALS, "too few to compare with"
    assert pruned[-1] == last


def report(trial: optuna.Trial, accuracy: float, epoch: int) -> bool:
    trial.report(accuracy, epoch)
    return trial.should_prune()
