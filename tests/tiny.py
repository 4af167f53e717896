"""Small random models and tokenizers, built from transformers' own configurations and saved to disk."""

import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

LLAMA_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}

LLAMA_LAYOUT = """
matrices:
  mlp.up: mlp.up_proj
  mlp.gate: mlp.gate_proj
  mlp.down: mlp.down_proj
  attn.q: self_attn.q_proj
  attn.k: self_attn.k_proj
  attn.v: self_attn.v_proj
  attn.o: self_attn.o_proj
"""
"""A layout for `--anatomy`, for models that are not known to be Llamas."""

CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(
        n_layer=3,
        n_embd=32,
        n_head=4,
        n_positions=256,
        vocab_size=300,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
    ),
    "llama": LlamaConfig(vocab_size=300, **LLAMA_SHAPE),
    "mistral": MistralConfig(vocab_size=300, **LLAMA_SHAPE),
    "qwen2": Qwen2Config(vocab_size=300, **LLAMA_SHAPE),
    "qwen3": Qwen3Config(vocab_size=300, head_dim=8, **LLAMA_SHAPE),
}


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Random weights, norms and biases included: a bias of zero or a weight of one would hide mistakes."""
    torch.manual_seed(seed)
    config = copy.deepcopy(config)  # a model writes its dtype into the configuration it was made from
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    return model.eval()


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte: ids below 256, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>" if bos else None)


def save_tiny(folder: Path, family: str = "gpt2", seed: int = 0, padding_side: str = "right") -> Path:
    """Save a model with its tokenizer for `from_pretrained`."""
    random_model(CONFIGS[family], seed).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = padding_side
    tokenizer.save_pretrained(folder)
    return folder
