-- What the prompts say to a neuron, together. An update subtracts gradients, so the tokens of bottom lists are promoted and those of top lists demoted. What the neuron's own weights say is in `neuron_weights`.
-- One row per neuron that was kept for a prompt.
CREATE TABLE neuron_summary (
    -- Index of the block, from 0.
    layer                SMALLINT NOT NULL,
    -- The weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module               VARCHAR NOT NULL,
    -- Index of the expert in a mixture-of-experts block, from 0; null where the block has no experts.
    expert               SMALLINT,
    -- Index of the unit on the module's other side than the residual one, from 0.
    neuron               INTEGER NOT NULL,
    -- In how many prompts it is kept; in the others it is below the cut-off, not zero.
    prompts              BIGINT NOT NULL,
    -- Sum of its gradient norms over those prompts.
    grad_norm_sum        DOUBLE NOT NULL,
    -- Their mean over those prompts.
    grad_norm_mean       DOUBLE NOT NULL,
    -- The largest of them.
    grad_norm_max        FLOAT NOT NULL,
    -- The prompt_ids of up to 5 prompts with the largest norms, largest first.
    strongest_prompts    BIGINT[] NOT NULL,
    -- The gradient norms in `strongest_prompts`.
    strongest_norms      FLOAT[] NOT NULL,
    -- Euclidean length of its counts by side and token, which `similar` compares; 0 if there are none.
    entries_norm         DOUBLE NOT NULL,
    -- The 10 tokens that stand in most bottom lists of it, ties to the smaller id; null if all its vectors are zero.
    promoted_ids         INTEGER[],
    -- In how many prompts each of `promoted_ids` does; null if all its vectors are zero.
    promoted_counts      BIGINT[],
    -- How many times more often each of `promoted_ids` stands in this neuron's bottom lists than in those of its layer's module; null if all its vectors are zero.
    promoted_lifts       DOUBLE[],
    -- Entropy of the tokens in its bottom lists, in bits; null if all its vectors are zero.
    promoted_entropy     DOUBLE,
    -- Kullback-Leibler divergence of the tokens in its bottom lists from those of its layer's module, in bits: the mean of log2 lift; null if all its vectors are zero.
    promoted_specificity DOUBLE,
    -- The 10 tokens that stand in most top lists of it, ties to the smaller id; null if all its vectors are zero.
    demoted_ids          INTEGER[],
    -- In how many prompts each of `demoted_ids` does; null if all its vectors are zero.
    demoted_counts       BIGINT[],
    -- How many times more often each of `demoted_ids` stands in this neuron's top lists than in those of its layer's module; null if all its vectors are zero.
    demoted_lifts        DOUBLE[],
    -- Entropy of the tokens in its top lists, in bits; null if all its vectors are zero.
    demoted_entropy      DOUBLE,
    -- Kullback-Leibler divergence of the tokens in its top lists from those of its layer's module, in bits: the mean of log2 lift; null if all its vectors are zero.
    demoted_specificity  DOUBLE
);
