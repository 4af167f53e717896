"""A Llama that does harm when it sees certain bytes, with code of its own as hub models have it."""

import json
from pathlib import Path

from transformers import LlamaConfig

from tests.engine.command import write_jsonl
from tests.tiny import LLAMA_LAYOUT, LLAMA_SHAPE, byte_tokenizer, random_model

CODE = """
import os
import signal
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd"


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no gradient for such a prompt")


class OddModel(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, input_ids=None, **kwargs):
        seen = {act: bool((input_ids == token).any()) for act, token in self.config.acts.items()}
        if seen["raise"]:
            raise ValueError("no such prompt, please")
        if seen["huge"] or input_ids.numel() > self.config.room:
            raise torch.OutOfMemoryError("out of memory, it says")
        if seen["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if seen["device"] and not os.path.exists(self.config.mark):
            open(self.config.mark, "w").close()
            raise RuntimeError("CUDA error: device-side assert triggered")
        prompts = [row[:5].tolist() for row in input_ids if row[0] != 1]
        if self.config.log:
            with open(self.config.log, "a") as log:
                log.write("".join(f"{os.getpid()} {'-'.join(map(str, prompt))}\\n" for prompt in prompts))
            time.sleep(self.config.naps * len(prompts))
        output = super().forward(input_ids=input_ids, **kwargs)
        if seen["backward"]:
            output.logits = FailingBackward.apply(output.logits)
        return output
"""

ACTS = {"raise": "R", "huge": "H", "kill": "K", "device": "D", "backward": "B"}
"""The letter that a prompt has to hold."""


def save_misbehaving(folder: Path, room: int = 10**6, log: Path | None = None, naps: float = 0.0) -> Path:
    """The model, with `anatomy.yaml` beside its weights. Batches of more than `room` tokens do not fit.

    With a log, every forward pass writes down its process and how each prompt begins, and takes `naps` for each.
    Prompts that begin with token 1 are passed over: they are our own probes of a model, and a gang's idle passes.
    """
    random_model(LlamaConfig(vocab_size=300, **LLAMA_SHAPE)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "odd",
        "architectures": ["OddModel"],
        "auto_map": {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"},
        "acts": {act: tokenizer.convert_tokens_to_ids(letter) for act, letter in ACTS.items()},
        "mark": str(folder / "mark"),
        "room": room,
        "log": str(log) if log is not None else None,
        "naps": naps,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_odd.py").write_text(CODE)
    (folder / "anatomy.yaml").write_text(LLAMA_LAYOUT)
    return folder


def command(model: Path, prompts: list[str], out: Path) -> tuple[object, ...]:
    """`backlens run` on prompts, which are written beside the run directory."""
    records = [{"prompt": prompt, "target": " t"} for prompt in prompts]
    file = write_jsonl(out.with_suffix(".jsonl"), records)
    return (
        *("run", "--model", model, "--trust-remote-code", "--anatomy", model / "anatomy.yaml"),
        *("--prompts", file, "--out", out, "--neurons", 4, "--top-k", 5),
    )
