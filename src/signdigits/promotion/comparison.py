"""Compare two models on the same test images: correct and wrong predictions, and log loss; the interval of an accuracy.

SciPy's tests are imported where they are used: they take a second, which a rollback does not need.
"""

import json
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from signdigits.config import RegistryParameters
from signdigits.tracking import runs

MIN_PROBABILITY = 1e-7  # Keras' epsilon, for a log loss that is finite
N_RESAMPLES = 9999
SEED = 1337
MAX_SIGNS = 10_000_000  # signs drawn at once: 80 MB


@dataclass(frozen=True)
class ContingencyTable:
    """The test images that both, one or neither of two models classify correctly."""

    both: int
    challenger_only: int
    champion_only: int
    neither: int

    @property
    def images(self) -> int:
        return self.both + self.challenger_only + self.champion_only + self.neither

    @property
    def accuracy(self) -> float:
        return (self.both + self.challenger_only) / self.images

    @property
    def champion_accuracy(self) -> float:
        return (self.both + self.champion_only) / self.images

    def to_markdown(self) -> str:
        return runs.markdown_table(
            [
                ("", "champion right", "champion wrong"),
                ("**challenger right**", self.both, self.challenger_only),
                ("**challenger wrong**", self.champion_only, self.neither),
            ]
        )


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images: contingency table, mean log losses, and p-values of three one-sided tests, by name."""

    rules: RegistryParameters
    contingency_table: ContingencyTable
    log_loss: float
    champion_log_loss: float
    p_values: dict[str, float]

    @property
    def test(self) -> str:
        """The test that decides: `not_worse`, `mcnemar` or `log_loss`."""
        return "not_worse" if self.rules.gate == "not_worse" else self.rules.significance_test

    @property
    def passes(self) -> bool:
        """Return whether the challenger passes the gate; with more mistakes than the champion it is not better."""
        table = self.contingency_table
        has_more_mistakes = table.challenger_only < table.champion_only
        is_significant = self.p_values[self.test] < self.rules.significance_level
        return is_significant and not (self.rules.gate == "better" and has_more_mistakes)

    def facts(self) -> dict[str, str]:
        """Return the comparison as tags."""
        return {
            "gate": self.rules.gate,
            "gate_test": self.test,
            "p_value": str(self.p_values[self.test]),
            **{f"p_{name}": str(value) for name, value in self.p_values.items()},
            "log_loss": str(self.log_loss),
            "champion_log_loss": str(self.champion_log_loss),
            "contingency_table": json.dumps(asdict(self.contingency_table)),
        }

    def __str__(self) -> str:
        """Return the result in words; the test that decides comes last."""
        table = self.contingency_table
        tests = {
            "mcnemar": "McNemar's exact test",
            "log_loss": f"permutation test of the log loss, {self.log_loss:.4f} against {self.champion_log_loss:.4f}",
            "not_worse": f"score test that the accuracy is not lower by {self.rules.margin:g}",
        }
        named = {name: f"p = {self.p_values[name]:.3g} ({words})" for name, words in tests.items()}
        decides = named.pop(self.test)
        if self.rules.gate == "better":
            del named["not_worse"]
        return (
            f"{table.challenger_only} classified correctly by the challenger only, {table.champion_only} by the champion "
            f"only; {', '.join(named.values())}; {decides} decides"
        )


def compare_predictions(challenger: pd.DataFrame, champion: pd.DataFrame, rules: RegistryParameters) -> Comparison:
    """Compare two tables of predictions of the same images, each with `path`, `label`, `prediction` and `p(CLASS)`.

    Raises KeyError if an image of one table is missing from the other.
    """
    champion = champion.set_index("path").loc[challenger["path"]].reset_index()
    correct, champion_correct = (table["prediction"] == challenger["label"] for table in (challenger, champion))
    losses, champion_losses = (compute_losses(table, challenger["label"]) for table in (challenger, champion))
    table = ContingencyTable(
        int((correct & champion_correct).sum()),
        int((correct & ~champion_correct).sum()),
        int((~correct & champion_correct).sum()),
        int((~correct & ~champion_correct).sum()),
    )
    p_values = {
        "mcnemar": apply_mcnemar_test(table),
        "log_loss": apply_permutation_test(champion_losses - losses),
        "not_worse": apply_non_inferiority_test(table, rules.margin),
    }
    return Comparison(rules, table, float(losses.mean()), float(champion_losses.mean()), p_values)


def compute_losses(table: pd.DataFrame, labels: pd.Series) -> np.ndarray:
    """Return the log loss of each image, in nats, of shape (n,): minus the logarithm of its label's probability."""
    probabilities = [row[f"p({label})"] for row, label in zip(table.to_dict("records"), labels, strict=True)]
    losses: np.ndarray = -np.log(np.maximum(probabilities, MIN_PROBABILITY))
    return losses


def apply_mcnemar_test(table: ContingencyTable) -> float:
    """Return the p-value of McNemar's test (1947), exact and one-sided.

    The null hypothesis: where only one of the two models is right, each is so with probability 1/2.
    """
    from scipy.stats import binomtest

    differing = table.challenger_only + table.champion_only
    return float(binomtest(table.challenger_only, differing, alternative="greater").pvalue) if differing else 1.0


def apply_permutation_test(differences: np.ndarray, n_resamples: int = N_RESAMPLES) -> float:
    """Return the p-value of a paired permutation test, one-sided, for the champion's losses less the challenger's.

    The null hypothesis: the models are exchangeable, so that each difference has either sign with probability 1/2. The
    statistic is the mean; the signs are seeded (Fisher, 1935).
    """
    from scipy.stats import permutation_test

    result = permutation_test(
        (differences,), np.mean, permutation_type="samples", alternative="greater", vectorized=True,
        n_resamples=n_resamples, batch=max(1, MAX_SIGNS // len(differences)), rng=np.random.default_rng(SEED),
    )  # fmt: skip
    return float(result.pvalue)


def apply_non_inferiority_test(table: ContingencyTable, margin: float) -> float:
    """Return the p-value of Tango's score test of non-inferiority for paired proportions.

    The null hypothesis: the challenger's accuracy is lower by `margin` or more. Tango, "Equivalence test and confidence
    interval for the difference in proportions for the paired-sample design", 1998, Statistics in Medicine 17(8).
    """
    from scipy.stats import norm

    n, better, worse = table.images, table.challenger_only, table.champion_only
    b = (2 * n + worse - better) * margin + better + worse
    # The maximum-likelihood estimate, under the null hypothesis, of the probability that only the champion is right.
    estimate = (b + np.sqrt(b**2 - 8 * n * worse * margin * (1 + margin))) / (4 * n)
    z = (better - worse + n * margin) / np.sqrt(n * (2 * estimate - margin * (1 + margin)))
    return float(norm.sf(z))


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval (1927) of an accuracy; it assumes independent images."""
    from scipy.stats import binomtest

    interval = binomtest(right, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def fold_interval(right: int, total: int, folds: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy that the models of `folds` have reached together.

    They share photographs: the variance grows by 1 + folds / (folds - 1) (Nadeau and Bengio, "Inference for the generalization
    error", 2003), as if there were fewer images. Of so few, Jeffreys' interval is the better one (Brown, Cai and DasGupta, "Interval
    estimation for a binomial proportion", 2001).
    """
    from scipy.stats import beta

    effective = total / (1 + folds / (folds - 1))
    correct = effective * right / total
    low, high = beta(correct + 0.5, effective - correct + 0.5).interval(0.95)
    return float(low) if right else 0.0, float(high) if right < total else 1.0
