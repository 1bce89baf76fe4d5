"""The loss on visible tokens: which they are, what each weighs, and that neither padding, ranks nor sets change it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_fast.masks.packing import pack
from ijepa_fast.masks.visible import nearest
from ijepa_fast.methods.ijepa import Options
from ijepa_fast.models.blocks import run_blocks
from ijepa_fast.models.layouts import Packed
from tests.small import small_ijepa
from tests.steps import assert_graphs_hold, counted_work, loss_and_gradients, unpadded

BATCH, WEIGHT = 6, 0.5


def model_of(**options):
    return small_ijepa(options=Options(visible_weight=WEIGHT, **options))


def images_of(count=BATCH):
    return torch.randint(256, (count, 64, 64, 3), dtype=torch.uint8)


@pytest.mark.parametrize("grid", [(8, 8), (3, 7), (1, 5)])
def test_the_nearest_target(grid):
    patches = grid[0] * grid[1]
    g = np.random.default_rng(0)
    target = np.stack([[g.permutation(patches)[:2] for _ in range(5)] for _ in range(3)])  # (M, B, K)
    places = np.stack(np.divmod(np.arange(patches), grid[1]), 1)
    for image in range(5):
        there = places[target[:, image].ravel()]
        apart = np.sqrt(((places[:, None] - there[None]) ** 2).sum(2)).min(1)
        np.testing.assert_allclose(nearest(target, grid)[image], np.maximum(apart, 1))


def plain_predictions(model, patches, draw):
    """Of every predictor sequence by itself: predictions of its context's tokens, and of its mask tokens."""
    predictor, context = model.predictor, model.encoder.context(patches, draw)
    parts = context.split(draw.context_cu_seqlens.diff().tolist())[: draw.sequences]
    places = draw.context_places.split(draw.context_cu_seqlens.diff().tolist())[: draw.sequences]
    seen, masked = [], []
    for block in range(draw.targets):
        for sequence in range(draw.sequences):
            at = draw.target_index[block, sequence % (draw.sets * draw.images)] % draw.patches
            x = predictor.predictor_embed(parts[sequence]) + predictor.positions[places[sequence].long()]
            x = torch.cat([x, predictor.mask_token[0] + predictor.positions[at.long()]])
            alone = Packed(torch.tensor([0, len(x)], dtype=torch.int32), len(x))
            x = predictor.predictor_proj(
                run_blocks(predictor.predictor_blocks, predictor.predictor_norm, x, None, alone)
            )
            seen.append(x[: len(parts[sequence])])
            masked.append(x[len(parts[sequence]) :])
    return seen, masked, places


@pytest.mark.parametrize("options", [{}, {"mask_sets": 2}, {"target_norm": "none", "loss": "smooth_l1"}], ids=str)
def test_the_loss_is_that_of_all_tokens_written_out(options):
    model, images = model_of(**options), images_of()
    draw = model.draw(BATCH, 0, 0)
    patches = model.patchify(images)
    with torch.no_grad():
        features = model.target_encoder(patches, BATCH).view(BATCH, -1, 32)
        targets = features if options.get("target_norm") == "none" else F.layer_norm(features, (32,))
        seen, masked, places = plain_predictions(model, patches, draw)
    of = F.smooth_l1_loss if options.get("loss") == "smooth_l1" else F.mse_loss
    sets, sums = draw.sets * BATCH, []
    for number, predictions in enumerate(seen):
        part = number % draw.sequences % sets
        blocks = draw.target_index[:, part].numpy() % draw.patches
        weight = torch.from_numpy(nearest(blocks[:, None], (8, 8))[0]).rsqrt().float()
        at = places[number % draw.sequences].long()
        errors = of(predictions, targets[part % BATCH][at], reduction="none").mean(1)
        sums.append((errors * weight[at]).mean())
    loss, terms = model(images, draw)
    rows = torch.cat(masked)
    expected = of(rows, targets.flatten(0, 1)[draw.union_index.long()][draw.prediction_rows.long()])
    torch.testing.assert_close(terms["visible"], torch.stack(sums).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["prediction"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, terms["prediction"] + WEIGHT * terms["visible"])


def test_padding_changes_nothing():
    model, images = model_of(), images_of()
    masks, scale = model.sampler(BATCH, 0, 0, 0), {"visible_scale": torch.tensor(WEIGHT)}
    drawn = [pack(masks, padding=padding, grid=(8, 8)) for padding in (False, (4, 2))]
    assert len(drawn[1].visible_rows) > len(drawn[0].visible_rows)
    found = [loss_and_gradients(model, images, replace(draw, **scale)) for draw in drawn]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["token", "none"])
def test_two_ranks_have_the_loss_of_the_whole(norm):
    """Contexts of any length: each weighs the same, whoever has it."""
    model, images = model_of(target_norm=norm), images_of()
    whole = loss_and_gradients(model, images, model.draw(BATCH, 0, 0))
    parts = [
        loss_and_gradients(model, images[first : first + 3], model.draw(3, 0, 0, first, BATCH)) for first in (0, 3)
    ]
    for value, halves in zip(whole, zip(*parts), strict=True):
        torch.testing.assert_close(value, torch.stack(halves).mean(0), rtol=1e-4, atol=1e-6)


def test_places_that_are_only_seen_have_statistics_too():
    """Else their targets would be divided by nothing."""
    model, images = model_of(target_norm="position"), images_of()
    _, terms = model(images, model.draw(BATCH, 0, 0))
    assert terms["visible"] < 10


def test_the_weight_grows():
    model = small_ijepa(options=Options(visible_weight=2.0, visible_epochs=4.0))
    assert [float(model.draw(2, 0, step).visible_scale) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_work_is_what_torch_counts():
    model, images = model_of(), images_of(3)
    draw = unpadded(model, 3)
    plain = small_ijepa()
    assert counted_work(model, images, draw) == pytest.approx(model.work(draw).total, rel=0.01)
    assert model.work(draw).total > plain.work(plain.draw(3, 0, 0)).total
    assert model.saved_values(draw) > plain.saved_values(plain.draw(3, 0, 0))


def test_graphs_hold_it(ops_as_on_a_gpu):
    assert_graphs_hold(model_of(visible_epochs=3.0), model_of(visible_epochs=3.0), BATCH, images_of)
