"""A first description of blocks that no layout is known for, as YAML to check and edit (`layout_file.py`).

Where the matrices have the names of a known layout, the draft is that layout. Else they are guessed by their names,
and only where their widths agree; what is left over is put under `not-covered`, so that nothing is left out in
silence and an unedited draft is complete.
"""

import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import BacklensError
from pipeline.models.anatomy import Block, describe_blocks, unproven_cuts
from pipeline.models.experts import expert_matrices
from pipeline.models.layout import LAYOUTS, MODULES, READS, Cut, Layout, Matrix
from pipeline.models.structure import find_blocks, matrix_paths
from pipeline.models.widths import expert_widths, misfits, widths

UNKNOWN = "unknown; name it above or keep it here"

NAMES: Mapping[str, tuple[str, ...]] = {
    "mlp.up": (
        "up_proj",
        "fc1",
        "fc_in",
        "c_fc",
        "w3",
        "wi_1",
        "wi",
        "up",
        "dense_h_to_4h",
        "lin1",
        "input_linear",
    ),
    "mlp.gate": ("gate_proj", "w1", "wi_0", "gate"),
    "mlp.down": ("down_proj", "fc2", "fc_out", "w2", "down", "dense_4h_to_h", "lin2", "output_linear"),
    "attn.q": ("q_proj", "query", "wq", "w_q", "q", "q_lin", "to_q"),
    "attn.k": ("k_proj", "key", "wk", "w_k", "k", "k_lin", "to_k"),
    "attn.v": ("v_proj", "value", "wv", "w_v", "v", "v_lin", "to_v"),
    "attn.o": ("o_proj", "out_lin", "w_o"),
}
"""Last parts of paths, in lower case, by the module they mostly are."""

UNGATED_UP = "w1"
"""Names mlp.gate where there is a w3, and mlp.up where there is none."""

EITHER = ("out_proj", "c_proj", "dense", "wo", "o", "to_out", "proj")
"""Names of attn.o under a path that says attention, and of a feed-forward matrix elsewhere."""

FUSED_MLP = ("gate_up_proj", "up_gate_proj", "w12")
FUSED_ATTENTION = ("qkv_proj", "qkv", "wqkv", "c_attn", "query_key_value")
BY_HEAD = "query_key_value"
"""A fused matrix of this name has q, k and v of every head side by side, in all families that we know."""


@dataclass(frozen=True, slots=True)
class SeenMatrix:
    """A module of a block that holds weights of two or more dimensions."""

    path: str
    shape: str
    """`32 → 96`; for experts, how many and each one's matrices."""
    widths: tuple[int, int] | None
    """(in, out) of a plain matrix."""
    experts: int = 0
    """How many, where it is a layer's routed experts in a form that can be watched."""

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2].lower()

    @property
    def within(self) -> str:
        return self.path.rpartition(".")[0].lower()

    @property
    def in_attention(self) -> bool:
        return "att" in self.within


@dataclass(frozen=True, slots=True)
class SeenBlock:
    """Blocks that hold the same matrices."""

    layers: tuple[int, ...]
    matrices: tuple[SeenMatrix, ...]


@dataclass(frozen=True, slots=True)
class Draft:
    """A description that `read_layout` accepts, with comments."""

    text: str
    layout: Layout
    like: tuple[str, ...]
    """Families whose blocks are named alike; empty where names had to be guessed."""


def see_blocks(model: PreTrainedModel) -> tuple[SeenBlock, ...]:
    """The model's blocks by what they hold, in order of their first layer. The meta device will do.

    Raises BacklensError when the blocks cannot be told.
    """
    layers: dict[tuple[SeenMatrix, ...], list[int]] = {}
    for index, block in enumerate(find_blocks(model)):
        layers.setdefault(tuple(_see(block, path) for path in matrix_paths(block)), []).append(index)
    return tuple(SeenBlock(tuple(indices), matrices) for matrices, indices in layers.items())


def draft_layout(model: PreTrainedModel) -> Draft:
    """Describe the blocks of `model`. Raises BacklensError when they cannot be told."""
    seen = see_blocks(model)
    like, layout = _known(model, seen) or ((), _guessed(model, seen))
    return Draft(_as_yaml(model, seen, like, layout), layout, like)


def _see(block: nn.Module, path: str) -> SeenMatrix:
    module = block.get_submodule(path)
    try:
        weights = dict.fromkeys(weight for weight, _ in expert_matrices(module).values())
    except BacklensError:
        weights = {}
    if weights:
        count = len(getattr(module, next(iter(weights))))
        each = ", ".join("{} {} → {}".format(w, *expert_widths(module, w)) for w in weights)
        return SeenMatrix(path, f"{count} experts: {each}", None, count)
    found = widths(module)
    if found is not None:
        return SeenMatrix(path, f"{found[0]} → {found[1]}", found)
    large = ((name, p.shape) for name, p in module.named_parameters(recurse=False) if p.ndim > 1)
    return SeenMatrix(path, ", ".join(f"{name} {' × '.join(map(str, shape))}" for name, shape in large), None)


def _known(model: PreTrainedModel, seen: Sequence[SeenBlock]) -> tuple[tuple[str, ...], Layout] | None:
    """The families that name exactly these matrices, and their layout with cuts as numbers."""
    there = {matrix.path for block in seen for matrix in block.matrices}
    alike: list[tuple[Layout, list[str]]] = []
    for family in LAYOUTS:
        layout = _resolved(LAYOUTS[family], model)
        if layout is None or _paths(layout) != there or not _fits(model, layout):
            continue
        same = next((families for other, families in alike if other == layout), None)
        if same is None:
            alike.append((layout, [family]))
        else:
            same.append(family)
    # Layouts may have all their paths in common and cut them differently; that of most families is likeliest.
    layout, families = max(alike, key=lambda each: len(each[1]), default=(None, []))
    return None if layout is None else (tuple(families), layout)


def _resolved(layout: Layout, model: PreTrainedModel) -> Layout | None:
    """The layout in numbers; None where the model's configuration lacks what its cuts go by."""
    try:
        matrices = {
            name: tuple(Matrix(m.path, m.cut_in(model.config)) for m in layout.alternatives(name))
            for name in layout.matrices
        }
    except AttributeError:
        return None
    return replace(layout, matrices=matrices, logit_scale=_logit_scale(model))


def _paths(layout: Layout) -> set[str]:
    named = {matrix.path for name in layout.matrices for matrix in layout.alternatives(name)}
    return named | layout.not_covered.keys() | ({layout.experts} if layout.experts else set())


def _fits(model: PreTrainedModel, layout: Layout) -> bool:
    try:
        blocks = describe_blocks(model, layout)
    except BacklensError:
        return False
    return not misfits(blocks, _d_model(model)) and all(map(_queries_fit, blocks))


def _queries_fit(block: Block) -> bool:
    """Queries are as wide as what attn.o reads: tells a fused matrix in thirds from one with fewer keys and values."""
    query, output = block.matrices.get("attn.q"), block.matrices.get("attn.o")
    if query is None or query.cut is None or output is None:
        return True
    fused, read = (widths(block.module.get_submodule(located.path)) for located in (query, output))
    return fused is not None and read is not None and query.cut.width(fused[1]) == read[0]


def _guessed(model: PreTrainedModel, seen: Sequence[SeenBlock]) -> Layout:
    accepted: dict[str, list[Matrix]] = {}
    for block in seen:
        for module, matrix in _guess(block, model).items():
            taken = [other.path for other in accepted.get(module, ())]
            # A block has one matrix of each name: a second one there would leave the first without a name.
            rivals = (each for each in seen if matrix.path in _paths_of(each))
            if matrix.path not in taken and not any(_paths_of(each) & set(taken) for each in rivals):
                accepted.setdefault(module, []).append(matrix)
    matrices = {module: tuple(accepted[module]) for module in MODULES if module in accepted}
    every = {matrix.path: matrix for block in seen for matrix in block.matrices}
    experts = next((matrix for matrix in every.values() if matrix.experts), None)
    layout = Layout(matrices, experts.path if experts else None, logit_scale=_logit_scale(model))
    left = {path: _what(matrix, experts, _d_model(model)) for path, matrix in every.items()}
    return replace(
        layout, not_covered={path: what for path, what in left.items() if path not in _paths(layout)}
    )


def _paths_of(block: SeenBlock) -> set[str]:
    return {matrix.path for matrix in block.matrices}


def _what(matrix: SeenMatrix, experts: SeenMatrix | None, d_model: int) -> str:
    routes = experts is not None and matrix.widths == (d_model, experts.experts)
    return "the router" if routes else UNKNOWN


def _guess(block: SeenBlock, model: PreTrainedModel) -> dict[str, Matrix]:
    """The modules of one kind of block."""
    plain = {module: list(_candidates(module, block, _d_model(model))) for module in MODULES}
    return _guess_mlp(block, plain) | _guess_attention(block, plain, model)


def _candidates(module: str, block: SeenBlock, d_model: int) -> Iterable[SeenMatrix]:
    """Matrices with a name and a residual side that suit a module."""
    attention = module.startswith("attn")
    for matrix in block.matrices:
        if matrix.widths is None or matrix.widths[0 if module in READS else 1] != d_model:
            continue
        if matrix.name in EITHER:
            written_at_block = matrix.name == "wo" and not matrix.within
            suits = module in ("mlp.up", "mlp.down", "attn.o") and attention == (
                matrix.in_attention or written_at_block
            )
        else:
            suits = matrix.name in NAMES[module] and (attention or not matrix.in_attention)
        if suits:
            yield matrix


def _guess_mlp(block: SeenBlock, plain: Mapping[str, Sequence[SeenMatrix]]) -> dict[str, Matrix]:
    """mlp.up, the mlp.down that reads what it writes, and the mlp.gate beside it; or gate and up in one matrix."""
    ungated = (matrix for matrix in plain["mlp.gate"] if matrix.name == UNGATED_UP)
    fused = (matrix for matrix in block.matrices if matrix.name in FUSED_MLP)
    for up in (*plain["mlp.up"], *ungated, *fused):
        for down in plain["mlp.down"]:
            assert down.widths is not None
            if up is down or up.widths is None:
                continue
            if up.widths[1] == down.widths[0]:
                found = {"mlp.up": Matrix(up.path), "mlp.down": Matrix(down.path)}
                for gate in plain["mlp.gate"]:
                    if gate is not up and (gate.within, gate.widths) == (up.within, up.widths):
                        return found | {"mlp.gate": Matrix(gate.path)}
                return found
            if up.widths[1] == 2 * down.widths[0]:
                gate, linear = (Matrix(up.path, Cut(1, 2, i, i + 1)) for i in range(2))
                return {"mlp.up": linear, "mlp.gate": gate, "mlp.down": Matrix(down.path)}
    return {}


def _guess_attention(
    block: SeenBlock, plain: Mapping[str, Sequence[SeenMatrix]], model: PreTrainedModel
) -> dict[str, Matrix]:
    """q, k, v and o; of fused ones, q is as wide as what o reads, and k and v share what is left."""
    found = {name: Matrix(plain[name][0].path) for name in MODULES if name.startswith("attn") and plain[name]}
    if "attn.q" in found:
        return found
    for fused in (matrix for matrix in block.matrices if matrix.name in FUSED_ATTENTION):
        for output in plain["attn.o"]:
            assert output.widths is not None
            cuts = _cuts(fused, output.widths[0], model)
            if cuts:
                return {name: Matrix(fused.path, cut) for name, cut in cuts.items()} | {
                    "attn.o": Matrix(output.path)
                }
    return {}  # what there is belongs to a recurrent or convolutional layer


def _cuts(fused: SeenMatrix, queries: int, model: PreTrainedModel) -> dict[str, Cut]:
    if fused.widths is None or fused.widths[0] != _d_model(model):
        return {}
    keys, odd = divmod(fused.widths[1] - queries, 2)
    if keys <= 0 or odd:
        return {}
    piece = math.gcd(queries, keys)
    q, kv = queries // piece, keys // piece
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    side_by_side = fused.name == BY_HEAD and q == kv
    groups = heads if side_by_side and isinstance(heads, int) and queries % heads == 0 else 1
    borders = {"attn.q": (0, q), "attn.k": (q, q + kv), "attn.v": (q + kv, q + 2 * kv)}
    return {name: Cut(groups, q + 2 * kv, *border) for name, border in borders.items()}


def _logit_scale(model: PreTrainedModel) -> float:
    scale = getattr(model.config, "logit_scale", None)
    divisor = getattr(model.config, "logits_scaling", None)
    if isinstance(scale, int | float) and scale:
        return float(scale)
    return 1 / divisor if isinstance(divisor, int | float) and divisor else 1.0


def _d_model(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)


def _as_yaml(model: PreTrainedModel, seen: Sequence[SeenBlock], like: Sequence[str], layout: Layout) -> str:
    shapes: dict[str, list[str]] = {}
    for matrix in (matrix for block in seen for matrix in block.matrices):
        if matrix.shape not in shapes.setdefault(matrix.path, []):
            shapes[matrix.path].append(matrix.shape)

    unproven = unproven_cuts(layout, model.config)

    def entry(start: str, path: str, end: str = "") -> str:
        return f"{start}{end or _scalar(path)}  # {' or '.join(shapes[path])}"

    def named(start: str, module: str, matrix: Matrix) -> str:
        said = entry(start, matrix.path, _matrix(matrix))
        return f"{said}; unproven cut" if matrix.cut is not None and module in unproven else said

    lines = _heading(model, seen, like, layout)
    lines.append("matrices:" if layout.matrices else "matrices: {}")
    for module in (name for name in MODULES if name in layout.matrices):
        alternatives = layout.alternatives(module)
        if len(alternatives) == 1:
            lines.append(named(f"  {module}: ", module, alternatives[0]))
        else:
            lines.append(f"  {module}:")
            lines += [named("    - ", module, matrix) for matrix in alternatives]
    if layout.experts:
        lines.append(entry("experts: ", layout.experts))
    if layout.not_covered:
        lines.append("not-covered:")
        lines += [
            entry(f"  {_scalar(path)}: ", path, _scalar(what)) for path, what in layout.not_covered.items()
        ]
    if layout.logit_scale != 1.0:
        lines.append(f"logit-scale: {layout.logit_scale!r}")
    return "\n".join(lines) + "\n"


def _heading(
    model: PreTrainedModel, seen: Sequence[SeenBlock], like: Sequence[str], layout: Layout
) -> list[str]:
    kinds = "of one kind" if len(seen) == 1 else f"of {len(seen)} kinds"
    count = sum(len(block.layers) for block in seen)
    said = [f"{model.config.model_type}: {count} blocks {kinds}, d_model {_d_model(model)}."]
    if like:
        said.append(
            f"Its matrices have the names of those of {', '.join(like)}, and are described as they are."
        )
    else:
        said.append(
            "Which matrix is which is guessed from names and widths: check it against the model's code."
        )
    if unproven_cuts(layout, model.config):
        cuts = {m.path for name in layout.matrices for m in layout.alternatives(name) if m.cut is not None}
        said.append(
            f"Which outputs of {', '.join(sorted(cuts))} are which is a guess that no check proves: compare it with "
            "the model's code."
        )
    if any(not _named_in(block, layout) for block in seen):
        said.append("Blocks of which no matrix is named are refused: name one of theirs.")
    return [
        line
        for each in said
        for line in textwrap.wrap(each, 100, initial_indent="# ", subsequent_indent="#   ")
    ]


def _named_in(block: SeenBlock, layout: Layout) -> bool:
    named = {matrix.path for name in layout.matrices for matrix in layout.alternatives(name)}
    return bool(_paths_of(block) & named)


def _matrix(matrix: Matrix) -> str:
    cut = matrix.cut
    if not isinstance(cut, Cut):
        return _scalar(matrix.path)
    numbers = f"groups: {cut.groups}, pieces: {cut.pieces}, start: {cut.start}, stop: {cut.stop}"
    return f"{{path: {_scalar(matrix.path)}, {numbers}}}"


def _scalar(text: str) -> str:
    """Text as YAML reads it back: quoted unless it is plainly text."""
    return text if re.fullmatch(r"[A-Za-z_][\w .,;()-]*", text) else json.dumps(text, ensure_ascii=False)
