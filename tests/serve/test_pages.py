"""Every page and its twins: what they say is what the rows say, and what is shown to be asked gives the same."""

import csv
import io
import re
from collections import Counter
from typing import Any
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from backlens.atlas import Atlas
from tests.serve.conftest import MARKUP, TOKENS
from tests.store.examples import ExampleRun

Row = dict[str, Any]


def pages(neuron: str) -> list[str]:
    return [
        *("/", "/search", "/search?q=paris", "/token?text=%20Paris", "/token?text=%20Paris&show=places"),
        *(f"/neuron/{neuron}", "/neuron/0.mlp.up.5000", "/prompt/1", "/prompt/1?module=mlp.up"),
        *("/compare", "/compare?one=0&two=1", "/compare?one=0&two=1&module=mlp.up", "/layers"),
        *("/layers?module=mlp.down&by=target", "/about", "/sql", f"/neuron/{neuron}?show=similar"),
    ]


def twin(address: str, form: str) -> str:
    path, _, query = address.partition("?")
    return f"{'/index' if path == '/' else path}.{form}" + (f"?{query}" if query else "")


def tables(client: TestClient, address: str) -> dict[str, list[Row]]:
    answer = client.get(twin(address, "json"))
    assert answer.status_code == 200, answer.text
    return answer.json()["tables"]


def listed(example: ExampleRun) -> list[Row]:
    """Every entry of every kept neuron's lists."""
    return [
        {**row, "side": side, "token": TOKENS[token_id]}
        for row in example.rows["neurons"]
        for side in ("top", "bottom")
        for token_id in row[f"{side}_ids"] or []
    ]


def test_every_page_has_its_three_forms(client: TestClient, neuron: str):
    for address in pages(neuron):
        html = client.get(address)
        assert html.status_code == 200, (address, html.text)
        assert html.headers["content-type"] == "text/html; charset=utf-8"
        data = client.get(twin(address, "json")).json()
        table = client.get(twin(address, "csv"))
        if not data["tables"]:
            assert table.status_code == 400
            assert "has no tables" in table.text
            continue
        # The first is what is said without a name, the last stands for those that have to be named.
        (_, first), *_, (name, last) = [*data["tables"].items()] * 2
        named = client.get(f"{twin(address, 'csv')}{'&' if '?' in address else '?'}table={name}")
        for said, rows in ((table, first), (named, last)):
            assert len(list(csv.DictReader(io.StringIO(said.text)))) == len(rows), (address, name)


def test_twins_that_a_page_names_are_there(client: TestClient, neuron: str):
    for address in (f"/neuron/{neuron}", "/search?q=paris"):
        links = re.findall(r'href="([^"]+\.(?:json|csv)[^"]*)"', client.get(address).text)
        assert len(links) > 2
        assert {client.get(link.replace("&amp;", "&")).status_code for link in links} == {200}


def test_a_pages_links_lead_somewhere(client: TestClient, neuron: str):
    seen: set[str] = set()
    for address in ("/", "/token?text=%20Paris", f"/neuron/{neuron}", "/prompt/0", "/compare?one=0&two=1"):
        text = client.get(address).text
        seen |= {link.replace("&amp;", "&") for link in re.findall(r'(?:href|src)="(/[^"]*)"', text)}
    sample = sorted(seen)[:: max(1, len(seen) // 25)]
    broken = {link: client.get(link).status_code for link in sample}
    assert len(sample) >= 25
    assert set(broken.values()) == {200}, broken


def test_a_token_page_counts_what_the_rows_hold(example: ExampleRun, client: TestClient):
    entries = [entry for entry in listed(example) if entry["token"] == " Paris"]
    counts = Counter((e["layer"], e["module"], e["neuron"], e["side"]) for e in entries)
    rows = tables(client, "/token?text=%20Paris&limit=1000")["neurons"]
    found = {
        (row["layer"], row["module"], row["neuron"], side): row[name]
        for row in rows
        for side, name in (("bottom", "promoted"), ("top", "suppressed"))
        if row[name]
    }
    assert found == counts


def test_a_neuron_page_lists_the_prompts_that_keep_it(example: ExampleRun, client: TestClient, neuron: str):
    layer, _, rest = neuron.partition(".")
    module, _, index = rest.rpartition(".")
    mine = [
        row
        for row in example.rows["neurons"]
        if (row["layer"], row["module"], row["neuron"]) == (int(layer), module, int(index))
    ]
    said = tables(client, f"/neuron/{neuron}")
    norms = {row["prompt_id"]: row["grad_norm"] for row in mine}
    assert {row["prompt_id"]: row["grad_norm"] for row in said["prompts"]} == norms
    assert said["summary"][0]["prompts"] == len(mine)
    assert sum(row["prompts"] for row in said["histogram"]) == len(mine)
    assert max(row["norm_to"] for row in said["histogram"]) == pytest.approx(max(norms.values()))


def test_a_neuron_page_looks_for_similar_ones_only_when_it_is_asked_to(
    example: ExampleRun, client: TestClient, neuron: str
):
    assert "similar" not in tables(client, f"/neuron/{neuron}")
    html = client.get(f"/neuron/{neuron}").text
    (link,) = re.findall(r'href="([^"#]*show=similar)#similar"', html)
    said = [(row["neuron"], row["similarity"]) for row in tables(client, link)["similar"]]
    expected = Atlas(example.out).similar_neurons(neuron).to_pylist()
    assert said == [(row["neuron"], row["similarity"]) for row in expected]
    assert len(said) > 1


def test_a_prompt_page_has_a_cell_for_every_row(example: ExampleRun, client: TestClient):
    rows = [row for row in example.rows["tokens"] if (row["prompt_id"], row["module"]) == (1, "mlp.up")]
    said = tables(client, "/prompt/1?module=mlp.up")["cells"]
    assert {(row["layer"], row["position"]): row["vjp_norm"] for row in said} == {
        (row["layer"], row["position"]): row["vjp_norm"] for row in rows
    }
    html = client.get("/prompt/1?module=mlp.up").text
    assert html.count('class="more"') == len(rows)


def test_what_is_not_kept_is_never_shown_as_zero(example: ExampleRun, client: TestClient):
    kept = {
        prompt_id: {
            (r["layer"], r["module"], r["neuron"])
            for r in example.rows["neurons"]
            if r["prompt_id"] == prompt_id
        }
        for prompt_id in (0, 1)
    }
    rows = tables(client, "/compare?one=0&two=1&limit=1000")["neurons"]
    assert len(rows) == len(kept[0] | kept[1])
    for row in rows:
        key = (row["layer"], row["module"], row["neuron"])
        for side, prompt_id in (("1", 0), ("2", 1)):
            assert (row[f"grad_norm_{side}"] is None) == (key not in kept[prompt_id])
    page = client.get("/compare?one=0&two=1&limit=1000").text
    assert page.count("not kept, ≤") == len(kept[0] ^ kept[1])
    assert "kept for none of the 8 prompts" in client.get("/neuron/0.mlp.up.5000").text


@pytest.mark.parametrize(
    ("q", "match", "expected"),
    [
        ("Paris", "exact", {"Paris"}),
        ("Paris", "spaces", {" Paris"}),
        ("Paris", "case", {" paris"}),
        ("ROME", "case", {" Rome"}),
        ("ond", "part", {" London"}),
        (" the", "exact", {" the"}),
        ("%", "exact", {"%"}),
    ],
)
def test_search_finds_every_variant(client: TestClient, q: str, match: str, expected: set[str]):
    found = tables(client, f"/search?q={quote(q)}")["tokens"]
    assert {row["token"] for row in found if row["match"] == match} == expected


def test_search_shows_spaces(client: TestClient):
    assert '<span class="sign">␣</span>Paris' in client.get("/search?q=paris").text


def test_what_is_copied_gives_the_rows_of_the_page(example: ExampleRun, client: TestClient, neuron: str):
    atlas = Atlas(example.out)
    for address in pages(neuron)[1::2]:
        html = client.get(address).text
        for name, rows in tables(client, address).items():
            block = html.split(f"<summary>{name} as Python or SQL</summary>")[1]
            python, sql = (
                re.sub(r"&#(\d+);", lambda m: chr(int(m[1])), text).replace("&lt;", "<").replace("&gt;", ">")
                for text in re.findall(r"<pre><code>(.*?)</code></pre>", block, re.DOTALL)[:2]
            )
            expression = python.splitlines()[-1].replace("&amp;", "&")
            found = atlas.sql(sql.replace("&amp;", "&")).to_pylist()
            assert eval(expression, {"atlas": atlas}).num_rows == len(found), expression
            # the page has the first of the rows, and says so; its twins have all
            assert len(found) == len(rows) or f"The first {len(found)} rows." in html
            rows = rows[: len(found)]
            shared = [column for column in (found[0] if found else {}) if column in (rows[0] if rows else {})]
            assert [[row[c] for c in shared] for row in found] == [[row[c] for c in shared] for row in rows]


def test_tokens_are_text_and_never_markup(client: TestClient):
    for address in (
        "/",
        f"/search?q={quote(MARKUP)}",
        f"/token?text={quote(MARKUP)}",
        "/prompt/0",
        "/layers",
    ):
        text = client.get(address).text
        assert "<script>alert" not in text
        assert "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in client.get(f"/token?text={quote(MARKUP)}").text
    for token in TOKENS[8:18]:
        assert client.get("/token", params={"text": token}).status_code == 200, token


def test_every_answer_is_guarded(client: TestClient):
    for address in ("/", "/nowhere", "/static/style.css", "/index.json"):
        headers = client.get(address).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]


def test_pages_have_no_inline_style_or_script(client: TestClient, neuron: str):
    for address in pages(neuron):
        text = client.get(address).text
        assert " style=" not in text
        assert "<style" not in text
        assert not re.search(r"<script(?![^>]* src=)|\son\w+=", text)


@pytest.mark.parametrize(
    ("address", "status", "line"),
    [
        ("/prompt/99", 404, "this run has no prompt 99; it has 0 to 7"),
        ("/prompt/3", 404, "prompt: 3 failed (read, missing-field)"),
        ("/prompt/one", 404, "&#39;one&#39; is not a whole number from 0"),
        ("/token?text=Rome", 404, "did you mean &#39; Rome&#39;?"),
        ("/neuron/7.mlp.down.1", 404, "the model has no layer 7; it has 0 to 2"),
        ("/neuron/0.mlp.donw.1", 404, "did you mean mlp.down?"),
        ("/prompt/1?modul=mlp.up", 400, "did you mean module?"),
        ("/prompt/1?module=mlp.upp", 400, "did you mean mlp.up?"),
        ("/compare?one=1&two=1", 400, "give another one"),
        ("/compare?one=1&two=99", 404, "no prompt 99"),
        ("/search?limit=0", 400, "give 1 to 1,000"),
        ("/layers?by=relatoin", 400, "did you mean relation?"),
        ("/nowhere", 404, "there is no page"),
        ("/index.csv?table=prompt", 400, "did you mean prompts?"),
    ],
)
def test_bad_input_gets_one_clear_line(client: TestClient, address: str, status: int, line: str):
    answer = client.get(address)
    assert answer.status_code == status
    assert line.replace("&#39;", "'") in answer.text.replace("&#39;", "'")


def test_a_page_says_where_it_is_cut_and_its_data_is_whole(client: TestClient):
    whole = tables(client, "/token?text=%20Paris&show=places")["places"]
    assert len(whole) > 20
    page = client.get("/token?text=%20Paris&show=places").text
    assert "The first 20 rows." in page
    assert "<code>limit</code> in the address shows up to 1,000" in page
    assert len(tables(client, "/token?text=%20Paris&show=places&limit=3")["places"]) == 3
    lines = client.get("/token.csv?text=%20Paris&show=places").text.splitlines()
    assert len(lines) == len(whole) + 1
    assert "The first" not in client.get("/token?text=%20Paris&show=places&limit=1000").text


def test_data_of_free_sql_is_whole_or_refused(client: TestClient):
    few = {"q": "SELECT range AS x, 'nan'::DOUBLE AS y FROM range(900)"}
    rows = client.get("/sql.json", params=few).json()["tables"]["rows"]
    assert (len(rows), rows[0]) == (900, {"x": 0, "y": None})
    many = {"q": "FROM range(5000)"}
    for form in ("json", "csv"):
        refused = client.get(f"/sql.{form}", params=many)
        assert refused.status_code == 400
        assert "the query has more than 1,000 rows" in refused.text
        assert client.get(f"/sql.{form}", params=many | {"limit": 10}).status_code == 200
    assert "These are the first 100 rows; there are more." in client.get("/sql", params=many).text
