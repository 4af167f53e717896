"""`backlens plan`: what a run would take, as tables."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from pipeline.cli.sizes import human_bytes, human_seconds
from pipeline.cli.terminal import console
from pipeline.planning.outlook import Outlook
from pipeline.planning.pilot import Pilot
from pipeline.prompts.subject import subject_lines


def print_outlook(outlook: Outlook) -> None:
    """The plan's size, rows and bytes, operations, devices, and time."""
    shown = console()
    plan, expected = outlook.plan, outlook.expected
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
    shown.print(_tables(outlook))
    shown.print(_measured_on(expected.pilot), soft_wrap=True)
    for table in (_work(outlook), _devices(outlook), _times(outlook)):
        shown.print(table)
    for line in _summary(outlook):
        shown.print(line, soft_wrap=True)


def _tables(outlook: Outlook) -> Table:
    rows, sizes = outlook.expected.rows, outlook.expected.bytes
    lines = [(name, f"{count:,}", human_bytes(sizes[name])) for name, count in rows.items()]
    return _table(
        ("table", "rows", "size"),
        [*lines, ("all", f"{sum(rows.values()):,}", human_bytes(sum(sizes.values())))],
    )


def _measured_on(pilot: Pilot | None) -> str:
    if pilot is None:
        return "sizes measured on rows made from random factors"
    weights = "the model's weights" if pilot.trained else "random weights"
    prompts = "1 prompt" if pilot.prompts == 1 else f"{pilot.prompts} prompts"
    return f"sizes measured on rows of {prompts}, computed here with {weights}"


def _work(outlook: Outlook) -> Table:
    flops = outlook.work.flops
    lines = [(name, f"{value:.2e}") for name, value in flops.items()]
    return _table(("work", "operations"), [*lines, ("all", f"{sum(flops.values()):.2e}")])


def _devices(outlook: Outlook) -> Table:
    return _table(
        ("device of a copy", "blocks", "weights", "activations", "lens", "peak"),
        [
            (
                str(use.device),
                _ranges(use.blocks),
                *map(human_bytes, (use.weights, use.activations, use.lens, use.total)),
            )
            for use in outlook.fit.devices
        ],
    )


def _times(outlook: Outlook) -> Table:
    shares = outlook.times.shares
    return _table(("time", "alone"), [(name, human_seconds(seconds)) for name, seconds in shares.items()])


def _summary(outlook: Outlook) -> Iterable[str]:
    cluster, times = outlook.cluster, outlook.times
    count = len(outlook.fit.devices)
    together = "projecting at once" if outlook.fit.busiest < 1 else "one at work at a time"
    devices = "1 device" if count == 1 else f"{count} devices, {together}"
    copies = "1 copy" if times.replicas == 1 else f"{times.replicas:,} copies"
    yield f"{copies} of the model on {cluster.name}, each on {devices}"
    if count > 1 and outlook.plan.config.sharding == "none":
        yield f"run it with --sharding accelerate --gpus-per-replica {count}"
    how = "measured here on a few blocks" if outlook.measured else "reckoned from stated speeds"
    if not outlook.measured and cluster.name == "this machine":
        how = "reckoned from short products here; --calibrate measures"
    price = f", ${outlook.dollars:,.0f}" if outlook.dollars is not None else ""
    yield f"about {human_seconds(times.seconds)}{price} ({how})"
    yield f"bottleneck: {times.bottleneck}"


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 → 0-2, 5."""
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
