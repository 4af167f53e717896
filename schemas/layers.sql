-- The gradient matrices G = XᵀΔ: their size, spectrum, and leading residual-side direction.
-- One row per prompt × layer × module (× expert).
CREATE TABLE layers (
    -- The prompt: its ordinal in the input, from 0; joins `prompts.prompt_id`.
    prompt_id       BIGINT NOT NULL,
    -- Index of the block, from 0.
    layer           SMALLINT NOT NULL,
    -- The weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module          VARCHAR NOT NULL,
    -- Index of the expert in a mixture-of-experts block, from 0; null where the block has no experts.
    expert          SMALLINT,
    -- Numerical rank of the gradient; at most the number of positions, 0 if it is zero.
    rank            INTEGER NOT NULL,
    -- Frobenius norm of the gradient.
    grad_norm       FLOAT NOT NULL,
    -- The gradient's singular values, descending.
    singular_values FLOAT[] NOT NULL,
    -- Tokens with the k largest lens scores of the leading residual-side singular vector (its largest-magnitude entry made positive), largest first; null if the vector is zero.
    top_ids         INTEGER[],
    -- The lens scores of `top_ids`, descending, in logits; null if the vector is zero.
    top_scores      FLOAT[],
    -- Tokens with the k smallest lens scores of the leading residual-side singular vector (its largest-magnitude entry made positive), smallest first; null if the vector is zero.
    bottom_ids      INTEGER[],
    -- The lens scores of `bottom_ids`, ascending, in logits; null if the vector is zero.
    bottom_scores   FLOAT[],
    -- The lens score of the target's first token, in logits; null if the vector is zero.
    target_score    FLOAT,
    -- Number of tokens with a strictly larger score than the target's first, 0 = largest; null if the vector is zero.
    target_rank     INTEGER
);
