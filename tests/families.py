"""A tiny model of every family that is known, and where its fused matrices keep q, k, v, gate and up.

The columns of fused outputs are written out by plain loops, from the families' own attention code; nothing here
is shared with `backlens.models.layout`.
"""

from collections.abc import Callable
from typing import Any

import transformers as hf
from torch import Tensor
from transformers import PretrainedConfig

VOCABULARY = 300
HEADS, KV_HEADS, HEAD, FF = 4, 2, 8, 48
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.05}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": HEADS, "n_positions": 64, **SMALL}
MODERN = {
    "hidden_size": 32,
    "intermediate_size": FF,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    **SMALL,
}
EQUAL_HEADS = {key: value for key, value in MODERN.items() if key != "num_key_value_heads"}
OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "ffn_dim": FF,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "init_std": 0.05,
}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS, **SMALL}

CONFIGS: dict[str, PretrainedConfig] = {
    "bloom": hf.BloomConfig(hidden_size=32, n_layer=2, n_head=HEADS, **SMALL),
    "cohere": hf.CohereConfig(**MODERN),
    "falcon": hf.FalconConfig(**FALCON),
    "falcon, grouped heads": hf.FalconConfig(num_kv_heads=2, new_decoder_architecture=True, **FALCON),
    "falcon, all heads": hf.FalconConfig(multi_query=False, alibi=True, bias=True, **FALCON),
    "gemma": hf.GemmaConfig(head_dim=HEAD, **MODERN),
    "gemma2": hf.Gemma2Config(head_dim=HEAD, query_pre_attn_scalar=HEAD, **MODERN),
    "gemma3_text": hf.Gemma3TextConfig(head_dim=HEAD, query_pre_attn_scalar=HEAD, **MODERN),
    "glm4": hf.Glm4Config(head_dim=HEAD, **MODERN),
    "gpt2": hf.GPT2Config(**GPT),
    "gpt_bigcode": hf.GPTBigCodeConfig(**GPT),
    "gpt_bigcode, all heads": hf.GPTBigCodeConfig(multi_query=False, **GPT),
    "gpt_neo": hf.GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=HEADS,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        intermediate_size=FF,
        **SMALL,
    ),
    "gpt_neox": hf.GPTNeoXConfig(**EQUAL_HEADS),
    "gptj": hf.GPTJConfig(rotary_dim=4, n_inner=FF, **GPT),
    "granite": hf.GraniteConfig(logits_scaling=8.0, **MODERN),
    "llama": hf.LlamaConfig(**MODERN),
    "mistral": hf.MistralConfig(**MODERN),
    "mpt": hf.MptConfig(
        d_model=32, n_heads=HEADS, n_layers=2, max_seq_len=64, vocab_size=VOCABULARY, initializer_range=0.05
    ),
    "olmo": hf.OlmoConfig(**MODERN),
    "olmo2": hf.Olmo2Config(**MODERN),
    "opt": hf.OPTConfig(word_embed_proj_dim=32, **OPT),
    "opt, as 350m": hf.OPTConfig(word_embed_proj_dim=16, do_layer_norm_before=False, **OPT),
    "phi": hf.PhiConfig(**MODERN),
    "phi3": hf.Phi3Config(**MODERN),
    "qwen2": hf.Qwen2Config(**MODERN),
    "qwen3": hf.Qwen3Config(head_dim=HEAD, **MODERN),
    "stablelm": hf.StableLmConfig(**MODERN),
    "starcoder2": hf.Starcoder2Config(**MODERN),
}

EXPERTS, EXPERT_FF = 4, 24
MOE: dict[str, Any] = MODERN | {"num_experts_per_tok": 2}
MOE_HEADS: dict[str, Any] = MOE | {"head_dim": HEAD}
DEEPSEEK: dict[str, Any] = MOE | {
    "num_key_value_heads": HEADS,
    "moe_intermediate_size": EXPERT_FF,
    "n_routed_experts": EXPERTS,
    "topk_group": 1,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
CONFIGS |= {
    "deepseek_v3": hf.DeepseekV3Config(first_k_dense_replace=1, n_group=1, q_lora_rank=12, **DEEPSEEK),
    "deepseek_v3, whole queries": hf.DeepseekV3Config(
        first_k_dense_replace=0, n_group=2, q_lora_rank=None, **DEEPSEEK
    ),
    "gpt_oss": hf.GptOssConfig(
        head_dim=HEAD,
        num_local_experts=EXPERTS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **MOE,
    ),
    "mixtral": hf.MixtralConfig(num_local_experts=EXPERTS, **MOE),
    "olmoe": hf.OlmoeConfig(num_experts=EXPERTS, **MOE),
    "qwen2_moe": hf.Qwen2MoeConfig(
        num_experts=EXPERTS,
        moe_intermediate_size=EXPERT_FF,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[0],
        **MOE,
    ),
    "qwen3_moe": hf.Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=EXPERT_FF, **MOE_HEADS),
}

Columns = Callable[[str], list[int]]


def _span(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def _end_to_end(q: int, kv: int) -> Columns:
    """q, then k, then v, of so many columns."""
    starts = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}
    return lambda name: _span(*starts[name])


def _head_by_head(name: str) -> list[int]:
    """q, k and v of head 0, then of head 1, …"""
    offset = {"q": 0, "k": 1, "v": 2}[name] * HEAD
    return [column for head in range(HEADS) for column in _span(head * 3 * HEAD + offset, HEAD)]


def _group_by_group(name: str) -> list[int]:
    """Falcon's new architecture: the queries that share a key-value head, its key, its value, then the next."""
    queries = HEADS // KV_HEADS
    first, count = {"q": (0, queries), "k": (queries, 1), "v": (queries + 1, 1)}[name]
    group = (queries + 2) * HEAD
    return [column for kv in range(KV_HEADS) for column in _span(kv * group + first * HEAD, count * HEAD)]


_D = HEADS * HEAD
FUSED_ATTENTION: dict[str, tuple[str, Columns]] = {
    "bloom": ("self_attention.query_key_value", _head_by_head),
    "falcon": ("self_attention.query_key_value", _end_to_end(_D, HEAD)),
    "falcon, grouped heads": ("self_attention.query_key_value", _group_by_group),
    "falcon, all heads": ("self_attention.query_key_value", _head_by_head),
    "gpt2": ("attn.c_attn", _end_to_end(_D, _D)),
    "gpt_bigcode": ("attn.c_attn", _end_to_end(_D, HEAD)),
    "gpt_bigcode, all heads": ("attn.c_attn", _head_by_head),
    "gpt_neox": ("attention.query_key_value", _head_by_head),
    "mpt": ("attn.Wqkv", _end_to_end(_D, _D)),
    "phi3": ("self_attn.qkv_proj", _end_to_end(_D, KV_HEADS * HEAD)),
}
FUSED_MLP = {"glm4": "mlp.gate_up_proj", "phi3": "mlp.gate_up_proj"}


def expert_gradient(case: str, module: str, gradients: dict[str, Tensor], expert: int) -> Tensor:
    """(in, out) of one expert's matrix, out of the gradients of its layer's 3-D weights by name."""
    if module == "mlp.down":
        gradient = gradients["down_proj"][expert]
        return gradient if case == "gpt_oss" else gradient.T
    fused = gradients["gate_up_proj"][expert]
    if case == "gpt_oss":  # (in, out), a column of the gate and one of the other in turn
        return fused[:, 0::2] if module == "mlp.gate" else fused[:, 1::2]
    half = len(fused) // 2
    return (fused[:half] if module == "mlp.gate" else fused[half:]).T


def columns_of(case: str, module: str) -> tuple[str, list[int]] | None:
    """For a fused module: the submodule that computes it, and its columns there; None for one of its own."""
    part, name = module.split(".")
    if part == "attn" and name != "o" and case in FUSED_ATTENTION:
        path, columns = FUSED_ATTENTION[case]
        return path, columns(name)
    if name in ("gate", "up") and case in FUSED_MLP:
        return FUSED_MLP[case], _span(0 if name == "gate" else FF, FF)
    return None
