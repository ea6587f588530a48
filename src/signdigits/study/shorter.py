"""What a training says about shorter ones.

The learning rate follows from the step alone, and so do the batches: with the same seed, a training of 30 epochs contains
those of 1 to 29. What stands in the run stays what was trained; what it says about a shorter one is marked as inferred.
"""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from optuna.trial import FrozenTrial, TrialState

from signdigits import train
from signdigits.photographs.data import Images

INFERRED = "inferred"  # the attribute of a trial that holds what it says about a shorter one


@dataclass(frozen=True)
class Answer:
    """What the search may choose: a trial as it was trained or, inferred, a shorter one that its training contains."""

    trial: int
    run_id: str
    params: dict[str, Any]
    val_accuracy: float
    val_loss: float
    temperature: float
    inferred: bool

    def __str__(self) -> str:
        return f"trial {self.trial} after {self.params['epochs']} epochs" if self.inferred else f"trial {self.trial}"


def answers(trial: FrozenTrial) -> list[Answer]:
    """What a finished trial has found: itself if it was trained to its end, and the best shorter one that it knows of."""
    known, run_id = trial.user_attrs, trial.user_attrs.get("mlflow_run_id", "")
    found = []
    if trial.state == TrialState.COMPLETE:
        reached = {name: known[name] for name in ("val_accuracy", "val_loss", "temperature")}
        found.append(Answer(trial.number, run_id, trial.params, **reached, inferred=False))
    if shorter := dict(known.get(INFERRED, {})):
        params = trial.params | {"epochs": shorter.pop("epochs")}
        found.append(Answer(trial.number, run_id, params, **shorter, inferred=True))
    return found


def merit(objective: str, val_accuracy: float, val_loss: float) -> tuple[float, float]:
    """Greater is better by the objective; of what is equal by it, what is better by the other.

    A few hundred validation images make many trials equally accurate.
    """
    return (val_accuracy, -val_loss) if objective == "val_accuracy" else (-val_loss, val_accuracy)


class Shorter(keras.callbacks.Callback):
    """Keeps the weights of the best epoch, of those after which a trial might have ended: `shortest` and later."""

    def __init__(self, objective: str, shortest: int) -> None:
        super().__init__()
        self.objective, self.shortest = objective, shortest
        self.epochs = 0  # none yet
        self.reached: dict[str, float] = {}
        self.weights: list[np.ndarray] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        reached = {name: (logs or {})[name] for name in ("val_accuracy", "val_loss")}
        better = not self.epochs or merit(self.objective, **reached) > merit(self.objective, **self.reached)
        if epoch + 1 >= self.shortest and better:
            self.epochs, self.reached, self.weights = epoch + 1, reached, self.model.get_weights()

    def inferred(self, images: Images) -> dict[str, Any]:
        """What a shorter training would have reached, and its temperature on `images`; empty if none was better.

        Leaves the network with the weights of that epoch.
        """
        if self.epochs in (0, self.params["epochs"]):
            return {}
        self.model.set_weights(self.weights)
        return {"epochs": self.epochs, **self.reached, "temperature": train.temperature(self.model, images)}
