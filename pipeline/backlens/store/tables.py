"""The tables of a run directory: type, meaning, and nulls of every column.

Columns are declared here and nowhere else. The store checks what it writes against `TABLES`; `docs/tables.md` and
`schemas/` are generated from it.
"""

from dataclasses import dataclass

import pyarrow as pa

SCHEMA_VERSION = 1
"""A change of a column's name, type or meaning raises it. A run of another version is not resumed."""

SIGN_CONVENTION = (
    "Gradients and VJPs are raw: dLoss/dx, neither negated nor scaled by a learning rate. Loss is the sum of "
    "-log p(target) over the target's tokens. Gradient descent subtracts the gradient: for mlp.down and attn.o, a step "
    "promotes the bottom tokens and suppresses the top tokens."
)


@dataclass(frozen=True, slots=True)
class Column:
    """One column. `doc` is one sentence with meaning, units, sign, and what null means."""

    name: str
    type: pa.DataType
    doc: str
    nullable: bool = False

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type, nullable=self.nullable, metadata={"doc": self.doc})


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a run directory: what one row stands for, the order of rows in a file, and the columns."""

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
        """`sorted_by`, then `expert` if the table has it, so that the order of rows is unique."""
        has_expert = any(column.name == "expert" for column in self.columns)
        return (*self.sorted_by, "expert") if has_expert else self.sorted_by

    def empty(self) -> pa.Table:
        """The table without rows."""
        return self.schema.empty_table()


def list_of(item: pa.DataType) -> pa.ListType:
    """A list type without null items. `element` is the name that Parquet readers give the items."""
    return pa.list_(pa.field("element", item, nullable=False))


# Parquet stores no index type, and readers return int32.
MODULE = pa.dictionary(pa.int32(), pa.string())
TOKEN_IDS = list_of(pa.int32())
SCORES = list_of(pa.float32())

KEYS = (
    Column("prompt_id", pa.int64(), "Ordinal of the prompt in the input, from 0; joins `prompts.prompt_id`."),
    Column("layer", pa.int16(), "Index of the block, from 0."),
    Column(
        "module",
        MODULE,
        "Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.",
    ),
    Column("expert", pa.int16(), "Index of the expert, from 0; null if the block has no experts.", True),
)


def projection_columns(vector: str) -> tuple[Column, ...]:
    """The columns that hold the lens scores of a vector over the vocabulary."""
    zero = "null if the vector is zero"
    tokens = f"Ids of the k tokens with the %s lens scores of {vector}, %s first; {zero}."
    scores = f"Lens scores of `%s_ids`, in logits, raw sign, %s; {zero}."
    rank = f"Number of tokens with a strictly larger lens score than the target's first, 0 = largest; {zero}."
    return (
        Column("top_ids", TOKEN_IDS, tokens % ("largest", "largest"), True),
        Column("top_scores", SCORES, scores % ("top", "descending"), True),
        Column("bottom_ids", TOKEN_IDS, tokens % ("smallest", "smallest"), True),
        Column("bottom_scores", SCORES, scores % ("bottom", "ascending"), True),
        Column(
            "target_score", pa.float32(), f"Lens score of the target's first token, in logits; {zero}.", True
        ),
        Column("target_rank", pa.int32(), rank, True),
    )


POSITION = Column("position", pa.int32(), "Index of the token in the prompt, from 0; padding is not counted.")

VOCAB = Table(
    name="vocab",
    doc="The vocabulary: the text of every token id in the other tables.",
    row_per="token that lists and ranks cover: the tokenizer's, or every row (`--vocabulary model`)",
    sorted_by=("token_id",),
    columns=(
        Column("token_id", pa.int32(), "Id of the token in the model's tokenizer."),
        Column(
            "token",
            pa.string(),
            "Text of the token, with its leading space; U+FFFD stands for bytes that are not UTF-8.",
        ),
        Column("bytes", pa.binary(), "Exact bytes of the token."),
    ),
)

PROMPTS = Table(
    name="prompts",
    doc="The prompts that were processed, and what the model predicts for them.",
    row_per="prompt",
    sorted_by=("prompt_id",),
    columns=(
        Column(
            "prompt_id", pa.int64(), "Ordinal of the prompt in the input, from 0; rejected records count too."
        ),
        Column("id", pa.string(), "Identifier that the input gives; null if it gives none.", True),
        Column("prompt", pa.string(), "Prompt as given."),
        Column("target", pa.string(), "Target as given."),
        Column("subject", pa.string(), "Subject as given; null if the input names none.", True),
        Column("relation", pa.string(), "Relation as given; null if the input names none.", True),
        Column(
            "token_ids",
            TOKEN_IDS,
            "Ids of the tokens that the model reads, with those of the chat template; item p is position p.",
        ),
        Column(
            "target_ids",
            TOKEN_IDS,
            "Ids of the target's tokens; the prompt's last space is in the first one where the tokenizer joins them. "
            "`--target-mode first` uses the first one only.",
        ),
        Column("n_tokens", pa.int32(), "Number of tokens in the prompt: the length of `token_ids`."),
        Column(
            "subject_start",
            pa.int32(),
            "First position of the subject; null without a subject, or if the prompt lacks it in whole words.",
            True,
        ),
        Column(
            "subject_end",
            pa.int32(),
            "Position after the subject's last one; null if `subject_start` is null.",
            True,
        ),
        Column(
            "loss",
            pa.float32(),
            "-log p(target | prompt), in nats, summed over the target tokens that are used; 0 or more.",
        ),
        Column(
            "target_prob",
            pa.float32(),
            "p(target | prompt) = exp(-loss), of all target tokens that are used.",
        ),
        Column(
            "target_rank",
            pa.int32(),
            "Number of tokens that are strictly more probable than the target's first token; 0 = predicted.",
        ),
        Column("predicted_id", pa.int32(), "Id of the token that is most probable after the prompt."),
        Column(
            "meta", pa.string(), "Other columns of the input, as a JSON object; null if there are none.", True
        ),
    ),
)

LAYERS = Table(
    name="layers",
    doc="The gradient matrices G = XᵀΔ: norm, spectrum, and leading direction on the residual side.",
    row_per="prompt × layer × module (× expert)",
    sorted_by=("layer", "module", "prompt_id"),
    columns=(
        *KEYS,
        Column("rank", pa.int32(), "Numerical rank of G; at most the number of positions, 0 if G is zero."),
        Column("grad_norm", pa.float32(), "Frobenius norm of G; 0 or more."),
        Column("singular_values", SCORES, "Singular values of G, descending."),
        *projection_columns(
            "the leading singular vector on the residual side (its entry of largest magnitude is made positive)"
        ),
    ),
)

NEURONS = Table(
    name="neurons",
    doc=(
        "The gradient vectors of single neurons: per prompt, layer and module the `--neurons` with the largest "
        "gradient norm, or all."
    ),
    row_per="kept neuron of a prompt × layer × module (× expert)",
    sorted_by=("layer", "module", "prompt_id", "neuron"),
    columns=(
        *KEYS,
        Column("neuron", pa.int32(), "Index of the unit on the side that is not the residual side, from 0."),
        Column("grad_norm", pa.float32(), "L2 norm of the neuron's gradient vector; 0 or more."),
        Column(
            "main_position", pa.int32(), "Position that contributes most to the neuron's gradient vector."
        ),
        *projection_columns("the neuron's gradient vector"),
    ),
)

TOKENS = Table(
    name="tokens",
    doc=(
        "The factors of a gradient per position: input x and VJP δ. The projected vector is the one on the residual "
        "side: x for up, gate, q, k and v; δ for down and o."
    ),
    row_per="prompt × layer × module (× expert) × position",
    sorted_by=("layer", "module", "prompt_id", "position"),
    columns=(
        *KEYS,
        POSITION,
        Column("token_id", pa.int32(), "Id of the prompt's token at the position; joins `vocab.token_id`."),
        Column("input_norm", pa.float32(), "L2 norm of the module's input x at the position; 0 or more."),
        Column(
            "vjp_norm",
            pa.float32(),
            "L2 norm of the VJP δ = dLoss/d(module output) at the position; 0 if δ is exactly zero (the row is kept).",
        ),
        *projection_columns("the vector on the residual side"),
    ),
)


def factors_table(value_type: pa.DataType | None = None) -> Table:
    """The optional `factors` table. Its values are float32, or float16 if `value_type` says so."""
    value_type = pa.float32() if value_type is None else value_type
    if value_type not in (pa.float16(), pa.float32()):
        raise ValueError(f"factors hold float16 or float32 values, not {value_type}")
    values = list_of(value_type)
    return Table(
        name="factors",
        doc=(
            "The gradients in factored form (`--save-factors`): the sum of outer(x, delta) over the positions of a "
            "prompt is the gradient of the loss with respect to W, for y = x W. Values are float16 or float32."
        ),
        row_per="prompt × layer × module (× expert) × position",
        sorted_by=("layer", "module", "prompt_id", "position"),
        columns=(
            *KEYS,
            POSITION,
            Column(
                "x", values, "Input x of the module at the position; its length is the module's input width."
            ),
            Column(
                "delta",
                values,
                "VJP δ = dLoss/d(module output) at the position, raw sign; its length is the module's output width.",
            ),
        ),
    )


FAILURES = Table(
    name="failures",
    doc="The prompts that could not be processed. Every input prompt is either here or in `prompts`.",
    row_per="prompt that could not be processed",
    sorted_by=("prompt_id",),
    columns=(
        Column("prompt_id", pa.int64(), "Ordinal of the prompt in the input, from 0."),
        Column("stage", pa.string(), "Stage that failed: `read`, `tokenize` or `compute`."),
        Column("error", pa.string(), "Short, stable code of the error, such as `missing-field`."),
        Column("message", pa.string(), "One line that says what is wrong, where, and what to do."),
    ),
)

NO_TARGET = "null if the case has no true target, and for zsRE"
NO_PROMPTS = "null if the case has no such prompts"
NOT_MEASURED = "null if the sweep does not measure it, or edits one case at a time"

EDITS = Table(
    name="edits",
    doc=(
        "The results of edits (`backlens edit sweep`): one case under one trial. A trial is a method at a layer with a "
        "learning rate. The metrics are those of CounterFact and zsRE."
    ),
    row_per="trial × case",
    sorted_by=("trial", "prompt_id"),
    columns=(
        Column("trial", pa.int32(), "Index of the trial in the grid of the sweep, from 0."),
        Column(
            "prompt_id",
            pa.int64(),
            "Ordinal of the case in the input, from 0; joins `prompts.prompt_id` of a run over the same file.",
        ),
        Column("method", MODULE, "Method, by its name in `--method`."),
        Column(
            "layer",
            pa.int16(),
            "Edited layer, from 0; the last one if the edit changes several (`--span`, mend).",
        ),
        Column("lr", pa.float64(), "Learning rate η; null if the method uses its own default.", True),
        Column("at_once", pa.int32(), "Number of cases that are edited together, this case included."),
        Column(
            "efficacy",
            pa.float32(),
            f"1 if the new target is more probable than the true one after the prompt, else 0; {NO_TARGET}.",
            True,
        ),
        Column(
            "paraphrase",
            pa.float32(),
            "Share of paraphrases (0 to 1) after which the new target is more probable than the true one; "
            f"{NO_TARGET}; {NO_PROMPTS}.",
            True,
        ),
        Column(
            "neighbourhood",
            pa.float32(),
            "Share of neighbourhood prompts (0 to 1) after which the true target is more probable than the new one; "
            f"{NO_TARGET}; {NO_PROMPTS}.",
            True,
        ),
        Column(
            "efficacy_accuracy",
            pa.float32(),
            "1 if every token of the new target is the most probable one, else 0; for zsRE, the share that are.",
        ),
        Column(
            "paraphrase_accuracy",
            pa.float32(),
            f"The same accuracy, mean over paraphrases (0 to 1); {NO_PROMPTS}.",
            True,
        ),
        Column(
            "neighbourhood_accuracy",
            pa.float32(),
            f"The same accuracy for the neighbourhood's own target, mean over its prompts (0 to 1); {NO_PROMPTS}.",
            True,
        ),
        Column("target_prob", pa.float32(), "p(new target | prompt) after the edit, of all its tokens."),
        Column(
            "target_rank",
            pa.int32(),
            "Number of tokens more probable than the new target's first token, after the edit; 0 = predicted.",
        ),
        Column("target_prob_before", pa.float32(), "`target_prob` before the edit."),
        Column("target_rank_before", pa.int32(), "`target_rank` before the edit."),
        Column("delta_norm", pa.float32(), "Frobenius norm of the whole change of the weights."),
        Column(
            "entropy",
            pa.float32(),
            "n-gram entropy of generated texts, in bits; null if the sweep generates none.",
            True,
        ),
        Column(
            "reference",
            pa.float32(),
            "Cosine of TF-IDF vectors of generated and reference texts; null if there are no such texts.",
            True,
        ),
        Column(
            "untouched",
            pa.float32(),
            "Accuracy (0 to 1) on facts that nothing edits (`--untouched`), with all cases of the group edited; "
            f"{NOT_MEASURED}.",
            True,
        ),
        Column(
            "perplexity", pa.float32(), f"Perplexity per token of `--held-out` texts; {NOT_MEASURED}.", True
        ),
        Column("seconds_edit", pa.float32(), "Seconds per case to compute the change."),
        Column(
            "seconds_evaluate", pa.float32(), "Seconds per case to apply the change, evaluate and restore."
        ),
    ),
)

TABLES: dict[str, Table] = {
    table.name: table for table in (VOCAB, PROMPTS, LAYERS, NEURONS, TOKENS, factors_table(), FAILURES, EDITS)
}
"""Every table by name, in the order of the documentation; `factors` has float32 values here."""


def declared_table(name: str, schema: pa.Schema) -> Table:
    """The declaration for data of this schema: `factors` is float16 if the data is."""
    if name != "factors" or "x" not in schema.names:
        return TABLES[name]
    values = schema.field("x").type
    is_half = pa.types.is_list(values) and values.value_type == pa.float16()
    return factors_table(pa.float16() if is_half else pa.float32())
