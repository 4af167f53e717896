"""Runs from Python: the commands `run` and `plan` with their options as keywords, and a run directory opened."""

from dataclasses import fields
from typing import Any

from backlens.atlas.run import Run
from backlens.config import PlanOptions, RunConfig, nearest
from backlens.engine.run import NoProgress
from backlens.engine.run import run as run_config
from backlens.errors import BacklensError
from backlens.forecast.forecast import Forecast, make_forecast


def run(**options: Any) -> Run:
    """Run the pipeline and open its directory; the same call resumes a stopped run.

    The options are those of `backlens run`, as keywords: `run(model="gpt2", prompts="facts.jsonl", out="run")`.
    Raises BacklensError for what the user can mend, Interrupted when the run stops halfway.
    """
    _check("run", options, RunConfig)
    return Run(run_config(RunConfig(**options), NoProgress()).out)


def plan(**options: Any) -> Forecast:
    """Say what a run would take: rows, bytes, devices, time and cost. The options are those of `backlens plan`."""
    _check("plan", options, RunConfig, PlanOptions)
    planning = {field.name: options.pop(field.name) for field in fields(PlanOptions) if field.name in options}
    return make_forecast(RunConfig(**options), PlanOptions(**planning))


def open(out: str) -> Run:
    """Open a run directory, a path or a URL, as it is now. Raises BacklensError if it is none."""
    return Run(out)


def _check(command: str, options: dict[str, Any], *kinds: type) -> None:
    known = [field.name for kind in kinds for field in fields(kind)]
    for name in options:
        if name not in known:
            raise BacklensError(f"{command}: no option {name!r}{nearest(name, known)}")
