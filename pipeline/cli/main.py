"""The `backlens` command: options to functions, errors to one line and an exit status.

Everything heavy is imported inside the commands, so that `backlens --help` answers at once.
"""

import signal
import sys
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict

from pipeline import __version__
from pipeline.config import RunConfig, flag, read_yaml
from pipeline.doctor.options import DoctorOptions
from pipeline.errors import BacklensError

app = App(
    name="backlens",
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    version=__version__,
    help="Gradients of language models, projected to the vocabulary, as Parquet tables.",
)

ConfigFile = Annotated[str | None, Parameter(help="A YAML file of options; the command line overrides it.")]
Debug = Annotated[bool, Parameter(negative=(), help="Show the traceback of an error.")]
DEFAULTS = RunConfig()
DOCTOR_DEFAULTS = DoctorOptions()


@app.command
def run(config_file: ConfigFile = None, /, *, options: RunConfig = DEFAULTS, debug: Debug = False) -> int:
    """Project the gradients of every prompt and write the tables. The same command resumes a stopped run.

    Without arguments it runs the bundled demo into ./demo-run.

    Example: backlens run --model gpt2 --prompts facts.jsonl --out ./run --modules all
    """
    from pipeline.cli.progress import shown_progress
    from pipeline.cli.report import print_report
    from pipeline.engine.driver import run as run_pipeline

    with shown_progress() as progress:
        report = run_pipeline(options, progress)
    print_report(report)
    return 1 if report.rows.get("failures") else 0


@app.command
def plan(config_file: ConfigFile = None, /, *, options: RunConfig = DEFAULTS, debug: Debug = False) -> int:
    """Say what a run would cost: shards, work, bytes and memory. Computes nothing, loads no weights.

    Example: backlens plan --model gpt2 --prompts facts.jsonl --out ./run
    """
    from pipeline.cli.report import print_estimate
    from pipeline.engine.estimate import estimate
    from pipeline.engine.plan import make_plan, with_demo_defaults

    resolved = make_plan(with_demo_defaults(options))
    print_estimate(resolved, estimate(resolved))
    return 0


@app.command
def doctor(
    *,
    options: DoctorOptions = DOCTOR_DEFAULTS,
    json: Annotated[bool, Parameter(negative=(), help="One JSON object instead of a table.")] = False,
    debug: Debug = False,
) -> int:
    """Find the matrices of a model, and check its numbers on this machine.

    Gradients against autograd, the lens against the logits, rows alone and in batches; the exit status is 1 if
    something failed. For an unknown architecture: what its blocks hold, and a description to edit for --anatomy.

    Example: backlens doctor --model gpt2 --prompts facts.jsonl
    """
    from pipeline.cli.diagnosis import print_diagnosis

    return print_diagnosis(options.as_run(), json)


@app.command
def query(
    out: str,
    /,
    *,
    token: str | None = None,
    neuron: str | None = None,
    prompt: int | None = None,
    sql: str | None = None,
    limit: int = 20,
    json: Annotated[bool, Parameter(negative=())] = False,
    csv: Annotated[bool, Parameter(negative=())] = False,
    debug: Debug = False,
) -> int:
    """Ask a run's tables: exactly one of --token, --neuron, --prompt and --sql.

    Example: backlens query ./demo-run --neuron 5.mlp.down.123

    Parameters
    ----------
    out
        The run directory.
    token
        A vocabulary token, its leading space included: where does it stand in a top or bottom list?
    neuron
        layer.module.neuron, e.g. 5.mlp.down.123: what do gradients write into it?
    prompt
        A prompt_id: its top and bottom tokens by layer, module and position.
    sql
        One SELECT over the tables vocab, prompts, layers, neurons, tokens, failures.
    limit
        Rows to show.
    json
        JSON lines instead of a table.
    csv
        CSV instead of a table.
    """
    from pipeline.cli.answer import print_answer

    style: Literal["json", "csv", "table"] = "json" if json else "csv" if csv else "table"
    if json and csv:
        raise BacklensError("query: choose one of --json and --csv")
    return print_answer(out, token, neuron, prompt, sql, limit, style)


def main() -> None:
    """The console script."""
    # A scheduler's SIGTERM ends a run as Ctrl-C does: resumable, and with Ray's processes stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(call(sys.argv[1:]))


def call(tokens: list[str]) -> int:
    """Run one command line and return its exit status."""
    try:
        _use_config_file(tokens)
        result = app(tokens, result_action="return_value")
        return result if isinstance(result, int) else 0
    except BacklensError as error:
        if "--debug" in tokens:
            raise
        print(f"backlens: {error}", file=sys.stderr)
        return error.status
    except CycloptsError as error:
        print(f"backlens: {' '.join(str(error).split())} See `backlens --help`.", file=sys.stderr)
        return BacklensError.status
    except KeyboardInterrupt:
        print("backlens: interrupted; the same command goes on from what is committed", file=sys.stderr)
        return 3
    except BrokenPipeError:
        return 0
    finally:
        app.config = ()


def _use_config_file(tokens: list[str]) -> None:
    """If a command is given a YAML file, make its options the defaults of this call."""
    _, bound, *_ = app.parse_args(tokens)
    path = bound.arguments.get("config_file")
    if path is not None:
        options = {flag(name): value for name, value in read_yaml(path).items()}
        app.config = (Dict(options, use_commands_as_keys=False, source=path),)
