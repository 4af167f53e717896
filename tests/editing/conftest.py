"""The bundled demo model, loaded once; tests leave its weights as they were."""

from pathlib import Path

import pytest
import torch
from docs.demo_model.probes import write_probes

from backlens.demo import FACTS, MODEL
from backlens.editing.activations import Moments, measure, read_texts
from backlens.editing.request import Request, read_requests
from backlens.models.load import LoadedModel, ModelSource, load_model


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    return load_model(ModelSource(str(MODEL)), torch.device("cpu"))


@pytest.fixture(scope="session")
def requests() -> list[Request]:
    return read_requests(str(FACTS))


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    write_probes(folder)
    return folder


@pytest.fixture(scope="session")
def moments(demo: LoadedModel, probes: Path) -> Moments:
    texts = list(read_texts(str(probes / "text.txt")))[::8]
    return measure(demo, texts, range(8))
