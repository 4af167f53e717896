-- The gradients in factored form (`--save-factors`): the sum of outer(x, delta) over the positions of a prompt is the gradient of the loss with respect to W, for y = x W. Values are float16 or float32.
-- One row per prompt × layer × module (× expert) × position.
CREATE TABLE factors (
    -- Ordinal of the prompt in the input, from 0; joins `prompts.prompt_id`.
    prompt_id BIGINT NOT NULL,
    -- Index of the block, from 0.
    layer     SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module    VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert    SMALLINT,
    -- Index of the token in the prompt, from 0; padding is not counted.
    position  INTEGER NOT NULL,
    -- Input x of the module at the position; its length is the module's input width.
    x         FLOAT[] NOT NULL,
    -- VJP δ = dLoss/d(module output) at the position, raw sign; its length is the module's output width.
    delta     FLOAT[] NOT NULL
);
