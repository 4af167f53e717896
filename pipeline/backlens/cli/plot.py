"""`backlens plot`: one figure of a run to a file."""

from backlens.atlas import Atlas
from backlens.cli.console import say
from backlens.errors import BacklensError, nearest
from backlens.figures.canvas import check_target, missing_letters, require_matplotlib, save

FIGURES = ("heatmap", "norms", "ranks", "curves")


def draw(out: str, figure: str | None, prompt: int | None, module: str | None, to: str | None) -> int:
    """Draw what is asked for and return the exit status."""
    kind = figure or ("curves" if prompt is None else "heatmap")
    if kind not in FIGURES:
        raise BacklensError(f"--figure {kind}: there are {', '.join(FIGURES)}{nearest(kind, FIGURES)}")
    if prompt is None and kind != "curves":
        raise BacklensError(f"plot: a figure of {kind} is of one prompt; give --prompt")
    if prompt is not None and kind == "curves":
        raise BacklensError("plot: curves are of all prompts; leave out --prompt, or use --figure ranks")
    require_matplotlib()
    target = check_target(to or _name(kind, prompt, module))
    is_vector = target.suffix.lower() == ".svg"
    atlas = Atlas(out)
    if atlas.note:
        say(atlas.note, stderr=True)
    from backlens.figures.curves import draw_curves, draw_ranks
    from backlens.figures.heatmap import draw_heatmap, read_heatmap

    note = None
    if prompt is None:
        drawn = draw_curves(atlas, _modules(atlas, module))
    elif kind == "ranks":
        drawn = draw_ranks(atlas, prompt, _modules(atlas, module, prompt), is_vector)
        note = missing_letters(atlas.prompt(prompt)["prompt"].to_pylist(), is_vector)
    else:
        heatmap = read_heatmap(atlas, prompt, module or _default_module(atlas, prompt))
        drawn = draw_heatmap(heatmap, is_vector, "norms" if kind == "norms" else "tokens")
        note = missing_letters(heatmap.texts, is_vector)
    if note is not None:
        say(note, stderr=True)
    save(drawn, target)
    say(target)
    return 0


def _modules(atlas: Atlas, module: str | None, prompt: int | None = None) -> list[str]:
    found = atlas.modules(module, prompt)
    if not found:
        raise BacklensError(f"plot: {atlas.snapshot.directory} has no rows to draw")
    return found


def _default_module(atlas: Atlas, prompt: int) -> str:
    """What an update writes, if it is there."""
    modules = _modules(atlas, None, prompt)
    return "mlp.down" if "mlp.down" in modules else modules[0]


def _name(kind: str, prompt: int | None, module: str | None) -> str:
    parts = [kind, *([] if prompt is None else [str(prompt)]), *([] if module is None else [module])]
    return f"{'-'.join(parts)}.png"
