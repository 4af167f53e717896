"""Editing facts: low-rank changes of weight matrices, by several methods, with the evaluation of the literature."""
