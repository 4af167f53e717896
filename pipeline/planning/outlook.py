"""All that `backlens plan` says of a run, put together."""

from dataclasses import dataclass, replace

from pipeline.config import RunConfig
from pipeline.engine.plan import RunPlan, make_plan
from pipeline.errors import BacklensError
from pipeline.planning.cluster import Cluster, read_cluster, this_machine
from pipeline.planning.estimate import Estimate, estimate
from pipeline.planning.fit import Fit, fit
from pipeline.planning.options import PlanOptions
from pipeline.planning.sample import Assumed, read_sample, sample_of
from pipeline.planning.trial import trial
from pipeline.planning.work import Times, Work, times_of, work_of


@dataclass(frozen=True)
class Outlook:
    """What a run would take."""

    plan: RunPlan
    expected: Estimate
    cluster: Cluster
    fit: Fit
    work: Work
    times: Times
    measured: bool
    """Whether the stages' times were measured on this machine, not reckoned."""

    @property
    def dollars(self) -> float | None:
        price = self.cluster.dollars_per_hour
        return None if price is None else price * self.cluster.nodes * self.times.seconds / 3600


def look_ahead(config: RunConfig, options: PlanOptions) -> Outlook:
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
    return Outlook(plan, expected, cluster, placed, work, times, options.calibrate)
