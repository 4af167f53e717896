"""The expected tables, computed directly: autograd on the weights, the model's own norm and head, a
full SVD, a full sort. One prompt at a time, in float64, sharing no code with the package.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PATHS = {
    "gpt2": {
        "blocks": "transformer.h",
        "norm": "transformer.ln_f",
        "mlp.up": ("mlp.c_fc", None),
        "mlp.down": ("mlp.c_proj", None),
        "attn.q": ("attn.c_attn", 0),
        "attn.k": ("attn.c_attn", 1),
        "attn.v": ("attn.c_attn", 2),
        "attn.o": ("attn.c_proj", None),
    },
    "llama": {
        "blocks": "model.layers",
        "norm": "model.norm",
        "mlp.up": ("mlp.up_proj", None),
        "mlp.gate": ("mlp.gate_proj", None),
        "mlp.down": ("mlp.down_proj", None),
        "attn.q": ("self_attn.q_proj", None),
        "attn.k": ("self_attn.k_proj", None),
        "attn.v": ("self_attn.v_proj", None),
        "attn.o": ("self_attn.o_proj", None),
    },
}
WRITES = {"mlp.down", "attn.o"}


@dataclass(frozen=True)
class Truth:
    loss: float
    gradients: dict[tuple[int, str], Tensor]
    """(layer, module) → G (in, out) by autograd on the weight."""
    inputs: dict[tuple[int, str], Tensor]
    vjps: dict[tuple[int, str], Tensor]


class Oracle:
    """The plain computation for one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        family = "gpt2" if model.config.model_type == "gpt2" else "llama"
        self.paths = PATHS[family]
        self.modules = [name for name in self.paths if "." in name]
        self.model: PreTrainedModel = copy.deepcopy(model)
        self.model.double().requires_grad_(True)
        self.norm = self.model.get_submodule(self.paths["norm"])
        head = self.model.get_output_embeddings()
        assert head is not None
        self.head = head

    def truth(self, prompt: Sequence[int], target: Sequence[int]) -> Truth:
        self.model.zero_grad()
        kept: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        handles = []
        blocks = list(self.model.get_submodule(self.paths["blocks"]).children())
        for layer, block in enumerate(blocks):
            for name in self.modules:
                path, _ = self.paths[name]

                def keep(_module, args, output, key=(layer, name)):
                    output.retain_grad()
                    kept[key] = (args[0], output)

                handles.append(block.get_submodule(path).register_forward_hook(keep))
        ids = torch.tensor([[*prompt, *target[:-1]]])
        logits = self.model(input_ids=ids).logits[0]
        loss = torch.zeros((), dtype=torch.float64)
        for step, token in enumerate(target):
            loss = loss - logits[len(prompt) - 1 + step].log_softmax(-1)[token]
        loss.backward()
        gradients, inputs, vjps = {}, {}, {}
        for (layer, name), (x, output) in kept.items():
            path, part = self.paths[name]
            module = blocks[layer].get_submodule(path)
            assert isinstance(module.weight, Tensor)
            weight = module.weight.grad
            assert weight is not None
            assert output.grad is not None
            gradient = weight.T if isinstance(module, nn.Linear) else weight
            vjp = output.grad[0]
            if part is not None:
                width = gradient.shape[1] // 3
                gradient = gradient[:, part * width : (part + 1) * width]
                vjp = vjp[:, part * width : (part + 1) * width]
            gradients[layer, name] = gradient.detach().clone()
            inputs[layer, name], vjps[layer, name] = x[0].detach(), vjp.detach()
        for handle in handles:
            handle.remove()
        return Truth(loss.item(), gradients, inputs, vjps)

    @torch.no_grad()
    def lens(self, vector: Tensor, scaling: str) -> Tensor:
        if scaling == "unit":
            vector = vector / vector.norm()
        return self.head(self.norm(vector.double()).double())
