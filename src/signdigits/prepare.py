"""Report on a folder of photographs before training.

python -m signdigits prepare --data FOLDER
mlflow run . -e prepare -P data=FOLDER
"""

import logging
from collections import Counter
from dataclasses import asdict
from typing import Any

import mlflow
import pandas as pd

from signdigits import files, plots
from signdigits.config import ReportParameters
from signdigits.data import lineage, quality, split
from signdigits.data.folders import count_junk
from signdigits.data.loading import Data
from signdigits.promotion.comparison import wilson_interval
from signdigits.tracking import runs

log = logging.getLogger(__name__)

EXPECTED_ACCURACY = 0.9  # for the confidence interval that is printed before anything is trained
MAX_LINES = 5  # printed, of the doubtful labels


def prepare(data: Data, report: ReportParameters) -> str:
    """Report on `data` in a separate run, and return the run's id."""
    with runs.start_run("prepare", f"prepare {data.dataset.name}") as run:
        runs.log_params(asdict(data.parameters) | asdict(report))
        mlflow.log_input(lineage.dataset_input(data.dataset), context="all")
        log_report(data)
        if data.parameters.log_data:
            lineage.log_photographs(data.dataset, run.info.run_id)
        if report.label_errors:
            log_label_errors(data)
        counts = runs.markdown_table([("class", "photographs"), *data.dataset.counts().items()])
        runs.set_description(
            f"The photographs of `{data.parameters.data}`. Digest `{data.dataset.digest}`.\n\n{counts}"
        )
        return run.info.run_id


def log_report(data: Data) -> None:
    """Log the report, the table of files, a sample and the findings to the active run, and print a summary."""
    split.write_groups(data.dataset)
    report, findings = _build_report(data), quality.find_issues(data)
    mlflow.set_tags(lineage.data_tags(data.dataset, data.split))
    mlflow.log_metrics(
        {
            "photographs": len(data.dataset.photographs),
            "unreadable": len(data.dataset.unreadable),
            "junk_files": report["junk files"],
            "classes": len(data.dataset.class_names),
            "findings": len(findings),
        }
    )
    mlflow.log_dict(report, "data/report.json")
    mlflow.log_text(files.to_csv(quality.tabulate_files(data)), runs.FILES)
    runs.log_figure("data/sample.png", lambda: _plot_sample(data))
    mlflow.log_text(files.to_csv(findings), "data/findings.csv")
    if set(findings["finding"]) - set(quality.WITHOUT_PICTURE):
        runs.log_figure("data/findings.png", lambda: quality.plot_findings(data, findings))
    for line in _report_lines(data, report, findings):
        log.info("%s", line)


def log_label_errors(data: Data) -> None:
    """Log the photographs whose label is doubtful, as a table and a picture, and print the first."""
    from signdigits.data import label_errors  # cleanlab takes a second, and `main` does not need it

    table = label_errors.rank_labels(data.dataset)
    issues = int(table["issue"].sum())
    mlflow.log_metric("label_issues", issues)
    mlflow.log_text(files.to_csv(table), "data/label_errors.csv")
    runs.log_figure("data/label_errors.png", lambda: label_errors.plot_labels(data.dataset, table))
    log.info("label errors, estimated: %d; see data/label_errors.csv and data/label_errors.png in the run", issues)
    for row in table[table["suggested"] != table["class"]].head(MAX_LINES).to_dict("records"):
        log.info("  %s: perhaps %s", row["path"], row["suggested"])


def _build_report(data: Data) -> dict[str, Any]:
    """Return counts, sizes and modes, the unreadable files, and the digests of the data set and the parts of its split."""
    dataset, split = data.dataset, data.split
    sizes = Counter(f"{width}x{height}" for width, height in (photograph.size for photograph in dataset.photographs))
    rotated = [photograph.path for photograph in dataset.photographs if photograph.orientation != 1]
    return {
        "dataset": dataset.name,
        "digest": dataset.digest,
        "classes": dataset.counts(),
        "sizes": dict(sizes.most_common()),
        "modes": dict(Counter(photograph.mode for photograph in dataset.photographs).most_common()),
        "turned upright": rotated,
        "unreadable": dataset.unreadable,
        "junk files": sum(map(count_junk, dataset.folders)),
        "test accuracy": _expected_interval(len(split.testing)),
        "split": {
            name: {"images": len(part), "digest": dataset.part_digest(part)} for name, part in split.parts.items()
        },
    }


def _expected_interval(n: int) -> dict[str, float]:
    """Return Wilson's 95 % confidence interval of a test accuracy of nine in ten of `n` images, rounded to an image."""
    right = round(EXPECTED_ACCURACY * n)
    low, high = wilson_interval(right, n)
    return {"images": n, "right": right, "low": round(low, 3), "high": round(high, 3)}


def _report_lines(data: Data, report: dict[str, Any], findings: pd.DataFrame) -> list[str]:
    """Summarize the report for the terminal."""
    dataset = data.dataset
    sizes = list(report["sizes"].items())
    size_summary = ", ".join(f"{count} of {size}" for size, count in sizes[:3]) + (", ..." if len(sizes) > 3 else "")
    parts = ", ".join(f"{part['images']} {name}" for name, part in report["split"].items())
    expected = report["test accuracy"]
    lines = [
        f"{', '.join(map(str, dataset.folders))}: {len(dataset.photographs)} photographs in {len(dataset.class_names)} classes, {size_summary}",
        f"classes: {', '.join(f'{name} {count}' for name, count in report['classes'].items())}",
        f"split {data.split.name}: {parts}; digest {dataset.digest}",
        f"a model that reads {expected['right']} of the {expected['images']} test images has an accuracy of "
        f"{expected['low']:.2f} to {expected['high']:.2f} (95 % confidence)",
    ]
    if few := findings.loc[findings["finding"] == "few", "path"].tolist():
        classes = ", ".join(f"{name} {report['classes'][name]}" for name in few)
        lines.append(f"fewer than {quality.MIN_PHOTOGRAPHS} photographs: {classes}; add more before you trust a result")
    if report["turned upright"]:
        lines.append(f"turned upright by their EXIF orientation: {len(report['turned upright'])}")
    if counts := findings["finding"].value_counts().to_dict():
        kinds = ", ".join(f"{count} {name}" for name, count in counts.items())
        lines.append(f"findings: {kinds}; see data/findings.csv and data/findings.png in the run")
    if report["junk files"]:
        lines.append(f"skipped: {report['junk files']} hidden or junk files and folders, such as .DS_Store")
    lines += [f"skipped: {path}: {reason}" for path, reason in dataset.unreadable.items()]
    return lines


def _plot_sample(data: Data) -> plots.Figure:
    """Plot the first nine training images, preprocessed for the network, with their classes."""
    images, labels = data.training.x[:9], data.training.y[:9]
    titles = [data.dataset.class_names[label] for label in labels]
    return plots.plot_photographs(list(images), titles, f"{data.dataset.name}: training images")
