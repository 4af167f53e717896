-- What edits did (`backlens edit sweep`): one case under one trial, that is a method at a layer with a learning rate. The metrics are CounterFact's and zsRE's own.
-- One row per trial × case.
CREATE TABLE edits (
    -- Index of the trial in the sweep's grid, from 0.
    trial                  INTEGER NOT NULL,
    -- The case: its ordinal in the input, from 0; joins `prompts.prompt_id` of a run over the same file.
    prompt_id              BIGINT NOT NULL,
    -- The method, as `--method` names it.
    method                 VARCHAR NOT NULL,
    -- The layer edited; where an edit is spread over several (`--span`, mend), the last.
    layer                  SMALLINT NOT NULL,
    -- The learning rate η; null for the method's own default.
    lr                     DOUBLE,
    -- How many cases were edited into the model together, this one included.
    at_once                INTEGER NOT NULL,
    -- 1 if the new target is more probable than the true one; null if the case names no true target, and for zsRE.
    efficacy               FLOAT,
    -- Share (0 to 1) of paraphrases after which it is; null if the case names no true target, and for zsRE, or if there are no paraphrases.
    paraphrase             FLOAT,
    -- Share (0 to 1) of neighbourhood prompts after which the true target is more probable than the new one; null if the case names no true target, and for zsRE, or if there are none.
    neighbourhood          FLOAT,
    -- 1 if every token of the new target is the likeliest one; for zsRE the share of its tokens that are.
    efficacy_accuracy      FLOAT NOT NULL,
    -- The same, mean over paraphrases; null if there are none.
    paraphrase_accuracy    FLOAT,
    -- The same of the neighbourhood's own target, mean over its prompts; null if there are none.
    neighbourhood_accuracy FLOAT,
    -- p(new target | prompt) after the edit, of all its tokens.
    target_prob            FLOAT NOT NULL,
    -- Tokens more probable than the new target's first, after the edit.
    target_rank            INTEGER NOT NULL,
    -- p(new target | prompt) before the edit.
    target_prob_before     FLOAT NOT NULL,
    -- Tokens more probable than the new target's first, before.
    target_rank_before     INTEGER NOT NULL,
    -- Frobenius norm of all that was added to the weights.
    delta_norm             FLOAT NOT NULL,
    -- n-gram entropy of generated texts, in bits; null unless the sweep generates.
    entropy                FLOAT,
    -- TF-IDF cosine of generated and reference texts; null without reference texts.
    reference              FLOAT,
    -- Accuracy on facts never edited (`--untouched`), of the model with all these cases edited; null if not asked for.
    untouched              FLOAT,
    -- Of that model on `--held-out` texts, per token; null if not asked for.
    perplexity             FLOAT,
    -- Seconds to compute the change, by case (shared by those at once).
    seconds_edit           FLOAT NOT NULL,
    -- Seconds to put it in, evaluate, and restore, by case.
    seconds_evaluate       FLOAT NOT NULL
);
