"""`backlens plot`: one figure of a run to a file."""

from backlens.atlas import Atlas
from backlens.cli.console import say
from backlens.errors import BacklensError, nearest
from backlens.figures import check_target, missing_letters, require_matplotlib, save
from backlens.heatmap import default_module, make_layer_curves

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
    from backlens.figures.heatmap import draw_heatmap

    note = None
    if prompt is None:
        rows, vocabulary = atlas.layer_curves().to_pylist(), atlas.vocabulary
        curves = {name: make_layer_curves(rows, name, vocabulary) for name in _modules(atlas, module)}
        drawn = draw_curves(curves, _prompts(atlas))
    elif kind == "ranks":
        heatmaps = [atlas.heatmap(prompt, name) for name in _modules(atlas, module, prompt)]
        drawn = draw_ranks(heatmaps, is_vector)
        note = missing_letters([heatmaps[0].prompt], is_vector)
    else:
        heatmap = atlas.heatmap(prompt, module or default_module(_modules(atlas, None, prompt)))
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


def _prompts(atlas: Atlas) -> str:
    """The prompts that a figure of the whole run is about."""
    shards, planned = atlas.snapshot.shards, atlas.snapshot.record.plan.shards
    return "all prompts of the run" if shards == planned else f"{shards} of {planned} shards of the run"


def _name(kind: str, prompt: int | None, module: str | None) -> str:
    parts = [kind, *([] if prompt is None else [str(prompt)]), *([] if module is None else [module])]
    return f"{'-'.join(parts)}.png"
