"""The Optuna study: its name, sampler and pruner, its first trials, and what interrupted trials leave behind."""

import hashlib
import json
import logging
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from signdigits.config import StudyParameters
from signdigits.data.loading import Data
from signdigits.errors import StudyError
from signdigits.tracking import runs
from signdigits.tuning import storage
from signdigits.tuning.space import Space

log = logging.getLogger(__name__)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
FAILURE_REASON = "failure_reason"  # the user attribute of a trial that failed; an interrupted one has none
STARTUP_TRIALS = 5  # drawn at random before TPE has something to go by
WARM_START_TRIALS = 5
FULL_TRIALS = 3  # complete before the pruner may end one
MAX_RETRIES = 3  # of an interrupted trial's parameters: perhaps they are what kills the process
KEPT = 75.0  # percentile of the complete trials: early accuracies say little of late ones


def study_settings(data: Data, space: Space, parameters: StudyParameters) -> dict[str, Any]:
    """What must be equal for two searches to be one study: data, split, space, objective and pruner."""
    return {
        **runs.data_tags(data.dataset, data.split),
        "image_size": data.parameters.image_size,
        "color_mode": data.parameters.color_mode,
        **{name: str(r) for name, r in space.ranges.items()},
        **space.fixed,
        "objective": parameters.objective,
        "pruner": parameters.pruner,
    }


def automatic_name(data: Data, settings: dict[str, Any]) -> str:
    """The data set's name with eight hexadecimal digits that stand for everything in `settings`."""
    return f"{data.dataset.name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"


def load_study(name: str, settings: dict[str, Any], space: Space, parameters: StudyParameters) -> optuna.Study:
    """Load the study called `name`, or create it. Raises StudyError if it was created with other settings."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the search prints its own line for each trial
    backend = storage.open_storage(parameters.storage)
    study = optuna.create_study(
        study_name=name,
        storage=backend,
        direction="maximize" if parameters.objective == "val_accuracy" else "minimize",
        pruner=make_pruner(parameters.pruner, space),
        load_if_exists=True,
    )
    # The sampler's state is not in the storage: a seed that grows with the study keeps a second start from drawing the
    # same trials again.
    study.sampler = make_sampler(int(space.fixed.get("seed", 0)) + len(study.get_trials(deepcopy=False)))
    known = study.user_attrs.get("settings")
    if known is None:
        study.set_user_attr("settings", settings)
        study.enqueue_trial(space.baseline(), user_attrs={"origin": "baseline"})
    elif known != settings:
        differing = sorted(key for key in known.keys() | settings.keys() if known.get(key) != settings.get(key))
        changes = ", ".join(f"{key} was {known.get(key)}, is {settings.get(key)}" for key in differing)
        raise StudyError(f"study_name={name}: created with other settings ({changes}); give another --study_name")
    if parameters.warm_start:
        _enqueue_best(study, parameters.warm_start, backend, space)
    return study


def _enqueue_best(study: optuna.Study, source: str, backend: optuna.storages.BaseStorage, space: Space) -> None:
    """Enqueue the best trials of the study called `source`, their values moved into the ranges of `space`.

    Raises StudyError if the storage has no such study.
    """
    try:
        found = optuna.load_study(study_name=source, storage=backend)
    except KeyError as error:
        names = ", ".join(optuna.get_all_study_names(backend))
        raise StudyError(f"warm_start={source}: no such study in the storage; it has {names}") from error
    for trial in rank_trials(found)[:WARM_START_TRIALS]:
        params = space.clip({name: value for name, value in trial.params.items() if name in space.ranges})
        study.enqueue_trial(params, user_attrs={"origin": f"{source}/{trial.number}"}, skip_if_exists=True)


def rank_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The complete trials whose MLflow runs have not been deleted, best first.

    Of equal values, which a few hundred validation images make likely, the one with the lower validation loss leads.
    """
    deleted = runs.deleted_runs(study.user_attrs.get("mlflow_run_id", ""))
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    kept = [trial for trial in complete if trial.user_attrs.get("mlflow_run_id") not in deleted]
    return sorted(kept, key=lambda trial: (sign * (trial.value or 0.0), trial.user_attrs.get("val_loss", 0.0)))


def count_finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def make_sampler(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)


def make_pruner(name: str, space: Space) -> optuna.pruners.BasePruner:
    """Create the pruner called `name`; its steps are epochs."""
    longest = space.ends("epochs")[1]
    # Strong augmentation learns slowly at first: nothing is judged before a fifth of the longest trial.
    warmup = max(4, longest // 5)
    if name == "percentile":
        return optuna.pruners.PercentilePruner(KEPT, n_startup_trials=FULL_TRIALS, n_warmup_steps=warmup)
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=FULL_TRIALS, n_warmup_steps=warmup)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=3, max_resource=max(3, longest))
    return optuna.pruners.NopPruner()


def _is_interrupted(trial: FrozenTrial) -> bool:
    """Tell a trial whose process ended from one that failed for a reason of its own."""
    return trial.state == TrialState.FAIL and FAILURE_REASON not in trial.user_attrs


def reconcile_stores(study: optuna.Study) -> None:
    """Fail the trials that a killed process left RUNNING, close their MLflow runs, and queue their parameters again.

    The caller holds the study alone: nothing in it can be at work.
    """
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
    retry_interrupted(study)
    for run in runs.nested_runs(study.user_attrs["mlflow_run_id"]):
        if run.info.status == "RUNNING":
            runs.close_interrupted(run)


def retry_interrupted(study: optuna.Study) -> None:
    """Queue the parameters of each interrupted trial once more, MAX_RETRIES times at most, and close its MLflow run.

    A process killed between the two stores leaves a FINISHED run of a trial that Optuna knows as failed.
    """
    trials = study.get_trials(deepcopy=False)
    interrupted = {trial.number: trial for trial in trials if _is_interrupted(trial)}
    retried = {trial.user_attrs.get("retry_of") for trial in trials}
    for number, trial in interrupted.items():
        retries = trial.user_attrs.get("retries", 0)
        if number not in retried and retries < MAX_RETRIES:
            log.info("trial %d was interrupted: its parameters are queued again", number)
            params = trial.system_attrs.get("fixed_params", {}) | trial.params  # those it was queued with, and drew
            study.enqueue_trial(params, user_attrs={"retry_of": number, "retries": retries + 1})
    for run in runs.nested_runs(study.user_attrs["mlflow_run_id"], "trial") if interrupted else []:
        if int(run.data.tags["trial"]) in interrupted and run.info.status != "KILLED":
            runs.close_interrupted(run)
