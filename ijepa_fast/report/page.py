"""The page around the charts and pictures: one HTML file with nothing to fetch, light or dark as the reader's."""

from __future__ import annotations

import html
from collections.abc import Collection
from importlib.resources import files


def page(title: str, figures: dict[str, str], sections: list[tuple[str, str]], config: str, footer: str) -> str:
    """The whole document.

    figures: {name: HTML} for the head. sections: [(heading, HTML)]. config: the run's YAML.
    """
    style, script = (files("ijepa_fast.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    cards = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{value}</dd></div>" for name, value in figures.items())
    links = "".join(f'<a href="#{_anchor(heading)}">{html.escape(heading)}</a>' for heading, _ in sections)
    body = "".join(f'<h2 id="{_anchor(heading)}">{html.escape(heading)}</h2>{content}' for heading, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main><h1>{html.escape(title)}</h1><nav>{links}</nav><dl>{cards}</dl>{body}"
        f"<details><summary>Configuration</summary><pre>{html.escape(config)}</pre></details>"
        f"<footer>{html.escape(footer)}</footer></main><script>{script}</script></body></html>\n"
    )


def text(content: str, kind: str = "") -> str:
    """A paragraph of plain text; kind "note" for one that says what is missing."""
    return f'<p class="{kind}">{html.escape(content)}</p>'


def table(head: list[str], rows: list[list[str]], better: Collection[tuple[int, int]] = ()) -> str:
    """A table of plain text; better: (row, column) of the cells to stress."""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=better' if (y, x) in better else ''}>{html.escape(cell)}</td>" for x, cell in enumerate(row)
        )
        + "</tr>"
        for y, row in enumerate(rows)
    )
    return f'<div class="card"><table><tr>{cells}</tr>{body}</table></div>'


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")
