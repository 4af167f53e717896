"""What `backlens plan --calibrate` says, against what the run then takes: seconds of the stages, bytes by table.

    python -m benchmarks.planned [--threads 1]

Small models and GPT-2's width with a few layers, random weights, several settings; the plan is made just before the
run, in this process, and the run is one of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from benchmarks.shape import VOCABULARY, tokenizer, write_prompts
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SETTINGS: dict[str, tuple[str, list[str]]] = {
    "GPT-2's width": ("gpt2", []),
    "all modules, last position, k = 3": (
        "gpt2",
        ["--modules", "all", "--positions", "last", "--top-k", "3", "--neurons", "4"],
    ),
    "narrow": ("narrow", []),
    "narrow, all neurons": ("narrow", ["--neurons", "-1", "--modules", "mlp.down"]),
    "Llama in bfloat16, factors": ("llama", ["--neurons", "0", "--top-k", "20", "--save-factors"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        write_prompts(folder / "prompts.jsonl", 96)
        for label, (model, arguments) in SETTINGS.items():
            compare(folder, label, folder / model, arguments, options.threads)


def make_models(folder: Path) -> None:
    torch.manual_seed(0)
    wide = GPT2LMHeadModel(GPT2Config(n_layer=5, bos_token_id=None, eos_token_id=None))
    narrow = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=64, n_head=4, bos_token_id=None, eos_token_id=None))
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=4,
            num_attention_heads=8,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).bfloat16()
    for name, model in (("gpt2", wide), ("narrow", narrow), ("llama", llama)):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)


def compare(folder: Path, label: str, model: Path, arguments: list[str], threads: int) -> None:
    from backlens.cli.main import app
    from backlens.config import PlanOptions
    from backlens.forecast import make_forecast

    out = folder / f"run of {label}"
    common = [
        "--model",
        str(model),
        "--prompts",
        str(folder / "prompts.jsonl"),
        "--out",
        str(out),
        *arguments,
    ]
    _, bound, *_ = app.parse_args(["run", *common])
    forecast = make_forecast(bound.arguments["options"], PlanOptions(calibrate=True))
    entry = [
        sys.executable,
        "-c",
        "from backlens.cli.entry import main; main()",
        "run",
        "--executor",
        "local",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([*entry, *common], env=environment, check=True, capture_output=True)
    seconds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for file in (out / "_commits").glob("*.json"):
        commit = json.loads(file.read_text())
        seconds.update({stage: commit["stats"][f"seconds_{stage}"] for stage in forecast.times.stages})
        sizes.update({table: record["bytes"] for table, record in commit["files"].items()})
    planned, taken = sum(forecast.times.stages.values()), sum(seconds.values())
    print(f"{label}: {planned:.2f} s planned, {taken:.2f} taken, {planned / taken:.2f}", flush=True)
    expected = forecast.expected.bytes
    parts = ", ".join(f"{table} {expected[table] / size:.2f}" for table, size in sizes.items())
    print(f"    bytes {sum(expected.values()) / sum(sizes.values()):.3f} ({parts})", flush=True)


if __name__ == "__main__":
    main()
