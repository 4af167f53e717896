"""`backlens plan`: the forecast of a run as tables."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from backlens.cli.console import console
from backlens.forecast import Forecast
from backlens.printable import human_bytes, human_seconds
from backlens.prompts.prompt import subject_lines


def print_forecast(forecast: Forecast) -> None:
    """Print the size of the run, rows and bytes, operations, devices, and time."""
    shown = console()
    plan, expected = forecast.plan, forecast.expected
    facts = plan.model_facts
    shown.print(
        f"{facts['name']}: {facts['family']}, {facts['layers']} layers, d_model {facts['d_model']}, "
        f"vocabulary {facts['vocabulary']:,}",
        soft_wrap=True,
    )
    for remark in plan.remarks:
        shown.print(remark, soft_wrap=True)
    if plan.survey.rejected:
        shown.print(f"{plan.survey.rejected:,} of {plan.survey.prompts:,} prompts cannot be read")
    survey = plan.survey
    for line in subject_lines(survey.subjects_absent, survey.subjects_repeated, plan.config.positions):
        shown.print(line, soft_wrap=True)
    shown.print(
        f"{expected.prompts:,} prompts, about {expected.tokens:,} tokens, in {plan.shards.shards:,} shards "
        f"of {plan.shards.shard_prompts:,}"
    )
    shown.print(_tables(forecast))
    shown.print(_measured_on(expected.computed), soft_wrap=True)
    for table in (_work(forecast), _devices(forecast), _times(forecast)):
        shown.print(table)
    for line in _summary(forecast):
        shown.print(line, soft_wrap=True)


def _tables(forecast: Forecast) -> Table:
    rows, sizes = forecast.expected.rows, forecast.expected.bytes
    lines = [(name, f"{count:,}", human_bytes(sizes[name])) for name, count in rows.items()]
    return _table(
        ("table", "rows", "size"),
        [*lines, ("all", f"{sum(rows.values()):,}", human_bytes(sum(sizes.values())))],
    )


def _measured_on(computed: int) -> str:
    if not computed:
        return "sizes from constants per list entry and per scalar (docs/plan.md)"
    prompts = "1 prompt" if computed == 1 else f"{computed} prompts"
    return f"sizes from the rows of {prompts}, computed here with the model's weights"


def _work(forecast: Forecast) -> Table:
    flops = forecast.work.flops
    lines = [(name, f"{value:.2e}") for name, value in flops.items()]
    return _table(("work", "operations"), [*lines, ("all", f"{sum(flops.values()):.2e}")])


def _devices(forecast: Forecast) -> Table:
    return _table(
        ("device of a copy", "blocks", "weights", "activations", "lens", "peak"),
        [
            (
                str(use.device),
                _ranges(use.blocks),
                *map(human_bytes, (use.weights, use.activations, use.lens, use.total)),
            )
            for use in forecast.fit.devices
        ],
    )


def _times(forecast: Forecast) -> Table:
    shares = forecast.times.shares
    return _table(("time", "alone"), [(name, human_seconds(seconds)) for name, seconds in shares.items()])


def _summary(forecast: Forecast) -> Iterable[str]:
    cluster, times = forecast.cluster, forecast.times
    count = len(forecast.fit.devices)
    together = "projecting at once" if forecast.fit.busiest < 1 else "one at work at a time"
    devices = "1 device" if count == 1 else f"{count} devices, {together}"
    copies = "1 copy" if times.replicas == 1 else f"{times.replicas:,} copies"
    yield f"{copies} of the model on {cluster.name}, each on {devices}"
    if count > 1 and forecast.plan.config.sharding == "none":
        yield f"run it with --sharding accelerate --gpus-per-replica {count}"
    how = "measured here on some batches" if forecast.measured else "reckoned from stated speeds"
    if not forecast.measured and cluster.name == "this machine":
        how = "reckoned from short products here; --calibrate measures"
    price = f", ${forecast.dollars:,.0f}" if forecast.dollars is not None else ""
    yield f"about {human_seconds(times.seconds)}{price} ({how})"
    yield f"bottleneck: {times.bottleneck}"


def _ranges(numbers: Sequence[int]) -> str:
    """Write 0, 1, 2, 5 as 0-2, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts) or "none"


def _table(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    table = Table(*headers)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    return table
