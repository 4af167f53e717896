"""The documentation is run: commands are executed, shown output is compared, links have targets.

Blocks marked `bash`, `console`, `python` and `sql` are run in a scratch directory that holds a run of the bundled demo
(`demo-run`) and a small model (`my-model`). `console` blocks show commands after `$ ` and their output below; a command
without output only has to succeed. SQL is run on the demo run. The `python` blocks of a page are one program: a block
uses what the blocks above it define. Other blocks are listings and output, and hold no commands.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

JOB_SERVER = "needs a cluster; tests/engine/test_jobs.py runs it against a job server of its own"
ZERO3 = "takes half a minute; tests/engine/test_zero3.py runs the same"
BROWSER = (
    "runs until it is stopped, or needs a server; tests/serve starts one and opens its pages in a browser"
)
NODES = "needs machines; tests/test_cluster_files.py checks its file"

NOT_RUN = {
    "make demo": "installs what runs this test; the fixture `scratch` runs the demo",
    "make test": "runs this test",
    "bash docs/editing.sh editing": "takes minutes; tests/editing runs a sweep of every kind",
    "backlens edit sweep xl --model openai-community/gpt2-xl --edits counterfact.json "
    "--layers 30-40 --lr 0.24": "needs a model and a data set that are not here",
    "source .venv/bin/activate": "the environment of this test is on PATH",
    "backlens submit jobs/project.yaml --address http://127.0.0.1:8265": JOB_SERVER,
    "backlens jobs status --address http://127.0.0.1:8265": JOB_SERVER,
    "backlens jobs logs project-1a2b3c4d --follow --address http://127.0.0.1:8265": JOB_SERVER,
    "backlens jobs stop project-1a2b3c4d --address http://127.0.0.1:8265": JOB_SERVER,
    "backlens run --model my-model --out zero3-run --limit 5 --sharding zero3 --ranks 2 --gpus-per-replica 0": ZERO3,
    "backlens serve demo-run": BROWSER,
    "chromium --headless --hide-scrollbars --window-size=1240,860 --screenshot=docs/explorer.png "
    "http://127.0.0.1:8050/prompt/37": BROWSER,
    "ray get-auth-token --generate": "would make a token for the user who runs this test",
    "ray up cluster.yaml": NODES,
    "ray dashboard cluster.yaml": NODES,
    "ray down cluster.yaml": NODES,
    "sbatch docs/slurm.sh run.yaml": NODES,
    "kubectl apply -f docs/raycluster.yaml": NODES,
    "kubectl port-forward service/backlens-head-svc 8265": NODES,
    "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(kubectl get secret backlens -o "
    "jsonpath='{.data.auth_token}' | base64 -d)": NODES,
    "ray start --head --node-ip-address=10.0.0.1 --port=6379 --dashboard-host=127.0.0.1": NODES,
    "ray start --address=10.0.0.1:6379": NODES,
}
"""Commands that a page shows and this test leaves out, with the reason."""

COMMAND_LANGUAGES = {"bash", "console", "sql"}
RUN_LANGUAGES = {*COMMAND_LANGUAGES, "python"}
LISTINGS = {"", "text", "bibtex", "yaml", "json"}
COMMAND = re.compile(r"^\s*(\$ |backlens |make |python |pip )", re.MULTILINE)

BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    content: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command, and the output that the page shows (None: it shows none)."""

    arguments: Sequence[str]
    shown: str | None = None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(str(page.relative_to(ROOT)), line, match[1], match[2])


BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block, without those of NOT_RUN."""
    if block.language == "sql":
        yield Command(["backlens", "query", "demo-run", "--sql", block.content])
    elif block.language == "console":
        for part in re.split(r"^\$ ", block.content, flags=re.MULTILINE)[1:]:
            script, output = split_command(part)
            if bare(script) not in NOT_RUN:
                yield Command(shell(script), output.strip("\n") or None)
    else:
        kept = [line for line in block.content.splitlines() if bare(line) not in NOT_RUN]
        if any(bare(line) for line in kept):
            yield Command(shell("\n".join(kept)))


def split_command(part: str) -> tuple[str, str]:
    """A command with its further lines (after a backslash, or in open quotes), and its output."""
    lines = part.splitlines()
    count = 1
    while count < len(lines) and (lines[count - 1].endswith("\\") or open_quote("\n".join(lines[:count]))):
        count += 1
    return "\n".join(lines[:count]), "\n".join(lines[count:])


def open_quote(script: str) -> bool:
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", script).count('"') % 2 == 1


def bare(line: str) -> str:
    """A shell line without its comment."""
    return re.sub(r"(^|\s+)#.*", "", line).strip()


def shell(script: str) -> list[str]:
    return ["bash", "-euo", "pipefail", "-c", script]


def execute(command: Command, scratch: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(
        command.arguments, cwd=scratch, env=environment, capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, f"{command.arguments[-1]}\nexit status {ran.returncode}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    save_tiny(folder / "my-model")
    execute(Command(["backlens", "run", "--executor", "local"]), folder)
    (folder / "docs").symlink_to(ROOT / "docs")
    return folder


def python_blocks(page: Path) -> list[Block]:
    return [block for block in BLOCKS if block.language == "python" and ROOT / block.page == page]


def program(page: Path) -> str:
    """The Python of a page as one program, on the lines that it has in the page."""
    lines: list[str] = []
    for block in python_blocks(page):
        lines += [""] * (block.line - len(lines)) + block.content.splitlines()
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("page", filter(python_blocks, PAGES), ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, scratch: Path):
    file = scratch / f"{page.name}.py"
    file.write_text(program(page), encoding="utf-8")
    execute(Command([sys.executable, str(file)]), scratch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.language in COMMAND_LANGUAGES],
    ids=lambda block: f"{block.page}:{block.line}",
)
def test_commands_do_what_the_page_shows(block: Block, scratch: Path):
    for command in commands(block):
        printed = execute(command, scratch)
        if command.shown is not None:
            assert_same_output(printed, command.shown)


def test_the_readme_begins_with_three_lines_of_python_and_their_picture():
    first = next(block for block in BLOCKS if block.page == "README.md")
    assert first.language == "python"
    assert len([line for line in first.content.splitlines() if line]) == 3
    after = (ROOT / "README.md").read_text("utf-8").partition(first.content)[2]
    assert after.splitlines()[2].endswith("(docs/demo-heatmap.svg)")


def assert_same_output(printed: str, shown: str) -> None:
    """Words are equal, numbers to three significant digits: the last ones may differ between machines."""
    found, wanted = words(printed), words(shown)
    same = len(found) == len(wanted) and all(map(same_word, found, wanted))
    assert same, f"printed:\n{printed}\nshown:\n{shown}"


def words(output: str) -> list[str]:
    """The words of an output, without the lines around table cells."""
    return re.sub(r"[\u2500-\u257f]+", " ", output).split()


def same_word(one: str, other: str) -> bool:
    try:
        return math.isclose(float(one), float(other), rel_tol=5e-3)
    except ValueError:
        return one == other


def texts(picture: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)<", picture.read_text("utf-8"))


@pytest.mark.slow
def test_the_picture_is_what_the_library_and_the_pipeline_draw(scratch: Path):
    first = next(block for block in BLOCKS if block.page == "README.md")
    execute(Command([sys.executable, "-c", first.content.replace("heatmap.svg", "library.svg")]), scratch)
    execute(Command(shell("backlens plot demo-run --prompt 37 --module mlp.down --to plotted.svg")), scratch)
    shown = texts(ROOT / "docs" / "demo-heatmap.svg")
    assert len(shown) > 100
    assert texts(scratch / "library.svg") == shown, (
        "make docs/demo-heatmap.svg again, by README's first lines"
    )
    assert texts(scratch / "plotted.svg") == shown


def test_listings_hide_no_commands():
    unknown = [f"{b.page}:{b.line}" for b in BLOCKS if b.language not in RUN_LANGUAGES | LISTINGS]
    assert not unknown, f"mark them as one of {sorted(RUN_LANGUAGES | LISTINGS)}"
    hidden = [f"{b.page}:{b.line}" for b in BLOCKS if b.language in LISTINGS and COMMAND.search(b.content)]
    assert not hidden, "mark these blocks bash or console, so that they are run"


def test_commands_that_are_not_run_are_still_shown():
    lines = {bare(line.removeprefix("$ ")) for block in BLOCKS for line in block.content.splitlines()}
    assert set(NOT_RUN) <= lines


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links_have_targets(page: Path):
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text("utf-8")) if ":" not in link]
    assert not [target for target in targets if target and not (page.parent / target).exists()]


def test_commands_and_their_output_are_told_apart():
    block = Block(
        "page", 1, "console", '$ make demo  # first\n$ ask "a\n  b" \\\n  --more\none 2\n\n$ quiet\n'
    )
    asked, quiet = commands(block)
    assert asked.arguments[-1] == 'ask "a\n  b" \\\n  --more'
    assert asked.shown == "one 2"
    assert (quiet.arguments[-1], quiet.shown) == ("quiet", None)


def test_output_is_compared_by_words_and_rounded_numbers():
    assert_same_output("┏━━┓\n┃ a ┃ 0.12345 ┃", "a 0.12341")
    for other in ("a 0.1250", "b 0.12345", "a 0.12345 more"):
        with pytest.raises(AssertionError):
            assert_same_output("a 0.12345", other)
