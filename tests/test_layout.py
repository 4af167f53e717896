"""The package's rules: which module imports which, names that are not used, and declared dependencies."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "pipeline"

LEVELS = (
    ("__init__", "errors", "printable"),
    ("terms", "config", "demo"),
    ("store",),
    ("models", "prompts"),
    ("capture",),
    ("projection",),
    ("display", "heatmap"),
    ("columns", "rows"),
    ("gradients", "backward_lens"),
    ("engine",),
    ("atlas", "editing", "doctor", "forecast"),
    ("figures",),
    ("serve",),
    ("api", "cli"),
    ("__main__",),
)
"""The package's files and folders, lowest level first. A module imports its own level and lower levels.

`__init__` is at the bottom although it names modules above it: it imports each when its name is first used.
"""

UPWARD = {
    ("backlens.heatmap", "backlens.figures.heatmap"): "a heatmap that is saved as an image draws itself"
}
"""Imports inside functions that point up, and the reason."""

CORE = ("models", "capture", "projection")
"""The numerical core runs in a notebook and on a bare GPU machine, without the packages in HEAVY."""
HEAVY = ("ray", "duckdb", "pyarrow", "cyclopts", "rich", "starlette", "uvicorn", "matplotlib")

WITHOUT_MODELS = ("backlens.store", "backlens.atlas", "backlens.figures", "backlens.serve")
ON_DEMAND = ("backlens.atlas.neuron_weights", "backlens.atlas.build")
"""Tables are written, read and drawn without a model. Only these modules need one, and are imported on demand."""

# fmt: off
METAPHORS = (
    "sieve", "screening", "selection", "lanes", "kernels", "gang", "fleet", "member", "notes",
    "faults", "retry", "condemned", "written", "anatomy", "structure", "draft", "spread", "widths",
    "asked", "plain", "twins", "standing", "tools", "values", "drive", "outlook", "pilot",
    "specimen", "sample",
)
# fmt: on
"""Metaphors, and second words for one idea: retired as names of files and of classes."""

EMPTY = ("text", "util", "utils", "helper", "helpers", "common", "misc")
"""File names that say nothing about the content."""

RETIRED_CLASSES = {"work", "question", "plan", "job", "extraction", *METAPHORS}
"""Class names that stood for several ideas at once, and metaphors. Compared in lower case, without underscores.

`Answer`, `Block` and `Trial` were such names too. Each now has one meaning, and no two classes share a name.
"""

MOST_FILES = 130


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    assert found
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text("utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Every name that a module imports anywhere in its file, inside functions too."""
    return frozenset(imported_names(tree(module)))


def imported_names(node: ast.AST) -> Iterator[str]:
    """`import a.b` gives `a.b`; `from a.b import c` gives `a.b.c`, for c may be a module."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            yield from (alias.name for alias in each.names)
        elif isinstance(each, ast.ImportFrom):
            assert each.level == 0, f"line {each.lineno}: write the whole name, not a relative import"
            yield from (f"{each.module}.{alias.name}" for alias in each.names)


def own_imports(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for name in imports(module):
        target = name if name in modules() else name.rpartition(".")[0]
        if target in modules():
            found.add(target)
    return found - {module}


def level(module: str) -> int:
    group = module.removeprefix("backlens").removeprefix(".").partition(".")[0] or "__init__"
    (found,) = [number for number, groups in enumerate(LEVELS) if group in groups] or [None]
    assert found is not None, f"{modules()[module]}: add {group!r} to LEVELS"
    return found


def test_imports_point_down():
    broken = [
        f"{module} imports {target}"
        for module in modules()
        for target in own_imports(module)
        if level(target) > level(module) and (module, target) not in UPWARD and module != "backlens"
    ]
    assert not broken
    assert all(target in own_imports(module) for module, target in UPWARD)


def test_no_modules_import_each_other_in_a_circle():
    """A module is removed once everything that it imports is; what is left is a circle."""
    left = {module: own_imports(module) - {"backlens"} for module in modules()}
    left = {module: {t for t in targets if (module, t) not in UPWARD} for module, targets in left.items()}
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize("package", CORE)
def test_the_numerical_core_imports_nothing_heavy(package: str):
    broken = [
        f"{module} imports {name}"
        for module in modules()
        if module.startswith(f"backlens.{package}")
        for name in imports(module)
        if name.partition(".")[0] in HEAVY
    ]
    assert not broken


def test_tables_are_written_and_read_without_a_model():
    broken = [
        f"{module} imports {name}"
        for module in modules()
        if module.startswith(WITHOUT_MODELS) and module not in ON_DEMAND
        for name in imports(module)
        if name.partition(".")[0] in ("torch", "transformers", "ray")
    ]
    assert not broken


def loaded_by(code: str, heavy: tuple[str, ...]) -> list[str]:
    """The modules of `heavy` that a fresh interpreter has loaded after `code`."""
    code = f"import sys; {code}; print(*(name for name in {heavy} if name in sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return ran.stdout.split()


def test_import_backlens_loads_nothing_heavy():
    assert not loaded_by("import backlens", (*HEAVY, "torch", "transformers", "numpy"))


def test_the_library_loads_without_ray_duckdb_or_a_server():
    heavy = ("ray", "duckdb", "pyarrow.dataset", "datasets", "rich", "starlette", "matplotlib")
    assert not loaded_by("import backlens; backlens.BackwardLens, backlens.Gradients", heavy)


def test_the_command_line_starts_without_torch_or_ray():
    assert not loaded_by("import backlens.cli.main", ("torch", "ray", "transformers", "duckdb", "pyarrow"))


def test_there_are_at_most_130_files():
    found = len(modules())
    assert found <= MOST_FILES


def test_no_file_has_a_retired_name():
    retired = {*METAPHORS, *EMPTY}
    assert not [module for module in modules() if module.rpartition(".")[2].strip("_") in retired]


def classes() -> Iterator[tuple[str, str]]:
    """Module and name of every class, without the underscore of private ones."""
    for module in modules():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ClassDef):
                yield module, node.name.lstrip("_")


def test_no_class_has_a_retired_name():
    assert not [f"{module}.{name}" for module, name in classes() if name.lower() in RETIRED_CLASSES]


def test_no_two_classes_share_a_name():
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for module, name in classes():
        homes[name].append(module)
    assert not {name: where for name, where in homes.items() if len(where) > 1}


def test_no_docstring_begins_with_a_fragment():
    """A docstring is a sentence: "Share of memory", not "Of the memory there is, what …"."""
    fragment = re.compile(r'"""(?:Of|What|Whether|As)\b.*')
    found = [
        f"{module}: {text}"
        for module, file in modules().items()
        for text in fragment.findall(file.read_text("utf-8"))
    ]
    assert not found


def test_nothing_else_is_installed_at_top_level():
    assert [
        path.name for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    ] == ["backlens"]


@cache
def declared() -> dict[str, set[str]]:
    """Declared distributions by extra; "" is what every installation has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {normal(re.split(r"[^\w.-]", line)[0]) for line in each} for extra, each in lines.items()}


def test_everything_imported_is_declared():
    used = {name.partition(".")[0] for module in modules() for name in imports(module)}
    third_party = used - sys.stdlib_module_names - {"backlens"}
    known = set().union(*declared().values())
    assert {normal("pyyaml" if name == "yaml" else name) for name in third_party} <= known


def test_everything_that_make_installs_is_pinned():
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    installed = set().union(*(names for extra, names in declared().items() if extra != "bench"))
    assert installed <= set(map(normal, pins))


def normal(name: str) -> str:
    """A distribution's name as the registry compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()
