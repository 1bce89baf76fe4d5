"""predictor_tokens and predictor_readout: kernels against references, registration, compilation, bad input."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from ijepa_fast.kernels.common import checks
from ijepa_fast.kernels.predictor_tokens import cpu, ops, predictor_readout, predictor_tokens, reference
from ijepa_fast.masks.draw import Draw
from tests import oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (context lengths (C, B), targets, patches per target, patches per image, and of some: seed, padding)
LAYOUTS = {
    "one token": ([[1]], 1, 1, 4),
    "ragged": ([[17, 3, 40]], 4, 5, 49),
    "two contexts": ([[5, 0, 33], [1, 16, 7]], 2, 18, 50),
    "no context": ([[0, 0]], 3, 4, 9),
    "uniform": ([[16, 16]], 4, 16, 64),
    "padded": ([[17, 3], [21, 9]], 3, 5, 49, 0, (7, 0, 20)),
}


@dataclass(frozen=True)
class Layout(Draw):
    """What the ops read of a MaskDraw."""

    patches: int
    targets: int
    target_size: int
    sequences: int
    context_index: torch.Tensor
    context_cu_seqlens: torch.Tensor
    context_max_seqlen: int
    target_index: torch.Tensor

    @property
    def rows(self):
        """Rows of the predictor."""
        return self.targets * (self.context_index.shape[0] + self.sequences * self.target_size)


def pack(lengths, targets, size, patches, seed=0, padding=()):
    """A layout of random patches; targets overlap. padding: lengths of further context sequences."""
    generator = np.random.default_rng(seed)
    lengths = np.array(lengths)
    contexts, images = lengths.shape
    rows = [
        image * patches + np.sort(generator.permutation(patches)[: lengths[c, image]])
        for c in range(contexts)
        for image in range(images)
    ]
    target = np.stack([generator.permutation(patches)[:size] for _ in range(targets * images)])
    target = target.reshape(targets, images, size) + np.arange(images)[:, None] * patches
    return Layout(
        images=images,
        patches=patches,
        targets=targets,
        target_size=size,
        sequences=contexts * images,
        context_index=int32(np.concatenate([*rows, np.zeros(sum(padding))])),
        context_cu_seqlens=cu_seqlens([*lengths.ravel(), *padding]),
        context_max_seqlen=max(int(lengths.max()), *padding, 0),
        target_index=int32(target),
    )


def int32(values):
    return torch.from_numpy(np.asarray(values).astype(np.int32))


def cu_seqlens(lengths):
    return int32(np.concatenate([[0], np.cumsum(lengths)]))


def make(packed, width, dtype, device, table_dtype=None):
    context = torch.randn(packed.context_index.shape[0], width).to(device, dtype)
    mask_token = torch.randn(width).to(device, table_dtype or dtype)
    positions = torch.randn(packed.patches, width).to(device, table_dtype or dtype)
    return context, mask_token, positions


def tokens_of(function, packed, positions):
    """The tokens as a function of context and mask token, by the op or its reference."""
    if function is predictor_tokens:
        return lambda context, mask_token: predictor_tokens(context, mask_token, positions, packed)
    layout = (packed.context_index, packed.context_cu_seqlens, packed.target_index, packed.sequences, packed.patches)
    return lambda context, mask_token: reference.predictor_tokens(context, mask_token, positions, *layout)


def readout_of(function, packed):
    if function is predictor_readout:
        return lambda tokens: predictor_readout(tokens, packed)
    layout = (packed.context_cu_seqlens, packed.targets, packed.sequences, packed.target_size)
    return lambda tokens: reference.predictor_readout(tokens, *layout)


def row_by_row(context, mask_token, positions, packed):
    """(tokens, mask rows) as the paper describes them, one row after the other."""
    tokens, masks = [], []
    bounds = packed.context_cu_seqlens.tolist()
    for m in range(packed.targets):
        for s in range(len(bounds) - 1):
            for t in range(bounds[s], bounds[s + 1]):
                tokens.append(context[t] + positions[packed.context_index[t] % packed.patches])
            for patch in packed.target_index[m, s % packed.images] if s < packed.sequences else ():
                masks.append(mask_token + positions[patch % packed.patches])
                tokens.append(masks[-1])
    return torch.stack(tokens), torch.stack(masks)


@pytest.mark.gpu
def test_large_on_gpu(triton_everywhere):
    lengths = np.random.default_rng(0).integers(40, 150, (1, 128)).tolist()
    packed = pack(lengths, 4, 44, 256).to(triton_everywhere)
    check(packed, 384, torch.bfloat16, triton_everywhere)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "width"), [(name, width) for name, width in zip(LAYOUTS, (24, 130, 96, 40, 384, 64))]
)
def test_matches_reference(triton_everywhere, poisoned, layout, width, dtype):
    check(pack(*LAYOUTS[layout]).to(triton_everywhere), width, dtype, triton_everywhere)


def check(packed, width, dtype, device):
    context, mask_token, positions = make(packed, width, dtype, device)
    oracle.check_against_reference(
        tokens_of(predictor_tokens, packed, positions),
        tokens_of(reference, packed, positions),
        (context, mask_token),
        names=("context", "mask_token"),
    )
    tokens = torch.randn(packed.rows, width).to(device, dtype)
    upstream = oracle.random_upstream(readout_of(reference, packed), (tokens,))
    outputs, gradients = oracle.differentiate(readout_of(predictor_readout, packed), (tokens,), upstream)
    expected, expected_gradients = oracle.differentiate(readout_of(reference, packed), (tokens,), upstream)
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(gradients[0], expected_gradients[0])


def test_fp32_tables_with_low_precision_context(triton_everywhere, poisoned):
    packed = pack(*LAYOUTS["ragged"]).to(triton_everywhere)
    context, mask_token, positions = make(packed, 48, torch.bfloat16, triton_everywhere, torch.float32)
    oracle.check_against_reference(
        tokens_of(predictor_tokens, packed, positions),
        tokens_of(reference, packed, positions),
        (context, mask_token),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_is_row_by_row(layout):
    packed = pack(*LAYOUTS[layout])
    context, mask_token, positions = make(packed, 6, torch.float64, "cpu")
    tokens, masks = row_by_row(context, mask_token, positions, packed)
    assert torch.equal(tokens_of(reference, packed, positions)(context, mask_token), tokens)
    assert torch.equal(readout_of(reference, packed)(tokens), masks)
    assert tokens.shape[0] == packed.rows


def test_any_layout():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=10, deadline=None)
    @hypothesis.given(data=st.data())
    def check_one(data):
        images, contexts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
        patches = data.draw(st.integers(1, 30))
        length = st.lists(st.integers(0, patches), min_size=images, max_size=images)
        lengths = data.draw(st.lists(length, min_size=contexts, max_size=contexts))
        size, targets = data.draw(st.integers(1, patches)), data.draw(st.integers(1, 3))
        padding = data.draw(st.lists(st.integers(0, 20), max_size=3))
        packed = pack(lengths, targets, size, patches, data.draw(st.integers(0, 99)), padding)
        context, mask_token, positions = make(packed, 12, torch.float32, "cpu")
        tokens, masks = row_by_row(context, mask_token, positions, packed)
        layout = (packed.context_index, packed.context_cu_seqlens, packed.target_index, packed.sequences)
        maximum = packed.context_max_seqlen
        assert torch.equal(ops._fwd(context, mask_token, positions, *layout, maximum, patches), tokens)
        assert torch.equal(ops._readout_fwd(tokens, packed.context_cu_seqlens, targets, packed.sequences, size), masks)

        dtokens = torch.randn_like(tokens)
        sizes = (packed.context_index.shape[0], targets, packed.sequences, size, maximum)
        arguments = (dtokens, mask_token, packed.context_cu_seqlens, *sizes)
        for actual, expected in zip(ops._bwd(*arguments), cpu.predictor_tokens_bwd(*arguments)):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        arguments = (masks, packed.context_cu_seqlens, tokens.shape[0], *sizes[1:])
        assert torch.equal(ops._readout_bwd(*arguments), cpu.predictor_readout_bwd(*arguments))

    check_one()


def test_plain_implementation_of_the_ops():
    """What the registered ops do on a CPU without Triton's interpreter."""
    packed = pack(*LAYOUTS["two contexts"])
    context, mask_token, positions = make(packed, 8, torch.float32, "cpu")
    function = tokens_of(reference, packed, positions)
    upstream = oracle.random_upstream(function, (context, mask_token))
    (tokens,), gradients = oracle.differentiate(function, (context, mask_token), upstream)
    layout = (packed.context_index, packed.context_cu_seqlens, packed.target_index, packed.sequences)
    assert torch.equal(cpu.predictor_tokens_fwd(context, mask_token, positions, *layout, 33, packed.patches), tokens)
    sizes = (context.shape[0], packed.targets, packed.sequences, packed.target_size, 33)
    actual = cpu.predictor_tokens_bwd(*upstream, mask_token, packed.context_cu_seqlens, *sizes)
    torch.testing.assert_close(actual, gradients)

    upstream = oracle.random_upstream(readout_of(reference, packed), (tokens,))
    _, (gradient,) = oracle.differentiate(readout_of(reference, packed), (tokens,), upstream)
    sizes = (tokens.shape[0], *sizes[1:])
    assert torch.equal(cpu.predictor_readout_bwd(*upstream, packed.context_cu_seqlens, *sizes), gradient)


def test_deterministic(triton_everywhere):
    packed = pack(*LAYOUTS["ragged"]).to(triton_everywhere)
    context, mask_token, positions = make(packed, 96, torch.bfloat16, triton_everywhere)
    function = tokens_of(predictor_tokens, packed, positions)
    upstream = oracle.random_upstream(function, (context, mask_token))
    first, second = (oracle.differentiate(function, (context, mask_token), upstream)[1] for _ in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_gradcheck_of_references():
    packed = pack(*LAYOUTS["two contexts"])
    context, mask_token, positions = make(packed, 3, torch.float64, "cpu")
    oracle.gradcheck(tokens_of(reference, packed, positions), context.requires_grad_(), mask_token.requires_grad_())
    tokens = torch.randn(packed.rows, 2, dtype=torch.float64, requires_grad=True)
    oracle.gradcheck(readout_of(reference, packed), tokens)


def test_opcheck(triton_everywhere):
    packed = pack(*LAYOUTS["ragged"]).to(triton_everywhere)
    context, mask_token, positions = make(packed, 24, torch.float32, triton_everywhere)
    tokens = predictor_tokens(context, mask_token, positions, packed)
    masks = predictor_readout(tokens, packed)
    cu, size, maximum = packed.context_cu_seqlens, packed.target_size, packed.context_max_seqlen
    layout = (packed.context_index, cu, packed.target_index, packed.sequences, maximum, packed.patches)
    sizes = (packed.targets, packed.sequences, size)
    library = torch.ops.ijepa_fast
    oracle.opcheck(library.predictor_tokens_fwd, context, mask_token, positions, *layout)
    oracle.opcheck(library.predictor_tokens_bwd, tokens, mask_token, cu, context.shape[0], *sizes, maximum)
    oracle.opcheck(library.predictor_readout_fwd, tokens, cu, *sizes)
    oracle.opcheck(library.predictor_readout_bwd, masks, cu, tokens.shape[0], *sizes, maximum)


def test_compiles_once(triton_everywhere):
    def step(context, mask_token, positions, packed):
        tokens = predictor_tokens(context, mask_token, positions, packed)
        return tokens, predictor_readout(tokens, packed)

    calls = []
    for lengths, size in (([[17, 3]], 5), ([[18, 30]], 6), ([[9, 11]], 7)):
        packed = pack(lengths, 2, size, 49).to(triton_everywhere)
        context, mask_token, positions = make(packed, 24, torch.float32, triton_everywhere)
        calls.append((context.requires_grad_(), mask_token.requires_grad_(), positions, packed))
    assert oracle.count_compiles(step, calls) == 1


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("context", lambda x: x[1:], "context: expected shape"),
        ("context", lambda x: x.int(), "context: expected dtype"),
        ("context", lambda x: x.mT.contiguous().mT, "context: expected a contiguous"),
        ("mask_token", lambda x: x[:4], "mask_token: expected shape"),
        ("mask_token", lambda x: x.to("meta"), "mask_token: expected device"),
        ("positions", lambda x: x[1:], "positions: expected shape"),
        ("positions", lambda x: x.clone().requires_grad_(), "positions: expected a fixed table"),
        ("draw", lambda x: replace(x, targets=3), "draw.target_index: expected shape"),
        (
            "draw",
            lambda x: replace(x, context_cu_seqlens=x.context_cu_seqlens[:2]),
            "draw.context_cu_seqlens: expected at least 4 values",
        ),
        ("draw", lambda x: replace(x, context_index=x.context_index.long()), "draw.context_index: expected dtype"),
        (
            "draw",
            lambda x: replace(x, context_cu_seqlens=x.context_cu_seqlens - 1),
            "draw.context_cu_seqlens: .* end at the row count 60",
        ),
        ("draw", lambda x: replace(x, context_max_seqlen=39), "draw.context_max_seqlen: expected at least 40"),
    ],
)
def test_bad_input_is_named(argument, change, message):
    packed = pack(*LAYOUTS["ragged"])
    context, mask_token, positions = make(packed, 8, torch.float32, "cpu")
    good = dict(context=context, mask_token=mask_token, positions=positions, draw=packed)
    good[argument] = change(good[argument])
    with pytest.raises(ValueError, match=f"predictor_tokens: {message}"):
        predictor_tokens(**good)


def test_bad_input_of_the_readout_is_named():
    packed = pack(*LAYOUTS["ragged"])
    with pytest.raises(ValueError, match="predictor_readout: tokens: expected shape"):
        predictor_readout(torch.randn(packed.rows - 1, 8), packed)


def test_debug_mode_reads_the_indices(monkeypatch):
    packed = pack(*LAYOUTS["ragged"])
    monkeypatch.setattr(checks, "debug", True)
    with pytest.raises(ValueError, match=r"draw.target_index: expected values in \[0, 147\)"):
        predictor_tokens(
            *make(packed, 8, torch.float32, "cpu"), replace(packed, target_index=packed.target_index + 147)
        )
