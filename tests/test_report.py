"""The report of a run: what is on the page, that a browser shows it without a network, and what is said of bad runs."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("nvidia.dali")

from PIL import Image

from ijepa_fast.eval.figures import change, figures_of, headline, verdict
from ijepa_fast.report import charts, main, pictures, report
from ijepa_fast.report.plots import mask_tiles, mask_views, read_log
from ijepa_fast.report.summary import read_summary
from ijepa_fast.run.provenance import FORMAT
from tests.launch import ROOT

STEPS = 24  # of finished_run
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def page(finished_run):
    return report(finished_run, count=24)


def charts_of(page):
    """{title: the data that the chart draws}."""
    found = re.findall(r'data-chart="(.*?)"><figcaption><b>(.*?)</b>', page)
    return {html.unescape(title): json.loads(html.unescape(data)) for data, title in found}


def plain(markup):
    """The texts of the cells of a table."""
    return [html.unescape(re.sub("<.*?>", "", cell)) for cell in re.findall("<t[dh].*?>(.*?)</t[dh]>", markup)]


@pytest.mark.parametrize(
    ("title", "name", "key"),
    [
        ("Loss", "loss", "loss"),
        ("Learning rate", "", "lr"),
        ("Weight decay", "", "weight_decay"),
        ("Momentum of the EMA", "", "ema"),
        ("Tokens per image", "", "tokens_per_image"),
        ("Images per second", "", "images_per_second"),
        ("Share of the time waiting for data", "", "data_wait"),
        ("Accuracy", "class", "probe.class.accuracy"),
        ("RankMe", "", "probe.rankme"),
        ("Variance between images", "", "probe.target_variance"),
    ],
)
def test_a_chart_draws_what_is_in_the_log(page, finished_run, title, name, key):
    first, *more = charts_of(page)[title]["series"]
    expected = [
        (record["step"], value) for record in read_log(finished_run / "log.jsonl") if (value := at(record, key))
    ]
    assert len(expected) == (4 if key.startswith("probe") else STEPS)
    assert first[:2] == [name, [step for step, _ in expected]]
    assert [number(text) for text in first[2]] == pytest.approx([value for _, value in expected], rel=1e-2)
    assert more == []


@pytest.mark.parametrize(("title", "key"), [("RankMe", "rankme"), ("Variance between images", "target_variance")])
def test_health_stands_beside_the_untrained_encoder(page, finished_run, title, key):
    """In the table, with what is expected, and as a level of the chart."""
    probe = read_log(finished_run / "log.jsonl")[-1]["probe"]
    rows = [plain(row) for row in re.findall("<tr>(.*?)</tr>", page)]
    cells = next(cells for cells in rows if cells[0].lower() == title.lower())
    assert cells[1].startswith("at least ")
    assert cells[2] == f"{probe['untrained'][key]:.4g}"
    assert cells[3].removesuffix(", low") == f"{probe[key]:.4g}"
    chart = page[page.index(f'aria-label="{title}"') :].partition("</svg>")[0]
    assert re.findall(r'<text class="level.*?>(.*?)</text>', chart) == ["untrained", "expected above"]


def test_the_head_says_where_it_comes_from(page, finished_run):
    """The verdict, then date, machine, duration, commit, and the command that began the run."""
    summary, head = read_summary(finished_run), html.unescape(page.partition("<nav>")[0])
    said = verdict(figures_of(summary))
    assert said
    assert f"{said[0].upper()}{said[1:]}." in head
    assert summary["date"][:10] in head
    assert f"{summary['device']}, {summary['host']}" in head
    assert re.search(r"duration</span>\d+ s of steps", head)
    assert "python ijepa_fast/train.py --config configs/quickstart.yaml" in head
    assert "'name=tiny <run>'" in head
    assert (summary["commit"] or "installed")[:12] in head
    assert "not recorded" not in head


def at(record, key):
    """The value under a dotted key, None where there is none."""
    for part in key.split("."):
        record = record.get(part) if record else None
    return record


def number(text):
    """A value as a chart writes it."""
    value = float(text.rstrip("%").replace(",", ""))
    return value / 100 if text.endswith("%") else value


def test_the_spectrum_has_a_value_per_image_before_and_after_training(page):
    series = charts_of(page)["Singular values of the features, over the largest"]["series"]
    assert [(name, len(xs)) for name, xs, _ in series] == [("trained", 24), ("untrained", 24)]
    assert re.search(r"RankMe is [\d.]+ trained, [\d.]+ untrained, of at most 24", page)


def test_sections_and_pictures(page):
    sections = re.findall(r"<h2>(.*?)</h2>(.*?)</section>", page.partition('<section id="configuration">')[0])
    assert [name for name, _ in sections] == [
        *("Probes", "Health", "Training", "Speed", "Spectrum", "Masks", "Nearest neighbours", "Patch features"),
    ]
    pictures_in = {name: content.count("<img") for name, content in sections}
    assert pictures_in["Masks"] == 8 * 3
    assert pictures_in["Nearest neighbours"] == 8 * 7
    assert pictures_in["Patch features"] == 8 * 2
    assert "tiny &lt;run&gt;" in page
    assert "tiny <run>" not in page


def test_nothing_is_fetched(page):
    sources = re.findall(r'(?:src|href)="(.*?)"', page)
    assert sources
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert "url(" not in page
    assert "@import" not in page


def test_the_figures_are_those_of_the_summary(page, finished_run):
    """In the same words and digits as on the console; what is better than untrained is stressed."""
    figures = headline(figures_of(read_summary(finished_run)))
    assert [figure.probe for figure in figures] == ["linear", "20-NN"]
    (table,) = re.findall(r"<table>(.*?)</table>", page.partition('id="health"')[0])
    head, *rows = (plain(row) for row in re.findall("<tr.*?>(.*?)</tr>", table))
    assert head[1:5] == ["chance", "untrained", "trained", "change"]
    assert len(rows) == len(figures)
    for row, figure in zip(rows, figures):
        assert row[0] == f"{figure.task}, {figure.probe} accuracy"
        assert row[1] == f"{figure.chance:.4f}"
        assert row[2].split(" ±")[0] == f"{figure.untrained:.4f}"
        assert row[3].split(" ±")[0] == f"{figure.value:.4f}"
        assert row[4] == change(figure)
        assert row[5] == f"{figure.n}"
    assert table.count('class="better"') == sum(figure.improved for figure in figures)


OLD = {"steps": 24, "probe": {"before": {}, "after": {}}}


@pytest.mark.parametrize(
    ("summary", "words"),
    [(OLD, "has version 1 of the format"), ({"version": 99, "figures": []}, "has version 99 of the format")],
    ids=["before there were versions", "a later one"],
)
def test_a_summary_of_another_version_says_what_to_do(finished_run, tmp_path, summary, words):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "log.jsonl"):
        shutil.copy(finished_run / name, run)
    (run / "summary.json").write_text(json.dumps(summary))
    text = report(run)
    assert f"{words}, and this ijepa_fast reads version {FORMAT}" in text
    assert f"python -m ijepa_fast probe --checkpoint {run}" in text
    assert "Loss" in charts_of(text)


def test_command_line_writes_the_page(finished_run, red_and_blue, tmp_path, capsys):
    assert (
        main([str(finished_run), "--images", str(red_and_blue), "--sample", "24", "--out", str(tmp_path / "a.html")])
        == 0
    )
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.html")
    assert "Nearest neighbours" in (tmp_path / "a.html").read_text()


# Measures the page as it is laid out, and leaves what it finds in the document.
PROBE = """<script>
const errors = []; addEventListener("error", event => errors.push(event.message));
addEventListener("load", () => {
  const box = element => element.getBoundingClientRect(), all = query => [...document.querySelectorAll(query)];
  const svg = all(".chart svg[aria-label=Loss]").find(chart => box(chart).height), at = box(svg);
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: at.left + at.width / 2, clientY: at.top + 20}));
  const charts = all(".chart svg").filter(chart => box(chart).height > 80);
  const cells = all("td"), nav = document.querySelector("nav"), shown = [...document.images];
  const seen = {
    errors, images: shown.length, broken: shown.filter(image => !image.naturalWidth || image.width < 20).length,
    width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth, charts: charts.length,
    readout: svg.closest("figure").querySelector("output").textContent,
    cut: cells.filter(cell => !box(cell).width || box(cell).left < 0 || box(cell).right > innerWidth).length,
    heads: cells.map(cell => box(all("tr.head th")[0]).height ? "" : getComputedStyle(cell, "::before").content),
    small: Math.min(...charts.map(chart => box(chart).width / chart.viewBox.baseVal.width *
      parseFloat(getComputedStyle(chart.querySelector("text")).fontSize))),
    outside: charts.flatMap(chart => [...chart.querySelectorAll("text")].filter(text => {
      const inner = box(text), outer = box(chart);
      return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
    })).length,
  };
  scrollTo(0, 1500);
  seen.nav = [scrollY, box(nav).top];
  parent.postMessage(JSON.stringify(seen), "*");
});
</script></head>"""
# A window of a browser is 500 pixels wide at least; a frame in it is as wide as one says.
FRAME = """<style>* {{ margin: 0; border: 0 }}</style><body><iframe src="page.html" width="{}" height="900"></iframe>
<script>addEventListener("message", message => document.body.dataset.seen = message.data);</script>"""
WIDTHS = (1400, 390)
no_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome installed")


def look(page, tmp_path, width):
    """What PROBE finds in a page `width` pixels wide, without a network; it is left in `tmp_path`."""
    (tmp_path / "page.html").write_text(page.replace("</head>", PROBE), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width), encoding="utf-8")
    dom = browser(tmp_path, f"--window-size={max(width, 500)},900", "--virtual-time-budget=20000", "--dump-dom")
    seen = json.loads(html.unescape(re.search(r'data-seen="(.*?)"', dom)[1]))
    assert seen["width"] == width
    return seen


def browser(tmp_path, *options, file="frame.html"):
    """Open a file of `tmp_path` in a headless browser that finds no network; what it prints."""
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile]
    command = [BROWSER, *common, "--host-resolver-rules=MAP * ~NOTFOUND", *options, (tmp_path / file).as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def well_laid_out(seen):
    """Nothing overflows or is too small to read, every cell of a table is in sight, and the sections stay at hand."""
    assert seen["errors"] == []
    assert seen["broken"] == 0
    assert seen["overflow"] <= 0
    assert seen["outside"] == 0
    assert seen["cut"] == 0
    assert seen["small"] >= 9
    assert seen["nav"] == [1500, 0]


@no_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_it(page, tmp_path, width):
    """Every picture is decoded, and the pointer reads a value out; a phone's cells say their columns."""
    seen = look(page, tmp_path, width)
    well_laid_out(seen)
    assert seen["images"] == 8 * 3 + 8 * 7 + 8 * 2
    assert seen["charts"] == len(charts_of(page))
    assert re.fullmatch(r"step 1[123]: 0\.\d+", seen["readout"])
    assert ({'"untrained"', '"trained"', '"expected"'} <= set(seen["heads"])) == (width == 390)


@no_browser
@pytest.mark.parametrize(("scheme", "ground"), [(1, (251, 251, 250)), (0, (20, 23, 26))])
def test_screenshot_in_both_schemes(page, tmp_path, scheme, ground):
    """Light or dark as the reader's, and not blank. Blink's preferred colour scheme is 0 for dark, 1 for light."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    picture, scheme = f"--screenshot={tmp_path / 'a.png'}", f"--blink-settings=preferredColorScheme={scheme}"
    browser(tmp_path, "--window-size=1200,1500", picture, scheme, file="page.html")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert tuple(pixels[2, 2]) == ground
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_a_run_that_has_not_finished_has_charts(finished_run, tmp_path):
    for name in ("config.yaml", "log.jsonl"):
        shutil.copy(finished_run / name, tmp_path)
    text = report(tmp_path)
    assert "The run has no checkpoint yet" in text
    assert "The encoder was not evaluated on labelled images" in text
    assert "Loss" in charts_of(text)


@pytest.mark.parametrize(
    ("images", "words"),
    [(0, "Not shown: data path"), (1, "Not shown: expected at least 2 images")],
    ids=["gone", "one image"],
)
def test_a_run_without_images_has_charts(finished_run, tmp_path, images, words):
    if images:
        (tmp_path / "images").mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / "images" / "one.jpg")
    text = report(finished_run, images=tmp_path / "images")
    assert words in text
    assert "Accuracy" in charts_of(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "config.yaml is missing"),
        (["empty"], "config.yaml is missing"),
        (["begun"], "at least one record with a loss"),
        (["begun", "--sample", "1"], "--sample: expected at least 2, got 1"),
    ],
    ids=["nowhere", "empty", "begun", "sample"],
)
def test_folders_that_are_no_run(tmp_path, capsys, arguments, words):
    for name in ("empty", "begun"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "configs" / "quickstart.yaml", tmp_path / "begun" / "config.yaml")
    (tmp_path / "begun" / "log.jsonl").write_text("")
    assert main([str(tmp_path / arguments[0]), *arguments[1:]]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert words in errors
    assert not list(tmp_path.glob("*/report.html"))


def test_neighbours_are_of_the_same_colour():
    """An encoder whose features are the colours finds red images for red ones."""
    images = torch.stack([torch.tensor(np.full((8, 8, 3), (200, i, 0) if i % 2 else (0, i, 200))) for i in range(20)])
    pooled = images.float().mean((1, 2))
    labels = ["red" if i % 2 else "blue" for i in range(20)]
    sample = pictures.Sample(images.to(torch.uint8), pooled, torch.zeros(20, 4, 3), labels)
    gallery = pictures.neighbours_gallery(sample)
    assert gallery.count('<figure class="same">') == 8 * 6
    mixed = replace(sample, labels=[str(i) for i in range(20)])
    assert 'class="same"' not in pictures.neighbours_gallery(mixed)


def test_pca_colours_tell_content_and_not_place():
    place, content = torch.randn(1, 16, 8) * 10, torch.zeros(40, 16, 8)
    kind = torch.randint(0, 2, (40, 16))
    content[..., 3] = kind.float()
    colours = pictures.pca_colours(place + content + 1e-3 * torch.randn(40, 16, 8), shown=5)
    assert colours.shape == (5, 16, 3)
    assert (colours.min(), colours.max()) == (0, 1)
    red = colours[..., 0]
    ones, zeros = red[kind[:5].bool().numpy()], red[~kind[:5].bool().numpy()]
    assert abs(ones.mean() - zeros.mean()) > 0.5
    assert min(ones.std(), zeros.std()) < 0.2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (1e-6, 2e-6), (0.04, 0.4), (-2.0, 3.5), (990, 1000)])
def test_ticks_are_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 * (high - low) <= tick <= high + 1e-9 * (high - low) for tick in found)
    step = found[1] - found[0]
    assert f"{step:.0e}"[0] in "125"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.02, 0.6, [0.02, 0.05, 0.1, 0.2, 0.5]),
        (0.3, 0.42, [0.3, 0.35, 0.4]),
        (1e-8, 1, [1e-8, 1e-6, 1e-4, 1e-2, 1]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round(low, high, expected):
    found = charts.log_ticks(np.log10(low), np.log10(high))
    assert 2 <= len(found) <= 7
    assert set(np.round(found, 12)) <= set(np.round(expected, 12))


@pytest.mark.parametrize("values", [[], [float("nan"), float("inf")]], ids=["empty", "none finite"])
def test_a_chart_of_nothing_is_nothing(values):
    assert charts.line_chart("odd", {"": (list(range(len(values))), values)}) == ""


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [5.0, 5.0, 5.0], [1.0, float("nan"), 2.0], [-1.0, 1.0]])
def test_charts_of_odd_numbers(values):
    svg = charts.line_chart("odd", {"": (list(range(len(values))), values)})
    assert "<svg" in svg
    assert "nan" not in svg.partition("<svg")[2]
    assert "inf" not in svg.partition("<svg")[2]


def test_logarithms_leave_zero_out():
    svg = charts.line_chart("logarithmic", {"": ([1, 2, 3], [1.0, 0.0, 1e-4])}, log=True)
    assert len(re.search(r'points="(.*?)"', svg)[1].split()) == 2


def test_long_logs_are_thinned_to_means():
    xs, ys = charts.thin(np.arange(10_000.0), np.arange(10_000.0) % 2, most=100)
    assert len(xs) == len(ys) == 100
    assert xs.mean() == pytest.approx(4999.5)
    assert ys == pytest.approx(np.full(100, 0.5))
    assert charts.thin([1.0], [2.0]) == ([1.0], [2.0])


def test_mask_views():
    image = np.full((16, 16, 3), 100, dtype=np.uint8)
    big, seen, blocks = mask_views(image, [0, 5], [[15], [10, 11]], patch=4, least=16)
    assert (big == image).all()
    assert (seen[:4, :4] == 100).all()
    assert (seen[4:8, 4:8] == 100).all()
    assert (seen[:4, 4:8] == 228).all()
    first, second = blocks[13, 13], blocks[9, 9]
    assert not (first == second).all()
    assert (blocks[0, 0] == int(100 * 0.35 + 255 * 0.65)).all()
    assert mask_tiles(image, [0, 5], [[15]], patch=4, least=16).shape == (16, 56, 3)
