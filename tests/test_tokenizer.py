"""Tokenizers: this project's own, exported ones, and what is said where one cannot be used."""

import pytest
import torch

pytest.importorskip("safetensors")

from ijepa_fast.config import ConfigError
from ijepa_fast.methods import beit
from ijepa_fast.methods.method import tokens_of
from ijepa_fast.models.tokenizer import (
    fit_patches,
    load_tokenizer,
    nearest,
    normalised_patches,
    save_patches,
)
from tests.launch import ROOT
from tests.small import setup_of

OURS = str(ROOT / "tests" / "data" / "patch_tokens.safetensors")  # 32 centres of 4 pixels


def test_patches_are_row_major_and_normalised():
    images = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8)
    rows = normalised_patches(images, 4)
    assert rows.shape == (2 * 4, 48)
    first = images[0, :4, 4:].float().div(255).permute(2, 0, 1).flatten()
    torch.testing.assert_close(rows[1], (first - first.mean()) / (first.var() + 1e-2).sqrt())


def test_k_means_finds_what_there_is():
    torch.manual_seed(0)
    means = 5 * torch.randn(7, 12)
    rows = means.repeat(40, 1) + 0.1 * torch.randn(280, 12)
    centres = fit_patches(rows, 7, rounds=30)
    distortion = [torch.cdist(rows, fit_patches(rows, 7, rounds=n)).amin(1).mean() for n in (0, 1, 3, 30)]
    assert distortion == sorted(distortion, reverse=True)
    assert distortion[3] < distortion[0]
    assert torch.equal(centres, fit_patches(rows, 7, rounds=30))
    assert torch.equal(nearest(rows, centres, at_once=11), torch.cdist(rows, centres).argmin(1))
    with pytest.raises(ValueError, match="at most 280"):
        fit_patches(rows, 281)


def test_a_written_one_is_read_again(tmp_path):
    centres = torch.randn(5, 12)
    save_patches(tmp_path / "a.safetensors", centres, 2)
    tokens = load_tokenizer(str(tmp_path / "a.safetensors"), 5, 2)(torch.randint(256, (3, 8, 8, 3), dtype=torch.uint8))
    assert tokens.shape == (3, 4, 4)
    assert tokens.max() < 5


class Scores(torch.nn.Module):
    """Eight scores of every 4 x 4 pixels."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x):
        return self.conv(x)


def test_an_exported_one_gives_its_best_scores(tmp_path):
    module, path = Scores(), str(tmp_path / "scores.pt2")
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(module, (torch.rand(2, 3, 16, 16),), dynamic_shapes=({0: batch},)), path)
    images = torch.randint(256, (3, 16, 16, 3), dtype=torch.uint8)
    expected = module(images.permute(0, 3, 1, 2).float() / 255).argmax(1)
    assert torch.equal(load_tokenizer(path, 8)(images), expected)
    with pytest.raises(ValueError, match="has 8 tokens and the head 9"):
        load_tokenizer(path, 9)(images)


@pytest.mark.parametrize(
    ("path", "vocabulary", "patch", "words"),
    [
        (None, 32, 4, "tokenizer is not set: .* ijepa_fast tokenizer"),
        ("nowhere.pt2", 32, 4, "there is no such file"),
        (OURS, 8192, 4, "has 32 tokens and the head 8192; set objective.options.vocabulary=32"),
        (OURS, 32, 8, "token_patch=4"),
        (str(ROOT / "README.md"), 32, 4, "expected a .pt2 or .safetensors file"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(path, vocabulary, patch, words):
    with pytest.raises(ValueError, match=words) as error:
        load_tokenizer(path, vocabulary, patch)
    assert "\n" not in str(error.value)
    method = beit.BEiT(
        setup_of(32, 4, options={"tokenizer": path, "vocabulary": vocabulary, "token_patch": patch, "masked": 20})
    )
    with pytest.raises(ConfigError, match=words):
        method.ready()


def test_another_file_of_tensors_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="which this is not"):
        load_tokenizer(str(tmp_path / "a.safetensors"), 1)


def test_tokens_of_another_grid_or_vocabulary_are_named():
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"tokens of shape \(2, 2, 2\) and the grid of patches has \(2, 3, 3\)"):
        tokens_of(lambda x: torch.zeros(2, 2, 2, dtype=torch.int64), images, (3, 3), 4)
    with pytest.raises(ConfigError, match="gave token 4 and the head has 4"):
        tokens_of(lambda x: torch.full((2, 2, 2), 4), images, (2, 2), 4)


def test_the_command_fits_one_that_trains(tmp_path, capsys):
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("PIL")
    from ijepa_fast.eval import tokens
    from tests.data_images import write_photos

    write_photos(tmp_path / "photos", 20, size=40)
    out = tmp_path / "tokens.safetensors"
    command = ["--source", str(tmp_path / "photos"), "--out", str(out), "--patch", "4", "--size", "32"]
    assert tokens.main([*command, "--vocabulary", "16", "--rounds", "5"]) == 0
    assert "16 centres of 1280 patches" in capsys.readouterr().out
    found = load_tokenizer(str(out), 16, 4)(torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8))
    assert found.shape == (2, 8, 8)
    assert tokens.main([*command, "--vocabulary", "16"]) == 1
    assert "not there yet" in capsys.readouterr().err
