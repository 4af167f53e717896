"""CONTRIBUTING's source map: each question names a file of the package, and a symbol that the file defines."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "pipeline" / "backlens"
ROW = re.compile(
    r"^\| (?P<question>.+\?) \| `(?P<file>[\w/]+\.py)` \| `(?P<symbol>[\w.]+)` \|$", re.MULTILINE
)
SOURCE_MAP = (
    (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("\n## Source map\n")[2].partition("\n## ")[0]
)
ROWS = [match.groupdict() for match in ROW.finditer(SOURCE_MAP)]


def defined(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Names of the functions, classes, methods and constants of a module."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name
        elif isinstance(node, ast.ClassDef):
            yield prefix + node.name
            yield from defined(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign):
            yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id


def test_every_row_of_the_map_is_a_question_a_file_and_a_symbol():
    rows = [line for line in SOURCE_MAP.splitlines() if line.startswith("| ") and "?" in line]
    assert len(rows) == len(ROWS) >= 20


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["symbol"])
def test_a_symbol_of_the_map_is_defined_in_its_file(row: dict[str, str]):
    file = SOURCE / row["file"]
    assert file.exists(), row["question"]
    assert row["symbol"] in set(defined(ast.parse(file.read_text("utf-8")).body)), row["question"]


def test_every_folder_of_the_package_is_on_the_map():
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert folders == {row["file"].partition("/")[0] for row in ROWS if "/" in row["file"]}
