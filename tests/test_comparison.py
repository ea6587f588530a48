from typing import Any

import numpy as np
import pandas as pd
import pytest

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


def test_flawless_models_are_not_worse() -> None:
    """Without a differing image the statistic is sqrt(n margin / (1 - margin)), from Tango's formula."""
    p = comparison.apply_non_inferiority_test(ContingencyTable(412, 0, 0, 0), 0.01)
    assert p == pytest.approx(0.020675, abs=1e-6)
    assert comparison.apply_non_inferiority_test(ContingencyTable(95, 0, 5, 0), 0.01) > 0.9


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
