-- The tokenizer's vocabulary: the text behind every token id in the other tables.
-- One row per token of the model's vocabulary.
CREATE TABLE vocab (
    -- The token's id in the model's tokenizer.
    token_id INTEGER NOT NULL,
    -- The token decoded to text, leading space included; bytes that are not UTF-8 show as U+FFFD.
    token    VARCHAR NOT NULL,
    -- The token's exact bytes.
    bytes    BLOB NOT NULL
);
