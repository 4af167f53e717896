-- The lists of `neurons`, an entry a row, neuron after neuron.
-- One row per kept neuron × side × place.
CREATE TABLE neuron_topk (
    -- Index of the block, from 0.
    layer     SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module    VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert    SMALLINT,
    -- Index of the unit on the module's other side than the residual one, from 0.
    neuron    INTEGER NOT NULL,
    -- Ordinal of the prompt in the input, from 0; joins `prompts.prompt_id`.
    prompt_id BIGINT NOT NULL,
    -- The list: `top` (what an update takes away) or `bottom` (what an update adds, for it subtracts gradients).
    side      VARCHAR NOT NULL,
    -- Where the token stands in that list, 0 = most extreme.
    place     SMALLINT NOT NULL,
    -- The token; joins `vocab.token_id`.
    token_id  INTEGER NOT NULL,
    -- The token's lens score of the neuron's gradient vector, in logits.
    score     FLOAT NOT NULL,
    -- L2 norm of the neuron's gradient vector for that prompt.
    grad_norm FLOAT NOT NULL
);
