"""Another number of ranks, or of micro-batches, is the same run: all that is drawn follows from an image's place."""

from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")

from ijepa_fast.config import load_config
from ijepa_fast.masks.anchors import AnchorDraw
from ijepa_fast.masks.blocks import PatchDraw
from ijepa_fast.masks.crops import LARGE
from ijepa_fast.masks.views import ViewDraw
from ijepa_fast.run.build import build_draw, build_method
from tests.launch import PUBLISHED_MASKS, ROOT, TINY

BATCH = 24
KINDS = {
    "full": (),
    "truncated": ("mask.policy=truncate", "mask.contexts=2"),
    "truncated by group": ("mask.policy=truncate", "mask.strategy=multiblock-reference", "mask.group=5"),
    "budget": ("mask.policy=budget", "mask.budget=20", "mask.padding=false"),
    "budget by group": ("mask.policy=budget", "mask.budget=20", "mask.group=7"),
    "rasterized": ("mask.strategy=rasterized",),
    "block": ("mask.strategy=block",),
    "random": ("mask.strategy=random",),
    "mae": ("model.predictor_dim=32",),
    "ibot": ("objective.options={small_crops: 2, hidden: 16, bottleneck: 8, prototypes: 32}",),
}
OTHERS = ("simmim", "data2vec", "beit", "dino", "msn", "cae", "lejepa")
KINDS |= dict.fromkeys(OTHERS, ())
KINDS["data2vec"] = ("objective.options={masked: 20, layers: 2}",)
KINDS["beit"] = ("objective.options={masked: 20}",)
KINDS["cae"] = ("objective.options={masked: 20, drop_path: 0.1}",)
KINDS["dino"] = ("objective.options={small_crops: 2, hidden: 16, bottleneck: 8, prototypes: 32, drop_path: 0.1}",)
KINDS["lejepa"] = ("objective.options={views: 3, small_views: 2, slices: 8, embedding: 4}",)
KINDS["msn"] = (
    "model.patch=8",
    "objective.options={small_anchors: 2, hidden: 16, out: 8, prototypes: 32, drop_path: 0.1}",
)
KEPT = {"full", "truncated", "truncated by group", "budget", "budget by group"}  # strategies with a least context


def config_of(kind, accumulation=1):
    tiny = [option for option in TINY if kind in KEPT or not option.startswith("mask.")]
    if kind not in ("mae", "ibot", *OTHERS):
        tiny += PUBLISHED_MASKS
    options = [*tiny, f"batch_size={BATCH}", f"engine.accumulation={accumulation}", *KINDS[kind]]
    name = f"{kind}_cifar10" if kind in ("mae", "ibot", *OTHERS) else "quickstart"
    return load_config(ROOT / "configs" / f"{name}.yaml", options)


def by_image(draw):
    """What the draw says of each of its images, whatever is around them."""
    if isinstance(draw, PatchDraw):
        masks = draw.mask.view(draw.images, -1)
        return [(masks[i].tolist(), draw.chance[..., i].tolist()) for i in range(draw.images)]
    if isinstance(draw, ViewDraw):
        chance = draw.chance.view(*draw.chance.shape[:2], -1, draw.images)
        return [(chance[..., i].tolist(), draw.directions.tolist()) for i in range(draw.images)]
    if isinstance(draw, AnchorDraw):
        chance = draw.chance.view(*draw.chance.shape[:2], -1, draw.images)
        return [(draw.kept.tolist(), chance[..., i].tolist()) for i in range(draw.images)]
    if hasattr(draw, "chance"):
        masks = draw.mask.view(LARGE, draw.images, -1)
        chance = draw.chance.view(*draw.chance.shape[:2], -1, draw.images)
        return [(masks[:, i].tolist(), chance[..., i].tolist(), draw.temperature) for i in range(draw.images)]
    ends = draw.context_cu_seqlens.tolist()
    places = [draw.context_places[a:b].tolist() for a, b in pairwise(ends)][: draw.sequences]
    contexts = [places[image :: draw.images] for image in range(draw.images)]
    return [(contexts[i], (draw.target_index[:, i] % draw.patches).tolist()) for i in range(draw.images)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_meets_the_same_draw_on_any_ranks(kind):
    method = build_method(config_of(kind))
    whole = [by_image(build_draw(config_of(kind), method, torch.device("cpu"), 0, 1)(step)) for step in range(2)]
    assert whole[0] != whole[1]
    assert len({str(image) for image in whole[1]}) > (1 if kind == "rasterized" else BATCH // 4)
    for ranks, accumulation in ((2, 1), (1, 3), (2, 2), (8, 3)):
        config = config_of(kind, accumulation)
        draws = [build_draw(config, method, torch.device("cpu"), rank, ranks) for rank in range(ranks)]
        for step in range(2):
            micro_steps = range(step * accumulation, (step + 1) * accumulation)
            parts = [by_image(draw(micro_step)) for micro_step in micro_steps for draw in draws]
            assert [image for part in parts for image in part] == whole[step], (ranks, accumulation)


def test_a_policy_compares_the_images_of_a_group():
    """Truncated: equal lengths in a group; budget: the group has its tokens, however distributed."""
    truncated, budget = (
        build_draw(config_of(kind), build_method(config_of(kind)), torch.device("cpu"), 0, 1)(0)
        for kind in ("truncated by group", "budget by group")
    )
    lengths = truncated.context_lengths.numpy()
    for start in range(0, BATCH, 5):
        assert len(set(lengths[start : start + 5])) == 1
    assert len(set(lengths)) > 1
    sums = np.add.reduceat(budget.context_lengths.numpy(), range(0, BATCH, 7))
    assert sums.tolist() == [140, 140, 140, 60]
