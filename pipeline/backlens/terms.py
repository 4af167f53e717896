"""The names of weight matrices, and on which side of each the residual stream lies."""

from collections.abc import Sequence

from backlens.errors import BacklensError

READS = ("mlp.up", "mlp.gate", "attn.q", "attn.k", "attn.v")
"""Modules that read the residual stream: their residual side is the input x (the paper's "imprint")."""

WRITES = ("mlp.down", "attn.o")
"""Modules that write to the residual stream: their residual side is the VJP δ (the paper's "shift")."""

MODULES = ("mlp.up", "mlp.gate", "mlp.down", "attn.q", "attn.k", "attn.v", "attn.o")


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """Parse `all`, or indices and ranges such as `0-5,11`; return indices in ascending order.

    Raises BacklensError for anything else, and for a layer that the model does not have.
    """
    if text.strip() == "all":
        return tuple(range(count))
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise BacklensError(f'--layers "{text}": \'{part}\' is no layer; write "all" or e.g. "0-5,11"')
        start, stop = int(first), int(last if dash else first)
        if start > stop or stop >= count:
            raise BacklensError(f'--layers "{text}": the model has layers 0 to {count - 1}')
        chosen.update(range(start, stop + 1))
    return tuple(sorted(chosen))


def parse_modules(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Parse `mlp`, `attn`, `all`, or names of modules; return names in the order of MODULES.

    Raises BacklensError for a name that is not in `known`.
    """
    chosen: set[str] = set()
    for part in map(str.strip, text.split(",")):
        matching = [name for name in known if part in ("all", name, name.partition(".")[0])]
        if not matching:
            raise BacklensError(f"--modules \"{text}\": no module '{part}' (there are {', '.join(known)})")
        chosen.update(matching)
    return tuple(name for name in MODULES if name in chosen)
