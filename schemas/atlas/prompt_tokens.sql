-- The same rows as `tokens`, sorted by prompt, for heatmaps. The table takes as much room as `tokens`.
-- One row per prompt × layer × module (× expert) × position.
CREATE TABLE prompt_tokens (
    -- The prompt: its ordinal in the input, from 0; joins `prompts.prompt_id`.
    prompt_id     BIGINT NOT NULL,
    -- Index of the block, from 0.
    layer         SMALLINT NOT NULL,
    -- The weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module        VARCHAR NOT NULL,
    -- Index of the expert in a mixture-of-experts block, from 0; null where the block has no experts.
    expert        SMALLINT,
    -- Index of the token in the prompt, from 0; padding is never counted.
    position      INTEGER NOT NULL,
    -- The prompt's token at that position; joins `vocab.token_id`.
    token_id      INTEGER NOT NULL,
    -- L2 norm of the module's input x at that position.
    input_norm    FLOAT NOT NULL,
    -- L2 norm of the VJP δ = dLoss/d(module output) there; 0 for an exact zero, whose row is kept.
    vjp_norm      FLOAT NOT NULL,
    -- Tokens with the k largest lens scores of the residual-side vector, largest first; null if the vector is zero.
    top_ids       INTEGER[],
    -- The lens scores of `top_ids`, descending, in logits; null if the vector is zero.
    top_scores    FLOAT[],
    -- Tokens with the k smallest lens scores of the residual-side vector, smallest first; null if the vector is zero.
    bottom_ids    INTEGER[],
    -- The lens scores of `bottom_ids`, ascending, in logits; null if the vector is zero.
    bottom_scores FLOAT[],
    -- The lens score of the target's first token, in logits; null if the vector is zero.
    target_score  FLOAT,
    -- Number of tokens with a strictly larger score than the target's first, 0 = largest; null if the vector is zero.
    target_rank   INTEGER
);
