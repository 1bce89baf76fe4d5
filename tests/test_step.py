"""The step as a whole: the ladder changes no result, blocks compile once, and nothing in it waits for the device."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ijepa_fast.masks import make_sampler
from ijepa_fast.models.predictor import Predictor
from ijepa_fast.models.vit import Encoder, compile_blocks
from ijepa_fast.objective import IJEPA
from ijepa_fast.optim import AdamWEMA, parameter_groups, tie_encoders
from ijepa_fast.packing import climb, pack, rung

SAMPLER = make_sampler("multiblock", (8, 8), min_keep=3)


def tiny(depth=2, predictor_depth=2):
    torch.manual_seed(0)
    encoder = Encoder(64, 8, 32, depth, 2)
    return IJEPA(encoder, Predictor(encoder.grid, 32, 16, predictor_depth, 2), mean=(0.5,) * 3, std=(0.25,) * 3)


def images_of(count):
    return torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8)


def loss_and_gradients(model, images, packed):
    model.zero_grad()
    loss = model(images, packed)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_rungs_waste_under_one_percent_and_are_few():
    rungs = {rung(n) for n in range(1, 65536)}
    assert all(n <= rung(n) < n * (1 + 1 / 127) for n in range(1, 65536))
    assert all(rung(n) == n for n in rungs)
    assert len([n for n in rungs if 4096 <= n < 8192]) == 128


@pytest.mark.parametrize(("tokens", "longest"), [(1000, 7), (1000, 900), (256, 9), (257, 1)])
def test_climb_adds_sequences_none_too_long(tokens, longest):
    cu_seqlens = torch.tensor([0, tokens - 1, tokens], dtype=torch.int32)
    ends, missing = climb(cu_seqlens, tokens, longest)
    assert ends.dtype == torch.int32
    assert torch.equal(ends[:3], cu_seqlens)
    assert ends[-1] == tokens + missing == rung(tokens)
    assert ((ends[2:].diff() > 0) & (ends[2:].diff() <= longest)).all()


@pytest.mark.parametrize("policy", ["full", "truncate"])
def test_the_ladder_changes_no_loss_and_no_gradient(policy):
    model = tiny().double()
    model.target_encoder.double()
    padded = 0
    for step in range(3):
        images, masks = images_of(43), SAMPLER(43, 0, step, 0)
        plain = loss_and_gradients(model, images, pack(masks, policy))
        packed = pack(masks, policy, ladder=True)
        padded += rung(packed.context_index.numel()) > packed.context_index.numel()
        for a, b in zip(plain, loss_and_gradients(model, images, packed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert padded


def test_the_ladder_makes_sizes_come_again():
    """Sizes (T, S) of 60 batches: nearly all differ, and few do on the ladder."""
    plain, padded = set(), set()
    for step in range(60):
        packed = pack(SAMPLER(256, 0, step, 0))
        sizes = packed.context_index.numel(), int(packed.predictor_cu_seqlens[-1])
        plain.add(sizes)
        padded.add(tuple(map(rung, sizes)))
    assert len(plain) > 50
    assert len(padded) < 40


@pytest.mark.slow
def test_blocks_compile_once_for_all_token_counts_and_depths(triton_everywhere):
    """Eight kinds of block, whatever the depth; other token counts compile nothing, and results stay as they were."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model, eager = (tiny(depth=3, predictor_depth=3).to(triton_everywhere) for _ in range(2))
    for either in (model, eager):
        either.target_encoder.to(triton_everywhere)
    compile_blocks(model.encoder, model.predictor, model.target_encoder, backend=counter, fullgraph=True)
    counts = []
    for step in range(3):
        images = images_of(2).to(triton_everywhere)
        packed = pack(SAMPLER(2, 0, step, 0), ladder=True).to(triton_everywhere)
        before = counter.frame_count
        found = loss_and_gradients(model, images, packed)
        counts.append(counter.frame_count - before)
        for a, b in zip(found, loss_and_gradients(eager, images, packed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert counts[0] <= 9  # one kind may be traced twice: an argument as a symbol, then as the constant it is
    assert counts[1:] == [0, 0]


@pytest.mark.parametrize("policy", ["full", "budget"])
@pytest.mark.parametrize("ladder", [False, True])
def test_no_operation_of_the_step_reads_the_device(triton_everywhere, monkeypatch, policy, ladder):
    """On fake tensors, which have shapes and no values, any .item(), .tolist() or data-dependent size is an error.

    So the step can be captured as a CUDA graph where shapes are static. The kernels' path is taken; what is switched
    off is what the CPU alone checks, the order of cu_seqlens.
    """
    from ijepa_fast.kernels.predictor_tokens import ops as predictor_ops
    from ijepa_fast.kernels.varlen_attention import ops as attention_ops

    for module in (predictor_ops, attention_ops):
        monkeypatch.setattr(module, "check_sequences", lambda *arguments: None)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # reads values, and is no step
    packed = pack(SAMPLER(4, 0, 0, 0), policy, budget=12 if policy == "budget" else None, ladder=ladder)
    with FakeTensorMode() as mode:
        model = tiny()
        model._target_encoder = (tiny().encoder.requires_grad_(False),)  # a deep copy would have a fake mode of its own
        loss = model(images_of(4), packed._map(mode.from_tensor))
        loss.backward()
        assert loss.shape == ()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_the_check_above_would_find_a_read():
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        torch.ones(3).sum().item()


def test_an_optimiser_step_follows_the_ladder_too():
    """Three steps with and without it end at the same weights and averages, in fp32."""
    ends = []
    for ladder in (False, True):
        model = tiny()
        optimizer = AdamWEMA(parameter_groups(model.encoder, [model.predictor]))
        tie_encoders(optimizer, model.encoder, model.target_encoder)
        for step in range(3):
            torch.manual_seed(step)
            model(images_of(43), pack(SAMPLER(43, 0, step, 0), ladder=ladder)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([*model.parameters(), *model.target_encoder.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
