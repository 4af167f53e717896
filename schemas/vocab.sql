-- The vocabulary: the text of every token id in the other tables.
-- One row per token that lists and ranks cover: the tokenizer's, or every row (`--vocabulary model`).
CREATE TABLE vocab (
    -- Id of the token in the model's tokenizer.
    token_id INTEGER NOT NULL,
    -- Text of the token, with its leading space; U+FFFD stands for bytes that are not UTF-8.
    token    VARCHAR NOT NULL,
    -- Exact bytes of the token.
    bytes    BLOB NOT NULL
);
