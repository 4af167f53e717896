"""The output of `backlens edit`: tables on standard output, and the files that it saves."""

import shlex
from collections.abc import Mapping, Sequence

from rich.table import Table

from backlens.cli.console import console, say
from backlens.editing.compare import TrialScore, best_trials, trial_scores
from backlens.editing.delta import Delta, described, edited, merged, save_deltas
from backlens.editing.evaluate import KINDS, Result, Summary, evaluate, generate, prepare, summary
from backlens.editing.explain import Added, explain
from backlens.editing.methods import Method
from backlens.editing.options import Place
from backlens.editing.request import Request
from backlens.editing.sweep import SweepReport
from backlens.errors import BacklensError
from backlens.models.load import LoadedModel

CONTINUATION = 24
"""Tokens of a printed text, its prompt included."""


def print_edit(
    loaded: LoadedModel,
    requests: Sequence[Request],
    method: Method,
    about: Mapping[str, object],
    save_delta: str | None,
    save_model: str | None,
) -> None:
    """Edit the model, print it before and after, save what the options name, and restore the model."""
    evaluations = [prepare(loaded, request) for request in requests]
    before, text_before = evaluate(loaded, evaluations), _continued(loaded, requests[0])
    deltas = merged(method(loaded, *requests))
    with edited(loaded, deltas):
        after, text_after = evaluate(loaded, evaluations), _continued(loaded, requests[0])
        if save_model is not None:
            save_edited(loaded, save_model)
    if save_delta is not None:
        facts = [{"prompt": r.prompt, "target_new": r.target_new} for r in requests]
        save_deltas(save_delta, deltas, described({**about, "edits": facts}))
    shown = console()
    where = ", ".join(f"{d.layer}.{d.module} (rank {len(d.u)}, norm {d.norm():.3g})" for d in deltas)
    shown.print(f"{about['method']}: {where}")
    shown.print(_table(requests, before, after))
    shown.print(f"before: {text_before}\nafter:  {text_after}", soft_wrap=True)


def save_edited(loaded: LoadedModel, folder: str) -> None:
    """Save the model as it is now, and its tokenizer, for `from_pretrained`."""
    try:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise BacklensError(f"{folder}: cannot be written: {error.strerror or error}") from error
    say(folder)


def _continued(loaded: LoadedModel, request: Request) -> str:
    return " ".join(generate(loaded, [request.prompt], seed=0, tokens=CONTINUATION, top_k=1)[0].split())


def _table(requests: Sequence[Request], before: Sequence[Result], after: Sequence[Result]) -> Table:
    table = Table("", "before", "after")
    if len(requests) == 1:
        new = requests[0].target_new
        table.add_row(f"p({new!r})", *(f"{r[0].target.probability:.4f}" for r in (before, after)))
        table.add_row(f"rank of {new!r}", *(str(r[0].target.rank) for r in (before, after)))
        if requests[0].target_true is not None:
            true = [each[0].true for each in (before, after)]
            table.add_row(f"p({requests[0].target_true!r})", *(f"{t.probability:.4f}" for t in true if t))
    sums = [summary(each) for each in (before, after)]
    for kind in KINDS:
        table.add_row(f"{kind} (success)", *(_percent(each.success[kind]) for each in sums))
        table.add_row(f"{kind} (accuracy)", *(_percent(each.accuracy[kind]) for each in sums))
    table.add_row("score S", *(_percent(_score(each)) for each in sums))
    return table


def _score(found: Summary) -> float | None:
    return found.score


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def print_sweep(swept: SweepReport) -> None:
    shown = console()
    if swept.before:
        shown.print(f"{swept.before:,} shards were done before")
    shown.print(f"{swept.cases:,} cases in {swept.shards:,} shards")
    if swept.deaths:
        shown.print(f"workers that died and were replaced: {swept.deaths}")
    shown.print(_trials_table(best_trials(trial_scores(swept.out))))
    shown.print("Next:")
    sql = "SELECT method, layer, lr, avg(efficacy) FROM edits GROUP BY ALL ORDER BY ALL"
    out = shlex.quote(swept.out)
    shown.print(f'  backlens query {out} --sql "{sql}"', soft_wrap=True)
    shown.print(f"  backlens plot edits {out}", soft_wrap=True)


def _trials_table(scores: Sequence[TrialScore]) -> Table:
    """Show the best trial of each method."""
    table = Table("method", "layer", "η", "at once", "cases", "S", "efficacy", "paraphrase", "neighbourhood")
    for name in ("untouched", "perplexity", "ms per case"):
        table.add_column(name)
    for each in scores:
        table.add_row(
            each.method,
            str(each.layer),
            "" if each.lr is None else f"{each.lr:g}",
            str(each.at_once),
            str(each.cases),
            *map(str, (each.score, each.efficacy, each.paraphrase, each.neighbourhood)),
            _percent(each.untouched),
            "" if each.perplexity is None else f"{each.perplexity:.4g}",
            f"{1000 * each.seconds:.1f}",
        )
    return table


def print_explanation(loaded: LoadedModel, request: Request, methods: Mapping[str, Method]) -> None:
    deltas: dict[str, tuple[Delta, ...]] = {name: method(loaded, request) for name, method in methods.items()}
    places: dict[str, Place] = {name: getattr(method, "place", "last") for name, method in methods.items()}
    found = explain(loaded, request, deltas, places)
    shown = console()
    shown.print(f"{request.prompt!r} → {request.target_new!r} (was {request.target_true!r})")
    shown.print(_added_table(found.added))
    norms = Table("position", "token", "‖x D‖ by layer: " + ", ".join(map(str, found.layers)))
    for position, (token, sizes) in enumerate(zip(found.tokens, found.norms, strict=True)):
        norms.add_row(str(position), repr(token), "  ".join(f"{size:8.3f}" for size in sizes))
    shown.print(norms)
    cosines = Table("change of", "layer", "module", "compared with", "cosine")
    for row in found.cosines:
        cosines.add_row(row.method, str(row.layer), row.module, row.other, f"{row.cosine:+.4f}")
    shown.print(cosines)


def _added_table(added: Sequence[Added]) -> Table:
    table = Table("method", "layer", "module", "norm", "most added", "most removed")
    for each in added:
        table.add_row(
            each.method,
            str(each.layer),
            each.module,
            f"{each.norm:.3g}",
            " ".join(map(repr, each.top)),
            " ".join(map(repr, each.bottom)),
        )
    return table
