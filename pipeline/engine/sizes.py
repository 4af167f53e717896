"""How large the weight matrices are whose gradients are wanted, and how many tokens reach each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from pipeline.engine.extract import Wanted
from pipeline.models.anatomy import Block, Located
from pipeline.models.layout import READS
from pipeline.models.widths import expert_widths, widths


@dataclass(frozen=True, slots=True)
class MatrixSize:
    """One module of one layer; for experts, all of a layer's together."""

    layer: int
    module: str
    wide: int
    """Width of the input."""
    high: int
    """Width of the output."""
    experts: int = 1
    chosen: int = 1
    """Experts that a token is routed to."""
    routed: bool = False
    """Whether it is that of experts."""

    @property
    def neurons(self) -> int:
        return self.high if self.module in READS else self.wide

    @property
    def leads(self) -> bool:
        """Gate reads what up reads, k and v what q reads: the vectors are projected once."""
        return self.module not in ("mlp.gate", "attn.k", "attn.v")

    def kept(self, neurons: int) -> int:
        """Neurons kept of a matrix when so many are asked for (−1: all)."""
        return self.neurons if neurons < 0 else min(neurons, self.neurons)

    def tokens(self, tokens: float) -> float:
        """Rows that so many tokens make: one for every expert they are routed to."""
        return tokens * self.chosen

    def seen_by(self, tokens: float) -> float:
        """Matrices that a prompt of so many tokens is expected to reach, were its tokens routed at random."""
        return self.experts * (1 - (1 - self.chosen / self.experts) ** tokens)


def matrices_of(blocks: Sequence[Block], wanted: Wanted, config: PretrainedConfig) -> list[MatrixSize]:
    """The wanted matrices of the wanted layers."""
    return [
        size
        for layer in wanted.layers
        for size in _sizes(layer, blocks[layer], config)
        if size.module in wanted.modules
    ]


def every_matrix(blocks: Sequence[Block], config: PretrainedConfig) -> list[MatrixSize]:
    """All of the model's that have a module name."""
    return [size for layer, block in enumerate(blocks) for size in _sizes(layer, block, config)]


def neuron_facts(blocks: Sequence[Block], config: PretrainedConfig) -> list[dict[str, Any]]:
    """How many neurons each module has, for `run.json`: an entry for the layers that are alike in that."""
    layers: dict[tuple[str, int | None, int], list[int]] = {}
    for size in every_matrix(blocks, config):
        key = (size.module, size.experts if size.routed else None, size.neurons)
        layers.setdefault(key, []).append(size.layer)
    return [
        {"module": module, "experts": experts, "neurons": neurons, "layers": own}
        for (module, experts, neurons), own in layers.items()
    ]


def _sizes(layer: int, block: Block, config: PretrainedConfig) -> Iterator[MatrixSize]:
    for module, located in block.matrices.items():
        found = widths(block.module.get_submodule(located.path))
        assert found is not None
        yield MatrixSize(layer, module, found[0], _part(found[1], located))
    if block.experts is not None:
        experts, chosen = block.experts.module, int(config.get_text_config().num_experts_per_tok)
        for module, located in block.experts.matrices.items():
            wide, high = expert_widths(experts, located.path)
            count = len(getattr(experts, located.path))
            yield MatrixSize(layer, module, wide, _part(high, located), count, chosen, True)


def _part(high: int, located: Located) -> int:
    return located.cut.width(high) if located.cut else high
