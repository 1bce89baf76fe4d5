"""Work per image: the project's table, and torch's own count of what really runs."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.baselines.plain import Encoder, PlainStep, Predictor, plain_batch
from bench.baselines.plain_ibot import PlainIBOTStep
from bench.baselines.plain_mae import PlainMAEStep
from ijepa_fast.config import ARCHITECTURES
from ijepa_fast.masks.packing import pack
from ijepa_fast.masks.samplers import make_sampler
from ijepa_fast.methods import ibot, ijepa, mae
from ijepa_fast.methods.ibot import HeadSizes
from ijepa_fast.models.flops import Transformer

# arch, patch, crop, predictor depth, batch per GPU; then GFLOP per image of the published recipes with the context
# truncated at that batch, with all context, and of the target encoder alone.
TABLE = [
    ("vit_small", 16, 224, 6, 128, 38, 51, 9),
    ("vit_base", 16, 224, 6, 128, 83, 109, 35),
    ("vit_large", 16, 224, 12, 128, 259, 336, 123),
    ("vit_huge", 14, 224, 12, 128, 655, 840, 333),
    ("vit_huge", 16, 448, 12, 16, 2375, 2809, 1089),
    ("vit_giant", 16, 224, 16, 16, 836, 986, 405),
]


def transformer(arch):
    dim, depth, _, ratio = ARCHITECTURES[arch]
    return Transformer(dim, depth, ratio)


@pytest.mark.parametrize(("arch", "patch", "crop", "depth", "batch", "truncated", "full", "target"), TABLE)
def test_reproduces_the_published_recipes(arch, patch, crop, depth, batch, truncated, full, target):
    grid = (crop // patch, crop // patch)
    sampler = make_sampler("multiblock-reference", grid)
    work = {"truncate": [], "full": []}
    for step in range(60):
        masks = sampler(batch, seed=0, step=step)
        for policy, totals in work.items():
            packed = pack(masks, policy)
            result = ijepa.step_work(
                transformer(arch),
                Transformer(384, depth),
                patch=patch,
                patches=packed.patches,
                context=packed.context_cu_seqlens.diff().tolist(),
                targets=packed.targets,
                target_size=packed.target_size,
                images=batch,
            )
            totals.append(result.total / batch / 1e9)
    assert np.mean(work["full"]) == pytest.approx(full, rel=0.015)
    assert np.mean(work["truncate"]) == pytest.approx(truncated, rel=0.03)
    assert result.teacher / batch / 1e9 == pytest.approx(target, rel=0.02)


def test_reproduces_mae_and_ibot():
    of_mae = mae.step_work(transformer("vit_huge"), Transformer(512, 8), patch=14, patches=256, visible=64)
    of_ibot = ibot.step_work(transformer("vit_small"), HeadSizes(), patch=16, global_patches=196, local_patches=36)
    assert of_mae.total / 1e9 == pytest.approx(291, rel=0.01)
    assert of_ibot.total / 1e9 == pytest.approx(163, rel=0.01)


@pytest.mark.parametrize(("batch", "contexts"), [(3, 1), (2, 2)])
def test_ijepa_agrees_with_the_flop_counter(batch, contexts):
    step = PlainStep(
        Encoder(image_size=64, patch=8, dim=64, depth=3, heads=2),
        Predictor(grid=(8, 8), encoder_dim=64, dim=32, depth=2, heads=2),
    )
    context = torch.stack([torch.arange(19).expand(batch, -1)] * contexts)
    target = torch.arange(12).expand(4, batch, -1)
    images = torch.randint(256, (batch, 64, 64, 3), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        step.loss(*plain_batch(images, context, target, (0.5,) * 3, (0.2,) * 3)).backward()
    work = ijepa.step_work(
        Transformer(64, 3),
        Transformer(32, 2),
        patch=8,
        patches=64,
        context=[19] * contexts * batch,
        targets=4,
        target_size=12,
        images=batch,
        embed_all=True,
    )
    assert counter.get_total_flops() == pytest.approx(work.total, rel=0.01)


def test_mae_agrees_with_the_flop_counter():
    images, patches, visible = 3, 64, 16
    sizes = {"image_size": 64, "patch": 8, "dim": 64, "depth": 3, "heads": 2}
    model = PlainMAEStep(sizes | {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2}).model
    order = torch.rand(images, patches).argsort(1)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(images, 3, 64, 64), order, visible).backward()
    stacks = Transformer(64, 3), Transformer(32, 2)
    work = mae.step_work(*stacks, patch=8, patches=patches, visible=visible, images=images)
    assert counter.get_total_flops() == pytest.approx(work.total, rel=0.01)


def test_ibot_agrees_with_the_flop_counter():
    images, small = 2, 3
    backbone = {"image_size": 64, "patch": 8, "dim": 64, "depth": 3, "heads": 2}
    step = PlainIBOTStep(backbone, {"hidden": 96, "bottleneck": 32, "prototypes": 128})
    large = [torch.randn(images, 3, 64, 64) for _ in range(2)]
    masks = [torch.rand(images, 64) < 0.3 for _ in range(2)]
    with FlopCounterMode(display=False) as counter:
        step.loss(large, [torch.randn(images, 3, 24, 24) for _ in range(small)], masks, 0.07).backward()
    sizes = {"patch": 8, "global_patches": 64, "local_patches": 9, "locals_": small, "images": images}
    work = ibot.step_work(Transformer(64, 3), HeadSizes(96, 32, 128), **sizes)
    assert counter.get_total_flops() == pytest.approx(work.total, rel=0.01)
