-- The updates of a neuron over all prompts that keep it. An update subtracts gradients, so the tokens of bottom lists are promoted and those of top lists suppressed. The lens of the neuron's own weights is in `neuron_weights`.
-- One row per neuron that was kept for a prompt.
CREATE TABLE neuron_summary (
    -- Index of the block, from 0.
    layer                   SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module                  VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert                  SMALLINT,
    -- Index of the unit on the side of the module that is not the residual one, from 0.
    neuron                  INTEGER NOT NULL,
    -- Number of prompts that keep it; for the others it is below the cut-off, not zero.
    prompts                 BIGINT NOT NULL,
    -- Sum of its gradient norms over those prompts.
    grad_norm_sum           DOUBLE NOT NULL,
    -- Their mean over those prompts.
    grad_norm_mean          DOUBLE NOT NULL,
    -- The largest of them.
    grad_norm_max           FLOAT NOT NULL,
    -- The prompt_ids of up to 5 prompts with the largest norms, largest first.
    strongest_prompts       BIGINT[] NOT NULL,
    -- The gradient norms in `strongest_prompts`.
    strongest_norms         FLOAT[] NOT NULL,
    -- Number of those prompts whose lists are counted below: the vector is neither zero nor shorter than the run's `norm_floor`.
    lists                   BIGINT NOT NULL,
    -- Euclidean length of its counts by side and token, for the cosine of similar neurons; 0 without counts.
    entries_norm            DOUBLE NOT NULL,
    -- The 10 tokens that are in most of its bottom lists, ties to the smaller id; null if none of its lists is counted.
    promoted_ids            INTEGER[],
    -- Number of prompts with each of `promoted_ids` in that list; null if none of its lists is counted.
    promoted_counts         BIGINT[],
    -- How many times more often each of `promoted_ids` is in this neuron's bottom lists than in those of its layer's module; null if none of its lists is counted.
    promoted_lifts          DOUBLE[],
    -- Up to 10 own tokens: they are in more of its bottom lists than chance among the lists of its layer's module explains, the largest log odds first; null if there is none.
    promoted_own_ids        INTEGER[],
    -- Number of prompts with each of `promoted_own_ids` in that list.
    promoted_own_counts     BIGINT[],
    -- Smoothed log odds, in bits, of each of `promoted_own_ids` in its lists against those of its layer's module.
    promoted_own_log_odds   DOUBLE[],
    -- Entropy of the tokens in its bottom lists, in bits; null if none of its lists is counted.
    promoted_entropy        DOUBLE,
    -- The 10 tokens that are in most of its top lists, ties to the smaller id; null if none of its lists is counted.
    suppressed_ids          INTEGER[],
    -- Number of prompts with each of `suppressed_ids` in that list; null if none of its lists is counted.
    suppressed_counts       BIGINT[],
    -- How many times more often each of `suppressed_ids` is in this neuron's top lists than in those of its layer's module; null if none of its lists is counted.
    suppressed_lifts        DOUBLE[],
    -- Up to 10 own tokens: they are in more of its top lists than chance among the lists of its layer's module explains, the largest log odds first; null if there is none.
    suppressed_own_ids      INTEGER[],
    -- Number of prompts with each of `suppressed_own_ids` in that list.
    suppressed_own_counts   BIGINT[],
    -- Smoothed log odds, in bits, of each of `suppressed_own_ids` in its lists against those of its layer's module.
    suppressed_own_log_odds DOUBLE[],
    -- Entropy of the tokens in its top lists, in bits; null if none of its lists is counted.
    suppressed_entropy      DOUBLE
);
