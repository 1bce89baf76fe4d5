"""adamw_ema: reference against torch.optim.AdamW, csrc and Triton against the reference, properties, bad input."""

import pytest
import torch

from ijepa_fast.kernels.adamw_ema import adamw_ema_, adamw_ema_groups_, adamw_ema_multi_, reference, step_scalars
from ijepa_fast.kernels.common import dispatch, native
from tests import oracle

HYPER = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.05, step=3, momentum=0.996)
# Odd, empty, one element, and both sides of the tiles of the kernels.
SIZES = [(7, 13), (1,), (0,), (1024,), (1025,), (3, 5, 7), (16385,)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("param", "grad", "exp_avg", "exp_avg_sq", "ema", "param_out", "ema_out")
# What a run can ask for: (dtype of the gradient, of the parameter's copy, whether there is an EMA, dtype of its copy).
KINDS = {
    "fp32": (torch.float32, None, True, None),
    "bf16": (torch.bfloat16, torch.bfloat16, True, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32, True, torch.bfloat16),
    "plain AdamW": (torch.float32, torch.bfloat16, False, None),
}


@pytest.fixture(params=["csrc", "triton"])
def implementation(request):
    """Runs the op by the C++ extension (CPU), or by Triton (GPU, else the interpreter). Gives the device."""
    before = {op: dispatch.choice(op) for op in dispatch.OPS}
    if request.param == "csrc":
        if not native.available():
            pytest.skip("the extension ijepa_fast._C is not built")
        dispatch.use("auto")
        yield torch.device("cpu")
    else:
        pytest.importorskip("triton")
        dispatch.use("triton")
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dispatch.use(before)


def make(shape, kind, device="cpu"):
    """One parameter's tensors in the order of NAMES, as in the middle of a run; copies hold NaN."""
    grad, param_out, ema, ema_out = KINDS[kind]
    tensors = [torch.randn(shape), torch.randn(shape).to(grad), torch.randn(shape) * 0.1, torch.rand(shape) * 0.01]
    tensors.append(tensors[0] + 0.01 * torch.randn(shape) if ema else None)
    tensors += [None if dtype is None else torch.full(shape, torch.nan, dtype=dtype) for dtype in (param_out, ema_out)]
    return [x if x is None else x.to(device) for x in tensors]


def copies(tensors):
    return [x if x is None else x.clone() for x in tensors]


def step(tensors, function=adamw_ema_, **changes):
    """`tensors` after one step of `function`."""
    tensors = copies(tensors)
    function(*tensors[:5], **{**HYPER, **changes}, param_out=tensors[5], ema_out=tensors[6])
    return tensors


def reference_step(tensors, dtype=torch.float32, **changes):
    """The same by the reference, with the state in `dtype`."""
    tensors = [x if x is None else x.clone() if i in (1, 5, 6) else x.to(dtype) for i, x in enumerate(copies(tensors))]
    reference.adamw_ema_(*tensors[:5], step_scalars(**{**HYPER, **changes}), *tensors[5:])
    return tensors


def check(tensors, actual, **changes):
    """`actual` is one step of `tensors`, within the error budget; copies are exact roundings."""
    exact, eager = reference_step(tensors, torch.float64, **changes), reference_step(tensors, **changes)
    for i in (0, 2, 3, 4):
        if tensors[i] is not None:
            oracle.assert_within_budget(actual[i], eager[i], exact[i], NAMES[i])
    assert torch.equal(actual[1], tensors[1])
    for state, copy in ((0, 5), (4, 6)):
        if tensors[copy] is not None:
            assert torch.equal(actual[copy], actual[state].to(actual[copy].dtype)), NAMES[copy]


@pytest.mark.gpu
def test_large_on_gpu():
    for kind in KINDS:
        tensors = make((10_000_001,), kind, "cuda")
        check(tensors, step(tensors))


@pytest.mark.gpu
def test_captured_graph_takes_new_scalars():
    """What the op's docstring promises of scalars on the device."""
    tensors, scalars = make((5000,), "bf16", "cuda"), step_scalars(**HYPER).cuda()
    captured = copies(tensors)
    torch.ops.ijepa_fast.adamw_ema_(*captured[:5], scalars, *captured[5:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.ijepa_fast.adamw_ema_(*captured[:5], scalars, *captured[5:])
    for x, y in zip(captured, tensors):
        x.copy_(y)
    scalars.copy_(step_scalars(**{**HYPER, "lr": 0.1, "step": 9}))
    graph.replay()
    check(tensors, captured, lr=0.1, step=9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_matches_reference(implementation, shape, kind):
    tensors = make(shape, kind, implementation)
    check(tensors, step(tensors))


@pytest.mark.parametrize("changes", [{"step": 1}, {"weight_decay": 0.0}, {"momentum": 1.0}, {"step": 300_000}], ids=str)
def test_matches_reference_at_the_ends_of_the_schedules(implementation, changes):
    tensors = make((130,), "bf16", implementation)
    check(tensors, step(tensors, **changes), **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_list_is_each_tensor_by_itself(implementation, kind):
    """Bit for bit, whatever the neighbours; copies may be asked for of some tensors only."""
    rows = [make(shape, kind, implementation) for shape in SIZES]
    rows[2][5] = rows[0][6] = None
    expected = [step(row) for row in rows]
    actual = [copies(row) for row in rows]
    columns = list(zip(*actual))
    emas = None if KINDS[kind][2] is False else columns[4]
    adamw_ema_multi_(*columns[:4], emas, **HYPER, param_out=columns[5], ema_out=columns[6])
    for row, other in zip(actual, expected):
        for x, y in zip(row, other):
            assert x is None if y is None else torch.equal(x, y)


GROUPS = (2, 0, 1, 1, 0, 2, 1)
OF_GROUPS = ({}, {"weight_decay": 0.0}, {"lr": 0.1, "momentum": 0.5})


def in_groups(rows, scalars, averaged):
    """One step of `rows`, each with the scalars of its group; the first `averaged` have an average."""
    params, grads, exp_avgs, exp_avg_sqs, emas, param_outs, ema_outs = zip(*rows)
    param_outs, ema_outs = (() if None in column else column for column in (param_outs, ema_outs[:averaged]))
    adamw_ema_groups_(
        params, grads, exp_avgs, exp_avg_sqs, emas[:averaged], scalars, GROUPS, param_outs, ema_outs[:averaged]
    )


@pytest.mark.parametrize("averaged", [0, 4, len(SIZES)])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "mixed"])
def test_groups_are_each_tensor_by_itself(implementation, kind, averaged):
    """Bit for bit, with the hyperparameters of its group."""
    rows = [make(shape, kind, implementation) for shape in SIZES]
    for row in rows[averaged:]:
        row[4] = row[6] = None
    expected = [step(row, **OF_GROUPS[group]) for row, group in zip(rows, GROUPS, strict=True)]
    scalars = torch.stack([step_scalars(**HYPER | changes) for changes in OF_GROUPS]).to(implementation)
    actual = [copies(row) for row in rows]
    in_groups(actual, scalars, averaged)
    for row, other in zip(actual, expected, strict=True):
        for x, y in zip(row, other, strict=True):
            assert x is None if y is None else torch.equal(x, y)


def test_a_list_is_one_launch(triton_everywhere, monkeypatch):
    """H/14's 539 tensors were as many. Pointers are kept: a second step makes no new table."""
    from ijepa_fast.kernels.adamw_ema import kernel

    launches, tables = [], []
    launch, make_tables = kernel._adamw_ema_groups_kernel, kernel._tables_of
    kinds = {"__getitem__": lambda self, grid: lambda *a, **k: (launches.append(grid), launch[grid](*a, **k))}
    monkeypatch.setattr(kernel, "_adamw_ema_groups_kernel", type("Counted", (), kinds)())
    monkeypatch.setattr(kernel, "_tables_of", lambda *a: (tables.append(1), make_tables(*a))[1])
    rows = [make((16 * (i + 1),), "bf16", triton_everywhere) for i in range(len(GROUPS))]
    scalars = torch.stack([step_scalars(**HYPER | changes) for changes in OF_GROUPS]).to(triton_everywhere)
    expected = [step(step(row, **OF_GROUPS[group]), **OF_GROUPS[group]) for row, group in zip(rows, GROUPS)]
    for _ in range(2):
        in_groups(rows, scalars, 4)
    assert launches == [(len(GROUPS),)] * 2
    assert len(tables) == 1
    for row, other in zip(rows[:4], expected):
        assert torch.equal(row[0], other[0])
        assert torch.equal(row[6], other[6])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"groups": [0, 3]}, r"groups: expected rows of 1, got \[0, 3\]"),
        ({"grads": [torch.zeros(4)]}, "grads: expected 2 of them, got 1"),
        ({"emas": [torch.zeros(4)] * 3}, "emas: expected 2 of them, got 3"),
        ({"scalars": torch.zeros(1, 8, dtype=torch.float64)}, "scalars"),
        ({"grads": [torch.zeros(4), torch.zeros(4).bfloat16()]}, r"grads\[1\]: expected torch.float32"),
    ],
)
def test_bad_groups(changes, says):
    given = {name: [torch.zeros(4), torch.zeros(4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")}
    given |= {"scalars": torch.zeros(1, 9, dtype=torch.float64), "groups": [0, 0]}
    with pytest.raises(ValueError, match=says):
        adamw_ema_groups_(**given | changes)


def test_empty_list(implementation):
    adamw_ema_multi_([], [], [], [], [], **HYPER)


@pytest.mark.skipif(not native.available(), reason="the extension ijepa_fast._C is not built")
@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_matter(kind):
    """Tensors of very different sizes over one, two and five threads of the C++ version: bit for bit."""
    rows = [make(shape, kind) for shape in ((300_001,), (3,), (40_000,), (0,), (99_999,))]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            columns = list(zip(*(copies(row) for row in rows)))
            emas = None if KINDS[kind][2] is False else columns[4]
            adamw_ema_multi_(*columns[:4], emas, **HYPER, param_out=columns[5], ema_out=columns[6])
            results.append([x for column in columns for x in column if x is not None])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(results[0], other):
            assert torch.equal(x, y)
    check(rows[0], [column[0] for column in columns])


def test_writes_nothing_outside(implementation):
    """A step on the middle of a buffer leaves both its sides alone."""
    buffers = make((1200,), "bf16", implementation)
    before = copies(buffers)
    inside = [x[100:1113] for x in buffers]
    adamw_ema_(*inside[:5], **HYPER, param_out=inside[5], ema_out=inside[6])
    for x, y in zip(buffers, before):
        for side in (slice(0, 100), slice(1113, None)):
            torch.testing.assert_close(x[side], y[side], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(buffers[0], before[0])


def test_not_a_number_stays_one(implementation):
    tensors = make((70,), "bf16", implementation)
    tensors[1][33] = torch.nan
    actual = step(tensors)
    for i in (0, 2, 3, 4, 5, 6):
        assert actual[i].isnan().nonzero().tolist() == [[33]], NAMES[i]


def test_reference_is_torch_adamw_and_ema_by_parameter():
    """Five steps with changing hyperparameters against the published loop."""
    param = torch.nn.Parameter(torch.randn(300, dtype=torch.float64))
    ema = param.detach().clone()
    mine = [param.detach().clone(), None, torch.zeros_like(ema), torch.zeros_like(ema), ema.clone(), None, None]
    optimizer = torch.optim.AdamW([param], betas=(0.9, 0.999), eps=1e-8)
    for number in range(1, 6):
        changes = dict(lr=1e-3 * number, weight_decay=0.04 * number, momentum=0.99 + 0.001 * number, step=number)
        param.grad = torch.randn_like(param)
        optimizer.param_groups[0].update(lr=changes["lr"], weight_decay=changes["weight_decay"])
        optimizer.step()
        ema.mul_(changes["momentum"]).add_(param.detach(), alpha=1 - changes["momentum"])
        mine[1] = param.grad
        mine = reference_step(mine, torch.float64, **changes)
    state = optimizer.state[param]
    for actual, expected in zip(mine[:5], (param.detach(), param.grad, state["exp_avg"], state["exp_avg_sq"], ema)):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_choice_of_the_implementation(monkeypatch):
    """reference and auto are taken at their word; auto without the extension is the reference."""
    used = []
    kernel = pytest.importorskip("ijepa_fast.kernels.adamw_ema.kernel")
    monkeypatch.setattr(torch.ops.ijepa_fast, "adamw_ema_", lambda *args: used.append("csrc"))
    monkeypatch.setattr(reference, "adamw_ema_", lambda *args: used.append("reference"))
    monkeypatch.setattr(kernel, "adamw_ema_", lambda *args: used.append("triton"))
    before = dispatch.choice("adamw_ema")
    try:
        for setting in ("auto", "reference", "triton"):
            dispatch.use({"adamw_ema": setting})
            monkeypatch.setattr(native, "available", lambda: True)
            step(make((3,), "fp32", DEVICE if setting == "triton" else "cpu"))
        dispatch.use({"adamw_ema": "auto"})
        monkeypatch.setattr(native, "available", lambda: False)
        step(make((3,), "fp32"))
    finally:
        dispatch.use({"adamw_ema": before})
    assert used == ["csrc", "reference", "triton", "reference"]


def test_opcheck():
    tensors, scalars = make((40,), "bf16", DEVICE), step_scalars(**HYPER)
    torch.library.opcheck(torch.ops.ijepa_fast.adamw_ema_.default, (*tensors[:5], scalars, *tensors[5:]))
    lists = [[x, x.clone()] for x in tensors]
    torch.library.opcheck(torch.ops.ijepa_fast.adamw_ema_multi_.default, (*lists[:5], scalars, *lists[5:]))
    groups = scalars[None].to(DEVICE), [0, 0]
    torch.library.opcheck(torch.ops.ijepa_fast.adamw_ema_groups_.default, (*lists[:5], *groups, *lists[5:]))


def test_compiles_once():
    """Parameters of several sizes under torch.compile(fullgraph, dynamic): one graph."""

    def update(*tensors):
        tensors = [x.clone() for x in tensors]
        torch.ops.ijepa_fast.adamw_ema_(*tensors[:5], scalars, *tensors[5:])
        return tuple(tensors)

    scalars = step_scalars(**HYPER)
    assert oracle.count_compiles(update, [make((size,), "mixed", DEVICE) for size in (50, 90, 170)]) == 1


@pytest.mark.parametrize(
    ("message", "argument", "change"),
    [
        ("param: expected dtype torch.float32", 0, lambda x: x.half()),
        ("param: expected a contiguous", 0, lambda x: torch.randn(4, 6).mT),
        ("grad: expected dtype torch.float32 or torch.bfloat16, got torch.float16", 1, lambda x: x.half()),
        ("grad: expected a tensor, got NoneType", 1, lambda x: None),
        ("exp_avg: expected shape", 2, lambda x: x[:2]),
        ("exp_avg_sq: expected dtype torch.float32", 3, lambda x: x.double()),
        ("ema: expected device", 4, lambda x: x.to("meta")),
        ("param_out: expected shape", 5, lambda x: x.view(4, 6)),
        ("ema_out: expected dtype", 6, lambda x: x.int()),
    ],
)
def test_bad_input_is_named(message, argument, change):
    tensors = make((6, 4), "bf16")
    tensors[argument] = change(tensors[argument])
    with pytest.raises(ValueError, match=f"adamw_ema: {message}"):
        adamw_ema_(*tensors[:5], **HYPER, param_out=tensors[5], ema_out=tensors[6])


def test_steps_are_counted_from_one():
    with pytest.raises(ValueError, match="adamw_ema: step: expected steps counted from 1, got 0"):
        step(make((6, 4), "bf16"), step=0)


def test_bad_lists_are_named():
    good = make((6, 4), "bf16")
    lists = [[x, x] for x in good[:5]]
    with pytest.raises(ValueError, match=r"grads: expected 2 tensors, got 1"):
        adamw_ema_multi_(lists[0], lists[1][:1], *lists[2:5], **HYPER)
    with pytest.raises(ValueError, match=r"ema_out: expected 2 tensors, got 1"):
        adamw_ema_multi_(*lists, **HYPER, ema_out=[None])
    lists[3][1] = good[3][:1]
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[1\]: expected shape \(6, 4\), got \(1, 4\)"):
        adamw_ema_multi_(*lists, **HYPER)


@pytest.mark.skipif(not native.available(), reason="the extension ijepa_fast._C is not built")
def test_bad_input_to_the_registered_op():
    """csrc guards memory by itself when the op is called by its name."""
    tensors, scalars = make((8,), "fp32"), step_scalars(**HYPER)

    def call(*arguments):
        torch.ops.ijepa_fast.adamw_ema_(*arguments, None, None)

    with pytest.raises(ValueError, match="expected contiguous tensors of one size"):
        call(tensors[0], tensors[1][:4], *tensors[2:5], scalars)
    with pytest.raises(ValueError, match="float32 state"):
        call(tensors[0], tensors[1], tensors[2].double(), *tensors[3:5], scalars)
    with pytest.raises(ValueError, match="expected gradients and copies of one dtype each"):
        call(tensors[0], tensors[1].half(), *tensors[2:5], scalars)
    with pytest.raises(ValueError, match="the float64 tensor that step_scalars returns"):
        call(*tensors[:5], scalars.float())
