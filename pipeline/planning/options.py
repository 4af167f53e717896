"""What `backlens plan` is told beside a run's options."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Group, Parameter

from pipeline.config import WHOLE
from pipeline.errors import BacklensError

PLAN = Parameter(group=Group("Plan", sort_key=0))


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The machines, and prompts that are not there yet."""

    cluster: Annotated[str | None, PLAN] = None
    """A YAML description of the machines, such as docs/h100.yaml. Default: this one."""
    prompt_count: Annotated[int | None, PLAN, WHOLE] = None
    """Plan for so many prompts instead of reading any; needs no tokenizer."""
    prompt_tokens: Annotated[str, PLAN] = "12"
    """With --prompt-count, a prompt's tokens: a number, or a range such as "8-16"."""
    calibrate: Annotated[bool, PLAN] = False
    """Time a few blocks with random weights on this machine instead of reckoning with its speed."""

    def __post_init__(self) -> None:
        """Raises BacklensError naming the flag and the values it takes."""
        if self.prompt_count is not None and self.prompt_count < 1:
            raise BacklensError(f"--prompt-count {self.prompt_count}: give 1 or more")
        if self.calibrate and self.cluster is not None:
            raise BacklensError("--calibrate is of this machine: leave out --cluster")
