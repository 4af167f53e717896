"""Everything a run is told. One frozen dataclass is the command line, the YAML file and the replay file."""

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PromptFormat = Literal["auto", "jsonl", "csv", "parquet", "counterfact", "zsre", "dataset"]


@dataclass(frozen=True, slots=True)
class PromptFields:
    """Which columns of the input hold what. None means the format's own default name."""

    prompt: str | None = None
    target: str | None = None
    subject: str | None = None
    id: str | None = None
