"""What a page is before it is written as HTML, JSON or CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.atlas import Atlas
from pipeline.serve.asked import Asked, Row


@dataclass(frozen=True, slots=True)
class Served:
    """What is served."""

    atlas: Atlas
    out: str
    """The run directory as its user names it."""
    modules: Sequence[str]
    """Those that the run has rows of."""
    vocabulary: int
    """How many tokens there are."""
    has_sql: bool = False

    @classmethod
    def of(cls, atlas: Atlas, out: str, has_sql: bool = False) -> "Served":
        """The run, with what does not change while it is served."""
        with atlas.question() as opened:
            ((vocabulary,),) = opened.sql("SELECT count(*) FROM vocab").fetchall()
            named = atlas.snapshot.record.model.get("modules")
            rows = (
                []
                if named
                else opened.sql("SELECT DISTINCT module::VARCHAR FROM layers ORDER BY 1").fetchall()
            )
        return cls(atlas, out, list(named or (module for (module,) in rows)), vocabulary, has_sql)


@dataclass(frozen=True, slots=True)
class Beside:
    """The pages before and after this one."""

    previous: str | None
    next: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """A page's template and what fills it; `asked` are its tables, of which the first is the CSV twin's."""

    template: str
    title: str
    asked: Sequence[Asked] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the page says, in its JSON twin too."""
    view: Mapping[str, Any] = field(default_factory=dict)
    """What the template draws from the tables."""
    beside: Beside = Beside(None, None)

    def rows(self, name: str) -> Sequence[Row]:
        """The rows of one of its tables; none if it was not asked for."""
        return next((asked.rows for asked in self.asked if asked.name == name), ())

    def is_cut(self, name: str) -> bool:
        """Whether one of its tables has not all rows."""
        return any(asked.is_cut for asked in self.asked if asked.name == name)
