"""Edit requests: one fact to write per request, with the prompts that evaluate the edit; and the model to edit.

Requests are read from CounterFact, zsRE, and JSON Lines (or an array of such objects):

    {"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "piano", "target_true": "trumpet",
     "paraphrases": ["…"], "neighbourhood": ["…"], "generation": ["…"], "references": ["…"]}

of which `prompt` and `target_new` are required.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

import torch

from backlens.config import PromptFields, PromptFormat
from backlens.editing.options import EditInput
from backlens.errors import BacklensError
from backlens.models.checkpoint import ModelSource
from backlens.models.load import LoadedModel, load_model
from backlens.prompts.counterfact import (
    EvaluationPrompts,
    array_rows,
    counterfact_evaluation,
    counterfact_prompt,
    texts,
    with_space,
    zsre_evaluation,
    zsre_prompt,
)
from backlens.prompts.fields import Row, UnfitError, column_prompt, optional_text, text
from backlens.prompts.jsonl_csv import jsonl_rows
from backlens.prompts.prompt import SLOT, Prompt, Rejected, SubjectPlace, find_subject, subject_lines
from backlens.prompts.read import detect, require
from backlens.prompts.source import Source, one_line

Metrics = Literal["counterfact", "zsre"]


@dataclass(frozen=True, slots=True)
class Request:
    """One fact to write. Targets begin with the space that parts them from a prompt."""

    prompt_id: int
    """Ordinal in the input, from 0: the `prompt_id` of a run over the same file."""
    where: str
    """Place in the input, for messages: `facts.jsonl:17`."""
    prompt: str
    """Prompt with the subject in its place."""
    target_new: str
    """Target that the edit writes."""
    subject: str | None = None
    target_true: str | None = None
    """Target before the edit, if it is known."""
    paraphrases: tuple[str, ...] = ()
    """Other wordings of the prompt, which should give the new target too."""
    neighbourhood: tuple[str, ...] = ()
    """Prompts about other subjects, whose targets should stay."""
    neighbourhood_target: str | None = None
    """Target of the neighbourhood: CounterFact's true target, zsRE's answer to an unrelated question."""
    generation: tuple[str, ...] = ()
    """Beginnings of texts about the subject."""
    references: tuple[str, ...] = ()
    """Texts that are true of the new target, which generated texts are compared with."""
    metrics: Metrics = "counterfact"
    """The data set whose metrics judge the request."""
    id: str | None = None
    slot: SubjectPlace | None = None
    """Place of the template's `{}`, which now holds the subject."""

    def subject_place(self) -> SubjectPlace | None:
        """The place in `prompt` that names the subject."""
        return None if self.subject is None else self.slot or find_subject(self.prompt, self.subject)


def read_requests(source: str, format: PromptFormat = "auto", limit: int | None = None) -> list[Request]:
    """The requests of a file, in order.

    Raises BacklensError that names the line (or record) of the first one that cannot be read.
    """
    place = Source(source)
    if format == "auto":
        format = detect(place)
    else:
        require(place, format)
    reader = _READERS.get(format)
    if reader is None:
        raise BacklensError(
            f"{place.name}: edits are read from counterfact, zsre, jsonl and json, and this is {format}"
        )
    requests = [_request(row, reader) for row in islice(reader.rows(place), limit)]
    if not requests:
        raise BacklensError(f"{place.name}: holds no edits")
    return requests


def subject_notes(requests: Iterable[Request]) -> Iterator[str]:
    """One line if the prompts of some requests name their subject several times."""
    places = (request.subject_place() for request in requests)
    return subject_lines(0, sum(place is not None and place.others > 0 for place in places))


@dataclass(frozen=True, slots=True)
class _RequestReader:
    rows: Callable[[Source], Iterable[Row | Rejected]]
    prompt: Callable[[Row, PromptFields], Prompt]
    evaluation: Callable[[Row, str], EvaluationPrompts]
    fields: PromptFields
    metrics: Metrics = "counterfact"


def _request(row: Row | Rejected, reader: _RequestReader) -> Request:
    if isinstance(row, Rejected):
        raise BacklensError(row.message)
    try:
        prompt = reader.prompt(row, reader.fields)
        if reader.metrics == "counterfact":
            _refuse_unnamed_subject(row, prompt)
        return Request(
            row.prompt_id,
            row.where,
            prompt.prompt,
            with_space(prompt.prompt, prompt.target),
            prompt.subject,
            **asdict(reader.evaluation(row, prompt.prompt)),
            metrics=reader.metrics,
            id=prompt.id,
            slot=prompt.slot,
        )
    except UnfitError as unfit:
        remedy = "" if unfit.absent is None else f"; rename the one that holds the {unfit.absent!r}"
        raise BacklensError(one_line(f"{row.where}: {unfit.problem}{remedy}")) from unfit


def _refuse_unnamed_subject(row: Row, prompt: Prompt) -> None:
    if prompt.subject is None and SLOT in prompt.prompt:
        text(row.values, "subject", "subject")
    if prompt.subject is not None and prompt.subject_place() is None:
        raise UnfitError(
            "no-subject",
            f"the prompt does not hold its subject {prompt.subject!r} in whole words; write {SLOT} there",
        )


def _row_evaluation(row: Row, prompt: str) -> EvaluationPrompts:
    """The evaluation prompts of an object in JSON Lines or in an array of edits."""
    true = optional_text(row.values, "target_true")
    around = optional_text(row.values, "neighbourhood_target") or true
    return EvaluationPrompts(
        None if true is None else with_space(prompt, true),
        texts(row.values, "paraphrases"),
        texts(row.values, "neighbourhood"),
        None if around is None else with_space(prompt, around),
        texts(row.values, "generation"),
        texts(row.values, "references"),
    )


_NAMES = PromptFields(target="target_new", subject="subject")
_READERS: dict[PromptFormat, _RequestReader] = {
    "counterfact": _RequestReader(array_rows, counterfact_prompt, counterfact_evaluation, PromptFields()),
    "zsre": _RequestReader(array_rows, zsre_prompt, zsre_evaluation, PromptFields(), "zsre"),
    "jsonl": _RequestReader(jsonl_rows, column_prompt, _row_evaluation, _NAMES),
    "json": _RequestReader(array_rows, column_prompt, _row_evaluation, _NAMES),
}


def model_source(options: EditInput) -> ModelSource:
    """The model that the options name. Call it on options with the demo's defaults filled in."""
    assert options.model is not None
    return ModelSource(
        options.model, options.revision, options.dtype, trust_remote_code=options.trust_remote_code
    )


def load_editable(source: ModelSource) -> LoadedModel:
    """The model on the first GPU, or on the CPU where there is none."""
    return load_model(source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def load(options: EditInput, note: Callable[[str], None]) -> tuple[LoadedModel, list[Request]]:
    """The model, ready to be edited, and the requests; `note` receives the lines of `subject_notes`."""
    options = options.with_demo_defaults()
    assert options.edits is not None
    requests = read_requests(options.edits, options.format, options.limit)
    for line in subject_notes(requests):
        note(line)
    return load_editable(model_source(options)), requests
