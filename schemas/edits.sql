-- The results of edits (`backlens edit sweep`): one case under one trial. A trial is a method at a layer with a learning rate. The metrics are those of CounterFact and zsRE.
-- One row per trial × case.
CREATE TABLE edits (
    -- Index of the trial in the grid of the sweep, from 0.
    trial                  INTEGER NOT NULL,
    -- Ordinal of the case in the input, from 0; joins `prompts.prompt_id` of a run over the same file.
    prompt_id              BIGINT NOT NULL,
    -- Method, by its name in `--method`.
    method                 VARCHAR NOT NULL,
    -- Edited layer, from 0; the last one if the edit changes several (`--span`, mend).
    layer                  SMALLINT NOT NULL,
    -- Learning rate η; null if the method uses its own default.
    lr                     DOUBLE,
    -- Number of cases that are edited together, this case included.
    at_once                INTEGER NOT NULL,
    -- 1 if the new target is more probable than the true one after the prompt, else 0; null if the case has no true target, and for zsRE.
    efficacy               FLOAT,
    -- Share of paraphrases (0 to 1) after which the new target is more probable than the true one; null if the case has no true target, and for zsRE; null if the case has no such prompts.
    paraphrase             FLOAT,
    -- Share of neighbourhood prompts (0 to 1) after which the true target is more probable than the new one; null if the case has no true target, and for zsRE; null if the case has no such prompts.
    neighbourhood          FLOAT,
    -- 1 if every token of the new target is the most probable one, else 0; for zsRE, the share that are.
    efficacy_accuracy      FLOAT NOT NULL,
    -- The same accuracy, mean over paraphrases (0 to 1); null if the case has no such prompts.
    paraphrase_accuracy    FLOAT,
    -- The same accuracy for the neighbourhood's own target, mean over its prompts (0 to 1); null if the case has no such prompts.
    neighbourhood_accuracy FLOAT,
    -- p(new target | prompt) after the edit, of all its tokens.
    target_prob            FLOAT NOT NULL,
    -- Number of tokens more probable than the new target's first token, after the edit; 0 = predicted.
    target_rank            INTEGER NOT NULL,
    -- `target_prob` before the edit.
    target_prob_before     FLOAT NOT NULL,
    -- `target_rank` before the edit.
    target_rank_before     INTEGER NOT NULL,
    -- Frobenius norm of the whole change of the weights.
    delta_norm             FLOAT NOT NULL,
    -- n-gram entropy of generated texts, in bits; null if the sweep generates none.
    entropy                FLOAT,
    -- Cosine of TF-IDF vectors of generated and reference texts; null if there are no such texts.
    reference              FLOAT,
    -- Accuracy (0 to 1) on facts that nothing edits (`--untouched`), with all cases of the group edited; null if the sweep does not measure it, or edits one case at a time.
    untouched              FLOAT,
    -- Perplexity per token of `--held-out` texts; null if the sweep does not measure it, or edits one case at a time.
    perplexity             FLOAT,
    -- Seconds per case to compute the change.
    seconds_edit           FLOAT NOT NULL,
    -- Seconds per case to apply the change, evaluate and restore.
    seconds_evaluate       FLOAT NOT NULL
);
