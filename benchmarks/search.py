"""The time of a search to the result of forty full trials, against a plain Optuna loop and Keras Tuner's Hyperband.

All three search the notebook's space: `initial_learning_rate`, `decay_rate` and `epochs`, these from 5 to 20, where the
notebook's author looked (8 and 20). The clock of each starts with its first trial: TensorFlow is imported, and the
photographs are decoded, before. A trial of the plain loop counts with its last epoch, as such loops do; Hyperband and this
project's search also know the best epoch before.

The curves of the forty trials say, too, what each pruner would have saved and lost.

A seed takes half an hour. What was measured for one, by the same code on the same machine, is kept in `.benchmark`, so that an
interrupted measurement goes on with the next.
"""

import hashlib
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import keras
import mlflow
import mlflow.tensorflow
import optuna
from optuna.trial import TrialState

from benchmarks import plain
from benchmarks.measure import Row, temporary_store
from signdigits import search
from signdigits.config import DataParameters, StudyParameters
from signdigits.data import loading
from signdigits.tuning.space import Range, Space
from signdigits.tuning.study import make_pruner

SEEDS = (1337, 1338, 1339)
TRIALS = 40
HYPERBANDS = 4  # whole ones, about 150 epochs each: one and a fifth times what the forty trials train
CLOSE = 0.005  # how near the best of the forty counts as found
EPOCHS = Range(5, 20)
SPACE = Space.of("notebook", epochs=EPOCHS)


@dataclass(frozen=True)
class Ended:
    """A trial's end: seconds after the search began, and the validation accuracy of each of its epochs."""

    seconds: float
    curve: list[float]

    @property
    def accuracy(self) -> float:
        return self.curve[-1]


@dataclass(frozen=True)
class Compared:
    """Seconds until each of the three was near the best, and the trials of the plain loop.

    `gave_up`: Hyperband was not, after all that it was given; its seconds are then those until it ended.
    """

    seconds: dict[str, float]
    forty: list[Ended]
    gave_up: bool = False

    def told(self, name: str) -> str:
        unfinished = name == "hyperband" and self.gave_up
        return f"{'not after ' if unfinished else ''}{self.seconds[name]:.0f}"


def rows(photographs: str) -> list[Row]:
    loaded = loading.load_data(DataParameters(data=photographs))
    found = [kept(loaded, seed) for seed in SEEDS]
    return [
        against(found, "plain", "a plain Optuna loop, autolog's defaults", 4.0),
        against(found, "hyperband", "Keras Tuner's Hyperband", 1.0),
        *(pruned(found, pruner) for pruner in ("percentile", "median", "hyperband")),
    ]


def against(found: list[Compared], peer: str, called: str, reach: float) -> Row:
    """How many times as long a peer took as this project's search: the median of the seeds."""
    shown = {name: ", ".join(one.told(name) for one in found) + " s" for name in ("ours", peer)}
    return Row(
        f"a search, until it is near the best of {TRIALS} trials, {len(found)} seeds", called,
        statistics.median(one.seconds[peer] / one.seconds["ours"] for one in found), reach, True,
        f"{shown['ours']} against {shown[peer]}",
    )  # fmt: skip


def pruned(found: list[Compared], pruner: str) -> Row:
    """The share of the epochs of all forty trials that are trained with a pruner, and the best that is left of them."""
    share, lost = zip(*(replay(one.forty, pruner) for one in found), strict=True)
    return Row(
        f"epochs of {TRIALS} trials, pruner={pruner}", "none is pruned", statistics.mean(share), 1.0, False,
        "best validation accuracy lost: " + ", ".join(f"{one:.4f}" for one in lost),
    )  # fmt: skip


def replay(forty: list[Ended], pruner: str) -> tuple[float, float]:
    """The trials once more as they were trained, but ended where the pruner says so."""
    study = optuna.create_study(direction="maximize", pruner=make_pruner(pruner, SPACE))
    trained, best = 0, 0.0
    for one in forty:
        trial = study.ask()
        for epoch, accuracy in enumerate(one.curve, start=1):
            trained += 1
            trial.report(accuracy, epoch)
            if epoch < len(one.curve) and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            best = max(best, one.accuracy)
            study.tell(trial, one.accuracy)
    return trained / sum(len(one.curve) for one in forty), max(one.accuracy for one in forty) - best


def kept(loaded: loading.Data, seed: int) -> Compared:
    """`compare`, or what it has measured before."""
    code = [path.read_bytes() for path in sorted([*Path("src/signdigits").rglob("*.py"), Path(__file__)])]
    key = hashlib.sha256(b"\0".join([*code, loaded.split.digest.encode(), platform.node().encode()])).hexdigest()[:16]
    file = Path(".benchmark", f"search-{seed}-{key}.json")
    if file.exists():
        known = json.loads(file.read_text())
        return Compared(**known | {"forty": [Ended(**one) for one in known["forty"]]})
    found = compare(loaded, seed)
    file.parent.mkdir(exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(asdict(found)))
    part.rename(file)
    return found


def compare(loaded: loading.Data, seed: int) -> Compared:
    """Run each until it has found what is near the best of the plain loop's forty trials."""
    with temporary_store("search") as folder:
        forty = plain_loop(loaded, seed)
        target = max(trial.accuracy for trial in forty) - CLOSE
        seconds = {
            "plain": next(trial.seconds for trial in forty if trial.accuracy >= target),
            "ours": ours(loaded, seed, target, folder),
        }
        seconds["hyperband"], gave_up = hyperband(loaded, seed, target, folder)
    compared = Compared(seconds, forty, gave_up)
    told = ", ".join(f"{name} {compared.told(name)} s" for name in seconds)
    print(f"seed {seed}: {target:.4f} reached after: {told}", file=sys.stderr, flush=True)
    return compared


def plain_loop(loaded: loading.Data, seed: int) -> list[Ended]:
    """Forty full trials as somebody writes them who turns autologging on and thinks no more of it."""
    started, ended = time.perf_counter(), []

    def objective(trial: optuna.Trial) -> float:
        drawn = SPACE.complete(
            {
                "initial_learning_rate": trial.suggest_float("initial_learning_rate", 1e-4, 5e-3, log=True),
                "decay_rate": trial.suggest_float("decay_rate", 0.1, 1.0),
                "epochs": trial.suggest_int("epochs", 5, 20),
            }
        )
        curve = plain.run(loaded, replace(drawn, seed=seed))
        ended.append(Ended(time.perf_counter() - started, curve))
        return curve[-1]

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=TRIALS, show_progress_bar=sys.stderr.isatty())
    return ended


def ours(loaded: loading.Data, seed: int, target: float, folder: str) -> float:
    """This project's search, one trial after the other, until one reaches the target."""
    storage = f"sqlite:///{folder}/optuna.db"
    started = time.perf_counter()
    with search.open_study(
        loaded, Space.of("notebook", epochs=EPOCHS, seed=seed), StudyParameters(space="notebook", storage=storage)
    ) as opened:
        for n_trials in range(1, 10 * TRIALS):
            search.run_missing_trials(replace(opened, parameters=replace(opened.parameters, n_trials=n_trials)))
            if (opened.best.value or 0.0) >= target:
                break
        return time.perf_counter() - started


def hyperband(loaded: loading.Data, seed: int, target: float, folder: str) -> tuple[float, bool]:
    """Keras Tuner's Hyperband, without MLflow; it has its own idea of how long to train, up to as many epochs.

    Its seconds, and whether it gave up before it reached the target.
    """
    import keras_tuner

    class Enough(Exception):
        pass

    class Until(keras_tuner.Hyperband):
        def on_trial_end(self, trial: Any) -> None:
            super().on_trial_end(trial)
            if (trial.score or 0) >= target:
                raise Enough

    def build(choices: Any) -> keras.Model:
        ranges = {name: SPACE.ranges[name] for name in ("initial_learning_rate", "decay_rate")}
        drawn = {
            name: choices.Float(name, r.low, r.high, sampling="log" if r.log else "linear")
            for name, r in ranges.items()
        }
        return plain.compiled(loaded, replace(SPACE.complete(drawn), seed=seed))

    mlflow.tensorflow.autolog(disable=True)
    tuner = Until(
        build, objective="val_accuracy", max_epochs=int(SPACE.ranges["epochs"].high), hyperband_iterations=HYPERBANDS, seed=seed,
        directory=folder, project_name="hyperband", overwrite=True,
    )  # fmt: skip
    started, gave_up = time.perf_counter(), False
    try:
        tuner.search(
            loaded.training.x, loaded.training.y, batch_size=128, verbose=0,
            validation_data=(loaded.validation.x, loaded.validation.y),
        )  # fmt: skip
        gave_up = True
    except Enough:
        pass
    return time.perf_counter() - started, gave_up
