"""The bundled demo: a small model that knows invented facts, and those facts in CounterFact's format."""

from pathlib import Path

MODEL: Path = Path(__file__).parent / "model"
"""A Hugging Face model folder: weights, configuration, tokenizer, model card."""

NAME = "the backlens demo model"

FACTS: Path = Path(__file__).parent / "facts.json"
"""CounterFact records about people that MODEL knows."""
