"""What notebooks show: static tables in which a token is text, whatever it says."""

import re

import duckdb
import pyarrow as pa
import pytest

from backlens.atlas import Atlas
from backlens.display import SHOWN_ROWS, Answer
from backlens.store.directory import Directory
from tests.store.examples import example_run

TOKENS = ["<script>alert(1)</script>", " Paris", "\n", "שלום", '"&', None]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas(example_run(Directory.at(tmp_path_factory.mktemp("run"))).out)


def test_tokens_are_escaped_and_their_spaces_visible():
    shown = Answer(pa.table({"token": TOKENS, "top_tokens": [TOKENS[:2]] * 6, "norm": [0.123456] * 6}))
    html = shown._repr_html_()
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 7
    for cell in ("␣Paris", "⏎", "שלום", "&quot;&amp;", ""):
        assert f"<bdi>{cell}</bdi>" in html
    assert '<td style="text-align: right">0.1235</td>' in html


def test_every_answer_is_a_table_without_script_or_links(atlas: Atlas):
    answers = [atlas.by_prompt(1), atlas.coverage(), atlas.prompt(1), atlas.sql("FROM vocab"), atlas]
    answers += [atlas.compare_prompts(1, 2), atlas.neuron_summary("1.mlp.up.2"), atlas.by_token(" Paris")]
    for answer in answers:
        html = answer._repr_html_()
        assert html.startswith("<table>")
        assert set(re.findall(r"<(\w+)", html)) <= {"table", "thead", "tbody", "tr", "th", "td", "p", "bdi"}


def test_long_answers_are_cut_and_say_so(atlas: Atlas):
    answer = atlas.sql("FROM tokens", 1000)
    html = answer._repr_html_()
    assert html.count("<tr>") == SHOWN_ROWS + 1
    assert f"the first {SHOWN_ROWS} of {answer.num_rows} rows" in html


def test_a_run_says_what_it_is(atlas: Atlas):
    assert "2 of 2" in atlas._repr_html_()
    assert "which is not zero" in atlas._repr_html_()


def test_an_answer_is_arrow_data(atlas: Atlas):
    answer = atlas.coverage()
    assert pa.table(answer) == answer.table
    assert answer == atlas.coverage()
    assert len(answer) == answer.num_rows == len(answer["layer"])
    assert duckdb.from_arrow(answer).limit(2).to_arrow_table().num_rows == 2
