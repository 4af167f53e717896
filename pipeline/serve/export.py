"""One prompt as an HTML file of its own: its style within, no script, and nothing that is fetched."""

from pathlib import PurePath

from pipeline.atlas import Atlas
from pipeline.serve.page import Served
from pipeline.serve.parameters import Parameters
from pipeline.serve.prompt_pages import prompt_page
from pipeline.serve.render import asset, environment
from schemas.tables import SIGN_CONVENTION


def prompt_document(atlas: Atlas, out: str, prompt_id: int) -> str:
    """The prompt's heatmap, ranks and strongest neurons of every module that the run has."""
    atlas.prompt(prompt_id)
    served = Served.of(atlas, out)
    pages = [
        prompt_page(
            served, {"prompt_id": str(prompt_id)}, Parameters([("module", module)], ("module", "limit"))
        )
        for module in served.modules
    ]
    first = pages[0]
    return (
        environment()
        .get_template("export.html")
        .render(
            pages=pages,
            prompt=first.facts["prompt"],
            target=first.view["target"],
            predicted=first.view["predicted"],
            note=atlas.note,
            cut_off=str(atlas.cut_off),
            linked=False,
            style=asset("style.css"),
            sign_convention=SIGN_CONVENTION,
            # A path would say where the run's user keeps things.
            model=PurePath(str(atlas.snapshot.record.model.get("name", "a model"))).name,
        )
    )
