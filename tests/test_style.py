"""Figures of names, docstrings, test names and the README."""

import ast
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import PROJECT

SOURCES = sorted((PROJECT / "src").rglob("*.py"))
TESTS = sorted((PROJECT / "tests").glob("test_*.py"))
Definition = ast.FunctionDef | ast.ClassDef


def definitions(path: Path) -> Iterator[Definition]:
    """Yield the top-level functions and classes of a module."""
    yield from (node for node in ast.parse(path.read_text()).body if isinstance(node, Definition))


def test_one_word_functions() -> None:
    names = [node.name for path in SOURCES for node in definitions(path) if isinstance(node, ast.FunctionDef)]
    assert sum("_" not in name.strip("_") for name in names) / len(names) <= 0.2


def test_names_are_defined_once() -> None:
    names = Counter(node.name for path in SOURCES for node in definitions(path) if not node.name.startswith("_"))
    assert len([name for name, count in names.items() if count > 1]) <= 5


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_docstrings_open_with_a_verb_or_noun(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text()))
    texts = [ast.get_docstring(node) for node in nodes if isinstance(node, Definition | ast.Module)]
    assert not [text for text in texts if text and re.match(r"(What|How|Whether|Which|Who)\b", text)]


def test_test_names_are_short() -> None:
    nodes = [node for path in TESTS for node in definitions(path)]
    words = [len(node.name.split("_")) - 1 for node in nodes if node.name.startswith("test_")]
    assert statistics.median(words) <= 5


def test_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 160
