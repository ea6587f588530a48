"""Report what a folder of photographs holds, before anything is trained on it.

python -m signdigits prepare --data FOLDER
mlflow run . -e prepare -P data=FOLDER
"""

import logging
from collections import Counter
from dataclasses import asdict
from typing import Any

import mlflow
import pandas as pd

from signdigits import plots, tables
from signdigits.data import groups, quality
from signdigits.data.loading import Data
from signdigits.tracking import runs

log = logging.getLogger(__name__)


def prepare(data: Data) -> str:
    """Report on `data` in a run of its own, and return the run's id."""
    with runs.start_run("prepare", f"prepare {data.dataset.name}") as run:
        runs.log_params(asdict(data.parameters))
        mlflow.log_input(runs.dataset_input(data.dataset), context="all")
        log_report(data)
        runs.set_description(_describe_dataset(data))
        return run.info.run_id


def log_report(data: Data) -> None:
    """Log the report, the table of files, the table of classes and a sample to the active run, and print the gist."""
    groups.write_groups(data.dataset)
    found, worth_a_look = _build_report(data), quality.find_issues(data)
    mlflow.set_tags(runs.data_tags(data.dataset, data.split))
    mlflow.log_metrics(
        {
            "photographs": len(data.dataset.photographs),
            "unreadable": len(data.dataset.unreadable),
            "classes": len(data.dataset.class_names),
            "findings": len(worth_a_look),
        }
    )
    mlflow.log_dict(found, "data/report.json")
    mlflow.log_text(tables.to_csv(_files_table(data)), "data/files.csv")
    runs.log_figure("data/sample.png", lambda: _plot_sample(data))
    mlflow.log_text(tables.to_csv(worth_a_look), "data/findings.csv")
    if set(worth_a_look["finding"]) - {"imbalance"}:
        runs.log_figure("data/findings.png", lambda: quality.plot_findings(data, worth_a_look))
    for line in _report_lines(data, found, worth_a_look):
        log.info("%s", line)


def _build_report(data: Data) -> dict[str, Any]:
    """Counts, sizes and modes, what was unreadable, and the digests of the whole and of each part of the split."""
    dataset, split = data.dataset, data.split
    sizes = Counter(f"{width}x{height}" for width, height in (photograph.size for photograph in dataset.photographs))
    turned = [photograph.path for photograph in dataset.photographs if photograph.orientation != 1]
    return {
        "dataset": dataset.name,
        "digest": dataset.digest,
        "classes": dataset.counts(),
        "sizes": dict(sizes.most_common()),
        "modes": dict(Counter(photograph.mode for photograph in dataset.photographs).most_common()),
        "turned upright": turned,
        "unreadable": dataset.unreadable,
        "split": {
            name: {"images": len(part), "digest": dataset.part_digest(part)} for name, part in split.parts.items()
        },
    }


def _report_lines(data: Data, found: dict[str, Any], worth_a_look: pd.DataFrame) -> list[str]:
    """The report in a few lines for the terminal."""
    dataset = data.dataset
    sizes = list(found["sizes"].items())
    shown = ", ".join(f"{count} of {size}" for size, count in sizes[:3]) + (", ..." if len(sizes) > 3 else "")
    parts = ", ".join(f"{part['images']} {name}" for name, part in found["split"].items())
    lines = [
        f"{dataset.folder}: {len(dataset.photographs)} photographs in {len(dataset.class_names)} classes, {shown}",
        f"classes: {', '.join(f'{name} {count}' for name, count in found['classes'].items())}",
        f"split {data.split.name}: {parts}; digest {dataset.digest}",
    ]
    if found["turned upright"]:
        lines.append(f"turned upright by their EXIF orientation: {len(found['turned upright'])}")
    if counts := worth_a_look["finding"].value_counts().to_dict():
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        lines.append(f"worth a look: {told}; see data/findings.csv and data/findings.png in the run")
    lines += [f"left out: {path}: {reason}" for path, reason in dataset.unreadable.items()]
    return lines


def _describe_dataset(data: Data) -> str:
    """The report for the run's page."""
    rows = runs.markdown_table([("class", "photographs"), *data.dataset.counts().items()])
    return f"What `{data.parameters.data}` holds. Digest `{data.dataset.digest}`.\n\n{rows}"


def _files_table(data: Data) -> pd.DataFrame:
    """One row a photograph: path, class, checksum, size, mode, orientation, and the part of the split it is in."""
    parts = quality.part_names(data)
    rows = [
        {
            "path": photograph.path,
            "class": data.dataset.class_names[photograph.label],
            "part": part,
            "width": photograph.size[0],
            "height": photograph.size[1],
            "mode": photograph.mode,
            "orientation": photograph.orientation,
            "sha256": photograph.checksum,
        }
        for photograph, part in zip(data.dataset.photographs, parts, strict=True)
    ]
    return pd.DataFrame(rows)


def _plot_sample(data: Data) -> plots.Figure:
    """The first nine training images, as the network sees them, with their classes."""
    images, labels = data.training.x[:9], data.training.y[:9]
    titles = [data.dataset.class_names[label] for label in labels]
    return plots.plot_photographs(list(images), titles, f"{data.dataset.name}: training images")
