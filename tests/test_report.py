"""Whether the report is true: what stays float, what runs in float kernels, what is no number, what was fed."""

import copy
import json
import math

import numpy as np
import onnx
import pytest

import models
import onnx_eptq
from models import cached, f32, i64, parse, weights
from onnx_eptq import pipeline, remarks
from onnx_eptq.errors import CoverageError, DataError, UsageError, VerificationError
from onnx_eptq.plan import UNPLANNED, Plan, Rules, explained
from onnx_eptq.remarks import low_fidelity
from onnx_eptq.report import MAX_LINES, measure_coverage
from onnx_eptq.verify import Fidelity, check_parity, distances, measure_fidelity

W = weights(60)
RNG = np.random.default_rng(60)
HEAD = "h = MatMul(v, w1) y = MatMul(h, w2) }"
ENDS = {"w1": W(16, 16), "w2": W(16, 5)}


def rtn(proto: onnx.ModelProto, data, **settings) -> onnx_eptq.Result:
    return onnx_eptq.quantize(proto, data, method="rtn", threads=1, **settings)


def recurrent() -> onnx.ModelProto:
    text = f"""(float[N,7,6] x) => (float[N,5] y) {{ s = Transpose <perm=[1,0,2]> (x) o, last = GRU <hidden_size=16> (s, wi, wr)
      v = Squeeze(last, first) {HEAD}"""
    return parse(text, wi=W(1, 48, 6), wr=W(1, 48, 16), first=i64(0), **ENDS)


def looked_up() -> onnx.ModelProto:
    """The mean of embeddings of what a mask leaves: float, as it divides by how many are left."""
    text = f"""(int64[N,T] ids) => (float[N,5] y) {{ e = Gather(table, ids) m = Cast <to=1> (ids) k = Unsqueeze(m, last)
      p = Mul(e, k) t = ReduceSum <keepdims=0> (p, one) n = ReduceSum <keepdims=0> (k, one) v = Div(t, n) {HEAD}"""
    return parse(text, table=W(50, 16), last=i64(-1), one=i64(1), **ENDS)


def summed() -> onnx.ModelProto:
    text = f"""(float[N,16,20] x) => (float[N,5] y) {{ v = Einsum <equation="nij,ij->ni"> (x, core) {HEAD}"""
    return parse(text, core=W(16, 20), **ENDS)


def branched() -> onnx.ModelProto:
    text = f"""(float[N,16] x) => (float[N,5] y) {{ n = ReduceMax <keepdims=0> (x) up = Greater(n, zero)
      v = If (up) <then_branch = t () => (float[N,16] a) {{ a = MatMul(x, inner) }},
      else_branch = f () => (float[N,16] b) {{ b = Identity(x) }}> {HEAD}"""
    return parse(text, zero=f32(0.0).reshape(()), inner=W(16, 16), **ENDS)


FLOAT_WEIGHTS = {
    recurrent: ({"wi", "wr"}, RNG.standard_normal((16, 7, 6)).astype(np.float32), "GRU"),
    looked_up: ({"table"}, {"ids": RNG.integers(1, 50, (16, 9))}, "Gather"),
    summed: ({"core"}, RNG.standard_normal((16, 16, 20)).astype(np.float32), "Einsum"),
    branched: ({"inner"}, RNG.standard_normal((16, 16)).astype(np.float32), "MatMul"),
}


@pytest.mark.parametrize("make", FLOAT_WEIGHTS, ids=lambda make: make.__name__)
def test_weights_that_no_layer_has_are_named(make):
    names, data, reader = FLOAT_WEIGHTS[make]
    with pytest.raises(CoverageError, match=f"{len(names)} of .* layers would stay float.*read by {reader}"):
        rtn(make(), data, strict=True)
    report = rtn(make(), data).report
    assert set(report.coverage.float_weights) == names
    assert report.coverage.quantized_layers == report.coverage.layers == 2
    size = 4 * math.prod(models.initializer(make(), min(names)).dims)
    assert f"{min(names)}: {size:,} bytes, read by {reader}" in str(report)
    assert "100.0 %" not in str(report.coverage)


def test_what_a_decoding_looks_up_is_no_weight():
    text = """(float[N,16] x) => (float[N,4,4] y) { h = MatMul(x, w1) s = Relu(h) v, i = TopK(s, four) y = Gather(anchors, i) }"""
    proto = parse(text, w1=W(16, 80), four=i64(4), anchors=W(80, 4))
    assert rtn(proto, RNG.standard_normal((16, 16)).astype(np.float32), strict=True).report.coverage.complete


def test_masks_are_no_weights():
    text = f"""(float[N,16,16] x) => (float[N,5] y) {{ e = Einsum <equation="bij,ij->bij"> (x, mask) n = ReduceMax (e, axes)
      up = Greater(n, zero) o = Squeeze(up) v0 = If (o) <then_branch = t () => (float[N,16,16] a) {{ a = Add(e, mask) }},
      else_branch = f () => (float[N,16,16] b) {{ b = Identity(e) }}> v = ReduceMean <keepdims=0> (v0, one) {HEAD}"""
    mask = np.tril(np.ones((16, 16), np.float32))
    proto = parse(text, mask=mask, axes=i64(0, 1, 2), zero=f32(0.0).reshape(()), one=i64(1), **ENDS)
    assert rtn(proto, RNG.standard_normal((16, 16, 16)).astype(np.float32), strict=True).report.coverage.complete


def test_widths_of_activations_and_of_tables_are_told():
    proto = parse(
        f"(int64[N] ids) => (float[N,5] y) {{ e = Gather(table, ids) v = Relu(e) {HEAD}", table=W(50, 16), **ENDS
    )
    report = rtn(proto, {"ids": RNG.integers(0, 50, (32,))}, weight_bits=4, act_bits=4).report
    assert report.coverage.constants_by_bits == {8: 3200}
    assert report.coverage.activations_by_bits[4] >= 1
    assert sum(report.coverage.activations_by_bits.values()) == report.coverage.activations
    assert "(3,200 of them beside layers, at 8 bit)" in str(report)
    assert str(report.coverage).endswith("4 activations (2 x 4 bit, 2 x 8 bit)")


def test_tables_take_no_fewer_bits():
    text = f"(int64[N] ids) => (float[N,5] y) {{ e = Gather(table, ids) v = Relu(e) {HEAD}"
    proto, data = parse(text, table=W(50, 16), **ENDS), {"ids": RNG.integers(0, 50, (32,))}
    with pytest.raises(UsageError, match=r"'tab\*' names constants that are no layer's weights"):
        rtn(proto, data, bits={"tab*": 4})
    assert rtn(proto, data, bits={"*": 4}).report.coverage.constants_by_bits == {8: 3200}


# ---- kernels


def test_layers_that_run_in_float_are_named():
    text = """(float[N,4,8,8] x) => (float[N,6,8,8] y) { a = Conv <pads=[1,1,1,1]> (x, w0) b = Relu(a)
      c = Conv <pads=[1,1,1,1]> (b, w1) d = Relu(c) e = Conv <pads=[1,1,1,1]> (d, w2) y = Exp(e) }"""
    proto = parse(text, w0=W(6, 4, 3, 3), w1=W(6, 6, 3, 3), w2=W(6, 6, 3, 3))
    report = rtn(proto, RNG.standard_normal((16, 4, 8, 8)).astype(np.float32)).report
    last = [node.name for node in models.prepared(proto).nodes if node.op == "Conv"][-1]
    assert report.parity.layers == 3
    assert report.parity.float_layers == {last: "Conv"}
    assert f"2 of 3 quantized layers in integer kernels of ONNX Runtime; in float: '{last}' Conv" in str(report)


def test_layers_named_like_fusions_keep_their_names():
    text = "(float[N,16] x) => (float[N,5] y) { r = MatMul(x, w1) s = Relu(r) h = MatMul(s, w3) y = MatMul(h, w2) }"
    proto = parse(text, **ENDS, w3=W(16, 16))
    for node, name in zip(
        (node for node in proto.graph.node if node.op_type == "MatMul"), ("fused a", "a", "b"), strict=True
    ):
        node.name = name
    report = rtn(proto, RNG.standard_normal((32, 16)).astype(np.float32)).report
    assert report.parity.layers == 3
    assert report.parity.float_layers == {}


def test_a_relu_that_nothing_passes_still_runs_on_integers():
    text = "(float[N,6] x) => (float[N,5] y) { a = Gemm(x, w0, b0) r = Relu(a) y = Gemm(r, w1, b1) }"
    proto = parse(text, w0=W(6, 8), b0=np.full(8, -100, np.float32), w1=W(8, 5), b1=W(5))
    report = rtn(proto, RNG.standard_normal((32, 6)).astype(np.float32)).report
    assert report.parity.float_layers == {}


@pytest.mark.parametrize("bits", [4, 8])
def test_products_with_float_results_are_held_against_exact_integers(bits):
    text = """(float[N,7,16] x) => (float[N,7,5] y) { a0 = MatMul(x, w0) a = Add(a0, b0) v = LayerNormalization (a, scale, shift)
      c0 = MatMul(v, w1) c = Add(c0, b1) z = LayerNormalization (c, scale, shift) y = MatMul(z, w2) }"""
    constants = {"scale": W(16), "shift": W(16), "b0": W(16), "b1": W(16), "w2": W(16, 5)}
    proto = parse(text, w0=W(16, 16), w1=W(16, 16), **constants)
    found = models.quantize(proto, Rules(bits, 8))

    def check(these):
        return check_parity(found.written, found.student, found.plan, found.layers, these, found.batches, threads=1)

    parity = check(found.quantized)
    assert parity.kernels["MatMulIntegerToFloat"] == 2
    assert parity.integer_values == 3 * len(found.batches)
    for name in ("w0", "w1"):  # one weight of one step more than the file holds
        other = copy.deepcopy(found.quantized[name])
        other.integers.view(-1)[0] += 1
        with pytest.raises(VerificationError, match="MatMulIntegerToFloat and exact integer arithmetic differ"):
            check({**found.quantized, name: other})


# ---- what is no number


def roots(shift: float) -> onnx.ModelProto:
    text = "(float[N,4] x) => (float[N,4] y) { a = Abs(x) b = Sub(a, shift) y = Sqrt(b) }"
    return parse(text, shift=f32(shift))


def test_what_is_no_number_in_the_file_is_counted_and_warned_of():
    x = np.abs(RNG.standard_normal((50, 4))).astype(np.float32)
    fidelity = measure_fidelity(roots(0.0), roots(0.5), [{"x": x}], 1)
    assert fidelity.broken == {"y": int((x < 0.5).sum())}
    assert math.isfinite(fidelity.sqnr_db["y"])
    warning, *_ = low_fidelity(fidelity, "try more bits")
    assert warning.startswith(f"output 'y' of the written file is NaN or infinite in {fidelity.broken['y']} elements")
    backwards = measure_fidelity(
        roots(0.5), roots(0.0), [{"x": x}], 1
    )  # what the float model has no number for is no loss
    assert backwards.broken == {}
    assert math.isfinite(backwards.sqnr_db["y"])
    assert distances({"y": x}, {"y": np.where(x < 0.5, np.nan, x)}) == {"y": -math.inf}


def test_the_report_is_json_whatever_it_holds():
    report = copy.deepcopy(rtn(cached("residual").proto, cached("residual").batches).report)
    report.fidelity.sqnr_db["odd"] = math.nan
    report.seconds["odd"] = math.inf

    def refuse(word):
        raise AssertionError(word)

    found = json.loads(report.to_json(), parse_constant=refuse)
    assert found["fidelity"]["sqnr_db"]["odd"] is None
    assert found["seconds"]["odd"] is None


# ---- what is said first


def test_losses_are_said_before_all_else(monkeypatch):
    monkeypatch.setattr(remarks, "LOW_SQNR", 200.0)
    text = f"(float[N,16] x) => (float[N,5] y) {{ v = Relu(x) {HEAD}"
    data = np.repeat(RNG.standard_normal((1, 16)).astype(np.float32), 12, 0)
    report = rtn(parse(text, **ENDS), data, weight_bits=2).report
    assert report.warnings[0].startswith("output 'y' ")
    assert any("all the same" in warning for warning in report.warnings[1:])


def test_the_last_line_says_where_the_file_is_however_much_there_is_to_say(tmp_path):
    result = onnx_eptq.quantize(
        cached("residual").proto, cached("residual").batches, output=tmp_path / "q.onnx", method="rtn", threads=1
    )
    report = copy.deepcopy(result.report)
    report.warnings = [f"warning {i}" for i in range(9)]
    report.fed = {f"x{i}": [0.0] * 4 for i in range(9)}
    report.preparation = {}
    report.fidelity = Fidelity(8, {f"y{i}": 3.0 for i in range(30)}, {}, {f"s{i}": ["y0"] for i in range(30)})
    report.coverage.float_values = {f"v{i}": "kept float as asked" for i in range(30)}
    lines = str(report).splitlines()
    assert len(lines) <= MAX_LINES
    assert lines[-1] == f"written    {tmp_path / 'q.onnx'}"
    assert sum(line.startswith("warning") for line in lines) == 5


def test_advice_is_not_to_keep_float_what_is_float():
    fidelity = Fidelity(8, {"y": 50.0}, {}, worst={"y": (3, 1.0)})
    (warning,) = low_fidelity(fidelity, "try more bits")
    assert "keep 'y' float" in warning
    (warning,) = low_fidelity(fidelity, "try more bits", {"y": "kept float as asked"})
    assert warning.endswith("try more bits")


def test_the_range_told_is_not_that_of_the_first_samples():
    text = f"(float[1,16] x) => (float[1,5] y) {{ v = Relu(x) {HEAD}"
    data = RNG.standard_normal((40, 1, 16)).astype(np.float32)
    data[0] = 0
    report = rtn(parse(text, **ENDS), [{"x": x} for x in data]).report
    assert report.fed["x"][:2] == pytest.approx([data.min(), data.max()])
    assert not any("all equal" in warning for warning in report.warnings)


def test_nothing_quantized_is_warned_of():
    text = f"(float[N,16] x) => (float[N,5] y) {{ v = Relu(x) {HEAD}"
    proto = parse(text, **ENDS)
    data = RNG.standard_normal((40, 16)).astype(np.float32)
    report = rtn(proto, data, keep_float=["MatMul"]).report
    assert report.coverage.quantized_layers == 0
    assert any("no layer is quantized" in warning for warning in report.warnings)
    assert len(report.coverage.float_layers) == 2  # named once, not once more for every weight and bias
    assert not {"w1", "w2"} & set(report.coverage.float_values)


# ---- plans of the user


def test_what_a_given_plan_leaves_out_is_listed_and_what_it_holds_is_not():
    found = cached("residual")
    usual = found.plan
    dropped = next(value for value, point in usual.items() if point.role == "activation" and not point.tied_to)
    weight = next(value for value, point in usual.items() if point.role == "weight")
    plan = Plan({value: point for value, point in usual.items() if value != dropped}, {weight: "kept float as asked"})
    told = explained(plan, usual)
    assert told.floats == {dropped: UNPLANNED}
    assert dict(told) == dict(plan)
    assert measure_coverage(found.graph, told).float_values[dropped] == UNPLANNED


# ---- data


def test_an_input_that_never_varies_is_told_of():
    text = "(float[N,16] x, float[N,16] z) => (float[N,5] y) { v = Add(x, z) h = MatMul(v, w1) y = MatMul(h, w2) }"
    data = {"x": RNG.standard_normal((40, 16)).astype(np.float32), "z": np.zeros((40, 16), np.float32)}
    warnings = rtn(parse(text, **ENDS), data).report.warnings
    assert [text for text in warnings if "nothing but" in text] == [
        "input 'z' was fed nothing but 0: its range is a guess; give samples that fill it"
    ]


def test_a_sample_that_the_model_cannot_compute_is_named():
    text = f"(int64[N,3] ids) => (float[N,5] y) {{ e = Gather(table, ids) v = ReduceMean <keepdims=0> (e, one) {HEAD}"
    ids = RNG.integers(0, 50, (64, 3))
    ids[41, 1] = 50  # behind the table's end
    with pytest.raises(DataError, match=r"cannot compute samples 32 to 63 of those used: .*check their values"):
        rtn(parse(text, table=W(50, 16), one=i64(1), **ENDS), {"ids": ids})


def test_memory_is_not_blamed_on_samples(monkeypatch):
    text = f"(float[N,16] x) => (float[N,5] y) {{ v = Relu(x) {HEAD}"

    def exhausted(*_args, **_kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(pipeline, "calibrated", exhausted)
    with pytest.raises(RuntimeError, match="allocate memory"):
        rtn(parse(text, **ENDS), RNG.standard_normal((16, 16)).astype(np.float32))


def test_a_small_column_of_shares_is_no_fault():
    text = "(float[N,16] x) => (float[N,6] y) { v = Relu(x) h = MatMul(v, w1) l = MatMul(h, w2) s = Add(l, rare) y = Softmax(s) }"
    rare = np.array([0, 0, 0, 0, 0, -9], np.float32)
    report = rtn(
        parse(text, w1=W(16, 16), w2=W(16, 6), rare=rare), RNG.standard_normal((64, 16)).astype(np.float32)
    ).report
    assert report.fidelity.worst == {}


SMALL_ENDS = {
    "logarithm": "s = Softmax(z) y = Log(s) }",
    "root": "s = Softplus(z) y = Sqrt(s) }",
    "power": "s = Sigmoid(z) y = Pow(s, power) }",
    "reciprocal": "s = Sigmoid(z) t = Add(s, power) y = Reciprocal(t) }",
}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("end", SMALL_ENDS)
def test_small_networks_are_no_spectrograms(end, layers):
    """What leads to a logarithm near the inputs is float in front of a network, not where it is all of one."""
    body = "z = Gemm(x, w1, b1)" if layers == 1 else "a = Gemm(x, w1, b1) r = Relu(a) z = Gemm(r, w2, b2)"
    used = {"w1": W(8, 8), "b1": W(8), "w2": W(8, 8), "b2": W(8), "power": np.float32(0.45)}
    text = f"(float[N,8] x) => (float[N,8] y) {{ {body} {SMALL_ENDS[end]}"
    proto = parse(text, **{name: value for name, value in used.items() if f" {name}" in text})
    report = rtn(proto, RNG.standard_normal((64, 8)).astype(np.float32)).report
    assert report.coverage.complete
    assert report.parity.float_layers == {}
    assert report.fidelity.sqnr_db["y"] > 30
