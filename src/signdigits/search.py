"""Search the hyperparameters with Optuna, every trial a nested MLflow run.

    python -m signdigits search --data FOLDER --n_trials 12
    mlflow run . -e search -P data=FOLDER -P n_trials=12 -P epochs=5:20

The same command continues the same study, whatever ended it: its name follows from the data and the settings.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import mlflow
import optuna
from optuna.trial import FrozenTrial, TrialState

from signdigits import plots, tracking
from signdigits.errors import StorageError, StudyError
from signdigits.hyperparameters import Hyperparameters, Space, StudyParameters
from signdigits.network import model
from signdigits.photographs.data import Data
from signdigits.study import crew, storage
from signdigits.study.outcome import Outcome, is_interrupted
from signdigits.study.progress import FINISHED, Progress, shown
from signdigits.study.shorter import Answer, answers, merit
from signdigits.study.trial import Task

log = logging.getLogger(__name__)

STARTUP_TRIALS = 5  # drawn at random before the sampler has something to go by
FULL_TRIALS = 3  # complete before the pruner may end one
KEPT = 75.0  # percent of the complete trials that one must not be worse than: early accuracies say little of late ones
MAX_RETRIES = 3  # of what an interrupted trial drew: perhaps it is what kills the process


@dataclass(frozen=True)
class Search:
    """A study that is being searched, and the run that holds its trials."""

    study: optuna.Study
    task: Task
    parameters: StudyParameters

    @property
    def run_id(self) -> str:
        return self.task.run_id

    @property
    def data(self) -> Data:
        return self.task.data

    @property
    def space(self) -> Space:
        return self.task.space

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
    crew.check(parameters)
    with storage.exclusive(parameters.storage, name):
        study = load_study(name, settings, space, parameters)
        with tracking.run("study", name, run_id=study.user_attrs.get("mlflow_run_id")) as run:
            study.set_user_attr("mlflow_run_id", run.info.run_id)
            opened = Search(study, Task(name, run.info.run_id, data, space, parameters.objective), parameters)
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


def load_study(name: str, settings: dict[str, Any], space: Space, parameters: StudyParameters) -> optuna.Study:
    """The study called `name`, made if it does not exist. Raises StudyError where `settings` are not those it has."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # failed trials are told of by `log_progress`, in a line
    study = optuna.create_study(
        study_name=name,
        storage=storage.connect(parameters.storage),
        direction="maximize" if parameters.objective == "val_accuracy" else "minimize",
        pruner=make_pruner(parameters.pruner, space),
        load_if_exists=True,
    )
    known = study.user_attrs.get("settings")
    if known is None:
        study.set_user_attr("settings", settings)
        study.enqueue_trial(space.baseline(), user_attrs={"drawn": "baseline"})
    elif known != settings:
        differing = sorted(key for key in known.keys() | settings.keys() if known.get(key) != settings.get(key))
        changes = ", ".join(f"{key} was {known.get(key)}, is {settings.get(key)}" for key in differing)
        raise StudyError(f"study_name={name}: made with other settings ({changes}); give another --study_name")
    return study


def make_sampler(space: Space, seed: int) -> optuna.samplers.BaseSampler:
    """Draws everything but `epochs`: a training answers for every shorter one, so each goes to the end of their range."""
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
    with storage.experimental():
        return optuna.samplers.PartialFixedSampler({"epochs": space.ends("epochs")[1]}, sampler)


def make_pruner(name: str, space: Space) -> optuna.pruners.BasePruner:
    """The pruner called `name`; steps are epochs."""
    longest = space.ends("epochs")[1]
    # Strong augmentation learns slowly at first: nothing is judged before a fifth of a trial.
    warmup = max(4, longest // 5)
    if name == "percentile":
        return optuna.pruners.PercentilePruner(KEPT, n_startup_trials=FULL_TRIALS, n_warmup_steps=warmup)
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=FULL_TRIALS, n_warmup_steps=warmup)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=3, max_resource=max(3, longest))
    return optuna.pruners.NopPruner()


def reconcile(opened: Search) -> None:
    """Close what a killed process left open, in both stores, and queue the trials that it did not finish."""
    for trial in opened.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        opened.study.tell(trial.number, state=TrialState.FAIL)
    requeue(opened.study)
    for run in children(opened.run_id):
        if run.info.status == "RUNNING":
            close_run(run)
    close_interrupted(opened)


def requeue(study: optuna.Study) -> None:
    """Queue what interrupted trials drew, once for each, unless it was interrupted too often."""
    trials = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs.get("retry_of") for trial in trials}
    for trial in trials:
        if is_interrupted(trial) and trial.number not in retried:
            if retries(trials, trial) >= MAX_RETRIES:
                log.warning("trial %d was interrupted once more: what it drew is given up", trial.number)
                continue
            log.info("trial %d was interrupted: it is tried again", trial.number)
            drawn = trial.system_attrs.get("fixed_params", {}) | trial.params
            study.enqueue_trial(drawn, user_attrs={"retry_of": trial.number})


def retries(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> int:
    """How often what `trial` drew has been tried before."""
    earlier = trial.user_attrs.get("retry_of")
    return 0 if earlier is None else 1 + retries(trials, trials[earlier])


def close_interrupted(opened: Search) -> None:
    """Mark as KILLED the nested runs of interrupted trials, RUNNING or not.

    A process killed between the two stores leaves a FINISHED run of a trial that Optuna does not know as such.
    """
    numbers = {t.number for t in opened.study.get_trials(deepcopy=False) if is_interrupted(t)}
    for run in children(opened.run_id) if numbers else []:
        number = run.data.tags.get("trial")
        if number is not None and int(number) in numbers and run.info.status != "KILLED":
            close_run(run)


def close_run(run: mlflow.entities.Run) -> None:
    client = mlflow.MlflowClient()
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
    with closing_what_is_left(opened), crew.of(opened.task, opened.study, opened.parameters) as workers:
        hand_out(opened, workers)
    close_interrupted(opened)  # a worker that was believed dead may have gone on for a while


def hand_out(opened: Search, workers: crew.Crew) -> None:
    """Keep `workers` busy until the study has `n_trials` finished trials or the time is up."""
    study, n_trials, progress = opened.study, opened.parameters.n_trials, Progress(opened.study, opened.parameters)
    log.info("study %s: %d of %d trials are finished", study.study_name, progress.finished, n_trials)
    running = 0
    while True:
        wanted = 0 if progress.is_time_up else n_trials - progress.finished - running
        while wanted > 0 and workers.is_free():
            workers.start(ask(opened, progress.ended + running))
            running, wanted = running + 1, wanted - 1
        if not running and wanted <= 0:
            break
        if ended := workers.wait():
            running -= 1
            trial = tell(opened, *ended)
            progress.add(trial)
            progress.tell(trial)
            progress.refuse_failures()
    if progress.finished < n_trials:
        log.info("time is up after %d of %d trials; the same command goes on", progress.finished, n_trials)


@contextmanager
def closing_what_is_left(opened: Search) -> Iterator[None]:
    """When the block ends before its time, leave no trial RUNNING, in either store."""
    try:
        yield
    except StorageError:  # nothing can be noted there now; the next start does
        raise
    except BaseException:
        reconcile(opened)
        raise


def ask(opened: Search, drawn: int) -> optuna.Trial:
    """A new trial that has drawn its hyperparameters, or a queued one.

    The sampler's state is not in the storage. It is seeded by `drawn`, the number of trials that run or have ended by
    themselves: a search that was interrupted draws what an uninterrupted one would have drawn, one whose trial failed
    does not draw the same again, and no two that run at once do.
    """
    study = opened.study
    seed = int(opened.space.fixed.get("seed", 0)) + drawn
    study.sampler = make_sampler(opened.space, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Optuna misses the signs of life, which the workers give
        trial = study.ask(opened.space.distributions())
    trial.set_user_attr("sampler_seed", seed)
    return trial


def tell(opened: Search, number: int, outcome: Outcome) -> FrozenTrial:
    """Note how a trial ended, and return it. What an interrupted one drew is queued again."""
    study = opened.study
    ended = study.tell(number, outcome.value, state=outcome.state, skip_if_finished=True)
    if is_interrupted(ended):
        requeue(study)
        close_interrupted(opened)
    return ended


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


def describe(opened: Search) -> None:
    """Log what the study is made of to its run, with a description that a stranger understands."""
    data, space, parameters = opened.data, opened.space, opened.parameters
    ranges = {name: str(r) for name, r in space.ranges.items()}
    tracking.log_params(asdict(data.parameters) | ranges | dict(space.fixed) | asdict(parameters))
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
