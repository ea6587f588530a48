"""Search the hyperparameters with Optuna, every trial a nested MLflow run.

    python -m signdigits search --data FOLDER --n_trials 12
    mlflow run . -e search -P data=FOLDER -P n_trials=12 -P epochs=5:20

The same command continues the same study after an interruption: the name is derived from the data and the settings.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import mlflow
import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from signdigits import files, plots
from signdigits.config import StudyParameters
from signdigits.data import lineage
from signdigits.data.loading import Data
from signdigits.errors import StorageError
from signdigits.model import architecture, transfer
from signdigits.tracking import runs, urls
from signdigits.tuning import executors, storage
from signdigits.tuning.choice import Choice, choose_trial
from signdigits.tuning.space import Space, format_value
from signdigits.tuning.study import Search, count_finished, load_study, reconcile_stores, share_features, study_settings

log = logging.getLogger(__name__)


def search(data: Data, space: Space, parameters: StudyParameters) -> Search:
    """Run trials until the study has `n_trials` finished ones, and return it."""
    with open_study(data, space, parameters) as opened:
        optimize_study(opened)
    link = urls.compare_url(urls.ui_url(), runs.find_run(opened.run_id))
    log.info("compare its trials: %s, then %s", urls.ui_command(), link)
    return opened


@contextmanager
def open_study(data: Data, space: Space, parameters: StudyParameters) -> Iterator[Search]:
    """Create or continue the study of these data and settings, inside its MLflow run.

    Raises UsageError if the images are too small for the space, if the storage cannot be used, if another process is
    searching the same study, or if a study of that name was created with other data or settings.
    """
    space = space.for_data_set(data.dataset.origin)
    # Fail before the search, not in the middle of it.
    deepest = space.complete({name: r.high for name, r in space.ranges.items()})
    transfer.check_start(data, deepest)
    if not data.start:
        architecture.check_blocks(deepest, data.image_size)
    settings = study_settings(data, space, parameters)
    name = parameters.study_name
    if name == "auto":
        name = f"{data.dataset.name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
    parameters = executors.count_workers(parameters)
    executors.check_stores(parameters)
    with storage.lock_study(parameters.storage, name):
        study = load_study(name, settings, space, parameters)
        with _study_run(study) as run_id:
            opened = Search(study, run_id, share_features(data, space), space, parameters)
            _describe_study(opened)
            reconcile_stores(study)
            yield opened


@contextmanager
def _study_run(study: optuna.Study) -> Iterator[str]:
    """Open or continue the study's run; a run that `mlflow run` created records the number of added trials."""
    run_id = study.user_attrs.get("mlflow_run_id")
    before = count_finished(study)
    launched = runs.launched_run()
    with runs.start_run("study", study.study_name, run_id=run_id) as run:
        study.set_user_attr("mlflow_run_id", run.info.run_id)
        try:
            yield run.info.run_id
        finally:
            if launched not in (None, run.info.run_id):
                added = count_finished(study) - before
                mlflow.MlflowClient().log_metric(launched, "trials_added", added)


def optimize_study(search: Search) -> Choice:
    """Run trials until the study has `n_trials` finished ones or the timeout, log the results, and choose a trial."""
    run_missing_trials(search)
    choice = choose_trial(search.study, search.parameters.metric)
    _log_study(search, choice)
    return choice


def run_missing_trials(search: Search) -> None:
    """Run the missing trials, and leave none RUNNING in either store, also after an error."""
    try:
        executors.run_trials(search)
    except StorageInternalError as error:  # nothing can be recorded; the next start reconciles the stores
        raise StorageError(
            f"study {search.study.study_name}: {storage.first_line(error)}; once the database is back, run the same "
            "command to continue"
        ) from error
    except BaseException:
        reconcile_stores(search.study)
        raise
    reconcile_stores(search.study)  # a worker that lost its heartbeat may have continued for a while


def param_importances(study: optuna.Study) -> dict[str, float]:
    """Return the importance of each searched parameter (PED-ANOVA); the sum is 1.

    Watanabe, Bansal and Hutter, 2023, arXiv:2304.10255. Empty if there are too few complete trials.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Optuna warns if all would be equal
        try:
            importances = optuna.importance.get_param_importances(study)
        except (UserWarning, ValueError):
            return {}
    return {f"importance_{name}": value for name, value in importances.items()}


def _describe_study(search: Search) -> None:
    """Log the study's parameters, search space and data to its run, with a description."""
    data, space, parameters = search.data, search.space, search.parameters
    ranges = {name: str(r) for name, r in space.ranges.items()}
    runs.log_params(asdict(data.parameters) | ranges | dict(space.fixed) | asdict(parameters))
    mlflow.log_dict(ranges | dict(space.fixed), "study/space.json")
    lineage.log_data(data, parts=("training", "validation"))
    if data.parameters.log_data:
        lineage.log_photographs(data.dataset, search.run_id)
    runs.log_versions()
    # Tags, because a continued study may have more trials or another timeout, and MLflow's parameters cannot change.
    mlflow.set_tags({"study": search.study.study_name, "n_trials": parameters.n_trials, "timeout": parameters.timeout})
    rows = runs.markdown_table(
        [
            ("searched", "from"),
            *(
                (f"`{name}`", f"{r.low} to {r.high}{', logarithmic' if r.log else ''}")
                for name, r in space.ranges.items()
            ),
        ]
    )
    runs.set_description(
        f"**A study on `{data.parameters.data}`.** Every nested run is a *trial*: the same network trained on "
        f"{len(data.training)} images with other hyperparameters, judged by `{parameters.metric}` on "
        f"{len(data.validation)} others. A run named *refit* is the chosen trial fitted again on both, scored on "
        f"{len(data.split.testing)} test images that no trial has seen; *ensemble* is the mean of the refits.\n\n{rows}\n"
    )


def _log_study(search: Search, choice: Choice) -> None:
    """Log the chosen trial, the counts, the importances and Optuna's plots to the study's run."""
    study, metric, best = search.study, search.parameters.metric, choice.trial
    trials = study.get_trials(deepcopy=False)
    for state in TrialState:
        mlflow.log_metric(f"trials_{state.name.lower()}", sum(trial.state == state for trial in trials))
    mlflow.set_tags(
        {"best_trial": best.number, "best_run_id": best.user_attrs["mlflow_run_id"], "choice": choice.reason}
    )
    values = {f"best_{name}": value for name, value in best.params.items()}
    mlflow.log_metrics({"best_trial": best.number, f"best_{metric}": best.value, **values})
    mlflow.log_metrics(param_importances(study))
    for name, figure in plots.plot_study(study, metric).items():
        mlflow.log_figure(figure, f"study/{name}.png", save_kwargs={"bbox_inches": "tight"})
    mlflow.log_text(files.to_csv(study.trials_dataframe()), "study/trials.csv")
    log.info(
        "chosen: %s; %s %.4f with %s", choice.reason, metric, best.value,
        ", ".join(f"{name}={format_value(value)}" for name, value in best.params.items()),
    )  # fmt: skip
