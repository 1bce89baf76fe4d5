"""The docs as a site: built strictly, whole, without a network, readable on a wide screen and on a phone."""

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")

from ijepa_fast import configs
from ijepa_fast.config import Config, keys
from tests.launch import ROOT

sys.path.append(str(ROOT / "docs" / "site"))
import generated

sys.path.pop()

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = ("index", "install", "first-run", "your-images", "continue", "curves", "weights", "several-machines")
PAGES += ("performance", "configuration", "extend", "evaluation", "numerics", "reliability", "troubleshooting", "api")
PAGES += ("results", "LOG", "contributing", "changelog", "kernels/index", "kernels/layer_norm")


class Page(html.parser.HTMLParser):
    """What a page fetches, where it leads, the places in it, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.links, self.places, self.text = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = {name: value or "" for name, value in attributes}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev", "alternate"):
            self.fetched.append(given["href"])
        elif "src" in given and tag != "a":
            self.fetched.append(given["src"])
        self.fetched += re.findall(r"url\(([^)]+)\)", given.get("style", ""))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; every warning of the build is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path.read_text()) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_there(pages):
    assert [name for name in PAGES if f"{name}.html" not in pages] == []
    assert [path.stem for path in ROOT.glob("docs/results/*.md") if f"results/{path.stem}.html" not in pages] == []


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for name, page in pages.items():
        assert [file for file in page.fetched if re.match(r"(https?:)?//", file)] == [], name
        for file in page.fetched:
            if not file.startswith("data:") and name != "404.html":  # which stands at a server's root
                assert (site / Path(name).parent / file.partition("?")[0]).exists(), (name, file)
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)\"']+", sheet.read_text()) == [], sheet.name


def test_every_link_leads_to_a_place(site, pages):
    for name, page in pages.items():
        for link in page.links:
            if re.match(r"\w+:", link) or name == "404.html":
                continue
            file, _, place = link.partition("#")
            target = os.path.normpath(Path(name).parent / file) if file else name
            target = "index.html" if target == "." else target
            assert (site / target).exists(), (name, link)
            if place and target in pages:
                assert place in pages[target].places, (name, link)


def test_the_search_finds_every_page(site, pages):
    found = {
        entry["location"].partition("#")[0]
        for entry in json.loads((site / "search/search_index.json").read_text())["docs"]
    }
    assert {name for name in pages if name != "404.html"} <= found


def test_the_configuration_has_every_key_and_option(pages):
    text = " ".join(pages["configuration.html"].text)
    assert [key for key, _ in keys(Config) if key not in text] == []
    for method in generated.methods():
        assert method in pages["configuration.html"].places
    assert "sinkhorn" in text.lower() or "prototypes" in text
    assert [name for name in configs.names() if name not in " ".join(pages["first-run.html"].text)] == []


def test_troubleshooting_has_every_message(pages):
    """Messages are found where they are raised, in whatever form they are written."""
    text = " ".join(" ".join(pages["troubleshooting.html"].text).split())
    for words in (
        "there is no such key",  # an f-string of given.py
        "is not divisible by",  # two f-strings, one behind the other
        "gathers weights in hooks that a compiled block cannot hold",
        "is it mounted?",
        "stopped by",
    ):
        assert words in text, words
    raised = len(re.findall(r"raise \w+Error\(", "".join(p.read_text() for p in ROOT.glob("ijepa_fast/**/*.py"))))
    assert len(generated.messages()) > raised > 250


def test_nothing_is_left_to_be_filled_in(site):
    assert [path.name for path in site.rglob("*.html") if "<!-- generated" in path.read_text()] == []


def test_a_page_that_nobody_named_is_put_into_the_nav():
    sys.path.append(str(ROOT / "docs" / "site"))
    import hooks

    sys.path.pop()
    nav = [{"Home": "index.md"}, {"Results": ["results.md"]}]
    config = type("Config", (), {"nav": nav, "docs_dir": str(ROOT / "docs")})()
    named = hooks._paths(hooks.on_config(config).nav)
    every = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert every <= set(named)
    assert len(named) == len(set(named))


MEASURE = """<!doctype html><body><pre id=out>waiting</pre><script>
const names = NAMES, widths = [1400, 390], found = {};
async function one(name, width) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.src = name;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  await new Promise(done => setTimeout(done, 150));
  const page = frame.contentDocument, root = page.documentElement;
  const broken = [...page.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src);
  const main = page.querySelector("article");
  found[`${name} ${width}`] = {over: root.scrollWidth - width, broken, text: main ? main.innerText.length : 0,
    size: main ? parseFloat(getComputedStyle(main).fontSize) : 0};
  frame.remove();
}
(async () => {
  for (const name of names) for (const width of widths) await one(name, width);
  document.getElementById("out").textContent = JSON.stringify(found);
})();
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
def test_pages_fit_a_screen_and_a_phone(site, pages, tmp_path):
    """In a browser, at 1,400 and 390 pixels: nothing wider than the page, no picture missing, text to be read."""
    names = [name for name in pages if name != "404.html"]
    (site / "measure.html").write_text(MEASURE.replace("NAMES", json.dumps(names)))
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--dump-dom",
    ]
    command += ["--virtual-time-budget=60000", f"--user-data-dir={tmp_path}", "--window-size=1500,1000"]
    done = subprocess.run([*command, f"file://{site}/measure.html"], capture_output=True, text=True, timeout=180)
    found = re.search(r'<pre id="out">(\{.*?\})</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    measured = json.loads(html.unescape(found[1]))
    assert len(measured) == 2 * len(names)
    for page, said in measured.items():
        assert said["over"] <= 0, page
        assert said["broken"] == [], page
        assert said["text"] > 200, page
        assert said["size"] >= 14, page
