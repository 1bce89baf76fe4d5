"""MSN: its batch norm and Sinkhorn against others', its draws, what it leaves out, and what is not clipped."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ijepa_fast.config import ConfigError, load_config
from ijepa_fast.engine.clipping import ClipTogether
from ijepa_fast.masks.anchors import AnchorSampler, lay_out
from ijepa_fast.methods import msn
from ijepa_fast.models.heads import BatchNorm, NormedHead, sinkhorn
from tests.launch import ROOT, TINY, on_two_ranks
from tests.small import loss_of, setup_of

SMALL = {"small_anchors": 2, "patch_drop": 0.3, "hidden": 16, "out": 8, "prototypes": 12}
WITHOUT_GRADIENT = {"encoder.norm.bias", "head.fc1.bias", "head.fc2.bias"}  # which batch norm takes out again


def small_msn(**options):
    torch.manual_seed(0)
    return msn.MSN(setup_of(32, 8, options=SMALL | options))


def random_views(method, images=3):
    return [torch.randint(256, (images, view.crop, view.crop, 3), dtype=torch.uint8) for view in method.views()]


def test_batch_norm_is_torchs_group_by_group():
    torch.manual_seed(0)
    ours, x = BatchNorm(5), 3 + 2 * torch.randn(11, 5)
    torch.nn.init.normal_(ours.weight)
    torch.nn.init.normal_(ours.bias)
    torchs = torch.nn.BatchNorm1d(5)
    torchs.load_state_dict(ours.state_dict(), strict=False)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, moments = ours(a, [7, 4])
    expected = torch.cat([torchs(b[:7]), torchs(b[7:])])
    torch.testing.assert_close(found, expected)
    mean, variance = torch.zeros(5), torch.ones(5)
    for group in moments:
        mean.lerp_(group[0], 0.1)
        variance.lerp_(group[1], 0.1)
    torch.testing.assert_close((mean, variance), (torchs.running_mean, torchs.running_var))
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, [a, *ours.parameters()], upstream),
        torch.autograd.grad(expected, [b, *torchs.parameters()], upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_batch_norm_of_one_row_is_refused():
    with pytest.raises(ValueError, match="at least 2 rows"):
        BatchNorm(3)(torch.zeros(3, 3), [2, 1])


def test_sinkhorn_uses_prototypes_equally():
    rows = torch.rand(40, 6).softmax(1)
    found = sinkhorn(rows, 50)
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    torch.testing.assert_close(found.sum(0), torch.full((6,), 40 / 6))
    assert (sinkhorn(rows, 1).sum(0) - 40 / 6).abs().max() > 1e-4


def _share(rank, folder):
    """One of two ranks: half of the rows through head and Sinkhorn, and the gradients of its half of the loss."""
    head, x, method = _head_and_rows()
    x = x[rank * 4 : rank * 4 + 4].requires_grad_()
    z, moments = head(x, [4])
    loss, _ = method.loss_of(z, method.assignments(z.detach()))
    loss.backward()
    torch.save((z.detach(), loss.detach(), x.grad, moments["bn1"][0]), folder / f"{rank}.pt")


def _head_and_rows():
    method = small_msn(entropy=0.3)
    generator = torch.Generator().manual_seed(1)
    head = NormedHead(6, 10, 8)
    for param in head.parameters():
        torch.nn.init.normal_(param, generator=generator)
    return head, torch.randn(8, 6, generator=generator), method


@pytest.mark.multi_rank
def test_two_ranks_are_one_batch(tmp_path):
    """Batch norm, Sinkhorn and the mean assignment are those of all ranks; the loss of both is the mean of theirs."""
    parts = on_two_ranks(_share, tmp_path)
    head, x, method = _head_and_rows()
    x.requires_grad_()
    z, moments = head(x, [8])
    loss, _ = method.loss_of(z, method.assignments(z.detach()))
    loss.backward()
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), z.detach())
    torch.testing.assert_close((parts[0][1] + parts[1][1]) / 2, loss.detach())
    torch.testing.assert_close(torch.cat([part[2] for part in parts]) / 2, x.grad, rtol=1e-4, atol=1e-6)
    for part in parts:
        torch.testing.assert_close(part[3], moments["bn1"][0])


def test_kept_patches_are_one_draw_of_a_step():
    """Whatever the images' places; dropped branches are by image."""
    sampler = AnchorSampler(grid=(4, 4), small_grid=(2, 2), large=1, small=2, dropped=0.3, depth=2)
    whole, part = sampler(5, seed=1, step=2), sampler(2, seed=1, step=2, first=3)
    assert torch.equal(whole.kept, part.kept)
    assert len(whole.kept) == len(whole.kept.unique()) == 11
    assert not torch.equal(whole.kept, sampler(5, seed=1, step=3).kept)
    by_view = whole.chance.view(2, 2, 3, 5)
    assert torch.equal(by_view[..., 3:], part.chance.view(2, 2, 3, 2))
    assert whole.tokens == 5 * ((1 + 11) + 2 * (1 + 4) + 17)
    assert AnchorSampler((4, 4), (2, 2), 1, 2, 0.3)(5, 1, 2).chance is None


def test_dropped_patches_are_not_looked_at():
    """And kept ones have the tokens that they have in the whole view, whatever their order."""
    method = small_msn()
    draw, views = method.draw(3, 0, 0), random_views(method)
    patches = method.patchify(views[1])
    whole = method.encoder.embed(patches).view(3, 17, -1)
    kept = torch.tensor([5, 0, 11])
    found = method.encoder.embed(patches, kept=kept).view(3, 4, -1)
    torch.testing.assert_close(found, whole[:, torch.tensor([0, 6, 1, 12])])
    small = method.patchify(torch.cat(views[2:]))
    dropped = torch.ones(16, dtype=torch.bool)
    dropped[draw.kept] = False
    noisy = torch.where(dropped.repeat(3)[:, None], torch.randn_like(patches), patches)
    before, after = (method.anchor_embeddings(x, small, draw) for x in (patches, noisy))
    assert torch.equal(before, after)
    noisy[draw.kept[0]] += 1
    assert not torch.equal(before, method.anchor_embeddings(noisy, small, draw))


def test_the_loss_is_the_published_formula():
    method = small_msn(anchors=2, small_anchors=3, me_max=0.7, entropy=0.2)
    anchors, embedding = torch.randn(5 * 4, 8), torch.randn(4, 8)
    weight = F.normalize(method.prototypes.weight.detach())
    p = (F.normalize(anchors) @ weight.t() / 0.1).softmax(1)
    targets = (F.normalize(embedding) @ weight.t() / 0.1).softmax(1) ** 4
    targets = sinkhorn(targets / targets.sum(1, keepdim=True), 3)
    torch.testing.assert_close(method.assignments(embedding), targets)
    crossed = -(targets.repeat(5, 1) * p.log()).sum(1).mean()
    mean = p.mean(0)
    expected = crossed + 0.7 * (np.log(12) + (mean * mean.log()).sum()) - 0.2 * (p * p.log()).sum(1).mean()
    loss, terms = method.loss_of(anchors, targets)
    torch.testing.assert_close(loss, expected.to(loss.dtype))
    assert set(terms) == {"cross_entropy", "me_max", "entropy"}
    torch.testing.assert_close(terms["cross_entropy"], crossed)


@pytest.mark.parametrize("small_anchors", [0, 2])
def test_msn_learns_from_uint8_views(small_anchors):
    method = small_msn(small_anchors=small_anchors, drop_path=0.2)
    loss, _ = method(random_views(method), method.draw(3, 0, 0))
    loss.backward()
    missing = {name for name, p in method.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6}
    assert missing <= WITHOUT_GRADIENT
    assert all((value != (name.endswith("variance"))).any() for name, value in method.carried.items())


def test_views_are_as_published():
    views = msn.MSN(setup_of(224, 16, heads=2, options={"hidden": 8, "out": 8, "prototypes": 8})).views()
    assert [view.crop for view in views] == [224, 224] + [96] * 10
    assert views[0].strengths == (0.4, 0.4, 0.4, 0.1)
    assert (views[0].jitter, views[0].grey, views[0].blur, views[0].solarise) == (0.8, 0.2, 0.5, 0.0)
    assert views[0].sigma == views[2].sigma == (0.1, 2.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["objective.options.small_crop=40"], "objective.options.small_crop=40: expected .* at most data.crop=32"),
        (["objective.options.small_crop=12"], "objective.options.small_crop=12: expected a multiple of model.patch=8"),
        (["objective.options.patch_drop=0.98"], "objective.options.patch_drop=0.98: expected a share that leaves"),
        (["batch_size=1"], "batch_size: the head's batch norm needs at least 2 images"),
        (["batch_size=4", "engine.accumulation=4"], "lower engine.accumulation"),
        (["objective.options.prototypes=1"], "objective.options.prototypes: expected at least 2"),
    ],
)
def test_what_cannot_be_is_named(options, words):
    from ijepa_fast.run.build import build_method

    with pytest.raises(ConfigError, match=words):
        build_method(load_config(ROOT / "configs" / "msn_cifar10.yaml", options))


def test_all_gradients_are_clipped_together():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,))]
    for param in params:
        param.grad = torch.randn_like(param)
    expected = copy.deepcopy(params)
    for one, param in zip(expected, params, strict=True):
        one.grad = param.grad.clone()
    clip = ClipTogether(True, 0.5, lambda: [p.grad for p in params])
    for _ in range(2):  # the second time nothing is left to clip
        norm = torch.nn.utils.clip_grad_norm_(expected, 0.5)
        clip.begin()
        for param in params:  # one after the other, as ZeRO does
            clip([param])
        for param, one in zip(params, expected, strict=True):
            torch.testing.assert_close(param.grad, one.grad)
    assert norm <= 0.5 + 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_step_clips_all_but_the_prototypes(zero, precision):
    """A step of the engine is a plain one. A large eps shows what gradients are scaled by."""
    pytest.importorskip("deepspeed")
    from ijepa_fast.engine.engine import choose_device, start
    from ijepa_fast.run.build import build_engine, build_method

    tiny = [option for option in TINY if not option.startswith("mask.")]
    options = [*tiny, "model.patch=8", f"engine.zero={zero}", f"engine.precision={precision}", "engine.device=cpu"]
    options += ["optim.eps=1e-3", "optim.clip=0.05", f"objective.options={SMALL}".replace("'", "")]
    config = load_config(ROOT / "configs" / "msn_cifar10.yaml", options)
    device, threads = choose_device("cpu"), torch.get_num_threads()
    start(device, config.engine.timeout)
    torch.set_num_threads(threads)
    method = build_method(config)
    images, draw = random_views(method, 8), method.draw(8, 0, 0)
    plain = copy.deepcopy(method)
    if precision == "bf16":
        for network in plain.networks.values():
            network.bfloat16()
    loss_of(plain, images, draw).backward()
    named = dict(plain.named_parameters())
    # DeepSpeed's masters begin as what the networks compute with.
    wanted = {name: torch.nn.Parameter(p.detach().float().clone()) for name, p in plain.named_parameters()}
    for name, param in named.items():
        wanted[name].grad = param.grad.float()
    others = [wanted[name] for name in wanted if name != "prototypes.weight"]
    assert torch.nn.utils.clip_grad_norm_(others, 0.05) > 0.1
    torch.optim.AdamW(wanted.values(), lr=0.1, eps=1e-3, weight_decay=0.0).step()

    engine = build_engine(config, method, device, 1)
    engine.backward(images, draw)
    engine.step(0.1, 0.0, 0.9)
    masters = {f.name: p.master for p in engine.layout.partitions for f in p.fragments}
    offsets = {f.name: (f.offset, f.stop - f.start) for p in engine.layout.partitions for f in p.fragments}
    for name, param in wanted.items():
        begin, length = offsets[name]
        found = masters[name].detach().view(-1)[begin : begin + length].view_as(param)
        torch.testing.assert_close(
            found, param.detach(), rtol=1e-4, atol=2e-4 if precision == "bf16" else 1e-5, msg=name
        )


def test_places_of_kept_patches_may_be_in_any_order():
    method = small_msn()
    views = random_views(method)
    draw = method.draw(3, 0, 0)
    turned = lay_out(3, draw.kept.numpy()[::-1].copy(), draw.large, draw.small, draw.grid, draw.small_grid)
    large, small = method.patchify(views[1]), method.patchify(torch.cat(views[2:]))
    torch.testing.assert_close(*(method.anchor_embeddings(large, small, d) for d in (draw, turned)))
