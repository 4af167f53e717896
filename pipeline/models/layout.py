"""Where each family keeps the matrices of a block: one small description per layout.

A layout is looked up by `config.model_type` and checked against the model it is used on (`anatomy.py`), so a
wrong or incomplete description is refused, never half used. To add a family, name its layout in `LAYOUTS`; to
add a layout, describe its block in the words of `MODULES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

READS = ("mlp.up", "mlp.gate", "attn.q", "attn.k", "attn.v")
"""Modules that read the residual stream: their residual side is the input x (the paper's "imprint")."""

WRITES = ("mlp.down", "attn.o")
"""Modules that write to the residual stream: their residual side is the VJP δ (the paper's "shift")."""

MODULES = ("mlp.up", "mlp.gate", "mlp.down", "attn.q", "attn.k", "attn.v", "attn.o")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix: a submodule of the block, or one of the equal parts of a fused submodule's output."""

    path: str
    part: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise ValueError(f"{self.path}: part {self.part} of {self.parts} does not exist")


@dataclass(frozen=True, slots=True)
class Layout:
    """A family's structure, as paths: `blocks` and `final_norm` from the model, matrices from a block."""

    blocks: str
    final_norm: str
    matrices: Mapping[str, Matrix]


GPT2 = Layout(
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    matrices={
        "mlp.up": Matrix("mlp.c_fc"),
        "mlp.down": Matrix("mlp.c_proj"),
        "attn.q": Matrix("attn.c_attn", part=0, parts=3),
        "attn.k": Matrix("attn.c_attn", part=1, parts=3),
        "attn.v": Matrix("attn.c_attn", part=2, parts=3),
        "attn.o": Matrix("attn.c_proj"),
    },
)

LLAMA = Layout(
    blocks="model.layers",
    final_norm="model.norm",
    matrices={
        "mlp.up": Matrix("mlp.up_proj"),
        "mlp.gate": Matrix("mlp.gate_proj"),
        "mlp.down": Matrix("mlp.down_proj"),
        "attn.q": Matrix("self_attn.q_proj"),
        "attn.k": Matrix("self_attn.k_proj"),
        "attn.v": Matrix("self_attn.v_proj"),
        "attn.o": Matrix("self_attn.o_proj"),
    },
)

LAYOUTS: Mapping[str, Layout] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}
