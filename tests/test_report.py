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

from ijepa_fast.config import load_config, save_config
from ijepa_fast.interop.weights import POSITIONS, Weights, save_weights
from ijepa_fast.report import charts, main, pictures, report
from ijepa_fast.report.plots import mask_tiles, mask_views
from ijepa_fast.run.build import build_objective
from ijepa_fast.run.checkpoint import architecture
from tests.launch import ROOT, TINY

STEPS = 40
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def record(step):
    values = {"step": step, "loss": 1 / step, "lr": 1e-3 * step, "weight_decay": 0.04, "momentum": 0.99}
    return values | {"images_per_second": 100.0, "tokens_per_image": 50.0, "data_wait": 0.01, "epoch": 0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 images: red ones and blue ones, of two classes."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / name).mkdir()
        for i in range(12):
            image = generator.integers(0, 60, (40, 48, 3), dtype=np.uint8)
            image[..., channel] += 180
            Image.fromarray(image).save(folder / name / f"{i}.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    """A run's folder, as the trainer leaves it, of an untrained model."""
    runs = tmp_path_factory.mktemp("runs")
    options = [*TINY, f"data.source={photos}", f"runs={runs}", "name=tiny <run>", f"probe.test={photos}"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*options, "probe.enabled=true"])
    config.folder.mkdir()
    save_config(config, config.folder / "config.yaml")
    lines = [record(step) for step in range(1, STEPS + 1)]
    for step in (10, 20, 30, 40):
        lines.append(
            {"step": step, "probe": {"rankme": step / 2, "kind": {"accuracy": step / 100}, "collapsed": False}}
        )
    (config.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {"task": "classification", "chance": {"accuracy": 0.5}, "knn": {"20": {"accuracy": 0.6}}}
    probe = {"before": {"kind": figures | {"linear": {"accuracy": 0.61}}}}
    probe["after"] = {"kind": figures | {"linear": {"accuracy": 0.93}}}
    (config.folder / "summary.json").write_text(json.dumps({"steps": STEPS, "probe": probe}))
    objective = build_objective(config)
    states = {}
    for name in POSITIONS:
        module = getattr(objective, name)
        states[name] = module.state_dict() | {POSITIONS[name]: module.positions[None]}
    checkpoint = config.folder / "checkpoints" / "step-00000040"
    checkpoint.mkdir(parents=True)
    save_weights(checkpoint / "weights.safetensors", Weights(architecture(config, STEPS), **states))
    return config.folder


@pytest.fixture(scope="module")
def page(run):
    return report(run, count=24)


def charts_of(page):
    """{title: the data that the chart draws}."""
    found = re.findall(r'data-chart="(.*?)"><figcaption><b>(.*?)</b>', page)
    return {html.unescape(title): json.loads(html.unescape(data)) for data, title in found}


def test_every_chart_draws_the_log(page):
    drawn = charts_of(page)
    steps = [float(step) for step in range(1, STEPS + 1)]
    (name, xs, ys), (average, *_) = drawn["Loss"]["series"]
    assert (name, average, xs) == ("loss", "moving average", steps)
    assert [float(y) for y in ys] == pytest.approx([1 / step for step in steps], rel=1e-3)
    assert drawn["Learning rate"]["series"][0][2][-1] == "0.04"
    for title in ("Weight decay", "Momentum of the target encoder", "Tokens an image", "Images a second"):
        assert drawn[title]["series"][0][1] == steps
    assert drawn["Share of the time waiting for data"]["series"][0][2][0] == "1%"
    assert drawn["Accuracy"]["series"] == [["kind", [10.0, 20.0, 30.0, 40.0], ["0.1", "0.2", "0.3", "0.4"]]]
    assert drawn["RankMe"]["series"] == [["", [10.0, 20.0, 30.0, 40.0], ["5", "10", "15", "20"]]]
    assert len(drawn["Singular values of the features, over the largest"]["series"][0][1]) == 24


def test_sections_and_pictures(page):
    sections = re.findall(r"<h2.*?>(.*?)</h2>(.*?)(?=<h2|<details)", page)
    assert [name for name, _ in sections] == [
        *("Training", "Speed", "Probes", "Rank", "Spectrum", "Masks", "Nearest neighbours", "Patch features")
    ]
    pictures_in = {name: content.count("<img") for name, content in sections}
    assert pictures_in["Masks"] == 8 * 3
    assert pictures_in["Nearest neighbours"] == 8 * 7
    assert pictures_in["Patch features"] == 8 * 2
    assert "0.610</td><td class=better>0.930" in dict(sections)["Probes"]
    assert "tiny &lt;run&gt;" in page
    assert "tiny <run>" not in page


def test_nothing_is_fetched(page):
    sources = re.findall(r'(?:src|href)="(.*?)"', page)
    assert sources
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert "url(" not in page
    assert "@import" not in page


def test_command_line_writes_the_page(run, photos, tmp_path, capsys):
    assert main([str(run), "--images", str(photos), "--sample", "24", "--out", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.html")
    assert "Nearest neighbours" in (tmp_path / "a.html").read_text()


PROBE = """<script>
const errors = []; addEventListener("error", event => errors.push(event.message));
addEventListener("load", () => {
  const svg = document.querySelector(".chart svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 20}));
  const shown = [...document.images];
  document.body.dataset.seen = JSON.stringify({
    errors, images: shown.length, broken: shown.filter(image => !image.naturalWidth || image.width < 20).length,
    overflow: document.documentElement.scrollWidth - innerWidth, readout: document.querySelector("output").textContent,
    charts: [...document.querySelectorAll("svg")].filter(chart => chart.getBoundingClientRect().height > 80).length,
    outside: [...document.querySelectorAll("svg text")].filter(text => {
      const inner = text.getBoundingClientRect(), outer = text.closest("svg").getBoundingClientRect();
      return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
    }).length,
  });
});
</script></head>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome installed")
@pytest.mark.parametrize("width", [1200, 520])
def test_a_browser_shows_it(page, tmp_path, width):
    """Every picture is decoded, nothing overflows, and the pointer reads a value out."""
    path = tmp_path / "page.html"
    path.write_text(page.replace("</head>", PROBE), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},3000"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [BROWSER, *options, "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads(html.unescape(re.search(r'data-seen="(.*?)"', dom)[1]))
    assert seen["errors"] == []
    assert (seen["images"], seen["broken"]) == (8 * 3 + 8 * 7 + 8 * 2, 0)
    assert seen["charts"] == len(charts_of(page))
    assert seen["overflow"] <= 0
    assert seen["outside"] == 0
    assert re.fullmatch(r"step (19|20|21|22): loss 0\.0\d+, moving average 0\.\d+", seen["readout"])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome installed")
@pytest.mark.parametrize(("scheme", "ground"), [(1, (251, 251, 250)), (0, (20, 23, 26))])
def test_screenshot_in_both_schemes(page, tmp_path, scheme, ground):
    """Light or dark as the reader's, and not blank. Blink's preferred colour scheme is 0 for dark, 1 for light."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1500"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"]
    subprocess.run([BROWSER, *options, f"--screenshot={tmp_path / 'a.png'}", path.as_uri()], timeout=120, check=True)
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert tuple(pixels[2, 2]) == ground
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_a_run_without_checkpoint_or_images_keeps_its_charts(run, tmp_path):
    young = tmp_path / "young"
    young.mkdir()
    for name in ("config.yaml", "log.jsonl"):
        shutil.copy(run / name, young)
    text = report(young)
    assert "The run has no checkpoint yet" in text
    assert "Loss" in charts_of(text)
    shutil.copytree(run, tmp_path / "moved")
    text = report(tmp_path / "moved", images=tmp_path / "gone")
    assert "Not shown: data path" in text
    assert "Accuracy" in charts_of(text)
    (tmp_path / "few").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "few" / "one.jpg")
    assert "Not shown: expected at least 2 images" in report(tmp_path / "moved", images=tmp_path / "few")


def test_folders_that_are_no_run(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "begun")
    (tmp_path / "begun" / "log.jsonl").write_text("")
    for arguments, words in (
        (["nowhere"], "config.yaml is missing"),
        (["empty"], "config.yaml is missing"),
        (["begun"], "at least one record with a loss"),
        (["begun", "--sample", "1"], "--sample: expected at least 2, got 1"),
    ):
        assert main([str(tmp_path / arguments[0]), *arguments[1:]]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert words in errors
    assert not (tmp_path / "empty" / "report.html").exists()


def test_neighbours_are_of_the_same_colour(photos):
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


def test_charts_of_odd_numbers():
    assert charts.line_chart("empty", {"": ([], [])}) == ""
    assert charts.line_chart("none finite", {"": ([1, 2], [float("nan"), float("inf")])}) == ""
    for values in ([3.0], [0.0, 0.0], [5.0, 5.0, 5.0], [1.0, float("nan"), 2.0], [-1.0, 1.0]):
        svg = charts.line_chart("odd", {"": (list(range(len(values))), values)})
        assert "nan" not in svg.partition("<svg")[2]
        assert "inf" not in svg.partition("<svg")[2]
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
