"""target_loss: kernel against reference, gradient, registration, compilation, bad input."""

import pytest
import torch

from ijepa_fast.kernels.common import checks, dispatch
from ijepa_fast.kernels.target_loss import cpu, ops, reference, target_loss
from tests import oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ("l2", "smooth_l1")


def make(rows, sources, width, dtype, device, features_dtype=None):
    predictions = torch.randn(rows, width).to(device, dtype)
    features = torch.randn(sources, width).mul(3).add(0.5).to(device, features_dtype or dtype)
    index = torch.randint(0, sources, (rows,), dtype=torch.int32).to(device)
    return predictions, features, index


def of_predictions(function, features, index, kind):
    """The loss as a function of the predictions; in fp64 of fp64 ones."""
    return lambda predictions: function(
        predictions, features.double() if predictions.dtype == torch.float64 else features, index, kind, 1e-5
    )


def check(predictions, features, index, kind, upstream=1.0):
    """Loss and gradient within the error budget; bf16 gradients are rounded twice if upstream is no power of two."""
    expected = of_predictions(reference.target_loss, features, index, kind)
    actual = of_predictions(target_loss, features, index, kind)
    upstream = (torch.tensor(upstream, device=predictions.device),)
    exact_loss, exact = oracle.differentiate(expected, (predictions.double(),), upstream)
    eager_loss, eager = oracle.differentiate(expected, (predictions,), upstream)
    actual_loss, gradient = oracle.differentiate(actual, (predictions,), upstream)
    oracle.assert_within_budget(actual_loss[0], eager_loss[0], exact_loss[0], "loss")
    if predictions.dtype == torch.bfloat16 and float(upstream[0].abs().frexp().mantissa) not in (0.0, 0.5):
        torch.testing.assert_close(gradient[0].double(), exact[0], rtol=2**-7, atol=0)
    else:
        oracle.assert_within_budget(gradient[0], eager[0], exact[0], "gradient of predictions")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_large_on_gpu(triton_everywhere, kind):
    check(*make(20011, 9001, 1280, torch.bfloat16, triton_everywhere), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "sources", "width"), [(1, 1, 24), (5, 3, 192), (45, 17, 384), (11, 30, 1408)])
def test_matches_reference(triton_everywhere, poisoned, rows, sources, width, dtype, kind):
    predictions, features, index = make(rows, sources, width, dtype, triton_everywhere)
    check(predictions, features, index, kind)


@pytest.mark.parametrize("upstream", [1.0, 0.25, 65536.0, -1.7, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradient(triton_everywhere, poisoned, dtype, upstream):
    predictions, features, index = make(33, 20, 96, dtype, triton_everywhere)
    check(predictions, features, index, "l2", upstream)


NORMS = {"position": (5, False), "position, then token": (5, True), "batch": (1, False), "none": (0, False)}


def norm_of(name, sources, width, device):
    """Keywords of a normalisation: a table of so many places, each source's place, and whether tokens follow."""
    places, token = NORMS[name]
    if not places:
        return {"token": token}
    table = torch.stack([torch.randn(places, width), torch.rand(places, width) + 0.5]).to(device)
    row = torch.randint(0, places, (sources,), dtype=torch.int32).to(device) if places > 1 else None
    return {"table": table, "places": row, "token": token}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_other_norms_of_the_targets(triton_everywhere, poisoned, name, dtype, kind):
    predictions, features, index = make(45, 17, 192, dtype, triton_everywhere)
    norm = norm_of(name, 17, 192, triton_everywhere)

    def of(function):
        return lambda x: function(x, features.double() if x.dtype == torch.float64 else features, index, kind, **norm)

    oracle.check_against_reference(of(target_loss), of(reference.target_loss), (predictions,))


@pytest.mark.parametrize("name", NORMS)
def test_other_norms_are_the_formula(name):
    predictions, features, index = make(6, 4, 32, torch.float64, "cpu")
    norm = norm_of(name, 4, 32, "cpu")
    targets = features
    if "table" in norm:
        rows = torch.zeros(4, dtype=torch.long) if norm["places"] is None else norm["places"].long()
        targets = (features - norm["table"][0].double()[rows]) * norm["table"][1].double()[rows]
    if norm["token"]:
        targets = torch.nn.functional.layer_norm(targets, (32,))
    squares = (predictions - targets[index.long()]).square()
    for weights in (None, torch.rand(6)):
        expected = (squares if weights is None else squares * weights[:, None].double()).mean()
        norm["weights"] = weights
        torch.testing.assert_close(reference.target_loss(predictions, features, index, "l2", **norm), expected)
        loss, _ = cpu.target_loss_fwd(predictions.float(), features.float(), index, "l2", 1e-5, **norm)
        torch.testing.assert_close(loss, expected.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["position", "none"])
def test_rows_have_weights(triton_everywhere, poisoned, name, dtype, kind):
    """Some of them zero, as those of padding are."""
    predictions, features, index = make(45, 17, 192, dtype, triton_everywhere)
    norm = norm_of(name, 17, 192, triton_everywhere)
    norm["weights"] = (torch.rand(45) * (torch.arange(45) % 4 > 0)).to(triton_everywhere)

    def of(function):
        return lambda x: function(x, features.double() if x.dtype == torch.float64 else features, index, kind, **norm)

    one = (torch.ones((), device=predictions.device),)  # see `check`
    exact = oracle.differentiate(of(reference.target_loss), (predictions.double(),), one)
    eager, actual = (oracle.differentiate(of(f), (predictions,), one) for f in (reference.target_loss, target_loss))
    for results in zip(actual, eager, exact, strict=True):
        oracle.assert_within_budget(*(x for (x,) in results))


def test_fp32_features_with_bf16_predictions(triton_everywhere, poisoned):
    check(*make(13, 7, 96, torch.bfloat16, triton_everywhere, torch.float32), "smooth_l1")


def test_any_index():
    """Rows of features that repeat, in any order, and rows that nobody asks for."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=10, deadline=None)
    @hypothesis.given(data=st.data(), kind=st.sampled_from(KINDS))
    def check_one(data, kind):
        sources = data.draw(st.integers(1, 5))
        index = torch.tensor(
            data.draw(st.lists(st.integers(0, sources - 1), min_size=1, max_size=9)), dtype=torch.int32
        )
        predictions, features, _ = make(len(index), sources, 20, torch.float32, "cpu")
        loss, gradient = ops._fwd(predictions, features, index, kind, 1e-5)
        expected = of_predictions(reference.target_loss, features, index, kind)
        (exact,), (exact_gradient,) = oracle.differentiate(expected, (predictions.double(),), (torch.ones(()),))
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-8)

    check_one()


def test_unit_upstream_leaves_the_gradient_of_the_forward(triton_everywhere):
    predictions, features, index = make(9, 4, 48, torch.bfloat16, triton_everywhere)
    _, gradient = ops._fwd(predictions, features, index, "l2", 1e-5)
    scaled = gradient.clone()
    ops._scale_(scaled, torch.ones((), device=scaled.device))
    assert torch.equal(scaled, gradient)
    ops._scale_(scaled, torch.full((), 0.5, device=scaled.device))
    assert torch.equal(scaled, gradient * 0.5)


def test_upstream_of_an_expression(triton_everywhere):
    predictions, features, index = make(9, 4, 48, torch.float32, triton_everywhere)
    scale = torch.tensor(-2.5, device=triton_everywhere)
    function = of_predictions(target_loss, features, index, "smooth_l1")
    _, (gradient,) = oracle.differentiate(lambda x: scale * function(x), (predictions,), (torch.ones(()),))
    _, (unscaled,) = oracle.differentiate(function, (predictions,), (torch.ones(()),))
    torch.testing.assert_close(gradient, -2.5 * unscaled)


def test_second_backward_is_refused(triton_everywhere):
    predictions, features, index = make(3, 3, 16, torch.float32, triton_everywhere)
    loss = target_loss(predictions.requires_grad_(), features, index)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_no_gradient_to_features(triton_everywhere):
    predictions, features, index = make(3, 3, 16, torch.float32, triton_everywhere)
    features.requires_grad_()
    for setting in ("triton", "reference"):
        dispatch.use({"target_loss": setting})
        assert not target_loss(predictions, features, index).requires_grad


def test_inputs_are_left_alone(triton_everywhere):
    tensors = make(7, 4, 40, torch.float32, triton_everywhere)
    before = [x.clone() for x in tensors]
    target_loss(tensors[0].requires_grad_(), *tensors[1:]).mul(3).backward()
    for x, y in zip(tensors, before):
        assert torch.equal(x.detach(), y)


def test_deterministic(triton_everywhere):
    predictions, features, index = make(203, 50, 384, torch.bfloat16, triton_everywhere)
    first, second = (ops._fwd(predictions, features, index, "l2", 1e-5) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_reference_is_the_formula():
    predictions, features, index = make(6, 4, 32, torch.float64, "cpu")
    variance, mean = torch.var_mean(features, 1, correction=0, keepdim=True)
    error = predictions - ((features - mean) / (variance + 1e-5).sqrt())[index.long()]
    size = error.abs()
    smooth = torch.where(size < 1, 0.5 * size**2, size - 0.5).mean()
    torch.testing.assert_close(reference.target_loss(predictions, features, index, "l2"), error.square().mean())
    torch.testing.assert_close(reference.target_loss(predictions, features, index, "smooth_l1"), smooth)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_reference(kind):
    predictions, features, index = make(4, 3, 6, torch.float64, "cpu")
    oracle.gradcheck(of_predictions(reference.target_loss, features, index, kind), predictions.requires_grad_())
    weights = torch.rand(4, dtype=torch.float64)
    oracle.gradcheck(lambda x: reference.target_loss(x, features, index, kind, weights=weights), predictions)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_implementation_of_the_op(kind):
    """What the registered op does on a CPU without Triton's interpreter."""
    predictions, features, index = make(6, 4, 32, torch.float32, "cpu")
    function = of_predictions(reference.target_loss, features, index, kind)
    (loss,), (gradient,) = oracle.differentiate(function, (predictions,), (torch.ones(()),))
    actual_loss, actual_gradient = cpu.target_loss_fwd(predictions, features, index, kind, 1e-5)
    torch.testing.assert_close(actual_loss, loss)
    torch.testing.assert_close(actual_gradient, gradient)
    cpu.target_loss_scale_(actual_gradient, torch.tensor(3.0))
    torch.testing.assert_close(actual_gradient, 3 * gradient)


def test_opcheck(triton_everywhere):
    predictions, features, index = make(5, 4, 24, torch.float32, triton_everywhere)
    oracle.opcheck(torch.ops.ijepa_fast.target_loss_fwd, predictions, features, index, "l2", 1e-5)
    norm = norm_of("position", 4, 24, predictions.device)
    oracle.opcheck(torch.ops.ijepa_fast.target_loss_fwd, predictions, features, index, "l2", 1e-5, *norm.values())
    weights = torch.rand(5, device=predictions.device)
    oracle.opcheck(
        torch.ops.ijepa_fast.target_loss_fwd, predictions, features, index, "l2", 1e-5, *norm.values(), weights
    )
    oracle.opcheck(torch.ops.ijepa_fast.target_loss_scale_, predictions, torch.ones((), device=predictions.device))


def test_compiles_once(triton_everywhere):
    calls = [make(rows, 7, 24, torch.float32, triton_everywhere) for rows in (5, 9, 17)]
    calls = [(predictions.requires_grad_(), features, index) for predictions, features, index in calls]
    assert oracle.count_compiles(target_loss, calls) == 1


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("predictions", lambda x: x[0], "predictions: expected shape"),
        ("predictions", lambda x: x.int(), "predictions: expected dtype"),
        ("predictions", lambda x: x.mT.contiguous().mT, "predictions: expected a contiguous"),
        ("features", lambda x: x[:, :4], "features: expected shape"),
        ("features", lambda x: x.to("meta"), "features: expected device"),
        ("index", lambda x: x.long(), "index: expected dtype"),
        ("index", lambda x: x[:2], "index: expected shape"),
        ("kind", lambda x: "l1", "kind: expected one of l2, smooth_l1, got 'l1'"),
        ("table", lambda x: torch.zeros(2, 3, 5), "table: expected shape"),
        ("places", lambda x: torch.zeros(3, dtype=torch.int32), "places: expected a table"),
        ("weights", lambda x: torch.zeros(3), "weights: expected shape"),
        ("weights", lambda x: torch.zeros(4).double(), "weights: expected dtype"),
    ],
)
def test_bad_input_is_named(argument, change, message):
    predictions, features, index = make(4, 3, 8, torch.float32, "cpu")
    good = dict(predictions=predictions, features=features, index=index, kind="l2")
    good[argument] = change(good.get(argument))
    with pytest.raises(ValueError, match=f"target_loss: {message}"):
        target_loss(**good)


def test_no_predictions_have_no_loss():
    predictions, features, index = make(4, 3, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match="target_loss: predictions: expected at least one"):
        target_loss(predictions[:0], features, index[:0])


def test_debug_mode_reads_the_index(monkeypatch):
    predictions, features, index = make(4, 3, 8, torch.float32, "cpu")
    monkeypatch.setattr(checks, "debug", True)
    with pytest.raises(ValueError, match=r"index: expected values in \[0, 3\)"):
        target_loss(predictions, features, index + 3)
