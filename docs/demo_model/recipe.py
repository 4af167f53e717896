"""Everything that decides which demo model is made."""

from dataclasses import dataclass
from typing import Literal

from docs.demo_model.corpus import MOST_PEOPLE, PEOPLE

from backlens.errors import BacklensError

Architecture = Literal["gpt2", "llama"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The shape, the world, the training, and what it has to reach."""

    architecture: Architecture = "gpt2"
    seed: int = 0
    people: int = PEOPLE
    steps: int = 1600
    """The cap: if the facts are not known by then, nothing is written."""
    rows: int = 16
    row_tokens: int = 64
    muon_lr: float = 0.03
    adamw_lr: float = 4e-3
    warmup_steps: int = 50
    decay_from: float = 0.6
    """The share of the steps after which the learning rates fall linearly to zero."""
    filler_share: float = 0.12
    first_pool: int = 16
    """People the text starts with."""
    pool_doubles_below: float = 1.5
    """Running loss on objects below which the pool doubles."""
    records: int = 600
    """Facts written to facts.json."""
    train_recall: float = 0.95
    held_out_recall: float = 0.85
    """The least that is worth shipping."""

    def __post_init__(self) -> None:
        if not 1 <= self.people <= MOST_PEOPLE:
            raise BacklensError(f"--people {self.people}: there are names for 1 to {MOST_PEOPLE}")
        if self.steps < 1:
            raise BacklensError(f"--steps {self.steps}: at least one is needed")
