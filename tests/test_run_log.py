"""What a run says and writes while it trains: the banner, lines for grep, TensorBoard's tags, loggers and hooks."""

import json
import re

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")

from ijepa_fast.config import ConfigError, Log, load_config
from ijepa_fast.run.build import build_method
from ijepa_fast.run.imported import functions
from ijepa_fast.run.log import check_loggers, tag
from ijepa_fast.run.speed import Speed, duration, peak
from tests.launch import ROOT, TINY, finish, start

MINE = """
import json, pathlib

def look(step, record, method):
    with open("FOLDER/hook", "a") as file:
        print(step, round(record["loss"], 6), type(method).__name__, record["of_product"] > 0, file=file)

class Logger:
    def __init__(self, folder, name, settings):
        self.lines = [[str(folder), name, settings["optim.steps"]]]
    def write(self, step, numbers):
        self.lines.append([step, numbers["loss"]])
    def close(self):
        pathlib.Path("FOLDER/logger").write_text(json.dumps(self.lines))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The folder of a run of three steps, its stderr, and the folder that its hook and logger wrote into."""
    folder = tmp_path_factory.mktemp("said")
    (folder / "mine_of_test.py").write_text(MINE.replace("FOLDER", str(folder)))
    options = ["hooks=[mine_of_test:look]", "log.loggers=[mine_of_test:Logger]", "log.tensorboard=true"]
    first = f"import sys; sys.path.append({str(folder)!r})"
    statuses, errors = finish(start(folder, *options, "optim.steps=3", first=first))
    assert statuses == [0], errors
    return folder / "quickstart", errors, folder


def test_the_banner_says_what_runs(said):
    banner = dict(line.split(maxsplit=1) for line in said[1].splitlines() if re.match(r"[a-z]{5,7} +\S", line))
    assert banner["batch"] == "8 = 1 rank x 1 accumulation x 8 images"
    assert banner["device"].endswith("1 thread, fp32")
    assert banner["images"].startswith("1281167 of synthetic, no classes; crops of 32")
    assert "encoder 0.0 M + predictor 0.0 M" in banner["method"]
    assert banner["steps"].startswith("3, 160145 an epoch")
    assert banner["folder"] == f"{said[0]}/"
    assert "patchify" in banner["kernels"]
    assert "layer_norm" in banner["kernels"]


def test_lines_that_grep_finds(said):
    lines = [line for line in said[1].splitlines() if line.startswith("step=")]
    assert len(lines) == 3
    fields = dict(word.split("=") for word in lines[1].split())
    assert fields["step"] == "2/3"
    names = ["step", "epoch", "loss", "gradient_norm", "lr", "ema", "images/s", "tokens/s", "of_product", "memory"]
    assert [name for name in fields if name != "gradient_norm"] == [
        *(name for name in names if name != "gradient_norm"),
        "data_wait",
        "left",
    ]
    assert "\r" not in said[1]


def test_a_record_says_how_fast_it_is(said):
    records = [json.loads(line) for line in (said[0] / "log.jsonl").read_text().splitlines()]
    assert [record["seconds_left"] for record in records][-1] == 0
    for record in records:
        assert record["tokens_per_second"] > record["images_per_second"] > 0
        assert 0 < record["of_product"] < 1
        assert 0.1 < record["peak_memory_gb"] < 10
        left = (3 - record["step"]) * 8 / record["images_per_second"]
        assert record["seconds_left"] == pytest.approx(left)


def test_tags_of_tensorboard_are_grouped(said):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(said[0] / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "speed/images_per_second", "speed/data_wait", "speed/of_product"} <= {
        *tags["scalars"]
    }
    assert {name.split("/")[0] for name in tags["scalars"]} <= {"train", "speed", "probe"}
    assert any(name.startswith("config") for name in tags["tensors"])
    assert "masks" in tags["images"]


def test_tags():
    assert tag("probe/kind/accuracy") == "probe/kind/accuracy"
    assert tag("loss_terms/patch") == "train/loss_terms_patch"
    assert tag("tokens_per_second") == "speed/tokens_per_second"


def test_a_hook_and_a_logger_by_their_import_path(said):
    folder, _, own = said
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    hooked = [line.split() for line in (own / "hook").read_text().splitlines()]
    assert hooked == [[str(i + 1), str(round(loss, 6)), "IJEPA", "True"] for i, loss in enumerate(losses)]
    logged = json.loads((own / "logger").read_text())
    assert logged == [[str(folder), "quickstart", 3], *[[i + 1, loss] for i, loss in enumerate(losses)]]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("json", "expected module:function"),
        ("no_such_module:f", "no_such_module cannot be imported"),
        ("json:no_such_function", "json has no function no_such_function"),
        ("math:pi", "math has no function pi"),
    ],
)
def test_a_hook_that_is_none(path, words):
    with pytest.raises(ConfigError, match=f"hooks: .*{words}"):
        functions("hooks", [path])
    with pytest.raises(ConfigError, match=r"log\.loggers: "):
        check_loggers(Log(loggers=[path], tensorboard=False))


def test_the_share_is_the_work_over_the_peak():
    config = load_config(ROOT / "configs" / "quickstart.yaml", TINY)
    method = build_method(config)
    draw = method.draw(8, 0, 0)
    speed = Speed(method, torch.device("cpu"), "fp32", total=10, batch=8, ranks=2)
    speed.peak = (1e9, "a test's")
    record = speed.record(4, draw, {"images_per_second": 4.0})
    assert record["work_tflops"] == pytest.approx(method.work(draw).total / 8 * 4 / 1e12)
    assert record["of_product"] == pytest.approx(record["work_tflops"] * 1e12 / 2e9)
    assert record["seconds_left"] == 12
    assert 1e8 < peak(torch.device("cpu"), "fp32")[0] < 1e14


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 s"), (150, "2 min"), (31_980, "8 h 53 min"), (86_400 * 3 + 7200, "3 d 2 h"), (7170, "2 h 0 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
