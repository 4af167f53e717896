"""The SELECTs that only the explorer needs: search, what lies beside a thing, and what two prompts keep."""

from pipeline.atlas.questions import THE_NEURON

BINS = 24

SEARCH_TOKENS = """
WITH found AS (
    SELECT
        token_id, token,
        CASE
            WHEN token = $q THEN 'exact'
            WHEN trim(token) = trim($q) THEN 'spaces'
            WHEN lower(trim(token)) = lower(trim($q)) THEN 'case'
            ELSE 'part'
        END AS match
    FROM vocab
    WHERE contains(lower(token), CASE WHEN trim($q) = '' THEN $q ELSE lower(trim($q)) END)
    ORDER BY
        list_position(['exact', 'spaces', 'case', 'part'], match), length(token), token_id
    LIMIT $limit
), counted AS (
    SELECT
        token_id, sum(promoted)::BIGINT AS promoted, sum(demoted)::BIGINT AS demoted,
        count(DISTINCT layer) AS layers
    FROM token_summary WHERE token_id IN (SELECT token_id FROM found)
    GROUP BY token_id
)
SELECT token_id, token, match, promoted, demoted, layers
FROM found LEFT JOIN counted USING (token_id)
ORDER BY list_position(['exact', 'spaces', 'case', 'part'], match), length(token), token_id
"""

SEARCH_PROMPTS = """
SELECT prompt_id, prompt, target, subject, relation, loss, target_prob, target_rank
FROM prompts
WHERE $q IS NULL OR contains(lower(prompt), lower($q)) OR contains(lower(target), lower($q))
    OR contains(lower(coalesce(relation, '')), lower($q)) OR contains(lower(coalesce(id, '')), lower($q))
ORDER BY prompt_id
LIMIT $limit
"""

NEAR_NEURONS = """
SELECT
    max(neuron) FILTER (neuron < $index) AS previous,
    min(neuron) FILTER (neuron > $index) AS next,
    count(*) AS kept_neurons
FROM neuron_summary
WHERE layer = $layer AND module = $module AND ($expert IS NULL OR expert = $expert)
"""

NEAR_PROMPTS = """
SELECT
    max(prompt_id) FILTER (prompt_id < $prompt_id) AS previous,
    min(prompt_id) FILTER (prompt_id > $prompt_id) AS next
FROM prompts
"""

HISTOGRAM = f"""
WITH norms AS (
    SELECT grad_norm::DOUBLE AS norm, max(grad_norm::DOUBLE) OVER () AS most
    FROM neuron_prompts WHERE {THE_NEURON}
), filled AS (
    SELECT least(floor(norm / most * {BINS}), {BINS - 1})::INTEGER AS bin, count(*) AS prompts, any_value(most) AS most
    FROM norms WHERE most > 0 GROUP BY bin
)
SELECT bin * most / {BINS} AS norm_from, (bin + 1) * most / {BINS} AS norm_to, prompts, bin
FROM filled ORDER BY bin
"""

TOKEN_TEXTS = """
SELECT token_id, token FROM vocab WHERE list_contains($ids, token_id)
"""

COMPARE_NEURONS = """
WITH kept AS (
    SELECT prompt_id, layer, module::VARCHAR AS module, expert, neuron, grad_norm
    FROM prompt_neurons WHERE prompt_id IN ($one, $two) AND ($module IS NULL OR module = $module)
), pairs AS (
    SELECT
        layer, module, expert, neuron,
        max(grad_norm) FILTER (prompt_id = $one) AS grad_norm_1,
        max(grad_norm) FILTER (prompt_id = $two) AS grad_norm_2
    FROM kept GROUP BY layer, module, expert, neuron
), weakest AS (
    SELECT
        layer, module, expert,
        min(grad_norm) FILTER (prompt_id = $one) AS cut_off_1,
        min(grad_norm) FILTER (prompt_id = $two) AS cut_off_2
    FROM kept GROUP BY layer, module, expert
)
SELECT b.layer, b.module, b.expert, b.neuron, grad_norm_1, grad_norm_2, cut_off_1, cut_off_2
FROM pairs b JOIN weakest w
ON b.layer = w.layer AND b.module = w.module AND b.expert IS NOT DISTINCT FROM w.expert
ORDER BY greatest(coalesce(grad_norm_1, 0), coalesce(grad_norm_2, 0)) DESC, b.layer, b.module, b.expert, b.neuron
LIMIT $limit
"""
