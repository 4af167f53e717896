-- The same rows as `tokens`, sorted by prompt, for heatmaps. The table takes as much room as `tokens`.
-- One row per prompt × layer × module (× expert) × position.
CREATE TABLE prompt_tokens (
    -- Ordinal of the prompt in the input, from 0; joins `prompts.prompt_id`.
    prompt_id     BIGINT NOT NULL,
    -- Index of the block, from 0.
    layer         SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module        VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert        SMALLINT,
    -- Index of the token in the prompt, from 0; padding is not counted.
    position      INTEGER NOT NULL,
    -- Id of the prompt's token at the position; joins `vocab.token_id`.
    token_id      INTEGER NOT NULL,
    -- L2 norm of the module's input x at the position; 0 or more.
    input_norm    FLOAT NOT NULL,
    -- L2 norm of the VJP δ = dLoss/d(module output) at the position; 0 if δ is exactly zero (the row is kept).
    vjp_norm      FLOAT NOT NULL,
    -- Ids of the k tokens with the largest lens scores of the vector on the residual side, largest first; null if the vector is zero.
    top_ids       INTEGER[],
    -- Lens scores of `top_ids`, in logits, raw sign, descending; null if the vector is zero.
    top_scores    FLOAT[],
    -- Ids of the k tokens with the smallest lens scores of the vector on the residual side, smallest first; null if the vector is zero.
    bottom_ids    INTEGER[],
    -- Lens scores of `bottom_ids`, in logits, raw sign, ascending; null if the vector is zero.
    bottom_scores FLOAT[],
    -- Lens score of the target's first token, in logits; null if the vector is zero.
    target_score  FLOAT,
    -- Number of tokens with a strictly larger lens score than the target's first, 0 = largest; null if the vector is zero.
    target_rank   INTEGER
);
