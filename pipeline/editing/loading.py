"""What an edit begins with: the model, and the requests."""

from collections.abc import Callable

import torch

from pipeline.editing.options import EditInput
from pipeline.editing.request import Request, read_requests, subject_notes
from pipeline.models.load import LoadedModel, ModelSource, load_model


def model_source(options: EditInput) -> ModelSource:
    assert options.model is not None
    return ModelSource(
        options.model, options.revision, options.dtype, trust_remote_code=options.trust_remote_code
    )


def load_editable(options: EditInput) -> LoadedModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_model(model_source(options), device)


def load(options: EditInput, note: Callable[[str], None]) -> tuple[LoadedModel, list[Request]]:
    """The model, ready to be edited, and the edits; `note` is told what is worth knowing of these."""
    options = options.with_demo_defaults()
    assert options.edits is not None
    requests = read_requests(options.edits, options.format, options.limit)
    for line in subject_notes(requests):
        note(line)
    return load_editable(options), requests
