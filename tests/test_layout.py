"""Who may import whom, what a package may be called, and what has to be declared to be installed."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "schemas")

CORE = (
    "backlens.models",
    "backlens.capture.hooks",
    "backlens.capture.factors",
    "backlens.projection.lens",
    "backlens.projection.project",
    "backlens.projection.float32_bound",
    "backlens.projection.topk",
)


@dataclass(frozen=True, slots=True)
class Rule:
    """Modules in `packages` import nothing of `forbidden`; modules in `allowed` are left out."""

    packages: tuple[str, ...]
    forbidden: tuple[str, ...]
    why: str
    allowed: tuple[str, ...] = ()


RULES = (
    Rule(
        CORE,
        (
            *("ray", "duckdb", "pyarrow", "cyclopts", "rich"),
            *("backlens.cli", "backlens.doctor", "backlens.engine", "backlens.store", "backlens.atlas"),
            "schemas",
        ),
        "the numerical core runs in a notebook and on a bare GPU machine",
    ),
    Rule(("backlens.models",), CORE[1:], "arrows point down: models is the lowest layer"),
    Rule(("backlens.capture.hooks",), CORE[2:], "arrows point down: capture only knows models"),
    Rule(
        ("backlens.capture.factors", "backlens.projection.lens"),
        ("backlens.projection.project",),
        "arrows point down",
    ),
    Rule(("pipeline",), ("backlens.cli",), "the command line is the top", allowed=("backlens.cli",)),
    Rule(
        ("backlens.store", "backlens.atlas"),
        ("torch", "ray", "transformers"),
        "tables are written and read without a model at hand",
        allowed=(
            "backlens.atlas.neuron_weights",
            "backlens.atlas.build",
        ),  # imported where they are asked for
    ),
    Rule(
        ("backlens.engine", "backlens.store", "backlens.atlas", "backlens.prompts"),
        ("backlens.doctor",),
        "nothing depends on being diagnosed",
    ),
    Rule(
        ("backlens.doctor",),
        ("ray", "duckdb", "pyarrow", "rich", "backlens.store", "backlens.atlas"),
        "the doctor looks at models, and leaves showing what it found to the command line",
    ),
    Rule(("backlens.store",), ("backlens.engine", "backlens.atlas"), "arrows point down"),
    Rule(("backlens.engine",), ("backlens.forecast",), "a run needs no forecast of itself"),
    Rule(
        ("backlens.atlas",),
        ("backlens.engine",),
        "finished runs are read without what made them",
        allowed=("backlens.atlas.build",),  # the connection to Ray
    ),
    Rule(
        ("backlens.figures",),
        ("torch", "ray", "transformers", "backlens.engine"),
        "figures are drawn from tables, without a model at hand",
    ),
    Rule(("backlens.atlas",), ("backlens.figures", "matplotlib"), "answers need no figures"),
    Rule(("schemas",), ("pipeline",), "the schemas stand alone"),
)


def module_name(file: Path) -> str:
    """`pipeline/backlens/store/commit.py` is `backlens.store.commit`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, frozenset[str]]:
    """By module: every name that it imports anywhere in its file, inside functions too."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    assert files
    return {
        module_name(file): frozenset(imported_names(ast.parse(file.read_text("utf-8")))) for file in files
    }


def imported_names(tree: ast.AST) -> Iterator[str]:
    """`import a.b` gives `a.b`; `from a.b import c` gives `a.b.c`, for c may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name, not a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.packages[0]}: {rule.why}")
def test_imports_point_down(rule: Rule):
    broken = [
        f"{module} imports {name}"
        for module, names in imports().items()
        for name in names
        if within(module, rule.packages) and not within(module, rule.allowed) and within(name, rule.forbidden)
    ]
    assert not broken, f"{rule.why}: {broken}"


def test_every_rule_names_modules_that_exist():
    named = {name for rule in RULES for name in rule.packages + rule.forbidden if within(name, ("pipeline",))}
    assert not [name for name in named if not any(within(module, (name,)) for module in imports())]


def test_schemas_import_pyarrow_only():
    used = {
        name.partition(".")[0]
        for module, names in imports().items()
        if within(module, ("schemas",))
        for name in names
    }
    assert used - sys.stdlib_module_names - {"schemas"} == {"pyarrow"}


def loaded_by(modules: str, heavy: tuple[str, ...]) -> list[str]:
    """Which of `heavy` a fresh interpreter has loaded once it has imported `modules`."""
    code = f"import sys, {modules}; print(*(name for name in {heavy} if name in sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    return ran.stdout.split()


def test_the_core_loads_without_tables_queries_or_ray():
    heavy = ("ray", "duckdb", "pyarrow.dataset", "datasets", "cyclopts", "rich")
    assert not loaded_by(
        "backlens.projection.project, backlens.capture.hooks, backlens.capture.factors", heavy
    )


def test_the_command_line_starts_without_torch_or_ray():
    assert not loaded_by("backlens.cli.main", ("torch", "ray", "transformers", "duckdb", "pyarrow"))


def test_no_file_is_a_drawer_for_anything():
    drawers = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
    found = [
        str(file.relative_to(ROOT))
        for package in (*PACKAGES, "tests", "jobs", "benchmarks", "docs")
        for file in (ROOT / package).rglob("*.py")
        if file.name in drawers
    ]
    assert not found


def test_everything_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    listed = [*project["dependencies"], *(line for extra in extras for line in extra)]
    declared = {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in listed}
    used = {name.partition(".")[0] for names in imports().values() for name in names}
    third_party = used - sys.stdlib_module_names - set(PACKAGES)
    assert {normal("pyyaml" if name == "yaml" else name) for name in third_party} <= declared


def normal(name: str) -> str:
    """A distribution's name as the registry compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()
