"""The tables of `OUT/atlas/`: derived from a run's by `backlens atlas`, and rebuilt at will.

The counts in them are of list entries: one token in the top or bottom list of one kept neuron for one prompt.
Only kept neurons are counted, so a neuron that is missing for a prompt was below the cut-off, and not zero. Summaries
count no list of a vector shorter than the run's `norm_floor` (in `run.json`): the final norm's bias leads such lists.
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

ATLAS_VERSION = 4
"""Raised when a table here changes; an atlas of another version is not read but built again."""

PROMPT_ID, LAYER, MODULE_COLUMN, EXPERT = KEYS
UNIT = (LAYER, MODULE_COLUMN, EXPERT)
NEURON = Column(
    "neuron", pa.int32(), "Index of the unit on the module's other side than the residual one, from 0."
)
GRAD_NORM = Column("grad_norm", pa.float32(), "L2 norm of the neuron's gradient vector for that prompt.")
COUNTS = list_of(pa.int64())
DOUBLES = list_of(pa.float64())
NO_TOKENS = "null if no list of its is counted"

ENTRY = (
    PROMPT_ID,
    Column(
        "side",
        MODULE,
        "The list: `top` (what an update takes away) or `bottom` (what an update adds, for it subtracts "
        "gradients).",
    ),
    Column("place", pa.int16(), "Where the token stands in that list, 0 = most extreme."),
    Column("score", pa.float32(), "The token's lens score of the neuron's gradient vector, in logits."),
    GRAD_NORM,
)
TOKEN_ID = Column("token_id", pa.int32(), "The token; joins `vocab.token_id`.")


def _side_columns(side: str, of: str) -> tuple[Column, ...]:
    """What one side's lists say to a neuron."""
    return (
        Column(
            f"{side}_ids",
            TOKEN_IDS,
            f"The 10 tokens that stand in most {of} lists of it, ties to the smaller id; {NO_TOKENS}.",
            True,
        ),
        Column(
            f"{side}_counts", COUNTS, f"In how many prompts each of `{side}_ids` does; {NO_TOKENS}.", True
        ),
        Column(
            f"{side}_lifts",
            DOUBLES,
            f"How many times more often each of `{side}_ids` stands in this neuron's {of} lists than in those "
            f"of its layer's module; {NO_TOKENS}.",
            True,
        ),
        Column(
            f"{side}_own_ids",
            TOKEN_IDS,
            f"Up to 10 tokens of its own: they stand in more of its {of} lists than chance among the lists of its "
            "layer's module explains, the largest log odds first; null if there is none.",
            True,
        ),
        Column(f"{side}_own_counts", COUNTS, f"In how many prompts each of `{side}_own_ids` does.", True),
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
    doc="The lists of `neurons`, an entry a row, neuron after neuron.",
    row_per="kept neuron × side × place",
    sorted_by=("layer", "module", "expert", "neuron", "prompt_id", "side", "place"),
    columns=(*UNIT, NEURON, *ENTRY[:3], TOKEN_ID, *ENTRY[3:]),
)

TOKEN_TOPK = Table(
    name="token_topk",
    doc="The same rows as `neuron_topk`, token after token.",
    row_per="kept neuron × side × place",
    sorted_by=("token_id", "layer", "module", "expert", "neuron", "prompt_id", "side", "place"),
    columns=(TOKEN_ID, *UNIT, NEURON, *ENTRY),
)

POSITION_TOPK = Table(
    name="position_topk",
    doc="The lists of `tokens`, an entry a row, token after token: at which positions a token stands out.",
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
    doc="The rows of `neurons` without their lists, neuron after neuron.",
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
        "What the prompts say to a neuron, together. An update subtracts gradients, so the tokens of bottom "
        "lists are promoted and those of top lists demoted. What the neuron's own weights say is in "
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
            "In how many prompts it is kept; in the others it is below the cut-off, not zero.",
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
            "In how many of those prompts its lists are counted below: its vector is neither zero nor shorter than "
            "the run's `norm_floor`.",
        ),
        Column(
            "entries_norm",
            pa.float64(),
            "Euclidean length of its counts by side and token, which `similar` compares; 0 if there are none.",
        ),
        *_side_columns("promoted", "bottom"),
        *_side_columns("demoted", "top"),
    ),
)


def _weight_columns(side: str, which: str) -> tuple[Column, ...]:
    null = "null if they are all zero"
    return (
        Column(
            f"weight_{side}_ids",
            TOKEN_IDS,
            f"The tokens with the {which} scores, as `--top-k` has it; {null}.",
            True,
        ),
        Column(
            f"weight_{side}_scores", SCORES, f"Lens scores of `weight_{side}_ids`, in logits; {null}.", True
        ),
    )


NEURON_WEIGHTS = Table(
    name="neuron_weights",
    doc=(
        "What a neuron's own weights say through the lens, without any gradient: the row of W that it writes "
        "(`mlp.down`, `attn.o`), or the column with which it reads (the others), for y = x W. Signs are as the "
        "weights': an active neuron writes its top tokens. Derived from the run's model; without rows where that "
        "was not at hand (the manifest's `weights` says why)."
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
        "Where gradients push neurons toward a token (promoted: it stands in a bottom list) and away from it "
        "(demoted: in a top list)."
    ),
    row_per="token × layer × module (× expert) in whose lists it stands",
    sorted_by=("token_id", "layer", "module", "expert"),
    columns=(
        TOKEN_ID,
        *UNIT,
        Column("promoted", pa.int64(), "In how many bottom lists of kept neurons it stands."),
        Column("demoted", pa.int64(), "In how many top lists of kept neurons it stands."),
        Column("prompts", pa.int64(), "In how many prompts it stands in either."),
        Column("neurons", pa.int64(), "In the lists of how many neurons it stands."),
        Column(
            "promoted_neurons",
            TOKEN_IDS,
            "Up to 5 neurons that are most often pushed toward it, ties to the smaller index; null if none is.",
            True,
        ),
        Column("promoted_counts", COUNTS, "How often each of `promoted_neurons` is; null if none is.", True),
        Column(
            "demoted_neurons",
            TOKEN_IDS,
            "Up to 5 neurons that are most often pushed away from it, ties to the smaller index; null if none is.",
            True,
        ),
        Column("demoted_counts", COUNTS, "How often each of `demoted_neurons` is; null if none is.", True),
    ),
)

LAYER_CURVES = Table(
    name="layer_curves",
    doc="The curves of the paper's figures: sizes and ranks by layer and kind of position.",
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
        Column("positions", pa.int64(), "How many positions the row is about."),
        Column("prompts", pa.int64(), "In how many prompts they are."),
        Column("input_norm", pa.float64(), "Mean L2 norm of the module's input x there."),
        Column("vjp_norm", pa.float64(), "Mean L2 norm of the VJP δ there, exact zeros included."),
        Column("zeros", pa.int64(), "At how many of them δ is exactly zero."),
        Column(
            "target_rank",
            pa.float64(),
            "Mean rank of the target; null if every projected vector is zero.",
            True,
        ),
        Column("target_rank_median", pa.float64(), "Median of it; null where `target_rank` is.", True),
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
    doc="The same rows as `tokens`, prompt after prompt: what a prompt's heatmap reads. It takes as much room again.",
    row_per=TOKENS.row_per,
    sorted_by=("prompt_id", "layer", "module", "expert", "position"),
    columns=TOKENS.columns,
)

PROMPT_NEURONS = Table(
    name="prompt_neurons",
    doc="The same rows as `neurons`, prompt after prompt. It takes as much room again.",
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
"""Every derived table by name, in the order in which they are documented."""
PROMPT_TABLES = ("prompt_tokens", "prompt_neurons")
"""Those that are sorted by prompt."""
