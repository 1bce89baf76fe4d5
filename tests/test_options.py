"""I-JEPA's options that are not published: what each computes, what it costs, what does not go together."""

import pytest
import torch
import torch.nn.functional as F

from ijepa_fast import kernels
from ijepa_fast.config import ConfigError, Data, Mask, Model, load_config
from ijepa_fast.kernels.common import over_ranks
from ijepa_fast.kernels.sigreg import sigreg
from ijepa_fast.masks.packing import pack
from ijepa_fast.methods.ijepa import IJEPA, Options
from ijepa_fast.methods.method import Setup
from ijepa_fast.models import regulariser, target_norm
from ijepa_fast.models.projector import Projector
from ijepa_fast.models.regulariser import Regulariser
from ijepa_fast.models.target_norm import TargetNorm, sums_by_place
from ijepa_fast.models.vit import Encoder
from tests.small import BATCH, frozen, images_of, model_of, small_ijepa, teacher_of
from tests.steps import assert_graphs_hold, counted_work, loss_and_gradients, unpadded

# Norms of the targets


def plain_sums(features, draw):
    """What `sums_by_place` gives, prediction by prediction."""
    sums = torch.zeros(draw.patches, 2 * features.shape[1] + 1, dtype=torch.float64)
    for row in draw.prediction_rows.tolist():
        x, place = features[row].double(), int(draw.union_places[row])
        sums[place] += torch.cat([x, x.square(), torch.ones(1, dtype=torch.float64)])
    return sums


def test_statistics_are_those_of_all_predictions():
    draw = model_of().draw(BATCH, 0, 0)
    features = torch.randn(len(draw.union_index), 32)
    torch.testing.assert_close(sums_by_place(features, draw).double(), plain_sums(features, draw), rtol=1e-5, atol=1e-4)


def test_padding_of_the_union_is_no_target():
    """It differs from rank to rank, so that it must not count."""
    model = model_of()
    masks = model.sampler(BATCH, 0, 0, 0)
    plain, padded = pack(masks), pack(masks, padding=(4, 2))
    assert len(padded.union_index) > len(plain.union_index)
    features = torch.randn(BATCH * 64, 32)
    sums = [sums_by_place(features[draw.union_index.long()], draw) for draw in (plain, padded)]
    torch.testing.assert_close(*sums)


def test_running_statistics_fade_together():
    """After two steps: means of both batches, the first weighing `momentum` of what the second does."""
    norm, momentum = TargetNorm("position", 0.9), 0.9
    kept, expected = norm.fresh(64, 32), 0
    for step in range(2):
        draw = model_of().draw(BATCH, 0, step)
        features = torch.randn(len(draw.union_index), 32) * 3 + 1
        arguments = norm(features, draw, kept)
        expected = momentum * expected + (1 - momentum) * plain_sums(features, draw)
    seen = expected[:, -1] > 0.5  # five predictions
    assert seen.sum() > 30
    mean = expected[seen, :32] / expected[seen, -1:]
    variance = expected[seen, 32:64] / expected[seen, -1:] - mean.square()
    torch.testing.assert_close(arguments["table"][0, seen].double(), mean, rtol=1e-4, atol=1e-4)
    scale = (variance + target_norm.EPS).rsqrt()
    torch.testing.assert_close(arguments["table"][1, seen].double(), scale, rtol=1e-3, atol=1e-4)


def test_targets_that_are_places_alone_become_nothing():
    draw = model_of().draw(BATCH, 0, 0)
    features = torch.randn(64, 32)[draw.union_places.long()]
    norm = TargetNorm("position")
    table = norm(features, draw, norm.fresh(64, 32))["table"]
    places = draw.union_places[draw.prediction_rows.long()].long()
    assert ((features[draw.prediction_rows.long()] - table[0][places]).abs() < 1e-4).all()


@pytest.mark.parametrize("norm", ["position", "position_token", "batch", "none"])
def test_the_loss_is_of_such_targets(norm):
    model, images = model_of(target_norm=norm), images_of()
    draw = model.draw(BATCH, 0, 0)
    patches = model.patchify(images)
    with torch.no_grad():
        features = model.target_encoder.targets(patches, draw)
        predictions = model.predictor(model.encoder.context(patches, draw), draw)
    sums, places = plain_sums(features, draw), draw.union_places.long()
    if norm == "batch":
        sums, places = sums.sum(0, keepdim=True), torch.zeros_like(places)
    mean, square, count = sums[:, :32], sums[:, 32:64], sums[:, -1:].clamp_min(1)
    targets = features.double()
    if norm != "none":
        spread = (square / count - (mean / count).square() + target_norm.EPS).sqrt()
        targets = (targets - (mean / count)[places]) / spread[places]
    if norm == "position_token":
        targets = F.layer_norm(targets, (32,))
    expected = (predictions - targets[draw.prediction_rows.long()]).square().mean()
    loss, terms = model(images, draw)
    assert terms == {}
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)


def test_two_ranks_have_the_statistics_of_the_whole(monkeypatch):
    model = model_of()
    masks, features = model.sampler(BATCH, 0, 0, 0), torch.randn(BATCH * 64, 32)
    parts = [pack(masks, part=slice(i, i + 3)) for i in (0, 3)]
    rows = [features[i * 64 : (i + 3) * 64][part.union_index.long()] for i, part in zip((0, 3), parts)]
    whole = pack(masks)
    expected = sums_by_place(features[whole.union_index.long()], whole)
    own = [sums_by_place(x, draw) for x, draw in zip(rows, parts)]
    torch.testing.assert_close(own[0] + own[1], expected)


# Regularisers


def test_gathered_and_summed_over_one_rank_are_the_same():
    x = torch.randn(3, 4)
    assert over_ranks.summed(x) is x
    assert over_ranks.gathered(x) is x


def test_pooling_is_the_mean_of_each_context():
    model = small_ijepa(options=Options(regulariser="vicreg"))
    draw = model.draw(BATCH, 0, 0)
    context = torch.randn(len(draw.context_index), 32)
    means = [part.mean(0) for part in context.split(draw.context_cu_seqlens.diff().tolist())][: draw.sequences]
    torch.testing.assert_close(regulariser.pooled_context(context, draw), torch.stack(means))
    features = torch.randn(len(draw.union_index), 32)
    rows = F.layer_norm(features, (32,))[draw.prediction_rows.long()].view(draw.targets, BATCH, -1, 32)
    torch.testing.assert_close(regulariser.pooled_targets(features, draw), rows.transpose(0, 1).flatten(1, 2).mean(1))


def test_what_the_context_sees_is_no_target_of_the_pooled_features():
    plain, model = (small_ijepa(options=Options(regulariser="vicreg", visible_weight=w)) for w in (0, 0.5))
    draw, seen = plain.draw(BATCH, 0, 0), model.draw(BATCH, 0, 0)
    features = torch.randn(BATCH, 64, 32)
    rows = [features.flatten(0, 1)[of.union_index.long()] for of in (draw, seen)]
    assert len(rows[1]) > len(rows[0])
    pooled = [regulariser.pooled_targets(x, of) for x, of in zip(rows, (draw, seen))]
    torch.testing.assert_close(pooled[0], pooled[1])


def test_mask_sets_are_views_of_the_images_and_not_more_of_them():
    """SIGReg grows with the number of its samples; its weight means the same with more contexts of each image."""
    model = small_ijepa(options=Options(regulariser="sigreg", mask_sets=2))
    draw = model.draw(BATCH, 0, 0)
    context, term = torch.randn(len(draw.context_index), 32), Regulariser("sigreg", weight=1.0)
    total, _ = term(context, torch.empty(0), draw, None)
    pooled = regulariser.pooled_context(context, draw)
    of_each = [sigreg(part, draw.directions) for part in pooled.split(BATCH)]
    assert len(of_each) == draw.sequences // BATCH > 1
    torch.testing.assert_close(total, torch.stack(of_each).mean())


@pytest.mark.parametrize("kind", ["vicreg", "sigreg"])
@pytest.mark.parametrize("projector", [[], [24, 16]])
def test_the_weighted_term_is_added_and_logged(kind, projector):
    model, images = small_ijepa(options=Options(regulariser=kind, projector=projector)), images_of()
    draw = model.draw(BATCH, 0, 0)
    loss, terms = model(images, draw)
    plain = small_ijepa()
    plain.encoder.load_state_dict(model.encoder.state_dict())
    plain.predictor.load_state_dict(model.predictor.state_dict())
    plain.target_encoder.load_state_dict(model.target_encoder.state_dict())
    torch.testing.assert_close(terms["prediction"], plain(images, draw)[0].detach())
    weighted = terms["sigreg"] if kind == "sigreg" else regulariser.weighted(terms)
    torch.testing.assert_close(loss, terms["prediction"] + regulariser.WEIGHTS[kind] * weighted)
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in plain.parameters()) or not projector


@pytest.mark.parametrize("kind", ["vicreg", "sigreg"])
def test_it_drives_equal_images_apart(kind):
    """Descent on the term alone raises the rank of pooled features that were nearly one."""
    x = (torch.randn(32, 8) * 0.01 + torch.randn(8)).requires_grad_()
    directions = F.normalize(torch.randn(8, 64), dim=0)
    optimizer = torch.optim.Adam([x], lr=0.02)
    before = torch.linalg.eigvalsh(x.detach().T.cov()).min()
    for _ in range(400):
        optimizer.zero_grad()
        term = (
            kernels.sigreg.sigreg(x, directions)
            if kind == "sigreg"
            else regulariser.weighted(regulariser.vicreg(x, x.detach()))
        )
        term.backward()
        optimizer.step()
    assert torch.linalg.eigvalsh(x.detach().T.cov()).min() > 30 * before


def test_batch_norm_is_torchs():
    projector, x = Projector([6, 5, 4]), torch.randn(9, 6)
    h = F.relu(F.batch_norm(projector.layers[0](x), None, None, training=True))
    torch.testing.assert_close(projector(x), projector.layers[1](h))


# Targets of several blocks; of teachers, see test_teacher.py


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("class_token", [False, True])
def test_deep_targets_are_the_mean_of_normalised_outputs(layers, class_token):
    model = model_of()
    encoder = Encoder(64, 8, 32, 4, 2, class_token=class_token)
    patches, draw = model.patchify(images_of()), model.draw(BATCH, 0, 0)
    outputs = encoder.layers(patches, BATCH, layers)
    mean = torch.stack([F.layer_norm(output, (32,)) for output in outputs]).mean(0)
    found = encoder.targets(patches, draw, layers=layers)
    torch.testing.assert_close(found, mean[draw.union_index.long()], rtol=1e-4, atol=1e-5)


def test_no_number_of_target_layers_is_all_blocks():
    all_, depth = model_of(target_layers=0), len(model_of().encoder.blocks)
    assert all_.target_layers == depth > 1
    patches, draw = all_.patchify(images_of()), all_.draw(BATCH, 0, 0)
    expected = all_.encoder.targets(patches, draw, layers=depth)
    torch.testing.assert_close(all_.targets(patches, draw), expected.detach(), rtol=1e-5, atol=1e-6)


# Mask sets


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("policy", ["full", "truncate"])
def test_mask_sets_are_the_mean_over_as_many_draws(policy, padding):
    """Loss and gradient of three sets are the mean of those of three draws for the same images."""
    mask = Mask(min_keep=3, policy=policy, padding=padding)
    sizes = Model(dim=32, depth=2, heads=2, patch=8, mlp_ratio=4.0, predictor_dim=16, predictor_depth=2)
    data = Data(source="synthetic", crop=64)
    model = IJEPA(Setup(sizes, data, mask, Options(mask_sets=3)))
    images, draw = images_of(), model.draw(BATCH, 0, 5)
    whole = loss_and_gradients(model, images, draw)
    assert draw.images == BATCH
    assert draw.sequences == 3 * BATCH
    each = []
    for number in range(3):
        single = pack(model.sampler(BATCH, 0, 5, number * BATCH), policy, padding=padding)
        each.append(loss_and_gradients(model, images, single))
    for value, parts in zip(whole, zip(*each)):
        torch.testing.assert_close(value, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-6)


def test_mask_sets_gain_predictions_per_work():
    """The target encoder's share is spread: at H/14 1.29 times as many a FLOP with two sets, 1.59 with four."""
    gains = []
    for sets in (1, 2, 4):
        with torch.device("meta"):
            config = load_config("in1k_vith14_ep300", [])
            model = IJEPA(Setup(config.model, config.data, config.mask, Options(mask_sets=sets)))
        draw = model.draw(16, 0, 0)
        gains.append(draw.prediction_rows.numel() / model.work(draw).total)
    assert gains[1] / gains[0] == pytest.approx(1.29, abs=0.03)
    assert gains[2] / gains[0] == pytest.approx(1.59, abs=0.05)


def test_a_rank_draws_its_part_of_every_set():
    model = model_of(mask_sets=2)
    whole = model.draw(BATCH, 0, 0, 0, BATCH)
    parts = [model.draw(3, 0, 0, first, BATCH) for first in (0, 3)]
    for number in range(2):
        for rank, part in enumerate(parts):
            own = part.target_index.view(part.targets, 2, 3, -1)[:, number] % 64
            expected = whole.target_index.view(whole.targets, 2, BATCH, -1)[:, number, 3 * rank : 3 * rank + 3] % 64
            assert torch.equal(own, expected)


# Work, start, mistakes


CHOICES = [
    {"regulariser": "vicreg"},
    {"regulariser": "sigreg", "projector": [24, 16], "slices": 8},
    {"target_norm": "position", "mask_sets": 2},
    {"target_layers": 2},
]


@pytest.mark.parametrize("options", [*CHOICES, {"teacher": "frozen"}], ids=str)
def test_work_is_what_torch_counts(options):
    model = frozen(teacher_of(class_token=True)) if "teacher" in options else model_of(**options)
    draw, images = unpadded(model, 3), images_of(3)
    assert counted_work(model, images, draw) == pytest.approx(model.work(draw).total, rel=0.01)


def test_xavier_is_maes_start():
    model = model_of(init="xavier")
    for name in (
        "encoder.patch_embed.proj.weight",
        "encoder.blocks.1.mlp.fc1.weight",
        "predictor.predictor_proj.weight",
    ):
        weight = model.get_parameter(name).detach().flatten(1)
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.9 * bound < weight.abs().max() <= bound
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["options={target_norm: places}"], "objective.options.target_norm: expected one of token, position"),
        (["options={target_layers: 99}"], "objective.options.target_layers=99: expected at most model.depth"),
        (["options={target_layers: 2, target: pixels}"], "target_layers=2: there are no blocks behind target=pixels"),
        (
            ["options={visible_weight: 0.5, target: pixels}"],
            "visible_weight=0.5: the context sees these pixels",
        ),
        (["options={slices: 16}"], "slices=16: they are the directions of regulariser=sigreg"),
        (["options={target_momentum: 0.9}"], "target_momentum=0.9: it is of target_norm=position"),
        (["options={teacher: frozen}"], "objective.options.teacher_from: expected the folder of a teacher"),
        (["options={teacher_from: here}"], "objective.options.teacher_from=here: the teacher is the average"),
        (
            ["options={teacher: random, teacher_from: here}"],
            "the teacher is the encoder as it begins; set teacher=froz",
        ),
        (["options={teacher: random, target: pixels}"], "teacher=random: there is no teacher of target=pixels"),
        (["options={teacher: frozen, teacher_from: a, target: pixels}"], "teacher=frozen: there is no teacher"),
        (["options={regulariser: vicreg, target: pixels}"], "regulariser=vicreg: it compares with target features"),
        (["options={projector: [8]}"], "objective.options.projector: it leads to a regulariser"),
        (["options={regulariser_weight: 1.0}"], "objective.options.regulariser_weight=1.0: there is no regulariser"),
        (["options={visible_epochs: 2}"], "visible_epochs=2.0: it leads to visible_weight, which is 0"),
        (["options={mask_sets: 0}"], "objective.options.mask_sets: expected at least 1"),
        (
            ["options={regulariser: sigreg}", "batch_size=4"],
            "sigreg takes statistics over a batch and wants at least 8",
        ),
        (["options={regulariser: sigreg}", "engine.accumulation=16"], "at least 8 images of a micro-batch"),
        (
            ["options={regulariser: vicreg}", "batch_size=1"],
            "vicreg takes statistics over a batch and wants at least 2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_does_not_go_together_is_one_sentence(overrides, words):
    pytest.importorskip("deepspeed")
    from ijepa_fast.run.build import build_method

    overrides = [f"objective.{o}" if o.startswith("options") else o for o in overrides]
    with pytest.raises(ConfigError) as error:
        build_method(load_config("quickstart", overrides))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: Encoder(64, 16, 32, 2, 2), "expected 8 x 8 patches of 8 pixels, as data.crop and model.patch say"),
        (lambda: Encoder(32, 8, 32, 2, 2), "got 4 x 4 patches of 8 pixels"),
        (lambda: Encoder(64, 8, 48, 2, 2), "expected features of width model.dim=32, got 48"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_sentence(change, words):
    with pytest.raises(ConfigError, match=r"objective.options.teacher_from: somewhere") as error:
        frozen(change())
    assert words in str(error.value)


def test_a_teacher_of_other_images_is_one_sentence():
    model = model_of(teacher="frozen", teacher_from="somewhere")
    with pytest.raises(ConfigError, match=r"expected data\.mean=\[0\.5, 0\.5, 0\.5\].*got \[0\.1"):
        model.give("teacher", teacher_of(), (0.1, 0.1, 0.1), model.setup.data.std)


def test_fp8_of_a_teacher_with_a_class_token_is_refused():
    with pytest.raises(ConfigError, match=r"engine.target_precision=fp8: the frozen teacher has a class token"):
        frozen(teacher_of(class_token=True)).use_fp8()


@pytest.mark.parametrize(
    "options",
    [
        {"regulariser": "vicreg", "mask_sets": 2},
        {"regulariser": "sigreg", "projector": [24, 16], "target_layers": 2},
        {"target_norm": "batch", "teacher": "frozen"},
    ],
    ids=str,
)
def test_graphs_hold_what_does_not_move(ops_as_on_a_gpu, options):
    """Captured and replayed, emulated on a CPU, against launched: loss and every gradient."""
    chosen = {name: value for name, value in options.items() if name != "teacher"}
    model, eager = (
        frozen(teacher_of(class_token=True), **chosen) if "teacher" in options else model_of(**options)
        for _ in range(2)
    )
    eager.load_state_dict(model.state_dict())
    if model.frozen:
        eager.target_encoder.load_state_dict(model.target_encoder.state_dict())
    assert_graphs_hold(model, eager, BATCH, images_of)


def test_statistics_that_move_want_no_graphs():
    assert "graphs" not in model_of(target_norm="position").capabilities
    assert "graphs" in model_of(target_norm="batch").capabilities
    assert "graphs" in IJEPA.capabilities
