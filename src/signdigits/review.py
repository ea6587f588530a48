"""Review the corrections that visitors sent: show them, accept some for training, remove others.

python -m signdigits review --corrections FOLDER
python -m signdigits review --corrections FOLDER --accept ID,ID --drop all

FOLDER/accepted is a folder of class folders, for `--data DATA,FOLDER/accepted`; its review.csv has a row per photograph.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import mlflow
import pandas as pd

from signdigits import files, plots
from signdigits.config import ReviewParameters
from signdigits.data import images
from signdigits.errors import DataError, UsageError
from signdigits.serving.corrections import PENDING
from signdigits.tracking import runs

log = logging.getLogger(__name__)

ACCEPTED, DROPPED = "accepted", "dropped"
RECORD = "review.csv"
ALL = "all"
FACTS = ("label", "prediction", "probability", "version", "time")
SHEET = 60  # photographs on a contact sheet


def review(parameters: ReviewParameters) -> pd.DataFrame:
    """List the corrections, carry out the decisions on them, and return the table, which a run of its own keeps.

    A photograph is moved or removed in one step: whenever the review is killed, it is pending, accepted or gone. Raises
    DataError if there is no such folder, and UsageError, before anything is changed, for an unknown id.
    """
    folder = Path(parameters.corrections)
    if not folder.is_dir():
        raise DataError(f"corrections={folder}: no such folder; serve with --corrections {folder}")
    pending = {path.stem: path for path in _list_photographs(folder / PENDING)}
    if not pending:
        log.info("%s: no correction waits for a review", folder)
    decisions = _decide(pending, parameters)
    rows = [{**_read_facts(path.with_suffix(".json")), "decision": decisions[id]} for id, path in pending.items()]
    table = pd.DataFrame(rows, columns=["id", *FACTS, "decision"])
    with runs.start_run("review", f"review {len(pending)} corrections"):
        runs.log_params(asdict(parameters))
        mlflow.log_text(files.to_csv(table), "review/corrections.csv")
        shown = table[table["decision"] != DROPPED]  # the run does not keep what is dropped
        for start in range(0, len(shown), SHEET):
            path = f"review/corrections-{start // SHEET + 1:02d}.png"
            runs.log_figure(path, partial(_plot_sheet, shown.iloc[start : start + SHEET], pending))
        try:
            _apply_decisions(folder, pending, decisions)
        except OSError as error:
            raise UsageError(f"{error.filename or folder}: {error.strerror}; make it writable, then rerun") from error
        counts = table["decision"].value_counts()
        mlflow.log_metrics({name: int(counts.get(name, 0)) for name in (PENDING, ACCEPTED, DROPPED)})
    if pending:
        log.info("%s", table.to_string(index=False))
    return table


def _list_photographs(folder: Path) -> Iterator[Path]:
    """Yield the photographs in the class folders of `folder`, without those that a worker has not written completely."""
    for path in sorted(folder.glob("*/*")):
        if path.suffix != ".json" and not path.name.startswith("."):
            yield path


def _read_facts(path: Path) -> dict[str, str]:
    """Return id and facts of a photograph as text; without its file, only id and label are known."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        facts = {}
    return {"id": path.stem, **{name: str(facts.get(name, "")) for name in FACTS}, "label": path.parent.name}


def _decide(ids: Iterable[str], parameters: ReviewParameters) -> dict[str, str]:
    """Return the decision by id: accepted, dropped or pending. Raises UsageError for an unknown or doubly named id."""
    named: dict[str, str] = {}
    rest = PENDING
    for option, text, decision in (("accept", parameters.accept, ACCEPTED), ("drop", parameters.drop, DROPPED)):
        if text == ALL:
            rest = decision
            continue
        given = {id.strip() for id in text.split(",")} - {""}
        if unknown := sorted(given - set(ids)):
            raise UsageError(
                f"{option}={','.join(unknown)}: no pending correction of that id; the same command without --accept and "
                "--drop lists them"
            )
        if both := sorted(given & named.keys()):
            raise UsageError(f"accept and drop: both name {', '.join(both)}; leave it out of one of them")
        named |= dict.fromkeys(given, decision)
    return {id: named.get(id, rest) for id in ids}


def _plot_sheet(shown: pd.DataFrame, pending: Mapping[str, Path]) -> plots.Figure:
    pictures = [images.decode_image(images.read_file(pending[id]), 120, "rgb") for id in shown["id"]]
    captions = [f"{row['label']}, not {row['prediction'] or '?'}\n{row['id']}" for row in shown.to_dict("records")]
    return plots.plot_photographs(pictures, captions, "Corrections, with the label given", columns=6)


def _apply_decisions(folder: Path, pending: Mapping[str, Path], decisions: Mapping[str, str]) -> None:
    for id, path in pending.items():
        if decisions[id] == ACCEPTED:
            target = folder / ACCEPTED / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        elif decisions[id] == DROPPED:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    _record_accepted(folder)


def _record_accepted(folder: Path) -> None:
    """Move the facts of accepted photographs to the record, also those that a killed review left."""
    accepted, pending = ({path.stem for path in _list_photographs(folder / name)} for name in (ACCEPTED, PENDING))
    moved = [path for path in sorted((folder / PENDING).glob("*/*.json")) if path.stem in accepted - pending]
    if not moved:
        return
    record = folder / ACCEPTED / RECORD
    table = pd.DataFrame(map(_read_facts, moved))
    if record.exists():
        table = pd.concat([files.read_csv(record), table]).drop_duplicates("id", keep="last")
    with files.atomic_file(record) as partial_file:
        partial_file.write_text(files.to_csv(table))
    for path in moved:
        path.unlink()
