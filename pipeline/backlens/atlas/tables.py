"""The tables of `OUT/atlas/`, which `backlens atlas` derives from those of a run and can rebuild at any time.

They count list entries: one token in the top or bottom list of one kept neuron for one prompt. Only kept neurons are
counted: a neuron that is missing for a prompt was below the cut-off, not zero. Summaries leave out the lists of vectors
shorter than the run's `norm_floor` (in `run.json`), because the final norm's bias leads such lists.
"""

import pyarrow as pa

from backlens.store.tables import (
    KEYS,
    MODULE,
    NEURONS,
    POSITION,
    SCORES,
    TOKEN_IDS,
    TOKENS,
    Column,
    Table,
    list_of,
)

ATLAS_VERSION = 5
"""Raised when a table here changes. An atlas of another version is not read; `backlens atlas` builds it again."""

PROMPT_ID, LAYER, MODULE_COLUMN, EXPERT = KEYS
UNIT = (LAYER, MODULE_COLUMN, EXPERT)
NEURON = Column(
    "neuron", pa.int32(), "Index of the unit on the side of the module that is not the residual one, from 0."
)
GRAD_NORM = Column("grad_norm", pa.float32(), "L2 norm of the neuron's gradient vector for that prompt.")
COUNTS = list_of(pa.int64())
DOUBLES = list_of(pa.float64())
NO_TOKENS = "null if none of its lists is counted"

ENTRY = (
    PROMPT_ID,
    Column(
        "side",
        MODULE,
        "The list: `top` (suppressed by an update) or `bottom` (promoted, because an update subtracts gradients).",
    ),
    Column("place", pa.int16(), "The token's place in that list, 0 = most extreme."),
    Column("score", pa.float32(), "The token's lens score of the neuron's gradient vector, in logits."),
    GRAD_NORM,
)
TOKEN_ID = Column("token_id", pa.int32(), "The token; joins `vocab.token_id`.")


def _side_columns(side: str, of: str) -> tuple[Column, ...]:
    """The columns about the lists of one side of a neuron."""
    return (
        Column(
            f"{side}_ids",
            TOKEN_IDS,
            f"The 10 tokens that are in most of its {of} lists, ties to the smaller id; {NO_TOKENS}.",
            True,
        ),
        Column(
            f"{side}_counts",
            COUNTS,
            f"Number of prompts with each of `{side}_ids` in that list; {NO_TOKENS}.",
            True,
        ),
        Column(
            f"{side}_lifts",
            DOUBLES,
            f"How many times more often each of `{side}_ids` is in this neuron's {of} lists than in those of its "
            f"layer's module; {NO_TOKENS}.",
            True,
        ),
        Column(
            f"{side}_own_ids",
            TOKEN_IDS,
            f"Up to 10 own tokens: they are in more of its {of} lists than chance among the lists of its "
            "layer's module explains, the largest log odds first; null if there is none.",
            True,
        ),
        Column(
            f"{side}_own_counts",
            COUNTS,
            f"Number of prompts with each of `{side}_own_ids` in that list.",
            True,
        ),
        Column(
            f"{side}_own_log_odds",
            DOUBLES,
            f"Smoothed log odds, in bits, of each of `{side}_own_ids` in its lists against those of its layer's "
            "module.",
            True,
        ),
        Column(
            f"{side}_entropy",
            pa.float64(),
            f"Entropy of the tokens in its {of} lists, in bits; {NO_TOKENS}.",
            True,
        ),
    )


NEURON_TOPK = Table(
    name="neuron_topk",
    doc="The lists of `neurons`, one row per entry, sorted by neuron.",
    row_per="kept neuron × side × place",
    sorted_by=("layer", "module", "expert", "neuron", "prompt_id", "side", "place"),
    columns=(*UNIT, NEURON, *ENTRY[:3], TOKEN_ID, *ENTRY[3:]),
)

TOKEN_TOPK = Table(
    name="token_topk",
    doc="The same rows as `neuron_topk`, sorted by token.",
    row_per="kept neuron × side × place",
    sorted_by=("token_id", "layer", "module", "expert", "neuron", "prompt_id", "side", "place"),
    columns=(TOKEN_ID, *UNIT, NEURON, *ENTRY),
)

POSITION_TOPK = Table(
    name="position_topk",
    doc="The lists of `tokens`, one row per entry, sorted by token: the positions at which a token is prominent.",
    row_per="prompt × layer × module (× expert) × position × side × place",
    sorted_by=("token_id", "layer", "module", "expert", "prompt_id", "position", "side", "place"),
    columns=(
        Column(
            "token_id", pa.int32(), "The token in the list, not that at the position; joins `vocab.token_id`."
        ),
        *UNIT,
        PROMPT_ID,
        POSITION,
        *ENTRY[1:3],
        Column("score", pa.float32(), "The token's lens score of the position's vector, in logits."),
    ),
)

NEURON_PROMPTS = Table(
    name="neuron_prompts",
    doc="The rows of `neurons` without their lists, sorted by neuron.",
    row_per="kept neuron of a prompt × layer × module (× expert)",
    sorted_by=("layer", "module", "expert", "neuron", "prompt_id"),
    columns=(
        *UNIT,
        NEURON,
        PROMPT_ID,
        GRAD_NORM,
        Column("main_position", pa.int32(), "The position that contributes most to the gradient vector."),
        Column(
            "target_score",
            pa.float32(),
            "The target's lens score of the vector, in logits; null if it is zero.",
            True,
        ),
        Column(
            "target_rank",
            pa.int32(),
            "The target's rank by that score, 0 = largest; null if the vector is zero.",
            True,
        ),
    ),
)

NEURON_SUMMARY = Table(
    name="neuron_summary",
    doc=(
        "The updates of a neuron over all prompts that keep it. An update subtracts gradients, so the tokens of "
        "bottom lists are promoted and those of top lists suppressed. The lens of the neuron's own weights is in "
        "`neuron_weights`."
    ),
    row_per="neuron that was kept for a prompt",
    sorted_by=("layer", "module", "expert", "neuron"),
    columns=(
        *UNIT,
        NEURON,
        Column(
            "prompts",
            pa.int64(),
            "Number of prompts that keep it; for the others it is below the cut-off, not zero.",
        ),
        Column("grad_norm_sum", pa.float64(), "Sum of its gradient norms over those prompts."),
        Column("grad_norm_mean", pa.float64(), "Their mean over those prompts."),
        Column("grad_norm_max", pa.float32(), "The largest of them."),
        Column(
            "strongest_prompts",
            COUNTS,
            "The prompt_ids of up to 5 prompts with the largest norms, largest first.",
        ),
        Column("strongest_norms", SCORES, "The gradient norms in `strongest_prompts`."),
        Column(
            "lists",
            pa.int64(),
            "Number of those prompts whose lists are counted below: the vector is neither zero nor shorter than "
            "the run's `norm_floor`.",
        ),
        Column(
            "entries_norm",
            pa.float64(),
            "Euclidean length of its counts by side and token, for the cosine of similar neurons; 0 without counts.",
        ),
        *_side_columns("promoted", "bottom"),
        *_side_columns("suppressed", "top"),
    ),
)


def _weight_columns(side: str, which: str) -> tuple[Column, ...]:
    null = "null if they are all zero"
    return (
        Column(
            f"weight_{side}_ids",
            TOKEN_IDS,
            f"The tokens with the {which} scores, as many as `--top-k`; {null}.",
            True,
        ),
        Column(
            f"weight_{side}_scores", SCORES, f"Lens scores of `weight_{side}_ids`, in logits; {null}.", True
        ),
    )


NEURON_WEIGHTS = Table(
    name="neuron_weights",
    doc=(
        "The logit lens of a neuron's own weights, without any gradient. For y = x W this is the row of W that it "
        "writes (`mlp.down`, `attn.o`) or the column with which it reads (the others), with the sign of the weights: "
        "an active neuron raises its top tokens. Read from the run's model; the table has no rows if that could not "
        "be read (the manifest's `weights` says why)."
    ),
    row_per="neuron that was kept for a prompt",
    sorted_by=("layer", "module", "expert", "neuron"),
    columns=(
        *UNIT,
        NEURON,
        Column("weight_norm", pa.float32(), "L2 norm of the row or column."),
        *_weight_columns("top", "largest"),
        *_weight_columns("bottom", "smallest"),
    ),
)

TOKEN_SUMMARY = Table(
    name="token_summary",
    doc=(
        "The neurons whose updates promote a token (it is in a bottom list) or suppress it (it is in a top list)."
    ),
    row_per="token × layer × module (× expert) with the token in its lists",
    sorted_by=("token_id", "layer", "module", "expert"),
    columns=(
        TOKEN_ID,
        *UNIT,
        Column("promoted", pa.int64(), "Number of bottom lists of kept neurons with the token."),
        Column("suppressed", pa.int64(), "Number of top lists of kept neurons with the token."),
        Column("prompts", pa.int64(), "Number of prompts with the token in either list."),
        Column("neurons", pa.int64(), "Number of neurons with the token in a list."),
        Column(
            "promoted_neurons",
            TOKEN_IDS,
            "Up to 5 neurons that promote it most often, ties to the smaller index; null if none does.",
            True,
        ),
        Column(
            "promoted_counts",
            COUNTS,
            "Lists with it of each of `promoted_neurons`; null if there is none.",
            True,
        ),
        Column(
            "suppressed_neurons",
            TOKEN_IDS,
            "Up to 5 neurons that suppress it most often, ties to the smaller index; null if none does.",
            True,
        ),
        Column(
            "suppressed_counts",
            COUNTS,
            "Lists with it of each of `suppressed_neurons`; null if there is none.",
            True,
        ),
    ),
)

LAYER_CURVES = Table(
    name="layer_curves",
    doc="The curves of the paper's figures: norms and ranks by layer and position class.",
    row_per="layer × module (× expert) × position class",
    sorted_by=("layer", "module", "expert", "position_class"),
    columns=(
        *UNIT,
        Column(
            "position_class",
            MODULE,
            "`last` (the prompt's last position), else `subject_last`, else `subject_first`, else `other`; a "
            "subject of one token is `subject_last`.",
        ),
        Column("positions", pa.int64(), "Number of positions of that class."),
        Column("prompts", pa.int64(), "Number of prompts with such a position."),
        Column("input_norm", pa.float64(), "Mean L2 norm of the module's input x there."),
        Column("vjp_norm", pa.float64(), "Mean L2 norm of the VJP δ there, exact zeros included."),
        Column("zeros", pa.int64(), "Number of them at which δ is exactly zero."),
        Column(
            "target_rank",
            pa.float64(),
            "Mean rank of the target, 0 = largest score; null if every projected vector is zero.",
            True,
        ),
        Column(
            "target_rank_median",
            pa.float64(),
            "Median rank of the target; null where `target_rank` is.",
            True,
        ),
        Column(
            "top_entropy",
            pa.float64(),
            "Entropy of the first top token, in bits; null where `target_rank` is.",
            True,
        ),
        Column(
            "bottom_entropy",
            pa.float64(),
            "Entropy of the first bottom token; null where `target_rank` is.",
            True,
        ),
    ),
)

PROMPT_TOKENS = Table(
    name="prompt_tokens",
    doc="The same rows as `tokens`, sorted by prompt, for heatmaps. The table takes as much room as `tokens`.",
    row_per=TOKENS.row_per,
    sorted_by=("prompt_id", "layer", "module", "expert", "position"),
    columns=TOKENS.columns,
)

PROMPT_NEURONS = Table(
    name="prompt_neurons",
    doc="The same rows as `neurons`, sorted by prompt. The table takes as much room as `neurons`.",
    row_per=NEURONS.row_per,
    sorted_by=("prompt_id", "layer", "module", "expert", "neuron"),
    columns=NEURONS.columns,
)

ATLAS_TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        *(NEURON_TOPK, TOKEN_TOPK, POSITION_TOPK, NEURON_PROMPTS),
        *(NEURON_SUMMARY, NEURON_WEIGHTS, TOKEN_SUMMARY, LAYER_CURVES),
        *(PROMPT_TOKENS, PROMPT_NEURONS),
    )
}
"""Every derived table by name, in the order of the documentation."""
PROMPT_TABLES = ("prompt_tokens", "prompt_neurons")
"""The tables that are sorted by prompt."""
