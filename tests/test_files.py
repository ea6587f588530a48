import pandas as pd
import pytest

from signdigits import files

NAMES = [
    "None",
    "NA",
    "null",
    "nan",
    "N/A",
    "",
    "007",
    "1e3",
    "True",
    "-inf",
    "2026-11-25",
    'a "quoted", name',
    "two\nlines",
]


def test_text_stays_text() -> None:
    read = files.read_csv(
        files.to_csv(pd.DataFrame({"label": NAMES, "p(NA)": [0.5] * len(NAMES)})), files.is_probability
    )
    assert read["label"].tolist() == NAMES
    assert read["p(NA)"].tolist() == [0.5] * len(NAMES)


@pytest.mark.parametrize("column", ["probability", "p(0)", "p(None)"])
def test_probabilities_are_numbers(column: str) -> None:
    assert files.is_probability(column)


def test_damaged_table_is_value_error() -> None:
    with pytest.raises(ValueError, match="EOF inside string"):
        files.read_csv('path,group\n"0/a.jpg,1\n')
