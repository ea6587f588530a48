"""False promotions and power of the gate's tests, simulated at 412 test images.

The log-odds of the label are normal, calibrated, and correlated between the two models, because hard images are hard for both:
with the accuracy Phi(t), calibrated log-odds are 2t times a normal number of mean t and variance 1.
"""

from dataclasses import replace

import numpy as np
from scipy.special import expit
from scipy.stats import norm

from benchmarks.measure import Row
from signdigits.config import RegistryParameters
from signdigits.promotion import comparison
from signdigits.promotion.comparison import Comparison, ContingencyTable

IMAGES = 412
PAIRS = 1000  # simulated pairs of models; a rate of 5 % has a standard error of 0.7 points
RESAMPLES = 499
CORRELATION = 0.6
FALSE_PROMOTIONS = 6.4  # percent: 5, and two standard errors
RULES = {
    "log_loss": RegistryParameters(significance_test="log_loss"),
    "mcnemar": RegistryParameters(significance_test="mcnemar"),
    "not_worse": RegistryParameters(gate="not_worse"),
}


def rows(photographs: str) -> list[Row]:
    equal = {f"equal models, accuracy {accuracy}": (accuracy, accuracy) for accuracy in (0.90, 0.98, 0.99, 0.995)}
    calibrated = {
        f"equal accuracy 0.98, calibrated; the champion's log-odds times {confidence}": (0.98, 0.98, confidence)
        for confidence in (0.8, 1.25, 0.5, 2.0)
    }
    better = {
        f"accuracy {challenger} against {champion}": (challenger, champion)
        for champion, challenger in ((0.95, 0.97), (0.98, 0.99), (0.985, 0.995), (0.99, 0.995), (0.99, 0.998))
    }
    return [
        *(_make_row("false promotions", case, simulate_gate(*models)) for case, models in equal.items()),
        *(_make_row("power", case, simulate_gate(*models)) for case, models in (better | calibrated).items()),
        _describe_margin(0.99),
    ]


def _make_row(what: str, case: str, rates: dict[str, float]) -> Row:
    """Return a row of the log loss' test: false promotions below their limit, or its power above that of McNemar's test."""
    is_power = what == "power"
    limit = rates["mcnemar"] if is_power else FALSE_PROMOTIONS
    return Row(f"{what} in %, log_loss", case, rates["log_loss"], limit, is_power, f"mcnemar: {rates['mcnemar']:.1f} %")


def _describe_margin(accuracy: float) -> Row:
    margin = RULES["not_worse"].margin
    worse, equal = (simulate_gate(challenger, accuracy)["not_worse"] for challenger in (accuracy - margin, accuracy))
    case = f"accuracy {accuracy - margin:.2f} against {accuracy:.2f}, margin {margin:g}"
    detail = f"power for equal models: {equal:.1f} %"
    return Row("false promotions in %, not_worse", case, worse, FALSE_PROMOTIONS, False, detail)


def simulate_gate(challenger: float, champion: float, confidence: float = 1.0, pairs: int = PAIRS) -> dict[str, float]:
    """Return the percentage of pairs of models, of these true accuracies, in which each gate promotes the challenger.

    `confidence` is a factor of the champion's log-odds: below 1 it is less certain than it may be.
    """
    random = np.random.default_rng(0)
    promoted = dict.fromkeys(RULES, 0)
    for _ in range(pairs):
        difficulty = random.normal(size=IMAGES)
        mine, theirs = (draw_log_odds(accuracy, difficulty, random) for accuracy in (challenger, champion))
        compared = compare_log_odds(mine, confidence * theirs)
        for name, rules in RULES.items():
            promoted[name] += replace(compared, rules=rules).passes
    return {name: 100 * count / pairs for name, count in promoted.items()}


def draw_log_odds(accuracy: float, difficulty: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return calibrated log-odds of the label of each image; positive ones are correct predictions."""
    mean = norm.ppf(accuracy)
    noise = random.normal(size=len(difficulty))
    odds: np.ndarray = 2 * mean * (mean + np.sqrt(CORRELATION) * difficulty + np.sqrt(1 - CORRELATION) * noise)
    return odds


def compare_log_odds(challenger: np.ndarray, champion: np.ndarray) -> Comparison:
    mine, theirs = challenger > 0, champion > 0
    table = ContingencyTable(
        int((mine & theirs).sum()), int((mine & ~theirs).sum()), int((~mine & theirs).sum()), int((~mine & ~theirs).sum())
    )  # fmt: skip
    losses, others = (-np.log(np.maximum(expit(odds), comparison.MIN_PROBABILITY)) for odds in (challenger, champion))
    return Comparison(
        RULES["log_loss"],
        table,
        float(losses.mean()),
        float(others.mean()),
        comparison.apply_mcnemar_test(table),
        comparison.apply_permutation_test(others - losses, RESAMPLES),
        comparison.apply_non_inferiority_test(table, RULES["not_worse"].margin),
    )
