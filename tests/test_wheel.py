"""The wheel: what it holds, and that it works outside the checkout beside a user's files with our folders' names."""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "pipeline")
IMPORTED = "IMPORTED"
USERS_FILES = (
    "pipeline.py",
    "schemas.py",
    "test.py",
    "jobs.py",
    "pipeline/__init__.py",
    "schemas/__init__.py",
)
"""Files in the working directory. Each leaves a file `IMPORTED` when something imports it."""

pytestmark = pytest.mark.slow


def execute(*command: "str | Path", cwd: Path) -> str:
    """Run a command without PYTHONPATH, which would show it the checkout. Gives its standard output."""
    ran = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=400
    )
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources by the installed build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(ROOT / name, folder)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist")
    execute(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that holds the wheel, and sees the installed packages behind it.

    A path in a .pth file is searched, but .pth files in it are not: an editable installation stays unseen.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "installed.pth").write_text("".join(f"{p}\n" for p in sys.path if p.endswith("site-packages")))
    options = ("--no-deps", "--no-index", "--ignore-installed")
    execute(sys.executable, "-m", "pip", f"--python={python}", "install", *options, wheel, cwd=folder)
    return python


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    for name in USERS_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(folder / IMPORTED)!r}, 'a').write(__file__)\n")
    return folder


@pytest.fixture(scope="module")
def local_run(python: Path, users_folder: Path) -> Path:
    """The first prompts of the demo, run in one process of the fresh environment."""
    options = ("--limit", "4", "--executor", "local")
    execute(python.with_name("backlens"), "run", *options, cwd=users_folder)
    return users_folder / "demo-run"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    names = [PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()]
    assert {name.parts[0] for name in names if ".dist-info" not in name.parts[0]} == {"backlens"}
    source = ROOT / "pipeline"
    assert {str(name) for name in names if name.suffix == ".py"} == {
        file.relative_to(source).as_posix() for file in source.rglob("*.py")
    }


def test_the_wheel_holds_the_demo_without_the_code_that_trained_it(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("backlens/demo/")}
    assert {"backlens/demo/facts.json", "backlens/demo/model/model.safetensors"} <= names
    assert [name for name in names if name.endswith(".py")] == ["backlens/demo/__init__.py"]


def test_the_library_is_imported_beside_a_users_files(python: Path, users_folder: Path):
    code = "import backlens; backlens.BackwardLens; print(backlens.__file__)"
    found = Path(execute(python, "-c", code, cwd=users_folder).strip())
    assert found.is_relative_to(python.parents[1])
    assert not (users_folder / IMPORTED).exists()


def test_the_demo_runs_in_one_process(local_run: Path, users_folder: Path):
    assert (local_run / "run.json").exists()
    assert not (users_folder / IMPORTED).exists()


def test_the_demo_runs_on_ray_workers(python: Path, users_folder: Path):
    """Ray puts the driver's folder on the import path of its workers."""
    execute(python.with_name("backlens"), "run", "--limit", "4", "--out", "on-ray", cwd=users_folder)
    assert (users_folder / "on-ray" / "run.json").exists()
    assert not (users_folder / IMPORTED).exists()


def test_the_server_finds_its_templates(python: Path, local_run: Path, users_folder: Path):
    backlens = python.with_name("backlens")
    execute(backlens, "atlas", local_run, cwd=users_folder)
    server = subprocess.Popen(
        [backlens, "serve", str(local_run), "--port", "0"],
        cwd=users_folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        address = re.search(r"http://\S+?:\d+", server.stdout.readline())
        assert address is not None
        with urllib.request.urlopen(f"{address[0]}/prompt/1", timeout=60) as page:
            assert page.status == 200
            assert "<table" in page.read().decode()
        with urllib.request.urlopen(f"{address[0]}/static/style.css", timeout=60) as style:
            assert style.status == 200
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.communicate()
    assert not (users_folder / IMPORTED).exists()
