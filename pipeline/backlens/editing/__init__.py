"""Editing facts: low-rank changes of weight matrices, made by several methods and judged as the literature does."""
