"""What an edit begins with: the model, and the requests."""

import torch

from pipeline.editing.options import EditInput
from pipeline.editing.request import Request, read_requests
from pipeline.models.load import LoadedModel, ModelSource, load_model


def model_source(options: EditInput) -> ModelSource:
    assert options.model is not None
    return ModelSource(
        options.model, options.revision, options.dtype, trust_remote_code=options.trust_remote_code
    )


def load_editable(options: EditInput) -> LoadedModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_model(model_source(options), device)


def load(options: EditInput) -> tuple[LoadedModel, list[Request]]:
    """The model, ready to be edited, and the edits."""
    options = options.with_demo_defaults()
    assert options.edits is not None
    requests = read_requests(options.edits, options.format, options.limit)
    return load_editable(options), requests
