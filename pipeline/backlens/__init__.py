"""backlens: gradients of language models, read as tokens (the Backward Lens), one prompt or millions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backlens.api import Run, open, plan, run
    from backlens.atlas import Atlas
    from backlens.backward_lens import BackwardLens
    from backlens.errors import BacklensError
    from backlens.gradients import Gradients, MatrixGradient

__version__ = "0.1.0"

__all__ = [
    "Atlas",
    "BacklensError",
    "BackwardLens",
    "Gradients",
    "MatrixGradient",
    "Run",
    "open",
    "plan",
    "run",
]

_HOMES = {
    "Atlas": "backlens.atlas",
    "BacklensError": "backlens.errors",
    "BackwardLens": "backlens.backward_lens",
    "Gradients": "backlens.gradients",
    "MatrixGradient": "backlens.gradients",
    "Run": "backlens.api",
    "open": "backlens.api",
    "plan": "backlens.api",
    "run": "backlens.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import backlens` alone loads neither torch nor DuckDB."""
    if name not in _HOMES:
        raise AttributeError(f"module 'backlens' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
