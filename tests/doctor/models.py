"""Models that the doctor does not know, and models with something wrong; all of them tiny, made of Llama's parts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from tests.tiny import byte_tokenizer, random_model


class RenamedConfig(LlamaConfig):
    model_type = "renamed"


class SquaredConfig(LlamaConfig):
    model_type = "squared"


class UnmaskedConfig(LlamaConfig):
    model_type = "unmasked"


class TwiceConfig(LlamaConfig):
    model_type = "twice"


class PastConfig(LlamaConfig):
    model_type = "past"


class RenamedMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("w2")(
            self.act_fn(self.get_submodule("w1")(x)) * self.get_submodule("w3")(x)
        )


class RenamedAttention(LlamaAttention):
    """Its forward pass is Llama's, which knows the old names."""

    q_proj = property(lambda self: self.wq)  # pyright: ignore[reportAssignmentType]
    k_proj = property(lambda self: self.wk)  # pyright: ignore[reportAssignmentType]
    v_proj = property(lambda self: self.wv)  # pyright: ignore[reportAssignmentType]
    o_proj = property(lambda self: self.wo)  # pyright: ignore[reportAssignmentType]


class Renamed(LlamaForCausalLM):
    """The names of Meta's own checkpoints."""

    config_class = RenamedConfig

    def __init__(self, config: RenamedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            assert isinstance(layer, LlamaDecoderLayer)
            _rename(layer.mlp, {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"})
            _rename(layer.self_attn, {f"{name}_proj": f"w{name}" for name in "qkvo"})
            layer.mlp.__class__, layer.self_attn.__class__ = RenamedMLP, RenamedAttention


def _rename(module: nn.Module, names: dict[str, str]) -> None:
    for old, new in names.items():
        module.add_module(new, module.get_submodule(old))
        delattr(module, old)


class Squared(LlamaForCausalLM):
    """Logits that are no affine map of the last hidden state."""

    config_class = SquaredConfig

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs: Any = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.square()
        return outputs


class Unmasked(LlamaForCausalLM):
    """Attends to padding."""

    config_class = UnmaskedConfig

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **(kwargs | {"attention_mask": None, "position_ids": None}))


class Twice(LlamaForCausalLM):
    """Uses the weight of mlp.down a second time, past the module that holds it."""

    config_class = TwiceConfig

    def __init__(self, config: TwiceConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.get_submodule("mlp").register_forward_hook(_add_once_more)


class Past(LlamaForCausalLM):
    """Takes the weight of mlp.down past the module that holds it, as fused kernels do."""

    config_class = PastConfig

    def __init__(self, config: PastConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.get_submodule("mlp").__class__ = PastMLP


class PastMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


def _add_once_more(mlp: Any, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + 0.1 * output @ mlp.down_proj.weight @ mlp.down_proj.weight.T


MODELS: dict[type[LlamaConfig], type[LlamaForCausalLM]] = {
    RenamedConfig: Renamed,
    SquaredConfig: Squared,
    UnmaskedConfig: Unmasked,
    TwiceConfig: Twice,
    PastConfig: Past,
}
for config_class, model_class in MODELS.items():
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)


def save(
    folder: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A random model of a configuration, with a tokenizer of bytes unless another is given."""
    model = random_model(config)
    nn.Module.to(model, dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder
