-- The prompts that could not be processed; every input prompt is here or in `prompts`, never in both.
-- One row per prompt that could not be processed.
CREATE TABLE failures (
    -- Ordinal of the prompt in the input, from 0.
    prompt_id BIGINT NOT NULL,
    -- Where it failed: `read`, `tokenize` or `compute`.
    stage     VARCHAR NOT NULL,
    -- A short, stable code such as `missing-field`.
    error     VARCHAR NOT NULL,
    -- One line: what is wrong, where, and what to do.
    message   VARCHAR NOT NULL
);
