-- The curves of the paper's figures: norms and ranks by layer and position class.
-- One row per layer × module (× expert) × position class.
CREATE TABLE layer_curves (
    -- Index of the block, from 0.
    layer              SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module             VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert             SMALLINT,
    -- `last` (the prompt's last position), else `subject_last`, else `subject_first`, else `other`; a subject of one token is `subject_last`.
    position_class     VARCHAR NOT NULL,
    -- Number of positions of that class.
    positions          BIGINT NOT NULL,
    -- Number of prompts with such a position.
    prompts            BIGINT NOT NULL,
    -- Mean L2 norm of the module's input x there.
    input_norm         DOUBLE NOT NULL,
    -- Mean L2 norm of the VJP δ there, exact zeros included.
    vjp_norm           DOUBLE NOT NULL,
    -- Number of them at which δ is exactly zero.
    zeros              BIGINT NOT NULL,
    -- Mean rank of the target, 0 = largest score; null if every projected vector is zero.
    target_rank        DOUBLE,
    -- Median rank of the target; null where `target_rank` is.
    target_rank_median DOUBLE,
    -- Entropy of the first top token, in bits; null where `target_rank` is.
    top_entropy        DOUBLE,
    -- Entropy of the first bottom token; null where `target_rank` is.
    bottom_entropy     DOUBLE
);
