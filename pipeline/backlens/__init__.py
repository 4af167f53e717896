"""backlens: gradients of language models, projected to the vocabulary, at scale."""

__version__ = "0.1.0"
