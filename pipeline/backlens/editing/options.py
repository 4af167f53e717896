"""What `backlens edit` is told."""

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
    """Which model, and which edits."""

    model: Annotated[str | None, MODEL] = None
    """A model directory or hub id. Default: the bundled demo model."""
    revision: Annotated[str | None, MODEL] = None
    """A branch, tag or commit of a hub model."""
    dtype: Annotated[Dtype, MODEL] = "auto"
    """The weights' type; auto is the checkpoint's own."""
    trust_remote_code: Annotated[bool, MODEL] = False
    """Run the Python code that a model brings with it."""

    edits: Annotated[str | None, PROMPTS] = None
    """A file of edits: CounterFact, zsRE, JSON Lines, or an array of such objects. Default: the demo's facts."""
    format: Annotated[Literal["auto", "counterfact", "zsre", "jsonl", "json"], PROMPTS] = "auto"
    """How to read it; auto goes by the file's name and content."""
    limit: Annotated[int | None, PROMPTS, WHOLE] = None
    """Only the first N edits."""

    def with_demo_defaults(self) -> Self:
        from backlens.demo import FACTS, MODEL

        if self.model is not None and self.edits is None:
            raise BacklensError("--edits: name a file of edits, or give one with --prompt and --target-new")
        return replace(self, model=self.model or str(MODEL), edits=self.edits or str(FACTS))


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class EditOptions(EditInput):
    """Options that a single edit and a sweep share."""

    normalise: Annotated[Normalise, METHOD] = "none"
    """forward-shift: what η multiplies. none: the input x itself, as in the paper. length: x / ‖x‖². covariance: the
    key that other inputs respond to least."""
    place: Annotated[Literal["auto", "last", "subject"], METHOD] = "auto"
    """Whose input is the key: the prompt's last position (auto of forward-shift) or the subject's (rome, memit)."""
    prefixes: Annotated[int, METHOD, WHOLE] = 0
    """forward-shift, rome, memit: sampled texts before the prompt over which keys and values are averaged."""
    ridge: Annotated[float | None, METHOD] = None
    """forward-shift: solve for all edits together, λ tokens of the text weighing as much as one edit. memit: its λ."""
    passes: Annotated[int, METHOD, WHOLE] = 1
    """forward-shift: go over the edits again, each shifted by how much of its target is missing."""
    contrast: Annotated[bool, METHOD] = False
    """forward-shift: take away what the model expects, as much as it expects it, while the target is added."""
    temperature: Annotated[float, METHOD] = 1.0
    """forward-shift, passes and contrast: above 1, an edit goes on until its target wins by more."""
    span: Annotated[int, METHOD, WHOLE] = 1
    """Layers that an edit is spread over: the given one and those right below it."""
    halves: Annotated[Literal["both", "imprint", "shift"], METHOD] = "both"
    """gradient-shift: imprint changes FF1 (mlp.up, mlp.gate), shift changes FF2 (mlp.down)."""
    steps: Annotated[int | None, METHOD, WHOLE] = None
    """finetune (25), rome and memit (20): steps of gradient descent."""
    norm_limit: Annotated[float | None, METHOD] = None
    """finetune: the most that any weight may change (L∞)."""

    statistics: Annotated[str | None, STATISTICS] = None
    """A file of covariances: read if it is there, else measured over --text and written."""
    text: Annotated[str | None, STATISTICS] = None
    """Texts to measure covariances over, one a line, or JSON Lines with a field `text`."""
    editor: Annotated[str | None, METHOD] = None
    """mend: the file that `backlens edit train-mend` wrote."""

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
        solved = self.ridge is not None or self.normalise == "covariance"
        return method in ("rome", "memit") or (method == "forward-shift" and solved)


TRAINING = Parameter(group=Group("Training", sort_key=4))


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class MendOptions(EditInput):
    """How MEND's editor is trained, and on what."""

    text: Annotated[str | None, PROMPTS] = None
    """Texts whose next tokens edits should leave alone, one a line, or JSON Lines with a field `text`."""

    layers: Annotated[str | None, TRAINING] = None
    """Whose feed-forward matrices the editor changes, e.g. "5-7". Default: the last three."""
    rank: Annotated[int, TRAINING, WHOLE] = 64
    """Of the editor's products U V."""
    steps: Annotated[int, TRAINING, WHOLE] = 500
    """Steps of Adam."""
    batch: Annotated[int, TRAINING, WHOLE] = 8
    """Edits in a step."""
    lr: Annotated[float, TRAINING] = 3e-3
    """Adam's rate; it falls to zero along a line."""
    locality: Annotated[float, TRAINING] = 1.0
    """Weight of what edits should leave alone (KL) beside what they should do."""

    def __post_init__(self) -> None:
        """Raises BacklensError naming the flag and the values it takes."""
        numbers = (("rank", self.rank), ("steps", self.steps), ("batch", self.batch))
        for name, value in numbers:
            if value < 1:
                raise BacklensError(f"--{name} {value}: give 1 or more")


def parse_method(text: str) -> MethodName:
    if text not in METHODS:
        raise BacklensError(f"--method {text}: there are {', '.join(METHODS)}{nearest(text, METHODS)}")
    return text  # pyright: ignore[reportReturnType]
