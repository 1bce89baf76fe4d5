"""`report A B`: curves over each other, settings that differ, figures with intervals and differences."""

import html
import re

import pytest

pytest.importorskip("nvidia.dali")

from ijepa_fast.config import load_config
from ijepa_fast.report import main, several
from tests.recorded_runs import figure, folder_of, log
from tests.test_report import WIDTHS, charts_of, look, no_browser, plain, well_laid_out


@pytest.fixture
def two(tmp_path):
    """A run, and one with another learning rate that is better at one label and not at another."""
    first = folder_of(tmp_path, name="base", figures=[figure("kind", 0.5), figure("count", 0.3)])
    figures = [figure("kind", 0.6), figure("count", 0.31)]
    return first, folder_of(tmp_path, "optim.lr=0.002", name="fast", lines=log(last=0.2, rank=10.0), figures=figures)


def test_the_verdict_is_against_the_first(two):
    page = several.report(two)
    verdicts = re.findall(r'<p class="verdict.*?">(.*?)</p>', page)
    assert verdicts == [
        "fast against base: better: kind +10.0 points (4.5 s.e.); no difference beyond 2 standard errors: count."
    ]
    assert '<p class="verdict learned">' in page
    back = several.report(two[::-1])
    assert '<p class="verdict lost">' in back
    assert "base against fast: worse: kind -10.0 points (4.5 s.e.)" in back


def test_curves_lie_over_each_other(two):
    charts = charts_of(several.report(two))
    assert [name for name, *_ in charts["Loss"]["series"]] == ["base", "fast"]
    ends = [values[-1] for _, _, values in charts["Loss"]["series"]]
    assert ends == ["0.3", "0.2"]
    assert [values[-1] for _, _, values in charts["RankMe"]["series"]] == ["30", "10"]
    assert "Learning rate" not in charts  # the log has the same
    assert re.search(r'<section id="speed"><h2>Speed</h2><p>The same in all.</p></section>', several.report(two))
    assert "learning rate" in re.search(r"<p>The same in all: (.*?)</p>", several.report(two))[1]


def test_only_settings_that_differ_are_shown(two):
    page = several.report(two)
    settings = re.search(r'<section id="settings">(.*?)</section>', page)[1]
    assert re.search(r"<p>1 of \d+ settings differ.</p>", settings)
    first = load_config(two[0] / "config.yaml").optim.lr
    assert plain(settings) == ["", "base", "fast", "optim.lr", str(first), "0.002"]


def test_equal_settings_are_said(tmp_path):
    page = several.report([folder_of(tmp_path, name="a"), folder_of(tmp_path, name="b")])
    assert "The same configuration, but for name and runs." in page


def test_figures_have_intervals_and_differences(two):
    rows = re.findall(r"<tr>(.*?)</tr>", several.report(two))
    cells = next(plain(row) for row in rows if "kind, linear" in row)
    half = 1.96 * (0.6 * 0.4 / 1000) ** 0.5
    assert cells == [
        *("kind, linear accuracy", "0.1000", "0.3000", "0.5000 ± 0.0310", f"0.6000 ± {half:.4f}"),
        "+10.0 points (4.5 s.e.)",
    ]
    assert 'class="better" data-head="fast - base"' in several.report(two)


def test_figures_of_other_images_are_not_compared(tmp_path):
    first = folder_of(tmp_path, name="a", figures=[figure(n=1000)])
    page = several.report([first, folder_of(tmp_path, name="b", figures=[figure(value=0.9, n=500)])])
    assert "b against a: no verdict, no figures to compare." in page
    assert "Figures of other test images are not compared" in page
    assert "points (" not in page


def test_three_runs_one_of_them_unfinished(two, tmp_path):
    page = several.report([*two, folder_of(tmp_path, name="young", lines=log(4))])
    assert [name for name, *_ in charts_of(page)["Loss"]["series"]] == ["base", "fast", "young"]
    assert "young has no figures: it has not finished." in page
    assert "young against base: no verdict, no figures to compare." in page


def test_other_batch_sizes_are_drawn_over_images(tmp_path):
    first = folder_of(tmp_path, name="a")
    charts = charts_of(several.report([first, folder_of(tmp_path, "batch_size=128", name="b")]))
    assert charts["Loss"]["label"] == "images"
    assert charts["Loss"]["series"][0][1][-1] == 640


def test_runs_of_one_name_are_told_apart(tmp_path):
    page = several.report([folder_of(tmp_path / "x"), folder_of(tmp_path / "y")])
    names = [name for name, *_ in charts_of(page)["Loss"]["series"]]
    assert names == [str(tmp_path / "x" / "one"), str(tmp_path / "y" / "one")]


def test_where_each_is_from(two):
    page = several.report(two)
    facts = re.search(r'<section id="where-from">(.*?)</section>', page)[1]
    assert facts.count("2026-03-01 10:00 to 2026-03-01 11:30 UTC") == 2
    assert facts.count("a GPU, node-1, 2 ranks") == 2
    assert facts.count("0123456789ab with changes") == 2
    assert facts.count(html.escape("ijepa-fast train --config quickstart optim.lr=0.001")) == 2


def test_the_command(two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(two[0]), str(two[1])]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    assert "fast against base" in (tmp_path / "comparison.html").read_text("utf-8")
    for words, message in (([str(two[0])] * 2, "named twice"), ([*map(str, two), "--images", "x"], "--images: ")):
        assert main(words) == 1
        assert message in capsys.readouterr().err


@no_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_it(two, tmp_path, width):
    seen = look(several.report(two), tmp_path, width)
    well_laid_out(seen)
    assert ({'"fast - base"', '"expected"'} <= set(seen["heads"])) == (width == 390)
