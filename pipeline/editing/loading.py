"""What an edit begins with: the model, and the requests."""

from collections.abc import Callable

import torch

from pipeline.editing.options import EditInput
from pipeline.editing.request import Request, read_requests, subject_notes
from pipeline.models.checkpoint import ModelSource
from pipeline.models.load import LoadedModel, load_model


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
