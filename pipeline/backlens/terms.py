"""The names of weight matrices, and on which side of each the residual stream lies."""

READS = ("mlp.up", "mlp.gate", "attn.q", "attn.k", "attn.v")
"""Modules that read the residual stream: their residual side is the input x (the paper's "imprint")."""

WRITES = ("mlp.down", "attn.o")
"""Modules that write to the residual stream: their residual side is the VJP δ (the paper's "shift")."""

MODULES = ("mlp.up", "mlp.gate", "mlp.down", "attn.q", "attn.k", "attn.v", "attn.o")
