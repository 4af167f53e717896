-- The prompts that were processed, and what the model predicts for them.
-- One row per prompt.
CREATE TABLE prompts (
    -- Ordinal of the prompt in the input, from 0; rejected records count too.
    prompt_id     BIGINT NOT NULL,
    -- Identifier that the input gives; null if it gives none.
    id            VARCHAR,
    -- Prompt as given.
    prompt        VARCHAR NOT NULL,
    -- Target as given.
    target        VARCHAR NOT NULL,
    -- Subject as given; null if the input names none.
    subject       VARCHAR,
    -- Relation as given; null if the input names none.
    relation      VARCHAR,
    -- Ids of the tokens that the model reads, with those of the chat template; item p is position p.
    token_ids     INTEGER[] NOT NULL,
    -- Ids of the target's tokens; the prompt's last space is in the first one where the tokenizer joins them. `--target-mode first` uses the first one only.
    target_ids    INTEGER[] NOT NULL,
    -- Number of tokens in the prompt: the length of `token_ids`.
    n_tokens      INTEGER NOT NULL,
    -- First position of the subject; null without a subject, or if the prompt lacks it in whole words.
    subject_start INTEGER,
    -- Position after the subject's last one; null if `subject_start` is null.
    subject_end   INTEGER,
    -- -log p(target | prompt), in nats, summed over the target tokens that are used; 0 or more.
    loss          FLOAT NOT NULL,
    -- p(target | prompt) = exp(-loss), of all target tokens that are used.
    target_prob   FLOAT NOT NULL,
    -- Number of tokens that are strictly more probable than the target's first token; 0 = predicted.
    target_rank   INTEGER NOT NULL,
    -- Id of the token that is most probable after the prompt.
    predicted_id  INTEGER NOT NULL,
    -- Other columns of the input, as a JSON object; null if there are none.
    meta          VARCHAR
);
