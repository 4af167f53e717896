"""Pages as HTML: the templates, and what all of them know."""

from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline import __version__
from pipeline.serve import text
from pipeline.serve.page import Page, Served


@cache
def environment() -> Environment:
    """The templates; whatever they are given is escaped."""
    made = Environment(
        loader=PackageLoader("pipeline.serve"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": text.number, "token": text.token, "cell": text.cell}
    made.globals |= {"assets": assets_version(), "version": __version__}
    return made


@cache
def assets_version() -> str:
    """Changes with the style sheet or the script, so that no browser keeps an old one."""
    names = ("style.css", "explorer.js")
    return sha256(b"".join(asset(name).encode() for name in names)).hexdigest()[:8]


def asset(name: str) -> str:
    """A file of `static/`."""
    return (files("pipeline.serve") / "static" / name).read_text("utf-8")


def as_html(page: Page, served: Served, **around: Any) -> str:
    """The page as a document of its own."""
    return (
        environment()
        .get_template(page.template)
        .render(
            page=page,
            served=served,
            note=served.atlas.note,
            cut_off=str(served.atlas.cut_off),
            linked=True,
            **page.facts,
            **page.view,
            **around,
        )
    )
