"""Draws one prompt of a finished run as an SVG: what each layer's gradient says at each position.

python docs/draw_heatmap.py demo-run --prompt 37 --out docs/demo-heatmap.svg

Rows are layers, the last at the top; columns are the prompt's tokens. A cell holds the top token of the
vector that is projected (δ for mlp.down) and under it the bottom token, bold where it is the target. Its
colour is the norm of δ, on a logarithmic scale.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import duckdb

CELL_WIDTH, CELL_HEIGHT = 82, 38
LEFT, TOP = 64, 92
"""Room for the layers' numbers, and for the title and the prompt's tokens."""
BOTTOM = 54
NARROWEST = 600
"""Room for the line under the title."""
LONGEST = 11
"""Characters of a token that a cell has room for."""
DECADES = 3.0
"""Norms this many powers of ten below the largest are as pale as an exact zero, their tokens too."""

KEY = "top token of δ, under it the bottom one (bold: the target; empty: δ is exactly zero)"

STYLE = """
text { font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 }
.target { font-weight: 700 }
.faint { fill: #59636e }
.paper { fill: #ffffff }
.heat { fill: #f2a33a; stroke: #d1d9e0; stroke-width: 1 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .faint { fill: #9198a1 }
  .paper { fill: #0d1117 }
  .heat { fill: #a35d00; stroke: #3d444d }
}
"""

CELLS = """
SELECT t.layer, t.position, t.vjp_norm, top.token AS top, bottom.token AS bottom,
       t.bottom_ids[1] = p.target_ids[1] AS hit
FROM read_parquet($tokens) t
JOIN read_parquet($prompts) p USING (prompt_id)
LEFT JOIN read_parquet($vocab) top ON top.token_id = t.top_ids[1]
LEFT JOIN read_parquet($vocab) bottom ON bottom.token_id = t.bottom_ids[1]
WHERE t.prompt_id = $prompt AND t.module = $module
ORDER BY t.layer, t.position
"""

PROMPT = """
SELECT p.prompt, p.target, list(v.token ORDER BY place)
FROM (SELECT *, unnest(token_ids) AS token_id, generate_subscripts(token_ids, 1) AS place
      FROM read_parquet($prompts) WHERE prompt_id = $prompt) p
JOIN read_parquet($vocab) v USING (token_id)
GROUP BY ALL
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer at one position; an exact zero has no tokens."""

    layer: int
    position: int
    norm: float
    top: str | None
    bottom: str | None
    hit: bool | None
    """Whether the bottom token is the target's first."""


@dataclass(frozen=True, slots=True)
class Picture:
    """All that is drawn."""

    prompt: str
    target: str
    tokens: Sequence[str]
    module: str
    cells: Sequence[Cell]


def read(run: Path, prompt: int, module: str) -> Picture:
    """The picture's content from a run that is complete (its files are then all committed)."""
    files = {
        "prompts": str(run / "prompts" / "*.parquet"),
        "vocab": str(run / "vocab" / "*.parquet"),
    }
    found = duckdb.execute(PROMPT, {**files, "prompt": prompt}).fetchone()
    tokens = str(run / "tokens" / "*.parquet")
    rows = duckdb.execute(CELLS, {**files, "tokens": tokens, "prompt": prompt, "module": module}).fetchall()
    if found is None or not rows:
        raise SystemExit(f"{run} has no prompt {prompt} with module {module}")
    return Picture(found[0], found[1], found[2], module, [Cell(*row) for row in rows])


def draw(picture: Picture) -> str:
    """The SVG; it brings its own paper, so that it can be read on light pages and on dark ones."""
    layers = sorted({cell.layer for cell in picture.cells})
    width = max(NARROWEST, LEFT + CELL_WIDTH * len(picture.tokens) + 16)
    height = TOP + CELL_HEIGHT * len(layers) + BOTTOM
    title = f"{picture.prompt} → {picture.target.strip()}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">',
            f"<title>Top and bottom tokens of {picture.module} gradients: {escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{width}" height="{height}" rx="6"/>',
            text(16, 26, title, "title", "start"),
            text(16, 46, f"{picture.module}: {KEY}", "faint", "start"),
            *axes(picture.tokens, layers),
            *(line for cell in picture.cells for line in cell_lines(cell, layers, largest(picture))),
            *legend(height - 30, largest(picture)),
            "</svg>",
            "",
        ]
    )


def axes(tokens: Sequence[str], layers: Sequence[int]) -> Iterator[str]:
    for position, token in enumerate(tokens):
        yield text(LEFT + CELL_WIDTH * (position + 0.5), TOP - 10, short(token), "faint")
    for row, layer in enumerate(reversed(layers)):
        middle = TOP + CELL_HEIGHT * (row + 0.5) + 4
        yield text(LEFT - 8, middle, f"layer {layer}", "faint", "end")


def cell_lines(cell: Cell, layers: Sequence[int], most: float) -> Iterator[str]:
    x = LEFT + CELL_WIDTH * cell.position
    y = TOP + CELL_HEIGHT * (len(layers) - 1 - layers.index(cell.layer))
    shade = strength(cell.norm, most)
    yield (
        f'<rect class="heat" x="{x}" y="{y}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" '
        f'fill-opacity="{shade:.2f}"/>'
    )
    if cell.top is not None and cell.bottom is not None:
        middle = x + CELL_WIDTH / 2
        plain = "" if shade else "faint"
        yield text(middle, y + 15, short(cell.top), plain)
        yield text(middle, y + 31, short(cell.bottom), "target" if cell.hit else plain)


def legend(y: int, most: float) -> Iterator[str]:
    steps = 6
    yield text(16, y + 14, "‖δ‖", "faint", "start")
    for step in range(steps + 1):
        norm = most * 10 ** (DECADES * (step / steps - 1))
        x = LEFT + 60 * step
        yield (
            f'<rect class="heat" x="{x}" y="{y}" width="60" height="20" '
            f'fill-opacity="{strength(norm, most):.2f}"/>'
        )
        yield text(x + 30, y + 14, f"{norm:.2g}")


def largest(picture: Picture) -> float:
    return max(cell.norm for cell in picture.cells) or 1.0


def strength(norm: float, most: float) -> float:
    """How strong a cell's colour is, from 0 to 1."""
    return max(0.0, 1 + math.log10(norm / most) / DECADES) if norm else 0.0


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def short(token: str) -> str:
    """A token as a cell shows it: without its spaces, cut if it is long, control characters replaced."""
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in token.strip()) or "␣"
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw one prompt of a finished run as an SVG.")
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--prompt", type=int, default=0, help="its prompt_id")
    parser.add_argument("--module", default="mlp.down")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file")
    given = parser.parse_args()
    given.out.write_text(draw(read(given.run, given.prompt, given.module)), encoding="utf-8")


if __name__ == "__main__":
    main()
