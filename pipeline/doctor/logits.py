"""The lens against the model's own logits."""

from collections.abc import Iterator

from pipeline.doctor.check import Check, at_most
from pipeline.lens import Lens, lens_error, lens_tolerance
from pipeline.models.load import LoadedModel

LENS = "lens"
REMEDY = "scores would not be this model's: something between its last block and its logits is unknown to us"


def lens_check(loaded: LoadedModel, lens: Lens) -> Iterator[Check]:
    """The lens of the last hidden state is what the model says."""
    error, limit = lens_error(loaded.model, loaded.anatomy, lens), lens_tolerance(loaded.model)
    detail = "the lens of the last hidden state against the model's logits, largest difference, relative"
    yield at_most(LENS, error, limit, detail, REMEDY)
