"""CAE: what its networks see and what they do not, its draws, its loss, and what cannot be."""

import numpy as np
import pytest
import torch

from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.masks.blocks import lay_out
from ijepa_fast.methods import cae
from ijepa_fast.models.positions import sincos_2d
from tests.launch import ROOT
from tests.small import setup_of

SMALL = {"vocabulary": 11, "token_patch": 4, "masked": 6, "smallest": 2, "regressor_depth": 2, "decoder_depth": 1}


def small_cae(**options):
    torch.manual_seed(0)
    method = cae.CAE(setup_of(32, 8, options=SMALL | {"drop_path": 0.0} | options))
    method.tokenizer = lambda images: torch.randint(11, (len(images), 4, 4))
    return method


def patches_and_tokens(method, images=3):
    return torch.randn(images * 16, 192), torch.randint(11, (images * 16,))


@pytest.mark.parametrize("width", [None, 24])
def test_cae_learns_from_uint8_views(width):
    method = small_cae(width=width, heads=2, drop_path=0.2)
    views = [torch.randint(256, (3, view.crop, view.crop, 3), dtype=torch.uint8) for view in method.views()]
    assert [view.shape[1] for view in views] == [32, 16]
    loss, terms = method(views, method.draw(3, 0, 0))
    loss.backward()
    torch.testing.assert_close(loss.detach(), terms["tokens"] + 2 * terms["latents"])
    missing = {name for name, p in method.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-8}
    # What is added to all keys alike changes no attention.
    assert missing <= {f"regressor.regressor_blocks.{i}.norm1_k.bias" for i in range(2)}


def test_the_encoder_sees_visible_patches_and_the_alignment_masked_ones():
    method = small_cae()
    patches, _ = patches_and_tokens(method)
    draw = method.draw(3, 0, 0)
    visible, targets = method.visible(patches, draw), method.targets(patches, draw)
    assert visible.shape == (3 * (1 + 10), 32)
    assert targets.shape == (3 * 6, 32)
    assert not targets.requires_grad
    noise = torch.randn_like(patches)
    other_masked = torch.where(draw.mask[:, None], noise, patches)
    other_visible = torch.where(draw.mask[:, None], patches, noise)
    assert torch.equal(method.visible(other_masked, draw), visible)
    assert torch.equal(method.targets(other_visible, draw), targets)
    assert not torch.equal(method.visible(other_visible, draw), visible)
    assert not torch.equal(method.targets(other_masked, draw), targets)


def test_each_image_is_by_itself():
    method = small_cae(width=16)
    patches, _ = patches_and_tokens(method)
    draw = method.draw(3, 0, 0)
    alone = cae.with_visible(lay_out(draw.mask.view(3, 16)[1:2].numpy()))

    def logits(patches, draw):
        places = method.places(draw)
        latents = method.latents(method.visible(patches, draw), draw, places)
        return method.decoder(latents, places[0], draw.images)

    torch.testing.assert_close(logits(patches, draw)[6:12], logits(patches[16:32], alone))


def test_positions_have_the_row_first():
    ours, others = sincos_2d(16, (3, 5), row_first=True), sincos_2d(16, (3, 5))
    assert torch.equal(ours, torch.cat([others[:, 8:], others[:, :8]], dim=1))
    method = small_cae()
    assert torch.equal(method.encoder.positions, sincos_2d(32, (4, 4), row_first=True))


def test_dropped_branches_are_those_of_the_draw():
    """Of all four passes; a part of a batch drops what the whole does."""
    method = small_cae(drop_path=0.9).train()
    patches, tokens = patches_and_tokens(method)
    draw = method.draw(3, 0, 0)
    losses = [torch.stack(method.losses(patches, tokens, draw)) for _ in range(2)]
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], torch.stack(method.eval().losses(patches, tokens, draw)))
    method.train()
    assert [len(keep) for keep in method.kept(draw)] == [2, 2, 2, 1]
    part = method.draw(2, 0, 0, first=1)
    assert torch.equal(part.chance, draw.chance[..., 1:])
    assert torch.equal(part.mask, draw.mask[16:])
    assert draw.tokens == 3 * (1 + 10) + 3 * (1 + 6) + 3 * 6 + 3 * 6


def test_masks_of_other_numbers_are_refused():
    mask = np.zeros((2, 16), dtype=bool)
    mask[0, :3] = mask[1, :2] = True
    with pytest.raises(ValueError, match=r"as many masked patches in every image, got \[3, 2\]"):
        cae.with_visible(lay_out(mask))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["objective.options.masked=64"], "objective.options.masked=64: expected fewer than the 64 patches"),
        (["objective.options.heads=5"], "objective.options.width=192: expected a width that 4 and the 5 heads divide"),
        (["objective.options.width=50"], "objective.options.width=50: expected a width that 4 and the 3 heads divide"),
        (["objective.options.decoder_depth=0"], "objective.options.decoder_depth: expected at least 1"),
    ],
)
def test_what_cannot_be_is_named(options, words):
    from ijepa_fast.run.build import build_method

    with pytest.raises(ConfigError, match=words):
        build_method(load_config(ROOT / "configs" / "cae_cifar10.yaml", options))


TOKENS = ROOT / "tests" / "data" / "patch_tokens.safetensors"  # 32 tokens of patches of 4 pixels


@pytest.mark.parametrize("name", ["beit", "cae"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "objective.options.tokenizer=cifar10_tokens.safetensors: there is no such file"),
        (["objective.options.tokenizer=null"], "objective.options.tokenizer is not set"),
        ([f"objective.options.tokenizer={TOKENS}"], "it has 32 tokens and the head 512; set .*vocabulary=32"),
        (
            [
                f"objective.options.tokenizer={TOKENS}",
                "objective.options.vocabulary=32",
                "objective.options.token_patch=8",
            ],
            "its patches have 4 pixels, and objective.options.token_patch is 8",
        ),
        (["data.channels=4", "data.mean=[0,0,0,0]", "data.std=[1,1,1,1]"], "data.channels=4: a tokenizer reads"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_named(name, options, words, tmp_path, monkeypatch):
    from ijepa_fast.run.build import build_method

    monkeypatch.chdir(tmp_path)
    method = build_method(load_config(ROOT / "configs" / f"{name}_cifar10.yaml", options))
    with pytest.raises(ConfigError, match=words) as error:
        method.ready()
    assert "\n" not in str(error.value)


def test_a_token_beyond_the_head_is_named():
    method = small_cae()
    method.tokenizer = lambda images: torch.full((len(images), 4, 4), 11)
    with pytest.raises(ConfigError, match="it gave token 11 and the head has 11"):
        method.tokens(torch.zeros(3, 16, 16, 3, dtype=torch.uint8))
