-- The same rows as `neurons`, sorted by prompt. The table takes as much room as `neurons`.
-- One row per kept neuron of a prompt × layer × module (× expert).
CREATE TABLE prompt_neurons (
    -- The prompt: its ordinal in the input, from 0; joins `prompts.prompt_id`.
    prompt_id     BIGINT NOT NULL,
    -- Index of the block, from 0.
    layer         SMALLINT NOT NULL,
    -- The weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module        VARCHAR NOT NULL,
    -- Index of the expert in a mixture-of-experts block, from 0; null where the block has no experts.
    expert        SMALLINT,
    -- Index of the unit on the module's other side than the residual one, from 0.
    neuron        INTEGER NOT NULL,
    -- L2 norm of the neuron's gradient vector.
    grad_norm     FLOAT NOT NULL,
    -- The position that contributes most to the neuron's gradient vector.
    main_position INTEGER NOT NULL,
    -- Tokens with the k largest lens scores of the neuron's gradient vector, largest first; null if the vector is zero.
    top_ids       INTEGER[],
    -- The lens scores of `top_ids`, descending, in logits; null if the vector is zero.
    top_scores    FLOAT[],
    -- Tokens with the k smallest lens scores of the neuron's gradient vector, smallest first; null if the vector is zero.
    bottom_ids    INTEGER[],
    -- The lens scores of `bottom_ids`, ascending, in logits; null if the vector is zero.
    bottom_scores FLOAT[],
    -- The lens score of the target's first token, in logits; null if the vector is zero.
    target_score  FLOAT,
    -- Number of tokens with a strictly larger score than the target's first, 0 = largest; null if the vector is zero.
    target_rank   INTEGER
);
