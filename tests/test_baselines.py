"""The opponents are the published methods: held to the golden archives, and to each other."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.baselines.plain import Encoder, PlainStep, Predictor, load_published
from bench.baselines.plain_ibot import PlainIBOTStep
from bench.baselines.plain_mae import PlainMAEStep
from bench.baselines.strong import StrongStep
from ijepa_fast.engine.graphs import Graphs
from ijepa_fast.masks.crops import CropSampler, draw_masks, lay_out
from ijepa_fast.masks.packing import pack
from ijepa_fast.masks.samplers import make_sampler
from ijepa_fast.methods.ibot import IBOT, Backbone, Head, Network, StochasticSequences
from ijepa_fast.methods.mae import MAE, ClassTokenEncoder, Decoder
from tests.parity import relative_error
from tests.parity_baselines import parity_ibot, parity_mae

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-4


def state(archive, prefix):
    names = [name for name in archive.files if name.startswith(prefix + "/")]
    return {name.removeprefix(prefix + "/"): torch.from_numpy(archive[name]) for name in names}


def networks(archive):
    image, patch, dim, depth, heads, predictor_dim, predictor_depth, *_ = map(int, archive["config"])
    grid = (image // patch, image // patch)
    encoder = {"image_size": image, "patch": patch, "dim": dim, "depth": depth, "heads": heads}
    predictor = {"grid": grid, "encoder_dim": dim, "dim": predictor_dim, "depth": predictor_depth, "heads": heads}
    return Encoder(**encoder), Predictor(**predictor)


@pytest.fixture(scope="module")
def ijepa():
    with np.load(DATA / "ijepa_step.npz") as archive:
        yield archive


@pytest.mark.parametrize("kind", ["plain", "strong"])
def test_ijepa_steps_are_the_published_ones(ijepa, kind):
    # Images come normalised from the archive, so the strong step's own normalisation is made the identity.
    step = (
        PlainStep(*networks(ijepa))
        if kind == "plain"
        else StrongStep(*networks(ijepa), mean=(0.0,) * 3, std=(1 / 255,) * 3)
    )
    load_published(step, *(state(ijepa, f"init/{name}") for name in ("encoder", "predictor", "target_encoder")))
    for i in range(3):
        images, context, target = (
            torch.from_numpy(ijepa[f"s{i}/{name}"]) for name in ("images", "masks_context", "masks_target")
        )
        if kind == "plain":
            batch = (images, list(context), list(target))
            assert relative_error(step.targets(*batch), ijepa[f"s{i}/targets"]) < TOLERANCE
        else:
            batch = (images.permute(0, 2, 3, 1), context, target)
        loss = step(batch, *(float(ijepa[f"s{i}/{name}"]) for name in ("lr", "wd", "ema")))
        assert float(loss) == pytest.approx(float(ijepa[f"s{i}/loss_smooth_l1"]), rel=1e-5)
    for network in ("encoder", "predictor", "target_encoder"):
        ours = getattr(step, network).state_dict()
        for name, golden in state(ijepa, f"final/{network}").items():
            assert relative_error(ours[name], golden) < TOLERANCE, name


def test_plain_and_strong_agree_with_two_contexts(ijepa):
    plain, strong = PlainStep(*networks(ijepa)), StrongStep(*networks(ijepa), mean=(0.0,) * 3, std=(1 / 255,) * 3)
    weights = [state(ijepa, f"init/{name}") for name in ("encoder", "predictor", "target_encoder")]
    load_published(plain, *weights)
    load_published(strong, *weights)
    images = torch.randn(3, 3, 64, 64)
    context, target = torch.randint(64, (2, 3, 9)), torch.randint(64, (4, 3, 5))
    losses = plain((images, list(context), list(target))), strong((images.permute(0, 2, 3, 1), context, target))
    assert losses[0] == pytest.approx(float(losses[1]), rel=1e-5)


@pytest.mark.parametrize(("name", "parity"), [("mae", parity_mae), ("ibot", parity_ibot)])
def test_parity_with_the_published_code(name, parity):
    with np.load(DATA / f"{name}_step.npz") as archive:
        errors = parity(archive)
    assert len(errors) > 40
    assert max(errors.values()) < TOLERANCE, errors


def test_plain_mae_is_the_published_one():
    with np.load(DATA / "mae_step.npz") as archive:
        image, patch, dim, depth, heads, *decoder = map(int, archive["config"])
        step = PlainMAEStep(
            dict(zip(("image_size", "patch", "dim", "depth", "heads"), (image, patch, dim, depth, heads)))
            | dict(zip(("decoder_dim", "decoder_depth", "decoder_heads"), decoder))
        )
        step.model.load_state_dict(state(archive, "model"))
        order = torch.from_numpy(archive["ids_restore"]).argsort(1)
        loss = step.model(torch.from_numpy(archive["images"]), order, int((archive["mask"][0] == 0).sum()))
        loss.backward()
        assert relative_error(loss, archive["loss_norm_pix"]) < TOLERANCE
        for name, golden in state(archive, "grad").items():
            assert relative_error(step.model.get_parameter(name).grad, golden) < TOLERANCE, name


def test_plain_ibot_is_the_published_one():
    with np.load(DATA / "ibot_step.npz") as archive:
        image, patch, dim, depth, heads, prototypes, hidden, bottleneck = map(int, archive["config"])
        backbone = {"image_size": image, "patch": patch, "dim": dim, "depth": depth, "heads": heads, "drop_path": 0.0}
        step = PlainIBOTStep(backbone, {"hidden": hidden, "bottleneck": bottleneck, "prototypes": prototypes})
        for name in ("student", "teacher"):
            network = getattr(step, name)
            golden = state(archive, name)
            network.load_state_dict({k: golden.get(k, v) for k, v in network.state_dict().items()})
        step.centre = torch.from_numpy(archive["center_before"])
        step.patch_centre = torch.from_numpy(archive["center2_before"])
        large = [torch.from_numpy(archive[f"global{i}"]) for i in range(2)]
        small = [torch.from_numpy(archive[f"local{i}"]) for i in range(3)]
        masks = [torch.from_numpy(archive[f"mask{i}"]).flatten(1) for i in range(2)]
        loss = step.loss(large, small, masks, temperature=0.04 + 0.03 * 5 / 9)
        loss.backward()
        assert relative_error(loss, archive["loss"]) < TOLERANCE
        assert relative_error(step.centre, archive["center_after"]) < TOLERANCE
        assert relative_error(step.patch_centre, archive["center2_after"]) < TOLERANCE
        for name, golden in state(archive, "grad").items():
            assert relative_error(step.student.get_parameter(name).grad, golden) < TOLERANCE, name


def small_mae():
    encoder = ClassTokenEncoder(32, 8, 32, 2, 2)
    return MAE(encoder, Decoder(encoder.grid, 8, 32, 32, 2, 2), mean=(0.5,) * 3, std=(0.25,) * 3)


def test_mae_refuses_masks_it_cannot_use():
    masks = make_sampler("rasterized", (4, 4))(2, seed=0, step=0)
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="one target block"):
        small_mae()(images, pack(masks))


def test_mae_features_come_without_the_class_token():
    model, images = small_mae(), torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    patches = model.patchify(images)
    features = model.target_encoder(patches, 3)
    assert features.shape == (3 * 16, 32)
    alone = model.target_encoder(patches[16:32], 1)
    torch.testing.assert_close(features[16:32], alone)


@pytest.mark.gpu
def test_graphs_change_nothing_of_mae():
    """Batches of one shape: run, captured, replayed."""
    sampler, torch_state = make_sampler("random", (4, 4), target_scale=0.75), torch.get_rng_state()
    losses = []
    for graphs in (False, True):
        torch.set_rng_state(torch_state)
        model = small_mae().cuda()
        if graphs:
            model.forward = Graphs(model)
        images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8).cuda()
        for step in range(4):
            loss = model(images, pack(sampler(4, 0, step, 0)).to("cuda"))
            gradients = torch.autograd.grad(loss, [*model.parameters()])
            losses.append([loss.detach(), *gradients])
    assert len(model.forward.pairs) == 1
    for eager, replayed in zip(losses[:4], losses[4:], strict=True):
        for a, b in zip(eager, replayed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def small_ibot(drop=0.0):
    return IBOT(Network(Backbone(32, 8, 32, 2, 2, drop=drop), Head(32, 32, 16, 48)), mean=(0.5,) * 3, std=(0.25,) * 3)


def test_ibot_is_probed_by_its_class_token():
    """An image at a time or several, and of what the losses train."""
    pytest.importorskip("omegaconf")
    pytest.importorskip("tqdm")
    from ijepa_fast.run.sources import encode_with

    model, images = small_ibot(), torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    teacher, patches = model.target_encoder, model.patchify(images)
    features = teacher(patches, 3)
    torch.testing.assert_close(encode_with(model)(images), features[:, None])
    torch.testing.assert_close(features[1:2], teacher(patches[16:32], 1))
    logits = teacher.head.last_layer(teacher.head.bottleneck(features))
    batch = crop_sampler(0)(3, seed=0, step=0)
    torch.testing.assert_close(teacher.teacher(patches.repeat(2, 1), batch)[0], logits.repeat(2, 1))


def crop_sampler(small, **settings):
    return CropSampler(side=4, small_side=2, small=small, depth=2, temperatures=(0.04, 0.07), **settings)


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
    model(random_views(4, 3), batch).backward()
    missing = [name for name, p in model.encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_ibot_freezes_its_prototypes_at_first_and_warms_the_teacher_up():
    sampler = crop_sampler(1, warmup_steps=10, frozen_steps=2)
    batches = [sampler(2, seed=0, step=step) for step in (0, 1, 2, 5, 10, 20)]
    assert [batch.frozen for batch in batches] == [True, True, False, False, False, False]
    assert [batch.temperature for batch in batches] == pytest.approx([0.04, 0.043, 0.046, 0.055, 0.07, 0.07])
    views = random_views(2, 1)
    for batch in batches[1:3]:
        model = small_ibot()
        model(views, batch).backward()
        gradient = model.encoder.head.last_layer.weight_v.grad
        assert gradient is not None
        assert gradient.any() != batch.frozen


def test_ibot_drops_what_its_batch_says():
    """The loss is a function of the batch: not of a generator, which a resumed run would have in another state."""
    model, views, batch = small_ibot(drop=0.5), random_views(3, 2), crop_sampler(2)(3, seed=0, step=0)
    whole = replace(batch, chance=torch.ones_like(batch.chance))

    def loss(batch):
        for centre in model.carried.values():
            centre.zero_()
        return model(views, batch)

    assert torch.equal(loss(batch), loss(batch))
    assert loss(batch) != loss(whole)
    model.eval()
    assert loss(batch) != loss(replace(whole, mask=~whole.mask))


def test_ibot_without_any_masked_patch_has_no_patch_loss():
    batch = lay_out(np.zeros((2, 1, 16), dtype=bool), small=2, small_side=2, temperature=0.07)
    model, views = small_ibot(), random_views(1, 2)
    large, small = (model.patchify(torch.cat(part)) for part in (views[:2], views[2:]))
    class_loss, patch_loss = model.losses(large, small, batch)
    assert patch_loss == 0
    assert class_loss > 0


def test_stochastic_depth_drops_whole_branches():
    backbone = Backbone(32, 8, 16, 3, 2, drop=0.5)
    chance = torch.rand(3, 2, 64)
    factor = backbone.factors(chance)
    assert torch.equal(factor[0], torch.ones(2, 64))
    assert torch.equal(factor[1] == 0, chance[1] < 0.25)
    assert set(factor[2].unique().tolist()) == {0.0, 2.0}
    cu_seqlens = torch.arange(0, 64 * 3 + 1, 3, dtype=torch.int32)
    x, sequences = torch.randn(64 * 3, 16), StochasticSequences(cu_seqlens, 3, factor=factor)
    block = backbone.blocks[2].train()
    _, branch = block(x, None, sequences)
    dropped = (branch.view(64, 3, 16) == 0).flatten(1)
    assert torch.equal(dropped.all(1), dropped.any(1))
    assert torch.equal(dropped.all(1), chance[2, 1] < 0.5)
    _, whole = block.eval()(x, None, sequences)
    assert (whole != 0).any(1).all()


def test_mask_shares():
    masks = draw_masks(np.random.default_rng(0), 2000, 14)
    shares = masks.mean(1)
    assert np.mean(shares == 0) == pytest.approx(0.5, abs=0.05)
    assert shares[shares > 0].mean() == pytest.approx(0.3, abs=0.03)
    assert shares.max() <= 0.5 + 1 / 196
