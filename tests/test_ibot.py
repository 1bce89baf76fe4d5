"""iBOT: parity with the published code, its draws, its class token, and stochastic depth."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa_fast.masks.crops import CropSampler, draw_masks, lay_out
from ijepa_fast.methods.ibot import Options
from ijepa_fast.models.layouts import Packed
from ijepa_fast.models.vit import Encoder
from tests.parity import TOLERANCE
from tests.parity_methods import parity_ibot
from tests.small import loss_of, small_ibot

SMALL = Options(hidden=32, bottleneck=16, prototypes=48)


def test_parity_with_the_published_code():
    with np.load(Path(__file__).parent / "data" / "ibot_step.npz") as archive:
        errors = parity_ibot(archive)
    assert len(errors) > 40
    assert max(errors.values()) < TOLERANCE, errors


def test_it_is_read_by_its_class_token():
    """An image at a time or several, and of what the losses train."""
    model, images = small_ibot(), torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    teacher, patches = model.probed, model.patchify(images)
    assert teacher is model.averaged["encoder"]
    features = teacher(patches, 3)
    assert features.shape == (3, 32)
    torch.testing.assert_close(features[1:2], teacher(patches[16:32], 1))
    head = model.averaged["head"]
    logits = head.last_layer(head.bottleneck(features))
    batch = crop_sampler(1)(3, seed=0, step=0)
    torch.testing.assert_close(model.teacher(patches.repeat(2, 1), batch)[0], logits.repeat(2, 1))


def crop_sampler(small, **settings):
    return CropSampler(grid=(4, 4), small=small, depth=2, temperatures=(0.04, 0.07), **settings)


def random_views(images, small):
    shapes = [(images, side, side, 3) for side in [32] * 2 + [16] * small]
    return [torch.randint(256, shape, dtype=torch.uint8) for shape in shapes]


def test_ibot_learns_from_uint8_views_and_masks_drawn_ahead():
    sampler = crop_sampler(3)
    batch, again = sampler(4, seed=1, step=2), sampler(4, seed=1, step=2)
    assert torch.equal(batch.chance, again.chance)
    assert torch.equal(batch.mask, again.mask)
    assert not torch.equal(batch.chance, sampler(4, seed=1, step=3).chance)
    model = small_ibot()
    loss, terms = model(random_views(4, 3), batch)
    loss.backward()
    torch.testing.assert_close(terms["class"] + terms["patch"], loss.detach())
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_ibot_freezes_its_prototypes_at_first_and_warms_the_teacher_up():
    sampler = crop_sampler(1, warmup_steps=10, frozen_steps=2)
    batches = [sampler(2, seed=0, step=step) for step in (0, 1, 2, 5, 10, 20)]
    assert [batch.frozen for batch in batches] == [True, True, False, False, False, False]
    assert [batch.temperature for batch in batches] == pytest.approx([0.04, 0.043, 0.046, 0.055, 0.07, 0.07])
    views = random_views(2, 1)
    for batch in batches[1:3]:
        model = small_ibot()
        loss_of(model, views, batch).backward()
        gradient = model.head.last_layer.weight_v.grad
        assert gradient is not None
        assert gradient.any() != batch.frozen


def test_ibot_drops_what_its_batch_says():
    """The loss is a function of the batch: not of a generator, which a resumed run would have in another state."""
    model, views, batch = (
        small_ibot(options=replace(SMALL, drop_path=0.5)),
        random_views(3, 2),
        crop_sampler(2)(3, seed=0, step=0),
    )
    whole = replace(batch, chance=torch.ones_like(batch.chance))

    def loss(batch):
        for centre in model.carried.values():
            centre.zero_()
        return loss_of(model, views, batch)

    assert torch.equal(loss(batch), loss(batch))
    assert loss(batch) != loss(whole)
    model.eval()
    assert loss(batch) != loss(replace(whole, mask=~whole.mask))


def test_ibot_without_any_masked_patch_has_no_patch_loss():
    batch = lay_out(np.zeros((2, 1, 16), dtype=bool), (4, 4), small=2, small_grid=(2, 2), temperature=0.07)
    model, views = small_ibot(), random_views(1, 2)
    large, small = (model.patchify(torch.cat(part)) for part in (views[:2], views[2:]))
    class_loss, patch_loss = model.losses(large, small, batch)
    assert patch_loss == 0
    assert class_loss > 0


def test_stochastic_depth_drops_whole_branches():
    encoder = Encoder(32, 8, 16, 3, 2, class_token=True, drop_path=0.5)
    chance = torch.rand(3, 2, 64)
    keep = encoder.keep(chance)
    assert keep[0] is None
    assert torch.equal(keep[1] == 0, chance[1] < 0.25)
    assert set(keep[2].unique().tolist()) == {0.0, 2.0}
    assert Encoder(32, 8, 16, 3, 2).keep(chance) == [None] * 3
    cu_seqlens = torch.arange(0, 64 * 3 + 1, 3, dtype=torch.int32)
    x, sequences = torch.randn(64 * 3, 16), Packed(cu_seqlens, 3)
    _, branch = encoder.blocks[2](x, None, replace(sequences, keep=keep[2]))
    dropped = (branch.view(64, 3, 16) == 0).flatten(1)
    assert torch.equal(dropped.all(1), dropped.any(1))
    assert torch.equal(dropped.all(1), chance[2, 1] < 0.5)
    _, whole = encoder.blocks[2](x, None, sequences)
    assert (whole != 0).any(1).all()


def test_mask_shares():
    masks = draw_masks(np.random.default_rng(0), 2000, (14, 14))
    shares = masks.mean(1)
    assert np.mean(shares == 0) == pytest.approx(0.5, abs=0.05)
    assert shares[shares > 0].mean() == pytest.approx(0.3, abs=0.03)
    assert shares.max() <= 0.5 + 1 / 196
