"""A run that is not as it should be: its page shows what there is, and says what is missing."""

import html
import json
import math
import os
import re

import pytest

pytest.importorskip("nvidia.dali")

from ijepa_fast.report import main, report
from tests.recorded_runs import figure, folder_of, log, record


def notes(page):
    """What the page says is missing, as plain text."""
    return [html.unescape(note) for note in re.findall(r'<p class="note">(.*?)</p>', page)]


def said(page, words):
    return any(words in note for note in notes(page))


def test_a_whole_run_misses_nothing_but_a_checkpoint(tmp_path):
    page = report(folder_of(tmp_path, figures=[figure()]))
    assert notes(page) == ["The run has no checkpoint yet, so there are no features to show."]


def test_a_run_without_probes(tmp_path):
    page = report(folder_of(tmp_path, lines=[record(step) for step in range(1, 5)], figures=[]))
    assert said(page, "The encoder was not evaluated on labelled images: probe.test is not set")
    assert said(page, "There was no probe while training")
    assert said(page, "RankMe and the other signs of a collapse were not measured")
    assert "No verdict: " in page


def test_a_run_that_was_not_evaluated_says_why(tmp_path):
    folder = folder_of(tmp_path, figures=[])
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"not_evaluated": "the evaluation did not finish"}))
    assert said(report(folder), "The encoder was not evaluated on labelled images: the evaluation did not finish. To")


def test_figures_of_no_image_are_not_known(tmp_path):
    """Neither an improvement of one image, nor a number that is none, breaks the page or is a verdict."""
    page = report(folder_of(tmp_path, figures=[figure(n=1, value=1.0), figure("tint", value=math.nan, untrained=None)]))
    assert "not known" in page
    assert "learned: " not in page
    assert "inf s.e." not in page
    assert '"nan"' not in page


def test_a_run_that_has_not_ended(tmp_path):
    lines = log()
    lines[-1]["seconds_left"] = 7200
    page = report(folder_of(tmp_path, lines=lines))
    assert "No verdict: the run has not finished." in page
    assert ", 120 min left" in page or ", 2 h 0 min left" in page


def test_one_line_of_the_log(tmp_path):
    page = report(folder_of(tmp_path, lines=[record(1, 0.75)]))
    assert said(page, "The log has one line so far")
    assert "0.7500 <small>from 0.7500</small>" in page


@pytest.mark.parametrize(
    "garbage", [b'{"step": 5, "lo\n', b"\xff\xfe\x00garbage\n", b"7\n", b"null\n", b'{"loss": 1.0}\n', b"[]\n\n"]
)
def test_a_line_that_cannot_be_read(tmp_path, garbage):
    folder = folder_of(tmp_path)
    lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "log.jsonl").write_bytes(b"".join([*lines[:4], garbage, *lines[4:]]))
    page = report(folder)
    assert said(page, "log.jsonl: line")
    assert re.search(r"\b5\b", next(note for note in notes(page) if note.startswith("log.jsonl")))
    assert "<dt>steps</dt><dd>10 " in page


def test_a_loss_that_is_no_number(tmp_path):
    page = report(folder_of(tmp_path, lines=[*log(), {**record(11), "loss": None}, {**record(12), "loss": "low"}]))
    assert "0.3000 <small>from 0.8400</small>" in page


def test_a_log_of_an_earlier_version(tmp_path):
    """It had no images, no rates, and the average's momentum under another name."""
    lines = [{"step": step, "loss": 1.0 / step, "lr": 0.1, "momentum": 0.99} for step in range(1, 6)]
    page = report(folder_of(tmp_path, lines=lines, launch=None))
    assert said(page, "of an earlier version, without images_per_second, tokens_per_image, data_wait")
    assert said(page, "The log has no speed")
    assert said(page, "Its command was not recorded")
    assert page.count("not recorded</li>") >= 3
    assert "Momentum of the EMA" in page


@pytest.mark.parametrize(
    "text", ["no_such_key: 3\nname: old\n", "model: {dim: wide}\nname: old\n", "- a list\n", "{", "name: [\xff\n"]
)
def test_a_configuration_that_this_version_does_not_read(tmp_path, text):
    folder = folder_of(tmp_path, figures=[figure()])
    (folder / "config.yaml").write_bytes(text.encode("latin-1"))
    page = report(folder)
    assert said(page, "config.yaml is not one that this ijepa_fast reads")
    assert "Learned: kind +20.0 points" in page
    assert "<h1>" + ("old" if "old" in text else "one") + "</h1>" in page


@pytest.mark.parametrize(
    "summary", ["", "{", "[]", '{"version": 1}', '{"version": 2}', '{"version": 2, "figures": [{"task": "kind"}]}']
)
def test_a_summary_that_this_version_does_not_read(tmp_path, summary):
    folder = folder_of(tmp_path)
    (folder / "summary.json").write_text(summary)
    assert said(report(folder), "The figures at the run's end are not shown: ")


def test_a_doctor_without_the_untrained_encoder(tmp_path):
    lines = log()
    del lines[-1]["probe"]["untrained"]
    page = report(folder_of(tmp_path, lines=lines))
    assert said(page, "What the untrained encoder had is not in this log.")
    assert "RankMe" in page


MARKUP = "<script>alert(1)</script>&\"'"


def test_names_with_markup_are_text(tmp_path):
    lines = log()
    lines[-1]["probe"][MARKUP] = {"accuracy": 0.5}
    lines[-1]["loss_terms"] = {MARKUP: 0.1}
    launch = {"date": MARKUP, "host": MARKUP, "command": MARKUP, "commit": MARKUP, "step": 0, "versions": MARKUP}
    name = MARKUP.replace("/", "")
    folder = folder_of(tmp_path, name=name, lines=lines, figures=[figure(MARKUP)], launch=launch)
    for page in (report(folder), several_of(tmp_path, folder)):
        assert page.count("<script>") == 1
        assert "alert(1)" in html.unescape(page)
        assert page.count("<title>") == page.count("</title>") == 1


def several_of(tmp_path, folder):
    from ijepa_fast.report import several

    return several.report([folder, folder_of(tmp_path, name="other", figures=[figure(MARKUP)])])


def test_names_that_are_no_utf8(tmp_path, capfdbinary):
    """A folder, a label and a host of such bytes: the page is UTF-8, and the command says where it is."""
    strange = os.fsdecode(b"caf\xe9")
    lines = log()
    lines[-1]["probe"][strange] = {"accuracy": 0.5}
    folder = folder_of(tmp_path / strange, "seed=1", lines=lines, figures=[figure(strange)])
    other = folder_of(tmp_path, name="other", lines=lines, figures=[figure(strange)])
    assert main([str(folder)]) == 0
    page = (folder / "report.html").read_bytes().decode("utf-8")
    assert "caf\N{REPLACEMENT CHARACTER}" in page
    assert main([str(folder), str(other), "--out", str(folder / "both.html")]) == 0
    assert "caf" in (folder / "both.html").read_bytes().decode("utf-8")
    assert rb"caf\xe9" in capfdbinary.readouterr().out


def test_a_name_of_the_run_that_is_no_utf8(tmp_path):
    folder = folder_of(tmp_path)
    text = (folder / "config.yaml").read_bytes()
    (folder / "config.yaml").write_bytes(re.sub(rb"(?m)^name: \S+", b"name: caf\xe9", text))
    page = report(folder).encode("utf-8").decode("utf-8")
    assert said(page, "config.yaml is not one that this ijepa_fast reads")
    assert "<h1>one</h1>" in page  # the folder's
    assert "caf\N{REPLACEMENT CHARACTER}" in page


def test_unreadable_launches_are_left_out(tmp_path):
    folder = folder_of(tmp_path, figures=[figure()])
    with open(folder / "launches.jsonl", "ab") as file:
        file.write(b"\xff{\n")
    page = report(folder)
    assert "ijepa-fast train --config quickstart optim.lr=0.001" in page
