-- What a neuron's own weights say through the lens, without any gradient: the row of W that it writes (`mlp.down`, `attn.o`), or the column with which it reads (the others), for y = x W. Signs are as the weights': an active neuron writes its top tokens. Derived from the run's model; without rows where that was not at hand (the manifest's `weights` says why).
-- One row per neuron that was kept for a prompt.
CREATE TABLE neuron_weights (
    -- Index of the block, from 0.
    layer                SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module               VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert               SMALLINT,
    -- Index of the unit on the module's other side than the residual one, from 0.
    neuron               INTEGER NOT NULL,
    -- L2 norm of the row or column.
    weight_norm          FLOAT NOT NULL,
    -- The tokens with the largest scores, as `--top-k` has it; null if they are all zero.
    weight_top_ids       INTEGER[],
    -- Lens scores of `weight_top_ids`, in logits; null if they are all zero.
    weight_top_scores    FLOAT[],
    -- The tokens with the smallest scores, as `--top-k` has it; null if they are all zero.
    weight_bottom_ids    INTEGER[],
    -- Lens scores of `weight_bottom_ids`, in logits; null if they are all zero.
    weight_bottom_scores FLOAT[]
);
