"""The SELECTs that define the atlas tables over a run's tables and over each other.

`backlens atlas` writes what they select to files; without a current atlas a connection has them as views, so a question
gives the same answer with and without an atlas. `neuron_weights` is not here, because it comes from the model. The
SELECTs also read the table `lens` of one row, which holds the run's `norm_floor`.

A neuron's own tokens are found by three formulas. Of a neuron's `lists` lists, `count` hold the token; of all lists of
its layer and module, a share `base` does. The ratio of the two shares is largest for rare tokens and puts noise first,
so these are used instead:

    log odds    log2 of the odds of `count` in `lists` over the odds of `base`, after `PRIOR` more lists that hold the
                token at the rate `base`: few lists say little
    evidence    lists × KL(count / lists ‖ base), in nats. exp(−evidence) bounds the chance of so many when lists are
                drawn at random (Chernoff; Hoeffding 1963 for drawing without replacement)
    enough      the evidence at which fewer than `CHANCE` of the comparisons would pass by chance
"""

PRIOR = 5.0
"""Lists that smoothing adds."""
CHANCE = 0.001
"""Number of tokens per layer and module that chance alone may make own tokens."""

COUNTED = "grad_norm >= (SELECT norm_floor FROM lens)"
"""Condition for a list to count: in a vector below the final norm's epsilon the norm's bias leads the lists."""


def base(count: str, lists: str) -> str:
    """The share of all lists that hold the token, kept below 1 so that its odds are finite."""
    return f"(({count})::DOUBLE / (({lists}) + 1))"


def log_odds(count: str, lists: str, base: str) -> str:
    """Smoothed log odds, in bits."""
    odds = f"({count} + {PRIOR} * {base}) / ({lists} - {count} + {PRIOR} * (1 - {base}))"
    return f"log2({odds} * (1 - {base}) / {base})"


def evidence(count: str, lists: str, base: str) -> str:
    """The evidence, in nats; 0 where the token is no more frequent than elsewhere."""
    without = f"({lists} - {count})"
    missing = f"CASE WHEN {without} > 0 THEN {without} * ln({without} / ({lists} * (1 - {base}))) ELSE 0 END"
    return (
        f"CASE WHEN {count} > {lists} * {base} "
        f"THEN {count} * ln({count} / ({lists} * {base})) + {missing} ELSE 0 END"
    )


def enough(comparisons: str) -> str:
    """The evidence that so many comparisons ask for, in nats."""
    return f"ln(({comparisons}) / {CHANCE})"


PLACES = 5
"""Number of prompts, or of neurons, that a summary names."""
TOKENS = 10
"""Number of tokens per side that a neuron's summary names."""


def _listed(side: str) -> str:
    return f"""
    SELECT
        layer, module, expert, neuron, prompt_id, '{side}' AS side,
        (generate_subscripts({side}_ids, 1) - 1)::SMALLINT AS place,
        unnest({side}_ids) AS token_id, unnest({side}_scores) AS score, grad_norm
    FROM neurons
    """


NEURON_TOPK = f"""
SELECT layer, module, expert, neuron, prompt_id, side, place, token_id, score, grad_norm
FROM ({_listed("top")} UNION ALL {_listed("bottom")})
"""

TOKEN_TOPK = """
SELECT token_id, layer, module, expert, neuron, prompt_id, side, place, score, grad_norm FROM neuron_topk
"""


def _positions(side: str) -> str:
    return f"""
    SELECT
        unnest({side}_ids) AS token_id, layer, module, expert, prompt_id, position, '{side}' AS side,
        (generate_subscripts({side}_ids, 1) - 1)::SMALLINT AS place, unnest({side}_scores) AS score
    FROM tokens
    """


POSITION_TOPK = f"{_positions('top')} UNION ALL {_positions('bottom')}"

NEURON_PROMPTS = """
SELECT layer, module, expert, neuron, prompt_id, grad_norm, main_position, target_score, target_rank
FROM neurons
"""


def _side_columns(side: str, name: str) -> str:
    """The columns of one side of `neuron_summary`."""
    first = f"FILTER (side = '{side}' AND nth <= {TOKENS})"
    own = f"FILTER (side = '{side}' AND is_own AND own_nth <= {TOKENS})"
    whole = f"FILTER (side = '{side}')"
    return f"""
        list(token_id ORDER BY nth) {first} AS {name}_ids,
        list(entries ORDER BY nth) {first} AS {name}_counts,
        list(share / base ORDER BY nth) {first} AS {name}_lifts,
        list(token_id ORDER BY own_nth) {own} AS {name}_own_ids,
        list(entries ORDER BY own_nth) {own} AS {name}_own_counts,
        list(log_odds ORDER BY own_nth) {own} AS {name}_own_log_odds,
        abs(sum(share * log2(share)) {whole}) AS {name}_entropy
    """


NEURON_SUMMARY = f"""
WITH ordered AS (
    SELECT *, row_number() OVER (
        PARTITION BY layer, module, expert, neuron ORDER BY grad_norm DESC, prompt_id
    ) AS nth
    FROM neuron_prompts
), kept AS (
    SELECT
        layer, module, expert, neuron,
        count(*) AS prompts,
        sum(grad_norm::DOUBLE) AS grad_norm_sum,
        avg(grad_norm::DOUBLE) AS grad_norm_mean,
        max(grad_norm) AS grad_norm_max,
        list(prompt_id ORDER BY nth) FILTER (nth <= {PLACES}) AS strongest_prompts,
        list(grad_norm ORDER BY nth) FILTER (nth <= {PLACES}) AS strongest_norms
    FROM ordered GROUP BY layer, module, expert, neuron
), counted AS (
    SELECT layer, module, expert, neuron, side, token_id, count(*) AS entries
    FROM neuron_topk WHERE {COUNTED} GROUP BY layer, module, expert, neuron, side, token_id
), weighed AS (
    SELECT layer, module, expert, neuron, count(*) AS lists
    FROM neuron_topk WHERE {COUNTED} AND side = 'top' AND place = 0 GROUP BY layer, module, expert, neuron
), units AS (
    SELECT layer, module, sum(lists) AS unit_lists, count(*) AS unit_neurons FROM weighed GROUP BY layer, module
), bases AS (
    SELECT
        layer, module, side, token_id,
        entries / sum(entries) OVER (PARTITION BY layer, module, side) AS base,
        {base("entries", "unit_lists")} AS list_base,
        {enough("unit_neurons * count(*) OVER (PARTITION BY layer, module)")} AS enough
    FROM (
        SELECT layer, module, side, token_id, sum(entries) AS entries
        FROM counted GROUP BY layer, module, side, token_id
    ) JOIN units USING (layer, module)
), compared AS (
    SELECT
        counted.*, lists, base, {log_odds("entries", "lists", "list_base")} AS log_odds,
        {evidence("entries", "lists", "list_base")} >= enough AS is_own
    FROM counted JOIN bases USING (layer, module, side, token_id)
    JOIN weighed
    ON counted.layer = weighed.layer AND counted.module = weighed.module AND counted.neuron = weighed.neuron
        AND counted.expert IS NOT DISTINCT FROM weighed.expert
), shares AS (
    SELECT
        *,
        entries / sum(entries) OVER (PARTITION BY layer, module, expert, neuron, side) AS share,
        row_number() OVER (
            PARTITION BY layer, module, expert, neuron, side ORDER BY entries DESC, token_id
        ) AS nth,
        row_number() OVER (
            PARTITION BY layer, module, expert, neuron, side, is_own ORDER BY log_odds DESC, entries DESC, token_id
        ) AS own_nth
    FROM compared
), sides AS (
    SELECT
        layer, module, expert, neuron, any_value(lists) AS lists, sqrt(sum(entries * entries)::DOUBLE) AS length,
        {_side_columns("bottom", "promoted")}, {_side_columns("top", "suppressed")}
    FROM shares GROUP BY layer, module, expert, neuron
)
SELECT
    kept.*, coalesce(lists, 0) AS lists, coalesce(length, 0) AS entries_norm,
    sides.* EXCLUDE (layer, module, expert, neuron, lists, length)
FROM kept LEFT JOIN sides
ON kept.layer = sides.layer AND kept.module = sides.module AND kept.neuron = sides.neuron
    AND kept.expert IS NOT DISTINCT FROM sides.expert
"""


def _side_neurons(side: str, name: str) -> str:
    """The columns of one side of `token_summary`."""
    first = f"FILTER (side = '{side}' AND nth <= {PLACES})"
    return f"""
        list(neuron ORDER BY nth) {first} AS {name}_neurons,
        list(entries ORDER BY nth) {first} AS {name}_counts
    """


TOKEN_SUMMARY = f"""
WITH counted AS (
    SELECT token_id, layer, module, expert, neuron, side, count(*) AS entries
    FROM token_topk WHERE {COUNTED} GROUP BY token_id, layer, module, expert, neuron, side
), ordered AS (
    SELECT *, row_number() OVER (
        PARTITION BY token_id, layer, module, expert, side ORDER BY entries DESC, neuron
    ) AS nth
    FROM counted
), summed AS (
    SELECT
        token_id, layer, module, expert,
        coalesce(sum(entries) FILTER (side = 'bottom'), 0)::BIGINT AS promoted,
        coalesce(sum(entries) FILTER (side = 'top'), 0)::BIGINT AS suppressed,
        count(DISTINCT neuron) AS neurons,
        {_side_neurons("bottom", "promoted")}, {_side_neurons("top", "suppressed")}
    FROM ordered GROUP BY token_id, layer, module, expert
), prompted AS (
    SELECT token_id, layer, module, expert, count(DISTINCT prompt_id) AS prompts
    FROM token_topk WHERE {COUNTED} GROUP BY token_id, layer, module, expert
)
SELECT summed.*, prompts
FROM summed JOIN prompted
ON summed.token_id = prompted.token_id AND summed.layer = prompted.layer
    AND summed.module = prompted.module AND summed.expert IS NOT DISTINCT FROM prompted.expert
"""

LAYER_CURVES = """
SELECT
    layer, module, expert, position_class,
    count(*) AS positions,
    count(DISTINCT prompt_id) AS prompts,
    avg(input_norm::DOUBLE) AS input_norm,
    avg(vjp_norm::DOUBLE) AS vjp_norm,
    count(*) FILTER (vjp_norm = 0) AS zeros,
    avg(target_rank) AS target_rank,
    median(target_rank) AS target_rank_median,
    CASE WHEN count(first_top) > 0 THEN entropy(first_top) END AS top_entropy,
    CASE WHEN count(first_bottom) > 0 THEN entropy(first_bottom) END AS bottom_entropy
FROM (
    SELECT
        t.* EXCLUDE (top_ids, bottom_ids), top_ids[1] AS first_top, bottom_ids[1] AS first_bottom,
        CASE
            WHEN position = n_tokens - 1 THEN 'last'
            WHEN position = subject_end - 1 THEN 'subject_last'
            WHEN position = subject_start THEN 'subject_first'
            ELSE 'other'
        END AS position_class
    FROM tokens t JOIN (SELECT prompt_id, n_tokens, subject_start, subject_end FROM prompts) USING (prompt_id)
)
GROUP BY layer, module, expert, position_class
"""

DEFINITIONS: dict[str, str] = {
    "neuron_topk": NEURON_TOPK,
    "token_topk": TOKEN_TOPK,
    "position_topk": POSITION_TOPK,
    "neuron_prompts": NEURON_PROMPTS,
    "neuron_summary": NEURON_SUMMARY,
    "token_summary": TOKEN_SUMMARY,
    "layer_curves": LAYER_CURVES,
    "prompt_tokens": "SELECT * FROM tokens",
    "prompt_neurons": "SELECT * FROM neurons",
}
"""The SELECT of each table; every table comes after those that it reads."""
