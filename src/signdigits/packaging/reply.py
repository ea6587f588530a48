"""The fields of the reply to a photograph, declared once, in their order; pyfunc_model.py computes them.

From this list follow the signature of a model, and with it the columns and types of every table of predictions; the prediction
log and the columns that `monitor` compares; the table of `scripts/ask`; and the list in docs/parameters.md.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """A field of the reply."""

    name: str
    type: Any  # str, float, bool, dict[str, float] by class name, or list[list[float]]
    description: str
    is_shown: bool = False  # in the table of `scripts/ask`; a bool as a word behind the row if it is true
    is_logged: bool = False  # in the prediction log; `monitor` compares a number with those of the test images
    is_required: bool = True  # else it is in the reply only if the request asks for it, and in no table


FIELDS = (
    Field("label", str, "class with the highest probability", is_shown=True),
    Field("probability", float, "its probability", is_shown=True),
    Field("probabilities", dict[str, float], "probability of each class, by name", is_logged=True),
    Field("outlier_score", float, "distance from the training images; above 1 for an outlier"),
    Field(
        "is_outlier",
        bool,
        "the photograph resembles none of the training images: its label is meaningless",
        is_shown=True,
        is_logged=True,
    ),
    Field(
        "explanation",
        list[list[float]],
        "with `explain`: 10 rows of 10 numbers, the decrease of the label's log-odds when that part is covered",
        is_required=False,
    ),
)


def find_problem(row: Any) -> str:
    """Return what is wrong with the reply to a photograph; empty if nothing is."""
    try:
        probabilities = row["probabilities"]
        if row["label"] not in probabilities:
            return f"the label {row['label']!r}, which is not one of its classes"
        if not math.isclose(total := sum(probabilities.values()), 1, abs_tol=1e-3):
            return f"probabilities that add up to {total:.3f}"
    except (KeyError, TypeError, AttributeError) as error:
        return f"a reply without label, probability and probabilities ({error!r})"
    return ""


LOGGED = tuple(field.name for field in FIELDS if field.is_logged)
COMPARED = tuple(field.name for field in FIELDS if field.is_logged and field.type is float)
