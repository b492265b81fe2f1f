"""The grid against ONNX Runtime bit for bit, its algebra as properties, its gradients against their formulas."""

from fractions import Fraction

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from models import run_ort
from onnx_eptq import grid as grids
from onnx_eptq.graph import pack
from onnx_eptq.grid import (
    DTYPES,
    MIN_SCALE,
    Dtype,
    Grid,
    QParams,
    affine_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_bias,
    quantize,
    symmetric_qparams,
)

QUANTIZABLE = [name for name, dtype in DTYPES.items() if dtype.bits <= 8]  # QuantizeLinear writes no int32
CHANNELS = 3


def constant(name, values, onnx_type):
    """An initializer; sub-byte types are packed."""
    values = np.asarray(values)
    if onnx_type in (TensorProto.INT4, TensorProto.UINT4):
        proto = TensorProto(name=name, data_type=onnx_type, raw_data=pack(values.astype(np.int8), 4))
        proto.dims.extend(values.shape)
        return proto
    return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(onnx_type)), name)


def model(nodes, inputs, outputs, initializers, opset):
    infos = [[helper.make_tensor_value_info(n, kind, shape) for n, kind, shape in part] for part in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", *infos, initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def runtime_quantize(x, qparams, dtype: Dtype, axis):
    """ONNX Runtime's codes and the values it makes of them."""
    opset = max(dtype.opset, 21 if dtype.bits < 8 else 13)
    attributes = {} if axis is None else {"axis": axis}
    inputs = ["x", "scale", "zero_point"]
    nodes = [
        helper.make_node("QuantizeLinear", inputs, ["codes"], **attributes),
        helper.make_node("DequantizeLinear", ["codes", *inputs[1:]], ["values"], **attributes),
        helper.make_node("Cast", ["codes"], ["integers"], to=TensorProto.INT32),
    ]
    constants = [
        constant("scale", qparams.scale.numpy(), TensorProto.FLOAT),
        constant("zero_point", qparams.zero_point.numpy(), dtype.onnx),
    ]
    outputs = [("integers", TensorProto.INT32, x.shape), ("values", TensorProto.FLOAT, x.shape)]
    found = run_ort(model(nodes, [("x", TensorProto.FLOAT, x.shape)], outputs, constants, opset), {"x": x})
    return found["integers"], found["values"]


def runtime_dequantize(codes, qparams, dtype: Dtype, axis):
    """ONNX Runtime's values of given codes."""
    attributes = {} if axis is None else {"axis": axis}
    constants = [constant("codes", codes, dtype.onnx), constant("scale", qparams.scale.numpy(), TensorProto.FLOAT)]
    names = ["codes", "scale"]
    if dtype.bits < 32:
        constants.append(constant("zero_point", qparams.zero_point.numpy(), dtype.onnx))
        names.append("zero_point")
    nodes = [helper.make_node("DequantizeLinear", names, ["values"], **attributes)]
    proto = model(nodes, [], [("values", TensorProto.FLOAT, codes.shape)], constants, max(dtype.opset, 13))
    return run_ort(proto, {})["values"]


def parameters(dtype: Dtype, axis, rng):
    """Random scales of which the first is a power of two, and zero points at the ends and in between."""
    shape = () if axis is None else (CHANNELS,)
    scale = np.exp2(rng.uniform(-12, 3, CHANNELS)).astype(np.float32)
    scale[0] = 0.25
    zero_point = np.array([dtype.qmin, dtype.qmax, (dtype.qmin + dtype.qmax) // 2 + 1])
    if axis is None:
        index = rng.integers(CHANNELS)
        scale, zero_point = scale[index], zero_point[rng.integers(CHANNELS)]
    return QParams(torch.tensor(scale.reshape(shape)), torch.tensor(zero_point, dtype=torch.int32).reshape(shape))


def values_with_ties(dtype: Dtype, qparams, axis, rng):
    """Random values, exact ties and values far outside; shape [CHANNELS, CHANNELS, n] to suit every axis."""
    steps = np.concatenate(
        [
            np.arange(dtype.qmin - 3, dtype.qmax + 3) + 0.5,
            rng.uniform(2 * dtype.qmin - 5, 2 * dtype.qmax + 5, 300),
            [0, -0.0, 1e6, -1e6],
            # the runtime's 4-bit kernel turns some values that no int32 can hold into the code at the wrong end
            [1e30, -1e30, np.inf, -np.inf] if dtype.bits == 8 else [],
        ]
    )
    steps = np.broadcast_to(steps, (CHANNELS, CHANNELS, steps.size))
    scale = grids.along(qparams.scale, axis, 3).numpy()
    zero_point = grids.along(qparams.zero_point, axis, 3).numpy()
    finite = np.where(np.abs(steps) < 1000, steps - zero_point, steps)
    with np.errstate(over="ignore"):
        x = (finite.astype(np.float32) * scale).astype(np.float32)
    ratio = np.clip(x, -1e4, 1e4) / scale
    assert (np.abs(ratio - np.trunc(ratio)) == 0.5).sum() > 2 * (dtype.qmax - dtype.qmin)
    return np.ascontiguousarray(x)


def check_against_runtime(name, axis, seed):
    """Raise AssertionError where our codes or values are not ONNX Runtime's, bit for bit."""
    dtype, rng = DTYPES[name], np.random.default_rng(seed)
    qparams, grid = parameters(dtype, axis, rng), Grid(dtype.bits, dtype.signed, axis)
    x = values_with_ties(dtype, qparams, axis, rng)
    codes, values = runtime_quantize(x, qparams, dtype, axis)
    ours = quantize(torch.from_numpy(x), qparams, grid)
    assert {int(codes.min()), int(codes.max())} == {dtype.qmin, dtype.qmax}
    np.testing.assert_array_equal(ours.numpy(), codes)
    np.testing.assert_array_equal(dequantize(ours, qparams, grid).numpy().view(np.int32), values.view(np.int32))
    fake = fake_quantize(torch.from_numpy(x), qparams, grid).numpy()
    np.testing.assert_array_equal(fake + np.float32(0), values)  # a zero may have either sign


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("name", QUANTIZABLE)
def test_quantize_is_onnx_runtimes_bit_for_bit(name, axis):
    for seed in range(4):
        check_against_runtime(name, axis, seed)


def half_away(x):
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


def half_up(x):
    return torch.floor(x + 0.5)


def snap_by_reciprocal(x, qparams, grid):
    scale = grids.along(qparams.scale, grid.axis, x.ndim)
    zero_point = grids.along(qparams.zero_point, grid.axis, x.ndim)
    return torch.clamp(torch.round(x * (1 / scale)) + zero_point, grid.qmin, grid.qmax)


def snap_before_rounding(x, qparams, grid):
    scale = grids.along(qparams.scale, grid.axis, x.ndim)
    zero_point = grids.along(qparams.zero_point, grid.axis, x.ndim)
    return torch.clamp(torch.round(x / scale + zero_point), grid.qmin, grid.qmax)


@pytest.mark.parametrize(
    ("attribute", "fault"),
    [
        ("round_half_even", half_away),
        ("round_half_even", half_up),
        ("snap", snap_by_reciprocal),
        ("snap", snap_before_rounding),
    ],
)
def test_planted_fault_in_rounding_is_found(monkeypatch, attribute, fault):
    monkeypatch.setattr(grids, attribute, fault)
    with pytest.raises(AssertionError, match="Arrays are not equal"):  # noqa: PT012
        for seed in range(4):
            check_against_runtime("uint8", 0, seed)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("name", DTYPES)
def test_dequantize_is_onnx_runtimes_bit_for_bit(name, axis):
    dtype, rng = DTYPES[name], np.random.default_rng(5)
    qparams = parameters(dtype, axis, rng)
    if dtype.bits == 32:
        qparams = QParams(qparams.scale, torch.zeros_like(qparams.zero_point))
    codes = rng.integers(dtype.qmin, dtype.qmax + 1, (CHANNELS, CHANNELS, 50))
    codes[0, 0, :2] = dtype.qmin, dtype.qmax
    values = runtime_dequantize(codes, qparams, dtype, axis)
    ours = dequantize(torch.from_numpy(codes), qparams, Grid(dtype.bits, dtype.signed, axis)).numpy()
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, values)


def test_dtypes_say_what_onnx_says():
    for name, dtype in DTYPES.items():
        assert TensorProto.DataType.Name(dtype.onnx) == name.upper()
        numpy_type = helper.tensor_dtype_to_np_dtype(dtype.onnx)
        if dtype.bits >= 8:
            info = np.iinfo(numpy_type)
            assert (dtype.qmin, dtype.qmax) == (info.min, info.max)
            assert (Grid(dtype.bits, dtype.signed).qmin, Grid(dtype.bits, dtype.signed).qmax) == (info.min, info.max)
    assert (DTYPES["int4"].qmin, DTYPES["int4"].qmax) == (-8, 7)
    assert (DTYPES["uint4"].qmin, DTYPES["uint4"].qmax) == (0, 15)


# ---- properties

SCALES = st.floats(2.0**-20, 1024, width=32)


@st.composite
def quantizers(draw):
    grid = Grid(draw(st.integers(2, 8)), draw(st.booleans()))
    zero_point = draw(st.integers(grid.qmin, grid.qmax))
    return QParams(torch.tensor(draw(SCALES)), torch.tensor(zero_point, dtype=torch.int32)), grid


def spread(qparams, grid, seed, reach=1.5):
    """Values in and around the grid's range, ties among them."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.empty(200).uniform_(reach * (grid.qmin - 2), reach * (grid.qmax + 2), generator=generator)
    steps = torch.cat([steps, torch.arange(grid.qmin - 2, grid.qmax + 2) + 0.5, torch.zeros(1)])
    return (steps - qparams.zero_point) * qparams.scale


@given(quantizers())
def test_every_integer_survives(quantizer):
    qparams, grid = quantizer
    codes = torch.arange(grid.qmin, grid.qmax + 1, dtype=torch.int32)
    assert torch.equal(quantize(dequantize(codes, qparams, grid), qparams, grid), codes)


@given(quantizers(), st.integers(0, 99))
def test_fake_quantize_is_idempotent(quantizer, seed):
    qparams, grid = quantizer
    once = fake_quantize(spread(qparams, grid, seed), qparams, grid)
    assert torch.equal(fake_quantize(once, qparams, grid), once)
    assert len(once.unique()) <= 2**grid.bits


@given(quantizers(), st.integers(0, 99))
def test_fake_quantize_is_dequantize_of_quantize(quantizer, seed):
    qparams, grid = quantizer
    x = spread(qparams, grid, seed)
    assert torch.equal(fake_quantize(x, qparams, grid), dequantize(quantize(x, qparams, grid), qparams, grid))


@given(quantizers(), st.integers(0, 99))
def test_fake_quantize_is_monotone(quantizer, seed):
    qparams, grid = quantizer
    x = spread(qparams, grid, seed).sort().values
    assert (fake_quantize(x, qparams, grid).diff() >= 0).all()


@given(quantizers(), st.integers(0, 99))
def test_error_is_at_most_half_a_step_in_range_and_saturation_outside(quantizer, seed):
    qparams, grid = quantizer
    x = spread(qparams, grid, seed)
    low, high = ((bound - qparams.zero_point) * qparams.scale for bound in (grid.qmin, grid.qmax))
    result = fake_quantize(x, qparams, grid)
    error = (result.double() - x.double()).abs()
    inside = (x >= low) & (x <= high)
    assert (error[inside] <= qparams.scale.double() * (0.5 + 2**-14)).all()
    assert (result[x <= low] == low).all()
    assert (result[x >= high] == high).all()


@given(st.integers(2, 8), st.booleans(), st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32))
def test_affine_parameters_span_the_range_and_hold_zero(bits, signed, one, other):
    low, high, grid = min(one, other), max(one, other), Grid(bits, signed)
    qparams = affine_qparams(low, high, grid)
    assert qparams.scale.dtype == torch.float32
    assert qparams.zero_point.dtype == torch.int32
    assert grid.qmin <= int(qparams.zero_point) <= grid.qmax
    assert float(fake_quantize(torch.zeros(1), qparams, grid)) == 0
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)])
    error = (fake_quantize(ends, qparams, grid) - ends).abs()
    assert (error <= 0.5001 * qparams.scale).all()
    if low >= 0:
        assert int(qparams.zero_point) == grid.qmin
    if high <= 0 and low < -1e-12:
        assert int(qparams.zero_point) == grid.qmax


@given(st.integers(2, 8), st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=4))
def test_symmetric_parameters(bits, thresholds):
    grid, threshold = Grid(bits, True, 0), torch.tensor(thresholds)
    qparams = symmetric_qparams(threshold, grid)
    assert not qparams.zero_point.any()
    assert (qparams.scale >= MIN_SCALE).all()
    codes = quantize(torch.stack([threshold, -threshold], 1), qparams, grid)
    large = threshold > 1e-9
    assert (codes[large, 0] == grid.qmax).all()
    assert (codes[large, 1] == -grid.qmax).all()


def test_all_zero_channels_have_a_scale_whose_product_is_still_normal():
    scale = symmetric_qparams(torch.zeros(2), Grid(4, True, 0)).scale
    assert (scale * scale >= torch.finfo(torch.float32).tiny).all()
    zero = affine_qparams(0.0, 0.0, Grid(8, False))
    assert (zero.scale * scale >= torch.finfo(torch.float32).tiny).all()
    assert float(fake_quantize(torch.zeros(1), zero, Grid(8, False))) == 0


# ---- gradients


@settings(max_examples=50)
@given(quantizers(), st.integers(0, 99))
def test_gradients_are_straight_through_and_lsq(quantizer, seed):
    qparams, grid = quantizer
    x = spread(qparams, grid, seed)
    ratio = x / qparams.scale
    level = torch.round(ratio) + qparams.zero_point
    x = x[(level != grid.qmin) & (level != grid.qmax)]  # at the edge itself either one-sided gradient is right
    ratio = x.double() / qparams.scale.double()
    level = torch.round(x / qparams.scale).double() + qparams.zero_point
    below, above = level < grid.qmin, level > grid.qmax
    x.requires_grad_()
    scale = qparams.scale.clone().requires_grad_()
    weight = torch.linspace(-1, 1, x.numel())
    (fake_quantize(x, QParams(scale, qparams.zero_point), grid) * weight).sum().backward()
    torch.testing.assert_close(x.grad, torch.where(below | above, 0.0, weight), rtol=1e-6, atol=0)
    lsq = level - qparams.zero_point - ratio  # arXiv 1902.08153, equation 3
    lsq = torch.where(below, grid.qmin - qparams.zero_point.double(), lsq)
    lsq = torch.where(above, grid.qmax - qparams.zero_point.double(), lsq)
    expected = float((lsq * weight).sum())
    magnitude = float((lsq.abs() + ratio.abs()).sum()) + 1
    assert float(scale.grad) == pytest.approx(expected, abs=1e-5 * magnitude)


def test_scale_gradient_per_channel_stays_in_its_channel():
    grid = Grid(4, True, 0)
    scale = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    fake_quantize(x, QParams(scale, torch.zeros(3, dtype=torch.int32)), grid)[1].sum().backward()
    assert scale.grad[0] == scale.grad[2] == 0
    assert scale.grad[1] != 0


def test_quantize_has_no_gradient_and_gives_int32():
    codes = quantize(torch.ones(3, requires_grad=True), affine_qparams(-1, 1, Grid(8, False)), Grid(8, False))
    assert codes.dtype == torch.int32
    assert not codes.requires_grad


# ---- biases


def test_bias_is_exact_at_large_integers():
    """Against rational arithmetic, and the value against ONNX Runtime's DequantizeLinear of int32."""
    rng = np.random.default_rng(0)
    scale = np.exp2(rng.uniform(-20, -10, 400)).astype(np.float32)
    wanted = rng.integers(2**24, 2**31 - 2**8, 400) * rng.choice([-1, 1], 400)
    bias = (wanted * scale.astype(np.float64)).astype(np.float32)
    exact = np.array([round(Fraction(float(b)) / Fraction(float(s))) for b, s in zip(bias, scale, strict=True)])
    assert (np.abs(exact) > 2**24).all()
    assert (exact % 2 == 1).sum() > 50  # float32 holds no odd integer of that size
    grid = Grid(32, True, 0)
    qparams = QParams(torch.from_numpy(scale), torch.zeros(400, dtype=torch.int32))
    codes = quantize(torch.from_numpy(bias), qparams, grid).numpy()
    np.testing.assert_array_equal(codes, exact)
    values = runtime_dequantize(codes, qparams, DTYPES["int32"], 0)
    ours = fake_quantize_bias(torch.from_numpy(bias), qparams.scale, grid).numpy()
    np.testing.assert_array_equal(ours, values)


def test_bias_ties_go_to_even_and_ends_saturate():
    scale, grid = torch.tensor(0.5), Grid(32, True)
    bias = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, 1e30, -1e30])
    codes = quantize(bias, QParams(scale, torch.tensor(0)), grid)
    assert codes.tolist() == [0, 2, 2, 0, -2, 2**31 - 1, -(2**31)]
    expected = torch.tensor([0, 1, 1, 0, -1, 2**30, -(2**30)], dtype=torch.float32)
    assert torch.equal(fake_quantize_bias(bias, scale, grid), expected)


def test_bias_gradients():
    """Straight through to the bias; to the scale by LSQ's formula."""
    bias = torch.tensor([0.3, -1.7, 1e30], requires_grad=True)
    scale = torch.tensor([0.5, 0.4, 0.5], requires_grad=True)
    fake_quantize_bias(bias, scale, Grid(32, True, 0)).sum().backward()
    assert bias.grad.tolist() == pytest.approx([1, 1, 0], rel=1e-6)
    assert scale.grad.tolist() == pytest.approx([1 - 0.6, -4 + 4.25, 2**31], rel=1e-5)


def test_with_bits_keeps_the_rest():
    assert Grid(8, True, 1).with_bits(4) == Grid(4, True, 1)


@pytest.mark.parametrize("axis", [None, 0])
def test_fake_quantize_and_its_gradients_can_be_mapped(axis):
    """Over samples, as torch.func.vmap does it: the same values, and the same sums of gradients."""
    grid = Grid(4, axis is not None, axis)
    scale = torch.tensor(0.3) if axis is None else torch.tensor([0.3, 0.1, 0.2])
    zero = torch.full_like(scale, 0 if grid.signed else 5, dtype=torch.int32)
    x = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for mapped in (False, True):
        inputs = x.clone().requires_grad_(), scale.clone().requires_grad_()

        def one(sample, step=inputs[1]):
            return fake_quantize(sample, QParams(step, zero), grid)

        out = torch.func.vmap(one)(inputs[0]) if mapped else torch.stack([one(sample) for sample in inputs[0]])
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), inputs)))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(a, b)
