"""Inputs and outputs whose columns differ in scale: none of them may be lost on a grid that serves the others."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import onnx_eptq
from models import f32, parse, weights
from onnx_eptq import graph as graphs
from onnx_eptq.columns import MOST, Columns, are_served, column_axis
from onnx_eptq.eptq import SPREADS, Judge, _unit
from onnx_eptq.hessian import label_free_hessian
from onnx_eptq.mirror import build, column_factors
from onnx_eptq.plan import linear_layers
from onnx_eptq.prepare import even_inputs, prepare
from onnx_eptq.remarks import LOW_COLUMN, low_fidelity
from onnx_eptq.verify import measure_fidelity

W = weights(3)
SCALES = f32(1e-3, 0.02, 0.3, 1, 10, 60, 400, 3000)
DRAWN = np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)
RAW = SCALES * (2 + DRAWN)
MLP = "a = Gemm(z, w, b) q = Relu(a) y = Gemm(q, v) }"
CONSTANTS = {"mu": 2 * SCALES, "sd": SCALES, "w": W(8, 16, fan=8), "b": W(16), "v": W(16, 3, fan=16)}
FRONTS = {
    "standardised": "c = Sub(x, mu) z = Div(c, sd)",
    "by product and sum": "c = Mul(x, by) z = Add(c, plus)",
    "by BatchNormalization": "z = BatchNormalization <epsilon=0.0> (x, one, zero, mu, var)",
    "clipped in between": "c = Sub(x, mu) d = Clip(c, low, high) z = Div(d, sd)",
    "clipped behind": "c = Sub(x, mu) d = Div(c, sd) z = Clip(d, least, most)",
    "centred only": "z = Sub(x, mu)",
    "raw": "z = Identity(x)",
}
MORE = {
    "by": 1 / SCALES, "plus": np.full(8, -2, np.float32), "one": np.ones(8, np.float32), "zero": np.zeros(8, np.float32),
    "var": SCALES**2, "low": f32(-1e5)[0], "high": f32(1e5)[0], "least": f32(-3)[0], "most": f32(3)[0],
}  # fmt: skip
quantize = onnx_eptq.quantize


def run(model: Any, **feeds: np.ndarray) -> list[np.ndarray]:
    proto = model if isinstance(model, onnx.ModelProto) else graphs.to_model(graphs.copy(model))
    return list(ort.InferenceSession(proto.SerializeToString()).run(None, feeds))


def decibels(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Signal-to-noise ratio of what varies in each column."""
    away = expected.astype(np.float64) - expected.mean(0)
    return 10 * np.log10((away**2).sum(0) / ((expected - found).astype(np.float64) ** 2).sum(0))


def mlp(front: str, scale: np.ndarray = SCALES) -> onnx.ModelProto:
    used = {
        name: value for name, value in {**CONSTANTS, **MORE}.items() if name in front.split("z =")[-1] or name in front
    }
    # Behind raw or only centred columns the weights bring them to one scale.
    layer = {
        "w": CONSTANTS["w"] / (scale[:, None] if "sd" not in front and "by" not in front and "var" not in front else 1)
    }
    text = f"(float[N,8] x) => (float[N,3] y) {{ {front} {MLP}"
    return parse(text, **{**{name: CONSTANTS[name] for name in ("w", "b", "v")}, **used, **layer})


@pytest.mark.parametrize("front", FRONTS)
def test_columns_of_an_input_keep_what_each_of_them_says(front: str) -> None:
    model = mlp(FRONTS[front])
    result = quantize(model, RAW, method="rtn", threads=1)
    (expected,), (found,) = run(model, x=RAW), run(result.model, x=RAW)
    assert decibels(expected, found).min() > 28
    assert "evens out the columns of 'x'" in result.plan.floats["x"]
    assert result.report.coverage.complete


# Fronts, and how many times as far as the first two columns the others reach: whether they stay float.
LITTLE = {
    ("standardised", 1.2): False,
    ("standardised", 3): True,
    ("standardised", 8): True,
    ("raw", 8): False,
    ("scaled alike", 8): False,
    ("scaled apart", 3): False,
    ("raw", 40): True,
}


@pytest.mark.parametrize(("front", "ratio"), LITTLE)
def test_columns_that_differ_little_are_scaled_where_the_model_does_it(front: str, ratio: float) -> None:
    """What lies on an eighth of the grid has some 30 steps: a model that makes as much of it as of the others needs more."""
    scale = f32(1, 1, *[ratio] * 6)
    more = {
        "standardised": {"mu": 2 * scale, "sd": scale},
        "scaled alike": {"by": f32(0.1)},
        "scaled apart": {"by": scale},
    }
    text = {"scaled alike": "z = Mul(x, by)", "scaled apart": "z = Mul(x, by)"}.get(front) or FRONTS[front]
    model = parse(
        f"(float[N,8] x) => (float[N,3] y) {{ {text} {MLP}",
        **{name: CONSTANTS[name] for name in ("w", "b", "v")}, **more.get(front, {}),
    )  # fmt: skip
    x = scale * (2 + DRAWN)
    result = quantize(model, x, method="rtn", threads=1)
    assert ("x" in result.plan.floats) == LITTLE[front, ratio]
    if front == "standardised":
        (expected,), (found,) = run(model, x=x), run(result.model, x=x)
        assert decibels(expected, found).min() > 34
    if front == "standardised" and ratio > 2:  # what is quantized in place of an input is as wide as one
        narrow = quantize(model, x, method="rtn", act_bits=4, threads=1).plan
        assert {narrow[name].grid.bits for name in narrow if narrow[name].role == "activation"} == {4, 8}
        assert narrow["z"].grid.bits == 8


@pytest.mark.parametrize(("offset", "float_output"), [(0, False), (10, False), (60, True), (300, True), (1000, True)])
def test_outputs_that_vary_little_beside_their_size_stay_float(offset: float, float_output: bool) -> None:
    model = three_outputs(f"z = Identity(x) {MLP[:-1]} o = Identity(y) }}".replace("y =", "h =").replace(
        "o = Identity(y)", "y = Add(h, far)"), far=np.full(3, offset, np.float32))  # fmt: skip
    result = quantize(model, DRAWN, method="rtn", threads=1)
    assert ("y" in result.plan.floats) == float_output
    if float_output:
        assert "far from zero" in result.plan.floats["y"]
    assert ("y" in result.report.fidelity.agreement) == (offset < 300)  # scores may lie apart, but not on one step
    (expected,), (found,) = run(model, x=DRAWN), run(result.model, x=DRAWN)
    assert decibels(expected, found).min() > 25


@pytest.mark.parametrize(
    ("rows", "share", "float_output"),
    [
        ("[N,3]", 1, False),
        ("[N,3]", 0.15, False),
        ("[N,3]", 0.05, True),
        ("[N,8,3]", 0.05, False),
        ("[N,8,3]", 0.003, True),
    ],
)
def test_small_columns_of_outputs_are_lost_in_rows_of_numbers(rows: str, share: float, float_output: bool) -> None:
    """0.05 of the grid is 12 steps: too few for a quantity, and what the scores of a rare class may come to in a map."""
    sizes = f32(1, 1, share)
    text = f"(float{rows.replace('3]', '8]')} x) => (float{rows} y) {{ h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }}"
    model = parse(text, w=CONSTANTS["w"], v=(W(16, 3, fan=16) * sizes).astype(np.float32))
    x = np.random.default_rng(0).standard_normal((128, *[8] * rows.count(","))).astype(np.float32)
    assert ("y" in quantize(model, x, method="rtn", threads=1).plan.floats) == float_output


def test_outputs_that_are_read_within_have_a_grid_like_others() -> None:
    model = parse(
        "(float[N,8] x) => (float[N,3] y, float[N,2] z) { h = Gemm(x, w, b) r = Relu(h) a = MatMul(r, v) y = Add(a, far) "
        "z = MatMul(y, u) }", far=f32(300, 300, 300), u=W(3, 2), **{name: CONSTANTS[name] for name in ("w", "b", "v")},
    )  # fmt: skip
    result = quantize(model, DRAWN, method="rtn", threads=1)
    assert "y" in result.plan
    assert "y" in result.report.fidelity.agreement


def three_outputs(text: str, **constants: Any) -> onnx.ModelProto:
    """A model of eight columns in front of these nodes and three behind, with those of the constants that they name."""
    constants |= {name: CONSTANTS[name] for name in ("w", "b", "v")}
    used = {name: value for name, value in constants.items() if re.search(rf"\b{name}\b", text)}
    model = parse(f"(float[N,8] x) => (float[N,3] y) {{ {text}", **used)
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 1))
    return model


APART = {
    "split": "l, r = Split <axis=1, num_outputs=2> (x) m = Mul(l, by_l) n = Div(r, sd_r) z = Concat <axis=1> (m, n)",
    "gathered": "l = Gather <axis=1> (x, left) r = Gather <axis=1> (x, right) m = Mul(l, by_l) n = Div(r, sd_r)"
    " z = Concat <axis=1> (m, n)",
    "extracted": "l = ai.onnx.ml.ArrayFeatureExtractor(x, left) r = ai.onnx.ml.ArrayFeatureExtractor(x, right)"
    " m = Mul(l, by_l) n = Div(r, sd_r) z = Concat <axis=1> (m, n)",
    "scaled as tables are": "z = ai.onnx.ml.Scaler <offset=[0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0], scale=SCALE> (x)",
    "beside categories": "l = Gather <axis=1> (x, right) i = Cast <to=7> (l) k = Cast <to=1> (i) o = Mul(k, nothing)"
    " m = Mul(x, by) p = Concat <axis=1> (o, o) z = Add(m, p)",
    "beside a part that nobody reads": "k = Concat <axis=1> (x, x) l, u = Split <axis=1> (k, eights) z = Mul(l, by)",
    "beside a part as it is": "l, r = Split <axis=1> (x, one_seven) m = Mul(r, by_seven) z = Concat <axis=1> (l, m)",
    "with numbers for what is missing": "n = IsNaN(x) l = Where(n, nothing, x) z = Mul(l, by)",
    "beside bins": "l = Gather <axis=1> (x, right) i = Less(l, sd_r) k = Cast <to=1> (i) o = Mul(k, nothing)"
    " m = Mul(x, by) p = Concat <axis=1> (o, o) z = Add(m, p)",
}


@pytest.mark.parametrize("front", APART)
def test_columns_that_are_scaled_apart_keep_what_each_of_them_says(front: str) -> None:
    text = APART[front].replace("SCALE", str([round(float(1 / scale), 9) for scale in SCALES]))
    model = three_outputs(
        f"{text} {MLP}", by=1 / SCALES, by_l=1 / SCALES[:4], sd_r=SCALES[4:], by_seven=1 / SCALES[1:], nothing=f32(0),
        eights=np.array([8, 8]), one_seven=np.array([1, 7]), left=np.arange(4), right=np.arange(4, 8),
    )  # fmt: skip
    result = quantize(model, RAW, method="rtn", threads=1)
    (expected,), (found,) = run(model, x=RAW), run(result.model, x=RAW)
    assert decibels(expected, found).min() > 28
    assert "x" in result.plan.floats


SIZED = {
    "layer": "z = LayerNormalization(x, one, zero)",
    "instance": "u = Unsqueeze(x, at) n = InstanceNormalization(u, one_1, zero_1) z = Squeeze(n, at)",
    "largest": "k = Abs(x) m = ReduceMax(k, at) s = Add(m, tiny) z = Div(x, s)",
    "in pieces, undone behind": "m = ReduceMean(x, at) c = Sub(x, m) k = Mul(c, c) h = ReduceMean(k, at) e = Add(h, tiny)"
    " s = Sqrt(e) z = Div(c, s)",
}


@pytest.mark.parametrize("front", SIZED)
def test_samples_of_every_size_keep_what_each_of_them_says(front: str) -> None:
    tail = MLP.replace("y =", "o =").replace("}", "t = Mul(o, s) y = Add(t, m) }") if "undone" in front else MLP
    model = three_outputs(
        f"{SIZED[front]} {tail}", one=np.ones(8, np.float32), zero=np.zeros(8, np.float32), one_1=f32(1), zero_1=f32(0),
        at=np.array([1]), tiny=f32(1e-6),
    )  # fmt: skip
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((256, 8)) * 10 ** rng.uniform(-1.5, 1.5, (256, 1))).astype(np.float32)
    result = quantize(model, x, method="rtn", threads=1)
    assert "x" in result.plan.floats
    assert not any("take them out" in warning for warning in result.report.warnings)
    (expected,), (found,) = run(model, x=x), run(result.model, x=x)
    each = 10 * np.log10((expected**2).sum(1) / ((expected - found) ** 2).sum(1))
    assert np.median(each) > 25


def test_samples_of_one_size_are_quantized_before_they_are_normalized() -> None:
    model = three_outputs(f"z = LayerNormalization(x, one) {MLP}", one=np.ones(8, np.float32))
    assert "x" in quantize(model, DRAWN, method="rtn", threads=1).plan


def test_a_scaler_before_a_padded_convolution_stays_float() -> None:
    scales = f32(1e-3, 1, 1000)
    x = (scales[:, None] * (3 + np.random.default_rng(1).standard_normal((64, 3, 20)))).astype(np.float32)
    text = "(float[N,3,20] x) => (float[N,4,20] y) { c = Sub(x, mu) z = Div(c, sd) y = Conv <pads=[1,1]> (z, w) }"
    model = parse(text, mu=3 * scales[:, None], sd=scales[:, None], w=W(4, 3, 3))
    result = quantize(model, x, method="rtn", threads=1)
    (expected,), (found,) = run(model, x=x), run(result.model, x=x)
    assert 10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum()) > 30
    assert {"x", "c"} <= result.plan.floats.keys()
    assert not {"mu", "sd"} & result.plan.keys()


def test_images_keep_one_grid_and_their_normalisation_is_folded() -> None:
    x = np.random.default_rng(2).integers(0, 256, (32, 3, 8, 8)).astype(np.float32)
    mean, std = (f32(*v).reshape(3, 1, 1) for v in ((123, 116, 103), (58, 57, 57)))
    text = "(float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Sub(x, m) z = Div(c, s) y = Conv(z, w) }"
    result = quantize(parse(text, m=mean, s=std, w=W(4, 3, 3, 3)), x, method="rtn", threads=1)
    assert "x" in result.plan
    assert not result.plan.floats


def test_raw_columns_are_scaled_before_their_layers_and_the_float_graph_computes_the_same() -> None:
    x = np.concatenate([RAW, 1e4 + 10 * DRAWN[:, :1]], 1)
    text = "(float[N,9] x) => (float[N,4] y, float[N,2] u) { y = Gemm(x, w, b) u = Gemm <transB=1> (x, v, c) }"
    model = parse(text, w=W(9, 4) / x.std(0)[:, None], b=W(4), v=W(2, 9) / x.std(0), c=W(2))
    graph = graphs.load(model)
    prepare(graph)
    assert even_inputs(graph, {"x": (x.min(0).astype(float), x.max(0).astype(float))}) == 1
    assert [node.op for node in graph.nodes] == ["Sub", "Mul", "Gemm", "Gemm"]
    factors = graph.nodes[1].inputs[1].values
    assert np.array_equal(np.log2(factors), np.round(np.log2(factors)))
    scaled = (x - graph.nodes[0].inputs[1].values) * factors
    assert 0.5 <= np.abs(scaled).max(0).min() <= np.abs(scaled).max() <= 2
    for expected, found in zip(run(model, x=x), run(graph, x=x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-3 * np.abs(expected).max())
    result = quantize(model, x, method="rtn", threads=1)
    for expected, found in zip(run(model, x=x), run(result.model, x=x), strict=True):
        assert decibels(expected, found).min() > 28
    other = graphs.load(parse("(float[N,8] x) => (float[N,8] y) { r = Relu(x) y = Gemm(r, w) }", w=W(8, 8)))
    assert even_inputs(other, {"x": (RAW.min(0).astype(float), RAW.max(0).astype(float))}) == 0  # no layer reads it


TARGETS = f32(10, 2000, 2e-3), f32(295, 101325, 2e-3)


def regressor() -> onnx.ModelProto:
    sd, mu = TARGETS
    text = "(float[N,8] x) => (float[N,3] y) { a = Gemm(x, w, b) q = Relu(a) y = Gemm(q, v, m) }"
    return parse(text, w=CONSTANTS["w"], b=CONSTANTS["b"], v=CONSTANTS["v"] * sd, m=mu)


def test_an_output_that_hardly_varies_is_float_for_that_reason() -> None:
    text = "(float[N,8] x) => (float[N,1] y) { a = Gemm(x, w, b) q = Relu(a) y = Gemm(q, v, m) }"
    column = 0.01 * CONSTANTS["v"][:, :1]
    model = parse(text, w=CONSTANTS["w"], b=CONSTANTS["b"], v=column, m=np.full(1, 300, np.float32))
    result = quantize(model, DRAWN, method="rtn", threads=1)
    assert "varies little beside its size" in result.plan.floats["y"]
    (expected,), (found,) = run(model, x=DRAWN), run(result.model, x=DRAWN)
    assert decibels(expected, found).min() > 28


@pytest.mark.parametrize("method", ["rtn", "eptq", "adaquant"])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_column_of_an_output_is_lost_or_learned_away(method: str, bits: int) -> None:
    model = regressor()
    result = quantize(model, DRAWN, method=method, weight_bits=bits, threads=1, steps=40 if method != "rtn" else None)
    (expected,), (found,) = run(model, x=DRAWN), run(result.model, x=DRAWN)
    assert decibels(expected, found).min() > (28 if bits == 8 else 15)
    assert "columns differ in scale" in result.plan.floats["y"]
    assert result.report.fidelity.agreement == {}  # quantities, no classes


def test_scales_behind_the_last_activation_stay_float_with_their_output() -> None:
    sd, mu = TARGETS
    text = "(float[N,8] x) => (float[N,3] y) { a = Gemm(x, w, b) q = Tanh(a) p = Mul(q, sd) y = Add(p, mu) }"
    model = parse(text, w=W(8, 3), b=W(3), sd=sd, mu=mu)
    result = quantize(model, DRAWN, method="rtn", threads=1)
    (expected,), (found,) = run(model, x=DRAWN), run(result.model, x=DRAWN)
    assert decibels(expected, found).min() > 30
    assert not {"sd", "mu", "p", "y"} & result.plan.keys()
    assert "gives the columns of 'y' their scales" in result.plan.floats["p"]


def test_shares_and_class_scores_are_no_columns_of_different_scale() -> None:
    skewed = DRAWN * f32(4, 1, 1, 1, 1, 1, 1, 1)
    for end in ("y = Softmax(s)", "y = Sigmoid(s)", "y = Identity(s)"):
        model = parse(f"(float[N,8] x) => (float[N,3] y) {{ s = Gemm(x, w, b) {end} }}", w=W(8, 3), b=f32(0, -4, -6))
        assert "y" in quantize(model, skewed, method="rtn", threads=1).plan


def test_ranges_of_columns() -> None:
    seen = Columns()
    for rows in (RAW[:100], RAW[100:]):
        seen.add(rows)
    assert np.array_equal(seen.low, RAW.min(0).astype(float))
    assert np.array_equal(seen.high, RAW.max(0).astype(float))
    assert not seen.are_served(16)
    assert Columns().are_served(16)
    assert are_served(
        np.array([0.0, 0, 0.5]), np.array([1.0, 0.07, 0.5]), 16
    )  # 17.85 steps; the last one does not vary
    assert not are_served(np.array([0.0, 0]), np.array([1.0, 0.05]), 16)
    assert not are_served(np.array([9990.0]), np.array([10010.0]), 4)  # half a step: the grid reaches down to zero
    steps = np.zeros(2), np.array([0.2, 0.3])  # of the grid up to 1.0 that the third column asks for: 51 and 76
    assert are_served(np.append(steps[0], 0.9), np.append(steps[1], 1.0), 16, 64)
    assert not are_served(np.append(steps[0], 0.9), np.append(steps[1], 1.0), 16, 80)
    assert are_served(np.array([5.0]), np.array([5.0]), 16, 64)  # nothing varies
    for shape, axis in (
        ((4,), None),
        ((4, 3), 1),
        ((4, MOST + 1), None),
        ((4, 9, 3), 2),
        ((4, 3, 9), 1),
        ((4, 5, 8, 8), 1),
    ):
        assert column_axis(shape) == axis
    open_ = Columns()
    open_.add(np.ones((2, 3), np.float32))
    open_.add(np.full((2, 5), 7, np.float32))
    assert (open_.low.tolist(), open_.high.tolist()) == ([1], [7])
    broken = Columns()
    broken.add(f32(1, np.inf)[None])
    assert broken.are_served(16)


def test_students_are_judged_by_every_column() -> None:
    model = regressor()
    graph = graphs.load(model)
    prepare(graph)
    teacher, student = build(graph), build(graph)
    samples = [torch.from_numpy(DRAWN)]
    bias = next(name for name in student.constants if student.constant(name).shape == (3,))
    with torch.no_grad():
        student.constant(bias)[2] += 2e-3  # one standard deviation, about, of the smallest column
    assert Judge(teacher, graph, ["y"], samples, 32).distance(student) < 1e-9
    plain, _ = label_free_hessian(teacher, graph, linear_layers(graph), samples)
    graphs.extras(graph).uneven = ["y"]
    teacher = build(graph)
    judge = Judge(teacher, graph, ["y"], samples, 32)
    (y,) = run(model, x=DRAWN)
    assert judge.distance(student) == pytest.approx((2e-3 / y[:, 2].astype(float).std()) ** 2 / 3, rel=0.02)
    factors = column_factors(teacher, ["y"], [torch.from_numpy(y)])["y"]
    np.testing.assert_allclose(factors.numpy(), 1 / y.astype(float).std(0, keepdims=True), rtol=1e-3)
    assert not column_factors(teacher, ["a"], [torch.from_numpy(y)])
    # The Jacobian of y counts column by column: here that of the second one was all.
    counted, _ = label_free_hessian(teacher, graph, linear_layers(graph), samples)
    name = linear_layers(graph)[0].output.name
    jacobian = CONSTANTS["v"].astype(float) * TARGETS[0] / y.astype(float).std(0)
    hidden = np.maximum(DRAWN @ CONSTANTS["w"] + CONSTANTS["b"], 0) > 0
    expected = hidden @ (jacobian**2).sum(1)
    assert np.corrcoef(counted[name].numpy(), expected)[0, 1] > 0.999
    assert np.corrcoef(plain[name].numpy(), expected)[0, 1] < 0.99


def test_biases_are_learned_in_units_of_what_varies_in_their_channel() -> None:
    model = regressor()
    graph = graphs.load(model)
    prepare(graph)
    layer = linear_layers(graph)[-1]
    (y,) = run(model, x=DRAWN)
    unit = _unit(layer, torch.from_numpy(y)).numpy()
    rms = np.sqrt((y.astype(float) ** 2).mean())
    np.testing.assert_allclose(unit, np.minimum(rms, SPREADS * y.astype(float).std(0)), rtol=0.01)
    assert unit[2] < 1e-6 * unit[1]
    even = torch.randn(64, 3)
    assert _unit(layer, even).tolist() == [float(even.square().mean().sqrt())] * 3
    assert _unit(layer, even[:1]).ndim == 0  # of one number nothing varies


def test_fidelity_names_the_column_that_the_others_hide() -> None:
    model = regressor()
    blurred = onnx.ModelProto()
    blurred.CopyFrom(model)
    blurred.graph.output[0].name = blurred.graph.node[-1].output[0] = "sum"
    blurred.graph.node.append(onnx.helper.make_node("Floor", ["sum"], ["y"]))
    blurred.graph.output[0].name = "y"
    batches = [{"x": DRAWN[:100]}, {"x": DRAWN[100:]}]
    fidelity = measure_fidelity(model, blurred, batches, 1)
    (y,), (floored,) = run(model, x=DRAWN), run(blurred, x=DRAWN)
    expected = decibels(y, floored)
    index, found = fidelity.worst["y"]
    assert index == expected.argmin() == 2
    assert found == pytest.approx(float(expected.min()), abs=0.02)
    assert found < LOW_COLUMN
    (warning,) = low_fidelity(fidelity, "")
    assert "column 2" in warning
    assert fidelity.sqnr_db["y"] > 40
    same = measure_fidelity(model, model, batches, 1)
    assert not low_fidelity(same, "")


def test_constants_beside_float_values_or_asked_for_stay_float() -> None:
    text = "(float[N,8] x) => (float[N,3] y) { c = Mul(x, k) z = Relu(c) s = Mul(z, l) t = Tanh(s) y = Gemm(t, w) }"
    model = parse(text, k=W(8), l=W(8), w=W(8, 3))
    usual = quantize(model, DRAWN, method="rtn", threads=1).plan
    assert {"k", "l"} <= usual.keys()
    asked = quantize(model, DRAWN, method="rtn", threads=1, keep_float=("l",)).plan
    assert asked.floats["l"] == "kept float as asked"
    assert "k" in asked
    beside = quantize(model, DRAWN, method="rtn", threads=1, keep_float=("x",)).plan
    assert "k" not in beside
