"""What is served, as it stands: opened once, and again when `backlens atlas` has put another atlas in its place."""

import threading
import time

from pipeline.atlas import Atlas
from pipeline.atlas.manifest import find_manifest
from pipeline.errors import BacklensError
from pipeline.serve.page import Served

LOOK_EVERY = 1.0
"""Seconds between two looks at the atlas's record."""


class NotNow(BacklensError):
    """The run cannot be asked at the moment."""


def require_atlas(atlas: Atlas, out: str) -> None:
    """Raises NotNow if the run has no atlas of just its rows: what is fast with one would take minutes."""
    atlas.snapshot.require_run()
    if not atlas.snapshot.is_current:
        raise NotNow(
            atlas.snapshot.atlas_note or f"serve: {out} has no atlas yet; build it: backlens atlas {out}"
        )


class Standing:
    """A run in its present state. Requests that began with the state before end with it, if its files last."""

    def __init__(self, served: Served) -> None:
        self.last = served
        """As it was when it was last looked at."""
        self._looked = time.monotonic()
        self._looking = threading.Lock()

    def now(self) -> Served:
        """The run, looked at within the last second. Raises NotNow if it has no atlas any more."""
        if time.monotonic() - self._looked < LOOK_EVERY:
            return self.last
        return self.looked_at_again()

    def looked_at_again(self) -> Served:
        """As `now`, however long ago the last look was."""
        with self._looking:
            before = self.last.atlas
            if find_manifest(before.snapshot.directory) != before.snapshot.manifest:
                atlas = Atlas(before.snapshot.directory, before.seconds, before.memory)
                require_atlas(atlas, self.last.out)
                self.last = Served.of(atlas, self.last.out, self.last.has_sql)
            self._looked = time.monotonic()
            return self.last
