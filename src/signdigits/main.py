"""The whole job: report on the data, search, fit the best again, score it on the test images, register it.

python -m signdigits main --data FOLDER --n_trials 12
mlflow run . -e main -P data=FOLDER -P n_trials=12
"""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace

import mlflow
import numpy as np
from mlflow.entities import LoggedModel
from optuna.trial import FrozenTrial

from signdigits import evaluate, prepare, register
from signdigits.config import RefitParameters, RegistryParameters, StudyParameters
from signdigits.data import lineage
from signdigits.data.loading import Data
from signdigits.errors import TrainingDiverged
from signdigits.model import training
from signdigits.model.calibration import Calibration
from signdigits.packaging import package
from signdigits.search import open_study, optimize_study
from signdigits.tracking import registry, runs, urls
from signdigits.tuning.choice import Choice
from signdigits.tuning.space import Space, format_value
from signdigits.tuning.study import Search

log = logging.getLogger(__name__)


def main(
    data: Data, space: Space, study: StudyParameters, refits: RefitParameters, promotion: RegistryParameters
) -> register.Decision:
    """Do the missing steps of the job, and return the decision on the registered version.

    After an interruption the same call continues; when everything is done, it changes nothing.
    """
    with open_study(data, space, study) as search:
        runs.log_params(asdict(refits) | asdict(promotion))
        prepare.log_report(data)
        choice = optimize_study(search)
        models = _refit_seeds(search, choice.trial, refits.n_seeds)
        _log_refit_scores(models)
        decision = register.previous_decision(promotion.model_name, models[0]) or register.promote_model(
            models[0], promotion
        )
        mlflow.set_tags({"registered_version": decision.version, "registered_alias": decision.alias})
    for line in _summarize_job(search, choice, models, decision):
        log.info("%s", line)
    return decision


def _refit_seeds(search: Search, best: FrozenTrial, n_seeds: int) -> list[LoggedModel]:
    """Refit the chosen trial with successive seeds; a seed whose training diverges is skipped.

    Raises TrainingDiverged if more than `n_seeds` seeds diverge.
    """
    models: list[LoggedModel] = []
    first = search.space.complete(best.params).seed
    for seed in range(first, first + 2 * n_seeds):
        model = _find_refit(search, best, seed)
        try:
            if not model:
                log.info("refit %d/%d of trial %d, with seed %d", len(models) + 1, n_seeds, best.number, seed)
                model = _refit_best(search, best, seed)
            models.append(model)
        except TrainingDiverged as error:
            log.warning("refit with seed %d skipped: %s", seed, error)
            if seed - first + 1 - len(models) > n_seeds:
                raise
        if len(models) == n_seeds:
            break
    return models


def _find_refit(search: Search, best: FrozenTrial, seed: int) -> LoggedModel | None:
    """Return the model of the chosen trial's finished and evaluated refit with `seed`, if there is one."""
    tags = {"role": "refit", "trial": str(best.number), "seed": str(seed)}
    for run in runs.nested_runs(search.run_id, "refit"):
        if tags.items() <= run.data.tags.items() and run.info.status == "FINISHED":
            return registry.find_model(run.info.run_id, "")
    return None


def _refit_best(search: Search, best: FrozenTrial, seed: int) -> LoggedModel:
    """Fit the chosen trial's hyperparameters on training and validation images together, and score the test images.

    The validation images chose the hyperparameters and cannot report on them; the test images, unseen so far, do so once
    per seed. Temperature and outlier threshold are the trial's, because no images are left to fit them on. Raises
    TrainingDiverged if the training accuracy is less than half of the trial's.
    """
    data = search.data
    hyperparameters = replace(search.space.complete(best.params), seed=seed)
    facts = {"study": search.study.study_name, "trial": best.number, "seed": seed}
    with runs.start_run("refit", f"refit, seed {seed}"):
        mlflow.set_tags(facts)
        runs.log_params(asdict(hyperparameters))
        lineage.log_data(data, parts=("fitting",))
        network = training.new_network(data.fitting, data.n_classes, hyperparameters)
        fitted = training.fit_network(network, data.fitting, None, hyperparameters)
        # At high learning rates some seeds end with dead ReLUs and learn nothing. The training images show it.
        accuracy, trial_accuracy = fitted.last("accuracy"), best.user_attrs.get("accuracy", 0.0)
        if accuracy < trial_accuracy / 2:
            raise TrainingDiverged(
                f"training accuracy {accuracy:.4f}, but {trial_accuracy:.4f} in the trial; lower "
                f"initial_learning_rate={hyperparameters.initial_learning_rate:g}"
            )
        training.log_curves(fitted)
        runs.check_recorded(asdict(hyperparameters), "accuracy", hyperparameters.epochs)
        facts |= {"val_accuracy": best.user_attrs["val_accuracy"]}
        detector = training.fit_detector(fitted, data.fitting).with_threshold(best.user_attrs["outlier_threshold"])
        calibration = Calibration(best.user_attrs["temperature"], detector)
        info = package.log_model(fitted.in_float32(), calibration, data, facts)
        evaluate.score_model(mlflow.get_logged_model(info.model_id), data.dataset, data.split)
        return mlflow.get_logged_model(info.model_id)


def _log_refit_scores(models: Sequence[LoggedModel]) -> None:
    """Log mean and standard deviation of the test accuracy over the seeds to the study and the first model.

    The first is registered whatever the others reached: choosing by test accuracy would overfit the test images.
    """
    accuracies = np.array([float(model.tags["test_accuracy"]) for model in models])
    metrics = {
        "test_accuracy_mean": float(accuracies.mean()),
        "test_accuracy_std": float(accuracies.std(ddof=1)) if len(models) > 1 else 0.0,
        "test_ece_mean": float(np.mean([float(model.tags["test_ece"]) for model in models])),
        "robust_accuracy_mean": float(np.mean([float(model.tags["robust_accuracy"]) for model in models])),
        "n_seeds": float(len(models)),
    }
    mlflow.log_metrics(metrics)
    mlflow.set_logged_model_tags(models[0].model_id, {name: str(value) for name, value in metrics.items()})
    models[0].tags.update({name: str(value) for name, value in metrics.items()})


def _summarize_job(
    search: Search, choice: Choice, models: Sequence[LoggedModel], decision: register.Decision
) -> list[str]:
    """Return the lines of the summary: the results, and the next commands."""
    tags = models[0].tags
    mean, std = float(tags["test_accuracy_mean"]), float(tags["test_accuracy_std"])
    rows = {
        "study": search.study.study_name,
        "chosen": f"trial {choice.trial.number}",
        "why": choice.reason,
        **{name: format_value(value) for name, value in choice.trial.params.items()},
        "validation accuracy": f"{float(tags['val_accuracy']):.4f} on {len(search.data.validation)} images",
        "test accuracy": f"{float(tags['test_accuracy']):.4f} on {tags['test_images']} images",
        f"over {len(models)} seeds": f"{mean:.4f} +/- {std:.4f}",
        "robust accuracy": f"{float(tags['robust_accuracy']):.4f}, worst {float(tags['worst_accuracy']):.4f}: {tags['worst_corruption']}",
        "calibration error": f"{float(tags['test_ece']):.4f}, {float(tags['robust_ece']):.4f} under corruptions",
        "registered": f"{decision.model_name} version {decision.version}, {register.describe_standing(decision)}",
        "because": decision.reason,
    }
    width = max(map(len, rows))
    link = urls.compare_url(urls.ui_url(), runs.find_run(search.run_id))
    stock = f"mlflow models serve -m models:/{shlex.quote(decision.model_name)}@champion"
    serving = [f"  serve it     {stock} --env-manager uv"]
    if urls.is_checkout():
        serving = [
            f"  serve it     scripts/serve{registry.name_option(decision.model_name)}, or: {stock}",
            "  ask it       scripts/ask PHOTOGRAPH...",
        ]
    return [
        "",
        *(f"  {name:{width}}  {value}" for name, value in rows.items()),
        "",
        f"  see it       {urls.ui_command()}, then {link}",
        *serving,
    ]
