"""What an edit is asked to do: one fact, and the prompts that tell whether the edit did it and nothing else.

Read from CounterFact (arXiv 2202.05262), zsRE in the form of the same authors, and JSON Lines (or an array of such
objects):

    {"prompt": "{} plays the", "subject": "Miles Davis", "target_new": "piano", "target_true": "trumpet",
     "paraphrases": ["…"], "neighbourhood": ["…"], "generation": ["…"], "references": ["…"]}

of which `prompt` and `target_new` are required.

What an edit begins with: the model, and the requests.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch

from backlens.config import PromptFormat
from backlens.editing.options import EditInput
from backlens.errors import BacklensError
from backlens.models.checkpoint import ModelSource
from backlens.models.load import LoadedModel, load_model
from backlens.prompts.counterfact import array_rows, nested, with_space
from backlens.prompts.fields import (
    Row,
    UnfitError,
    checked_target,
    id_text,
    optional_text,
    prompt_and_subject,
    text,
)
from backlens.prompts.jsonl_csv import jsonl_rows
from backlens.prompts.prompt import Rejected
from backlens.prompts.read import detect, require
from backlens.prompts.source import Source, one_line
from backlens.prompts.subject import SLOT, SubjectPlace, find_subject, subject_lines

Metrics = Literal["counterfact", "zsre"]


@dataclass(frozen=True, slots=True)
class Request:
    """One fact to write. Targets begin with the space that parts them from a prompt."""

    prompt_id: int
    """Ordinal in the input, from 0: the `prompt_id` of a run over the same file."""
    where: str
    """Where it came from, for messages: `facts.jsonl:17`."""
    prompt: str
    """With the subject in its place."""
    target_new: str
    """What the model should say."""
    subject: str | None = None
    target_true: str | None = None
    """What it said before, as far as is known."""
    paraphrases: tuple[str, ...] = ()
    """Other wordings, which should give the new target too."""
    neighbourhood: tuple[str, ...] = ()
    """Prompts about other subjects, whose answers should stay."""
    neighbourhood_target: str | None = None
    """The answer to the neighbourhood: CounterFact's true target, zsRE's answer to an unrelated question."""
    generation: tuple[str, ...] = ()
    """Beginnings of texts about the subject."""
    references: tuple[str, ...] = ()
    """Texts that are true of the new target, to compare generated ones with."""
    metrics: Metrics = "counterfact"
    """Whose definitions the request is judged by."""
    id: str | None = None
    slot: SubjectPlace | None = None
    """Where a template had its `{}`, with the subject in it now."""

    def subject_place(self) -> SubjectPlace | None:
        """Where `prompt` names the subject."""
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
    rows, read = reader
    requests = [_judged(row, read) for row in islice(rows(place), limit)]
    if not requests:
        raise BacklensError(f"{place.name}: holds no edits")
    return requests


def subject_notes(requests: Iterable[Request]) -> Iterator[str]:
    """What to say about requests whose prompts name their subject several times."""
    places = (request.subject_place() for request in requests)
    return subject_lines(0, sum(place is not None and place.others > 0 for place in places))


def _judged(row: Row | Rejected, read: Callable[[Row], Request]) -> Request:
    if isinstance(row, Rejected):
        raise BacklensError(row.message)
    try:
        return read(row)
    except UnfitError as unfit:
        remedy = "" if unfit.absent is None else f"; rename the one that holds the {unfit.absent!r}"
        raise BacklensError(one_line(f"{row.where}: {unfit.problem}{remedy}")) from unfit


def _counterfact(row: Row) -> Request:
    rewrite = nested(row.values, "requested_rewrite")
    prompt, subject, slot = _prompt(rewrite)
    true = text(nested(rewrite, "target_true"), "str", "target") if "target_true" in rewrite else None
    true = None if true is None else with_space(prompt, true)
    return Request(
        row.prompt_id,
        row.where,
        prompt,
        with_space(
            prompt, checked_target(text(nested(rewrite, "target_new"), "str", "target"), "target_new")
        ),
        subject,
        true,
        _texts(row.values, "paraphrase_prompts"),
        _texts(row.values, "neighborhood_prompts"),
        true,
        _texts(row.values, "generation_prompts"),
        _texts(row.values, "reference_texts"),
        id=id_text(row.values, "case_id"),
        slot=slot,
    )


def _zsre(row: Row) -> Request:
    """As the CounterFact authors read it: the first answer is the new target, `loc` asks about something else."""
    prompt, subject, slot = prompt_and_subject(row.values, "src", "subject")
    answers = _texts(row.values, "answers")
    if not answers:
        raise UnfitError("missing-field", "no field 'answers' with an answer; give it one")
    around = f"{text(row.values, 'loc', 'prompt')}?" if row.values.get("loc") else None
    answer = text(row.values, "loc_ans", "target") if around else None
    return Request(
        row.prompt_id,
        row.where,
        prompt,
        with_space(prompt, checked_target(answers[0], "answers")),
        subject,
        None,
        (text(row.values, "rephrase", "prompt"),) if row.values.get("rephrase") else (),
        (around,) if around else (),
        with_space(around, answer) if around and answer else None,
        metrics="zsre",
        id=id_text(row.values, "id"),
        slot=slot,
    )


def _jsonl(row: Row) -> Request:
    prompt, subject, slot = _prompt(row.values)
    new = checked_target(text(row.values, "target_new", "target"), "target_new")
    true = optional_text(row.values, "target_true")
    around = optional_text(row.values, "neighbourhood_target") or true
    return Request(
        row.prompt_id,
        row.where,
        prompt,
        with_space(prompt, new),
        subject,
        None if true is None else with_space(prompt, true),
        _texts(row.values, "paraphrases"),
        _texts(row.values, "neighbourhood"),
        None if around is None else with_space(prompt, around),
        _texts(row.values, "generation"),
        _texts(row.values, "references"),
        id=id_text(row.values, "id"),
        slot=slot,
    )


def _prompt(values: Mapping[str, Any]) -> tuple[str, str | None, SubjectPlace | None]:
    """The prompt with its subject, the subject, and where it was put."""
    if SLOT in text(values, "prompt", "prompt"):
        text(values, "subject", "subject")
    prompt, subject, slot = prompt_and_subject(values, "prompt", "subject")
    if subject is not None and slot is None and find_subject(prompt, subject) is None:
        raise UnfitError(
            "no-subject",
            f"the prompt does not hold its subject {subject!r} in whole words; write {SLOT} there",
        )
    return prompt, subject, slot


def _texts(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of texts; none if there is no such field."""
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(each, str) and each for each in found):
        raise UnfitError("bad-type", f"field {name!r} should be a list of texts")
    return tuple(found)


_READERS: dict[
    PromptFormat, tuple[Callable[[Source], Iterable[Row | Rejected]], Callable[[Row], Request]]
] = {
    "counterfact": (array_rows, _counterfact),
    "zsre": (array_rows, _zsre),
    "jsonl": (jsonl_rows, _jsonl),
    "json": (array_rows, _jsonl),
}


def model_source(options: EditInput) -> ModelSource:
    assert options.model is not None
    return ModelSource(
        options.model, options.revision, options.dtype, trust_remote_code=options.trust_remote_code
    )


def load_editable(source: ModelSource) -> LoadedModel:
    return load_model(source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def load(options: EditInput, note: Callable[[str], None]) -> tuple[LoadedModel, list[Request]]:
    """The model, ready to be edited, and the edits; `note` is told what is worth knowing of these."""
    options = options.with_demo_defaults()
    assert options.edits is not None
    requests = read_requests(options.edits, options.format, options.limit)
    for line in subject_notes(requests):
        note(line)
    return load_editable(model_source(options)), requests
