"""Run benchmarks, print a table, and log it to an MLflow run.

scripts/benchmark [PART...] [--data FOLDER]
"""

import argparse
import multiprocessing
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import mlflow

from benchmarks import measure
from benchmarks.measure import Row
from signdigits.tracking import runs

PARTS = ("training", "serving", "start", "batch", "server", "search", "gain", "few", "yardstick")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--data", default="sign-language-digits", help="the photographs (default: %(default)s)")
    parsed = parser.parse_args()
    if unknown := [part for part in parsed.parts if part not in PARTS]:
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(PARTS)}")
    rows: list[Row] = []
    # Each part in a process of its own: no tracking store, thread pool or memory of one reaches the next.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as processes:
        for part in parsed.parts or PARTS:
            print(f"{part} ...", file=sys.stderr, flush=True)
            rows += processes.submit(measure.measure_part, part, parsed.data).result()
            print(format_table(rows), flush=True)
    log_table(rows)
    return 0


def format_table(rows: list[Row]) -> str:
    cells: list[tuple[str, ...]] = [("what", "against", "result", "target", "measured")]
    for row in rows:
        target = f"{row.target:g} or {'more' if row.at_least else 'less'}{'' if row.reached else ' (missed)'}"
        cells.append((row.what, row.against, f"{row.result:.2f}", target, row.detail))
    return runs.markdown_table(cells)


def log_table(rows: list[Row]) -> None:
    """Log the table to a run of its own."""
    runs.open_experiment("benchmark")
    with runs.start_run("benchmark", "benchmark"):
        runs.log_versions()
        mlflow.log_dict({"machine": describe_machine(), "rows": [asdict(row) for row in rows]}, "benchmark.json")
        mlflow.log_text(format_table(rows), "benchmark.md")
        runs.set_description(f"{describe_machine()}\n\n{format_table(rows)}")


def describe_machine() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{os.cpu_count()} cores of {name}, Python {platform.python_version()}, {platform.system()}"


if __name__ == "__main__":
    sys.exit(main())
