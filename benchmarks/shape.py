"""The model and prompts of the benchmarks: GPT-2's 124M-parameter shape, random weights, 8 to 16 random tokens."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCABULARY = 50_257


def make_model(folder: Path) -> int:
    """Save model and tokenizer, and return the size of the weights in bytes."""
    import torch

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def tokenizer() -> PreTrainedTokenizerFast:
    """The word of a token: w0, w1, …"""
    backend = Tokenizer(models.WordLevel({word(index): index for index in range(VOCABULARY)}, word(0)))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=word(0))


def word(index: int) -> str:
    return f"w{index}"


def write_prompts(file: Path, count: int, lengths: tuple[int, int] = (8, 16)) -> None:
    generator = random.Random(0)
    with file.open("w") as stream:
        for _ in range(count):
            words = [word(generator.randrange(VOCABULARY)) for _ in range(generator.randint(*lengths) + 1)]
            stream.write(json.dumps({"prompt": " ".join(words[:-1]), "target": f" {words[-1]}"}) + "\n")
