"""The page around the charts and pictures: one HTML file with nothing to fetch, light or dark as the reader's."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Sequence
from importlib.resources import files

_NO_UTF8 = re.compile("[\ud800-\udfff]")  # a byte of a name that is no UTF-8, as Python holds it in a string


class Markup(str):
    """HTML, where a plain string is text that is yet to be escaped."""


def page(
    title: str,
    figures: dict[str, str],
    sections: Sequence[tuple[str, str]],
    config: str = "",
    footer: str = "",
    lead: str = "",
) -> str:
    """The whole document, which can be written as UTF-8 whatever the names in it.

    figures: {name: HTML} for the head. sections: [(heading, HTML)]. config: the run's YAML. lead: HTML under the title.
    """
    style, script = (files("ijepa_fast.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    cards = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{value}</dd></div>" for name, value in figures.items())
    if config:
        yaml = f"<details><summary>All of it</summary><pre>{html.escape(config)}</pre></details>"
        sections = [*(found for found in sections if found[0] != "Configuration"), ("Configuration", yaml)]
    links = "".join(f'<a href="#{_anchor(heading)}">{html.escape(heading)}</a>' for heading, _ in sections)
    body = "".join(
        f'<section id="{_anchor(heading)}"><h2>{html.escape(heading)}</h2>{content}</section>'
        for heading, content in sections
    )
    document = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body>'
        f'<header id="top"><h1>{html.escape(title)}</h1>{lead}{f"<dl>{cards}</dl>" if cards else ""}</header>'
        f'<nav><div><a href="#top" class="name">{html.escape(title)}</a>{links}</div></nav>'
        f"<main>{body}<footer>{html.escape(footer)}</footer></main><script>{script}</script></body></html>\n"
    )
    return _NO_UTF8.sub("\N{REPLACEMENT CHARACTER}", document)


def text(content: str, kind: str = "") -> str:
    """A paragraph of plain text; kind "note" for one that says what is missing."""
    return f'<p class="{kind}">{html.escape(content)}</p>' if kind else f"<p>{html.escape(content)}</p>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], better: Collection[tuple[int, int]] = (), words: int = 3
) -> str:
    """A table; its first column names the rows. On a phone a row is a block, and each cell says its column.

    Cells are plain text, or Markup. better: (row, column) of cells to stress. words: columns that start at the left.
    """
    cells = "".join(f"<th{_kind(x, words)}>{_html(cell)}</th>" for x, cell in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_kind(x, words, (y, x) in better, cell)}"
            + (f' data-head="{re.sub("<.*?>", "", _html(head[x]))}"' if x else "")
            + f">{_html(cell)}</td>"
            for x, cell in enumerate(row)
        )
        + "</tr>"
        for y, row in enumerate(rows)
    )
    return f'<div class="card"><table><tr class="head">{cells}</tr>{body}</table></div>'


def _kind(column: int, words: int, better: bool = False, cell: str = "") -> str:
    kinds = ["word"] * (column < words) + ["better"] * better + ["drawn"] * cell.startswith("<svg")
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _html(cell: str) -> str:
    return cell if isinstance(cell, Markup) else html.escape(cell)


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")
