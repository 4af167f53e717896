"""What an edit begins with: the model, and the requests."""

import torch

from pipeline.editing.options import EditInput
from pipeline.editing.request import Request, read_requests
from pipeline.models.checkpoint import ModelSource
from pipeline.models.load import LoadedModel, load_model


def model_source(options: EditInput) -> ModelSource:
    assert options.model is not None
    return ModelSource(
        options.model, options.revision, options.dtype, trust_remote_code=options.trust_remote_code
    )


def load_editable(source: ModelSource) -> LoadedModel:
    return load_model(source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def load(options: EditInput) -> tuple[LoadedModel, list[Request]]:
    """The model, ready to be edited, and the edits."""
    options = options.with_demo_defaults()
    assert options.edits is not None
    requests = read_requests(options.edits, options.format, options.limit)
    return load_editable(model_source(options)), requests
