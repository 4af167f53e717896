"""The paper's figures from a run, with matplotlib (the extra `plot`)."""
