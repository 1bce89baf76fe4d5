"""The step as a whole: padding changes no result, blocks compile once, and nothing in it waits for the device."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ijepa_fast.engine.graphs import CUDARecorder, Graphs
from ijepa_fast.kernels.common import dispatch
from ijepa_fast.masks.packing import GRAPH_BITS, LEAST_STEP, LENGTHS, bucket_of, pack
from ijepa_fast.masks.samplers import make_sampler
from ijepa_fast.models.blocks import compile_blocks
from tests.small import loss_of, optimizer_of, small_ijepa, small_mae, to

SAMPLER = make_sampler("multiblock", (8, 8), min_keep=3)


def images_of(count):
    return torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8)


def loss_and_gradients(model, images, packed):
    model.zero_grad()
    loss = loss_of(model, images, packed)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_buckets_waste_under_one_percent_and_are_few():
    buckets = {bucket_of(n) for n in range(1, 65536)}
    assert all(n <= bucket_of(n) < max(n * (1 + 1 / 127), n + LEAST_STEP) for n in range(1, 65536))
    assert all(bucket_of(n) == n for n in buckets)
    assert len([n for n in buckets if 4096 <= n < 8192]) == 128


@pytest.mark.parametrize("policy", ["full", "truncate", "budget"])
def test_padding_adds_sequences_of_their_own(policy):
    for step in range(4):
        masks, options = SAMPLER(43, 0, step, 0), {"policy": policy, "budget": 12 if policy == "budget" else None}
        plain, padded = pack(masks, **options), pack(masks, **options, padding=True)
        tokens, sequences = plain.context_tokens, plain.sequences
        assert padded.context_tokens == tokens == plain.context_index.numel()
        assert padded.context_index.numel() == (tokens if policy == "budget" else bucket_of(tokens))
        assert torch.equal(padded.context_index[:tokens], plain.context_index)
        assert torch.equal(padded.context_lengths, plain.context_lengths)
        blocks = padded.predictor_cu_seqlens.diff().view(padded.targets, -1)
        assert torch.equal(blocks[:, :sequences].flatten(), plain.predictor_cu_seqlens.diff())
        assert (blocks[:, sequences:] == padded.context_cu_seqlens.diff()[sequences:]).all()
        assert padded.context_cu_seqlens.diff().max() <= padded.context_max_seqlen
        assert padded.predictor_cu_seqlens.diff().max() <= padded.predictor_max_seqlen
        assert padded.union_cu_seqlens.diff().max() <= padded.union_max_seqlen
        assert padded.context_max_seqlen in (LENGTHS, padded.patches)
        assert torch.equal(padded.union_index, padded.union_index.unique())
        assert padded.union_cu_seqlens[-1] == padded.union_index.numel()
        rows = padded.prediction_rows.view(padded.targets, padded.contexts, padded.images, -1)
        assert torch.equal(padded.union_index[rows], padded.target_index[:, None].expand_as(rows))
        queries = padded.predictor_query_cu_seqlens.diff().view(padded.targets, -1)
        assert (queries[:, :sequences] == padded.target_size).all()
        assert not queries[:, sequences:].any()
        assert torch.equal(padded.context_places, padded.context_index % padded.patches)
        assert torch.equal(padded.union_places, padded.union_index % padded.patches)
        assert torch.equal(padded.union_lengths, padded.union_cu_seqlens.diff())
        assert padded.tokens == plain.tokens


@pytest.mark.parametrize("policy", ["full", "truncate"])
def test_padding_changes_no_loss_and_no_gradient(policy):
    model = to(small_ijepa(), torch.double)
    padded = 0
    for step in range(3):
        images, masks = images_of(43), SAMPLER(43, 0, step, 0)
        plain = loss_and_gradients(model, images, pack(masks, policy))
        packed = pack(masks, policy, padding=True)
        padded += packed.context_index.numel() > packed.context_tokens
        for a, b in zip(plain, loss_and_gradients(model, images, packed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert padded


def test_padding_makes_shapes_come_again():
    """All that kernels are launched with, of 60 batches: it never comes again, and padded it mostly does."""
    plain, padded = set(), set()
    for step in range(60):
        masks = SAMPLER(256, 0, step, 0)
        plain.add(pack(masks).shape)
        padded.add(pack(masks, padding=True).shape)
    assert len(plain) > 55
    assert len(padded) < 30


@pytest.mark.slow
def test_blocks_compile_once_for_all_token_counts_and_depths(triton_everywhere):
    """Eight kinds of block, whatever the depth; other token counts compile nothing, and results stay as they were."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model, eager = (to(small_ijepa(depth=3, predictor_depth=3), triton_everywhere) for _ in range(2))
    compile_blocks(*model.networks.values(), backend=counter, fullgraph=True)
    counts = []
    for step in range(3):
        images = images_of(2).to(triton_everywhere)
        packed = pack(SAMPLER(2, 0, step, 0), padding=True).to(triton_everywhere)
        before = counter.frame_count
        found = loss_and_gradients(model, images, packed)
        counts.append(counter.frame_count - before)
        for a, b in zip(found, loss_and_gradients(eager, images, packed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert counts[0] <= 9  # one kind may be traced twice: an argument as a symbol, then as the constant it is
    assert counts[1:] == [0, 0]


@pytest.mark.slow
@pytest.mark.thorough
def test_fp8_blocks_compile_once_where_their_blocks_are_compiled(triton_everywhere):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model, eager = (to(small_ijepa(depth=4), triton_everywhere) for _ in range(2))
    for either in (model, eager):
        either.use_fp8()
    assert all(block._compiled_call_impl is None for block in model.fp8_blocks)
    for block in model.fp8_blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for images in (2, 3, 4):
        packed = pack(SAMPLER(images, 0, 0, 0)).to(triton_everywhere)
        patches = torch.randn(images * 64, 3 * model.encoder.patch**2, device=triton_everywhere)
        found, expected = (either.targets(patches, packed) for either in (model, eager))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        counts.append(counter.frame_count)
    # The first block has no branch to add. Another number of images makes it a symbol, once.
    assert counts[0] <= 2
    assert counts[2] == counts[1] <= 4
    compile_blocks(*model.averaged.values(), backend=counter)
    model.use_fp8()
    assert all(block._compiled_call_impl is not None for block in model.fp8_blocks)


@pytest.mark.parametrize("policy", ["full", "budget"])
@pytest.mark.parametrize("padding", [False, True])
def test_no_operation_of_the_step_reads_the_device(triton_everywhere, monkeypatch, policy, padding):
    """On fake tensors, which have shapes and no values, any .item(), .tolist() or data-dependent size is an error.

    So the step can be captured as a CUDA graph where shapes are static. The kernels' path is taken; what is switched
    off is what the CPU alone checks, the order of cu_seqlens.
    """
    from ijepa_fast.kernels.predictor_tokens import ops as predictor_ops
    from ijepa_fast.kernels.varlen_attention import ops as attention_ops

    for module in (predictor_ops, attention_ops):
        monkeypatch.setattr(module, "check_sequences", lambda *arguments: None)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # reads values, and is no step
    packed = pack(SAMPLER(4, 0, 0, 0), policy, budget=12 if policy == "budget" else None, padding=padding)
    with FakeTensorMode() as mode:
        model = small_ijepa()
        # A deep copy would have a fake mode of its own.
        model.averaged = {"encoder": small_ijepa().encoder.requires_grad_(False)}
        loss = loss_of(model, images_of(4), packed.map(mode.from_tensor))
        loss.backward()
        assert loss.shape == ()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_the_check_above_would_find_a_read():
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        torch.ones(3).sum().item()


def test_an_optimiser_step_is_the_same_with_padding():
    """Three steps with and without it end at the same weights and averages, in fp32."""
    ends = []
    for padding in (False, True):
        model = small_ijepa()
        optimizer = optimizer_of(model)
        for step in range(3):
            torch.manual_seed(step)
            loss_of(model, images_of(43), pack(SAMPLER(43, 0, step, 0), padding=padding)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([*model.parameters(), *model.target_encoder.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_graphs_change_no_loss_and_no_gradient(fp8):
    """Batches of shapes that come again: run, captured, replayed; with what `watch` is given, and into full memory."""
    dtype = torch.bfloat16 if fp8 else torch.float32
    model, eager = (to(small_ijepa(), "cuda", dtype) for _ in range(2))
    if fp8:
        for either in (model, eager):
            either.use_fp8()
    gradients = [torch.zeros_like(p) for p in model.parameters()]
    said = []
    graphs = Graphs(model, gradients, 1.0, said.append, CUDARecorder(torch.device("cuda")))
    watched = {}
    for name, either in (("graphs", model), ("eager", eager)):
        either.watch = lambda features, packed, name=name: watched.__setitem__(name, features.clone())
    for step in range(12):
        images, packed = images_of(43).cuda(), pack(SAMPLER(43, 0, step % 3, 0), padding=True).to("cuda")
        found, expected = [graphs(images, packed)[0], *gradients], loss_and_gradients(eager, images, packed)
        for a, b in zip([*found, watched["graphs"]], [*expected, watched["eager"]], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2 if fp8 else 1e-4, atol=1e-6)
        with torch.no_grad():
            for either in (model, eager):
                for p in (*either.parameters(), *either.target_encoder.parameters()):
                    p.add_(0.01)
                either.average_changed()
    assert 1 <= len(graphs.captured) <= 3
    assert not said


def test_graphs_see_few_shapes():
    """With their buckets half as many as with the others, for a bound on what is padded: 1 in 32 of the context."""
    sampler, shapes = make_sampler("multiblock", (16, 16)), {True: set(), GRAPH_BITS: set()}
    for step in range(120):
        masks = sampler(64, 0, step, 0)
        for padding, seen in shapes.items():
            draw = pack(masks, padding=padding)
            seen.add(draw.shape)
            assert draw.context_index.numel() <= draw.context_tokens * (1 + 1 / 32)
    assert len(shapes[GRAPH_BITS]) < 0.65 * len(shapes[True])


class Count(TorchDispatchMode):
    """Counts ops that launch something: neither views nor bare allocations."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = {x.untyped_storage()._cdata for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if (made - given or writes) and not any(word in func._schema.name for word in ("empty", "set_")):
            self.ops[func._schema.name] += 1
        return out


@pytest.mark.parametrize(
    "draw", [pack(SAMPLER(4, 0, 0, 0), padding=True), small_mae().draw(4, 0, 0)], ids=["ijepa", "mae"]
)
def test_a_draw_goes_to_a_device_in_one_copy(draw):
    """Its thirteen index tensors, and more of other methods, were as many copies."""
    packed = draw.packed()
    with Count() as count:
        there = packed.to("meta")
    assert count.ops == {"aten::_to_copy": 1}
    assert there.shape == draw.shape
    assert all(x.device.type == "meta" and x.dtype == draw.tensors[name].dtype for name, x in there.tensors.items())
    for name, tensor in draw.tensors.items():
        assert torch.equal(packed.tensors[name], tensor)
        assert packed.tensors[name].data_ptr() % 16 == packed.buffer.data_ptr() % 16
    assert draw.buffer is None
    assert packed.map(torch.clone).buffer is None
    assert packed.packed().buffer.data_ptr() != packed.buffer.data_ptr()


def launches(depth, predictor_depth, monkeypatch):
    """Ops of a bf16 step on the kernels' path, (forward, backward). What an op launches inside is not seen."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    packed = pack(SAMPLER(4, 0, 0, 0), padding=True)
    with FakeTensorMode() as mode:
        torch.set_default_dtype(torch.bfloat16)
        try:
            model, target = (small_ijepa(depth=depth, predictor_depth=predictor_depth) for _ in range(2))
        finally:
            torch.set_default_dtype(torch.float32)
        model.averaged = {"encoder": target.encoder.requires_grad_(False)}
        for network in model.networks.values():
            network.positions = network.positions.bfloat16()
        draw = packed.map(mode.from_tensor)
        with Count() as forward:
            loss = loss_of(model, images_of(4), draw)
        with Count() as backward:
            torch.autograd.grad(loss, [*model.parameters()])
    return sum(forward.ops.values()), sum(backward.ops.values())


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.usefixtures("ops_as_on_a_gpu")
def test_launches_of_a_step(monkeypatch):
    """Of H/14 (32 and 12 blocks) and S/16, B/16 (12 and 6), from what a block adds; docs/LOG.md has the counts."""
    dispatch.use({"linear": "reference"})  # a product, and in the backward pass two and the bias's sum
    base, wide, narrow = (launches(*depths, monkeypatch) for depths in ((2, 2), (3, 2), (2, 3)))
    encoder, predictor = ([a - b for a, b in zip(more, base, strict=True)] for more in (wide, narrow))
    assert (encoder, predictor) == ([16, 15], [8, 15]), base  # forward: of the target encoder, and of the context's
    for depths, most in (((32, 12), 1315), ((12, 6), 557)):
        parts = zip(base, encoder, predictor, strict=True)
        assert sum(b + (depths[0] - 2) * e + (depths[1] - 2) * p for b, e, p in parts) <= most
