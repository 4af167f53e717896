"""All that `backlens plan` says of a run, put together."""

from dataclasses import dataclass, replace

from backlens.config import PlanOptions, RunConfig
from backlens.engine.plan import RunPlan, make_plan
from backlens.errors import BacklensError
from backlens.forecast.bytes import Estimate, estimate
from backlens.forecast.cluster import Cluster, read_cluster, this_machine
from backlens.forecast.fit import Fit, fit
from backlens.forecast.operations import Operations, Times, times_of, work_of
from backlens.forecast.prompts import Assumed, read_sample, sample_of
from backlens.forecast.trial import trial


@dataclass(frozen=True)
class Forecast:
    """What a run would take."""

    plan: RunPlan
    expected: Estimate
    cluster: Cluster
    fit: Fit
    work: Operations
    times: Times
    measured: bool
    """Whether the stages' times were measured on this machine, not reckoned."""

    @property
    def dollars(self) -> float | None:
        price = self.cluster.dollars_per_hour
        return None if price is None else price * self.cluster.nodes * self.times.seconds / 3600


def make_forecast(config: RunConfig, options: PlanOptions) -> Forecast:
    """Plan a run without running it. Raises BacklensError for what is not to be had, and for what does not fit."""
    assumed = None
    if options.prompt_count is not None:
        if config.prompts is not None:
            raise BacklensError(
                f"--prompt-count {options.prompt_count}: it stands in for --prompts; give one of them"
            )
        assumed = Assumed.parse(options.prompt_count, options.prompt_tokens)
    cluster = this_machine() if options.cluster is None else read_cluster(options.cluster)
    # a plan writes nothing
    plan = make_plan(
        replace(config, out=config.out or "./run").with_demo_defaults(), assumed and assumed.survey()
    )
    if assumed is None:
        sample = read_sample(plan.config, plan.source, plan.model_config)
    else:
        sample = sample_of(assumed.examples(plan.rows), 1.0, plan.config)
    expected = estimate(plan, sample)
    placed = fit(plan, cluster)
    work = work_of(plan, sample, expected, placed)
    times = times_of(work, cluster, placed, sum(expected.bytes.values()))
    if options.calibrate:
        times = replace(times, stages=trial(plan, sample, expected.tokens).stages)
    return Forecast(plan, expected, cluster, placed, work, times, options.calibrate)
