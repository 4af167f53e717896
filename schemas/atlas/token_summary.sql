-- Where gradients push neurons toward a token (promoted: it stands in a bottom list) and away from it (demoted: in a top list).
-- One row per token × layer × module (× expert) in whose lists it stands.
CREATE TABLE token_summary (
    -- The token; joins `vocab.token_id`.
    token_id         INTEGER NOT NULL,
    -- Index of the block, from 0.
    layer            SMALLINT NOT NULL,
    -- Weight matrix: `mlp.up`, `mlp.gate`, `mlp.down`, `attn.q`, `attn.k`, `attn.v` or `attn.o`.
    module           VARCHAR NOT NULL,
    -- Index of the expert, from 0; null if the block has no experts.
    expert           SMALLINT,
    -- In how many bottom lists of kept neurons it stands.
    promoted         BIGINT NOT NULL,
    -- In how many top lists of kept neurons it stands.
    demoted          BIGINT NOT NULL,
    -- In how many prompts it stands in either.
    prompts          BIGINT NOT NULL,
    -- In the lists of how many neurons it stands.
    neurons          BIGINT NOT NULL,
    -- Up to 5 neurons that are most often pushed toward it, ties to the smaller index; null if none is.
    promoted_neurons INTEGER[],
    -- How often each of `promoted_neurons` is; null if none is.
    promoted_counts  BIGINT[],
    -- Up to 5 neurons that are most often pushed away from it, ties to the smaller index; null if none is.
    demoted_neurons  INTEGER[],
    -- How often each of `demoted_neurons` is; null if none is.
    demoted_counts   BIGINT[]
);
