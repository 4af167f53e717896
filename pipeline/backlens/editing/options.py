"""Options of `backlens edit` and its subcommands."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self, get_args

from cyclopts import Group, Parameter

from backlens.config import MODEL, PROMPTS, WHOLE, Dtype
from backlens.errors import BacklensError, nearest

Normalise = Literal["none", "length", "covariance"]
Place = Literal["last", "subject"]
MethodName = Literal["forward-shift", "gradient-shift", "finetune", "rome", "memit", "mend"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
METHOD = Parameter(group=Group("Method", sort_key=3))
STATISTICS = Parameter(group=Group("Statistics", sort_key=4))


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class EditInput:
    """The model and the edits."""

    model: Annotated[str | None, MODEL] = None
    """A model directory or hub id. Default: the bundled demo model."""
    revision: Annotated[str | None, MODEL] = None
    """A branch, tag or commit of a hub model."""
    dtype: Annotated[Dtype, MODEL] = "auto"
    """Type of the weights; auto is the type in the checkpoint."""
    trust_remote_code: Annotated[bool, MODEL] = False
    """Run Python code from the model's own files."""

    edits: Annotated[str | None, PROMPTS] = None
    """A file of edits: CounterFact, zsRE, JSON Lines, or an array of such objects. Default: the demo's facts."""
    format: Annotated[Literal["auto", "counterfact", "zsre", "jsonl", "json"], PROMPTS] = "auto"
    """Format of the file; auto goes by its name and content."""
    limit: Annotated[int | None, PROMPTS, WHOLE] = None
    """Only the first N edits."""

    def with_demo_defaults(self) -> Self:
        """The options with the bundled model and facts where no model is named.

        Raises BacklensError for a model without edits.
        """
        from backlens.demo import FACTS, MODEL

        if self.model is not None and self.edits is None:
            raise BacklensError("--edits: name a file of edits, or give one with --prompt and --target-new")
        return replace(self, model=self.model or str(MODEL), edits=self.edits or str(FACTS))


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class EditOptions(EditInput):
    """Options that a single edit and a sweep share."""

    normalise: Annotated[Normalise, METHOD] = "none"
    """forward-shift: the key that η multiplies. none: the input x, as in the paper. length: x / ‖x‖². covariance: the
    key with the least effect on other inputs."""
    place: Annotated[Literal["auto", "last", "subject"], METHOD] = "auto"
    """Position whose input is the key: the prompt's last (auto for forward-shift) or the subject's last (auto for rome
    and memit)."""
    prefixes: Annotated[int, METHOD, WHOLE] = 0
    """forward-shift, rome, memit: number of sampled texts before the prompt; keys and values are means over them."""
    ridge: Annotated[float | None, METHOD] = None
    """forward-shift: solve for all edits together; λ tokens of the text weigh as much as one edit. memit: its λ."""
    passes: Annotated[int, METHOD, WHOLE] = 1
    """forward-shift: number of passes over the edits. Each pass shifts an edit by what its target still lacks."""
    contrast: Annotated[bool, METHOD] = False
    """forward-shift: also subtract the embeddings of the tokens that the model expects, by their probability."""
    temperature: Annotated[float, METHOD] = 1.0
    """forward-shift, passes and contrast: above 1, an edit continues until its target leads by more."""
    span: Annotated[int, METHOD, WHOLE] = 1
    """Number of layers that share an edit: the given one and those directly below it."""
    halves: Annotated[Literal["both", "imprint", "shift"], METHOD] = "both"
    """gradient-shift: imprint changes FF1 (mlp.up, mlp.gate), shift changes FF2 (mlp.down)."""
    steps: Annotated[int | None, METHOD, WHOLE] = None
    """finetune (default 25), rome and memit (default 20): steps of gradient descent."""
    norm_limit: Annotated[float | None, METHOD] = None
    """finetune: limit on the change of every weight (L∞)."""

    statistics: Annotated[str | None, STATISTICS] = None
    """A file of covariances. If it does not exist, they are measured over --text and written to it."""
    text: Annotated[str | None, STATISTICS] = None
    """Texts to measure covariances over: one per line, or JSON Lines with a field `text`."""
    editor: Annotated[str | None, METHOD] = None
    """mend: a file that `backlens edit train-mend` wrote."""

    def __post_init__(self) -> None:
        """Raises BacklensError naming the flag and the values it takes."""
        for name, value in (
            ("passes", self.passes),
            ("span", self.span),
            ("limit", self.limit),
            ("steps", self.steps),
        ):
            if value is not None and value < 1:
                raise BacklensError(f"--{name} {value}: give 1 or more")
        if self.temperature <= 0:
            raise BacklensError(f"--temperature {self.temperature}: give more than 0")
        if self.prefixes < 0:
            raise BacklensError(f"--prefixes {self.prefixes}: give 0 or more")

    def needs_moments(self, method: MethodName) -> bool:
        """True if the method needs the covariance of inputs, with these options."""
        solved = self.ridge is not None or self.normalise == "covariance"
        return method in ("rome", "memit") or (method == "forward-shift" and solved)


TRAINING = Parameter(group=Group("Training", sort_key=4))


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class MendOptions(EditInput):
    """Training of MEND's editor."""

    text: Annotated[str | None, PROMPTS] = None
    """Texts whose next tokens edits should not change: one per line, or JSON Lines with a field `text`."""

    layers: Annotated[str | None, TRAINING] = None
    """Layers whose feed-forward matrices the editor changes, e.g. "5-7". Default: the last three."""
    rank: Annotated[int, TRAINING, WHOLE] = 64
    """Rank of the editor's products U V."""
    steps: Annotated[int, TRAINING, WHOLE] = 500
    """Steps of Adam."""
    batch: Annotated[int, TRAINING, WHOLE] = 8
    """Edits per step."""
    lr: Annotated[float, TRAINING] = 3e-3
    """Adam's learning rate; it falls linearly to zero."""
    locality: Annotated[float, TRAINING] = 1.0
    """Weight of the loss of locality (KL) beside the loss of the edit."""

    def __post_init__(self) -> None:
        """Raises BacklensError naming the flag and the values it takes."""
        numbers = (("rank", self.rank), ("steps", self.steps), ("batch", self.batch))
        for name, value in numbers:
            if value < 1:
                raise BacklensError(f"--{name} {value}: give 1 or more")


def parse_method(text: str) -> MethodName:
    """The name of a method. Raises BacklensError for another text."""
    if text not in METHODS:
        raise BacklensError(f"--method {text}: there are {', '.join(METHODS)}{nearest(text, METHODS)}")
    return text  # pyright: ignore[reportReturnType]
