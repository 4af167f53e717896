"""`backlens doctor` on models and tokenizers with something wrong: exit status 1, and which check it is."""

from pathlib import Path

import yaml
from tokenizers.processors import TemplateProcessing
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from tests.doctor.models import PastConfig, SquaredConfig, TwiceConfig, UnmaskedConfig, save
from tests.doctor.test_doctor import doctor
from tests.engine.command import called, write_jsonl
from tests.families import CONFIGS, MODERN
from tests.tiny import byte_tokenizer

LLAMA = {
    "matrices": {f"attn.{name}": f"self_attn.{name}_proj" for name in "qkvo"}
    | {f"mlp.{name}": f"mlp.{name}_proj" for name in ("up", "gate", "down")}
}


def failures(folder: Path, config: PretrainedConfig) -> set[str]:
    """The checks that fail for a model whose blocks are Llama's."""
    (folder / "blocks.yaml").write_text(yaml.safe_dump(LLAMA))
    finished, checks = doctor(save(folder / "model", config), "--anatomy", folder / "blocks.yaml")
    assert finished.status == 1
    return {name for name, check in checks.items() if check.get("status") == "FAIL"}


def test_logits_that_no_lens_gives(tmp_path: Path) -> None:
    assert failures(tmp_path, SquaredConfig(**MODERN)) == {"lens"}


def test_a_model_that_attends_to_padding(tmp_path: Path) -> None:
    assert failures(tmp_path, UnmaskedConfig(**MODERN)) == {"batch, left-padded"}


def test_a_weight_that_is_used_behind_its_modules_back(tmp_path: Path) -> None:
    assert failures(tmp_path, TwiceConfig(**MODERN)) == {"weight gradients"}


def test_a_matrix_whose_module_is_never_called(tmp_path: Path) -> None:
    assert failures(tmp_path, PastConfig(**MODERN)) == {"weight gradients", "batch, right-padded"}
    shown = called("doctor", "--model", tmp_path / "model", "--anatomy", tmp_path / "blocks.yaml")
    assert shown.stdout.count("mlp.down of layer 0 cannot be had: mlp.down_proj is never called") == 2


def test_parts_of_a_fused_matrix_that_leave_columns_out_or_hold_them_twice(tmp_path: Path) -> None:
    thirds = {"groups": 1, "pieces": 3}
    matrices = {
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
        "attn.o": "attn.c_proj",
        "attn.q": {"path": "attn.c_attn", **thirds, "start": 0, "stop": 1},
        "attn.k": {"path": "attn.c_attn", **thirds, "start": 1, "stop": 2},
        "attn.v": {"path": "attn.c_attn", "groups": 4, "pieces": 3, "start": 2, "stop": 3},
    }
    (tmp_path / "blocks.yaml").write_text(yaml.safe_dump({"matrices": matrices}))
    model = save(tmp_path / "model", CONFIGS["gpt2"])
    finished, checks = doctor(model, "--anatomy", tmp_path / "blocks.yaml")
    assert finished.status == 1
    assert checks["widths"]["passed"] is False
    assert "attn.c_attn" in checks["widths"]["detail"]
    assert "weight gradients" not in checks
    assert "pieces: 3" in checks["said"]["draft"]
    matrices["attn.v"]["groups"] = 7
    (tmp_path / "blocks.yaml").write_text(yaml.safe_dump({"matrices": matrices}))
    _, checks = doctor(model, "--anatomy", tmp_path / "blocks.yaml")
    assert "do not divide" in checks["widths"]["detail"]


def test_a_matrix_named_on_the_wrong_side_of_the_residual_stream(tmp_path: Path) -> None:
    swapped = {**LLAMA["matrices"], "mlp.up": "mlp.down_proj", "mlp.down": "mlp.up_proj"}
    (tmp_path / "blocks.yaml").write_text(yaml.safe_dump({"matrices": swapped}))
    model = save(tmp_path / "model", CONFIGS["llama"])
    finished, checks = doctor(model, "--anatomy", tmp_path / "blocks.yaml")
    assert finished.status == 1
    assert "mlp.down (mlp.up_proj) writes a width of 48" in checks["widths"]["detail"]


def with_bos(times: int) -> PreTrainedTokenizerFast:
    """A tokenizer that puts <s> in front so many times."""
    tokenizer = byte_tokenizer(bos=True)
    bos = tokenizer.bos_token_id
    assert isinstance(bos, int)
    template = TemplateProcessing(single="<s> " * times + "$A", special_tokens=[("<s>", bos)])
    tokenizer.backend_tokenizer.post_processor = template  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def test_a_tokenizer_that_doubles_its_beginning_of_sequence_token(tmp_path: Path) -> None:
    model = save(tmp_path / "twice", CONFIGS["llama"], with_bos(2))
    shown = called("doctor", "--model", model)
    assert shown.status == 1
    assert "failed: beginning of sequence\n" in shown.stdout
    assert "--prepend-bos true" in shown.stdout
    finished, checks = doctor(model, "--prepend-bos", "true")
    assert finished.status == 0
    assert checks["beginning of sequence"]["measured"] == 1


def test_prompts_that_spell_the_token_out_are_given_two(tmp_path: Path) -> None:
    model = save(tmp_path / "once", CONFIGS["llama"], with_bos(1))
    spelled = [{"prompt": "<s>A prompt", "target": " x"}, {"prompt": "Another", "target": " x"}]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", spelled)
    finished, checks = doctor(model, "--prompts", prompts)
    assert finished.status == 1
    assert checks["beginning of sequence"]["passed"] is False
    assert checks["beginning of sequence"]["measured"] == 2
    assert checks["beginning written out"]["measured"] == 2
