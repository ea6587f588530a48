"""Review the corrections that visitors sent: show them, accept some for training, remove others.

python -m signdigits review --corrections FOLDER
python -m signdigits review --corrections FOLDER --accept ID,ID --drop all

FOLDER/accepted is a folder of class folders, for `--data DATA,FOLDER/accepted`; its review.csv has a row per photograph. Accepted
photographs of no sign lie beside it, in FOLDER/not-a-sign: no class of the training, but pictures that `evaluate` and `main` expect
the model to mark as outliers.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd

from signdigits import files, plots
from signdigits.config import ReviewParameters
from signdigits.data import images
from signdigits.data.folders import NO_SIGN, describe_file, find_files, list_folders
from signdigits.data.names import locate
from signdigits.data.tables import read_table
from signdigits.errors import DataError, UsageError, escape_undecodable
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

    A photograph is moved or removed in one step: whenever the review is killed, it is pending, accepted or gone. One that cannot
    be read is not accepted. Raises DataError if there is no such folder, or its record cannot be read, and UsageError, before
    anything is changed, for an unknown id.
    """
    folder = locate(Path(), parameters.corrections)
    if not folder.is_dir():
        raise DataError(
            f"corrections={folder}: {describe_file(folder) or f'no such folder; serve with --corrections {folder}'}"
        )
    _read_record(folder)  # fails before anything is changed
    pending = _list_photographs(folder / PENDING)
    if not pending:
        log.info("%s: no correction waits for a review", folder)
    pictures, reasons = _read_pictures(pending)
    decisions = _decide(pending, reasons, parameters)
    rows = [
        {**_read_facts(path), "id": id, "decision": decisions[id], "reason": reasons.get(id, "")}
        for id, path in pending.items()
    ]
    table = pd.DataFrame(rows, columns=["id", *FACTS, "decision", "reason"])
    with runs.start_run("review", f"review {len(pending)} corrections"):
        runs.log_params(asdict(parameters))
        mlflow.log_text(files.to_csv(table), "review/corrections.csv")
        # The run does not keep what is dropped.
        shown = table[(table["decision"] != DROPPED) & (table["reason"] == "")]
        for start in range(0, len(shown), SHEET):
            path = f"review/corrections-{start // SHEET + 1:02d}.png"
            runs.log_figure(path, partial(_plot_sheet, shown.iloc[start : start + SHEET], pictures))
        try:
            _apply_decisions(folder, pending, decisions)
        except OSError as error:
            raise UsageError(f"{error.filename or folder}: {error.strerror}; make it writable, then rerun") from error
        counts = table["decision"].value_counts()
        mlflow.log_metrics({name: int(counts.get(name, 0)) for name in (PENDING, ACCEPTED, DROPPED)})
    if pending:
        log.info("%s", table.drop(columns="reason").to_string(index=False))
    for id, reason in reasons.items():
        if decisions[id] == PENDING:
            log.warning("%s: %s; it is neither shown nor accepted, and --drop %s removes it", pending[id], reason, id)
    return table


def _find_files(folder: Path) -> Iterator[Path]:
    """Yield the files in the class folders of `folder`, without those that a worker has not written completely."""
    for class_folder in list_folders(folder) if folder.is_dir() else ():
        yield from (path for path in find_files(class_folder) if path.parent == class_folder)


def _list_photographs(folder: Path) -> dict[str, Path]:
    """Return the photographs in the class folders of `folder` by their ids; names that several have begin with the class."""
    paths = [path for path in _find_files(folder) if path.suffix != ".json"]
    counts = Counter(path.stem for path in paths)
    ids = (path.stem if counts[path.stem] == 1 else f"{path.parent.name}/{path.name}" for path in paths)
    return dict(zip(map(escape_undecodable, ids), paths, strict=True))


def _read_facts(path: Path) -> dict[str, str]:
    """Return id and facts of a photograph as text; without its file, only id and label are known."""
    file = path.with_suffix(".json")
    try:
        facts = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        facts = {}
    known = facts if isinstance(facts, dict) else {}
    texts = {"id": path.stem, **{name: str(known.get(name, "")) for name in FACTS}, "label": path.parent.name}
    return {name: escape_undecodable(text) for name, text in texts.items()}


def _read_pictures(photographs: Mapping[str, Path]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return small pictures of the photographs, and the reasons for which the others are unreadable."""
    pictures, reasons = {}, {}
    for id, path in photographs.items():
        try:
            pictures[id] = images.decode_image(images.read_file(path), 120, "rgb")
        except (OSError, images.ImageError) as error:
            reasons[id] = f"cannot be read ({error})" if isinstance(error, OSError) else str(error)
    return pictures, reasons


def _decide(ids: Iterable[str], reasons: Mapping[str, str], parameters: ReviewParameters) -> dict[str, str]:
    """Return the decision by id: accepted, dropped or pending; `reasons` has the unreadable ones, which all does not accept.

    Raises UsageError for an unknown, unreadable or doubly named id.
    """
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
        if decision == ACCEPTED and (unreadable := sorted(given & reasons.keys())):
            raise UsageError(f"accept={unreadable[0]}: {reasons[unreadable[0]]}; leave it out, or drop it")
        if both := sorted(given & named.keys()):
            raise UsageError(f"accept and drop: both name {', '.join(both)}; leave it out of one of them")
        named |= dict.fromkeys(given, decision)
    return {id: named.get(id, PENDING if rest == ACCEPTED and id in reasons else rest) for id in ids}


def _plot_sheet(shown: pd.DataFrame, pictures: Mapping[str, np.ndarray]) -> plots.Figure:
    captions = [f"{row['label']}, not {row['prediction'] or '?'}\n{row['id']}" for row in shown.to_dict("records")]
    return plots.plot_photographs(
        [pictures[id] for id in shown["id"]], captions, "Corrections, with the label given", columns=6
    )


def _apply_decisions(folder: Path, pending: Mapping[str, Path], decisions: Mapping[str, str]) -> None:
    for id, path in pending.items():
        if decisions[id] == ACCEPTED:
            label = path.parent.name
            target = (folder / NO_SIGN if label == NO_SIGN else folder / ACCEPTED / label) / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        elif decisions[id] == DROPPED:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    _record_accepted(folder)


def _record_accepted(folder: Path) -> None:
    """Move the facts of accepted photographs to the record, also those that a killed review left."""
    accepted, pending, no_sign = (
        {(path.parent.name, path.stem) for path in paths}
        for paths in (
            _list_photographs(folder / ACCEPTED).values(),
            _list_photographs(folder / PENDING).values(),
            (folder / NO_SIGN).glob("*"),
        )
    )
    facts = (path for path in _find_files(folder / PENDING) if path.suffix == ".json")
    moved = [path for path in facts if (path.parent.name, path.stem) in (accepted | no_sign) - pending]
    if not moved:
        return
    (folder / ACCEPTED).mkdir(exist_ok=True)  # there is none if all show no sign
    table = pd.concat([_read_record(folder), pd.DataFrame(map(_read_facts, moved))])
    with files.atomic_file(folder / ACCEPTED / RECORD) as partial_file:
        partial_file.write_text(files.to_csv(table.drop_duplicates(["id", "label"], keep="last")))
    for path in moved:
        path.unlink()


def _read_record(folder: Path) -> pd.DataFrame:
    """Return the record of the accepted photographs. Raises DataError if it cannot be read: it would be overwritten."""
    record = folder / ACCEPTED / RECORD
    return read_table(record, "id", "label") if record.exists() else pd.DataFrame()
