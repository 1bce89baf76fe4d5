"""What the pages "continue", "weights" and "extend" show is run: commands at small sizes, files as they stand."""

import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("nvidia.dali")
pytest.importorskip("sklearn")

from ijepa_fast import front
from ijepa_fast.interop.load import read
from tests.documented import code, lines
from tests.furnished import SMALL, furnish
from tests.interop_files import HEADS, published
from tests.launch import ROOT

DOCS = ROOT / "docs"
# As tests/interop_files.py's file has it, in place of H/14's.
PUBLISHED = [
    "model.arch=null",
    "model.patch=8",
    "model.dim=96",
    "model.depth=3",
    f"model.heads={HEADS}",
    "data.crop=64",
]
PUBLISHED += ["model.predictor_dim=48", "model.predictor_depth=2", "batch_size=8", "optim.steps=2"]
PUBLISHED += ["mask.min_keep=4", "engine.precision=fp32", "log.every=1", "log.tensorboard=false", "engine.zero=0"]
QUIET = ["log.tensorboard=false", "probe.enabled=false"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, a file of the published layout, and the files that the pages show."""
    folder = furnish(tmp_path_factory.mktemp("docs"))
    torch.save(published(), folder / "IN1K-vit.h.14-300e.pth.tar")
    for block in code(DOCS / "extend.md"):
        (folder / block.title).write_text(block.text)
    return folder


def command(page, words):
    """The one command of a page that has these words."""
    (found,) = (line for line in lines(DOCS / page) if words in line)
    return found


def train(place, monkeypatch, line, *more):
    """Run a command `ijepa-fast train ...` in this process."""
    monkeypatch.chdir(place)
    words = shlex.split(line.replace("/data/", f"{place}/data/"))
    assert words[:2] == ["ijepa-fast", "train"]
    assert front.main([*words[2:], *more]) == 0
    name = next(word.removeprefix("name=") for word in reversed([*words, *more]) if word.startswith("name="))
    return place / "runs" / name


@pytest.fixture(scope="module")
def continued(place):
    """The run of the page's first command, from the published weights; the name is that of the other pages' run."""
    with pytest.MonkeyPatch.context() as patch:
        line = command("continue.md", "optim.weight_decay")
        return train(place, patch, line, *PUBLISHED, "name=photos", "probe.enabled=false")


def test_a_run_continues_from_published_weights(place, continued, capsys):
    """Rates as the page has them; after two steps of a warm-up every network is near the file's, and not the same."""
    weights, found = read(place / "IN1K-vit.h.14-300e.pth.tar", HEADS), read(continued)
    for network in ("encoder", "predictor", "target_encoder"):
        for key, tensor in weights.networks[network].items():
            assert (found.networks[network][key] - tensor).abs().max() < 1e-3, (network, key)
    moved = (
        found.networks["encoder"]["blocks.0.attn.qkv.weight"] - weights.networks["encoder"]["blocks.0.attn.qkv.weight"]
    )
    assert moved.abs().max() > 0
    records = [json.loads(line) for line in (continued / "log.jsonl").read_text().splitlines()]
    assert records[0]["lr"] < 1e-4
    assert records[0]["weight_decay"] == pytest.approx(0.4)
    assert records[0]["ema"] == pytest.approx(0.9996, abs=1e-4)


@pytest.mark.parametrize("number", range(3))
def test_the_python_of_the_weights_page(place, continued, monkeypatch, number):
    monkeypatch.chdir(place)
    block = code(DOCS / "weights.md")[number]
    there = {}
    exec(block.text, there)
    if number == 0:
        assert there["vector"].shape == (1, 96)
        assert there["larger"].crop == 128
        assert len(there["blocks"]) == 2
    if number == 1:
        assert there["classifier"].score(there["vectors"], [1, 1, 0, 0]) == 1
    if number == 2:
        assert all(p.grad is not None for p in there["encoder"].parameters())
    assert len(code(DOCS / "weights.md")) == 3


def test_masks_images_hooks_and_loggers_of_the_page(place, monkeypatch, capsys):
    """All of the commands' settings in one run."""
    settings = {}
    for words in ("mask.strategy=", "data.source=my_images", "hooks=", "log.loggers="):
        settings |= dict(word.split("=", 1) for word in shlex.split(command("extend.md", words)) if "=" in word)
    assert settings["data.source"].startswith("/data/")  # the last of them; images of one's own are put in its place
    settings |= {"data.source": "my_images:discs", "name": "extended"}
    together = "ijepa-fast train --config photos " + " ".join(f"{key}={value}" for key, value in settings.items())
    folder = train(place, monkeypatch, together, *SMALL, *QUIET)
    assert "patch_embed" in capsys.readouterr().out  # the hook's line
    rows = (folder / "numbers.csv").read_text().splitlines()
    assert any(row.startswith("2,loss,") for row in rows)


def test_the_method_of_the_page(place, monkeypatch):
    """It trains, its average moves, and the run is loaded without its module."""
    folder = train(
        place,
        monkeypatch,
        command("extend.md", "objective.method"),
        *SMALL,
        "log.tensorboard=false",
        "probe.enabled=false",
    )
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = [record for record in records if "loss" in record][-1]
    assert last["loss"] == pytest.approx(np.log(4), rel=0.5)
    assert 0 <= last["loss_terms"]["right"] <= 1
    weights = read(folder)
    key = "norm.weight"
    assert not torch.equal(weights.networks["encoder"][key], weights.networks["target_encoder"][key])


def test_the_probe_of_the_page(place, continued, monkeypatch):
    """Red and blue pictures are told apart by the centres of their classes."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    words = shlex.split(command("extend.md", "my_probe.py").replace("/data/", f"{place}/data/"))
    sys.modules.pop("my_probe", None)
    import my_probe

    assert my_probe.nearest_centre(*words[2:]) > 0.8


def test_the_examples_are_short():
    for block in code(DOCS / "extend.md"):
        lines_of_code = [
            line for line in block.text.splitlines() if line.strip() and not re.match(r"import|from", line)
        ]
        assert len(lines_of_code) <= (36 if block.title == "my_method.py" else 24), block.title
