"""Is every matrix of the model's blocks known, and does what is said of them fit their widths?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from pipeline.doctor.check import Check, told
from pipeline.errors import BacklensError
from pipeline.models.anatomy import Block, describe_blocks, layout_of, modules_of, unproven_cuts
from pipeline.models.draft import Draft, SeenBlock, draft_layout, see_blocks
from pipeline.models.layout import Layout
from pipeline.models.widths import misfits

FOUND, WIDTHS, CUTS = "modules", "widths", "cuts"
DESCRIBE = "save the description below to a file, correct it, and pass it as --anatomy FILE"


@dataclass(frozen=True)
class Structure:
    """What the model's structure says, before any weight is read."""

    checks: tuple[Check, ...]
    seen: tuple[SeenBlock, ...] = ()
    """The blocks as they are; empty when they cannot be told."""
    draft: Draft | None = None
    """A description to edit; None where nothing is wrong, or no blocks were found."""
    unproven: Mapping[str, str] = field(default_factory=dict)
    """Cuts of fused matrices that nothing proves, of the description in use or else of the draft, by module."""

    @property
    def understood(self) -> bool:
        return all(check.passed is not False for check in self.checks)


def look_at_blocks(model: PreTrainedModel, layout: Layout | None) -> Structure:
    """Find every block's matrices by `layout`, or that of the model's family; the meta device will do."""
    try:
        seen = see_blocks(model)
    except BacklensError as error:
        return Structure((Check(FOUND, "FAIL", str(error), remedy="no description of blocks can help here"),))
    try:
        blocks = describe_blocks(model, layout or layout_of(model.config))
    except BacklensError as error:
        return _drafted(model, seen, (Check(FOUND, "FAIL", str(error), remedy=DESCRIBE),))
    checks = (_found(blocks), _widths(blocks, int(model.config.get_text_config().hidden_size)))
    unproven = unproven_cuts(layout, model.config)
    structure = Structure((*checks, *_cuts("--anatomy", unproven)), seen, unproven=unproven)
    return structure if structure.understood else _drafted(model, seen, checks)


def _drafted(model: PreTrainedModel, seen: Sequence[SeenBlock], checks: Sequence[Check]) -> Structure:
    draft = draft_layout(model)
    unproven = unproven_cuts(draft.layout, model.config)
    return Structure((*checks, *_cuts("the description below", unproven)), tuple(seen), draft, unproven)


def _cuts(source: str, unproven: Mapping[str, str]) -> Iterator[Check]:
    """Xᵀ Δ agrees with autograd under any cut, so the other checks say nothing of it."""
    if unproven:
        said = ", ".join(f"{module} ({cut})" for module, cut in unproven.items())
        detail = f"unproven parts of fused matrices, by {source}: {said}"
        remedy = (
            "compare them with the model's code: no check tells a wrong cut, and run.json says so of a run"
        )
        yield told(CUTS, len(unproven), detail, remedy)


def _found(blocks: Sequence[Block]) -> Check:
    experts = max((_experts(block) for block in blocks), default=0)
    count = sum(
        len(block.matrices) + (_experts(block) * len(block.experts.matrices) if block.experts else 0)
        for block in blocks
    )
    detail = f"matrices in {len(blocks)} blocks: {', '.join(modules_of(blocks))}"
    if experts:
        detail += f"; up to {experts} experts a block"
    left_out = {path: what for block in blocks for path, what in block.not_covered.items()}
    if left_out:
        detail += f"; not covered: {', '.join(f'{path} ({what})' for path, what in left_out.items())}"
    return Check(FOUND, "pass", detail, count)


def _experts(block: Block) -> int:
    if block.experts is None:
        return 0
    path = next(iter(block.experts.matrices.values())).path
    return len(getattr(block.experts.module, path))


def _widths(blocks: Sequence[Block], d_model: int) -> Check:
    problems = misfits(blocks, d_model)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Check(WIDTHS, "FAIL", f"{problems[0]}{more}", len(problems), 0, DESCRIBE)
    cut = {located.path for block in blocks for located in block.matrices.values() if located.cut is not None}
    shared = f"; of {', '.join(sorted(cut))}, every output is in one module" if cut else ""
    return Check(WIDTHS, "pass", f"matrices that do not fit the residual stream{shared}", 0, 0)
