"""Where each family keeps the matrices of a block: one small description per layout.

A layout is looked up by `config.model_type` and checked against the model it is used on (`anatomy.py`), so a
wrong or incomplete description is refused, never half used. To add a family, name its layout in `LAYOUTS`; to
add a layout, describe its block in the words of `MODULES`. What structure alone says for certain (the blocks,
the final norm, the head) is not described here but found (`structure.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

READS = ("mlp.up", "mlp.gate", "attn.q", "attn.k", "attn.v")
"""Modules that read the residual stream: their residual side is the input x (the paper's "imprint")."""

WRITES = ("mlp.down", "attn.o")
"""Modules that write to the residual stream: their residual side is the VJP δ (the paper's "shift")."""

MODULES = ("mlp.up", "mlp.gate", "mlp.down", "attn.q", "attn.k", "attn.v", "attn.o")


@dataclass(frozen=True, slots=True)
class Cut:
    """One module's part of a fused output, seen as (groups, pieces, width): some pieces of every group."""

    groups: int
    pieces: int
    start: int
    stop: int

    def __call__(self, values: Float[Tensor, "*batch fused"]) -> Float[Tensor, "*batch out"]:
        pieces = values.unflatten(-1, (self.groups, self.pieces, -1))
        return pieces[..., self.start : self.stop, :].flatten(-3)

    def __str__(self) -> str:
        pieces = f"{self.start}" if self.stop == self.start + 1 else f"{self.start} to {self.stop - 1}"
        return f"piece {pieces} of {self.pieces}" + (f" in each of {self.groups}" if self.groups > 1 else "")

    def width(self, fused: int) -> int:
        return fused // self.pieces * (self.stop - self.start)


CutOf = Callable[[PretrainedConfig], Cut]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix: a submodule of the block, or a part of a fused submodule's output."""

    path: str
    cut: Cut | CutOf | None = None

    def cut_in(self, config: PretrainedConfig) -> Cut | None:
        return self.cut(config) if callable(self.cut) and not isinstance(self.cut, Cut) else self.cut


@dataclass(frozen=True, slots=True)
class Layout:
    """A family's block, as paths from the block."""

    matrices: Mapping[str, Matrix | tuple[Matrix, ...]]
    """By module name; several where blocks differ (a dense block, one with a shared expert): each has one of them."""
    experts: str | None = None
    """A submodule with the up (and gate) and down matrices of routed experts as 3-D weights."""
    not_covered: Mapping[str, str] = field(default_factory=dict)
    """Matrices that no module name stands for, and what they are; their gradients are not in the tables."""
    logit_scale: float | Callable[[PretrainedConfig], float] = 1.0
    """What the head's output is multiplied by."""

    def alternatives(self, module: str) -> tuple[Matrix, ...]:
        matrix = self.matrices[module]
        return (matrix,) if isinstance(matrix, Matrix) else matrix

    def logit_scale_in(self, config: PretrainedConfig) -> float:
        return self.logit_scale(config) if callable(self.logit_scale) else self.logit_scale


def part(index: int, of: int) -> CutOf:
    """One of several equal parts, end to end."""
    return lambda _config: Cut(1, of, index, index + 1)


def per_head(index: int) -> CutOf:
    """q, k, v (0, 1, 2) of every head side by side."""
    return lambda config: Cut(config.num_attention_heads, 3, index, index + 1)


def heads_end_to_end(name: str) -> CutOf:
    """All heads of q, then those of k, then those of v; k and v may have fewer."""

    def cut(config: PretrainedConfig) -> Cut:
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        return _q_k_v(name, 1, heads, kv)

    return cut


def falcon(name: str) -> CutOf:
    """The three ways in which Falcon models fuse q, k and v."""

    def cut(config: PretrainedConfig) -> Cut:
        heads = config.num_attention_heads
        if config.new_decoder_architecture:  # every key-value head behind the query heads that share it
            return _q_k_v(name, config.num_kv_heads, heads // config.num_kv_heads, 1)
        return _q_k_v(name, 1, heads, 1) if config.multi_query else _q_k_v(name, heads, 1, 1)

    return cut


def bigcode(name: str) -> CutOf:
    """All query heads, then one key and one value; or per head where the model is not multi-query."""

    def cut(config: PretrainedConfig) -> Cut:
        heads = config.num_attention_heads
        return _q_k_v(name, 1, heads, 1) if config.multi_query else _q_k_v(name, heads, 1, 1)

    return cut


def _q_k_v(name: str, groups: int, q: int, kv: int) -> Cut:
    starts = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    return Cut(groups, q + 2 * kv, *starts[name])


def _separate(prefix: str, output: str) -> dict[str, Matrix]:
    return {f"attn.{n}": Matrix(f"{prefix}.{n}_proj") for n in "qkv"} | {
        "attn.o": Matrix(f"{prefix}.{output}")
    }


def _fused(path: str, cut: Callable[[str], CutOf], output: str) -> dict[str, Matrix]:
    return {f"attn.{n}": Matrix(path, cut(n)) for n in "qkv"} | {"attn.o": Matrix(output)}


def _mlp(up: str, down: str, gate: str | None = None) -> dict[str, Matrix]:
    matrices = {"mlp.up": Matrix(up), "mlp.down": Matrix(down)}
    return matrices | ({"mlp.gate": Matrix(gate)} if gate else {})


def _gated(prefix: str) -> dict[str, Matrix]:
    return _mlp(f"{prefix}.up_proj", f"{prefix}.down_proj", f"{prefix}.gate_proj")


_GATED = _gated("mlp")
_GATE_AND_UP = {
    "mlp.gate": Matrix("mlp.gate_up_proj", part(0, of=2)),
    "mlp.up": Matrix("mlp.gate_up_proj", part(1, of=2)),
    "mlp.down": Matrix("mlp.down_proj"),
}
_LLAMA_ATTENTION = _separate("self_attn", "o_proj")
_BLOOM_MLP = _mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

_IN_ORDER = {"q": 0, "k": 1, "v": 2}


def _thirds(name: str) -> CutOf:
    return part(_IN_ORDER[name], of=3)


def _interleaved(name: str) -> CutOf:
    return per_head(_IN_ORDER[name])


def _either(*descriptions: Mapping[str, Matrix]) -> dict[str, tuple[Matrix, ...]]:
    names = dict.fromkeys(name for description in descriptions for name in description)
    return {name: tuple(d[name] for d in descriptions if name in d) for name in names}


GPT2 = Layout(_mlp("mlp.c_fc", "mlp.c_proj") | _fused("attn.c_attn", _thirds, "attn.c_proj"))
BIGCODE = Layout(_mlp("mlp.c_fc", "mlp.c_proj") | _fused("attn.c_attn", bigcode, "attn.c_proj"))
GPT_NEO = Layout(_mlp("mlp.c_fc", "mlp.c_proj") | _separate("attn.attention", "out_proj"))
GPTJ = Layout(_mlp("mlp.fc_in", "mlp.fc_out") | _separate("attn", "out_proj"))
GPT_NEOX = Layout(_BLOOM_MLP | _fused("attention.query_key_value", _interleaved, "attention.dense"))
BLOOM = Layout(_BLOOM_MLP | _fused("self_attention.query_key_value", _interleaved, "self_attention.dense"))
FALCON = Layout(_BLOOM_MLP | _fused("self_attention.query_key_value", falcon, "self_attention.dense"))
MPT = Layout(_mlp("ffn.up_proj", "ffn.down_proj") | _fused("attn.Wqkv", _thirds, "attn.out_proj"))
OPT = Layout(_mlp("fc1", "fc2") | _separate("self_attn", "out_proj"))
LLAMA = Layout(_GATED | _LLAMA_ATTENTION)
COHERE = replace(LLAMA, logit_scale=lambda config: config.logit_scale)
GRANITE = replace(LLAMA, logit_scale=lambda config: 1 / config.logits_scaling)
GLM4 = Layout(_GATE_AND_UP | _LLAMA_ATTENTION)
PHI3 = Layout(_GATE_AND_UP | _fused("self_attn.qkv_proj", heads_end_to_end, "self_attn.o_proj"))
PHI = Layout(_mlp("mlp.fc1", "mlp.fc2") | _separate("self_attn", "dense"))
STARCODER2 = Layout(_mlp("mlp.c_fc", "mlp.c_proj") | _LLAMA_ATTENTION)

_ROUTER = {"mlp.gate": "the router"}
MIXTRAL = Layout(_LLAMA_ATTENTION, "mlp.experts", _ROUTER)
QWEN3_MOE = Layout(_GATED | _LLAMA_ATTENTION, "mlp.experts", _ROUTER)
QWEN2_MOE = Layout(
    _either(_GATED, _gated("mlp.shared_expert")) | _LLAMA_ATTENTION,
    "mlp.experts",
    _ROUTER | {"mlp.shared_expert_gate": "one number a token: how much of the shared expert is added"},
)
GPT_OSS = Layout(_LLAMA_ATTENTION, "mlp.experts", {"mlp.router": "the router"})
DEEPSEEK = Layout(
    _either(_GATED, _gated("mlp.shared_experts"))
    | {name: _LLAMA_ATTENTION[name] for name in ("attn.q", "attn.o")},
    "mlp.experts",
    _ROUTER
    | {
        "self_attn.q_a_proj": "compresses the residual stream for the queries",
        "self_attn.q_b_proj": "queries from their compressed form, not from the residual stream",
        "self_attn.kv_a_proj_with_mqa": "compresses the residual stream for keys and values",
        "self_attn.kv_b_proj": "keys and values from their compressed form, not from the residual stream",
    },
)

LAYOUTS: Mapping[str, Layout] = {
    "bloom": BLOOM,
    "cohere": COHERE,
    "deepseek_v3": DEEPSEEK,
    "falcon": FALCON,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "glm4": GLM4,
    "gpt2": GPT2,
    "gpt_bigcode": BIGCODE,
    "gpt_neo": GPT_NEO,
    "gpt_neox": GPT_NEOX,
    "gpt_oss": GPT_OSS,
    "gptj": GPTJ,
    "granite": GRANITE,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "mpt": MPT,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "olmoe": MIXTRAL,
    "opt": OPT,
    "phi": PHI,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": LLAMA,
    "qwen3_moe": QWEN3_MOE,
    "stablelm": LLAMA,
    "starcoder2": STARCODER2,
}
