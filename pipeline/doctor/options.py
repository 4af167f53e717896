"""What `backlens doctor` is told: some of a run's options, in the same words."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from cyclopts import Parameter

from pipeline.config import LENS, MODEL, PROMPTS, Dtype, PromptFormat, RunConfig, Vocabulary


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """A model, how to load it, and prompts to try it on."""

    model: Annotated[str | None, MODEL] = None
    """A model directory or hub id. Default: the bundled demo model."""
    revision: Annotated[str | None, MODEL] = None
    """A branch, tag or commit of a hub model."""
    dtype: Annotated[Dtype, MODEL] = "auto"
    """The weights' type; auto is the checkpoint's own. Norms, lens and ranks are float32 in any case."""
    attention: Annotated[Literal["exact", "fast"], MODEL] = "exact"
    """exact: rows do not depend on batch or padding. fast: the model's own fused kernels."""
    trust_remote_code: Annotated[bool, MODEL] = False
    """Run the Python code that a model brings with it."""
    allow_pickle: Annotated[bool, MODEL] = False
    """Read pickle weights (pytorch_model.bin) where there are no safetensors; pickles can run code."""
    anatomy: Annotated[str | None, MODEL] = None
    """A YAML description of the model's blocks, for an architecture that is not known here."""

    prompts: Annotated[str | None, PROMPTS] = None
    """A file or URL, a saved dataset's folder, or a hub dataset id; the first few are tried. Default: short texts."""
    format: Annotated[PromptFormat, PROMPTS] = "auto"
    """How to read it; auto goes by the file's name and content."""
    prompt_field: Annotated[str | None, PROMPTS] = None
    """The column of the prompt."""
    target_field: Annotated[str | None, PROMPTS] = None
    """The column of the target (CounterFact: target_new or target_true)."""
    prepend_bos: Annotated[Literal["auto", "true", "false"], PROMPTS] = "auto"
    """Begin with the tokenizer's beginning-of-sequence token; auto does as the tokenizer or template does."""
    chat_template: Annotated[bool, PROMPTS] = False
    """Put the prompt as a user's message in the tokenizer's chat template; the target begins the answer."""

    vocabulary: Annotated[Vocabulary, LENS] = "tokenizer"
    """Which rows of the unembedding are in lists and ranks. tokenizer: those that are tokens. model: every row."""

    def as_run(self) -> RunConfig:
        """The run that would be told the same."""
        return RunConfig(**{field.name: getattr(self, field.name) for field in fields(self)})
