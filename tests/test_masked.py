"""Masks of methods that hide patches, and the encoder that computes the hidden ones alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ijepa_fast.config import ConfigError
from ijepa_fast.masks.blocks import PatchSampler, blocks, lay_out, squares
from ijepa_fast.methods import simmim
from ijepa_fast.models import layouts
from ijepa_fast.models.relative import resample_table
from ijepa_fast.models.vit import Encoder
from tests.small import setup_of


def test_squares_are_whole_and_as_many_as_published():
    masks = np.stack([squares(np.random.default_rng(i), (14, 14), 2, 0.6) for i in range(50)]).reshape(-1, 7, 2, 7, 2)
    assert (masks.sum((1, 2, 3, 4)) == 30 * 4).all()
    assert (masks.all((2, 4)) == masks.any((2, 4))).all()
    assert masks.any(0).all()


@pytest.mark.parametrize(
    ("count", "grid", "smallest"), [(75, (14, 14), 16), (120, (14, 14), 16), (24, (8, 8), 4), (63, (4, 16), 8)]
)
def test_blocks_mask_as_many_patches_in_every_image(count, grid, smallest):
    masks = np.stack([blocks(np.random.default_rng(i), grid, count, smallest) for i in range(50)])
    assert (masks.sum(1) == count).all()
    assert len({mask.tobytes() for mask in masks}) > 10


def test_draws_follow_from_the_place():
    sampler = PatchSampler(lambda rng: blocks(rng, (6, 6), 14, 4), depth=2)
    whole, part = sampler(5, 1, 2), sampler(2, 1, 2, first=3)
    assert torch.equal(whole.mask.view(5, -1)[3:], part.mask.view(2, -1))
    assert torch.equal(whole.chance[..., 3:], part.chance)
    assert not torch.equal(whole.mask, sampler(5, 1, 3).mask)
    assert whole.tokens == 5 * 37


def encoder_of(**options):
    torch.manual_seed(0)
    sizes = {"class_token": True, "relative_positions": True, "mask_token": True, "layer_scale": 0.5, "key_bias": False}
    encoder = Encoder(24, 4, 24, 3, 3, **sizes | options)
    for param in encoder.parameters():
        torch.nn.init.normal_(param, std=0.2)
    return encoder


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("counts", [(14, 14, 14), (14, 3, 0)])
def test_the_last_block_computes_the_masked_patches_alone(counts, relative):
    """As the whole encoder does, whatever the counts, gradients too."""
    encoder = encoder_of(relative_positions=relative)
    mask = np.zeros((3, 36), dtype=bool)
    for row, count in zip(mask, counts, strict=True):
        row[np.random.default_rng(0).permutation(36)[:count]] = True
    draw, patches = lay_out(mask), torch.randn(3 * 36, 48)
    alone = encoder.masked(patches, draw)
    everything = replace(lay_out(np.ones((3, 36), dtype=bool)), mask=draw.mask)  # all wanted, those hidden
    whole = encoder.masked(patches, everything)[draw.mask]
    torch.testing.assert_close(alone, whole)
    upstream = torch.randn_like(alone)
    for a, b in zip(*(torch.autograd.grad(x, [*encoder.parameters()], upstream) for x in (alone, whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layers_at_masked_patches_are_those_of_the_whole_encoder():
    encoder, patches = encoder_of(), torch.randn(2 * 36, 48)
    draw = lay_out(np.random.default_rng(0).random((2, 36)) < 0.4)
    found = encoder.masked_layers(patches, draw, [1, 2])
    expected = [layer[draw.mask] for layer in encoder.layers(patches, 2, 2)]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(encoder.masked_layers(patches, draw, [1])[0], expected[0])


def test_gains_are_factors_of_the_branches():
    encoder, x = encoder_of(), torch.randn(7, 24)
    layer, gain = encoder.blocks[0].attn.proj, torch.randn(24)
    torch.testing.assert_close(layer(x, gain), layer(x) * gain)


def test_dropped_branches_are_those_of_the_draw():
    encoder = encoder_of(drop_path=0.9).train()
    draw = PatchSampler(lambda rng: blocks(rng, (6, 6), 14, 4), depth=3)(2, 0, 0)
    patches = torch.randn(2 * 36, 48)
    assert torch.equal(encoder.masked(patches, draw), encoder.masked(patches, draw))
    assert not torch.equal(encoder.masked(patches, draw), encoder.eval().masked(patches, draw))


def test_another_grid_keeps_the_bias_of_an_offset():
    """Of a table that is linear in the offset, by what is between its ends."""
    offsets = torch.arange(-5.0, 6)
    table = torch.cat([(offsets[:, None] + offsets[None]).flatten()[:, None], torch.tensor([[7.0], [8.0], [9.0]])])
    assert resample_table(table, (6, 6), (6, 6)) is table
    other = resample_table(table, (6, 6), (11, 11))
    assert len(other) == 21**2 + 3
    assert other[-3:, 0].tolist() == [7, 8, 9]
    assert other[:-3].view(21, 21)[10, 10].abs() < 1e-5
    assert (other[:-3].view(21, 21).diff(dim=0) > -1e-3).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"square": 3}, "objective.options.square=3"), ({"masked": 1.0}, "objective.options.masked")],
)
def test_squares_that_cannot_be_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        simmim.SimMIM(setup_of(32, 4, options=options))


@pytest.mark.parametrize("with_bias", [True, False])
def test_attention_in_bf16_on_a_cpu_is_written_out_within_its_rounding(monkeypatch, with_bias):
    """Whose scores and probabilities are rounded, so that it is not held to the fused one's error."""
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.bfloat16) for shape in [(2 * 37, 3, 8)] * 3 + [(3, 37, 37)]]

    def outputs(dtype):
        q, k, v, bias = (x.to(dtype).requires_grad_() for x in given)
        out = layouts.Biased(2, bias if with_bias else None).attend(q, k, v)
        wanted = [q, k, v, bias] if with_bias else [q, k, v]
        return [x.detach().double() for x in (out, *torch.autograd.grad(out.sin().sum(), wanted))]

    exact, written = outputs(torch.float64), outputs(torch.bfloat16)
    monkeypatch.setattr(layouts, "WRITTEN_OUT", 36)
    fused = outputs(torch.bfloat16)
    assert not torch.equal(written[0], fused[0])
    for expected, *found in zip(exact, written, fused, strict=True):
        for tensor in found:
            assert (tensor - expected).norm() < 0.01 * expected.norm()
