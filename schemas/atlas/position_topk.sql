-- The lists of `tokens`, one row per entry, sorted by token: the positions at which a token is prominent.
-- One row per prompt × layer × module (× expert) × position × side × place.
CREATE TABLE position_topk (
    -- The token in the list, not that at the position; joins `vocab.token_id`.
    token_id  INTEGER NOT NULL,
    -- Index of the block, from 0.
    layer     SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module    VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert    SMALLINT,
    -- Ordinal of the prompt in the input, from 0; joins `prompts.prompt_id`.
    prompt_id BIGINT NOT NULL,
    -- Index of the token in the prompt, from 0; padding is not counted.
    position  INTEGER NOT NULL,
    -- The list: `top` (suppressed by an update) or `bottom` (promoted, because an update subtracts gradients).
    side      VARCHAR NOT NULL,
    -- The token's place in that list, 0 = most extreme.
    place     SMALLINT NOT NULL,
    -- The token's lens score of the position's vector, in logits.
    score     FLOAT NOT NULL
);
