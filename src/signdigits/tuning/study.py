"""The Optuna study: its name, sampler, pruner and first trials, and the recovery of interrupted trials."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from signdigits.config import StudyParameters
from signdigits.data import lineage
from signdigits.data.loading import Data
from signdigits.errors import UsageError
from signdigits.tracking import runs, store
from signdigits.tuning import storage
from signdigits.tuning.space import Space

log = logging.getLogger(__name__)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
BASELINE = "baseline"  # user attribute "origin" of the first trial
FAILURE_REASON = "failure_reason"  # user attribute of a failed trial; an interrupted one has none
STARTUP_TRIALS = 5  # random, before TPE
WARM_START_TRIALS = 5
MIN_COMPLETE_TRIALS = 3  # before the pruner may prune
MAX_RETRIES = 3  # retries of an interrupted trial: its parameters may be what kills the process
RUNGS = (25, 50, 75, 100)  # percentages of a training after which its value is reported to the pruner
PERCENTILE = 75.0  # lenient, because early accuracies predict late ones poorly


@dataclass(frozen=True)
class Search:
    """An open study and what its trials share."""

    study: optuna.Study
    run_id: str  # run of the study, in which the runs of the trials are nested
    data: Data
    space: Space
    parameters: StudyParameters


def study_settings(data: Data, space: Space, parameters: StudyParameters) -> dict[str, Any]:
    """Return the settings that identify a study: data, split, search space, objective and pruner."""
    start = {"start_digest": data.start.digest} if data.start else {}
    fixed = {name: value for name, value in space.fixed.items() if name != "frozen_blocks" or data.start}
    return {
        **start,
        **lineage.data_tags(data.dataset, data.split),
        "image_size": data.image_size,
        "color_mode": data.parameters.color_mode,
        **{name: str(r) for name, r in space.ranges.items()},
        **fixed,
        "objective": parameters.metric,
        "pruner": parameters.pruner,
    }


def share_features(data: Data, space: Space) -> Data:
    """Return the data with the features of a frozen network in place of images, if all trials of `space` train on the same."""
    from signdigits.model import transfer

    if space.ranges.keys() & {"frozen_blocks", "augmentation", "horizontal_flip", "photometric"}:
        return data  # each trial computes its own
    return transfer.freeze_features(data, space.complete(space.baseline()))


def load_study(name: str, settings: dict[str, Any], space: Space, parameters: StudyParameters) -> optuna.Study:
    """Load the study called `name`, or create it. Raises UsageError if it was created with other settings."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the search prints its own line for each trial
    backend = storage.open_storage(parameters.storage)
    study = optuna.create_study(
        study_name=name,
        storage=backend,
        direction=parameters.direction,
        pruner=make_pruner(parameters.pruner),
        load_if_exists=True,
    )
    # The storage does not hold the sampler's state: the seed grows with the study, or a second start would sample the same
    # trials again.
    study.sampler = make_sampler(int(space.fixed.get("seed", 0)) + len(study.get_trials(deepcopy=False)))
    known = study.user_attrs.get("settings")
    if known is None:
        _explain_new_study(name, settings, backend)
        study.set_user_attr("settings", settings)
        study.enqueue_trial(space.baseline(), user_attrs={"origin": BASELINE})
    elif known != settings:
        changes = ", ".join(_list_changes(known, settings))
        raise UsageError(f"study_name={name}: created with other settings ({changes}); give another --study_name")
    if parameters.warm_start:
        _enqueue_best(study, parameters.warm_start, backend, space)
    return study


def _explain_new_study(name: str, settings: Mapping[str, Any], backend: optuna.storages.BaseStorage) -> None:
    """Log why a study is new although the storage holds one of the same photographs, which may be of an earlier version."""
    summaries = optuna.get_all_study_summaries(backend, include_best_trial=False)
    known = {summary.study_name: summary.user_attrs.get("settings", {}) for summary in summaries}
    same = [one for one, its in known.items() if its.get("dataset_digest") == settings["dataset_digest"]]
    if same:
        changes = _list_changes(known[same[-1]], settings)
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        shown = ", ".join(changes[:3]) + more
        log.info("study %s is new; %s, of the same photographs, has other settings: %s", name, same[-1], shown)


def _list_changes(known: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    differing = sorted(key for key in known.keys() | settings.keys() if known.get(key) != settings.get(key))
    return [f"{key} was {known.get(key)}, is {settings.get(key)}" for key in differing]


def _enqueue_best(study: optuna.Study, source: str, backend: optuna.storages.BaseStorage, space: Space) -> None:
    """Enqueue the best trials of the study called `source`, their values moved into the ranges of `space`.

    Raises UsageError if the storage has no such study.
    """
    try:
        found = optuna.load_study(study_name=source, storage=backend)
    except KeyError as error:
        names = ", ".join(optuna.get_all_study_names(backend))
        raise UsageError(f"warm_start={source}: no such study in the storage; it has {names}") from error
    ranked = rank_trials(found)
    if not ranked:
        log.info("warm_start=%s: none of its complete trials has a run in %s", source, store.store_address())
    for trial in ranked[:WARM_START_TRIALS]:
        params = space.clip({name: value for name, value in trial.params.items() if name in space.ranges})
        study.enqueue_trial(params, user_attrs={"origin": f"{source}/{trial.number}"}, skip_if_exists=True)


def rank_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the complete trials whose MLflow runs exist and are not deleted, best first.

    Ties, which are likely with a few hundred validation images, are broken by the validation loss.
    """
    existing = {run.info.run_id for run in runs.nested_runs(study.user_attrs.get("mlflow_run_id", ""), "trial")}
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    kept = [trial for trial in complete if trial.user_attrs.get("mlflow_run_id") in existing]
    return sorted(kept, key=lambda trial: (sign * (trial.value or 0.0), trial.user_attrs.get("val_loss", 0.0)))


def count_finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def make_sampler(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)


def make_pruner(name: str) -> optuna.pruners.BasePruner:
    """Create the pruner called `name`; its steps are the RUNGS."""
    if name == "percentile":
        return optuna.pruners.PercentilePruner(PERCENTILE, n_startup_trials=MIN_COMPLETE_TRIALS)
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=MIN_COMPLETE_TRIALS)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=RUNGS[0], max_resource=RUNGS[-1], reduction_factor=2)
    return optuna.pruners.NopPruner()


def reconcile_stores(study: optuna.Study) -> None:
    """Fail the trials that a killed process left RUNNING, end their MLflow runs, and enqueue their parameters again.

    The caller holds the study's lock: no trial is really running.
    """
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
    retry_interrupted(study)
    for run in runs.nested_runs(study.user_attrs["mlflow_run_id"]):
        if run.info.status == "RUNNING":
            runs.close_interrupted(run)


def retry_interrupted(study: optuna.Study) -> None:
    """Enqueue the parameters of each interrupted trial again, at most MAX_RETRIES times, and end its MLflow run.

    A process that is killed between its writes to the two stores leaves a FINISHED run of a failed trial.
    """
    trials = study.get_trials(deepcopy=False)
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    interrupted = {trial.number: trial for trial in failed if FAILURE_REASON not in trial.user_attrs}
    retried = {trial.user_attrs.get("retry_of") for trial in trials}
    for number, trial in interrupted.items():
        retries = trial.user_attrs.get("retries", 0)
        if number not in retried and retries < MAX_RETRIES:
            log.info("trial %d was interrupted; its parameters are enqueued again", number)
            params = trial.system_attrs.get("fixed_params", {}) | trial.params  # enqueued and sampled
            origin = {name: value for name, value in trial.user_attrs.items() if name == "origin"}
            study.enqueue_trial(params, user_attrs=origin | {"retry_of": number, "retries": retries + 1})
    for run in runs.nested_runs(study.user_attrs["mlflow_run_id"], "trial") if interrupted else []:
        if int(run.data.tags["trial"]) in interrupted and run.info.status != "KILLED":
            runs.close_interrupted(run)
