"""The whole job: report on the data, search, fit the best again, score it on the test images, register it.

python -m signdigits main --data FOLDER --n_trials 12
mlflow run . -e main -P data=FOLDER -P n_trials=12
"""

import logging
from dataclasses import asdict

import mlflow
from mlflow.entities import LoggedModel

from signdigits import evaluate, links, package, prepare, register, search, tracking, train
from signdigits.data import Data
from signdigits.hyperparameters import RegistryParameters, Space, StudyParameters

log = logging.getLogger(__name__)


def main(data: Data, space: Space, study: StudyParameters, registry: RegistryParameters) -> register.Decision:
    """Do what of the job is not done yet, and return which version became what, and why.

    Started again after an interruption it goes on where it was; when all is done it changes nothing.
    """
    with search.open_study(data, space, study) as opened:
        tracking.log_params(asdict(registry))
        prepare.log_report(data)
        search.optimize(opened)
        model = find_refit(opened) or refit(opened)
        decision = register.promote(model, registry.alias)
        mlflow.set_tags({"registered_version": decision.version, "registered_alias": decision.alias})
    for line in summary(opened, model, decision):
        log.info("%s", line)
    return decision


def find_refit(opened: search.Search) -> LoggedModel | None:
    """The model of the best trial's refit, if that was finished, its evaluation included."""
    for run in search.children(opened.run_id):
        tags = run.data.tags
        if tags.get("role") == "refit" and tags.get("trial") == str(opened.best.number) and run.info.status == "FINISHED":
            return tracking.find_model(run.info.run_id, "")
    return None


def refit(opened: search.Search) -> LoggedModel:
    """Fit the best trial's hyperparameters on training and validation images together, and score the test images.

    What chose the hyperparameters, the validation images, cannot report on them; the test images, which nothing has
    seen, do so once.
    """
    data, best, hyperparameters = opened.data, opened.best, opened.best_hyperparameters
    facts = {"study": opened.study.study_name, "trial": best.number}
    with tracking.run("refit", "refit"):
        log.info("refit of trial %d on %d images", best.number, len(data.fitting))
        mlflow.set_tags(facts)
        tracking.log_params(asdict(hyperparameters))
        tracking.log_data(data, parts=("fitting",))
        tracking.describe(f"Trial {best.number} fitted again on training and validation images, then tested.")
        fitted = train.fit(data.fitting, None, len(data.dataset.class_names), hyperparameters)
        train.log_curves(fitted)
        reached = best.user_attrs["val_accuracy"]
        info = package.log_model(fitted.network, data, {**facts, "val_accuracy": reached})
        evaluate.score(mlflow.get_logged_model(info.model_id), data.dataset)
        return mlflow.get_logged_model(info.model_id)


def summary(opened: search.Search, model: LoggedModel, decision: register.Decision) -> list[str]:
    """What came out, and what to do with it."""
    rows = {
        "study": opened.study.study_name,
        "best trial": opened.best.number,
        **{name: search.shown(value) for name, value in opened.best.params.items()},
        "validation accuracy": f"{float(model.tags['val_accuracy']):.4f} on {len(opened.data.validation)} images",
        "test accuracy": f"{float(model.tags['test_accuracy']):.4f} on {model.tags['test_images']} images",
        "registered": f"{register.REGISTERED_MODEL} version {decision.version}, {decision.alias}",
    }
    width = max(map(len, rows))
    return [
        "",
        *(f"  {name:{width}}  {value}" for name, value in rows.items()),
        "",
        f"  see it       scripts/ui, then {links.compare(links.ui(), tracking.find_run(opened.run_id))}",
        f"  serve it     scripts/serve, or: mlflow models serve -m models:/{register.REGISTERED_MODEL}@champion",
        "  ask it       scripts/predict PHOTOGRAPH...",
    ]
