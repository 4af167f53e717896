"""Runs as something to ask: `backlens atlas` builds the index, `Atlas` answers."""

from backlens.atlas.atlas import Atlas

__all__ = ["Atlas"]
