"""A database that is kept: many questions at a time, none of which is in another's way."""

import threading
from pathlib import Path

import pytest

from backlens.atlas import Atlas
from backlens.errors import BacklensError
from backlens.store.directory import Directory
from tests.store.examples import VOCAB, ExampleRun, example_run

ENDLESS = "SELECT count(*) FROM range(10_000_000_000_000)"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ExampleRun:
    return example_run(Directory.at(tmp_path_factory.mktemp("run")))


def test_a_question_that_takes_too_long_ends_alone(example: ExampleRun):
    atlas = Atlas(example.out, seconds=1.0)
    said: list[str] = []

    def ask_for_ever() -> None:
        with pytest.raises(BacklensError) as refusal, atlas.question() as opened:
            opened.sql(ENDLESS).fetchall()
        said.append(str(refusal.value))

    late = threading.Thread(target=ask_for_ever)
    late.start()
    answered = 0
    while late.is_alive():
        assert atlas.by_prompt(1, limit=3).num_rows == 3
        answered += 1
    assert said == ["query: stopped after 1 s; narrow it, by layer for example"]
    assert answered > 3
    assert atlas.by_prompt(1, limit=3).num_rows == 3


def test_a_kept_database_reaches_nothing_but_the_run(example: ExampleRun, tmp_path: Path):
    secret = tmp_path / "secret.csv"
    secret.write_text("xyzzy")
    atlas = Atlas(example.out)
    for statement in (f"FROM '{secret}'", f"COPY vocab TO '{tmp_path}/out.csv'", "SET threads = 1"):
        with pytest.raises(BacklensError, match=r"disabled|locked"), atlas.question() as opened:
            opened.execute(statement)
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


def test_questions_in_many_threads_have_their_own_answers(example: ExampleRun):
    atlas = Atlas(example.out)
    found: dict[int, list[str]] = {}

    def ask(token_id: int) -> None:
        with atlas.question() as opened:
            rows = opened.execute("SELECT token FROM vocab WHERE token_id = $1", [token_id]).fetchall()
        found[token_id] = [token for (token,) in rows]

    asking = [threading.Thread(target=ask, args=(token_id,)) for token_id in range(20)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert found == {token_id: [VOCAB[token_id]] for token_id in range(20)}
