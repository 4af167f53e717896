"""A run's peak memory is that of its model and a batch, not of its prompts (`benchmarks/memory.py` has figures)."""

import json
import random
from pathlib import Path

import pytest
from transformers import GPT2Config

from tests.engine.command import peak_memory
from tests.tiny import byte_tokenizer, random_model


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_prompts(tmp_path: Path) -> None:
    shape = GPT2Config(
        n_layer=2, n_embd=256, n_head=4, vocab_size=20_000, bos_token_id=None, eos_token_id=None
    )
    random_model(shape).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    peaks = {count: peak_of_run(tmp_path, count) for count in (300, 1200)}
    assert peaks[1200] <= 1.25 * peaks[300], peaks


def peak_of_run(folder: Path, count: int) -> int:
    """Peak resident memory, in KiB, of `backlens run` over so many prompts, in shards of 50."""
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh ", k=generator.randint(8, 15))) + "x" for _ in range(count)]
    lines = [json.dumps({"prompt": text, "target": " y"}) for text in texts]
    (folder / f"{count}.jsonl").write_text("\n".join(lines))
    prompts, out = folder / f"{count}.jsonl", folder / str(count)
    arguments = ["run", "--executor", "local", "--shard-prompts", 50, "--model", folder / "model"]
    return peak_memory(*arguments, "--prompts", prompts, "--out", out, folder=folder)
