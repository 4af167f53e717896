-- The gradient matrices G = XᵀΔ: norm, spectrum, and leading direction on the residual side.
-- One row per prompt × layer × module (× expert).
CREATE TABLE layers (
    -- Ordinal of the prompt in the input, from 0; joins `prompts.prompt_id`.
    prompt_id       BIGINT NOT NULL,
    -- Index of the block, from 0.
    layer           SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module          VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert          SMALLINT,
    -- Numerical rank of G; at most the number of positions, 0 if G is zero.
    rank            INTEGER NOT NULL,
    -- Frobenius norm of G; 0 or more.
    grad_norm       FLOAT NOT NULL,
    -- Singular values of G, descending.
    singular_values FLOAT[] NOT NULL,
    -- Ids of the k tokens with the largest lens scores of the leading singular vector on the residual side (its entry of largest magnitude is made positive), largest first; null if the vector is zero.
    top_ids         INTEGER[],
    -- Lens scores of `top_ids`, in logits, raw sign, descending; null if the vector is zero.
    top_scores      FLOAT[],
    -- Ids of the k tokens with the smallest lens scores of the leading singular vector on the residual side (its entry of largest magnitude is made positive), smallest first; null if the vector is zero.
    bottom_ids      INTEGER[],
    -- Lens scores of `bottom_ids`, in logits, raw sign, ascending; null if the vector is zero.
    bottom_scores   FLOAT[],
    -- Lens score of the target's first token, in logits; null if the vector is zero.
    target_score    FLOAT,
    -- Number of tokens with a strictly larger lens score than the target's first, 0 = largest; null if the vector is zero.
    target_rank     INTEGER
);
