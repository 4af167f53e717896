-- The neurons whose updates promote a token (it is in a bottom list) or suppress it (it is in a top list).
-- One row per token × layer × module (× expert) with the token in its lists.
CREATE TABLE token_summary (
    -- The token; joins `vocab.token_id`.
    token_id           INTEGER NOT NULL,
    -- Index of the block, from 0.
    layer              SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module             VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert             SMALLINT,
    -- Number of bottom lists of kept neurons with the token.
    promoted           BIGINT NOT NULL,
    -- Number of top lists of kept neurons with the token.
    suppressed         BIGINT NOT NULL,
    -- Number of prompts with the token in either list.
    prompts            BIGINT NOT NULL,
    -- Number of neurons with the token in a list.
    neurons            BIGINT NOT NULL,
    -- Up to 5 neurons that promote it most often, ties to the smaller index; null if none does.
    promoted_neurons   INTEGER[],
    -- Lists with it of each of `promoted_neurons`; null if there is none.
    promoted_counts    BIGINT[],
    -- Up to 5 neurons that suppress it most often, ties to the smaller index; null if none does.
    suppressed_neurons INTEGER[],
    -- Lists with it of each of `suppressed_neurons`; null if there is none.
    suppressed_counts  BIGINT[]
);
