"""The opponents are the published methods: held to the golden archives, and to each other."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.baselines.plain import Encoder, PlainStep, Predictor, load_published
from bench.baselines.plain_ibot import PlainIBOTStep
from bench.baselines.plain_mae import PlainMAEStep
from bench.baselines.strong import StrongStep
from tests.parity import relative_error

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
