-- What the prompts say to a neuron, together. An update subtracts gradients, so the tokens of bottom lists are promoted and those of top lists demoted. What the neuron's own weights say is in `neuron_weights`.
-- One row per neuron that was kept for a prompt.
CREATE TABLE neuron_summary (
    -- Index of the block, from 0.
    layer                 SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module                VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert                SMALLINT,
    -- Index of the unit on the module's other side than the residual one, from 0.
    neuron                INTEGER NOT NULL,
    -- In how many prompts it is kept; in the others it is below the cut-off, not zero.
    prompts               BIGINT NOT NULL,
    -- Sum of its gradient norms over those prompts.
    grad_norm_sum         DOUBLE NOT NULL,
    -- Their mean over those prompts.
    grad_norm_mean        DOUBLE NOT NULL,
    -- The largest of them.
    grad_norm_max         FLOAT NOT NULL,
    -- The prompt_ids of up to 5 prompts with the largest norms, largest first.
    strongest_prompts     BIGINT[] NOT NULL,
    -- The gradient norms in `strongest_prompts`.
    strongest_norms       FLOAT[] NOT NULL,
    -- In how many of those prompts its lists are counted below: its vector is neither zero nor shorter than the run's `norm_floor`.
    lists                 BIGINT NOT NULL,
    -- Euclidean length of its counts by side and token, which `similar` compares; 0 if there are none.
    entries_norm          DOUBLE NOT NULL,
    -- The 10 tokens that stand in most bottom lists of it, ties to the smaller id; null if no list of its is counted.
    promoted_ids          INTEGER[],
    -- In how many prompts each of `promoted_ids` does; null if no list of its is counted.
    promoted_counts       BIGINT[],
    -- How many times more often each of `promoted_ids` stands in this neuron's bottom lists than in those of its layer's module; null if no list of its is counted.
    promoted_lifts        DOUBLE[],
    -- Up to 10 tokens of its own: they stand in more of its bottom lists than chance among the lists of its layer's module explains, the largest log odds first; null if there is none.
    promoted_own_ids      INTEGER[],
    -- In how many prompts each of `promoted_own_ids` does.
    promoted_own_counts   BIGINT[],
    -- Smoothed log odds, in bits, of each of `promoted_own_ids` in its lists against those of its layer's module.
    promoted_own_log_odds DOUBLE[],
    -- Entropy of the tokens in its bottom lists, in bits; null if no list of its is counted.
    promoted_entropy      DOUBLE,
    -- The 10 tokens that stand in most top lists of it, ties to the smaller id; null if no list of its is counted.
    demoted_ids           INTEGER[],
    -- In how many prompts each of `demoted_ids` does; null if no list of its is counted.
    demoted_counts        BIGINT[],
    -- How many times more often each of `demoted_ids` stands in this neuron's top lists than in those of its layer's module; null if no list of its is counted.
    demoted_lifts         DOUBLE[],
    -- Up to 10 tokens of its own: they stand in more of its top lists than chance among the lists of its layer's module explains, the largest log odds first; null if there is none.
    demoted_own_ids       INTEGER[],
    -- In how many prompts each of `demoted_own_ids` does.
    demoted_own_counts    BIGINT[],
    -- Smoothed log odds, in bits, of each of `demoted_own_ids` in its lists against those of its layer's module.
    demoted_own_log_odds  DOUBLE[],
    -- Entropy of the tokens in its top lists, in bits; null if no list of its is counted.
    demoted_entropy       DOUBLE
);
