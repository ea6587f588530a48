"""Run benchmarks, print a table, and log it to an MLflow run and a Markdown file.

scripts/benchmark [PART...] [--data FOLDER] [--markdown FILE]
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

PARTS = ("training", "serving", "start", "batch", "proxy", "rollout", "attack", "search")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--data", default="sign-language-digits", help="the photographs (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, help="a file to write the table to")
    parsed = parser.parse_args()
    if unknown := [part for part in parsed.parts if part not in PARTS]:
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(PARTS)}")
    found: list[Row] = []
    # Each part in a process of its own: no tracking store, thread pool or memory of one reaches the next.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as processes:
        for part in parsed.parts or PARTS:
            print(f"{part} ...", file=sys.stderr, flush=True)
            found += processes.submit(measure.part, part, parsed.data).result()
            print(markdown(found), flush=True)
    record(found)
    if parsed.markdown:
        parsed.markdown.write_text(f"{machine()}\n\n{markdown(found)}\n")
    return 0


def markdown(found: list[Row]) -> str:
    head = ("what", "against", "result", "should reach", "measured")
    return runs.markdown_table([head, *(shown(row) for row in found)])


def shown(row: Row) -> tuple[str, ...]:
    bound = f"{row.reach:g} or {'more' if row.at_least else 'less'}"
    return row.what, row.against, f"{row.result:.2f}", f"{bound}{'' if row.reached else ' (missed)'}", row.detail


def record(found: list[Row]) -> None:
    """Write the table to a run of its own."""
    runs.open_experiment("benchmark")
    with runs.start_run("benchmark", "benchmark"):
        runs.log_versions()
        mlflow.log_dict({"machine": machine(), "rows": [asdict(row) for row in found]}, "benchmark.json")
        mlflow.log_text(markdown(found), "benchmark.md")
        runs.set_description(f"{machine()}\n\n{markdown(found)}")


def machine() -> str:
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{os.cpu_count()} cores of {name}, Python {platform.python_version()}, {platform.system()}"


if __name__ == "__main__":
    sys.exit(main())
