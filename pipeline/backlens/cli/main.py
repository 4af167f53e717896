"""The `backlens` command: it passes options to functions, and turns errors into one line and an exit status.

The commands import what is heavy, so that `backlens --help` and a mistyped option answer at once.
"""

from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict

from backlens import __version__
from backlens.cli.console import (
    Debug,
    LogFormat,
    escape_what_cannot_be_shown,
    explained,
    log_format,
    logging_as,
    say_error,
    say_interrupted,
)
from backlens.cli.edit import app as edit_app
from backlens.cli.edit import plot as plot_edits
from backlens.cli.jobs import Address
from backlens.cli.jobs import app as jobs_app
from backlens.cli.serve import export_html, serve
from backlens.config import DoctorOptions, PlanOptions, RunConfig, flag, read_yaml
from backlens.errors import BacklensError, Interrupted

app = App(
    name="backlens",
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    version=__version__,
    help="Write the gradients of language models, projected to the vocabulary, as Parquet tables.",
)

ConfigFile = Annotated[
    str | None, Parameter(help="A YAML file of options, which the command line overrides.")
]
DEFAULTS = RunConfig()
PLAN_DEFAULTS = PlanOptions()
DOCTOR_DEFAULTS = DoctorOptions()


@app.command
def run(
    config_file: ConfigFile = None,
    /,
    *,
    options: RunConfig = DEFAULTS,
    log_format: Annotated[
        LogFormat, Parameter(help="Write standard error as text, or as one JSON object per event and line.")
    ] = "text",
    debug: Debug = False,
) -> int:
    """Project the gradients of every prompt and write the tables. The same command resumes a stopped run.

    Without arguments the bundled demo runs and writes ./demo-run.

    Example: backlens run --model gpt2 --prompts facts.jsonl --out ./run --modules all
    """
    options.with_demo_defaults()  # raises for a missing option before anything heavy is imported
    from backlens.cli.run import print_report, shown_progress
    from backlens.engine.run import run as run_pipeline

    with shown_progress(log_format) as progress:
        report = run_pipeline(options, progress)
    print_report(report)
    return 1 if report.rows.get("failures") else 0


@app.command
def plan(
    config_file: ConfigFile = None,
    /,
    *,
    planning: PlanOptions = PLAN_DEFAULTS,
    options: RunConfig = DEFAULTS,
    debug: Debug = False,
) -> int:
    """Estimate a run: rows and bytes, work, memory and devices, time and cost.

    With --prompt-count instead of prompts, the model's folder needs only its config.json. If the weights of a small
    model are at hand, some prompts are computed with them to measure the sizes.

    Example: backlens plan --model gpt2 --prompt-count 100000 --cluster docs/h100.yaml
    """
    from backlens.cli.plan import print_forecast
    from backlens.forecast import make_forecast

    print_forecast(make_forecast(options, planning))
    return 0


@app.command
def doctor(
    *,
    options: DoctorOptions = DOCTOR_DEFAULTS,
    json: Annotated[bool, Parameter(negative=(), help="One JSON object instead of a table.")] = False,
    debug: Debug = False,
) -> int:
    """Find the matrices of a model, and check its numbers on this machine.

    Compares gradients with autograd, the lens with the logits, and rows alone with rows in batches; the exit status is
    1 if a check fails. For an unknown architecture it prints the blocks, and a description to edit for --anatomy.

    Example: backlens doctor --model gpt2 --prompts facts.jsonl
    """
    from backlens.cli.doctor import print_diagnosis

    return print_diagnosis(options.as_run(), json)


@app.command
def atlas(
    out: str,
    /,
    *,
    memory: str = "2GB",
    weights: str | None = None,
    executor: Literal["local", "ray"] = "local",
    address: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    debug: Debug = False,
) -> int:
    """Build the index and summary tables of a run under OUT/atlas/; the same command resumes a stopped build.

    The tables are neurons by token and tokens by neuron, summaries of both, curves by layer, and the logit lens of the
    neurons' weights, which needs the run's model. An atlas of fewer shards than the run has now is built again.

    Example: backlens atlas ./demo-run

    Parameters
    ----------
    out
        The run directory.
    memory
        Memory of DuckDB per process; what exceeds it goes to a folder beside the atlas.
    weights
        Folder of the run's model, if it has moved; "none" leaves out the table of the weights.
    executor
        local: this process. ray: one task per layer and range of tokens, on one core each.
    address
        A running Ray cluster, as for run; without it, --executor ray starts one on this machine.
    json
        Print the manifest as JSON instead of a table.
    """
    from backlens.atlas.build import BuildOptions
    from backlens.cli.query import print_atlas

    return print_atlas(out, BuildOptions(memory, weights, executor, address), json)


@app.command
def query(
    out: str,
    /,
    *,
    token: str | None = None,
    neuron: str | None = None,
    prompt: int | None = None,
    sql: str | None = None,
    show: str | None = None,
    compare: str | None = None,
    by: str = "relation",
    layer: int | None = None,
    module: str | None = None,
    position: int | None = None,
    min_prompts: int = 5,
    limit: int | None = None,
    memory: str = "4GB",
    json: Annotated[bool, Parameter(negative=())] = False,
    csv: Annotated[bool, Parameter(negative=())] = False,
    debug: Debug = False,
) -> int:
    """Query a run with one of --token, --neuron, --prompt and --sql, or the whole run with --show or --compare.

    "promoted" tokens are those that an update raises (bottom lists), "suppressed" those that it lowers (top lists).
    `backlens atlas` makes queries about tokens and neurons fast; the answers are the same without it.

    Example: backlens query ./demo-run --neuron 5.mlp.down.123 --show tokens

    Parameters
    ----------
    out
        The run directory.
    token
        A vocabulary token with its leading space: show the top and bottom lists that hold it.
    neuron
        layer.module.neuron such as 5.mlp.down.123, or 5.mlp.down.e3.123 in expert 3: show its gradients.
    prompt
        A prompt_id: show its top and bottom tokens by layer, module and position.
    sql
        One SELECT over the tables vocab, prompts, layers, neurons, tokens, failures and those of the atlas.
    show
        For a token: places, neurons or layers. For a neuron: prompts, tokens, summary or similar (neurons). For a
        prompt: positions, neurons, ranks (of the target, by layer) or tokens. For the run: specific (neurons), tokens,
        curves, groups or coverage.
    compare
        With --prompt, another prompt_id; otherwise another run directory of the same prompts.
    by
        For groups: relation, subject, target, or a key in the meta data of the prompts.
    layer
        Only this layer.
    module
        Only this module, e.g. mlp.down.
    position
        For ranks: the position, from 0. Default: the last one of the prompt.
    min_prompts
        For specific: leave out neurons that are kept for fewer prompts.
    limit
        Print at most this many rows. Default: a table shows 20 and their total; --json and --csv print all.
    memory
        Memory of the query; a query of --sql that needs more is stopped.
    json
        Print JSON lines instead of a table. NaN and infinities, which JSON lacks, are null.
    csv
        Print CSV in UTF-8 instead of a table; lists and structs are JSON in it.
    """
    if json and csv:
        raise BacklensError("query: choose one of --json and --csv")
    from backlens.cli.query import QueryOptions, Style, print_answer

    style: Style = "json" if json else "csv" if csv else "table"
    question = QueryOptions(
        token, neuron, prompt, sql, show, compare, by, layer, module, position, min_prompts, limit, memory
    )
    return print_answer(out, question, style)


@app.command
def status(
    out: str,
    /,
    *,
    json: Annotated[bool, Parameter(negative=(), help="One JSON object instead of a table.")] = False,
    debug: Debug = False,
) -> int:
    """Show the state of a run from its directory alone: shards, prompts, rows, rate, time left, driver.

    Example: backlens status ./run
    """
    from backlens.cli.run import print_status

    return print_status(out, json)


@app.command
def verify(
    out: str,
    /,
    *,
    every: Annotated[
        bool, Parameter(negative=(), help="Continue after the first loss and list all.")
    ] = False,
    json: Annotated[bool, Parameter(negative=(), help="One JSON object instead of lines.")] = False,
    debug: Debug = False,
) -> int:
    """Compare every committed file of a run with its record: size, checksum, rows.

    The exit status is 1 if a file is missing or has changed.

    Example: backlens verify ./run
    """
    from backlens.cli.run import print_verified

    return print_verified(out, every, json)


@app.command
def submit(job_file: str, /, *, address: Address = None, debug: Debug = False) -> int:
    """Run the command of a job file on a Ray cluster, as in `jobs/`. Submitted again, a stopped run goes on.

    The package itself is sent along. Prints the job's id, for `backlens jobs`.

    Example: backlens submit jobs/project.yaml --address http://head:8265
    """
    from backlens.cli.jobs import submit_file

    return submit_file(job_file, address, app.parse_args)


app.command(jobs_app)
app.command(edit_app)


plot_app = App(name="plot")
app.command(plot_app)
plot_app.command(plot_edits, name="edits")


@plot_app.default
def plot(
    out: str,
    /,
    *,
    figure: str | None = None,
    prompt: int | None = None,
    module: str | None = None,
    to: str | None = None,
    debug: Debug = False,
) -> int:
    """Draw the paper's figures (needs the extra: pip install "backlens[plot]").

    A heatmap shows the top token of each layer and position above the bottom one, with the VJP's norm as colour:
    imprint with --module mlp.up (x), shift with --module mlp.down (δ). `backlens plot edits OUT` draws an edit sweep.

    Example: backlens plot ./demo-run --prompt 37 --module mlp.down --to heatmap.svg

    Parameters
    ----------
    out
        The run directory.
    figure
        heatmap (the default with --prompt), norms (a heatmap with numbers), ranks (of the target, by layer), or curves
        (over all prompts; the default without --prompt).
    prompt
        A prompt_id.
    module
        Only this module; a heatmap shows one, mlp.down by default.
    to
        The file; its suffix (.png, .svg, .pdf) gives the format. Default: the name of the figure.
    """
    from backlens.cli.serve import draw

    return draw(out, figure, prompt, module, to)


app.command(serve)
app.command(export_html)


def call(tokens: list[str]) -> int:
    """Run one command line and return its exit status."""
    escape_what_cannot_be_shown()
    format = log_format(tokens)
    with logging_as(format):
        try:
            _use_config_file(tokens)
            result = app(tokens, result_action="return_value")
            return result if isinstance(result, int) else 0
        except BacklensError as error:
            if "--debug" in tokens:
                raise
            say_error(str(error), format)
            return error.status
        except CycloptsError as error:
            say_error(explained(error), format)
            return BacklensError.status
        except KeyboardInterrupt:
            say_interrupted(format)
            return Interrupted.status
        except BrokenPipeError:
            return 0
        finally:
            app.config = ()


def _use_config_file(tokens: list[str]) -> None:
    """Make the options of the command's YAML file, if it has one, the defaults of this call."""
    _, bound, *_ = app.parse_args(tokens)
    path = bound.arguments.get("config_file")
    if path is not None:
        options = {flag(name): value for name, value in _replayed(path).items()}
        app.config = (Dict(options, use_commands_as_keys=False, source=path),)


def _replayed(path: str) -> dict[str, Any]:
    """Read the options of a YAML file; those in a run directory's own file name that directory."""
    from backlens.store.input_paths import located, replayed_run

    replayed = replayed_run(path)
    options = read_yaml(path)
    if replayed is None:
        return options
    directory, record = replayed
    return located(options, directory, record) | {"out": directory.given}
