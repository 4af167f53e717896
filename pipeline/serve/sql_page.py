"""The page of free SQL, which is there only if it was asked for (`backlens serve --sql`)."""

from collections.abc import Mapping

from pipeline.serve.asked import Asked
from pipeline.serve.page import Page, Served
from pipeline.serve.parameters import Parameters
from pipeline.serve.sandbox import MOST_ROWS, SECONDS, ask_sandbox

EXAMPLE = """SELECT layer, module, avg(grad_norm) AS grad_norm
FROM layers
GROUP BY layer, module
ORDER BY module, layer"""


def sql_page(served: Served, path: Mapping[str, str], given: Parameters) -> Page:
    """One SELECT over the tables."""
    statement = given.text("q")
    limit = given.limit(100)
    view = {"example": EXAMPLE, "seconds": SECONDS, "most_rows": MOST_ROWS}
    if statement is None:
        return Page("sql.html", "SQL", facts={"q": "", "is_cut": False}, view=view)
    answer = ask_sandbox(served.out, statement, limit)
    rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
    asked = Asked("rows", answer.columns, rows, f"atlas.sql({statement!r}, limit={limit})", statement)
    facts = {"q": statement, "is_cut": answer.is_cut}
    return Page("sql.html", "SQL", (asked,), facts, view)
