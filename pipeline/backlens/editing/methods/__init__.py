"""Methods that write facts into a model, and how options become a method.

All methods have one interface: `method(model, request, …) -> deltas`; several requests are edited together. What
methods of one model share is measured once; then each point of a grid is made quickly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from backlens.editing.activations import Moments, measure, model_digest, read_texts
from backlens.editing.delta import Delta
from backlens.editing.evaluate import sample_prefixes
from backlens.editing.methods.forward_shift import MODULE, ForwardShift
from backlens.editing.methods.gradient import FineTune, GradientShift
from backlens.editing.methods.mend import Editor, Mend
from backlens.editing.methods.rome_memit import Memit, Rome, Search
from backlens.editing.options import EditOptions, MethodName, Place
from backlens.editing.request import Request
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel


class Method(Protocol):
    """Computes the deltas that write all requests into the model. The model is left as it was."""

    def __call__(self, loaded: LoadedModel, *requests: Request) -> tuple[Delta, ...]: ...


@dataclass(frozen=True)
class SharedMeasurements:
    """Measurements that the methods of one model share."""

    moments: Moments | None
    prefixes: tuple[str, ...]
    editor: Editor | None


def refuse_missing(options: EditOptions, methods: Sequence[MethodName]) -> None:
    """Raise BacklensError, before a model is loaded, if a method needs a file that is not given."""
    if "mend" in methods and options.editor is None:
        raise BacklensError("--editor: mend needs the file of one; `backlens edit train-mend` trains it")
    measured = options.statistics is not None and Path(options.statistics).exists()
    if options.text is None and not measured and any(map(options.needs_moments, methods)):
        raise BacklensError(
            "--text: this method needs texts to measure the covariance of inputs over: give a file, one text per line "
            "(--statistics FILE keeps the result)"
        )


def measure_shared(
    options: EditOptions, loaded: LoadedModel, methods: Sequence[MethodName], layers: Sequence[int]
) -> SharedMeasurements:
    """Measure or read what the methods need, for the given layers and those below them that share an edit."""
    refuse_missing(options, methods)
    moments = None
    if any(map(options.needs_moments, methods)):
        spanned = sorted({each for layer in layers for each in spanned_layers(layer, options.span)})
        moments = _moments(options, loaded, spanned)
    wanted = options.editor if "mend" in methods else None
    editor = None if wanted is None else Editor.load(wanted, model_digest(loaded))
    return SharedMeasurements(moments, sample_prefixes(loaded, options.prefixes), editor)


def _moments(options: EditOptions, loaded: LoadedModel, layers: Sequence[int]) -> Moments:
    path, digest = options.statistics, model_digest(loaded)
    if path is not None and Path(path).exists():
        return Moments.load(path, digest)
    assert options.text is not None
    everywhere = range(len(loaded.parts.blocks)) if path is not None else layers
    moments = measure(loaded, read_texts(options.text), everywhere)
    if path is not None:
        moments.save(path, digest)
    return moments


def spanned_layers(layer: int, span: int) -> tuple[int, ...]:
    """The `span` layers that end with `layer`."""
    return tuple(range(max(0, layer - span + 1), layer + 1))


def make_method(
    options: EditOptions, shared: SharedMeasurements, name: MethodName, layer: int, lr: float | None
) -> Method:
    """The method at a layer, with its learning rate (None: its default).

    Raises BacklensError if it has no default rate, or if the editor does not fit the layer.
    """
    layers = spanned_layers(layer, options.span)
    at_subject: Place = "last" if options.place == "last" else "subject"
    if name == "forward-shift":
        return ForwardShift(
            layers,
            _rate(name, lr),
            options.normalise,
            "subject" if options.place == "subject" else "last",
            shared.prefixes,
            shared.moments,
            options.ridge,
            options.passes,
            options.contrast,
            options.temperature,
        )
    if name == "gradient-shift":
        halves = {"imprint": ("mlp.up", "mlp.gate"), "shift": (MODULE,)}
        return GradientShift(
            layers, _rate(name, lr), halves.get(options.halves, ("mlp.up", "mlp.gate", MODULE))
        )
    if name == "finetune":
        return FineTune(
            layers,
            FineTune.lr if lr is None else lr,
            steps=options.steps or FineTune.steps,
            limit=options.norm_limit,
        )
    if name == "mend":
        return _mend(shared, layer, lr)
    given = {"steps": options.steps, "lr": lr}
    search = replace(Search(), **{key: value for key, value in given.items() if value is not None})
    assert shared.moments is not None
    if name == "rome":
        return Rome(layer, shared.moments, shared.prefixes, at_subject, search)
    weight = Memit.weight if options.ridge is None else options.ridge
    return Memit(layers, shared.moments, weight, shared.prefixes, at_subject, search)


def _mend(shared: SharedMeasurements, layer: int, lr: float | None) -> Mend:
    assert shared.editor is not None
    layers = shared.editor.layers
    if layer != layers[-1]:
        raise BacklensError(
            f"layer {layer}: the editor changes layers {', '.join(map(str, layers))} together; name it by its last, "
            f"{layers[-1]}"
        )
    return Mend(shared.editor, 1.0 if lr is None else lr)


def _rate(name: str, lr: float | None) -> float:
    if lr is None:
        raise BacklensError(
            f"--lr: {name} has no rate that fits every model; `backlens edit sweep` finds one"
        )
    return lr
