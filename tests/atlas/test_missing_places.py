"""A layer, module, expert or neuron that is not there: refused alike on the command line, in Python and on a page."""

import pytest
from starlette.testclient import TestClient

from pipeline.atlas import Atlas
from pipeline.errors import BacklensError
from pipeline.serve.app import make_app
from pipeline.serve.page import Served
from tests.engine.command import called, error_line, write_jsonl
from tests.families import CONFIGS
from tests.tiny import byte_tokenizer, random_model

ASKED = ("by_neuron", "neuron_tokens", "neuron_summary", "similar_neurons")


@pytest.fixture(scope="module", params=["llama", "qwen2_moe"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A family, and a run over its second layer alone, which keeps two neurons of each matrix."""
    folder = tmp_path_factory.mktemp(request.param)
    random_model(CONFIGS[request.param]).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": "The sea", "target": " is"}])
    given = (
        "--model",
        folder / "model",
        "--prompts",
        prompts,
        "--out",
        folder / "out",
        "--executor",
        "local",
    )
    assert called("run", *given, "--layers", 1, "--neurons", 2).status == 0
    return request.param, str(folder / "out")


def width(family: str, part: str) -> int:
    config = CONFIGS[family]
    return int(
        {
            "dense": getattr(config, "shared_expert_intermediate_size", config.intermediate_size),
            "expert": getattr(config, "moe_intermediate_size", 0),
        }[part]
    )


def mistakes(family: str) -> dict[str, str]:
    """Addresses, and what is said of them."""
    experts = family == "qwen2_moe"
    wide = max(width(family, "dense"), width(family, "expert"))
    found = {
        f"1.mlp.down.{wide}": f"mlp.down of layer 1 has no neuron {wide}; it is {wide} wide: 0 to {wide - 1}",
        "1.mlp.down.99999": f"has no neuron 99999; it is {wide} wide",
        "0.mlp.down.1": "this run has no layer 0; it has 1 (--layers)",
        "99.mlp.down.1": "the model has no layer 99; it has 0 to 1",
        "1.attn.q.1": "this run has no module 'attn.q'",
        "1.mlp.middle.1": "this run has no module 'mlp.middle'",
    }
    if experts:
        narrow = width(family, "expert")
        found["1.mlp.up.e4.0"] = "mlp.up of layer 1 has no expert 4; it has 0 to 3"
        found[f"1.mlp.up.e3.{narrow}"] = f"has no neuron {narrow}; it is {narrow} wide: 0 to {narrow - 1}"
    else:
        found["1.mlp.up.e0.1"] = "mlp.up of layer 1 has no experts; leave out e0"
    return found


def test_what_is_not_there_is_refused_everywhere(run: tuple[str, str]) -> None:
    family, out = run
    atlas = Atlas(out)
    app = make_app(Served.of(atlas, out, has_sql=False), ["testserver"])
    with TestClient(app, raise_server_exceptions=False) as client:
        for address, says in mistakes(family).items():
            for method in ASKED:
                with pytest.raises(BacklensError) as refused:
                    getattr(atlas, method)(address)
                assert says in str(refused.value)
            for show in ("prompts", "tokens", "summary", "similar"):
                asked = called("query", out, "--neuron", address, "--show", show)
                assert (asked.status, asked.stdout) == (2, "")
                assert says in error_line(asked)
            for ending in ("", ".json", ".csv"):
                page = client.get(f"/neuron/{address}{ending}")
                assert page.status_code == 404
                assert says in page.text.replace("&#39;", "'")
            search = client.get("/search", params={"q": address})
            assert f'href="/neuron/{address}"' not in search.text


def test_a_neuron_that_is_there_and_not_kept_is_below_the_cut_off(run: tuple[str, str]) -> None:
    family, out = run
    kept = {
        row["neuron"]
        for row in Atlas(out).sql("SELECT neuron FROM neurons WHERE module = 'mlp.down'").to_pylist()
    }
    index = max(set(range(width(family, "dense"))) - kept)
    address = f"1.mlp.down.{index}"
    assert Atlas(out).by_neuron(address).num_rows == 0
    asked = called("query", out, "--neuron", address, "--layer", 1, "--module", "mlp.down")
    assert asked.status == 0
    app = make_app(Served.of(Atlas(out), out, has_sql=False), ["testserver"])
    with TestClient(app) as client:
        assert "below the cut-off, which is not zero" in client.get(f"/neuron/{address}").text
        assert f'href="/neuron/{address}"' in client.get("/search", params={"q": address}).text


def test_options_that_contradict_an_address_or_do_not_reach_sql_are_refused(run: tuple[str, str]) -> None:
    _, out = run
    for option, says in (
        (("--layer", 99), "--layer 99: --neuron 1.mlp.down.3 is in layer 1"),
        (("--module", "mlp.up"), "--module mlp.up: --neuron 1.mlp.down.3 is in module mlp.down"),
    ):
        asked = called("query", out, "--neuron", "1.mlp.down.3", *option)
        assert (asked.status, asked.stdout) == (2, "")
        assert says in error_line(asked)
    asked = called("query", out, "--sql", "SELECT 1", "--layer", 1)
    assert asked.status == 2
    assert "do not go with --sql" in error_line(asked)


def test_a_tokens_places_are_those_of_the_layer_and_module_that_are_named(run: tuple[str, str]) -> None:
    _, out = run
    atlas = Atlas(out)
    listed = atlas.sql(
        "SELECT token FROM (SELECT unnest(top_ids) AS token_id FROM tokens) JOIN vocab USING (token_id)"
    )
    token = listed.to_pylist()[0]["token"]
    everywhere = atlas.by_token(token, 10_000).to_pylist()
    only = atlas.by_token(token, 10_000, layer=1, module="mlp.down").to_pylist()
    assert only == [row for row in everywhere if row["module"] == "mlp.down"]
    with pytest.raises(BacklensError, match="this run has no layer 0"):
        atlas.by_token(token, layer=0)
