"""Review the corrections that visitors sent: show them, accept some for training, remove others.

python -m signdigits review --corrections FOLDER
python -m signdigits review --corrections FOLDER --accept ID,ID --drop all

FOLDER/accepted is a folder of class folders, for `--data DATA,FOLDER/accepted`; its review.csv has a row per photograph.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
import pandas as pd

from signdigits import files, plots
from signdigits.config import ReviewParameters
from signdigits.data import images
from signdigits.errors import DataError, UsageError
from signdigits.files import atomic_file
from signdigits.serving.corrections import PENDING
from signdigits.tracking import runs

log = logging.getLogger(__name__)

ACCEPTED = "accepted"
RECORD = "review.csv"
ALL = "all"
FACTS = ("label", "prediction", "probability", "version", "time")
SHEET = 60  # photographs on a contact sheet


@dataclass(frozen=True)
class Correction:
    """A photograph that waits for a review, and what its visitor and its model said."""

    path: Path
    facts: dict[str, str]

    @property
    def id(self) -> str:
        return self.path.stem


def review(parameters: ReviewParameters) -> pd.DataFrame:
    """List the corrections, carry out the decisions on them, and return the table, which a run of its own keeps.

    A photograph is moved or removed in one step: whenever the review is killed, it is pending, accepted or gone. Raises
    DataError if there is no such folder, and UsageError, before anything is changed, for an unknown id.
    """
    folder = Path(parameters.corrections)
    if not folder.is_dir():
        raise DataError(f"corrections={folder}: no such folder; serve with --corrections {folder}")
    pending = list(_list_corrections(folder / PENDING))
    if not pending:
        log.info("%s: no correction waits for a review", folder)
    decisions = _decide(pending, parameters)
    table = pd.DataFrame(
        [{"id": c.id, **c.facts, "decision": decisions[c.id]} for c in pending], columns=["id", *FACTS, "decision"]
    )
    with runs.start_run("review", f"review {len(pending)} corrections"):
        runs.log_params(asdict(parameters))
        _log_corrections([c for c in pending if decisions[c.id] != "dropped"], table)
        try:
            _apply_decisions(folder, pending, decisions)
        except OSError as error:
            raise UsageError(f"{error.filename or folder}: {error.strerror}; make it writable, then rerun") from error
        counts = table["decision"].value_counts()
        mlflow.log_metrics({name: int(counts.get(name, 0)) for name in (PENDING, ACCEPTED, "dropped")})
    if pending:
        log.info("%s", table.to_string(index=False))
    return table


def _list_photographs(folder: Path) -> Iterator[Path]:
    """Yield the photographs in the class folders of `folder`, without those that a worker has not written completely."""
    for path in sorted(folder.glob("*/*")):
        if path.suffix != ".json" and not path.name.startswith("."):
            yield path


def _list_corrections(folder: Path) -> Iterator[Correction]:
    for path in _list_photographs(folder):
        yield Correction(path, _read_facts(path.with_suffix(".json")))


def _read_facts(path: Path) -> dict[str, str]:
    """Return the facts of a photograph as text; without its file, only the label is known."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        facts = {}
    return {name: str(facts.get(name, "")) for name in FACTS} | {"label": path.parent.name}


def _decide(pending: Sequence[Correction], parameters: ReviewParameters) -> dict[str, str]:
    """Return the decision by id: accepted, dropped or pending. Raises UsageError for an unknown or doubly named id."""
    ids = [correction.id for correction in pending]
    named = {name: _read_ids(getattr(parameters, name), name, ids) for name in ("accept", "drop")}
    if both := named["accept"] & named["drop"]:
        raise UsageError(f"accept and drop: both name {', '.join(sorted(both))}; leave it out of one of them")
    rest = {"accept": ACCEPTED, "drop": "dropped"}
    default = next((word for name, word in rest.items() if getattr(parameters, name) == ALL), PENDING)
    decided = {id: word for name, word in rest.items() for id in named[name]}
    return {id: decided.get(id, default) for id in ids}


def _read_ids(text: str, name: str, ids: Sequence[str]) -> set[str]:
    """Return the ids in `text`, none for `all`. Raises UsageError if one is unknown."""
    named = set() if text == ALL else {part.strip() for part in text.split(",")} - {""}
    if unknown := sorted(named - set(ids)):
        raise UsageError(
            f"{name}={','.join(unknown)}: no pending correction of that id; the same command without --accept and --drop lists them"
        )
    return named


def _log_corrections(shown: Sequence[Correction], table: pd.DataFrame) -> None:
    """Log the table, and contact sheets of the photographs; not of the dropped ones, lest the run keeps them."""
    mlflow.log_text(files.to_csv(table), "review/corrections.csv")
    for start in range(0, len(shown), SHEET):
        runs.log_figure(f"review/corrections-{start // SHEET + 1:02d}.png", _sheet_of(shown[start : start + SHEET]))


def _sheet_of(shown: Sequence[Correction]) -> Callable[[], plots.Figure]:
    def plot() -> plots.Figure:
        pictures = [images.decode_image(images.read_file(correction.path), 120, "rgb") for correction in shown]
        captions = [f"{c.facts['label']}, not {c.facts['prediction'] or '?'}\n{c.id}" for c in shown]
        return plots.plot_photographs(pictures, captions, "Corrections, with the label given", columns=6)

    return plot


def _apply_decisions(folder: Path, pending: Sequence[Correction], decisions: dict[str, str]) -> None:
    for correction in pending:
        if decisions[correction.id] == ACCEPTED:
            target = folder / ACCEPTED / correction.facts["label"] / correction.path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            correction.path.replace(target)
        elif decisions[correction.id] == "dropped":
            correction.path.with_suffix(".json").unlink(missing_ok=True)
            correction.path.unlink(missing_ok=True)
    _record_accepted(folder)


def _record_accepted(folder: Path) -> None:
    """Move the facts of accepted photographs to the record, also those that a killed review left."""
    accepted = {(path.parent.name, path.stem) for path in _list_photographs(folder / ACCEPTED)}
    waiting = {(c.facts["label"], c.id) for c in _list_corrections(folder / PENDING)}
    moved = [
        path
        for path in sorted((folder / PENDING).glob("*/*.json"))
        if (path.parent.name, path.stem) in accepted - waiting
    ]
    if not moved:
        return
    record = folder / ACCEPTED / RECORD
    table = pd.DataFrame([{"id": path.stem, **_read_facts(path)} for path in moved])
    if record.exists():
        table = pd.concat([files.read_csv(record), table]).drop_duplicates("id", keep="last")
    with atomic_file(record) as partial_file:
        partial_file.write_text(files.to_csv(table))
    for path in moved:
        path.unlink()
