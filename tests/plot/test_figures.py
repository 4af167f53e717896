"""Figures are of the right cells, fit any script, and are files of the asked format or one line of refusal."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from backlens.atlas import Atlas
from backlens.cli.main import call
from backlens.figures import missing_letters, require_matplotlib, shown
from backlens.figures.heatmap import draw_heatmap
from backlens.heatmap import Heatmap, make_heatmap
from backlens.store.directory import Directory
from tests.store.examples import VOCAB, ExampleRun, example_run

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ExampleRun:
    return example_run(Directory.at(tmp_path_factory.mktemp("run")))


def test_a_heatmap_has_every_layer_and_position_of_its_module(example: ExampleRun):
    heatmap = Atlas(example.out).heatmap(5, "mlp.down")
    rows = [row for row in example.rows["tokens"] if (row["prompt_id"], row["module"]) == (5, "mlp.down")]
    expected = {
        (row["layer"], row["position"]): row["bottom_ids"] and VOCAB[row["bottom_ids"][0]] for row in rows
    }
    assert {(cell.layer, cell.position): cell.bottom for cell in heatmap.cells.values()} == expected
    (prompt,) = [row for row in example.rows["prompts"] if row["prompt_id"] == 5]
    assert heatmap.tokens == [VOCAB[token_id] for token_id in prompt["token_ids"]]
    assert heatmap.kind == "shift δ"


def test_a_cell_shows_the_expert_with_the_largest_vjp(tmp_path: Path):
    run = example_run(Directory.at(tmp_path), experts=True)
    heatmap = Atlas(run.out).heatmap(1, "mlp.up")
    assert heatmap.has_experts
    cells = [(cell.layer, cell.position) for cell in heatmap.cells.values()]
    assert len(cells) == len(set(cells)) == len(heatmap.layers) * len(heatmap.tokens)


def test_cells_and_ranks_of_modules_that_write_begin_at_the_promoted_end(example: ExampleRun):
    atlas = Atlas(example.out)
    rows = {
        (row["module"], row["layer"], row["position"]): row
        for row in example.rows["tokens"]
        if row["prompt_id"] == 5 and row["top_ids"]
    }
    for module, first, second in (("mlp.down", "bottom", "top"), ("mlp.up", "top", "bottom")):
        heatmap = atlas.heatmap(5, module)
        assert heatmap.sides == (("promoted", "suppressed") if module == "mlp.down" else ("top", "bottom"))
        lines = {heatmap.positions[line.position_class]: line.points for line in heatmap.rank_lines}
        for (of, layer, position), row in rows.items():
            if of == module:
                cell = heatmap.cells[layer, position]
                assert heatmap.pair(cell) == (VOCAB[row[f"{first}_ids"][0]], VOCAB[row[f"{second}_ids"][0]])
                rank = row["target_rank"] if module == "mlp.up" else len(VOCAB) - 1 - row["target_rank"]
                assert heatmap.rank(cell) == rank
                assert position not in lines or lines[position][layer] == rank


def test_drawing_a_heatmap_loads_no_database():
    code = "import sys, backlens.figures.heatmap; print([n for n in ('duckdb', 'torch') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_tokens_are_one_line_with_their_spaces_to_be_seen():
    require_matplotlib()
    assert shown(" Paris", False) == "␣Paris"
    assert shown("\n\n", False) == "⏎⏎"
    assert shown("\x11", False) == "<11>"
    assert shown(None, False) == ""
    assert shown("abcdefghijklmnop", False) == "abcdefghijk…"
    assert shown("東京都庁舎前駅", True) == "東京都庁舎…"
    assert re.fullmatch(r"東|<6771>", shown("東", False))
    assert shown("עברית", False) == "עברית"


def test_letters_without_a_glyph_are_said_to_stand_as_codes():
    require_matplotlib()
    note = missing_letters([" Paris", None, "\u6771", "\n"], False)
    if shown("\u6771", False) != "\u6771":
        assert note is not None
        assert re.search(r"^\d letters \(such as <6771>\) are in no font .* draw an \.svg$", note)
    assert missing_letters(["\u6771"], True) is None
    assert missing_letters(["Paris é ␣"], False) is None


def strange(layers: int, positions: int) -> Heatmap:
    tokens = [
        " Paris",
        "東京",
        "שלום",
        "مرحبا",
        "\n",
        "$x_1$",
        "<script>",
        "_hidden",
        "",
        " \t",
        "ไทย",
        "a" * 40,
    ]
    rows = [
        {
            "layer": layer,
            "position": at,
            "expert": None,
            "target_rank": None,
            "vjp_norm": 0.0 if at == 3 else 10.0 ** -(at % 5),
            "top_tokens": [tokens[at % 12]],
            "bottom_tokens": [tokens[(at + layer) % 12]],
        }
        for layer in range(layers)
        for at in range(positions)
    ]
    texts = [tokens[at % len(tokens)] for at in range(positions)]
    prompt = {"prompt": "$p$ " * 90, "target": " Paris", "n_tokens": positions, "subject_start": None}
    return make_heatmap(prompt, "mlp.up", rows, texts, " Paris", len(tokens))


@pytest.mark.parametrize("cells", ["tokens", "norms"])
def test_letters_keep_their_size_however_large_the_figure(cells):
    require_matplotlib()
    small, large = (draw_heatmap(strange(*size), False, cells) for size in ((2, 3), (12, 30)))
    assert large.get_figwidth() > 30
    for figure in (small, large):
        assert {text.get_fontsize() for text in figure.axes[0].texts} <= {7.0, 8.0}


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize(
    "options",
    [
        ["--prompt", "1"],
        ["--prompt", "1", "--figure", "norms", "--module", "mlp.up"],
        ["--prompt", "1", "--figure", "ranks"],
        [],
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_suffix_says_the_format(
    example: ExampleRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, options: list[str]
):
    target = tmp_path / f"figure.{suffix}"
    assert call(["plot", example.out, *options, "--to", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    magic = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert target.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [target]


def test_svg_text_is_text_escaped_and_the_same_each_time(tmp_path: Path):
    from backlens.figures import save

    require_matplotlib()
    for name in ("a.svg", "b.svg"):
        save(draw_heatmap(strange(3, 12), True), tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text("utf-8")
    assert drawn == (tmp_path / "b.svg").read_text("utf-8")
    assert "東京" in drawn
    assert "<script>" not in drawn


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "figure.gif"], r"the suffix says the format; use one of \.png, \.svg, \.pdf"),
        (["--to", "nowhere/figure.png"], "there is no folder nowhere"),
        (["--figure", "heatmpa"], "did you mean heatmap"),
        (["--figure", "ranks"], "shows one prompt; give --prompt"),
        (["--figure", "curves", "--prompt", "1"], "curves show all prompts"),
        (["--prompt", "99"], "has no prompt 99"),
        (["--prompt", "1", "--module", "mlp.dwn"], "did you mean mlp.down"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_status_2(
    example: ExampleRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
):
    monkeypatch.chdir(tmp_path)
    assert call(["plot", example.out, *options]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(
    example: ExampleRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(["plot", example.out]) == 2
    assert 'pip install "backlens[plot]"' in capsys.readouterr().err
