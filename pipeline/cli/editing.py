"""`backlens edit`: one edit or a file of them, sweeps, and what an edit is made of."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from pipeline.cli.terminal import say
from pipeline.config import WHOLE, WHOLE_OR_AUTO
from pipeline.editing.options import EditOptions, MendOptions, MethodName, parse_method
from pipeline.errors import BacklensError

app = App(name="edit", help="Change facts in a model's weights, and judge the change.")
Debug = Annotated[bool, Parameter(negative=(), help="Show the traceback of an error.")]
DEFAULTS = EditOptions()
MEND_DEFAULTS = MendOptions()


@app.default
def edit(
    *,
    method: str = "forward-shift",
    layer: int | None = None,
    lr: float | None = None,
    prompt: str | None = None,
    subject: str | None = None,
    target_new: str | None = None,
    target_true: str | None = None,
    save_delta: str | None = None,
    save_model: str | None = None,
    options: EditOptions = DEFAULTS,
    debug: Debug = False,
) -> int:
    """Write one fact, or a file of them at once, into a model; print it before and after, and save the change.

    Example: backlens edit --limit 1 --layer 5 --lr 1.6 --save-delta edit.safetensors

    Parameters
    ----------
    method
        forward-shift, gradient-shift, finetune, rome, memit or mend.
    layer
        The layer to edit. Default: at 7/10 of the model's depth; of mend the last that its editor changes.
    lr
        The learning rate η; forward-shift and gradient-shift need one (see `backlens edit sweep`).
    prompt
        Instead of a file: the prompt, {} standing for the subject.
    subject
        With --prompt: the subject.
    target_new
        With --prompt: what the model should say.
    target_true
        With --prompt: what it says now.
    save_delta
        A safetensors file for the low-rank change.
    save_model
        A folder for the edited model.
    """
    name = parse_method(method)
    typed = prompt is not None or target_new is not None
    if typed:
        _check_typed(prompt, subject, target_new)
    else:
        options = options.with_demo_defaults()
    from pipeline.cli.edit_report import print_edit
    from pipeline.editing.loading import load, load_editable, model_source
    from pipeline.editing.tools import make_method, make_tools

    if typed:
        request = _typed(prompt, subject, target_new, target_true)
        options = replace(options, model=options.model or _demo())
        loaded, requests = load_editable(model_source(options)), [request]
    else:
        loaded, requests = load(options, _noted)
    chosen = default_layer(len(loaded.anatomy.blocks)) if layer is None else layer
    tools = make_tools(options, loaded, [name], [chosen])
    if layer is None and tools.editor is not None:
        chosen = tools.editor.layers[-1]
    made = make_method(options, tools, name, chosen, lr)
    about = {"method": name, "layer": chosen, "lr": lr, "model": options.model or "demo"}
    print_edit(loaded, requests, made, about, save_delta, save_model)
    return 0


@app.command
def apply(delta: str, /, *, save_model: str, options: EditOptions = DEFAULTS, debug: Debug = False) -> int:
    """Add a saved delta to its model and save the result.

    Example: backlens edit apply edit.safetensors --save-model ./edited
    """
    from pipeline.cli.edit_report import save_edited
    from pipeline.editing.delta import load_deltas
    from pipeline.editing.loading import load_editable, model_source
    from pipeline.editing.weights import edited

    deltas, _ = load_deltas(delta)
    loaded = load_editable(model_source(replace(options, model=options.model or _demo())))
    with edited(loaded, deltas):
        save_edited(loaded, save_model)
    return 0


@app.command
def sweep(
    out: str,
    /,
    *,
    methods: str = "forward-shift",
    layers: str = "all",
    lr: str | None = None,
    at_once: str = "1",
    untouched: str | None = None,
    held_out: str | None = None,
    generate: Annotated[bool, Parameter(negative=())] = False,
    executor: Literal["local", "ray"] = "local",
    workers: Annotated[int | Literal["auto"], WHOLE_OR_AUTO, Parameter(name=("--workers", "--replicas"))] = 1,
    gpus_per_replica: Annotated[int | None, WHOLE] = None,
    address: str | None = None,
    options: EditOptions = DEFAULTS,
    debug: Debug = False,
) -> int:
    """Try every method at every layer with every rate on every case; the same command resumes a stopped sweep.

    Results are the table `edits` of the directory OUT (see `backlens query` and `backlens plot edits`).

    Example: backlens edit sweep ./sweep --layers 3-6 --lr 0.8,1.6,3.2 --limit 100

    Parameters
    ----------
    out
        The directory for the results.
    methods
        Names of methods, separated by commas.
    layers
        all, or layers such as "3-6,8"; each is tried by itself (with --span, as the last of several).
    lr
        Learning rates, separated by commas; none for the method's own default.
    at_once
        How many cases are edited into the model together, e.g. "1,10,100".
    untouched
        A file of prompts and targets that no case edits (any format of `backlens run`): their accuracy with several
        cases at once.
    held_out
        A file of texts, one a line: their perplexity with several cases at once.
    generate
        Let the edited model write, for the n-gram entropy and the reference score.
    executor
        local: this process. ray: workers on a cluster, which read --model, --text, --statistics and --editor by
        themselves.
    workers
        Copies of the model that work side by side (ray); auto: as many as the cluster holds.
    gpus_per_replica
        GPUs that each asks for (ray). Default: 1 if the cluster has any.
    address
        A running Ray cluster. Default: $RAY_ADDRESS, else one on this machine for the length of the sweep.
    """
    names: tuple[MethodName, ...] = tuple(parse_method(each.strip()) for each in methods.split(","))
    rates: tuple[float | None, ...] = (None,) if lr is None else _numbers("lr", lr)
    for name in names:
        if lr is None and name in ("forward-shift", "gradient-shift"):
            raise BacklensError(f"--lr: {name} needs rates to try, e.g. --lr 0.4,0.8,1.6")
    counts = tuple(int(each) for each in _numbers("at-once", at_once))
    if any(each < 1 for each in counts):
        raise BacklensError(f"--at-once {at_once}: give numbers of 1 or more")
    if executor == "local" and (workers != 1 or address is not None):
        raise BacklensError(
            "--executor local runs in this process; use --executor ray with --workers or --address"
        )
    options = options.with_demo_defaults()
    from pipeline.cli.edit_report import print_sweep
    from pipeline.editing.drive import Reports, Side
    from pipeline.editing.drive import sweep as run_sweep
    from pipeline.editing.grid import Grid
    from pipeline.editing.loading import model_source
    from pipeline.engine.executors import RayOptions
    from pipeline.engine.plan import parse_layers
    from pipeline.models.load import load_config

    depth = int(load_config(model_source(replace(options, model=options.model or _demo()))).num_hidden_layers)
    grid = Grid(names, parse_layers(layers, depth), rates, counts)
    ray = RayOptions(address, workers, gpus_per_replica) if executor == "ray" else None
    side = Side(untouched, held_out, generate)
    swept = run_sweep(options, grid, side, out, Reports(_told, _noted), ray)
    print_sweep(swept)
    return 0


@app.command(name="train-mend")
def train_mend(editor: str, /, *, training: MendOptions = MEND_DEFAULTS, debug: Debug = False) -> int:
    """Train MEND's editor on a file of edits and save it, for --method mend --editor FILE.

    Keep some edits out of that file to judge it by.

    Example: backlens edit train-mend editor.safetensors --edits train.json --text texts.txt --layers 5-7
    """
    training = training.with_demo_defaults()
    from pipeline.editing.covariance import model_digest, read_texts
    from pipeline.editing.loading import load
    from pipeline.editing.mend_train import Training, train
    from pipeline.engine.plan import parse_layers

    loaded, requests = load(training, _noted)
    depth = len(loaded.anatomy.blocks)
    layers = parse_layers(training.layers or f"{max(0, depth - 3)}-{depth - 1}", depth)
    plan = Training(layers, training.rank, training.steps, training.batch, training.lr, training.locality)
    texts = list(read_texts(training.text)) if training.text is not None else []
    made = train(loaded, requests, texts, plan, _Losses(training.steps))
    made.save(
        editor, {"model": model_digest(loaded), "edits": str(len(requests)), "steps": str(training.steps)}
    )
    say(editor)
    return 0


class _Losses:
    """Says how the training goes, ten times."""

    def __init__(self, steps: int) -> None:
        self._every, self._steps = max(1, steps // 10), steps
        self._edit = self._locality = 0.0

    def __call__(self, step: int, losses: Any) -> None:
        self._edit, self._locality = self._edit + losses.edit, self._locality + losses.locality
        if step % self._every == 0:
            edit, locality = self._edit / self._every, self._locality / self._every
            self._edit = self._locality = 0.0
            text = f"step {step} of {self._steps}: edit {edit:.4f}, unrelated {locality:.5f} (nats)"
            say(text, stderr=True)


@app.command
def plot(out: str, /, *, to: str = "edits.png", debug: Debug = False) -> int:
    """Draw a sweep: S by layer and learning rate, methods with bootstrap intervals, many edits at once.

    Example: backlens plot edits ./sweep --to edits.svg

    Parameters
    ----------
    out
        The sweep's directory.
    to
        The file; its suffix (.png, .svg, .pdf) says the format.
    """
    from pipeline.editing.compare import trial_scores
    from pipeline.plot.canvas import check_target, require_matplotlib, save

    require_matplotlib()
    target = check_target(to)
    from pipeline.plot.edits import draw_edits

    save(draw_edits(trial_scores(out)), target)
    say(target)
    return 0


@app.command
def explain(
    *,
    method: str = "forward-shift",
    layer: int | None = None,
    lr: float | None = None,
    against: str = "",
    case: int = 0,
    options: EditOptions = DEFAULTS,
    debug: Debug = False,
) -> int:
    """Show what an edit adds: its tokens through the lens, its norms, and how it lies to the true gradient.

    Example: backlens edit explain --case 0 --layer 5 --lr 1.6 --against finetune

    Parameters
    ----------
    method
        The method to explain.
    layer
        The layer it edits. Default: at 7/10 of the model's depth.
    lr
        Its learning rate.
    against
        Other methods, separated by commas, whose change is compared.
    case
        The case's ordinal in the file of edits, from 0.
    """
    names: list[MethodName] = [
        parse_method(method),
        *(parse_method(each) for each in against.split(",") if each),
    ]
    options = options.with_demo_defaults()
    from pipeline.cli.edit_report import print_explanation
    from pipeline.editing.loading import load
    from pipeline.editing.tools import make_method, make_tools

    loaded, requests = load(options, _noted)
    if not 0 <= case < len(requests):
        raise BacklensError(f"--case {case}: there are cases 0 to {len(requests) - 1}")
    chosen = default_layer(len(loaded.anatomy.blocks)) if layer is None else layer
    tools = make_tools(options, loaded, names, [chosen])
    made = {}
    for name in names:
        rate = lr if name == names[0] or name in ("forward-shift", "gradient-shift") else None
        made[name] = make_method(options, tools, name, chosen, rate)
    print_explanation(loaded, requests[case], made)
    return 0


def default_layer(depth: int) -> int:
    """The paper's best layers of GPT-2-XL, 30 to 40 of 48, in any model."""
    return round(0.7 * (depth - 1))


def _check_typed(prompt: str | None, subject: str | None, new: str | None) -> None:
    if not prompt or new is None:
        raise BacklensError("edit: --prompt and --target-new go together")
    if "{}" in prompt and subject is None:
        raise BacklensError("edit: --prompt has a place for the subject; give --subject")


def _typed(prompt: str | None, subject: str | None, new: str | None, true: str | None) -> Any:
    from pipeline.editing.request import Request, subject_notes
    from pipeline.prompts.facts import with_space
    from pipeline.prompts.subject import SLOT, filled

    assert prompt is not None
    assert new is not None
    slot = None
    if SLOT in prompt and subject is not None:
        prompt, slot = filled(prompt, subject)
    if not prompt.strip():
        raise BacklensError("edit: --prompt is empty; give it a text")
    old = None if true is None else with_space(prompt, true)
    request = Request(0, "--prompt", prompt, with_space(prompt, new), subject, old, slot=slot)
    if subject is not None and request.subject_place() is None:
        raise BacklensError("edit: --prompt should hold its --subject, in whole words")
    for line in subject_notes([request]):
        _noted(line)
    return request


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise BacklensError(f'--{name} "{text}": give numbers separated by commas') from None


def _demo() -> str:
    from pipeline.demo import MODEL

    return str(MODEL)


def _told(done: int, shards: int) -> None:
    say(f"{done} of {shards} shards", stderr=True)


def _noted(text: str) -> None:
    say(text, stderr=True)
