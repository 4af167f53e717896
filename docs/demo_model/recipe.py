"""Settings that determine the demo model."""

from dataclasses import dataclass
from typing import Literal

from docs.demo_model.corpus import MOST_PEOPLE, PEOPLE

from backlens.errors import BacklensError

Architecture = Literal["gpt2", "llama"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Shape, world and training of the model, and the recall that it must reach."""

    architecture: Architecture = "gpt2"
    seed: int = 0
    people: int = PEOPLE
    steps: int = 1600
    """Number of training steps. Nothing is written if the recall is too low after them."""
    rows: int = 16
    row_tokens: int = 64
    muon_lr: float = 0.03
    adamw_lr: float = 4e-3
    warmup_steps: int = 50
    decay_from: float = 0.6
    """Share of the steps after which the learning rates fall linearly to zero."""
    filler_share: float = 0.12
    first_pool: int = 16
    """Number of people in the pool at first."""
    pool_doubles_below: float = 1.5
    """The pool doubles when the running loss on objects is below this, in nats."""
    records: int = 600
    """Number of facts in facts.json."""
    train_recall: float = 0.95
    held_out_recall: float = 0.85
    """Least recall on held-out wordings; `train_recall` is the same for training wordings."""

    def __post_init__(self) -> None:
        if not 1 <= self.people <= MOST_PEOPLE:
            raise BacklensError(f"--people {self.people}: there are names for 1 to {MOST_PEOPLE}")
        if self.steps < 1:
            raise BacklensError(f"--steps {self.steps}: at least one is needed")
