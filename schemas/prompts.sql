-- The prompts that were processed, and what the model made of them.
-- One row per prompt.
CREATE TABLE prompts (
    -- Ordinal of the prompt in the input, from 0; rejected lines count too.
    prompt_id     BIGINT NOT NULL,
    -- The input's own identifier; null if it has none.
    id            VARCHAR,
    -- The prompt as given.
    prompt        VARCHAR NOT NULL,
    -- The target as given.
    target        VARCHAR NOT NULL,
    -- The subject as given; null if the input names none.
    subject       VARCHAR,
    -- The relation as given; null if the input names none.
    relation      VARCHAR,
    -- The prompt's tokens as the model saw them, the chat template's included; position p is item p.
    token_ids     INTEGER[] NOT NULL,
    -- The target's tokens, the prompt's last space included where the tokenizer joins them; under `--target-mode first` only the first is used.
    target_ids    INTEGER[] NOT NULL,
    -- Number of tokens in the prompt, the length of `token_ids`.
    n_tokens      INTEGER NOT NULL,
    -- First position of the subject; null if there is no subject or it is not found in the prompt.
    subject_start INTEGER,
    -- Position after the subject's last one (half-open); null where `subject_start` is.
    subject_end   INTEGER,
    -- -log p(target | prompt) in nats, summed over the target's tokens that are used.
    loss          FLOAT NOT NULL,
    -- p(target | prompt) = exp(-loss): of all the target tokens that are used.
    target_prob   FLOAT NOT NULL,
    -- Number of tokens more probable than the target's first, 0 = predicted.
    target_rank   INTEGER NOT NULL,
    -- The token the model finds most probable after the prompt.
    predicted_id  INTEGER NOT NULL,
    -- The input's other columns as a JSON object; null if there are none.
    meta          VARCHAR
);
