"""Search the hyperparameters with Optuna, every trial a nested MLflow run.

    python -m signdigits search --data FOLDER --n_trials 12
    mlflow run . -e search -P data=FOLDER -P n_trials=12 -P epochs=5:20

The same command continues the same study, whatever ended it: its name follows from the data and the settings.
"""

import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import filelock
import keras
import mlflow
import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from signdigits import model, plots, tracking, train
from signdigits.data import Data
from signdigits.errors import StudyError
from signdigits.hyperparameters import Hyperparameters, Space, StudyParameters
from signdigits.shorter import INFERRED, Answer, Shorter, answers, merit
from signdigits.workbench import Workbench

log = logging.getLogger(__name__)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
STARTUP_TRIALS = 5  # drawn at random before the sampler and the pruner have something to go by
KEPT = 90.0  # percent of the trials that the pruner of that name leaves alone: early accuracies say little of late ones
MAX_FAILURES = 3  # in a row: then the fault lies with the data or the settings


@dataclass(frozen=True)
class Search:
    """A study that is being searched, and the run that holds its trials."""

    study: optuna.Study
    run_id: str
    data: Data
    space: Space
    parameters: StudyParameters
    workbench: Workbench = field(default_factory=Workbench)

    @property
    def answers(self) -> list[Answer]:
        """What the finished trials have found, oldest first."""
        return [answer for trial in self.study.get_trials(deepcopy=False, states=FINISHED) for answer in answers(trial)]

    @property
    def best(self) -> Answer:
        """The best that was found. Raises StudyError if no trial has come far enough to tell."""
        if not (found := self.answers):
            raise StudyError(f"study {self.study.study_name}: no trial is complete; raise --timeout or --n_trials")
        return max(found, key=lambda answer: merit(self.parameters.objective, answer.val_accuracy, answer.val_loss))

    @property
    def best_value(self) -> float:
        """The objective of the best. Raises StudyError as `best` does."""
        return float(getattr(self.best, self.parameters.objective))

    @property
    def best_hyperparameters(self) -> Hyperparameters:
        return self.space.complete(self.best.params)


def search(data: Data, space: Space, parameters: StudyParameters) -> Search:
    """Bring the study to `n_trials` finished trials, and return it."""
    with open_study(data, space, parameters) as opened:
        optimize(opened)
        return opened


@contextmanager
def open_study(data: Data, space: Space, parameters: StudyParameters) -> Iterator[Search]:
    """The study of these data and settings, new or continued, inside its MLflow run.

    Raises ParameterError if the images are too small for the space, and StudyError if the storage cannot be used, if
    another process is searching the same study, or if a study of that name was made with other data or settings.
    """
    model.check_blocks(space.ends("conv_blocks")[1], data.parameters.image_size)  # now, not in the middle of the search
    settings = identity(data, space, parameters)
    name = parameters.study_name if parameters.study_name != "auto" else automatic_name(data, settings)
    with exclusive(parameters.storage, name):
        study = load_study(name, settings, space, parameters)
        with tracking.run("study", name, run_id=study.user_attrs.get("mlflow_run_id")) as run:
            study.set_user_attr("mlflow_run_id", run.info.run_id)
            opened = Search(study, run.info.run_id, data, space, parameters)
            describe(opened)
            reconcile(opened)
            yield opened


def identity(data: Data, space: Space, parameters: StudyParameters) -> dict[str, Any]:
    """What must be equal for two searches to be one study: data, split, space and what the trials are judged by."""
    return {
        **tracking.data_tags(data.dataset, data.split),
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


@contextmanager
def exclusive(storage: str, name: str) -> Iterator[None]:
    """Hold the study alone on this machine. The lock goes with the process, also when it is killed."""
    address = str(Path(storage.removeprefix("sqlite:///")).resolve()) if storage.startswith("sqlite:") else storage
    key = hashlib.sha256(f"{address}\0{name}".encode()).hexdigest()[:16]
    lock = filelock.FileLock(Path(tempfile.gettempdir(), f"signdigits-{key}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise StudyError(
            f"study {name}: another process is searching it; wait for it, stop it, or give another --study_name"
        ) from error
    except OSError as error:  # somebody else's lock, or no room for one
        raise StudyError(f"study {name}: cannot lock {lock.lock_file} ({error}); remove it, or set TMPDIR") from error
    try:
        yield
    finally:
        lock.release()


def load_study(name: str, settings: dict[str, Any], space: Space, parameters: StudyParameters) -> optuna.Study:
    """The study called `name`, made if it does not exist. Raises StudyError where `settings` are not those it has."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # failed trials are told of by `log_progress`, in a line
    shown_storage = hide_password(parameters.storage)
    try:
        study = optuna.create_study(
            study_name=name,
            storage=parameters.storage,
            direction="maximize" if parameters.objective == "val_accuracy" else "minimize",
            pruner=make_pruner(parameters.pruner, space),
            load_if_exists=True,
        )
    except Exception as error:  # whatever Optuna, SQLAlchemy, a driver or the network have to say
        raise StudyError(f"storage={shown_storage}: {str(error.__cause__ or error).splitlines()[0]}") from error
    known = study.user_attrs.get("settings")
    if known is None:
        study.set_user_attr("settings", settings)
        study.enqueue_trial(space.baseline(), user_attrs={"drawn": "baseline"})
    elif known != settings:
        differing = sorted(key for key in known.keys() | settings.keys() if known.get(key) != settings.get(key))
        changes = ", ".join(f"{key} was {known.get(key)}, is {settings.get(key)}" for key in differing)
        raise StudyError(f"study_name={name}: made with other settings ({changes}); give another --study_name")
    return study


def hide_password(storage: str) -> str:
    """The address of the storage as it may be shown and logged. Raises StudyError if it is none."""
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except ArgumentError as error:
        raise StudyError("storage: not an SQLAlchemy URL, such as sqlite:///optuna.db") from error


def make_pruner(name: str, space: Space) -> optuna.pruners.BasePruner:
    """The pruner called `name`; steps are epochs."""
    shortest, longest = space.ends("epochs")
    # Strong augmentation learns slowly at first: nothing is judged before a third of the shortest trial.
    warmup = max(5, shortest // 3)
    if name == "percentile":
        return optuna.pruners.PercentilePruner(KEPT, n_startup_trials=STARTUP_TRIALS, n_warmup_steps=warmup)
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=warmup)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=3, max_resource=max(3, longest))
    return optuna.pruners.NopPruner()


def reconcile(opened: Search) -> None:
    """Close what a killed process left open, in both stores, and queue the trials that it did not finish."""
    study = opened.study
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        log.info("trial %d was interrupted: it is tried again", trial.number)
    retried = {trial.user_attrs.get("retry_of") for trial in study.get_trials(deepcopy=False)}
    interrupted = [
        trial
        for trial in study.get_trials(deepcopy=False, states=[TrialState.FAIL])
        if "failure_reason" not in trial.user_attrs
    ]
    for trial in interrupted:
        if trial.number not in retried:
            drawn = trial.system_attrs.get("fixed_params", {}) | trial.params
            study.enqueue_trial(drawn, user_attrs={"retry_of": trial.number})
    close_runs(opened.run_id, {trial.number for trial in interrupted})


def close_runs(study_run_id: str, interrupted: set[int]) -> None:
    """Mark as KILLED the nested runs that are still RUNNING, and those of the interrupted trials."""
    client = mlflow.MlflowClient()
    for run in children(study_run_id):
        number = run.data.tags.get("trial")
        left_open = run.info.status == "RUNNING"
        # A process killed between the two stores leaves a FINISHED run of a trial that Optuna does not know as such.
        unknown = run.info.status == "FINISHED" and number is not None and int(number) in interrupted
        if left_open or unknown:
            client.set_tag(run.info.run_id, "failure_reason", "interrupted")
            client.set_tag(run.info.run_id, "trial_state", "INTERRUPTED")
            client.set_terminated(run.info.run_id, "KILLED")


def children(run_id: str) -> list[mlflow.entities.Run]:
    """The runs nested under a run, oldest first."""
    experiment = mlflow.get_run(run_id).info.experiment_id
    found = mlflow.search_runs(
        [experiment],
        f"tags.`mlflow.parentRunId` = '{run_id}'",
        order_by=["attributes.start_time ASC"],
        output_format="list",
    )
    return list(found)


def optimize(opened: Search) -> None:
    """Bring the study to `n_trials` finished trials, or run until the time is up, and report on it."""
    run_trials(opened)
    log_study(opened)


def run_trials(opened: Search) -> None:
    """Run trials until the study has `n_trials` finished ones or the time is up."""
    study, parameters = opened.study, opened.parameters
    started = time.monotonic()
    done = len(study.get_trials(deepcopy=False, states=FINISHED))
    log.info("study %s: %d of %d trials are finished", study.study_name, done, parameters.n_trials)
    while done < parameters.n_trials:
        if parameters.timeout and done and time.monotonic() - started >= parameters.timeout:
            log.info("time is up after %d of %d trials; the same command goes on", done, parameters.n_trials)
            break
        study.sampler = make_sampler(study, int(opened.space.fixed.get("seed", 0)))
        study.optimize(
            lambda trial: attempt(opened, trial),
            n_trials=1,
            catch=(Exception,),
            callbacks=[lambda _, trial: log_progress(opened, trial, started)],
        )
        refuse_failures(study)
        done = len(study.get_trials(deepcopy=False, states=FINISHED))


def make_sampler(study: optuna.Study, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of the next trial.

    Its state is not in the storage: seeded by the trials that have ended by themselves, a search that was interrupted
    draws what an uninterrupted one would have drawn, and one whose trial failed does not draw the same again.
    """
    ended = sum(t.state in FINISHED or "failure_reason" in t.user_attrs for t in study.get_trials(deepcopy=False))
    return optuna.samplers.TPESampler(seed=seed + ended, n_startup_trials=STARTUP_TRIALS)


def attempt(opened: Search, trial: optuna.Trial) -> float:
    """`run_trial`, its failure noted on the trial: without a reason, a failed trial counts as interrupted."""
    try:
        return run_trial(opened, trial)
    except optuna.TrialPruned:
        raise
    except Exception as error:
        trial.set_user_attr("failure_reason", f"{type(error).__name__}: {error}"[:2000])
        raise


def run_trial(opened: Search, trial: optuna.Trial) -> float:
    """Fit the hyperparameters that `trial` draws, in a nested run, and return what it reached."""
    hyperparameters = opened.space.suggest(trial)
    data, objective = opened.data, opened.parameters.objective
    with tracking.run("trial", f"trial-{trial.number:03d}") as run:
        trial.set_user_attr("mlflow_run_id", run.info.run_id)
        mlflow.set_tags({"trial": trial.number, "study": opened.study.study_name, "trial_state": "RUNNING"})
        mlflow.set_tags({name: str(value) for name, value in trial.user_attrs.items()})
        mlflow.log_params(asdict(hyperparameters))
        mlflow.set_tags(tracking.data_tags(data.dataset, data.split))
        pruning, shorter = Pruning(trial, objective), Shorter(objective, opened.space.ends("epochs")[0])
        try:
            fitted = train.fit(
                data.training,
                data.validation,
                len(data.dataset.class_names),
                hyperparameters,
                workbench=opened.workbench,
                callbacks=[pruning, shorter],
                title=f"trial {trial.number}",
            )
        except BaseException as error:
            mlflow.set_tag("trial_state", "FAIL" if isinstance(error, Exception) else "INTERRUPTED")
            raise
        for name in ("val_accuracy", "val_loss"):
            trial.set_user_attr(name, fitted.last(name))
        trial.set_user_attr("temperature", fitted.temperature)
        mlflow.log_metric("val_loss_fluctuation", train.fluctuation(fitted.history["val_loss"]))
        mlflow.log_metric("temperature", fitted.temperature)
        if inferred := shorter.inferred(data.validation):
            trial.set_user_attr(INFERRED, inferred)
            mlflow.log_metrics({f"inferred_{name}": float(value) for name, value in inferred.items()})
        mlflow.set_tag("trial_state", "PRUNED" if pruning.pruned else "COMPLETE")
    if pruning.pruned:
        raise optuna.TrialPruned
    return fitted.last(objective)


class Pruning(keras.callbacks.Callback):
    """Reports each epoch to the trial, and stops the training where the pruner says so.

    It does not raise: what autologging has not written yet would be lost.
    """

    def __init__(self, trial: optuna.Trial, objective: str) -> None:
        super().__init__()
        self.trial, self.objective, self.pruned = trial, objective, False

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.trial.report((logs or {})[self.objective], step=epoch + 1)
        last = epoch + 1 == self.params["epochs"]
        if not last and self.trial.should_prune():
            self.pruned = True
            self.model.stop_training = True


def refuse_failures(study: optuna.Study) -> None:
    """Raise StudyError when the last trials have all failed: more of them would not help."""
    ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    reasons = [trial.user_attrs.get("failure_reason") for trial in ended[-MAX_FAILURES:]]
    if len(reasons) == MAX_FAILURES and all(reasons):
        raise StudyError(f"study {study.study_name}: the last {MAX_FAILURES} trials failed, at last with {reasons[-1]}")


def log_progress(opened: Search, trial: FrozenTrial, started: float) -> None:
    """One line for the trial that has just ended: what it tried and reached, the best so far, the time left."""
    study, parameters = opened.study, opened.parameters
    trials = study.get_trials(deepcopy=False)
    ended = [t for t in trials if t.state in FINISHED]
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    drawn = "  ".join(f"{name} {shown(value)}" for name, value in trial.params.items())
    value = f"{trial.value:.4f}" if trial.value is not None else "-"
    durations = [t.duration.total_seconds() for t in ended if t.duration]
    left = sum(durations) / max(len(durations), 1) * (parameters.n_trials - len(ended))
    if parameters.timeout:
        left = min(left, max(parameters.timeout - (time.monotonic() - started), 0))
    best = f"best {opened.best_value:.4f} ({opened.best})" if opened.answers else "no best yet"
    log.info(
        "%d/%d  trial %d %s: %s %s  %s  %.0f s;  %s, about %s left",
        len(ended), parameters.n_trials, trial.number, trial.state.name.lower(), parameters.objective, value, drawn,
        seconds, best, duration(left),
    )  # fmt: skip
    if reason := trial.user_attrs.get("failure_reason"):
        log.warning("trial %d failed: %s", trial.number, reason)


def importances(study: optuna.Study) -> dict[str, float]:
    """How much of the objective's variation each searched parameter explains (PED-ANOVA); they sum to 1.

    Watanabe, Bansal and Hutter, 2023, arXiv:2304.10255. Empty while there are too few complete trials to tell.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Optuna warns where all would come out equal
        try:
            found = optuna.importance.get_param_importances(study)
        except (UserWarning, ValueError):
            return {}
    return {f"importance_{name}": value for name, value in found.items()}


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def describe(opened: Search) -> None:
    """Log what the study is made of to its run, with a description that a stranger understands."""
    data, space, parameters = opened.data, opened.space, opened.parameters
    ranges = {name: str(r) for name, r in space.ranges.items()}
    chosen = asdict(parameters) | {"storage": hide_password(parameters.storage)}
    tracking.log_params(asdict(data.parameters) | ranges | dict(space.fixed) | chosen)
    mlflow.log_dict(ranges | dict(space.fixed), "study/space.json")  # `mlflow run` has recorded "auto" for these
    tracking.log_data(data, parts=("training", "validation"))
    tracking.log_versions()
    # Tags, because a study that is continued may be given more trials or another limit, and parameters cannot change.
    mlflow.set_tags({"study": opened.study.study_name, "n_trials": parameters.n_trials, "timeout": parameters.timeout})
    rows = tracking.markdown(
        [
            ("searched", "from"),
            *(
                (f"`{name}`", f"{r.low} to {r.high}{', logarithmic' if r.log else ''}")
                for name, r in space.ranges.items()
            ),
        ]
    )
    tracking.describe(
        f"**A study on `{data.parameters.data}`.** Every nested run is a *trial*: the same network trained on "
        f"{len(data.training)} images with other hyperparameters, judged by `{parameters.objective}` on "
        f"{len(data.validation)} others. A run named *refit* is the best trial fitted again on both, scored on "
        f"{len(data.split.testing)} test images that no trial has seen.\n\n{rows}\n"
    )


def log_study(opened: Search) -> None:
    """Log the best trial, the counts, the importances and Optuna's pictures to the study's run."""
    study, objective = opened.study, opened.parameters.objective
    trials = study.get_trials(deepcopy=False)
    for state in TrialState:
        mlflow.log_metric(f"trials_{state.name.lower()}", sum(trial.state == state for trial in trials))
    best = opened.best
    mlflow.set_tags({"best_trial": best.trial, "best_run_id": best.run_id, "best_is_inferred": best.inferred})
    values = {f"best_{name}": value for name, value in best.params.items()}
    mlflow.log_metrics({"best_trial": best.trial, f"best_{objective}": opened.best_value, **values})
    mlflow.log_metrics(importances(study))
    for name, figure in plots.study(study, objective).items():
        mlflow.log_figure(figure, f"study/{name}.png", save_kwargs={"bbox_inches": "tight"})
    mlflow.log_text(study.trials_dataframe().to_csv(index=False), "study/trials.csv")
    log.info(
        "best: %s, %s %.4f with %s", best, objective, opened.best_value,
        ", ".join(f"{name}={shown(value)}" for name, value in best.params.items()),
    )  # fmt: skip
