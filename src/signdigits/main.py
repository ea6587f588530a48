"""The whole job: report on the data, search, fit the best again, score it on the test images, register it.

python -m signdigits main --data FOLDER --n_trials 12
mlflow run . -e main -P data=FOLDER -P n_trials=12
"""

import contextlib
import logging
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import keras
import mlflow
import numpy as np
from mlflow.entities import LoggedModel
from optuna.trial import FrozenTrial

from signdigits import evaluate, prepare, register
from signdigits.batch.scoring import FoldScorer, Scorer
from signdigits.config import MODEL_NAME, RefitParameters, RegistryParameters, StudyParameters
from signdigits.data import lineage
from signdigits.data.loading import Data
from signdigits.data.split import FEW_PHOTOGRAPHS
from signdigits.errors import ModelError, TrainingDiverged
from signdigits.model import architecture, training, transfer
from signdigits.model.calibration import Calibration
from signdigits.model.outliers import Detector
from signdigits.packaging import examples, package
from signdigits.search import open_study, optimize_study
from signdigits.tracking import registry, runs, urls
from signdigits.tuning.choice import Choice
from signdigits.tuning.folds import fit_folds
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
        if hint := _suggest_start(data, promotion.model_name):
            log.info("%s", hint)
        choice = optimize_study(search)
        shown = refits.examples == "true" or (refits.examples == "auto" and examples.is_public(data))
        models = _refit_seeds(search, choice.trial, refits.n_seeds or (1 if data.split.folds else 3), shown)
        averaged = refits.ensemble and len(models) > 1
        model = _average_refits(search, choice.trial, models, shown) if averaged else models[0]
        if shown != (package.EXAMPLES in model.tags):
            log.info("%s", _explain_examples(refits, model, shown))
        _log_refit_scores(models, model)
        decision = register.previous_decision(promotion.model_name, model) or register.promote_model(model, promotion)
        mlflow.set_tags({"registered_version": decision.version, "registered_alias": decision.alias})
    for line in _summarize_job(search, choice, model, decision):
        log.info("%s", line)
    return decision


def _suggest_start(data: Data, model_name: str) -> str:
    """Return the line that names a champion to start from, if there are few photographs; empty otherwise."""
    counts = data.dataset.counts()
    if data.start or data.split.name == "random" or min(counts.values()) >= FEW_PHOTOGRAPHS:
        return ""
    names = dict.fromkeys((MODEL_NAME, model_name))
    champion = next((name for name in names if registry.find_alias(name, registry.CHAMPION)), None)
    if not champion:
        return ""
    own = "" if model_name == MODEL_NAME else f" -P model_name={shlex.quote(model_name)}"
    return (
        f"{min(counts.values())} photographs of a class are few: a training that starts from a network that can see takes seconds "
        f"and knows more: mlflow run . -e main --env-manager local -P data={shlex.quote(data.parameters.data)}{own} "
        f"-P start_from={shlex.quote(f'models:/{champion}@{registry.CHAMPION}')}"
    )


def _explain_examples(refits: RefitParameters, model: LoggedModel, shown: bool) -> str:
    """Return the line for a model that an earlier start logged with or without examples, unlike this one."""
    return (
        f"examples={refits.examples}: the model was logged {'without' if shown else 'with'} examples before; delete its run, "
        f"`mlflow runs delete --run-id {model.source_run_id}`, and the same command with --force true makes and registers it anew"
    )


def _refit_seeds(search: Search, best: FrozenTrial, n_seeds: int, shown: bool) -> list[LoggedModel]:
    """Refit the chosen trial with successive seeds, with examples if `shown`; a seed whose training diverges is skipped.

    Raises TrainingDiverged if more than `n_seeds` seeds diverge.
    """
    models: list[LoggedModel] = []
    first = search.space.complete(best.params).seed
    for seed in range(first, first + 2 * n_seeds):
        model = _find_model(search, "refit", {"trial": best.number, "seed": seed})
        try:
            if not model:
                log.info("refit %d/%d of trial %d, with seed %d", len(models) + 1, n_seeds, best.number, seed)
                model = _refit_best(search, best, seed, shown)
            models.append(model)
        except TrainingDiverged as error:
            log.warning("refit with seed %d skipped: %s", seed, error)
            if seed - first + 1 - len(models) > n_seeds:
                raise
        if len(models) == n_seeds:
            break
    return models


def _find_model(search: Search, role: str, tags: Mapping[str, Any]) -> LoggedModel | None:
    """Return the model of the study's finished run with this role and these tags, if it still exists; it is evaluated."""
    expected = {name: str(value) for name, value in tags.items()}
    for run in runs.nested_runs(search.run_id, role):
        if expected.items() <= run.data.tags.items() and run.info.status == "FINISHED":
            with contextlib.suppress(ModelError):  # its model was deleted, or its artifacts
                return registry.find_model(run.info.run_id, "")
    return None


def _refit_best(search: Search, best: FrozenTrial, seed: int, shown: bool) -> LoggedModel:
    """Fit the chosen trial's hyperparameters on training and validation images together, and score the test images.

    The validation images chose the hyperparameters and cannot report on them; the test images, unseen so far, do so once
    per seed. No images are left to fit temperature and outlier threshold on: the temperature is the trial's, and the
    threshold the same multiple of the spacing of the features. Raises TrainingDiverged if the training accuracy is less than
    half of the trial's.
    """
    hyperparameters = replace(search.space.complete(best.params), seed=seed)
    data = transfer.freeze_features(search.data, hyperparameters)
    facts = {"study": search.study.study_name, "trial": best.number, "seed": seed}
    with runs.start_run("refit", f"refit, seed {seed}"):
        mlflow.set_tags(facts)
        runs.log_params(asdict(hyperparameters))
        lineage.log_data(data, parts=("fitting",))
        network = training.new_network(data, data.fitting, hyperparameters)
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
        detector = training.fit_detector(fitted, data.fitting)
        spacing = detector.measure_spacing()
        scale = spacing / best.user_attrs.get("outlier_spacing", spacing)  # trials of version 0.2 have none
        detector = detector.with_threshold(scale * best.user_attrs["outlier_threshold"])
        calibration = Calibration(best.user_attrs["temperature"], detector)
        return _log_scored_model(search, best, fitted.in_float32(data.start), calibration, facts, shown)


def _average_refits(search: Search, best: FrozenTrial, models: Sequence[LoggedModel], shown: bool) -> LoggedModel:
    """Return the mean of the refits' networks as one model, made of their files and scored unless it was before.

    Its temperature is theirs: the mean of their logits is as well calibrated as each of them.
    """
    seeds = ", ".join(model.tags["seed"] for model in models)
    facts = {"study": search.study.study_name, "trial": best.number, "seeds": seeds}
    if model := _find_model(search, "ensemble", facts):
        return model
    log.info("mean of the refits with the seeds %s, as one network", seeds)
    with runs.start_run("ensemble", f"ensemble, seeds {seeds}"):
        mlflow.set_tags(facts)
        lineage.log_data(search.data, parts=("fitting",))
        networks, calibrations = zip(*map(package.read_model, models), strict=True)
        detector = Detector.average([calibration.detector for calibration in calibrations])
        calibration = Calibration(calibrations[0].temperature, detector)
        return _log_scored_model(search, best, architecture.average_networks(networks), calibration, facts, shown)


def _log_scored_model(
    search: Search,
    best: FrozenTrial,
    network: keras.Model,
    calibration: Calibration,
    facts: Mapping[str, Any],
    shown: bool,
) -> LoggedModel:
    """Log a network that was fitted on training and validation images to the active run, and score its test images.

    If examples are `shown`, they are logged with it, and their number is its tag.
    """
    facts = {**facts, "val_accuracy": best.user_attrs["val_accuracy"]}
    chosen = examples.choose_examples(network, calibration, search.data) if shown else {}
    facts |= {package.EXAMPLES: len(chosen)} if shown else {}
    info = package.log_model(network, calibration, search.data, facts, chosen)
    model = mlflow.get_logged_model(info.model_id)
    with tempfile.TemporaryDirectory() as folder:
        scorer = _make_fold_scorer(search, model, Path(folder)) if search.data.split.folds else None
        evaluate.score_model(model, search.data.dataset, search.data.split, scorer)
    return mlflow.get_logged_model(info.model_id)


def _make_fold_scorer(search: Search, model: LoggedModel, place: Path) -> FoldScorer:
    """Return a scorer that tests each photograph with the model of its fold, saved in `place` as it would be served."""
    scorers: dict[str, Scorer] = {}
    for number, fold in enumerate(fit_folds(search), start=1):
        folder = place / str(number)
        package.save_model(fold.fitted.in_float32(fold.data.start), fold.calibration, fold.data, folder)
        scorers |= dict.fromkeys(fold.paths, Scorer(str(folder)))
        log.info("fold %d/%d: a model that tests %d photographs", number, len(search.data.split.folds), len(fold.paths))
    return FoldScorer(model.model_uri, scorers)


def _log_refit_scores(models: Sequence[LoggedModel], registered: LoggedModel) -> None:
    """Log mean and standard deviation of the refits' test accuracy to the study and the model that is registered.

    This is their mean or the first, whatever the others reached: choosing by test accuracy would overfit the test images.
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
    tags = {name: str(value) for name, value in metrics.items()}
    mlflow.set_logged_model_tags(registered.model_id, tags)
    registered.tags.update(tags)


def _summarize_job(search: Search, choice: Choice, model: LoggedModel, decision: register.Decision) -> list[str]:
    """Return the lines of the summary: the results, and the next commands."""
    tags = model.tags
    mean, std = float(tags["test_accuracy_mean"]), float(tags["test_accuracy_std"])
    n_seeds = int(float(tags["n_seeds"]))
    low, high = float(tags["test_accuracy_low"]), float(tags["test_accuracy_high"])
    rows = {
        "study": search.study.study_name,
        "chosen": choice.reason,
        **{name: format_value(value) for name, value in choice.trial.params.items()},
        "validation accuracy": f"{float(tags['val_accuracy']):.4f} on {len(search.data.validation) or tags['test_images']} images",
        "network": f"mean of those with the seeds {tags['seeds']}"
        if "seeds" in tags
        else f"with the seed {tags['seed']}",
        "test accuracy": f"{float(tags['test_accuracy']):.4f} on {tags['test_images']} images ({low:.4f} to {high:.4f})",
        f"over {n_seeds} seeds": f"{mean:.4f} +/- {std:.4f}",
        "robust accuracy": f"{float(tags['robust_accuracy']):.4f}, worst {float(tags['worst_accuracy']):.4f}: {tags['worst_corruption']}",
        "calibration error": f"{float(tags['test_ece']):.4f}, {float(tags['robust_ece']):.4f} under corruptions",
        "registered": f"{decision.model_name} version {decision.version}, {register.describe_standing(decision)}",
        "because": decision.reason,
    }
    if search.data.split.folds:
        rows["test accuracy"] += f", each by one of {len(search.data.split.folds)} models that have not seen it"
        rows["network"] += ", trained on all photographs"
    if search.data.start:
        rows["network"] += f"; starts from {search.data.start.name}"
    if n_seeds == 1:
        del rows["over 1 seeds"]
    width = max(map(len, rows))
    link = urls.compare_url(urls.ui_url(), runs.find_run(search.run_id))
    stock = f"mlflow models serve -m models:/{shlex.quote(decision.model_name)}@champion"
    serving = [f"  serve it     {stock} --env-manager uv"]
    if script := urls.script_command("serve"):
        serving = [
            f"  serve it     {script}{registry.name_option(decision.model_name)}, or: {stock}",
            f"  ask it       {script.rpartition(' ')[2].removesuffix('serve')}ask PHOTOGRAPH...",
        ]
    return [
        "",
        *(f"  {name:{width}}  {value}" for name, value in rows.items()),
        "",
        f"  see it       {urls.ui_command()}, then {link}",
        *serving,
    ]
