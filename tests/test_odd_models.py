"""Legal but unusual models: each is quantized and verified, or refused in one sentence."""

import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
import torch

import onnx_eptq
from models import f32, heed_sigint, i64, parse, weights
from onnx_eptq.errors import DataError, ModelError, OutputError, UsageError
from onnx_eptq.graph import is_mask, ruled_out
from onnx_eptq.plan import Plan

ROOT = Path(__file__).parents[1]
W, DRAW = weights(5), weights(6)


@pytest.fixture(autouse=True)
def same_weights() -> None:
    """What a test draws does not depend on the tests before it."""
    W.restart()
    DRAW.restart()


quantize = partial(onnx_eptq.quantize, method="rtn")  # learning has tests of its own
ATTENTION = """(float[N,6,8] x) => (float[N,6,8] y) {
  q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) t = Transpose <perm=[0,2,1]> (k)
  s = MatMul(q, t) m = %s p = Softmax <axis=-1> (m) y = MatMul(p, v) }"""


def attention(masked: str, mask: np.ndarray) -> onnx.ModelProto:
    return parse(ATTENTION % masked, mask=mask, wq=W(8, 8), wk=W(8, 8), wv=W(8, 8), keep=np.tril(np.ones((6, 6), bool)))


def causal(value: float) -> np.ndarray:
    return np.triu(np.full((6, 6), value, np.float32), 1) if np.isfinite(value) else np.where(np.tri(6), 0, value)


MODELS = {
    "conv without bias": parse("(float[N,3,8,8] x) => (float[N,4,6,6] y) { y = Conv(x, w) }", w=W(4, 3, 3, 3)),
    "conv 1-D without bias": parse("(float[N,3,8] x) => (float[N,4,6] y) { y = Conv(x, w) }", w=W(4, 3, 3)),
    "conv 3-D without bias": parse(
        "(float[N,2,5,5,5] x) => (float[N,4,3,3,3] y) { y = Conv(x, w) }", w=W(4, 2, 3, 3, 3)
    ),
    "grouped transposed conv": parse(
        "(float[N,4,5,5] x) => (float[N,6,7,7] y) { y = ConvTranspose <group=2> (x, w) }", w=W(4, 3, 3, 3)
    ),
    "gemm without bias": parse("(float[N,4] x) => (float[N,5] y) { y = Gemm(x, w) }", w=W(4, 5)),
    "gemm with a row of biases": parse("(float[N,4] x) => (float[N,5] y) { y = Gemm(x, w, c) }", w=W(4, 5), c=W(1, 5)),
    "constant on the left": parse("(float[N,4,3] x) => (float[N,5,3] y) { y = MatMul(w, x) }", w=W(5, 4)),
    "shared weight": parse(
        "(float[N,4] x, float[N,4] z) => (float[N,4] y, float[N,4] u) { a = MatMul(x, w) y = Relu(a) u = MatMul(z, w) }",
        w=W(4, 4),
    ),
    "consumed output": parse(
        "(float[N,4] x) => (float[N,4] a, float[N,4] y) { a = MatMul(x, w) y = Relu(a) }", w=W(4, 4)
    ),
    "zero channel, huge bias": parse(
        "(float[N,3] x) => (float[N,2] y) { y = Gemm <transB=1> (x, w, b) }",
        w=np.array([[0, 0, 0], [1, -1, 0.5]], np.float32),
        b=f32(1e6, 0.1),
    ),
    "embedding": parse(
        "(int64[N,3] x) => (float[N,3,4] y) { e = Gather(table, x) y = MatMul(e, w) }", table=W(10, 8), w=W(8, 4)
    ),
    "fixed batch": parse(
        "(float[4,6] x) => (float[4,2] y) { r = Reshape(x, s) h = MatMul(r, w) f = Reshape(h, t) y = MatMul(f, u) }",
        s=i64(4, 3, 2),
        t=i64(4, 6),
        w=W(2, 2),
        u=W(6, 2),
    ),
}


def outputs_of(model: onnx.ModelProto, data: dict[str, np.ndarray]) -> np.ndarray:
    """The first output, by ONNX Runtime at full optimisation."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, data)[0]
    return found


def samples(model: onnx.ModelProto, count: int = 32) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    found = {}
    for value in model.graph.input:
        shape = [count, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])]
        whole = value.type.tensor_type.elem_type == onnx.TensorProto.INT64
        found[value.name] = (
            generator.integers(0, 10, shape) if whole else generator.normal(size=shape).astype(np.float32)
        )
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_odd_models_are_quantized_and_verified(name: str, bits: int) -> None:
    model = MODELS[name]
    report = quantize(model, samples(model), weight_bits=bits, threads=1).report
    assert report.coverage.complete
    assert report.fidelity is not None
    assert min(report.fidelity.sqnr_db.values()) > (12 if bits == 4 else 28)


@pytest.mark.parametrize("value", [-1e4, -1e9, -3.4e38, -np.inf])
@pytest.mark.parametrize("masked", ["Add(s, mask)", "Where(keep, s, low)"])
def test_masks_do_not_eat_the_grid_of_the_scores(masked: str, value: float) -> None:
    model = attention(masked, causal(value).astype(np.float32))
    if "low" in masked:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), "low"))
    report = quantize(model, samples(model), weight_bits=8, threads=1).report
    assert report.coverage.complete
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db["y"] > 28
    assert any("mask" in reason or "between" in reason for reason in report.coverage.float_values.values())


@pytest.mark.parametrize("length", ["6", "L"])
@pytest.mark.parametrize("value", [-3.4e38, -np.inf])
@pytest.mark.parametrize(
    "made",
    [
        "big = ConstantOfShape <value=float[1] {VALUE}> (square) mask = Trilu <upper=1> (big, one)",
        "big = Expand (low, square) cut = Trilu <upper=1> (big, one) mask = Unsqueeze (cut, none)",
        "big = Expand (low, square) cut = Trilu <upper=1> (big, one) place = Range(nought, l, step) "
        "row = Unsqueeze(place, none) column = Unsqueeze(place, last) later = Greater(row, column) on = Cast <to=1> (later) "
        "mask = Mul(cut, on)",
        "big = Where(yes, low, zero) wide = Expand(big, square) mask = Trilu <upper=1> (wide, one)",
    ],
    ids=["constant of shape", "expanded", "multiplied", "chosen"],
)
def test_masks_that_are_made_in_the_graph_keep_the_future_out(made: str, value: float, length: str) -> None:
    if "Mul" in made and np.isinf(value):
        pytest.skip("infinity times zero is no number")
    made = (
        f"sh = Shape(x) l2 = Gather(sh, at) l = Squeeze(l2) square = Concat <axis=0> (l2, l2) {made} m = Add(s, mask)"
    )
    text = ATTENTION.replace("N,6,8", f"N,{length},8").replace("m = %s", made)
    constants = {
        "one": np.int64(1), "none": i64(0), "last": i64(1), "at": i64(1), "low": np.float32(value), "yes": np.bool_(True),
        "zero": np.float32(0), "nought": np.int64(0), "step": np.int64(1), "wq": DRAW(8, 8), "wk": DRAW(8, 8), "wv": DRAW(8, 8),
    }  # fmt: skip
    used = {name: array for name, array in constants.items() if f"{name}" in text}
    model = parse(text.replace("VALUE", "0"), **used)
    for node in model.graph.node:
        if node.op_type == "ConstantOfShape":
            node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(f32(value)))
    x = np.random.default_rng(4).standard_normal((64, 6, 8)).astype(np.float32)
    result = quantize(model, x, weight_bits=8, threads=1)
    assert result.report.fidelity is not None
    assert result.report.fidelity.sqnr_db["y"] > 28
    written = ort.InferenceSession(result.model.SerializeToString())
    changed = x.copy()
    changed[:, 3:] += 1
    (first,), (second,) = written.run(None, {"x": x}), written.run(None, {"x": changed})
    assert np.array_equal(first[:, :3], second[:, :3])  # what comes later changes nothing before


YOUNGER = {
    "Attention": (23, "y = Attention <q_num_heads=2, kv_num_heads=2, is_causal=1> (q, k, v)"),
    "grouped Attention of opset 24": (24, "h = MatMul(x, wh) g = MatMul(x, wg) "
                                          "y = Attention <q_num_heads=2, kv_num_heads=1> (q, h, g)"),
    "RMSNormalization": (23, "n = RMSNormalization(q, scale) y = MatMul(n, wk)"),
    "RotaryEmbedding": (23, "r = RotaryEmbedding <num_heads=2> (q, cosine, sine) y = MatMul(r, wk)"),
    "Swish": (24, "s = Swish <alpha=1.5> (q) y = MatMul(s, wk)"),
    "ReduceMean": (23, "m = ReduceMean <keepdims=1> (q, axis) y = Add(q, m)"),
}  # fmt: skip


@pytest.mark.parametrize("name", YOUNGER)
def test_operators_of_young_opsets_are_written_out(name: str) -> None:
    opset, body = YOUNGER[name]
    constants = {
        "wq": DRAW(8, 8), "wk": DRAW(8, 8), "wv": DRAW(8, 8), "wh": DRAW(8, 4), "wg": DRAW(8, 4), "scale": 1 + 0.1 * DRAW(8),
        "cosine": np.cos(np.arange(12, dtype=np.float32)).reshape(1, 6, 2).repeat(4, 0),
        "sine": np.sin(np.arange(12, dtype=np.float32)).reshape(1, 6, 2).repeat(4, 0), "axis": i64(1),
    }  # fmt: skip
    text = f"(float[4,6,8] x) => (float[4,6,8] y) {{ q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) {body} }}"
    model = parse(text, opset=opset, **{name: array for name, array in constants.items() if name in text})
    x = np.random.default_rng(4).standard_normal((64, 6, 8)).astype(np.float32)
    result = quantize(model, x, weight_bits=8, threads=1)
    assert result.report.fidelity is not None
    assert result.report.fidelity.sqnr_db["y"] > 28
    assert not result.report.islands
    assert {(o.domain, o.version) for o in result.model.opset_import} == {("", 21)}


@pytest.mark.parametrize(
    "scaled",
    [
        "s = MatMul(r, w) z = Mul(s, thirty)",
        "s = MatMul(r, w) z = BatchNormalization(s, gamma, beta, beta, gamma)",
        "s = MatMul(r, w) m = Reshape(s, same) z = Mul(m, thirty)",
    ],
)
def test_scores_that_are_scaled_before_some_are_picked_are_compared_as_scaled(scaled: str) -> None:
    text = f"(float[N,8] x) => (float[N,2] y, int64[N,2] i) {{ r = Relu(x) {scaled} y, i = TopK(z, two) }}"
    constants = {"thirty": f32(30).reshape(()), "gamma": f32(*[900] * 6), "beta": f32(*[0] * 6), "same": i64(-1, 6)}
    used = {name: array for name, array in constants.items() if name in scaled}
    result = quantize(parse(text, w=W(8, 6), two=i64(2), **used), DRAW(64, 8), weight_bits=8, threads=1)
    fidelity = result.report.fidelity
    assert fidelity is not None
    assert fidelity.selected == {"y": ["z"], "i": ["z"]}
    assert fidelity.sqnr_db["z"] > 30
    assert not result.report.warnings
    assert not {"s", "m"} & set(result.plan)  # they are other values now, under other names


def test_lists_of_tensors_are_read_as_tensors() -> None:
    model = parse(
        """(float[1,32] x) => (float[1,10] y) {
          a = MatMul(x, w) s = SplitToSequence <axis=1> (a, twelve) p = SequenceAt(s, one) q = ConcatFromSequence <axis=1> (s)
          r = Relu(q) z = MatMul(r, v) m = ReduceMean <keepdims=1> (p) y = Add(z, m) }""",
        w=W(32, 24), v=W(24, 10), twelve=np.int64(12), one=np.int64(1),
    )  # fmt: skip
    result = quantize(model, DRAW(64, 32), weight_bits=8, threads=1)
    assert result.report.coverage.complete
    assert not result.report.islands
    assert result.report.fidelity is not None
    assert result.report.fidelity.sqnr_db["y"] > 30


@pytest.mark.parametrize("value", [-1e4, -1e9, -np.inf])
@pytest.mark.parametrize(
    "end",
    [
        "y = Gemm(x, w, mask)",
        "s = MatMul(x, w) y = Add(s, mask)",
        "s = MatMul(x, w) r = Relu(s) y = Add(r, mask)",
        "s = MatMul(x, w) y = Where(keep, s, low)",
        "s = MatMul(x, w) y = Where(keep, s, low) p = Softmax(y)",
    ],
)
def test_scores_beside_a_mask_are_outputs_as_exact_as_without_it(end: str, value: float) -> None:
    mask = np.array([0, value, 0, 0], np.float32)
    outputs = "float[N,4] y, float[N,4] p" if "p =" in end else "float[N,4] y"
    constants = {"w": W(4, 8).T.copy(), "mask": mask, "keep": mask == 0, "low": f32(value)}
    model = parse(f"(float[N,8] x) => ({outputs}) {{ {end} }}", **constants)
    data = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    result = onnx_eptq.quantize(model, data, weight_bits=8, effort="fast", threads=1)
    assert result.report.coverage.complete
    assert result.plan.floats["y"]
    assert result.report.learning is not None
    assert 0 < result.report.learning.distances["rtn"] < 0.01
    assert result.report.fidelity.masked == {"y": 25.0}
    assert "25.0 % of it masked and left out" in str(result.report)
    ours, theirs = (
        onnx.reference.ReferenceEvaluator(each).run(["y"], {"x": data})[0] for each in (result.model, model)
    )
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], atol=0.1)
    np.testing.assert_allclose(ours[:, [0, 2, 3]], theirs[:, [0, 2, 3]], atol=0.1)


@pytest.mark.parametrize("end", ["y = Where(keep, s, low)", "y = Add(s, mask)", "r = Relu(s) y = Add(r, mask)"])
def test_scores_before_a_mask_keep_the_bits_of_an_output(end: str) -> None:
    mask = f32(0, -1e9, 0, 0)
    text = "(float[N,8] x) => (float[N,4] y) { s = MatMul(x, w) " + end + " }"
    model = parse(text, w=W(4, 8).T.copy(), mask=mask, keep=mask == 0, low=f32(-1e9))
    data = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    result = quantize(model, data, act_bits=4, threads=1)
    (scores,) = {"s", "r"} & set(result.plan)
    assert result.plan[scores].grid.bits == 8
    assert result.plan[scores].whole_range
    assert scores == ("r" if "Relu" in end else "s")
    assert result.report.fidelity is not None
    assert 25 < result.report.fidelity.sqnr_db["y"] < 80  # of the scores: beside -1e9, no error would count


def test_numbers_and_infinity_rule_out_together() -> None:
    text = "(float[N,8] x) => (float[N,5] y) { h = Gemm(x, w, b) r = Relu(h) q = Gemm(r, v) y = Add(q, mask) }"
    model = parse(text, w=W(8, 16), b=W(16), v=W(16, 5), mask=f32(0, -np.inf, 0, -1e9, 0))
    data = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    result = quantize(model, data, weight_bits=8, threads=1, method="rtn")
    assert 25 < result.report.fidelity.sqnr_db["y"] < 80


def test_what_moves_a_masked_output_stays_float_too() -> None:
    text = "(float[N,8] x) => (float[N,4] y, float[N,2,2] p) { y = Gemm(x, w, mask) p = Reshape(y, shape) }"
    model = parse(text, w=W(4, 8).T.copy(), mask=f32(0, -1e9, 0, 0), shape=i64(-1, 2, 2))
    data = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    result = quantize(model, data, threads=1)
    assert {"y", "p"} <= set(result.plan.floats)


@pytest.mark.parametrize("value", [-1e4, -np.inf])
def test_a_bias_that_closes_a_channel_is_no_mask(value: float) -> None:
    model = parse(
        "(float[N,4] x) => (float[N,4] y) { s = Gemm <transB=1> (x, w, b) y = Relu(s) }",
        w=W(4, 4),
        b=f32(0, -1e4, 0, 0),
    )
    result = quantize(model, samples(model), threads=1)
    assert result.report.coverage.complete
    assert not result.plan.floats


def test_what_is_a_mask() -> None:
    assert is_mask(f32(0, -1e4, 0))
    assert is_mask(np.float32(-np.inf))
    assert not is_mask(f32(0.5, -2, 3))
    assert not is_mask(f32(1e4, 2e4))
    assert not is_mask(f32(-1e4, 500, 20))
    assert ruled_out(f32(0, -1e4, 5, -np.inf)).tolist() == [False, True, False, True]
    assert ruled_out(f32(0, -1e4, 500, -np.inf)).tolist() == [False, False, False, False]  # too large for a score
    assert ruled_out(f32(-np.inf, -np.inf)).tolist() == [True, True]
    assert ruled_out(f32(0, -1e4, 5, -9e3)).tolist() == [False, True, False, True]


def test_values_that_are_no_numbers_are_refused() -> None:
    model = parse("(float[N,4] x) => (float[N,4] y) { a = MatMul(x, w) l = Log(a) y = MatMul(l, w) }", w=W(4, 4))
    with pytest.raises(DataError, match=r"'l' is not a number \(NaN\)"):
        quantize(model, samples(model), threads=1)
    for bad, message in ((np.nan, "holds NaN"), (np.inf, "holds infinities")):
        weight = W(4, 4)
        weight[1, 2] = bad
        model = parse("(float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", w=weight)
        with pytest.raises(ModelError, match=message):
            quantize(model, samples(model), threads=1)


WHOLE = {  # inputs without a batch axis in common: the model, and what a sample holds
    "a scalar": (
        "(float[N,4] x, float s) => (float[N,3] y) { h = MatMul(x, w) r = Relu(h) g = MatMul(r, v) y = Mul(g, s) }",
        {"x": (5, 4), "s": ()},
    ),
    "a scalar first": (
        "(float s, float[1,4] x) => (float[1,3] y) { h = MatMul(x, w) r = Relu(h) g = MatMul(r, v) y = Mul(g, s) }",
        {"s": (), "x": (1, 4)},
    ),
    "a state first": (
        """(float[2,1,4] state, float[1,4] x) => (float[1,3] y) {
          a = Gather <axis=0> (state, one) b = Add(a, x) h = MatMul(b, w) r = Relu(h) y = MatMul(r, v)
        }""",
        {"state": (2, 1, 4), "x": (1, 4)},
    ),
    "a scalar comes out": (
        """(float[2,4] state, float[1,4] x) => (float y) {
          a = Add(state, x) h = MatMul(a, w) r = Relu(h) g = MatMul(r, v) y = ReduceMean <keepdims=0> (g)
        }""",
        {"state": (2, 4), "x": (1, 4)},
    ),
}


@pytest.mark.parametrize(
    "options", [{"method": "rtn"}, {"weight_calibration": "hmse", "method": "rtn"}, {"steps": 4}], ids=str
)
@pytest.mark.parametrize("name", WHOLE)
def test_models_without_a_batch_axis(name: str, options: dict[str, Any]) -> None:
    text, shapes = WHOLE[name]
    constants = {"w": W(4, 8), "v": W(8, 3)} | ({"one": np.int64(1)} if "one" in text.split("{")[1] else {})
    rng = np.random.default_rng(0)
    data = {key: rng.normal(1, size=(24, *shape)).astype(np.float32) for key, shape in shapes.items()}
    result = quantize(parse(text, **constants), data, threads=1, **options)
    assert result.report.fidelity.samples == 24
    assert min(result.report.fidelity.sqnr_db.values()) > 25
    assert {"w", "v"} <= set(result.plan)


@pytest.mark.parametrize("given", ["list", "array"])
@pytest.mark.parametrize("size", ["16,16", "H,V"])
def test_the_colours_of_one_image_are_no_samples(size: str, given: str) -> None:
    """Detectors take [3, height, width]: photos must not be taken apart."""
    model = parse(
        f"""(float[3,{size}] image) => (float[M,5] y) {{ b = Unsqueeze(image, zero) c = Conv <pads=[1,1,1,1]> (b, w) r = Relu(c)
          g = GlobalAveragePool(r) f = Flatten(g) y = Gemm(f, v) }}""",
        zero=i64(0), w=W(6, 3, 3, 3), v=W(6, 5),
    )  # fmt: skip
    images = np.random.default_rng(0).normal(size=(40, 3, 16, 16)).astype(np.float32)
    result = onnx_eptq.quantize(model, list(images) if given == "list" else images, steps=4, threads=1)
    assert result.report.samples == 40
    assert result.report.fidelity is not None
    assert result.report.fidelity.samples == 40
    assert result.report.fidelity.sqnr_db["y"] > 15
    assert result.report.coverage.complete


NO_BATCH = {  # axis 0 is open, but holds no samples
    "steps of time": (
        """(float[T,1,4] x) => (float[T,1,3] y) {
          h = MatMul(x, w) c = CumSum(h, zero) r = Relu(c) y = MatMul(r, v) }""",
        (6, 1, 4),
    ),
    "an answer for all of them": (
        """(float[T,1,4] x) => (float[1,3] y) {
          h = MatMul(x, w) r = Relu(h) m = ReduceMax <keepdims=0> (r, axes) y = MatMul(m, v) }""",
        (6, 1, 4),
    ),
    "one sample in a reshape": (
        "(float[N,4] x) => (float[M,3] y) { s = Reshape(x, one) h = MatMul(s, w) r = Relu(h) y = MatMul(r, v) }",
        (1, 4),
    ),
    "all steps in a reshape": (
        """(float[T,4] x) => (float[T,3] y) {
          h = MatMul(x, w) r = Reshape(h, six) c = CumSum(r, one_axis) g = Reshape(c, back) y = MatMul(g, v) }""",
        (6, 4),
    ),
}
SHAPES = {
    "zero": np.int64(0),
    "one_axis": np.int64(1),
    "axes": np.array([0]),
    "one": np.array([1, 4]),
    "six": np.array([1, 6, 8]),
    "back": np.array([6, 8]),
}


@pytest.mark.parametrize("options", [{"method": "rtn"}, {"method": "eptq", "steps": 4}], ids=["rtn", "learned"])
@pytest.mark.parametrize("name", NO_BATCH)
def test_models_whose_first_axis_is_open_but_no_batch(name: str, options: dict[str, Any]) -> None:
    """Every array is one sample: what is fed, calibrated, learned and compared is what the model takes in use."""
    text, shape = NO_BATCH[name]
    used = {key: value for key, value in SHAPES.items() if f"{key})" in text}
    model = parse(text, w=W(4, 8), v=W(8, 3), **used)
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(1, size=shape).astype(np.float32)} for _ in range(40)]
    result = quantize(model, data, threads=1, **options)
    assert any("axis 0 of 'x' is no batch axis" in warning for warning in result.report.warnings)
    assert result.report.samples == result.report.fidelity.samples == 40
    assert result.report.fidelity.sqnr_db["y"] > 25
    assert quantize(model, data, num_samples=8, threads=1).report.samples == 8


def test_sequences_of_several_lengths_are_refused_where_they_would_run_together() -> None:
    text, shape = NO_BATCH["steps of time"]
    model = parse(text, w=W(4, 8), v=W(8, 3), zero=np.int64(0))
    rng = np.random.default_rng(0)
    data = [rng.normal(size=(length, *shape[1:])).astype(np.float32) for length in (6, 6, 7) * 8]
    with pytest.raises(DataError, match=r"2 sizes \(6x1x4 and 7x1x4"):
        quantize(model, data, method="eptq", threads=1)
    report = quantize(model, data, calibration="mse", threads=1).report
    assert report.samples == 24
    assert report.fidelity.sqnr_db["y"] > 25


def test_what_an_old_opset_lacks_is_said_before_any_data_is_read() -> None:
    text = "(float[N,1,5,5] x, float[N,3,3,2] g) => (float[N,1,3,3] y) { h = MatMul(x, w) y = GridSample(h, g) }"
    with pytest.raises(ModelError, match=r"no form in opset 13: .*GridSample"):
        quantize(parse(text, w=W(5, 5)), Path("nowhere"), opset=13, weight_bits=8)


def branching(text: str, op: str, source: str, **constants: Any) -> onnx.ModelProto:
    """The model whose last node becomes an If on `c`; both branches compute `op` of `source` and a constant `w` of their own."""
    model, branches = parse(text, **constants), {}
    for name in ("then_branch", "else_branch"):
        nodes = [onnx.helper.make_node(op, [source, "w"], [f"{name}_y"], f"{name}_node")]
        result = onnx.helper.make_tensor_value_info(f"{name}_y", onnx.TensorProto.FLOAT, None)
        weight = onnx.numpy_helper.from_array(W(4, 4), "w")
        branches[name] = onnx.helper.make_graph(nodes, name, [], [result], [weight])
    model.graph.node[-1].CopyFrom(onnx.helper.make_node("If", ["c"], ["y"], "either", **branches))
    return model


@pytest.mark.parametrize("options", [{"method": "rtn"}, {"method": "eptq", "steps": 4}], ids=["rtn", "learned"])
def test_a_branch_that_one_sample_decides(options: dict[str, Any]) -> None:
    """Several samples in one run would have several conditions."""
    nodes = "h = MatMul(x, v) s = ReduceSum <keepdims=0> (h, axes) c = Greater(s, zero) y = Relu(h)"
    text = f"(float[1,4] x) => (float[A,B] y) {{ {nodes} }}"
    model = branching(text, "MatMul", "h", v=W(4, 4), axes=np.array([1]), zero=np.float32(0))
    data = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    result = quantize(model, data, threads=1, **options)
    assert result.report.coverage.quantized_layers == 1
    assert result.report.fidelity.sqnr_db["y"] > 20


def test_layers_that_lie_in_a_branch_alone_are_named() -> None:
    nodes = "s = ReduceSum <keepdims=0> (x) c = Greater(s, zero) y = Relu(x)"
    text = f"(float[N,4] x) => (float[N,4] y) {{ {nodes} }}"
    model = branching(text, "MatMul", "x", zero=np.float32(0))
    with pytest.raises(ModelError, match="those inside of If 'either' stay as they are"):
        quantize(model, {"x": np.zeros((4, 4), np.float32)}, threads=1)


def test_models_the_runtime_cannot_load_are_refused_before_any_work(tmp_path: Path) -> None:
    model = MODELS["gemm without bias"]
    newer = onnx.ModelProto.FromString(model.SerializeToString())
    newer.ir_version = 99
    onnx.save(newer, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"99|does not load"):
        quantize(tmp_path / "m.onnx", samples(model))
    empty = onnx.ModelProto.FromString(model.SerializeToString())
    empty.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    with pytest.raises(ModelError, match="size 0"):
        quantize(empty, samples(model))
    quantized = quantize(model, samples(model), threads=1).model
    with pytest.raises(ModelError, match=r"quantized already \(it holds QuantizeLinear"):
        quantize(quantized, samples(model))
    text = "q, s, z = DynamicQuantizeLinear(x) d = DequantizeLinear(q, s, z) y = MatMul(d, w)"
    with pytest.raises(ModelError, match=r"quantized already \(it holds DynamicQuantizeLinear"):
        quantize(parse(f"(float[N,4] x) => (float[N,4] y) {{ {text} }}", w=W(4, 4)), samples(model))


def test_a_great_loss_is_warned_about() -> None:
    model = attention("Add(s, mask)", causal(-2.0))
    report = quantize(model, samples(model), weight_bits=2, act_bits=2, threads=1).report
    assert any("dB from the float model's" in warning for warning in report.warnings)


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    model = parse(
        "(float[N,8,32,32] x) => (float[N,64,32,32] y) { y = Conv <pads=[2,2,2,2]> (x, w) }", w=W(64, 8, 5, 5)
    )
    onnx.save(model, tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", np.zeros((6000, 8, 32, 32), np.float32))
    command = [sys.executable, "-m", "onnx_eptq", "m.onnx", "x.npy", "-o", "q.onnx"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heed_sigint
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("prepare")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; no model was written" in text
    assert "--resume" not in text  # nothing was learned yet
    assert "Traceback" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "x.npy"}


@pytest.mark.parametrize("method", ["rtn", "eptq", "eptq-v1"])
@pytest.mark.parametrize("budget", [{}, {"compression": 6.0}])
def test_outputs_that_hold_no_rows_of_samples(method: str, budget: dict[str, float]) -> None:
    """A constant and a mean over all samples beside the scores: gradients are taken of them as they are."""
    text = """(float[N,6] x) => (float[N,3] y, float s, float[1,2] k) {
      y = MatMul(x, w)
      s = ReduceMean <keepdims = 0> (y)
      k = Identity(c)
    }"""
    bits = {} if budget else {"weight_bits": 4}
    model = parse(text, w=W(6, 3), c=W(1, 2))
    report = quantize(model, samples(model), method=method, steps=4, threads=1, **bits, **budget).report
    assert report.fidelity.sqnr_db["y"] > 15


def test_a_bias_per_element_is_added() -> None:
    text = "(float[4,6] x) => (float[6,5] y) { y = Gemm <alpha = 0.5, beta = 2.0, transA = 1> (x, w, b) }"
    model = parse(text, w=W(4, 5), b=W(6, 5))
    data = [{"x": W(4, 6) * (1 + i)} for i in range(8)]
    assert quantize(model, data, weight_bits=8, method="eptq", steps=4, threads=1).report.fidelity.sqnr_db["y"] > 30


def test_a_product_with_a_vector() -> None:
    model = parse("(float[N,4] x) => (float[N] y) { y = MatMul(x, w) }", w=W(4))
    assert quantize(model, samples(model), weight_bits=8, method="rtn").report.fidelity.sqnr_db["y"] > 30


def test_an_output_of_large_negative_numbers_is_no_mask() -> None:
    model = parse(
        "(float[N,8] x) => (float[N,4] y) { y = Gemm(x, w, b) }",
        w=W(8, 4) * 1000,
        b=np.full(4, -20000, np.float32),
    )
    data = samples(model)
    result = quantize(model, data, weight_bits=2, method="rtn", threads=1)
    outputs = [outputs_of(each, data).astype(np.float64) for each in (model, result.model)]
    own = 10 * np.log10((outputs[0] ** 2).sum() / ((outputs[0] - outputs[1]) ** 2).sum())
    assert result.report.fidelity.sqnr_db["y"] == pytest.approx(own, abs=0.1)
    assert own > 15


def test_an_output_of_zeros_is_equal_not_lost() -> None:
    model = parse(
        "(float[N,8] x) => (float[N,4] y) { h = MatMul(x, w) y = MatMul(h, z) }",
        w=W(8, 4),
        z=np.zeros((4, 4), np.float32),
    )
    report = quantize(model, samples(model), weight_bits=8, method="rtn", threads=1).report
    assert report.fidelity.sqnr_db == {}
    assert report.fidelity.agreement == {"y": 100.0}
    assert not [text for text in report.warnings if "dB" in text]


@pytest.mark.parametrize("classes", [2, 5])
def test_nearly_even_shares_survive_the_integer_softmax(classes: int) -> None:
    """On a grid as fine as their range ONNX Runtime's kernel would wrap around."""
    model = parse(
        f"(float[N,6] x) => (float[N,{classes}] y) {{ h = MatMul(x, w) y = Softmax <axis = 1> (h) }}",
        w=W(6, classes) * np.float32(0.05),
    )
    data = samples(model)
    for settings in ({"method": "rtn"}, {"method": "eptq", "steps": 8}):
        result = quantize(model, data, weight_bits=8, threads=1, **settings)
        expected, found = (outputs_of(each, data) for each in (model, result.model))
        assert np.abs(expected - found).max() < 0.02
        assert result.report.fidelity.sqnr_db["y"] > 30


@pytest.mark.parametrize("classes", [1, 10, 50])
@pytest.mark.parametrize("limits", [(0, 1), (1e-7, 1 - 1e-7)])
def test_so_do_shares_that_are_kept_from_the_ends(classes: int, limits: tuple[float, float]) -> None:
    """ONNX Runtime drops a Clip that a grid implies, and the Softmax before it becomes an integer one."""
    text = """(float[N,6] x) => (float[N,4] y) { h = MatMul(x, w) p = Softmax <axis = 1> (h) c = Clip(p, low, high)
      y = MatMul(c, u) }"""
    low, high = (np.array(limit, np.float32) for limit in limits)
    model = parse(text, w=W(6, classes) * np.float32(0.05), u=W(classes, 4), low=low, high=high)
    data = samples(model)
    result = quantize(model, data, weight_bits=8, method="rtn", threads=1)
    assert result.report.fidelity.sqnr_db["y"] > 30
    assert not [text for text in result.report.warnings if "dB" in text]


@pytest.mark.parametrize("kept", [(), ("y",)])
def test_so_do_shares_that_are_an_output(kept: tuple[str, ...]) -> None:
    """Of a rare class, too; if nothing rounds what is limited, nothing rounds the shares before."""
    text = "(float[N,6] x) => (float[N,4] y) { h = Gemm(x, w, b) p = Softmax <axis = 1> (h) y = Clip(p, low, high) }"
    limits = {"low": np.array(1e-7, np.float32), "high": np.array(1 - 1e-7, np.float32)}
    model = parse(text, w=W(6, 4), b=f32(0, 0, 0, -12), **limits)
    result = quantize(model, samples(model), weight_bits=8, method="rtn", threads=1, keep_float=kept)
    assert ("y" in result.plan) == ("p" in result.plan) == (not kept)
    assert not [text for text in result.report.warnings if "column" in text or "dB" in text]


def test_so_do_single_shares_that_are_moved() -> None:
    text = """(float[N,6] x) => (float[N,4] y) { h = MatMul(x, w) p = Softmax <axis = 1> (h) r = Reshape(p, shape)
      c = Clip(r, low, high) f = Reshape(c, flat) y = MatMul(f, u) }"""
    limits = {"low": np.array(0, np.float32), "high": np.array(1, np.float32)}
    model = parse(text, w=W(6, 1), u=W(1, 4), shape=i64(-1, 1, 1), flat=i64(-1, 1), **limits)
    assert quantize(model, samples(model), weight_bits=8, method="rtn", threads=1).report.fidelity.sqnr_db["y"] > 30


@pytest.mark.parametrize("length", [2, 5, 40])
@pytest.mark.parametrize("shares", ["y = MatMul(p, x)", "c = Clip(p, none, all) y = MatMul(c, x)"])
def test_so_do_those_of_an_attention_whose_length_is_open(length: int, shares: str) -> None:
    text = f"""(float[N,T,8] x) => (float[N,T,8] y) {{
      q = MatMul(x, w) t = Transpose <perm=[0,2,1]> (x) s = MatMul(q, t) p = Softmax <axis=-1> (s) {shares} }}"""
    limits = {"none": f32(0.0).reshape(()), "all": f32(1.0).reshape(())} if "Clip" in shares else {}
    model = parse(text, w=W(8, 8) * np.float32(0.01), **limits)
    data = np.random.default_rng(0).normal(1, size=(40, length, 8)).astype(np.float32)
    result = quantize(model, data, weight_bits=8, threads=1)
    assert result.plan["p"].reach == pytest.approx(min(1, 2 / length))
    assert result.report.fidelity.sqnr_db["y"] > 30


def test_weights_that_are_stored_in_integers_are_restored_first() -> None:
    """As converters of TFLite files with a dynamic range write them."""
    text = "(float[N,4] x) => (float[N,4] y) { w = DequantizeLinear <axis=1> (q, s) h = MatMul(x, w) y = Relu(h) }"
    integers = np.random.default_rng(0).integers(-127, 128, (4, 4)).astype(np.int8)
    model = parse(text, q=integers, s=np.linspace(0.01, 0.02, 4, dtype=np.float32))
    report = quantize(model, DRAW(64, 4), weight_bits=8, threads=1).report
    assert report.coverage.quantized_layers == report.coverage.layers == 1
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db["y"] > 35


def test_declared_types_of_other_domains_outlive_the_conversion_of_the_opset() -> None:
    text = "(float[N,4] x) => (float[N,3] y) { s = com.microsoft.QuickGelu(x) h = MatMul(s, w) y = Add(h, b) }"
    model = parse(text, w=DRAW(4, 3), b=DRAW(1, 3))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, ["N", 4]))
    found = quantize(model, DRAW(64, 4), weight_bits=8, threads=1).model
    assert [node.op_type for node in found.graph.node if node.op_type in ("MatMul", "Add", "Gemm")] == ["Gemm"]


def test_series_that_are_scaled_by_their_largest_value_are_no_fault() -> None:
    """On grids the small ones are 0, and so would be what they are divided by."""
    text = """(float[N,16] x) => (float[N,3] y) { a = Abs(x) m = ReduceMax(a, last) s = Add(m, eps) n = Div(x, s)
      h = MatMul(n, w) y = Mul(h, s) }"""
    model = parse(text, w=DRAW(16, 3), eps=f32(1e-6), last=i64(1))
    data = (DRAW(200, 16) * 10 ** DRAW(200, 1)).astype(np.float32)
    result = quantize(model, data, weight_bits=8, threads=1)
    assert result.plan.floats["s"] == "a divisor, which could be 0 on a grid"
    assert result.report.fidelity is not None
    assert result.report.fidelity.sqnr_db["y"] > 30


def test_constants_that_are_outputs_come_through() -> None:
    model = parse(
        "(float[N,4] x) => (float[N,3] y, float[2] anchors) { y = MatMul(x, w) }", w=DRAW(4, 3), anchors=f32(1, 2)
    )
    found = quantize(model, DRAW(64, 4), weight_bits=8, threads=1).model
    assert [value.name for value in found.graph.output] == ["y", "anchors"]


@pytest.mark.parametrize("given", ["declared", "unknown"])
def test_layers_behind_scalers_of_tables_keep_their_biases(given: str) -> None:
    text = """(float[N,4] x) => (float[N,3] y) { s = ai.onnx.ml.Scaler <offset=[0.1], scale=[2.0]> (x)
      h = MatMul(s, w) a = Add(h, b) r = Relu(a) k = MatMul(r, v) y = Add(k, c) }"""
    model = parse(text, w=DRAW(4, 8), b=DRAW(1, 8), v=DRAW(8, 3), c=DRAW(1, 3))
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 1))
    if given == "declared":
        model.graph.value_info.append(onnx.helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, ["N", 4]))
    found = quantize(model, DRAW(64, 4), weight_bits=8, threads=1).model
    assert [node.op_type for node in found.graph.node if node.op_type in ("MatMul", "Add", "Gemm")] == ["Gemm", "Gemm"]


def test_outputs_that_are_no_tensors_of_numbers_are_refused_by_name() -> None:
    model = parse("(float[N,4] x) => (float[N,3] p) { h = MatMul(x, w) p = Softmax(h) }", w=DRAW(4, 3))
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 1))
    mapped, text = onnx.ModelProto(), onnx.ModelProto()
    for each in (mapped, text):
        each.CopyFrom(model)
    helper = onnx.helper
    mapped.graph.node.append(
        helper.make_node("ZipMap", ["p"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])
    )
    maps = helper.make_map_type_proto(
        onnx.TensorProto.INT64, helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
    )
    mapped.graph.output.append(helper.make_value_info("z", helper.make_sequence_type_proto(maps)))
    text.graph.initializer.append(onnx.numpy_helper.from_array(np.array(["a", "b", "c"], dtype=object), "names"))
    text.graph.node.append(helper.make_node("ArgMax", ["p"], ["best"], axis=1, keepdims=0))
    text.graph.node.append(helper.make_node("Gather", ["names", "best"], ["z"]))
    text.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.STRING, ["N"]))
    for each, what in ((mapped, "a sequence"), (text, "a tensor of text")):
        with pytest.raises(ModelError, match=f"output 'z' is {what}, and only tensors of numbers"):
            quantize(each, DRAW(16, 4))


def test_arguments_of_another_kind_are_refused() -> None:
    model = MODELS["gemm without bias"]
    cases: tuple[dict[str, Any], ...] = ({"plan": 3}, {"config": {"threads": 1}}, {"phases": 3}, {"output": b"m.onnx"})
    for wrong in cases:
        (name,) = wrong
        with pytest.raises(UsageError, match=rf"{name} is a \w+; give a"):
            quantize(model, samples(model), **wrong)


def test_names_of_outputs_leave_room_for_a_checkpoint(tmp_path: Path) -> None:
    model = MODELS["gemm without bias"]
    with pytest.raises(OutputError, match="cannot be written"):
        quantize(model, samples(model), tmp_path / f"{'n' * 244}.onnx", threads=1)


def test_a_caller_that_computes_in_fewer_bits_changes_nothing() -> None:
    model = MODELS["gemm without bias"]
    plain = quantize(model, samples(model), threads=1).model
    with torch.autocast("cpu", torch.bfloat16):
        found = quantize(model, samples(model), threads=1).model
        assert torch.is_autocast_enabled("cpu")
    assert found == plain


@pytest.mark.parametrize("method", ["brecq", "qdrop"])
def test_integers_that_go_from_block_to_block_are_learned_beside(method: str) -> None:
    text = """(int64[N,5] i, float[N,5,4] x) => (float[N,5,3] y) {
      e = Gather(table, i) a = Add(e, x) h = MatMul(a, w) r = Relu(h) g = Gather(other, i) b = Add(r, g) y = MatMul(b, v) }"""
    model = parse(text, table=DRAW(9, 4), other=DRAW(9, 8), w=DRAW(4, 8), v=DRAW(8, 3))
    data = {"i": np.random.default_rng(0).integers(0, 9, (48, 5)), "x": DRAW(48, 5, 4)}
    report = quantize(model, data, method=method, steps=4, threads=1).report
    assert report.learning is not None
    assert report.learning.steps


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_learning_within_a_block_without_gradients(mode: Any) -> None:
    model = parse("(float[N,6] x) => (float[N,3] y) { y = MatMul(x, w) }", w=W(6, 3))
    with mode():
        assert (
            quantize(model, samples(model), weight_bits=4, method="eptq", steps=4, threads=1).report.learning.steps == 4
        )


def test_samples_of_several_sizes_are_refused_where_they_run_together() -> None:
    model = parse("(float[N,3,H,W] x) => (float[N,4,H,W] y) { y = Conv(x, w) }", w=W(4, 3, 1, 1))
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((1, 3, size, 8), dtype=np.float32)} for size in (8, 9, 10)]
    with pytest.raises(DataError, match=r"3 sizes .*--resize"):
        quantize(model, data, weight_bits=4, method="eptq", threads=1)
    report = quantize(model, data, weight_bits=8, method="rtn", calibration="mse", threads=1).report
    assert report.fidelity.sqnr_db["y"] > 25


def test_samples_that_the_model_cannot_compute_are_named() -> None:
    text = """(float[N,1,H,W] x) => (float[N,1,H,W] y) {
      a = Conv(x, w)
      p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (a)
      u = Resize <mode = "nearest"> (p, , two)
      y = Add(a, u)
    }"""
    model = parse(text, w=W(1, 1, 1, 1), two=np.float32([1, 1, 2, 2]))
    with pytest.raises(DataError, match=r"cannot compute the first samples \(x 1x1x9x9\)"):
        quantize(model, {"x": np.ones((8, 1, 9, 9), np.float32)}, weight_bits=8, method="rtn", threads=1)


@pytest.mark.parametrize("source", [None, b"onnx", 3])
def test_what_is_no_model_is_refused(source: Any) -> None:
    with pytest.raises(ModelError, match="give the path of an"):
        quantize(source, {"x": np.ones((2, 2), np.float32)})


STEP = "g{0} = Gemm(h{0}, w, b) c{0} = Add(g{0}, s{0}) h{1} = Tanh(c{0})"


def test_a_state_that_begins_at_zero_leaves_shared_weights_alone() -> None:
    """A recurrent layer written out step by step: the first step's zeros say nothing of what the weights will meet."""
    steps = " ".join(STEP.format(i, i + 1) for i in range(3))
    text = f"""(float[N,4] x, float[N,8] h0) => (float[N,3] y) {{
      s0 = MatMul(x, u) s1 = Mul(s0, two) s2 = Neg(s1) {steps} y = MatMul(h3, v) }}"""
    model = parse(text, w=W(8, 8), b=W(8) + np.float32(0.3), u=W(4, 8), v=W(8, 3), two=f32(2))
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(200, 4)).astype(np.float32), "h0": np.zeros((200, 8), np.float32)}
    result = quantize(model, data, weight_bits=8, threads=1)
    assert result.report.fidelity.sqnr_db["y"] > 28


def test_layers_that_share_a_weight_may_have_inputs_of_very_unequal_ranges() -> None:
    text = "(float[N,6] x, float[N,6] z) => (float[N,4] y, float[N,4] u) { y = Gemm(x, w, b) u = Gemm(z, w, c) }"
    model = parse(text, w=W(6, 4), b=f32(0.1, 0.2, -0.3, 0.4), c=f32(0.3, -0.2, 0.1, 0.5))
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    result = quantize(model, {"x": x, "z": x * np.float32(1e-9)}, weight_bits=8, threads=1)
    assert result.report.fidelity.sqnr_db["y"] > 35


@pytest.mark.parametrize("positions", ["f = Cast <to=1> (t)", "g = Cast <to=1> (t) f = Squeeze(g, last)"])
def test_positions_on_their_way_to_a_sine_stay_float(positions: str) -> None:
    """On a grid of 256 steps a thousand of them are noise behind it."""
    moved = "Squeeze" in positions
    text = f"""(int64[N,{"1,1" if moved else "1"}] t, float[N,4] x) => (float[N,5] y) {{
      {positions} m = Mul(f, rates) s = Sin(m) c = Cos(m) e = Concat <axis=1> (s, c)
      h = MatMul(e, w) k = MatMul(x, v) y = Add(k, h) }}"""
    constants = {"rates": np.exp(-np.arange(4, dtype=np.float32)), "w": W(8, 5), "v": W(4, 5)}
    model = parse(text, **constants, **({"last": np.array([2])} if moved else {}))
    rng = np.random.default_rng(0)
    data = {
        "t": rng.integers(0, 1000, (200, 1, 1) if moved else (200, 1)),
        "x": rng.normal(size=(200, 4)).astype(np.float32),
    }
    result = quantize(model, data, weight_bits=8, threads=1)
    assert {"f", "m"} <= set(result.plan.floats)
    assert result.report.fidelity.sqnr_db["y"] > 30


def test_outputs_that_are_no_numbers_for_some_samples_are_compared_beside_them() -> None:
    model = parse("(float[N,4] x) => (float[N,3] y, float[N,3] z) { y = MatMul(x, w) z = Sqrt(y) }", w=W(4, 3))
    data = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    assert quantize(model, data, weight_bits=8, threads=1).report.fidelity.sqnr_db["y"] > 30


OTHER_PRECISIONS = {
    "float16 throughout": """(float16[N,4] x) => (float16[N,3] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }""",
    "float16 in a layout of its own": """(float16[N,4] x) => (float16[3,N] y) {
      t = Transpose <perm=[1,0]> (x) u = Neg(t) s = Transpose <perm=[1,0]> (u)
      h = MatMul(s, w) r = Relu(h) p = MatMul(r, v) y = Transpose <perm=[1,0]> (p) }""",
    "inputs and outputs": "(double[N,4] x) => (double[N,3] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }",
    "a stretch within": """(float[N,4] x) => (float[N,3] y) {
      d = Cast <to=11> (x) m = Mul(d, two) s = Cast <to=1> (m) h = MatMul(s, w) r = Relu(h) y = MatMul(r, v) }""",
}


@pytest.mark.parametrize("options", [{"method": "rtn"}, {"method": "eptq", "steps": 4}], ids=["rtn", "learned"])
@pytest.mark.parametrize("name", OTHER_PRECISIONS)
def test_what_is_computed_in_other_precisions_is_quantized_as_float32(name: str, options: dict[str, Any]) -> None:
    kind = {"inputs and outputs": np.float64, "a stretch within": np.float32}.get(name, np.float16)
    constants = {"w": W(4, 8).astype(kind), "v": W(8, 3).astype(kind)}
    model = parse(
        OTHER_PRECISIONS[name], **constants, **({"two": np.float64(2)} if "two" in OTHER_PRECISIONS[name] else {})
    )
    data = np.random.default_rng(0).normal(size=(64, 4)).astype(kind)
    result = quantize(model, data, weight_bits=8, threads=1, **options)
    assert result.report.coverage.quantized_layers == 2
    assert result.report.fidelity.sqnr_db["y"] > 30
    assert [
        value.type.tensor_type.elem_type for value in (result.model.graph.input[0], result.model.graph.output[0])
    ] == [onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))] * 2


UNLOADABLE = {
    "bfloat16": """(float[N,4] x) => (float[N,3] y) {
      b = Cast <to=16> (x) h = MatMul(b, w) r = Relu(h) p = MatMul(r, v) y = Cast <to=1> (p) }""",
    "types that do not go together": """(float16[N,4] x) => (float16[N,3] y) {
      h = MatMul(x, w) n = LayerNormalization(h, scale) y = MatMul(n, v) }""",
}


@pytest.mark.parametrize("name", UNLOADABLE)
def test_models_that_the_runtime_lacks_kernels_for_are_compared_in_float32(name: str) -> None:
    kind = onnx.TensorProto.BFLOAT16 if name == "bfloat16" else onnx.TensorProto.FLOAT16
    model = parse(UNLOADABLE[name])
    for label, values in {"w": DRAW(4, 8), "v": DRAW(8, 3)}.items():
        model.graph.initializer.append(onnx.helper.make_tensor(label, kind, values.shape, values.ravel()))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), "scale"))
    x = DRAW(64, 4)
    report = quantize(model, x if name == "bfloat16" else x.astype(np.float16), weight_bits=8, threads=1).report
    assert report.coverage.quantized_layers == 2
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db["y"] > 30
    assert any("compared with the same model in float32" in warning for warning in report.warnings)


def test_float64_beside_operators_of_other_domains_is_narrowed() -> None:
    text = """(double[N,8] x) => (int64[N] label, float[N,2] p) {
      c = Sub(x, mu) z = Cast <to=1> (c) s = Gemm(z, w) p = Softmax(s) best = ArgMax <axis=1, keepdims=0> (p)
      wide = com.microsoft.ExpandDims(best, at) label = Squeeze(wide, at1) }"""
    model = parse(text, mu=np.arange(8, dtype=np.float64), w=DRAW(8, 2), at=np.int32(1), at1=i64(1))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    x = np.arange(8) + np.random.default_rng(4).standard_normal((64, 8))
    result = quantize(model, x, threads=1)
    assert result.report.islands
    assert result.report.fidelity is not None
    assert result.report.fidelity.sqnr_db["p"] > 28


def test_what_holds_its_weights_in_foreign_operators_is_told_so() -> None:
    model = parse("(float[N,2] x) => (float[N,1] y) { y = ai.onnx.ml.LinearRegressor <coefficients=[1.0, 2.0]> (x) }")
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 1))
    with pytest.raises(ModelError, match="the work of LinearRegressor is left to ONNX Runtime"):
        quantize(model, np.zeros((8, 2), np.float32))


MEANS = {
    "asymmetric": 'y = Resize <mode="linear", coordinate_transformation_mode="asymmetric"> (a, , scales)',
    "half pixel": 'y = Resize <mode="linear"> (a, , scales)',
    "pooled": "y = AveragePool <kernel_shape=[2,2], strides=[2,2]> (a)",
    "of two": "b = Relu(a) y = Mean(a, b)",
    "over axes": "y = ReduceMean(a, axes)",
}


@pytest.mark.parametrize("mean", MEANS)
def test_means_of_few_values_fall_on_ties_in_any_number(mean: str) -> None:
    """The last bit of a sum decides them, and torch and ONNX Runtime add in different orders."""
    for seed in range(5):
        draw = np.random.default_rng(seed).standard_normal
        weight = draw((2, 2, 1, 1)).astype(np.float32)
        constants = {"scales": f32(1, 1, 2, 2), "axes": i64(2, 3)}
        model = parse(
            f"(float[N,2,4,4] x) => (float[N,2,A,B] y) {{ a = Conv(x, w) {MEANS[mean]} }}",
            w=weight, **{name: value for name, value in constants.items() if name in MEANS[mean]},
        )  # fmt: skip
        report = quantize(model, draw((32, 2, 4, 4)).astype(np.float32), threads=1).report
        assert report.fidelity is not None
        assert report.fidelity.sqnr_db["y"] > 28


ODD = {
    "a truth value as an output of a fixed batch": (
        "(float[1,4] x) => (float[1,4] y, bool[1,4] b) { y = MatMul(x, w) b = Greater(y, z) }",
        {"w": DRAW(4, 4), "z": f32(0)[0]}, (4,),
    ),
    "a window that only the padding makes room for": (
        "(float[N,1,5,3,2] x) => (float[N,3] y) { "
        "p = AveragePool <kernel_shape=[3,1,3], pads=[1,0,1,1,0,1], strides=[1,2,2]> (x) f = Flatten(p) y = Gemm(f, w) }",
        {"w": DRAW(10, 3)}, (1, 5, 3, 2),
    ),
    "kernels shorter than their stride": (
        '(float[N,2,3,3] x) => (float[N,3,A,B] y) { y = ConvTranspose <auto_pad="SAME_UPPER", strides=[3,2]> (x, w) }',
        {"w": DRAW(2, 3, 2, 1)}, (2, 3, 3),
    ),
    "rates": (
        "(float[N,4] x) => (float[N,3] y) { a = Gemm(x, w) r = Relu(a) b = Gemm(r, v) y = Exp(b) }",
        {"w": DRAW(4, 8), "v": DRAW(8, 3) / 4}, (4,),
    ),
    "an embedding of unit length": (
        "(float[N,4] x) => (float[N,3] y) { a = Gemm(x, w) r = Relu(a) b = Gemm(r, v) y = LpNormalization <axis=1> (b) }",
        {"w": DRAW(4, 8), "v": DRAW(8, 3)}, (4,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_small_oddities(name: str) -> None:
    text, constants, shape = ODD[name]
    data = np.random.default_rng(3).standard_normal((32, *shape)).astype(np.float32)
    report = quantize(parse(text, **constants), data, threads=1).report
    assert report.coverage.complete
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db["y"] > 28


def test_a_number_that_no_padding_uses_is_dropped() -> None:
    pad = 'p = Pad <mode="edge", pads=[0,0,1,1,0,0,1,1], value=1.5> (x)'
    text = f"(float[N,3,8,8] x) => (float[N,4,8,8] y) {{ {pad} y = Conv(p, w) }}"
    model = parse(text, opset=10, w=DRAW(4, 3, 3, 3))
    data = np.random.default_rng(3).standard_normal((32, 3, 8, 8)).astype(np.float32)
    assert quantize(model, data, threads=1).report.fidelity.sqnr_db["y"] > 28


def test_what_only_newer_opsets_mean_is_refused_for_older_ones() -> None:
    wrap = parse('(float[N,3,8,8] x) => (float[N,4,8,8] y) { p = Pad <mode="wrap"> (x, k) y = Conv(p, w) }',
                 opset=19, k=i64(0, 0, 1, 1, 0, 0, 1, 1), w=DRAW(4, 3, 3, 3))  # fmt: skip
    data = np.random.default_rng(3).standard_normal((32, 3, 8, 8)).astype(np.float32)
    with pytest.raises(ModelError, match=r"no form in opset 13: .* Pad; use a newer one"):
        quantize(wrap, data, opset=13)
    assert quantize(wrap, data, threads=1).report.coverage.complete
    ends = parse("(float[N,3,8,8] x) => (float[N,3,8,4] y) { p = Conv(x, w) "
                 "y = MaxPool <kernel_shape=[1,1], strides=[1,2], ceil_mode=1> (p) }", opset=22, w=DRAW(3, 3, 1, 1))  # fmt: skip
    with pytest.raises(ModelError, match=r"no form in opset 21: .* MaxPool; export the model with opset 21 or older"):
        quantize(ends, data)


def test_everything_kept_float_and_plans_with_embeddings_go_through() -> None:
    model = parse("(float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", w=DRAW(4, 4))
    kept = quantize(model, DRAW(32, 4), keep_float=("*",), threads=1)
    assert not kept.plan
    text = "(int64[N,5] x) => (float[N,5,4] y) { e = Gather(t, x) a = MatMul(e, w) y = Add(a, b) }"
    embedding = parse(text, t=DRAW(10, 8), w=DRAW(8, 4), b=DRAW(4))
    data = {"x": np.random.default_rng(3).integers(0, 10, (32, 5))}
    first = quantize(embedding, data, threads=1)
    again = quantize(embedding, data, plan=Plan.from_json(first.plan.to_json()), threads=1)
    assert again.plan.to_json() == first.plan.to_json()


def test_values_without_elements_are_no_obstacle() -> None:
    text = """(float[N,4] x) => (float[N,3] y, float[N,0] none) {
      a = MatMul(x, w) z = Slice(x, nought, nought, axis) none = Add(z, empty) y = Relu(a) }"""
    model = parse(text, w=DRAW(4, 3), nought=i64(0), axis=i64(1), empty=np.zeros((1, 0), np.float32))
    report = quantize(model, DRAW(32, 4), threads=1).report
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db["y"] > 28


@pytest.mark.parametrize("op", ["Gemm", "Conv"])
def test_channels_are_not_evened_out_through_a_bias_that_is_computed(op: str) -> None:
    factors = np.exp2(np.arange(8) / 2 - 2).astype(np.float32)
    if op == "Gemm":
        text = "(float[N,8] x, float[N,8] z) => (float[N,4] y) { a = Gemm(x, w, z) y = Gemm(a, v) }"
        constants, shapes = {"w": DRAW(8, 8) * factors, "v": DRAW(8, 4) / factors[:, None]}, {"x": (8,), "z": (8,)}
    else:
        text = "(float[1,3,6,6] x, float[1,8] z) => (float[1,4,4,4] y) { b = Squeeze(z, axis) a = Conv(x, w, b) y = Conv(a, v) }"
        constants = {
            "w": DRAW(8, 3, 3, 3) * factors.reshape(8, 1, 1, 1), "v": DRAW(4, 8, 1, 1) / factors.reshape(1, 8, 1, 1),
            "axis": i64(0),
        }  # fmt: skip
        shapes = {"x": (3, 6, 6), "z": (8,)}
    draw = np.random.default_rng(3).standard_normal
    data = {name: draw((64, *shape)).astype(np.float32) for name, shape in shapes.items()}
    data["z"] *= factors
    reports = [quantize(parse(text, **constants), data, threads=1, equalize=even).report for even in (True, False)]
    evened, plain = (report.fidelity.sqnr_db["y"] for report in reports)
    assert evened > plain - 1
    assert plain > 20


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul(x, w) a = Add(h, b) r = Relu(a) k = MatMul(r, u) y = Add(k, b)",
        "q = MatMul(x, w) a = Add(q, b) k = MatMul(x, u) c = Add(b, k) y = Add(a, c)",
        "m = Mul(x, b) h = MatMul(m, w) y = Add(h, b)",
        "n = LayerNormalization(x, s, b) h = MatMul(n, w) y = Add(h, b)",
    ],
    ids=["one behind the other", "side by side", "an operand, too", "of a normalization, too"],
)
def test_a_bias_that_several_products_share(body: str) -> None:
    constants = {"w": DRAW(8, 8), "u": DRAW(8, 8), "b": DRAW(8), "s": DRAW(8)}
    used = {name: value for name, value in constants.items() if re.search(rf"\b{name}\b", body)}
    model = parse(f"(float[N,5,8] x) => (float[N,5,8] y) {{ {body} }}", **used)
    data = np.random.default_rng(3).standard_normal((32, 5, 8)).astype(np.float32)
    report = quantize(model, data, threads=1).report
    assert report.coverage.complete
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db["y"] > 26


def test_a_single_number_of_a_fixed_batch_is_an_output() -> None:
    model = parse("(float[1,8] x) => (float s) { a = MatMul(x, w) s = ReduceSum <keepdims=0> (a) }", w=DRAW(8, 4))
    fidelity = quantize(model, DRAW(32, 8), threads=1).report.fidelity
    assert fidelity is not None
    assert fidelity.sqnr_db["s"] > 26
