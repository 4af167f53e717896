-- The logit lens of a neuron's own weights, without any gradient. For y = x W this is the row of W that it writes (`mlp.down`, `attn.o`) or the column with which it reads (the others), with the sign of the weights: an active neuron raises its top tokens. Read from the run's model; the table has no rows if that could not be read (the manifest's `weights` says why).
-- One row per neuron that was kept for a prompt.
CREATE TABLE neuron_weights (
    -- Index of the block, from 0.
    layer                SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module               VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert               SMALLINT,
    -- Index of the unit on the side of the module that is not the residual one, from 0.
    neuron               INTEGER NOT NULL,
    -- L2 norm of the row or column.
    weight_norm          FLOAT NOT NULL,
    -- The tokens with the largest scores, as many as `--top-k`; null if they are all zero.
    weight_top_ids       INTEGER[],
    -- Lens scores of `weight_top_ids`, in logits; null if they are all zero.
    weight_top_scores    FLOAT[],
    -- The tokens with the smallest scores, as many as `--top-k`; null if they are all zero.
    weight_bottom_ids    INTEGER[],
    -- Lens scores of `weight_bottom_ids`, in logits; null if they are all zero.
    weight_bottom_scores FLOAT[]
);
