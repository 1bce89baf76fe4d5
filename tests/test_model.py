"""The model: packed equals per-image, selected rows equal dense ones, initialisation and sizes are the published."""

import pytest
import torch

from ijepa_fast.config import ARCHITECTURES
from ijepa_fast.masks.packing import pack
from ijepa_fast.masks.samplers import make_sampler
from ijepa_fast.methods.ijepa import Options
from ijepa_fast.models.initial import init_weights
from ijepa_fast.models.positions import sincos_2d
from ijepa_fast.models.vit import Encoder
from tests.small import from_masks, loss_of, small_ijepa, to

IMAGES, PATCH = 3, 8


@pytest.fixture
def model():
    return to(small_ijepa(depth=3), torch.double)


@pytest.fixture
def masks():
    return make_sampler("multiblock", (8, 8), contexts=2, min_keep=3)(IMAGES, 0, 0, 0)


@pytest.fixture
def patches():
    return torch.randn(IMAGES * 64, 3 * PATCH**2, dtype=torch.float64)


def one_image(masks, i):
    """The masks of image i alone, as patch numbers: context of each c, target (M, 1, K)."""
    return [masks.context[c, i].nonzero()[:, 0] for c in range(masks.context.shape[0])], masks.target[:, i : i + 1]


def test_packed_context_equals_each_image_alone(model, masks, patches):
    packed = pack(masks)
    together = model.encoder.context(patches, packed).split(packed.context_cu_seqlens.diff().tolist())
    for i in range(IMAGES):
        contexts, targets = one_image(masks, i)
        for c, kept in enumerate(contexts):
            alone = from_masks(kept[None, None], targets, 64)
            out = model.encoder.context(patches[i * 64 : (i + 1) * 64], alone)
            torch.testing.assert_close(together[c * IMAGES + i], out, rtol=0, atol=1e-12)


def test_packed_predictions_equal_each_image_alone(model, masks, patches):
    packed = pack(masks)
    together = model.predictor(model.encoder.context(patches, packed), packed)
    together = together.view(packed.targets, packed.contexts, IMAGES, packed.target_size, -1)
    for i in range(IMAGES):
        contexts, targets = one_image(masks, i)
        for c, kept in enumerate(contexts):
            alone = from_masks(kept[None, None], targets, 64)
            out = model.predictor(model.encoder.context(patches[i * 64 : (i + 1) * 64], alone), alone)
            torch.testing.assert_close(together[:, c, i].flatten(0, 1), out, rtol=0, atol=1e-12)


def test_target_rows_equal_the_dense_encoding(model, masks, patches):
    packed = pack(masks)
    dense = model.target_encoder(patches, IMAGES)
    torch.testing.assert_close(
        model.target_encoder.targets(patches, packed), dense[packed.union_index], rtol=0, atol=1e-12
    )
    rows = model.target_encoder.targets(patches, packed)[packed.prediction_rows]
    wanted = dense[packed.target_index.long()][:, None].expand(-1, 2, -1, -1, -1).reshape(-1, 32)
    torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-12)


def test_recomputing_changes_no_gradient(model, masks, patches):
    packed = pack(masks)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.encoder.recompute = model.predictor.recompute = recompute
        model.loss_of_patches(patches, packed).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_of_the_target_encoder_is_trained(model, masks, patches):
    assert not any("target" in name for name, _ in model.named_parameters())
    model.loss_of_patches(patches, pack(masks)).backward()
    assert all(p.grad is None for p in model.target_encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_pixel_targets(masks):
    model = small_ijepa(options=Options(target="pixels"), predictor_depth=1)
    images = torch.randint(0, 256, (IMAGES, 64, 64, 3), dtype=torch.uint8)
    loss = loss_of(model, images, pack(masks))
    loss.backward()
    assert loss.isfinite()
    # The targets are the patches' own values, normalised patch by patch.
    targets = model.targets(model.patchify(images), pack(masks))
    first = images[0, :8, :8].permute(2, 0, 1).reshape(-1).float() / 255
    row = (pack(masks).union_index == 0).nonzero()
    if row.numel():
        torch.testing.assert_close(targets[row[0, 0]], (first - 0.5) / 0.25, rtol=1e-5, atol=1e-5)


def test_initialisation_is_the_published_one():
    encoder = Encoder(64, PATCH, 192, 2, 3)
    encoder.apply(init_weights)
    weight = encoder.blocks[1].mlp.fc2.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert encoder.blocks[0].attn.qkv.bias.abs().max() == 0
    assert torch.equal(encoder.norm.weight, torch.ones(192))


def test_the_patch_embedding_can_start_larger():
    sizes = {"dim": 192, "heads": 3, "predictor_dim": 96, "predictor_depth": 1}
    models = [small_ijepa(**sizes, patch_std=patch_std) for patch_std in (0.02, 0.09)]
    small, large = (dict(model.named_parameters()) for model in models)
    for name, parameter in small.items():
        factor = 4.5 if name == "encoder.patch_embed.proj.weight" else 1
        torch.testing.assert_close(large[name], factor * parameter)
    weight = models[1].target_encoder.patch_embed.proj.weight
    assert torch.equal(weight, large["encoder.patch_embed.proj.weight"])


def test_positions():
    table = sincos_2d(16, (2, 3))
    # The first half encodes the column, the second the row, each as sines then cosines.
    assert torch.equal(table[0], torch.tensor([0.0] * 4 + [1.0] * 4).repeat(2))
    assert torch.equal(table[1, 8:], table[0, 8:])
    assert torch.equal(table[3, :8], table[0, :8])
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_2d(18, (2, 2))


@pytest.mark.parametrize(
    ("name", "patch", "millions"),
    [("vit_base", 16, 85.6), ("vit_large", 16, 303), ("vit_huge", 14, 630), ("vit_giant", 16, 1011)],
)
def test_sizes_of_the_published_architectures(name, patch, millions):
    with torch.device("meta"):
        encoder = Encoder(224, patch, *ARCHITECTURES[name])
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


def test_the_fp8_target_encoder_stays_close(masks):
    """Per token, the emulation's features point where fp32's do; after new weights, where theirs do."""
    model = small_ijepa(dim=192, depth=6, heads=3, predictor_dim=96, predictor_depth=1)
    patches, packed = torch.randn(IMAGES * 64, 3 * PATCH**2), pack(masks)

    def cosines():
        wanted = model.target_encoder.targets(patches, packed)
        return torch.cosine_similarity(model.targets(patches, packed), wanted)

    model.use_fp8()
    assert len(model.fp8_blocks) == 5
    assert 0.999 < cosines().min() < 1 - 1e-7
    with torch.no_grad():
        for p in model.target_encoder.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    assert cosines().min() < 0.99
    model.average_changed()
    assert cosines().min() > 0.999


def test_fp8_targets_leave_gradients_to_the_trained_networks(masks):
    model = small_ijepa(predictor_depth=1)
    model.use_fp8()
    model.loss_of_patches(torch.randn(IMAGES * 64, 3 * PATCH**2), pack(masks)).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in model.target_encoder.parameters())
