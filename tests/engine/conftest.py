"""Fixtures of the engine's tests: tiny models, prompts, and one Ray cluster for the session."""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.engine.cluster import one_node_cluster
from tests.engine.command import write_jsonl
from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped heads: four for queries, two for keys and values."""
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def cluster() -> Iterator[tuple[str, int]]:
    """The address of a Ray cluster on this machine, and the process id of its head."""
    with one_node_cluster() as started:
        yield started


def some_prompts(count: int, seed: int = 0, longest: int = 24) -> list[dict[str, Any]]:
    """Prompts of 2 to `longest` tokens, with a subject and an id."""
    draw = random.Random(seed)
    prompts: list[dict[str, Any]] = []
    for number in range(count):
        subject = "".join(draw.choices("abcdefgh", k=draw.randint(1, 4)))
        rest = "".join(draw.choices("ijklmnop ,.", k=draw.randint(1, longest - 4)))
        rest = "," + rest[1:]  # the subject is a word by itself
        target = " " + "".join(draw.choices("qrstuv", k=draw.randint(1, 3)))
        prompts.append({"id": f"p{number}", "prompt": subject + rest, "subject": subject, "target": target})
    return prompts


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts."""
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", some_prompts(12))


@pytest.fixture(scope="session", autouse=True)
def _frugal() -> Iterator[None]:
    """One thread for tiny models, and Ray's files in a folder of our own: its sockets need a short path."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(prefix="r")
    with mock.patch.dict(os.environ, {"RAY_TMPDIR": folder}):
        yield
    torch.set_num_threads(threads)
    shutil.rmtree(folder, ignore_errors=True)
