"""What mkdocs calls while it builds the site, to fill in what is generated and to bring pages from outside docs/.

A line `<!-- generated: NAME -->` in a page becomes what `generated.NAME()` writes, from the code as it is at the build.
Links to files of the repository that are no page, such as configs/, become their names.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import generated  # noqa: E402

MARK = re.compile(r"<!-- generated: (\w+) -->")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
# Pages that stand elsewhere in the repository, and what they are called here.
BROUGHT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
BROUGHT |= {"kernels/README.md": "kernels/index.md"}


def brought() -> dict[str, str]:
    """Files of the repository that become pages, and the pages."""
    ops = {str(path.relative_to(ROOT)): f"kernels/{path.parent.name}.md" for path in ROOT.glob("kernels/*/README.md")}
    return BROUGHT | dict(sorted(ops.items()))


def on_config(config: Any) -> Any:
    """Put pages that the nav does not name where they belong."""
    named = set(_paths(config.nav))
    docs = Path(config.docs_dir)
    found = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    left = [path for path in found if path not in named and not path.startswith("site/")]
    section("Results", config.nav).extend(path for path in left if path.startswith("results/"))
    section("Inside", config.nav).extend(page for page in brought().values() if page not in named)
    section("More", config.nav).extend(path for path in left if not path.startswith("results/"))
    config.nav = [part for part in config.nav if list(part.values()) != [[]]]
    return config


def section(name: str, nav: list[dict[str, Any]]) -> list[str]:
    """The pages of a section of the nav, which is made where it is missing."""
    for part in nav:
        if name in part:
            pages: list[str] = part[name]
            return pages
    nav.append({name: []})
    return section(name, nav)


def _paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [path for part in inner for path in _paths(part)]


def on_files(files: Files, config: Any) -> Files:
    """Bring the pages from outside."""
    for source, page in brought().items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Fill in what is generated, and turn links into the repository into links of the site."""
    if page.file.src_uri.startswith("results"):
        page.meta.setdefault("hide", ["toc"])  # their tables want the room
    if page.file.src_uri == "index.md":
        page.meta.setdefault("hide", ["navigation", "toc"])
    markdown = MARK.sub(lambda match: getattr(generated, match[1])(), markdown)
    pages = brought()
    here = {page_: source for source, page_ in pages.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(match: re.Match) -> str:
        sign, words, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = normpath(str(PurePosixPath(here).parent / target))
        uri = pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if uri and files.get_file_from_path(uri) and not uri.startswith("site/"):
            to = relpath(uri, str(PurePosixPath(page.file.src_uri).parent))
            return f"{sign}[{words}]({to}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # the strict build says that it leads nowhere
        return f"`{path}`" if path.endswith(words.strip("`")) else f"{words} (`{path}`)"

    return LINK.sub(link, markdown)
