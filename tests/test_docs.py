"""The documentation: generated parts are current, links lead somewhere, and commands exist."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from signdigits.cli import COMMANDS, make_parser

from .conftest import PROJECT

PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]


def test_parameters_page_is_current() -> None:
    page = runpy.run_path(str(PROJECT / "docs" / "parameters.py"))["render"]()
    assert (PROJECT / "docs" / "parameters.md").read_text() == page, "run python docs/parameters.py"


def test_mkdocs_builds_without_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra .[docs]")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        line, cwd=PROJECT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr


def test_readme_shows_the_objective() -> None:
    def read_body(text: str) -> list[str]:
        code = text.partition("def objective(")[2].partition("return fitted")[0]
        return [line.partition("  #")[0] for line in code.splitlines() if '"""' not in line]

    source = (PROJECT / "src" / "signdigits" / "tuning" / "objective.py").read_text()
    assert read_body((PROJECT / "README.md").read_text()) == read_body(source)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every `python -m signdigits` line and every parameter of `mlflow run` is one that the command line knows."""
    text = page.read_text().replace("\\\n", " ")
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in re.findall(r"python -m signdigits ([^#\n]*)", block):
            make_parser().parse_args(line.split())
        for entry, rest in re.findall(r"mlflow run \. -e (\w+)([^#\n]*)", block):
            assert COMMANDS[entry].is_entry_point
            with pytest.raises(SystemExit):
                make_parser().parse_args([entry, "--help"])
            assert set(re.findall(r"-P (\w+)=", rest)) <= set(re.findall(r"--(\w+)", capsys.readouterr().out)), rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_scripts_exist(page: Path) -> None:
    for script in set(re.findall(r"\bscripts/(\w+)", page.read_text())):
        assert (PROJECT / "scripts" / script).is_file(), script


def test_photographs_of_visitors_are_ignored() -> None:
    """What commands leave in the checkout by default does not get into a commit."""
    if not (PROJECT / ".git").exists():
        pytest.skip("no checkout")
    left = [
        "corrections/pending/0/a.jpeg",
        "prediction_log/a.jsonl",
        "predictions/a.csv",
        "exported/a.tflite",
        "data/a.jpg",
    ]
    found = subprocess.run(["git", "check-ignore", *left], cwd=PROJECT, capture_output=True, text=True)
    assert found.stdout.split() == left
