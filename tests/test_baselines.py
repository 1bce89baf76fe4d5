"""The opponents are the published methods: held to the golden archives, and to each other."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.baselines.case import Case
from bench.baselines.contenders import make_contenders, work_of
from bench.baselines.others import PLAIN
from bench.baselines.plain import Encoder, PlainStep, Predictor, load_published
from bench.baselines.plain_data2vec import PlainData2VecStep
from bench.baselines.plain_dino import PlainDINOStep
from bench.baselines.plain_ibot import PlainIBOTStep
from bench.baselines.plain_mae import PlainMAEStep
from bench.baselines.strong import StrongStep
from ijepa_fast.methods.method import METHODS
from tests.parity import relative_error
from tests.parity_masked import config_of

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


def test_plain_dino_is_the_published_one():
    with np.load(DATA / "dino_step.npz") as archive:
        config = config_of(archive)
        backbone = {"image_size": config["image"]} | {k: config[k] for k in ("patch", "dim", "depth", "heads")}
        head = {"hidden": config["hidden"], "bottleneck": config["bottleneck"], "prototypes": config["out"]}
        step = PlainDINOStep(backbone | {"drop_path": 0.0}, head)
        step.student.load_state_dict(ungained(state(archive, "student")))
        step.teacher.load_state_dict(ungained(state(archive, "teacher")))
        for network, prefix in ((step.student, "student"), (step.teacher, "teacher")):
            give_gains(network.head.last_layer, torch.from_numpy(archive[f"{prefix}/head.last_layer.weight_g"]))
        step.centre = torch.from_numpy(archive["center_before"])
        crops = [torch.from_numpy(archive[f"crop{i}"]) for i in range(2 + config["locals"])]
        loss = step.loss(crops, float(archive["teacher_temp"]))
        loss.backward()
        assert relative_error(loss, archive["loss"]) < TOLERANCE
        assert relative_error(step.centre, archive["center_after"]) < TOLERANCE
        for name, golden in ungained(state(archive, "grad")).items():
            assert relative_error(step.student.get_parameter(name).grad, golden) < TOLERANCE, name


def ungained(tensors):
    """Without the gains of prototypes, which are 1 in the rendering."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("weight_g")}


def give_gains(layer, gains):
    """The archive's prototypes have gains."""
    layer.forward = lambda x: torch.nn.functional.linear(
        x, gains * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    )


def test_plain_data2vec_is_the_published_one():
    with np.load(DATA / "data2vec_step.npz") as archive:
        config = config_of(archive)
        sizes = {"image_size": config["image"]} | {k: config[k] for k in ("patch", "dim", "depth", "heads")}
        sizes |= {"layer_scale": config["layer_scale"], "drop_path": 0.0}
        step = PlainData2VecStep(sizes, config["target_layers"], config["l1_beta"])
        for network, prefix in ((step.network, "model"), (step.average, "model_ema")):
            golden = state(archive, prefix)
            network.load_state_dict({k: v for k, v in golden.items() if not k.endswith("position_index")})
        mask = torch.from_numpy(archive["bool_masked_pos"]).flatten(1)
        loss = step.loss(torch.from_numpy(archive["images"]), mask)
        loss.backward()
        assert relative_error(loss, archive["loss"]) < TOLERANCE
        for name, golden in state(archive, "grad").items():
            assert relative_error(step.network.get_parameter(name).grad, golden) < TOLERANCE, name


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_a_rendering_and_this_projects_step_are_one(name):
    """The same loss and the same gradient of the patch embedding, on the benchmark's own images and draws."""
    head = {"dino": {"hidden": 16, "bottleneck": 8, "prototypes": 32, "small_crops": 2}}
    head["data2vec"] = {"masked": 30, "layers": 1, "layer_scale": 0.5}
    widths = (32, 2, 2, 4.0, 16)
    case = Case(name, widths=widths, crop=64, patch=8, batch=2, batches=1, head=head[name] | {"drop_path": 0.0})
    ours, plain = (contender.fingerprint() for contender in make_contenders(case, ["fast", "plain"], ["truncate"]))
    assert plain == pytest.approx(ours, rel=1e-4)
    tokens, published, executed = work_of(case)
    assert tokens > 0
    assert 0.5 * published < executed < published


@pytest.mark.parametrize("name", METHODS)
def test_every_registered_method_has_work_and_a_step(name):
    case = Case(name, widths=(32, 6, 2, 4.0, 32), crop=224, patch=16, batch=2, batches=1, predictor_depth=1)
    assert min(work_of(case, "truncate")) > 0
    (contender,) = make_contenders(case, ["fast"], ["truncate"])
    assert contender.run(0).isfinite()
