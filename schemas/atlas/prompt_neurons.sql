-- The same rows as `neurons`, sorted by prompt. The table takes as much room as `neurons`.
-- One row per kept neuron of a prompt × layer × module (× expert).
CREATE TABLE prompt_neurons (
    -- Ordinal of the prompt in the input, from 0; joins `prompts.prompt_id`.
    prompt_id     BIGINT NOT NULL,
    -- Index of the block, from 0.
    layer         SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module        VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert        SMALLINT,
    -- Index of the unit on the side that is not the residual side, from 0.
    neuron        INTEGER NOT NULL,
    -- L2 norm of the neuron's gradient vector; 0 or more.
    grad_norm     FLOAT NOT NULL,
    -- Position that contributes most to the neuron's gradient vector.
    main_position INTEGER NOT NULL,
    -- Ids of the k tokens with the largest lens scores of the neuron's gradient vector, largest first; null if the vector is zero.
    top_ids       INTEGER[],
    -- Lens scores of `top_ids`, in logits, raw sign, descending; null if the vector is zero.
    top_scores    FLOAT[],
    -- Ids of the k tokens with the smallest lens scores of the neuron's gradient vector, smallest first; null if the vector is zero.
    bottom_ids    INTEGER[],
    -- Lens scores of `bottom_ids`, in logits, raw sign, ascending; null if the vector is zero.
    bottom_scores FLOAT[],
    -- Lens score of the target's first token, in logits; null if the vector is zero.
    target_score  FLOAT,
    -- Number of tokens with a strictly larger lens score than the target's first, 0 = largest; null if the vector is zero.
    target_rank   INTEGER
);
