-- The lists of `neurons`, one row per entry, sorted by neuron.
-- One row per kept neuron × side × place.
CREATE TABLE neuron_topk (
    -- Index of the block, from 0.
    layer     SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module    VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert    SMALLINT,
    -- Index of the unit on the side of the module that is not the residual one, from 0.
    neuron    INTEGER NOT NULL,
    -- Ordinal of the prompt in the input, from 0; joins `prompts.prompt_id`.
    prompt_id BIGINT NOT NULL,
    -- The list: `top` (suppressed by an update) or `bottom` (promoted, because an update subtracts gradients).
    side      VARCHAR NOT NULL,
    -- The token's place in that list, 0 = most extreme.
    place     SMALLINT NOT NULL,
    -- The token; joins `vocab.token_id`.
    token_id  INTEGER NOT NULL,
    -- The token's lens score of the neuron's gradient vector, in logits.
    score     FLOAT NOT NULL,
    -- L2 norm of the neuron's gradient vector for that prompt.
    grad_norm FLOAT NOT NULL
);
