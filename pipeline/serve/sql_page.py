"""The page of free SQL, which is there only if it was asked for (`backlens serve --sql`)."""

from collections.abc import Mapping

from pipeline.errors import BacklensError
from pipeline.serve.asked import Asked
from pipeline.serve.page import Page, Served
from pipeline.serve.parameters import Parameters
from pipeline.serve.sandbox import MOST_BYTES, MOST_ROWS, SECONDS, ask_sandbox

EXAMPLE = """SELECT layer, module, avg(grad_norm) AS grad_norm
FROM layers
GROUP BY layer, module
ORDER BY module, layer"""


def sql_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """One SELECT over the tables."""
    statement = given.text("q")
    asked_for = given.limit(100)
    limit = MOST_ROWS if asked_for is None else asked_for
    view = {"example": EXAMPLE, "seconds": SECONDS, "most_rows": MOST_ROWS}
    if statement is None:
        return Page("sql.html", "SQL", facts={"q": "", "is_cut": False}, view=view)
    answer = ask_sandbox(served.out, statement, limit)
    if answer.is_cut and asked_for is None:
        raise BacklensError(
            f"sql: there are more than these {len(answer.rows):,} rows, and this page gives at most {MOST_ROWS:,} "
            f"and {MOST_BYTES >> 20} MB; narrow the query, or give limit for the first of them"
        )
    rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
    asked = Asked(
        "rows", answer.columns, rows, f"atlas.sql({statement!r}, limit={limit})", statement, answer.is_cut
    )
    facts = {"q": statement, "is_cut": answer.is_cut}
    return Page("sql.html", "SQL", (asked,), facts, view)
