-- The prompts that could not be processed. Every input prompt is either here or in `prompts`.
-- One row per prompt that could not be processed.
CREATE TABLE failures (
    -- Ordinal of the prompt in the input, from 0.
    prompt_id BIGINT NOT NULL,
    -- Stage that failed: `read`, `tokenize` or `compute`.
    stage     VARCHAR NOT NULL,
    -- Short, stable code of the error, such as `missing-field`.
    error     VARCHAR NOT NULL,
    -- One line that says what is wrong, where, and what to do.
    message   VARCHAR NOT NULL
);
