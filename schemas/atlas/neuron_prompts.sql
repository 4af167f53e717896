-- The rows of `neurons` without their lists, sorted by neuron.
-- One row per kept neuron of a prompt × layer × module (× expert).
CREATE TABLE neuron_prompts (
    -- Index of the block, from 0.
    layer         SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module        VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert        SMALLINT,
    -- Index of the unit on the side of the module that is not the residual one, from 0.
    neuron        INTEGER NOT NULL,
    -- Ordinal of the prompt in the input, from 0; joins `prompts.prompt_id`.
    prompt_id     BIGINT NOT NULL,
    -- L2 norm of the neuron's gradient vector for that prompt.
    grad_norm     FLOAT NOT NULL,
    -- The position that contributes most to the gradient vector.
    main_position INTEGER NOT NULL,
    -- The target's lens score of the vector, in logits; null if it is zero.
    target_score  FLOAT,
    -- The target's rank by that score, 0 = largest; null if the vector is zero.
    target_rank   INTEGER
);
