"""Two hundred hostile inputs to each route: no answer is a 500, nothing is written, and no secret is told."""

import hashlib
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from backlens.serve import pages as sql_page
from backlens.serve import sandbox
from backlens.serve.sandbox import SandboxReply
from tests.store.examples import ExampleRun

BINARY = [
    "\x00",
    "a\x00b",
    "\ud7ff",
    "\u202e",
    "\ufeff",
    "é" * 300,
    "🏳️‍🌈",
    "\r\nSet-Cookie: a=b",
    "\x7f",
    "\t",
]
NUMBERS = [
    "-1",
    "1e9",
    "9" * 18,
    "9" * 19,
    "9" * 400,
    "0x10",
    "NaN",
    "٣",
    "1_0",
    "+5",
    " 7",
    "00",
    "2147483648",
]
PATHS = [
    "../secret.csv",
    "....//secret.csv",
    "%2e%2e%2fsecret.csv",
    "/etc/passwd",
    "C:\\secret",
    "file:///etc/passwd",
]
MARKUP = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}",
    "{% raise %}",
    "javascript:alert(1)",
]
QUOTES = [
    "'",
    "''",
    '"',
    "' OR 1=1 --",
    "'; DROP VIEW tokens; --",
    "\\",
    "`",
    "$1",
    "$q",
    "%s",
    "%",
    "_",
    "?",
    ";",
]
NEURONS = [
    "0.mlp.up.",
    "0.mlp.up.-1",
    "999999999.mlp.up.1",
    "0.' OR 1.1",
    "0.mlp.up.e9.1",
    "0.mlp.up.999999999",
    "0..0",
]


def hostile(secret: Path) -> list[str]:
    """Two hundred: those above, and random mixtures of them."""
    fixed = [*BINARY, *NUMBERS, *PATHS, *MARKUP, *QUOTES, *NEURONS, str(secret), f"read_csv('{secret}')"]
    drawn = random.Random(0)
    mixed = ["".join(drawn.choices(fixed, k=3))[:600] for _ in range(200 - len(fixed))]
    return fixed + mixed


def statements(secret: Path, target: Path) -> list[str]:
    """What a stranger could try with SQL."""
    read = [
        *(
            f"SELECT * FROM {f}('{secret}')"
            for f in ("read_csv", "read_text", "read_blob", "parquet_scan", "glob")
        ),
        *(f"FROM '{secret}'", f'SELECT * FROM "{secret}"', f"TABLE '{secret}'", f"ATTACH '{secret}' AS s"),
        *(f"SUMMARIZE FROM '{secret}'", f"DESCRIBE FROM '{secret}'", f"FROM sniff_csv('{secret}')"),
    ]
    write = [
        *(f"COPY vocab TO '{target}'", f"COPY (SELECT 1) TO '{target}' (USE_TMP_FILE false)"),
        *(f"WITH w AS (COPY vocab TO '{target}') SELECT 1", f"EXPORT DATABASE '{target}'"),
        f"SELECT * FROM json_execute_serialized_sql(json_serialize_sql('COPY vocab TO ''{target}'''))",
        *("CREATE TABLE t AS SELECT 1", "DROP VIEW tokens", "INSERT INTO vocab VALUES (1)", "CHECKPOINT"),
    ]
    reach = [
        *("INSTALL httpfs", "LOAD httpfs", "PRAGMA database_list", "SET enable_external_access = true"),
        *("RESET ALL", "CALL pragma_version()", "SELECT * FROM duckdb_settings()", "SELECT getenv('HOME')"),
        *("SELECT * FROM duckdb_secrets()", "EXPLAIN ANALYZE SELECT 1", "SELECT 1; SELECT 2", "BEGIN"),
        *("SELECT current_setting('allowed_paths')", "FROM query('SELECT 1')", "FROM query_table('vocab')"),
    ]
    odd = [
        *(
            "SELECT",
            "",
            ";",
            "--",
            "/*",
            "SELECT 1 AS a, 2 AS a",
            "SELECT 'nan'::DOUBLE, '-inf'::FLOAT",
            "SELECT NULL",
        ),
        *(
            "SELECT '<script>alert(1)</script>'",
            "SELECT chr(0)",
            "SELECT '\\x00'::BLOB",
            "SELECT map {[1]: 2}",
        ),
        *(
            "SELECT '290000-01-01'::DATE",
            "SELECT 'infinity'::TIMESTAMP",
            "SELECT now()",
            "SELECT INTERVAL 9 YEAR",
        ),
        *(
            "SELECT 170141183460469231731687303715884105727",
            "SELECT [{'a': [now()]}]",
            "SELECT uuid(), 1::BIT",
        ),
        *(
            "SELECT " + "(" * 900 + "1" + ")" * 900,
            "SELECT " + "1+" * 3000 + "1",
            "SELECT 1/0",
            "SELECT error('x')",
        ),
    ]
    whole = [*read, *write, *reach, *odd]
    return whole + [f"{one} {other}" for one in MARKUP + QUOTES for other in whole][: 200 - len(whole)]


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def untouched(example: ExampleRun, secret: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds the run and a secret, and is the same afterwards."""
    folder = secret.parent
    before = contents(folder)
    monkeypatch.chdir(folder)
    yield folder
    assert contents(folder) == before


def assert_harmless(client: TestClient, address: str) -> None:
    answer = client.get(address)
    assert answer.status_code in (200, 400, 404), (address, answer.status_code, answer.text[:300])
    assert "xyzzy-secret" not in answer.text, address
    assert "root:" not in answer.text, address
    is_page = answer.headers["content-type"].startswith("text/html")
    assert not (is_page and "<script>alert" in answer.text), address
    assert "Traceback" not in answer.text, address


ROUTES = [
    *("/?limit={}", "/search?q={}", "/token?text={}", "/neuron/{}", "/prompt/{}", "/prompt/1?module={}"),
    *("/compare?one=1&two={}", "/layers?by={}", "/about?x={}", "/static/{}", "/{}"),
]


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_hostile_values_are_refused_or_answered(
    client: TestClient, untouched: Path, secret: Path, route: str
):
    inputs = hostile(secret)
    assert len(inputs) == 200
    for number, value in enumerate(inputs):
        # As text, and every tenth time also as a client that does not encode would send it.
        assert_harmless(client, route.format(quote(value, safe="")))
        if number % 10 == 0:
            assert_harmless(client, route.format(quote(value, safe="/%")))


@pytest.mark.parametrize(
    "raw", ["%ff", "%c3%28", "%00", "%", "%zz", "%u0041", "a%20b%", "%ed%a0%80", "+", "&&=&"]
)
def test_bad_encodings_are_refused_or_answered(client: TestClient, raw: str):
    for route in ROUTES:
        assert_harmless(client, route.format(raw))


@pytest.mark.slow
def test_hostile_sql_is_refused_or_answered(
    client: TestClient, untouched: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two hundred statements past the process, which takes a second to start: the guard alone must hold."""

    def inside(out: str, statement: str, limit: int) -> SandboxReply:
        return SandboxReply(**sandbox.answer(out, statement, limit, seconds=5))

    monkeypatch.setattr(sql_page, "ask_sandbox", inside)
    asked = statements(secret, untouched / "written.csv")
    assert len(asked) == 200
    for number, statement in enumerate(asked):
        assert_harmless(client, f"/sql{'' if number % 4 else '.json'}?q={quote(statement)}")


@pytest.mark.parametrize(
    ("statement", "line"),
    [
        ("SELECT len(range(300000000))", "memory"),
        ("SELECT count(*) FROM range(10000000000000)", "stopped after"),
        ("SELECT repeat('x', 50000000) FROM range(1000)", ""),
        ("COPY vocab TO 'written.csv'", "only a single select"),
    ],
)
def test_a_query_takes_no_more_than_it_is_given(
    client: TestClient, untouched: Path, monkeypatch: pytest.MonkeyPatch, statement: str, line: str
):
    monkeypatch.setattr(sql_page, "ask_sandbox", partial(sandbox.ask_sandbox, seconds=1.0))
    answer = client.get("/sql.json", params={"q": statement})
    assert answer.status_code == 400
    assert line in answer.text.lower()


def test_sql_is_answered(client: TestClient):
    answer = client.get("/sql.json", params={"q": "SELECT count(*) AS n FROM prompts"}).json()
    assert answer["tables"] == {"rows": [{"n": 7}]}
    cut = client.get("/sql.json", params={"q": "SELECT token_id FROM vocab", "limit": 3}).json()
    assert (len(cut["tables"]["rows"]), cut["is_cut"]) == (3, True)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "testserver.evil", "", "testserver@evil"]
)
def test_other_host_names_get_nothing(client: TestClient, host: str):
    answer = client.get("/index.json", headers={"host": host})
    assert answer.status_code == 400
    assert "tables" not in answer.text


@pytest.mark.parametrize("host", ["testserver", "testserver:8050", "TESTSERVER:1"])
def test_own_host_names_are_answered_with_any_port(client: TestClient, host: str):
    assert client.get("/about", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_only_reading_methods_are_answered(client: TestClient, method: str):
    for path in ("/", "/sql?q=SELECT+1", "/static/style.css"):
        answer = client.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_head_is_get_without_a_body(client: TestClient):
    answer = client.head("/about")
    assert (answer.status_code, answer.text) == (200, "")
