"""The SELECTs behind the questions of `Atlas`. Values are bound, `$name`; ties are settled by the keys."""

from pipeline.atlas.evidence import TOLD, base, enough, evidence, log_odds

FILTER = """
($layer IS NULL OR layer = $layer) AND ($module IS NULL OR module = $module)
"""

THE_TOKEN = """
token_id BETWEEN list_min($ids) AND list_max($ids) AND list_contains($ids, token_id)
"""

PROMINENCE = "place, abs(score) DESC, prompt_id, layer, module, expert, neuron, position, side"

TOKEN_PLACES = f"""
WITH places AS (
    SELECT prompt_id, layer, module, expert, neuron, NULL::INTEGER AS position, side, place, score
    FROM token_topk WHERE {THE_TOKEN} AND {FILTER}
    UNION ALL
    SELECT prompt_id, layer, module, expert, NULL::INTEGER AS neuron, position, side, place, score
    FROM position_topk WHERE {THE_TOKEN} AND {FILTER}
), most AS (
    SELECT * FROM places ORDER BY {PROMINENCE} LIMIT $limit
)
SELECT prompt_id, layer, module, expert, neuron, position, side, place, score, prompt
FROM most JOIN prompts USING (prompt_id)
ORDER BY {PROMINENCE}
"""

TOKEN_NEURONS = f"""
WITH mine AS (
    SELECT
        layer, module, expert, neuron,
        count(*) FILTER (side = 'bottom') AS promoted,
        count(*) FILTER (side = 'top') AS demoted,
        count(DISTINCT prompt_id) AS prompts,
        min(place) AS best_place
    FROM token_topk
    WHERE {THE_TOKEN} AND {TOLD} AND {FILTER}
    GROUP BY layer, module, expert, neuron
), units AS (
    SELECT layer, module, sum(lists) AS unit_lists, count(*) AS unit_neurons
    FROM neuron_summary WHERE {FILTER} GROUP BY layer, module
), bases AS (
    SELECT
        layer, module, {base("sum(promoted)", "any_value(unit_lists)")} AS promoted_base,
        {base("sum(demoted)", "any_value(unit_lists)")} AS demoted_base,
        {enough("2 * any_value(unit_neurons)")} AS enough
    FROM mine JOIN units USING (layer, module) GROUP BY layer, module
), compared AS (
    SELECT
        mine.*, lists,
        CASE WHEN {evidence("least(promoted, lists)", "lists", "promoted_base")} >= enough
        THEN {log_odds("least(promoted, lists)", "lists", "promoted_base")} END AS promoted_log_odds,
        CASE WHEN {evidence("least(demoted, lists)", "lists", "demoted_base")} >= enough
        THEN {log_odds("least(demoted, lists)", "lists", "demoted_base")} END AS demoted_log_odds
    FROM mine JOIN bases USING (layer, module)
    JOIN neuron_summary s
    ON mine.layer = s.layer AND mine.module = s.module AND mine.neuron = s.neuron
        AND mine.expert IS NOT DISTINCT FROM s.expert
)
SELECT
    layer, module, expert, neuron, promoted, demoted, compared.prompts, lists, best_place,
    greatest(promoted_log_odds, demoted_log_odds) AS log_odds
FROM compared
ORDER BY log_odds DESC NULLS LAST, promoted + demoted DESC, layer, module, expert, neuron
LIMIT $limit
"""

TOKEN_LAYERS = f"""
SELECT * FROM token_summary
WHERE {THE_TOKEN} AND {FILTER}
ORDER BY token_id, layer, module, expert
LIMIT $limit
"""

THE_NEURON = """
layer = $layer AND module = $module AND neuron = $index AND ($expert IS NULL OR expert = $expert)
"""

NEURON_PROMPTS = f"""
WITH strongest AS (
    SELECT * FROM neuron_prompts WHERE {THE_NEURON} ORDER BY grad_norm DESC, prompt_id, expert LIMIT $limit
), lists AS (
    SELECT
        prompt_id, expert,
        list(token_id ORDER BY place) FILTER (side = 'top') AS top_ids,
        list(score ORDER BY place) FILTER (side = 'top') AS top_scores,
        list(token_id ORDER BY place) FILTER (side = 'bottom') AS bottom_ids,
        list(score ORDER BY place) FILTER (side = 'bottom') AS bottom_scores
    FROM neuron_topk
    WHERE {THE_NEURON} AND prompt_id IN (SELECT prompt_id FROM strongest)
    GROUP BY prompt_id, expert
)
SELECT
    s.prompt_id, s.expert, grad_norm, main_position, target_score, s.target_rank,
    top_ids, top_scores, bottom_ids, bottom_scores, prompt, target
FROM strongest s
LEFT JOIN lists ON s.prompt_id = lists.prompt_id AND s.expert IS NOT DISTINCT FROM lists.expert
JOIN prompts p ON p.prompt_id = s.prompt_id
ORDER BY grad_norm DESC, s.prompt_id, s.expert
"""

NEURON_TOKENS = f"""
WITH counted AS (
    SELECT
        token_id,
        count(*) FILTER (side = 'bottom') AS promoted,
        count(*) FILTER (side = 'top') AS demoted,
        min(place) AS best_place,
        count(DISTINCT prompt_id) AS prompts
    FROM neuron_topk WHERE {THE_NEURON} AND {TOLD}
    GROUP BY token_id
)
SELECT token_id, token, promoted, demoted, prompts, best_place
FROM counted LEFT JOIN vocab USING (token_id)
ORDER BY promoted + demoted DESC, token_id
LIMIT $limit
"""

NEURON_SUMMARY = f"""
WITH own AS (FROM neuron_weights WHERE {THE_NEURON})
SELECT s.*, weight_norm, weight_top_ids, weight_top_scores, weight_bottom_ids, weight_bottom_scores
FROM (FROM neuron_summary WHERE {THE_NEURON}) s LEFT JOIN own ON s.expert IS NOT DISTINCT FROM own.expert
ORDER BY s.expert
LIMIT $limit
"""

SAME_NEURON = """
n.layer = s.layer AND n.module = s.module AND n.neuron = s.neuron AND n.expert IS NOT DISTINCT FROM s.expert
"""

SIMILAR_NEURONS = f"""
WITH mine AS (
    SELECT
        token_id, count(*) FILTER (side = 'top') AS top, count(*) FILTER (side = 'bottom') AS bottom
    FROM neuron_topk WHERE {THE_NEURON} AND {TOLD} GROUP BY token_id
), products AS (
    -- An entry a row on their side, so that nothing is counted before the sum: counts are many, neurons few.
    SELECT
        layer, module, expert, neuron, sum(CASE WHEN side = 'top' THEN top ELSE bottom END)::DOUBLE AS product
    FROM token_topk JOIN mine USING (token_id)
    WHERE {TOLD}
    GROUP BY layer, module, expert, neuron
), nearest AS (
    SELECT
        n.layer, n.module, n.expert, n.neuron,
        product / entries_norm / (SELECT sqrt(sum(top * top + bottom * bottom)::DOUBLE) FROM mine) AS similarity
    FROM products n JOIN neuron_summary s ON {SAME_NEURON}
    WHERE product > 0 AND NOT (
        n.layer = $layer AND n.module = $module AND n.neuron = $index
        AND ($expert IS NULL OR n.expert = $expert)
    )
    ORDER BY similarity DESC, n.layer, n.module, n.expert, n.neuron
    LIMIT $limit
), shared AS (
    SELECT n.layer, n.module, n.expert, n.neuron, count(DISTINCT token_id) AS shared_tokens
    FROM neuron_topk s JOIN mine USING (token_id) JOIN nearest n ON {SAME_NEURON}
    WHERE CASE WHEN side = 'top' THEN top ELSE bottom END > 0 AND s.{TOLD}
    GROUP BY n.layer, n.module, n.expert, n.neuron
), counted AS (
    SELECT n.*, shared_tokens FROM nearest n JOIN shared s ON {SAME_NEURON}
)
SELECT
    n.layer, n.module, n.expert, n.neuron, similarity, shared_tokens, prompts,
    promoted_ids, promoted_counts, demoted_ids, demoted_counts
FROM counted n JOIN neuron_summary s ON {SAME_NEURON}
ORDER BY similarity DESC, n.layer, n.module, n.expert, n.neuron
"""

SPECIFIC_NEURONS = f"""
SELECT
    layer, module, expert, neuron,
    greatest(promoted_own_log_odds[1], demoted_own_log_odds[1]) AS specificity,
    prompts, lists, grad_norm_mean, promoted_own_ids AS promoted_ids, promoted_own_counts AS promoted_counts,
    promoted_own_log_odds AS promoted_log_odds, demoted_own_ids AS demoted_ids,
    demoted_own_counts AS demoted_counts, demoted_own_log_odds AS demoted_log_odds
FROM neuron_summary
WHERE prompts >= $min_prompts AND (promoted_own_ids IS NOT NULL OR demoted_own_ids IS NOT NULL) AND {FILTER}
ORDER BY specificity DESC, layer, module, expert, neuron
LIMIT $limit
"""

HEATMAP = f"""
SELECT
    layer, module, expert, position, token, input_norm, vjp_norm, target_score, target_rank,
    top_ids, top_scores, bottom_ids, bottom_scores
FROM prompt_tokens LEFT JOIN vocab USING (token_id)
WHERE prompt_id = $prompt_id AND {FILTER}
ORDER BY layer, module, expert, position
LIMIT $limit
"""

PROMPT_NEURONS = f"""
SELECT
    layer, module, expert, neuron, grad_norm, main_position, token AS main_token, target_score, n.target_rank,
    top_ids, top_scores, bottom_ids, bottom_scores
FROM prompt_neurons n
JOIN prompts USING (prompt_id)
LEFT JOIN vocab ON vocab.token_id = prompts.token_ids[main_position + 1]
WHERE prompt_id = $prompt_id AND {FILTER}
ORDER BY grad_norm DESC, layer, module, expert, neuron
LIMIT $limit
"""

TARGET_RANKS = f"""
SELECT layer, module, expert, position, token, t.target_rank, target_score, vjp_norm
FROM prompt_tokens t JOIN prompts USING (prompt_id) LEFT JOIN vocab ON vocab.token_id = t.token_id
WHERE prompt_id = $prompt_id AND position = coalesce($position, n_tokens - 1) AND {FILTER}
ORDER BY module, expert, layer
LIMIT $limit
"""

PROMINENT_IN_PROMPT = f"""
WITH listed AS (
    SELECT layer, unnest(['top', 'bottom']) AS side, unnest([top_ids, bottom_ids]) AS ids
    FROM prompt_tokens
    WHERE prompt_id = $prompt_id AND {FILTER}
        AND CASE WHEN module IN ('mlp.down', 'attn.o') THEN vjp_norm ELSE input_norm END
            >= (SELECT norm_floor FROM lens)
), places AS (
    SELECT layer, side, unnest(ids) AS token_id, generate_subscripts(ids, 1) - 1 AS place FROM listed
)
SELECT
    token_id, token, side, count(*) AS cells, count(*) FILTER (place = 0) AS first_places,
    count(DISTINCT layer) AS layers, min(layer) AS first_layer, max(layer) AS last_layer
FROM places LEFT JOIN vocab USING (token_id)
GROUP BY token_id, token, side
ORDER BY first_places DESC, cells DESC, token_id, side DESC
LIMIT $limit
"""

PROMINENT_TOKENS = f"""
WITH counted AS (
    -- By prompts, not lists: the lists of one prompt's neurons are much alike.
    SELECT token_id, layer, module, least(sum(prompts), (SELECT count(*) FROM prompts)) AS found
    FROM token_summary GROUP BY token_id, layer, module
), bases AS (
    SELECT
        token_id,
        {base("sum(found)", "(SELECT count(DISTINCT (layer, module)) FROM counted) * (SELECT count(*) FROM prompts)")}
        AS base
    FROM counted GROUP BY token_id
), compared AS (
    SELECT
        token_id, layer, module,
        CASE WHEN {evidence("found", "all_prompts", "base")} >= {enough("(SELECT count(*) FROM counted)")}
        THEN {log_odds("found", "all_prompts", "base")} END AS log_odds
    FROM counted JOIN bases USING (token_id) CROSS JOIN (SELECT count(*) AS all_prompts FROM prompts)
), strongest AS (
    SELECT
        token_id, max(log_odds) AS log_odds,
        first(layer ORDER BY log_odds DESC NULLS LAST, layer, module) AS most_layer,
        first(module ORDER BY log_odds DESC NULLS LAST, layer, module) AS most_module
    FROM compared WHERE {FILTER} GROUP BY token_id
)
SELECT
    token_id, token,
    sum(promoted)::BIGINT AS promoted, sum(demoted)::BIGINT AS demoted,
    count(DISTINCT layer) AS layers, min(layer) AS first_layer, max(layer) AS last_layer,
    max(promoted + demoted) AS most_in_a_module, any_value(log_odds) AS log_odds, any_value(most_layer) AS most_layer,
    any_value(most_module) AS most_module
FROM token_summary JOIN strongest USING (token_id) LEFT JOIN vocab USING (token_id)
WHERE {FILTER}
GROUP BY token_id, token
ORDER BY log_odds DESC NULLS LAST, most_in_a_module DESC, token_id
LIMIT $limit
"""

COMPARE_PROMPTS = """
WITH facts AS (
    SELECT layer, module, expert, prompt_id, grad_norm, NULL::INTEGER AS target_rank, NULL::INTEGER AS neuron
    FROM layers WHERE prompt_id IN ($one, $two)
    UNION ALL
    SELECT layer, module, expert, prompt_id, NULL, t.target_rank, NULL
    FROM prompt_tokens t JOIN prompts USING (prompt_id)
    WHERE prompt_id IN ($one, $two) AND position = n_tokens - 1
    UNION ALL
    SELECT layer, module, expert, prompt_id, NULL, NULL, neuron FROM prompt_neurons WHERE prompt_id IN ($one, $two)
), shared AS (
    SELECT layer, module, expert, count(*) AS neurons
    FROM (
        SELECT layer, module, expert, neuron FROM facts WHERE neuron IS NOT NULL
        GROUP BY layer, module, expert, neuron HAVING count(DISTINCT prompt_id) = 2
    )
    GROUP BY layer, module, expert
), sides AS (
    SELECT
        layer, module, expert,
        max(grad_norm) FILTER (prompt_id = $one) AS grad_norm_1,
        max(grad_norm) FILTER (prompt_id = $two) AS grad_norm_2,
        max(target_rank) FILTER (prompt_id = $one) AS target_rank_1,
        max(target_rank) FILTER (prompt_id = $two) AS target_rank_2,
        count(neuron) FILTER (prompt_id = $one) AS neurons_1,
        count(neuron) FILTER (prompt_id = $two) AS neurons_2
    FROM facts GROUP BY layer, module, expert
)
SELECT sides.*, coalesce(shared.neurons, 0) AS shared_neurons
FROM sides LEFT JOIN shared
ON sides.layer = shared.layer AND sides.module = shared.module
    AND sides.expert IS NOT DISTINCT FROM shared.expert
WHERE ($layer IS NULL OR sides.layer = $layer) AND ($module IS NULL OR sides.module = $module)
ORDER BY sides.layer, sides.module, sides.expert
LIMIT $limit
"""

COMPARE_RUNS = """
WITH pairs AS (
    SELECT one.prompt_id AS first, two.prompt_id AS second
    FROM (SELECT prompt_id, prompt, row_number() OVER (PARTITION BY prompt ORDER BY prompt_id) AS nth FROM prompts) one
    JOIN (
        SELECT prompt_id, prompt, row_number() OVER (PARTITION BY prompt ORDER BY prompt_id) AS nth
        FROM other.prompts
    ) two USING (prompt, nth)
), norms AS (
    SELECT
        a.layer, a.module, a.expert, count(*) AS prompts,
        avg(a.grad_norm::DOUBLE) AS grad_norm_1, avg(b.grad_norm::DOUBLE) AS grad_norm_2,
        avg(a.target_rank) AS target_rank_1, avg(b.target_rank) AS target_rank_2
    FROM layers a JOIN pairs ON a.prompt_id = first
    JOIN other.layers b
    ON b.prompt_id = second AND a.layer = b.layer AND a.module = b.module AND a.expert IS NOT DISTINCT FROM b.expert
    GROUP BY a.layer, a.module, a.expert
), shared AS (
    SELECT a.layer, a.module, a.expert, count(*) AS neurons
    FROM neurons a JOIN pairs ON a.prompt_id = first
    JOIN other.neurons b
    ON b.prompt_id = second AND a.layer = b.layer AND a.module = b.module AND a.neuron = b.neuron
        AND a.expert IS NOT DISTINCT FROM b.expert
    GROUP BY a.layer, a.module, a.expert
)
SELECT norms.*, coalesce(shared.neurons, 0) AS shared_neurons
FROM norms LEFT JOIN shared
ON norms.layer = shared.layer AND norms.module = shared.module
    AND norms.expert IS NOT DISTINCT FROM shared.expert
WHERE ($layer IS NULL OR norms.layer = $layer) AND ($module IS NULL OR norms.module = $module)
ORDER BY norms.layer, norms.module, norms.expert
LIMIT $limit
"""

GROUPS = f"""
WITH grouped AS (
    SELECT
        prompt_id, loss, target_prob, target_rank AS predicted_rank,
        CASE $by
            WHEN 'relation' THEN relation WHEN 'subject' THEN subject WHEN 'target' THEN target
            ELSE json_extract_string(meta, $pointer)
        END AS tag
    FROM prompts
)
SELECT
    tag, layer, module, expert, count(*) AS prompts,
    avg(loss::DOUBLE) AS loss, avg(target_prob::DOUBLE) AS target_prob,
    avg(grad_norm::DOUBLE) AS grad_norm, avg(target_rank) AS target_rank
FROM grouped JOIN layers USING (prompt_id)
WHERE {FILTER}
GROUP BY tag, layer, module, expert
ORDER BY tag, module, layer, expert
LIMIT $limit
"""

COVERAGE = f"""
WITH facts AS (
    SELECT
        layer, module, expert, count(*) AS prompts, count(*) FILTER (rank = 0) AS zero_gradients,
        NULL::BIGINT AS kept, NULL::BIGINT AS neurons, NULL::BIGINT AS positions, NULL::BIGINT AS zero_vjps
    FROM layers GROUP BY layer, module, expert
    UNION ALL
    SELECT layer, module, expert, NULL, NULL, count(*), count(DISTINCT neuron), NULL, NULL
    FROM neurons GROUP BY layer, module, expert
    UNION ALL
    SELECT layer, module, expert, NULL, NULL, NULL, NULL, count(*), count(*) FILTER (vjp_norm = 0)
    FROM tokens GROUP BY layer, module, expert
)
SELECT
    layer, module, expert,
    coalesce(max(prompts), 0) AS prompts,
    (SELECT count(*) FROM prompts) - coalesce(max(prompts), 0) AS prompts_without_rows,
    coalesce(max(zero_gradients), 0) AS zero_gradients,
    coalesce(max(positions), 0) AS positions,
    coalesce(max(zero_vjps), 0) AS zero_vjps,
    coalesce(max(kept), 0) AS neuron_rows,
    coalesce(max(neurons), 0) AS distinct_neurons,
    (SELECT count(*) FROM failures) AS failed_prompts
FROM facts
WHERE {FILTER}
GROUP BY layer, module, expert
ORDER BY layer, module, expert
LIMIT $limit
"""

MODULES = """
SELECT module::VARCHAR AS name FROM tokens
WHERE ($module IS NULL OR module = $module) AND ($prompt_id IS NULL OR prompt_id = $prompt_id)
GROUP BY name ORDER BY min(layer), name
"""

LAYER_CURVES = f"""
SELECT * FROM layer_curves WHERE {FILTER} ORDER BY module, expert, position_class, layer LIMIT $limit
"""
