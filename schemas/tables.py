"""The tables of a run directory: every column's type, whether it may be null, and what it means.

This file is the only place where columns are listed. The store writes and checks tables against `TABLES`,
and `schemas.document` turns it into `docs/tables.md`.
"""

from dataclasses import dataclass

import pyarrow as pa

SCHEMA_VERSION = 1
"""Raised when a column changes its name, type or meaning. A run of another version is not resumed."""

SIGN_CONVENTION = (
    "Gradients and VJPs are raw: dLoss/dx, neither negated nor scaled by a learning rate, with Loss the sum "
    "of -log p(target). Gradient descent subtracts them, so for mlp.down and attn.o the bottom tokens are "
    "what an update writes."
)


@dataclass(frozen=True, slots=True)
class Column:
    """One column: `doc` is one sentence that gives units, sign, and what null means."""

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type, nullable=self.nullable, metadata={"doc": self.doc})


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a run directory: what a row is, how rows are ordered in a file, and the columns."""

    name: str
    doc: str
    row_per: str
    sorted_by: tuple[str, ...]
    columns: tuple[Column, ...]

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema, with the schema version and the sign convention in its metadata."""
        metadata = {
            "backlens.schema_version": str(SCHEMA_VERSION),
            "backlens.sign_convention": SIGN_CONVENTION,
            "backlens.table": self.name,
        }
        return pa.schema([column.field for column in self.columns], metadata=metadata)

    @property
    def sort_keys(self) -> tuple[str, ...]:
        """`sorted_by`, then `expert` where there is one, so that the order of rows is fixed."""
        has_expert = any(column.name == "expert" for column in self.columns)
        return (*self.sorted_by, "expert") if has_expert else self.sorted_by

    def empty(self) -> pa.Table:
        """The table without rows."""
        return self.schema.empty_table()


def list_of(item: pa.DataType) -> pa.ListType:
    """A list of any length without null items; `element` is the name Parquet gives the items back under."""
    return pa.list_(pa.field("element", item, nullable=False))


# Readers may hand any index type back as int32 (Parquet itself stores none), so int32 is what we declare.
MODULE = pa.dictionary(pa.int32(), pa.string())
TOKEN_IDS = list_of(pa.int32())
SCORES = list_of(pa.float32())

KEYS = (
    Column(
        "prompt_id", pa.int64(), "The prompt: its ordinal in the input, from 0; joins `prompts.prompt_id`."
    ),
    Column("layer", pa.int16(), "Index of the block, from 0."),
    Column(
        "module",
        MODULE,
        "The weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.",
    ),
    Column(
        "expert",
        pa.int16(),
        "Index of the expert in a mixture-of-experts block, from 0; null where the block has no experts.",
        nullable=True,
    ),
)


def projection_columns(vector: str) -> tuple[Column, ...]:
    """The columns that hold a vector's lens scores over the vocabulary."""
    zero = "null if the vector is zero"
    return (
        Column(
            "top_ids",
            TOKEN_IDS,
            f"Tokens with the k largest lens scores of {vector}, largest first; {zero}.",
            True,
        ),
        Column("top_scores", SCORES, f"The lens scores of `top_ids`, descending, in logits; {zero}.", True),
        Column(
            "bottom_ids",
            TOKEN_IDS,
            f"Tokens with the k smallest lens scores of {vector}, smallest first; {zero}.",
            True,
        ),
        Column(
            "bottom_scores", SCORES, f"The lens scores of `bottom_ids`, ascending, in logits; {zero}.", True
        ),
        Column(
            "target_score",
            pa.float32(),
            f"The lens score of the target's first token, in logits; {zero}.",
            True,
        ),
        Column(
            "target_rank",
            pa.int32(),
            f"Number of tokens with a strictly larger score than the target's first, 0 = largest; {zero}.",
            True,
        ),
    )


POSITION = Column(
    "position", pa.int32(), "Index of the token in the prompt, from 0; padding is never counted."
)

VOCAB = Table(
    name="vocab",
    doc="The tokenizer's vocabulary: the text behind every token id in the other tables.",
    row_per="token that lists and ranks are over: the tokenizer's, or every row (--vocabulary model)",
    sorted_by=("token_id",),
    columns=(
        Column("token_id", pa.int32(), "The token's id in the model's tokenizer."),
        Column(
            "token",
            pa.string(),
            "The token decoded to text, leading space included; bytes that are not UTF-8 show as U+FFFD.",
        ),
        Column("bytes", pa.binary(), "The token's exact bytes."),
    ),
)

PROMPTS = Table(
    name="prompts",
    doc="The prompts that were processed, and what the model made of them.",
    row_per="prompt",
    sorted_by=("prompt_id",),
    columns=(
        Column(
            "prompt_id", pa.int64(), "Ordinal of the prompt in the input, from 0; rejected lines count too."
        ),
        Column("id", pa.string(), "The input's own identifier; null if it has none.", nullable=True),
        Column("prompt", pa.string(), "The prompt as given."),
        Column("target", pa.string(), "The target as given."),
        Column("subject", pa.string(), "The subject as given; null if the input names none.", nullable=True),
        Column(
            "relation", pa.string(), "The relation as given; null if the input names none.", nullable=True
        ),
        Column(
            "token_ids",
            TOKEN_IDS,
            "The prompt's tokens as the model saw them, the chat template's included; position p is item p.",
        ),
        Column(
            "target_ids",
            TOKEN_IDS,
            "The target's tokens, the prompt's last space included where the tokenizer joins them; under "
            "`--target-mode first` only the first is used.",
        ),
        Column("n_tokens", pa.int32(), "Number of tokens in the prompt, the length of `token_ids`."),
        Column(
            "subject_start",
            pa.int32(),
            "First position of the subject; null if there is no subject or the prompt does not name it in whole words.",
            nullable=True,
        ),
        Column(
            "subject_end",
            pa.int32(),
            "Position after the subject's last one (half-open); null where `subject_start` is.",
            nullable=True,
        ),
        Column(
            "loss",
            pa.float32(),
            "-log p(target | prompt) in nats, summed over the target's tokens that are used.",
        ),
        Column(
            "target_prob",
            pa.float32(),
            "p(target | prompt) = exp(-loss): of all the target tokens that are used.",
        ),
        Column(
            "target_rank",
            pa.int32(),
            "Number of tokens more probable than the target's first, 0 = predicted.",
        ),
        Column("predicted_id", pa.int32(), "The token the model finds most probable after the prompt."),
        Column(
            "meta",
            pa.string(),
            "The input's other columns as a JSON object; null if there are none.",
            nullable=True,
        ),
    ),
)

LAYERS = Table(
    name="layers",
    doc="The gradient matrices G = XᵀΔ: their size, spectrum, and leading residual-side direction.",
    row_per="prompt × layer × module (× expert)",
    sorted_by=("layer", "module", "prompt_id"),
    columns=(
        *KEYS,
        Column(
            "rank",
            pa.int32(),
            "Numerical rank of the gradient; at most the number of positions, 0 if it is zero.",
        ),
        Column("grad_norm", pa.float32(), "Frobenius norm of the gradient."),
        Column("singular_values", SCORES, "The gradient's singular values, descending."),
        *projection_columns(
            "the leading residual-side singular vector (its largest-magnitude entry made positive)",
        ),
    ),
)

NEURONS = Table(
    name="neurons",
    doc=(
        "The gradient vectors of single neurons: the strongest `--neurons` per prompt, layer and module by "
        "gradient norm, or all."
    ),
    row_per="kept neuron of a prompt × layer × module (× expert)",
    sorted_by=("layer", "module", "prompt_id", "neuron"),
    columns=(
        *KEYS,
        Column(
            "neuron",
            pa.int32(),
            "Index of the unit on the module's other side than the residual one, from 0.",
        ),
        Column("grad_norm", pa.float32(), "L2 norm of the neuron's gradient vector."),
        Column(
            "main_position", pa.int32(), "The position that contributes most to the neuron's gradient vector."
        ),
        *projection_columns("the neuron's gradient vector"),
    ),
)

TOKENS = Table(
    name="tokens",
    doc=(
        "What each position brings to a gradient: its input x and its VJP δ. The projected vector is the "
        "residual-side one: x for up, gate, q, k and v; δ for down and o."
    ),
    row_per="prompt × layer × module (× expert) × position",
    sorted_by=("layer", "module", "prompt_id", "position"),
    columns=(
        *KEYS,
        POSITION,
        Column("token_id", pa.int32(), "The prompt's token at that position; joins `vocab.token_id`."),
        Column("input_norm", pa.float32(), "L2 norm of the module's input x at that position."),
        Column(
            "vjp_norm",
            pa.float32(),
            "L2 norm of the VJP δ = dLoss/d(module output) there; 0 for an exact zero, whose row is kept.",
        ),
        *projection_columns("the residual-side vector"),
    ),
)


def factors_table(value_type: pa.DataType | None = None) -> Table:
    """The opt-in `factors` table; its vectors are float32 unless float16 is asked for."""
    value_type = pa.float32() if value_type is None else value_type
    if value_type not in (pa.float16(), pa.float32()):
        raise ValueError(f"factors hold float16 or float32 values, not {value_type}")
    values = list_of(value_type)
    return Table(
        name="factors",
        doc=(
            "The gradients themselves, in factored form (`--save-factors`): over a prompt's positions, the "
            "sum of outer(x, delta) is the gradient of the loss with respect to W, for y = x W. Values are "
            "float16 or float32."
        ),
        row_per="prompt × layer × module (× expert) × position",
        sorted_by=("layer", "module", "prompt_id", "position"),
        columns=(
            *KEYS,
            POSITION,
            Column("x", values, "The module's input at that position, of the module's input width."),
            Column(
                "delta",
                values,
                "The VJP dLoss/d(module output) at that position, of the module's output width.",
            ),
        ),
    )


FAILURES = Table(
    name="failures",
    doc="The prompts that could not be processed; every input prompt is here or in `prompts`, never in both.",
    row_per="prompt that could not be processed",
    sorted_by=("prompt_id",),
    columns=(
        Column("prompt_id", pa.int64(), "Ordinal of the prompt in the input, from 0."),
        Column("stage", pa.string(), "Where it failed: `read`, `tokenize` or `compute`."),
        Column("error", pa.string(), "A short, stable code such as `missing-field`."),
        Column("message", pa.string(), "One line: what is wrong, where, and what to do."),
    ),
)

SHARE = "0 to 1"
NO_TARGET = "null if the case names no true target, and for zsRE"

EDITS = Table(
    name="edits",
    doc=(
        "What edits did (`backlens edit sweep`): one case under one trial, that is a method at a layer with a learning "
        "rate. The metrics are CounterFact's and zsRE's own."
    ),
    row_per="trial × case",
    sorted_by=("trial", "prompt_id"),
    columns=(
        Column("trial", pa.int32(), "Index of the trial in the sweep's grid, from 0."),
        Column(
            "prompt_id",
            pa.int64(),
            "The case: its ordinal in the input, from 0; joins `prompts.prompt_id` of a run over the same file.",
        ),
        Column("method", MODULE, "The method, as `--method` names it."),
        Column(
            "layer",
            pa.int16(),
            "The layer edited; where an edit is spread over several (`--span`, mend), the last.",
        ),
        Column("lr", pa.float64(), "The learning rate η; null for the method's own default.", nullable=True),
        Column(
            "at_once", pa.int32(), "How many cases were edited into the model together, this one included."
        ),
        Column(
            "efficacy",
            pa.float32(),
            f"1 if the new target is more probable than the true one; {NO_TARGET}.",
            True,
        ),
        Column(
            "paraphrase",
            pa.float32(),
            f"Share ({SHARE}) of paraphrases after which it is; {NO_TARGET}, or if there are no paraphrases.",
            True,
        ),
        Column(
            "neighbourhood",
            pa.float32(),
            f"Share ({SHARE}) of neighbourhood prompts after which the true target is more probable than the new one; "
            f"{NO_TARGET}, or if there are none.",
            True,
        ),
        Column(
            "efficacy_accuracy",
            pa.float32(),
            "1 if every token of the new target is the likeliest one; for zsRE the share of its tokens that are.",
        ),
        Column(
            "paraphrase_accuracy",
            pa.float32(),
            "The same, mean over paraphrases; null if there are none.",
            True,
        ),
        Column(
            "neighbourhood_accuracy",
            pa.float32(),
            "The same of the neighbourhood's own target, mean over its prompts; null if there are none.",
            True,
        ),
        Column("target_prob", pa.float32(), "p(new target | prompt) after the edit, of all its tokens."),
        Column(
            "target_rank", pa.int32(), "Tokens more probable than the new target's first, after the edit."
        ),
        Column("target_prob_before", pa.float32(), "p(new target | prompt) before the edit."),
        Column("target_rank_before", pa.int32(), "Tokens more probable than the new target's first, before."),
        Column("delta_norm", pa.float32(), "Frobenius norm of all that was added to the weights."),
        Column(
            "entropy",
            pa.float32(),
            "n-gram entropy of generated texts, in bits; null unless the sweep generates.",
            nullable=True,
        ),
        Column(
            "reference",
            pa.float32(),
            "TF-IDF cosine of generated and reference texts; null without reference texts.",
            nullable=True,
        ),
        Column(
            "untouched",
            pa.float32(),
            "Accuracy on facts never edited (`--untouched`), of the model with all these cases edited; null if not "
            "asked for.",
            nullable=True,
        ),
        Column(
            "perplexity",
            pa.float32(),
            "Of that model on `--held-out` texts, per token; null if not asked for.",
            nullable=True,
        ),
        Column(
            "seconds_edit", pa.float32(), "Seconds to compute the change, by case (shared by those at once)."
        ),
        Column("seconds_evaluate", pa.float32(), "Seconds to put it in, evaluate, and restore, by case."),
    ),
)

TABLES: dict[str, Table] = {
    table.name: table for table in (VOCAB, PROMPTS, LAYERS, NEURONS, TOKENS, factors_table(), FAILURES, EDITS)
}
"""Every table by name, in the order in which they are documented; `factors` with float32 values."""


def declared_table(name: str, schema: pa.Schema) -> Table:
    """The declaration that data of this schema must meet: `factors` is float16 if the data are."""
    if name != "factors" or "x" not in schema.names:
        return TABLES[name]
    values = schema.field("x").type
    is_half = pa.types.is_list(values) and values.value_type == pa.float16()
    return factors_table(pa.float16() if is_half else pa.float32())
