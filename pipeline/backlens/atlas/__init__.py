"""The atlas of a run: `backlens atlas` builds its tables, `Atlas` answers questions."""

from backlens.atlas.atlas import Atlas

__all__ = ["Atlas"]
