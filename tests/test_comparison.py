import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from signdigits.config import RegistryParameters
from signdigits.promotion import comparison
from signdigits.promotion.comparison import Comparison, ContingencyTable


def predicted(probabilities: list[float]) -> pd.DataFrame:
    """A table of images with the label 0, whose probability is given; one above 0.5 is a correct prediction."""
    table = pd.DataFrame({"path": [f"0/{n}.jpg" for n in range(len(probabilities))], "label": "0"})
    table["prediction"] = ["0" if p > 0.5 else "2" for p in probabilities]
    table["p(0)"], table["p(2)"] = probabilities, 1 - np.array(probabilities)
    return table


def compare(challenger: list[float], champion: list[float], **rules: Any) -> Comparison:
    return comparison.compare_predictions(predicted(challenger), predicted(champion), RegistryParameters(**rules))


def test_outcomes_are_counted() -> None:
    found = compare([0.9, 0.9, 0.1, 0.1], [0.9, 0.1, 0.9, 0.1]).contingency_table
    assert found == ContingencyTable(1, 1, 1, 1)
    assert (found.images, found.accuracy, found.champion_accuracy) == (4, 0.5, 0.5)


def test_accuracies_differ_by_who_is_right() -> None:
    """Both are right on 4 images, the challenger alone on 3, the champion alone on 2, and neither on 1."""
    found = compare([0.9] * 7 + [0.1] * 3, [0.8] * 4 + [0.2] * 3 + [0.8] * 2 + [0.2])
    table = found.contingency_table
    assert table == ContingencyTable(both=4, challenger_only=3, champion_only=2, neither=1)
    assert (table.images, table.accuracy, table.champion_accuracy) == (10, 0.7, 0.6)
    assert found.log_loss == pytest.approx(-0.7 * np.log(0.9) - 0.3 * np.log(0.1))
    assert found.champion_log_loss == pytest.approx(-0.6 * np.log(0.8) - 0.4 * np.log(0.2))
    assert str(found).startswith("3 classified correctly by the challenger only, 2 by the champion only; ")
    assert "log loss, 0.7645 against 0.7777" in str(found)
    assert json.loads(found.facts()["contingency_table"]) == {
        "both": 4, "challenger_only": 3, "champion_only": 2, "neither": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("only", "others", "p"), [(6, 0, 1 / 64), (0, 3, 1.0), (0, 0, 1.0), (2, 0, 0.25), (7, 1, 9 / 256)]
)
def test_mcnemar_is_exact(only: int, others: int, p: float) -> None:
    assert comparison.apply_mcnemar_test(ContingencyTable(400, only, others, 0)) == pytest.approx(p)


def test_permutation_of_few_is_exact() -> None:
    """All of the 2^5 signs: only the observed ones have a mean this large."""
    assert comparison.apply_permutation_test(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(1 / 32)
    assert comparison.apply_permutation_test(np.zeros(5)) == 1


def test_permutation_is_seeded() -> None:
    differences = np.random.default_rng(0).normal(0.05, 1, 412)
    first, second = (comparison.apply_permutation_test(differences) for _ in range(2))
    assert first == second
    assert 0.05 < first < 0.5
    assert first * 10_000 == pytest.approx(round(first * 10_000)), "9,999 resamples and the observed one"


def test_flawless_models_are_not_worse() -> None:
    """Without a differing image the statistic is sqrt(n margin / (1 - margin)), from Tango's formula."""
    p = comparison.apply_non_inferiority_test(ContingencyTable(412, 0, 0, 0), 0.01)
    assert p == pytest.approx(0.020675, abs=1e-6)
    assert comparison.apply_non_inferiority_test(ContingencyTable(95, 0, 5, 0), 0.01) > 0.9


@pytest.mark.parametrize(
    ("better", "worse", "images", "margin"),
    [(0, 1, 44, 0.1), (3, 5, 100, 0.05), (12, 4, 412, 0.01), (4, 12, 412, 0.02)],
)
def test_score_test_maximizes_the_likelihood(better: int, worse: int, images: int, margin: float) -> None:
    """The estimate in Tango's closed form is the most likely probability that only the champion is right."""
    estimates = np.linspace(margin, (1 + margin) / 2, 1_000_001)[1:-1]
    agreeing = images - better - worse
    likelihoods = (
        worse * np.log(estimates) + better * np.log(estimates - margin) + agreeing * np.log(1 + margin - 2 * estimates)
    )
    estimate = estimates[likelihoods.argmax()]
    variance = images * (2 * estimate - margin - margin**2)
    p = norm.sf((better - worse + images * margin) / np.sqrt(variance))
    table = ContingencyTable(agreeing, better, worse, 0)
    assert comparison.apply_non_inferiority_test(table, margin) == pytest.approx(p, abs=1e-5)


def test_published_example_of_the_score_test() -> None:
    """Tango, 1998: of 44 lenses, 43 were clean after either treatment and 1 after the old one only; Z is 1.709."""
    assert comparison.apply_non_inferiority_test(ContingencyTable(43, 0, 1, 0), 0.1) == pytest.approx(0.0437, abs=1e-4)


def test_p_value_at_the_level_is_not_significant() -> None:
    """Two images that only the challenger reads have p = 1/4."""
    rules = {"significance_test": "mcnemar", "significance_level": 0.25}
    assert not compare([0.9] * 4, [0.9] * 2 + [0.1] * 2, **rules).passes
    assert compare([0.9] * 4, [0.9] * 2 + [0.1] * 2, **rules | {"significance_level": 0.26}).passes


def test_as_many_mistakes_may_be_better() -> None:
    found = compare([0.99] * 30 + [0.6, 0.4], [0.6] * 30 + [0.4, 0.6])
    assert found.contingency_table == ContingencyTable(30, 1, 1, 0)
    assert found.passes
    assert str(found).endswith(" decides")


def test_log_loss_sees_what_mistakes_hide() -> None:
    found = compare([0.99] * 30, [0.95] * 30)
    assert found.p_values["mcnemar"] == 1
    assert found.p_values["log_loss"] < 0.001
    assert found.passes
    assert not compare([0.99] * 30, [0.95] * 30, significance_test="mcnemar").passes


def test_more_mistakes_are_never_better() -> None:
    found = compare([0.99] * 29 + [0.4], [0.6] * 30)
    assert found.p_values["log_loss"] < 0.001
    assert not found.passes


def test_equal_model_passes_as_not_worse() -> None:
    found = compare([0.9] * 412, [0.9] * 412, gate="not_worse")
    assert found.passes
    assert found.facts()["p_value"] == str(found.p_values["not_worse"])
    assert str(found).endswith("p = 0.0207 (score test that the accuracy is not lower by 0.01) decides")
    assert not compare([0.9] * 50, [0.9] * 50, gate="not_worse").passes, "too few images"
    assert compare([0.9] * 50, [0.9] * 50, gate="not_worse", margin=0.1).passes


def test_zero_probability_has_finite_loss() -> None:
    table = predicted([0.0, 1.0])
    assert comparison.compute_losses(table, table["label"]).tolist() == pytest.approx([-np.log(1e-7), 0])


def test_order_of_images_does_not_matter() -> None:
    mine, theirs = predicted([0.9, 0.1, 0.8]), predicted([0.7, 0.2, 0.3])
    rules = RegistryParameters()
    assert comparison.compare_predictions(mine, theirs, rules) == comparison.compare_predictions(
        mine, theirs[::-1], rules
    )


def test_missing_image_is_refused() -> None:
    with pytest.raises(KeyError, match=r"0/1\.jpg"):
        comparison.compare_predictions(predicted([0.9, 0.1]), predicted([0.9]), RegistryParameters())
