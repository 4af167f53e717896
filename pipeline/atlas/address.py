"""The address of a neuron: `35.mlp.down.123`, or `35.mlp.down.e3.123` in expert 3."""

import re
from dataclasses import dataclass

from pipeline.errors import BacklensError


@dataclass(frozen=True, slots=True)
class Neuron:
    """A unit by its address: `35.mlp.down.123`, or `35.mlp.down.e3.123` in expert 3."""

    layer: int
    module: str
    index: int
    expert: int | None = None
    """None in a dense block; where there are experts, None means any of them."""

    def __str__(self) -> str:
        expert = "" if self.expert is None else f"e{self.expert}."
        return f"{self.layer}.{self.module}.{expert}{self.index}"


def parse_neuron(text: str) -> Neuron:
    """The neuron that an address names, without a look at any run."""
    match = re.fullmatch(r"(\d{1,9})\.(.+?)(?:\.e(\d{1,9}))?\.(\d{1,9})", text.strip(), re.ASCII)
    if match is None:
        raise BacklensError(
            f"neuron: {text!r} is not an address; write layer.module.index such as 35.mlp.down.123, "
            "or 35.mlp.down.e3.123 for expert 3"
        )
    layer, module, expert, index = match.groups()
    return Neuron(int(layer), module, int(index), None if expert is None else int(expert))
