"""Models that are almost one we know are refused by the command, with a line that says what is in the way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from tests.engine.command import called, error_line, read
from tests.families import MODERN
from tests.tiny import LLAMA_LAYOUT, byte_tokenizer, random_model

CODE = '''
from functools import partial

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM


def past(mlp, x):
    return linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)


class OddConfig(LlamaConfig):
    model_type = "odd"


class Squared(nn.Linear):
    def forward(self, x):
        return super().forward(x).square()


class Running(nn.Module):
    """A norm that remembers what it has seen."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("size", torch.ones(1))

    def forward(self, x):
        self.size = 0.9 * self.size + 0.1 * x.detach().abs().mean()
        return x / self.size * self.weight


class OddModel(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        if config.flaw == "matrix":
            self.model.layers[1].mlp.adapter = nn.Linear(config.hidden_size, 4)
        if config.flaw == "head":
            self.lm_head = Squared(config.hidden_size, config.vocab_size, bias=False)
        if config.flaw == "uncalled":
            for layer in self.model.layers:
                layer.mlp.forward = partial(past, layer.mlp)
        if config.flaw == "short":
            mlp = self.model.layers[1].mlp
            mlp.forward = lambda x: past(mlp, x) if x.shape[1] < 5 else type(mlp).forward(mlp, x)
        if config.flaw == "norm":
            self.model.norm = Running(config.hidden_size)
'''


OWN = {
    "matrix": {
        "model.layers.1.mlp.adapter.weight": torch.ones(4, MODERN["hidden_size"]),
        "model.layers.1.mlp.adapter.bias": torch.ones(4),
    },
    "norm": {"model.norm.size": torch.ones(1)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    random_model(LlamaConfig(**MODERN)).save_pretrained(folder / "sound")
    byte_tokenizer().save_pretrained(folder / "sound")
    (folder / "layout.yaml").write_text(LLAMA_LAYOUT)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "The sea", "target": " is"}))
    return folder


def odd(folder: Path, flaw: str) -> Path:
    """The sound model's weights under code of its own, and those that this adds."""
    model = folder / flaw
    shutil.copytree(folder / "sound", model)
    config = json.loads((model / "config.json").read_text())
    code = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}
    config |= {"model_type": "odd", "architectures": ["OddModel"], "auto_map": code, "flaw": flaw}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling_odd.py").write_text(CODE)
    weights = load_file(model / "model.safetensors")
    save_file(weights | OWN.get(flaw, {}), model / "model.safetensors", {"format": "pt"})
    return model


def run(folder: Path, model: Path, out: Path, *options: object, prompts: Path | None = None):
    prompts = prompts or folder / "prompts.jsonl"
    arguments = ["run", "--model", model, "--prompts", prompts, "--out", out, "--executor", "local"]
    return called(*arguments, "--trust-remote-code", *options)


def test_a_described_architecture_that_is_sound_runs(folder: Path, tmp_path: Path) -> None:
    finished = run(folder, odd(folder, "none"), tmp_path / "out", "--anatomy", folder / "layout.yaml")
    assert finished.status == 0, finished.stderr


@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        ("matrix", "block 1 of this odd is not as we know it: no module name covers its mlp.adapter"),
        ("head", "the lens does not give this model's logits"),
        ("uncalled", "mlp.down of layer 0 cannot be had: mlp.down_proj is never called"),
        ("norm", "the final norm (Running) is not affine up to a scalar per vector"),
    ],
)
def test_a_flaw_is_named(folder: Path, flaw: str, says: str, tmp_path: Path) -> None:
    refused = run(folder, odd(folder, flaw), tmp_path / "out", "--anatomy", folder / "layout.yaml")
    assert refused.status == 2
    assert says in refused.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("out/_commits/*.json"))


@pytest.mark.parametrize("options", [(), ("--activation-checkpointing",)])
def test_prompts_for_which_a_matrix_is_passed_by_have_failed(
    folder: Path, options: tuple[str, ...], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = ["The sea", "Sea", "abc", "ab"]
    prompts.write_text("\n".join(json.dumps({"prompt": text, "target": " is"}) for text in texts))
    out = tmp_path / "out"
    model = folder / "short"
    model = model if model.exists() else odd(folder, "short")
    layout = ("--anatomy", folder / "layout.yaml", "--batch-tokens", 1)
    finished = run(folder, model, out, *layout, *options, prompts=prompts)
    assert finished.status == 1, finished.stderr
    failed = read(out, "failures").to_pylist()
    assert [(row["prompt_id"], row["error"]) for row in failed] == [(n, "matrix-missed") for n in (1, 2, 3)]
    assert "mlp.down of layer 1 cannot be had: mlp.down_proj is never called" in failed[0]["message"]
    rows = read(out, "tokens").to_pylist()
    places = [(row["prompt_id"], row["layer"], row["module"], row["position"]) for row in rows]
    modules = ("mlp.up", "mlp.gate", "mlp.down")
    assert sorted(places) == sorted(
        (0, n, m, at) for n in range(len(rows) // 21) for m in modules for at in range(7)
    )
    assert len(rows) == 21 * json.loads((model / "config.json").read_text())["num_hidden_layers"]


def test_an_unknown_architecture_is_sent_to_the_doctor(folder: Path, tmp_path: Path) -> None:
    model = folder / "none"
    refused = run(folder, model if model.exists() else odd(folder, "none"), tmp_path / "out")
    assert refused.status == 2
    assert "family 'odd' is not known" in error_line(refused)
    assert "backlens doctor" in error_line(refused)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ("matrices: {mlp.upp: mlp.up_proj}", "unknown module 'mlp.upp'; did you mean mlp.up?"),
        ("matrixes: {}", "unknown key 'matrixes'; did you mean matrices?"),
        ("[1, 2]", "a mapping is expected"),
        ("matrices: {attn.q: {path: attn.c_attn, groups: 1, pieces: 3, start: 2, stop: 2}}", "start < stop"),
        ("matrices: {attn.q: {path: attn.c_attn, groups: 1}}", "attn.q: give path, and the whole numbers"),
        ("matrices: {mlp.up: mlp.up_proj}\nlogit-scale: big", "logit-scale: give a number"),
        (
            LLAMA_LAYOUT.replace("mlp.down: mlp.down", "mlp.down: mlp.up").replace(
                "mlp.up: mlp.up", "mlp.up: mlp.down"
            ),
            "does not fit",
        ),
        (
            LLAMA_LAYOUT.replace(
                "mlp.up_proj", "{path: mlp.up_proj, groups: 5, pieces: 1, start: 0, stop: 1}"
            ),
            "does not fit",
        ),
        ("matrices: {mlp.up: mlp.up_proj}", "no module name covers its self_attn.q_proj"),
        ("{", "cannot be read"),
    ],
)
def test_a_description_is_refused_by_what_is_wrong_with_it(
    folder: Path, layout: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "layout.yaml").write_text(layout)
    refused = run(folder, folder / "sound", tmp_path / "out", "--anatomy", tmp_path / "layout.yaml")
    assert refused.status == 2
    assert says in error_line(refused)
