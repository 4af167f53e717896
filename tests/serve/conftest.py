"""A small run with an atlas, some of whose tokens and prompts would be markup, and a client of its explorer."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from backlens.atlas import Atlas
from backlens.atlas.build import build_atlas
from backlens.serve.app import make_app
from backlens.serve.page import Served
from backlens.store.commit import VOCAB_FILE, commit_shard, write_vocab
from backlens.store.directory import Directory
from backlens.store.run_record import finish
from tests.store.examples import VOCAB, ExampleRun, arrow, random_rows, start_run

MARKUP = "<script>alert(1)</script>"
TOKENS = [*VOCAB[:10], MARKUP, "\x00", "a&b=c#d", "\u202erev", '"><img src=x>', ".json", *VOCAB[16:]]


@pytest.fixture(scope="package")
def example(tmp_path_factory: pytest.TempPathFactory) -> ExampleRun:
    directory = Directory.at(tmp_path_factory.mktemp("served"))
    run = start_run(directory, prompts=8, shard_prompts=8)
    Path(directory.root, VOCAB_FILE).unlink()
    write_vocab(directory, TOKENS, [token.encode() for token in TOKENS])
    rows = random_rows(random.Random(0), range(8))
    rows["prompts"][0]["prompt"] = f"{MARKUP} is"
    rows["prompts"][1]["relation"] = MARKUP
    commit_shard(directory, 0, arrow(rows), first_prompt=0, prompts=8)
    finish(run)
    build_atlas(directory)
    return ExampleRun(run, rows)


@pytest.fixture(scope="package")
def client(example: ExampleRun) -> Iterator[TestClient]:
    app = make_app(Served.of(Atlas(example.out), example.out, has_sql=True), ["testserver"])
    with TestClient(app, raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture(scope="package")
def neuron(example: ExampleRun) -> str:
    """The address of a neuron that is kept."""
    row = example.rows["neurons"][0]
    return f"{row['layer']}.{row['module']}.{row['neuron']}"


@pytest.fixture
def secret(example: ExampleRun) -> Iterator[Path]:
    """A file beside the run that nobody may read through the explorer."""
    path = Path(example.out).parent / "secret.csv"
    path.write_text("word\nxyzzy-secret\n")
    yield path
    path.unlink()
