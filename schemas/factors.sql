-- The gradients themselves, in factored form (`--save-factors`): over a prompt's positions, the sum of outer(x, delta) is the gradient of the loss with respect to W, for y = x W. Values are float16 or float32.
-- One row per prompt × layer × module (× expert) × position.
CREATE TABLE factors (
    -- The prompt: its ordinal in the input, from 0; joins `prompts.prompt_id`.
    prompt_id BIGINT NOT NULL,
    -- Index of the block, from 0.
    layer     SMALLINT NOT NULL,
    -- The weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module    VARCHAR NOT NULL,
    -- Index of the expert in a mixture-of-experts block, from 0; null where the block has no experts.
    expert    SMALLINT,
    -- Index of the token in the prompt, from 0; padding is never counted.
    position  INTEGER NOT NULL,
    -- The module's input at that position, of the module's input width.
    x         FLOAT[] NOT NULL,
    -- The VJP dLoss/d(module output) at that position, of the module's output width.
    delta     FLOAT[] NOT NULL
);
