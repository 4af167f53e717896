"""What `backlens edit` prints and saves."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.cli.terminal import console, say
from pipeline.editing.compare import TrialScore, best_trials, trial_scores
from pipeline.editing.delta import Delta, described, merged, save_deltas
from pipeline.editing.drive import Swept
from pipeline.editing.evaluate import KINDS, Result, Summary, ask, exam, summary
from pipeline.editing.explain import Added, explain
from pipeline.editing.method import Method
from pipeline.editing.options import Place
from pipeline.editing.request import Request
from pipeline.editing.text import generate
from pipeline.editing.weights import edited
from pipeline.errors import BacklensError
from pipeline.models.load import LoadedModel

CONTINUATION = 24
"""Tokens of a shown text, its prompt included."""


def _console() -> Console:
    return console(wide=200)


def print_edit(
    loaded: LoadedModel,
    requests: Sequence[Request],
    method: Method,
    about: Mapping[str, object],
    save_delta: str | None,
    save_model: str | None,
) -> None:
    """Edit, show before and after, and save what is asked for; the model is left as it was."""
    for path in (save_delta, save_model):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise BacklensError(f"{path}: there is no folder {Path(path).parent}; make it first")
    exams = [exam(loaded, request) for request in requests]
    before, text_before = ask(loaded, exams), _continued(loaded, requests[0])
    deltas = merged(method(loaded, *requests))
    with edited(loaded, deltas):
        after, text_after = ask(loaded, exams), _continued(loaded, requests[0])
        if save_model is not None:
            save_edited(loaded, save_model)
    if save_delta is not None:
        facts = [{"prompt": r.prompt, "target_new": r.target_new} for r in requests]
        save_deltas(save_delta, deltas, described({**about, "edits": facts}))
    shown = _console()
    where = ", ".join(f"{d.layer}.{d.module} (rank {len(d.u)}, norm {d.norm():.3g})" for d in deltas)
    shown.print(f"{about['method']}: {where}")
    shown.print(_table(requests, before, after))
    shown.print(f"before: {text_before}\nafter:  {text_after}", soft_wrap=True)


def save_edited(loaded: LoadedModel, folder: str) -> None:
    """The model as it is now, and its tokenizer, as `from_pretrained` reads them."""
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


def print_sweep(swept: Swept) -> None:
    shown = _console()
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
    """Each method's best trial."""
    table = Table("method", "layer", "η", "at once", "cases", "S", "efficacy", "paraphrase", "neighbourhood")
    for name in ("untouched", "perplexity", "ms a case"):
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
    shown = _console()
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
    table = Table("method", "layer", "module", "norm", "most added", "most taken away")
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
