"""Where quantizers sit: rules on tiny models, golden plans, and invariance under renaming and reordering."""

import json
import math
import random
import re
from dataclasses import replace

import numpy as np
import onnx
import pytest

import models
from models import MODELS, ORT_TARGET, cached, f32, i64, parse, prepared, scalar, weights
from onnx_eptq import graph as og
from onnx_eptq.errors import ModelError, UnsupportedOp, UsageError
from onnx_eptq.grid import Grid
from onnx_eptq.plan import Plan, QuantPoint, Rules, check_plan, linear_layers, make_plan, role_of, walk
from onnx_eptq.targets import TARGETS

W = weights(0)


def raw(proto):
    """The graph as it is written down, not prepared."""
    graph = og.load(proto)
    og.infer_shapes(graph)
    return graph


def plan_of(source, rules=None, target=ORT_TARGET):
    proto = MODELS[source]() if isinstance(source, str) else source
    return make_plan(prepared(proto), target, rules)


def body(text, **constants):
    """A model whose input x [2,4,6,6] goes through a Conv into `a`, then through the given nodes to y."""
    head = "(float[2,4,6,6] x) => (float y) { a = Conv <pads=[1,1,1,1]> (x, w, b)\n"
    return parse(head + text + "}", w=W(4, 4, 3, 3), b=W(4, fan=10), **constants)


# ---- golden


@pytest.mark.parametrize("name", MODELS)
def test_plan_is_the_golden_one(name, golden):
    golden(f"{name}.plan.json", cached(name).plan.to_json())


# ---- rules that hold on every model


def test_no_quantizer_between_an_operator_and_its_relu_or_clip(case):
    for node in case.graph.nodes:
        (source, *_) = node.inputs or [None]
        fused = role_of(node) == "clamp" and source.inputs and role_of(source.inputs[0]) in ("linear", "arithmetic")
        if fused and len(source.outputs) == 1:
            assert source.name not in case.plan
            assert node.outputs[0].name in case.plan


def test_inputs_outputs_sums_and_concatenations_are_quantized(case):
    ends = [*case.graph.inputs, *case.graph.outputs]
    sums = [node.outputs[0] for node in case.graph.nodes if node.op in ("Add", "Concat", "Sub", "Mul")]
    fused = {t.name for t in sums if len(t.outputs) == 1 and role_of(t.outputs[0]) == "clamp"}
    wanted = {tensor.name for tensor in [*ends, *sums]} - fused - set(case.plan.floats)
    assert wanted <= set(case.plan)
    if case.plan.floats == {}:
        assert {tensor.name for tensor in ends} <= set(case.plan)


def test_every_weight_is_quantized_per_output_channel(case):
    assert case.layers
    for layer in case.layers:
        if layer.source.name not in case.plan:
            assert "the runtime would round it" in case.plan.floats[layer.weight.name]
            continue
        point = case.plan[layer.weight.name]
        assert (point.role, point.grid) == ("weight", Grid(8, True, layer.axis))


def test_every_bias_of_a_quantized_layer_is_int32_on_the_product_of_the_scales(case):
    for layer in case.layers:
        if layer.bias is None:
            continue
        point = case.plan[layer.bias.name]
        assert (point.role, point.grid.bits, point.grid.signed) == ("bias", 32, True)
        assert point.scale_from == (case.plan.root(layer.source.name).value, layer.weight.name)
        assert (point.grid.axis is None) == (layer.axis is None)


def test_activations_are_per_tensor_and_unsigned(case):
    for point in case.plan.values():
        if point.role in ("activation", "constant"):
            assert (point.grid.axis, point.grid.signed) == (None, False)


def test_what_is_tied_comes_after_what_it_is_tied_to(case):
    order = list(case.plan)
    for value, point in case.plan.items():
        if point.tied_to:
            root = case.plan[point.tied_to]
            assert root.tied_to is None
            assert root.grid == point.grid
            assert order.index(root.value) < order.index(value)


def test_plan_fits_its_own_graph(case):
    check_plan(case.graph, ORT_TARGET, case.plan)


def test_json_round_trip(case):
    text = case.plan.to_json()
    again = Plan.from_json(text)
    assert again == case.plan
    assert list(again) == list(case.plan)
    assert again.floats == case.plan.floats
    assert again.to_json() == text
    assert all(row["value"] in text for row in json.loads(text)["points"])


def test_text_names_every_value(case):
    lines = str(case.plan).splitlines()
    assert len(lines) == len(case.plan) + len(case.plan.floats)
    for line, value in zip(lines, [*case.plan, *case.plan.floats], strict=True):
        assert value in line


def test_walk_yields_a_quantizer_right_after_its_producer_and_a_constant_before_its_reader(case):
    items = list(walk(case.graph, case.plan))
    assert [item for item in items if not isinstance(item, QuantPoint)] == case.graph.nodes
    values = [item.value for item in items if isinstance(item, QuantPoint)]
    assert sorted(values) == sorted(case.plan)
    known = {tensor.name for tensor in case.graph.inputs}
    tensors, quantized = case.graph.tensors(), set()
    for item in items:
        if isinstance(item, QuantPoint):
            assert item.value in known or isinstance(tensors[item.value], og.gs.Constant)
            quantized.add(item.value)
        else:
            assert {t.name for t in item.inputs} & set(case.plan) <= quantized
            known |= {t.name for t in item.outputs}


# ---- single rules


def test_residual_block():
    plan = plan_of("residual")
    activations = [value for value, point in plan.items() if point.role == "activation"]
    assert activations == ["image", "b", "c", "e", "f", "g", "logits"]  # not the inputs of the two Relus


def test_clip_and_relu_give_limits():
    plan = plan_of("depthwise")
    assert plan["b"].limits == plan["d"].limits == (0.0, 6.0)
    assert plan_of("residual")["b"].limits == (0.0, None)
    assert plan_of("matmul")["shares"].limits == (0.0, 1.0)


def test_outputs_and_what_a_softmax_reads_keep_their_whole_range():
    plan = plan_of("matmul")
    assert [value for value, point in plan.items() if point.whole_range] == ["f", "shares"]


MOVES = {
    "MaxPool": ("y = MaxPool <kernel_shape=[2,2]> (a)", {}),
    "GlobalMaxPool": ("y = GlobalMaxPool(a)", {}),
    "Reshape": ("y = Reshape(a, s)", {"s": i64(2, -1)}),
    "Flatten": ("y = Flatten(a)", {}),
    "Transpose": ("y = Transpose <perm=[0,2,3,1]> (a)", {}),
    "Slice": ("y = Slice(a, f, t)", {"f": i64(0, 1), "t": i64(2, 3)}),
    "Squeeze": ("c = Unsqueeze(a, s)  y = Squeeze(c, s)", {"s": i64(1)}),
    "Gather": ("y = Gather <axis=1> (a, s)", {"s": i64(2, 0)}),
    "Expand": ("y = Expand(a, s)", {"s": i64(3, 2, 4, 6, 6)}),
    "Tile": ("y = Tile(a, s)", {"s": i64(1, 2, 1, 1)}),
    "Identity": ("y = Identity(a)", {}),
    "DepthToSpace": ("y = DepthToSpace <blocksize=2> (a)", {}),
    "Resize": ("y = Resize <mode='nearest'> (a, , s)".replace("'", '"'), {"s": f32(1, 1, 2, 2)}),
    "Pad": ("y = Pad(a, s)", {"s": i64(0, 0, 1, 1, 0, 0, 1, 1)}),
    "Pad with 0": ("y = Pad(a, s, z)", {"s": i64(0, 0, 1, 1, 0, 0, 1, 1), "z": scalar(0)}),
}
CHANGES = {
    "Pad with 1": ("y = Pad(a, s, o)", {"s": i64(0, 0, 1, 1, 0, 0, 1, 1), "o": scalar(1)}),
    "Pad with what is computed": (
        "m = ReduceMax <keepdims=0> (a) y = Pad(a, s, m)",
        {"s": i64(0, 0, 1, 1, 0, 0, 1, 1)},
    ),
    "Resize": ("y = Resize <mode='linear'> (a, , s)".replace("'", '"'), {"s": f32(1, 1, 2, 2)}),
    "AveragePool": ("y = AveragePool <kernel_shape=[2,2]> (a)", {}),
    "GlobalAveragePool": ("y = GlobalAveragePool(a)", {}),
    "Sigmoid": ("y = Sigmoid(a)", {}),
    "Neg": ("y = Neg(a)", {}),
    "Softmax": ("y = Softmax(a)", {}),
}


@pytest.mark.parametrize("name", MOVES)
def test_moved_values_share_the_grid(name):
    text, constants = MOVES[name]
    plan = make_plan(raw(body(text, **constants)), ORT_TARGET)
    assert plan["y"].tied_to == "a"
    assert plan["y"].moved
    assert plan["a"].tied_to is None
    assert plan["a"].whole_range  # the grid is a network output's, too


@pytest.mark.parametrize("name", CHANGES)
def test_computed_values_have_a_grid_of_their_own(name):
    text, constants = CHANGES[name]
    plan = make_plan(raw(body(text, **constants)), ORT_TARGET)
    assert plan["y"].tied_to is None
    assert not plan["y"].moved
    assert plan["a"].tied_to is None


def test_every_output_of_a_split_is_tied():
    proto = body("u, v = Split <axis=1> (a, s)  y = Add(u, v)", s=i64(2, 2))
    plan = make_plan(raw(proto), ORT_TARGET)
    assert plan["u"].tied_to == plan["v"].tied_to == "a"
    assert plan["y"].tied_to is None


CONCAT = """u = Conv(x, w1)  v = Relu(u)  {more}
  y = Concat <axis=1> ({order})"""


@pytest.mark.parametrize("order", ["a, v", "v, a"])
def test_inputs_that_concat_alone_reads_share_its_grid(order):
    plan = make_plan(raw(body(CONCAT.format(order=order, more=""), w1=W(4, 4, 1, 1))), ORT_TARGET)
    assert plan["a"].tied_to is None  # computed first, whatever the order of the inputs
    assert plan["v"].tied_to == plan["y"].tied_to == "a"
    assert plan["y"].moved
    assert not plan["v"].moved
    assert plan["a"].whole_range


def test_concat_takes_the_wider_limits():
    clips = "u = Clip(a, z, six)  c = Conv(x, w1)  v = Clip(c, m, one)  y = Concat <axis=1> (u, v)"
    proto = body(clips, z=scalar(0), six=scalar(6), m=scalar(-2), one=scalar(1), w1=W(4, 4, 1, 1))
    assert make_plan(raw(proto), ORT_TARGET)["u"].limits == (-2.0, 6.0)


def test_concat_input_with_another_reader_keeps_its_grid():
    proto = body("u = Conv(a, w1)  v = Relu(u)  y = Concat <axis=1> (a, v)", w1=W(4, 4, 1, 1))
    plan = make_plan(raw(proto), ORT_TARGET)
    assert plan["a"].tied_to is None
    assert plan["v"].tied_to is None
    assert plan["y"].tied_to == "v"
    assert not plan["y"].moved  # what comes from `a` has to be rounded


def test_values_that_are_moved_to_joins_only_share_their_grid():
    proto = body(
        "t = Transpose <perm=[0,1,3,2]> (a)  u = Conv(x, w1)  v = Relu(u)  y = Concat <axis=1> (t, v)", w1=W(4, 4, 1, 1)
    )
    plan = make_plan(raw(proto), ORT_TARGET)
    assert plan["v"].tied_to == plan["t"].tied_to == plan["y"].tied_to == "a"
    assert plan["y"].moved
    assert plan["a"].whole_range


@pytest.mark.parametrize("more", ["q = Conv(a, w1)  r = Relu(q)", "q = Sin(a)", "q = Transpose(a)  r = Conv(q, w1)"])
def test_values_that_others_read_keep_their_grid_though_moved_to_a_join(more):
    moved = "t = Transpose <perm=[0,1,3,2]> (a)  u = Conv(x, w1)  v = Relu(u)  y = Concat <axis=1> (t, v)"
    plan = make_plan(raw(body(f"{more}  {moved}", w1=W(4, 4, 1, 1))), ORT_TARGET)
    assert plan["v"].tied_to is None
    assert plan["t"].tied_to == "a"
    assert plan["y"].tied_to == "v"
    assert not plan["y"].moved


def test_a_join_takes_no_grid_from_layers_that_read_it_elsewhere():
    """`y` is on the grid of `a`, which a layer reads as well, and does not bring it along when it is joined itself."""
    text = "u, v = Split <axis=1> (a, s)  r = Concat <axis=1> (v, u)  c = Conv(a, w1)  q = Relu(c)  y = Concat <axis=1> (r, q)"
    plan = make_plan(raw(body(text, s=i64(2, 2), w1=W(4, 4, 1, 1))), ORT_TARGET)
    assert plan["a"].tied_to is None
    assert (plan["r"].tied_to, plan["r"].moved) == ("a", True)
    assert (plan["y"].tied_to, plan["y"].moved) == ("q", False)


def test_joins_of_one_value_keep_grids_of_their_own():
    text = """d = Conv(x, w1)  e = Conv(x, w2)  u = Concat <axis=1> (a, d)  v = Concat <axis=1> (a, e)
      p = Conv(u, w3)  q = Conv(v, w3)  y = Add(p, q)"""
    plan = make_plan(raw(body(text, w1=W(4, 4, 1, 1), w2=W(4, 4, 1, 1), w3=W(4, 8, 1, 1))), ORT_TARGET)
    assert [plan[value].tied_to for value in "adeuv"] == [None, None, None, "d", "e"]


def test_what_is_taken_apart_and_joined_again_needs_no_other_grid():
    proto = body("u, v = Split <axis=1> (a, s)  q = Relu(u)  y = Concat <axis=1> (v, u)", s=i64(2, 2))
    plan = make_plan(raw(proto), ORT_TARGET)
    assert plan["y"].tied_to == "a"
    assert plan["y"].moved
    assert plan["a"].whole_range


STACKED = """(float[N,1,8] x, float[N,2,T,8] past) => (float[N,1,8] y, float[N,2,T1,8] present) {
  k0 = MatMul(x, w0)  p0 = Gather <axis=1> (past, zero)  all0 = Concat <axis=1> (p0, k0)  length = Shape(past)
  a0 = ReduceMean <axes=[1]> (all0)  x1 = Add(x, a0)
  k1 = MatMul(x1, w1)  p1 = Gather <axis=1> (past, one)  all1 = Concat <axis=1> (p1, k1)
  a1 = ReduceMean <axes=[1]> (all1)  y = Add(x1, a1)
  s0 = Unsqueeze(all0, ones)  s1 = Unsqueeze(all1, ones)  present = Concat <axis=1> (s0, s1)
}"""


def test_a_state_of_stacked_layers_stays_on_its_grid_from_step_to_step():
    constants = {"w0": W(8, 8), "w1": W(8, 8), "zero": np.int64(0), "one": np.int64(1), "ones": i64(1)}
    plan = make_plan(raw(parse(STACKED, opset=17, **constants)), ORT_TARGET)
    on_it = [value for value, point in plan.items() if point.tied_to == "past"]
    assert set(on_it) == {"p0", "p1", "k0", "k1", "all0", "all1", "s0", "s1", "present"}
    assert all(plan[value].moved for value in on_it if not value.startswith("k"))


def test_an_input_that_layers_read_in_a_join_is_no_state():
    text = """(float[N,4,6,6] x, float[N,4,6,6] s) => (float[N,8,6,6] z) {
      a = Conv(x, w)  r = Relu(a)  u = Concat <axis=1> (s, r)  c = Conv(u, w1)  y = Relu(c)  z = Concat <axis=1> (s, y) }"""
    plan = make_plan(raw(parse(text, w=W(4, 4, 1, 1), w1=W(4, 8, 1, 1))), ORT_TARGET)
    assert plan["s"].tied_to is None
    assert (plan["u"].tied_to, plan["z"].tied_to) == ("r", "y")


def test_concat_inputs_of_other_widths_keep_their_grid():
    proto = body(CONCAT.format(order="a, v", more=""), w1=W(4, 4, 1, 1))
    plan = make_plan(raw(proto), ORT_TARGET, Rules(bits={"v": 4}))
    assert plan["v"].tied_to is None
    assert plan["v"].grid.bits == 4
    assert plan["y"].tied_to == "a"
    assert not plan["y"].moved


def test_matmul_and_add_of_a_vector_is_a_layer_with_a_bias():
    plan = plan_of("matmul")
    assert (plan["b1"].role, plan["b1"].scale_from) == ("bias", ("tokens", "w1"))
    assert (plan["b2"].role, plan["b2"].scale_from) == ("bias", ("c", "w2"))  # on the left of its Add
    assert not {"a", "b", "d"} & set(plan)


def test_add_behind_a_matmul_whose_result_is_read_twice_is_no_bias():
    proto = parse(
        "(float[2,4,6] x) => (float[2,4,6] y) { a = MatMul(x, w) b = Add(a, v) y = Mul(a, b) }",
        w=W(6, 6),
        v=W(6, fan=6),
    )
    plan = plan_of(proto)
    assert plan["v"].role == "constant"
    assert "a" in plan


def test_add_behind_a_matmul_that_is_an_output_is_no_bias():
    proto = parse(
        "(float[2,4,6] x) => (float[2,4,6] a, float[2,4,6] y) { a = MatMul(x, w) y = Add(a, v) }",
        w=W(6, 6),
        v=W(6, fan=6),
    )
    plan = plan_of(proto)
    assert plan["v"].role == "constant"
    assert plan["a"].role == "activation"


def test_shared_weights_have_one_quantizer_and_biases_one_each():
    plan = plan_of("two_towers")
    assert [value for value, point in plan.items() if point.role == "weight"] == ["shared"]
    pairs = [point.scale_from for point in plan.values() if point.role == "bias"]
    assert pairs == [("left", "shared"), ("right", "shared")]


AXES = {
    "Conv": ("(float[2,4,6,6] x) => (float y) { y = Conv(x, w) }", (5, 4, 3, 3), 0),
    "depthwise": ("(float[2,4,6,6] x) => (float y) { y = Conv <group=4> (x, w) }", (8, 1, 3, 3), 0),
    "Gemm": ("(float[2,4] x) => (float y) { y = Gemm(x, w) }", (4, 5), 1),
    "Gemm transB": ("(float[2,4] x) => (float y) { y = Gemm <transB=1> (x, w) }", (5, 4), 0),
    "MatMul": ("(float[2,3,4] x) => (float y) { y = MatMul(x, w) }", (4, 5), 1),
    "MatMul batch": ("(float[2,3,4] x) => (float y) { y = MatMul(x, w) }", (2, 4, 5), None),
    "MatMul vector": ("(float[2,3,4] x) => (float y) { y = MatMul(x, w) }", (4,), None),
    "MatMul left": ("(float[2,4,3] x) => (float y) { y = MatMul(w, x) }", (5, 4), None),
    "ConvTranspose": ("(float[2,4,6,6] x) => (float y) { y = ConvTranspose(x, w) }", (4, 5, 3, 3), 1),
    "ConvTranspose group": (
        "(float[2,4,6,6] x) => (float y) { y = ConvTranspose <group=2> (x, w) }",
        (4, 5, 3, 3),
        None,
    ),
}


@pytest.mark.parametrize("name", AXES)
def test_channel_axis(name):
    text, shape, axis = AXES[name]
    graph = raw(parse(text, w=W(*shape)))
    plan = make_plan(graph, ORT_TARGET)
    assert plan["w"].grid == Grid(8, True, axis)
    (layer,) = linear_layers(graph)
    assert (layer.weight.name, layer.source.name, layer.axis) == ("w", "x", axis)


# ---- float regions


@pytest.mark.parametrize("target", TARGETS)
def test_region_around_a_logarithm_stays_float(target):
    """Where the runtime would round the inputs of a product with integer weights, these stay float, too."""
    plan = plan_of("spectrogram", target=TARGETS[target])
    assert {"re", "im", "re2", "im2", "power", "safe"} <= set(plan.floats)
    assert all(plan.floats[value] for value in plan.floats)
    rounds = bool(TARGETS[target].rounds_inputs)
    assert rounds == (target == "onnxruntime")
    for name in ("cosines", "sines"):
        assert "the runtime would round it" in plan.floats[name] if rounds else plan[name].role == "weight"
    assert plan["log"].role == "activation"  # what the classifier reads


SENSITIVE = ["Log", "Sqrt", "Reciprocal", "Exp", "Erf", "Sin"]


@pytest.mark.parametrize("op", SENSITIVE)
def test_inside_of_a_sensitive_chain_is_float_and_its_ends_are_quantized(op):
    text = f"c = Relu(a)  d = Add(c, one)  e = {op}(d)  f = Mul(e, half)  y = Conv(f, w1)"
    plan = make_plan(raw(body(text, one=scalar(1), half=scalar(2), w1=W(4, 4, 1, 1))), ORT_TARGET)
    assert {"a", "c", "d", "e"} <= set(plan.floats)
    assert {"f", "w1", "y"} <= set(plan)
    assert plan["w"].role == "weight"
    assert not {"one", "half"} & set(plan)  # a float operator has no integer operands


@pytest.mark.parametrize("op", SENSITIVE)
def test_a_network_that_ends_in_a_sensitive_operator_is_quantized_up_to_its_last_layer(op):
    proto = models.residual()
    proto.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["shares"], axis=-1))
    proto.graph.node.append(onnx.helper.make_node(op, ["shares"], ["result"]))
    proto.graph.output[0].name = "result"
    plan = plan_of(proto)
    assert set(plan) == set(plan_of("residual")) - {"logits"}
    assert set(plan.floats) == {"logits", "shares", "result"}


def test_a_mel_spectrogram_is_float_through_both_of_its_matrices():
    proto = models.spectrogram()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.abs(W(9, 9)), "mel"))
    position = [node.op_type for node in proto.graph.node].index("Log")
    proto.graph.node.insert(position, onnx.helper.make_node("MatMul", ["safe", "mel"], ["bands"]))
    proto.graph.node[position + 1].input[0] = "bands"
    plan = plan_of(proto, target=TARGETS["onnx"])
    assert {"wave", "re", "im", "power", "safe", "bands"} <= set(plan.floats)
    assert [value for value, point in plan.items() if point.role == "weight"][:3] == ["cosines", "sines", "mel"]


def unit(value, result):
    """The nodes of `result` = `value` / |`value`|, channel by channel."""
    return (
        f"{value}_square = Mul({value}, {value})  {value}_power = ReduceSum <keepdims=1> ({value}_square, channels)\n"
        f"{value}_size = Sqrt({value}_power)  {result} = Div({value}, {value}_size)\n"
    )


def test_layers_between_normalizations_read_integers():
    """All that reads `c` needs float, but half of it goes round the Sqrt: this is no spectrogram."""
    text = unit("a", "e") + "c = Conv(e, w1)\n" + unit("c", "f") + "y = Conv(f, w2)"
    plan = make_plan(raw(body(text, w1=W(4, 4, 1, 1), w2=W(4, 4, 1, 1), channels=i64(1))), ORT_TARGET)
    assert {"w", "e", "w1", "f", "w2"} <= set(plan)
    assert {"a_square", "a_power", "a_size"} <= set(plan.floats)


def test_layers_before_a_normalization_write_integers():
    """One that no pass makes an operator, by root mean square: else ONNX Runtime would run `c` in float."""
    text = "e = Conv(a, w1)\n" + unit("e", "f") + "c = Conv(f, w2)\n" + unit("c", "g") + "y = Conv(g, w3)"
    shapes = {name: W(4, 4, 1, 1) for name in ("w1", "w2", "w3")}
    plan = make_plan(raw(body(text, **shapes, channels=i64(1))), ORT_TARGET)
    assert {"e", "c"} <= set(plan)
    assert {"e_square", "e_power", "c_size"} <= set(plan.floats)


def test_layers_that_lead_to_sines_read_integers_but_for_the_first():
    """Coordinates are no spectrogram, and a network of such layers is to become smaller."""
    text = """(float[N,2] x) => (float[N,3] y) {
      g = Gemm(x, w1) s = Sin(g) h = Gemm(s, w2) k = Mul(h, omega) t = Sin(k) m = Gemm(t, w3) u = Sin(m) y = Gemm(u, w4) }"""
    shapes = {"w1": W(2, 8), "w2": W(8, 8), "w3": W(8, 8), "w4": W(8, 3), "omega": np.float32(30)}
    plan = make_plan(raw(parse(text, **shapes)), ORT_TARGET)
    assert {"w2", "w3", "w4", "s", "t", "u"} <= set(plan)
    assert {"x", "g", "h", "k", "m"} <= set(plan.floats)


def test_what_an_operator_that_is_kept_float_makes_is_not_quantized_but_for_layers():
    text = "p = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (a)  d = Sub(p, a)  y = Conv(d, w1)"
    proto = body(text, w1=W(4, 4, 1, 1))
    assert {"a", "p", "d"} <= set(make_plan(raw(proto), ORT_TARGET))
    plan = make_plan(raw(proto), ORT_TARGET, Rules(keep_float=("AveragePool",)))
    assert {"a", "d"} <= set(plan)
    assert plan.floats["p"] == "kept float as asked"
    before = "p = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (a)  y = Conv(p, w1)"
    assert "p" in make_plan(raw(body(before, w1=W(4, 4, 1, 1))), ORT_TARGET, Rules(keep_float=("AveragePool",)))


def test_a_last_layer_before_a_softmax_in_pieces_reads_integers():
    """All of its result goes through the Exp, but layers before it do not."""
    text = unit("a", "e") + "c = Conv(e, w1)  p = Exp(c)  t = ReduceSum <keepdims=1> (p, channels)  y = Div(p, t)"
    plan = make_plan(raw(body(text, w1=W(4, 4, 1, 1), channels=i64(1))), ORT_TARGET)
    assert {"w", "e", "w1"} <= set(plan)
    assert {"c", "p"} <= set(plan.floats)


def test_reasons_are_given():
    proto = body("d = Exp(a)  e = Log(d)  y = Conv(e, w1)", w1=W(4, 4, 1, 1))
    floats = make_plan(raw(proto), ORT_TARGET).floats
    assert floats["d"] == "Exp needs float"


# ---- what the user asks for


def test_default_widths():
    plan = plan_of("residual", Rules(4, 5))
    assert {point.grid.bits for point in plan.values() if point.role == "weight"} == {4}
    narrow = {value for value, point in plan.items() if point.role == "activation" and point.grid.bits == 5}
    wide = {value for value, point in plan.items() if point.role == "activation"} - narrow
    assert wide == {"image", "logits", "c"}  # c: from a convolution into an Add, which adds it in its accumulator
    assert {plan[value].grid.bits for value in wide} == {8}
    assert {point.grid.bits for point in plan.values() if point.role == "bias"} == {32}


WIDE = {  # what stands behind `a`, values of 8 bits among narrow ones: the network's ends are left out
    "c = Conv(a, w1) d = Add(c, a) e = Relu(d) y = Conv(e, w1)": {"c"},
    "c = Conv(a, w1) d = Add(c, a) e = Mul(c, d) y = Conv(e, w1)": set(),  # two readers
    "c = Conv(a, w1) d = Mul(c, a) e = Relu(d) y = Conv(e, w1)": set(),  # no Add
    "c = Mul(a, a) d = Add(c, a) e = Relu(d) y = Conv(e, w1)": set(),  # not linear
    "c = Conv(a, w1) d = Softmax <axis=1> (c) y = Conv(d, w1)": {"c"},
    "c = Mul(a, a) d = Softmax <axis=1> (c) y = Conv(d, w1)": {"c"},
    "c = Conv(a, w1) d = Softmax <axis=1> (c) e = Mul(c, d) y = Conv(e, w1)": set(),
}


@pytest.mark.parametrize("text", WIDE)
@pytest.mark.parametrize("bits", [3, 8])
def test_values_that_no_narrow_kernel_stores_stay_wide(text, bits):
    plan = make_plan(raw(body(text, w1=W(4, 4, 1, 1))), ORT_TARGET, Rules(4, bits))
    ends = {"x", "y"}
    inner = {v: p.grid.bits for v, p in plan.items() if p.role == "activation" and v not in ends}
    assert {value for value, width in inner.items() if width == 8} == (WIDE[text] if bits == 3 else set(inner))
    assert set(inner.values()) <= {bits, 8}


def test_widths_by_pattern_of_layer_or_tensor_the_first_match_wins():
    plan = plan_of("residual", Rules(bits={"Conv": 2, "Conv*": 3, "w3": 5, "b": 6, "[ce]": 7}))
    assert [plan[name].grid.bits for name in ("w1", "w2", "w3", "b", "c", "e", "image")] == [2, 3, 5, 6, 7, 7, 8]


def test_keep_float_by_node_name_operator_and_tensor():
    by_node = plan_of("residual", Rules(keep_float=["Conv_1"]))
    assert by_node.floats["w2"] == by_node.floats["b2"].replace(
        "bias of a layer that is kept float", "kept float as asked"
    )
    assert "w2" not in by_node
    assert "w1" in by_node
    by_op = plan_of("residual", Rules(keep_float=["Conv"]))
    assert {"w1", "b1", "w2", "b2"} <= set(by_op.floats)
    assert {"w3", "b3"} <= set(by_op)
    by_tensor = plan_of("residual", Rules(keep_float=["c"]))
    assert by_tensor.floats["c"] == "kept float as asked"
    assert set(plan_of("residual")) - set(by_tensor) == {"c"}
    by_weight = plan_of("residual", Rules(keep_float=["w2"]))
    assert "w2" not in by_weight
    assert "b2" not in by_weight


def test_bias_of_a_layer_whose_input_is_float_stays_float():
    plan = plan_of("residual", Rules(keep_float=["image"]))
    assert "image" in plan.floats
    assert "b1" not in plan
    assert "the layer's input 'image' is float" in plan.floats["b1"]
    assert plan["w1"].role == "weight"


REFUSED = {
    "weights of 9 bits": (Rules(weight_bits=9), "weights of 2, 3, 4, 5, 6, 7, 8 bits, not 9"),
    "activations of 16 bits": (Rules(act_bits=16), "activations of 2, 3, 4, 5, 6, 7, 8 bits, not 16"),
    "an override that matches nothing": (Rules(bits={"nothing*": 4}), r"'nothing\*' matches no layer"),
    "an override of 1 bit": (Rules(bits={"Conv*": 1}), r"not 1 \(override 'Conv\*'\)"),
    "an override of a bias": (Rules(bits={"b1": 8}), "'b1' matches no layer and no tensor that is quantized"),
    "an override of a layer kept float": (Rules(bits={"w2": 8}, keep_float=["w2"]), "'w2' matches no layer and no"),
    "keep_float that matches nothing": (Rules(keep_float=["Cnov"]), "'Cnov' matches no layer"),
    "keep_float of a bias": (Rules(keep_float=["b1"]), "'b1' names a bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_rules(name):
    rules, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        plan_of("residual", rules)


def test_unsupported_operators_are_all_named():
    proto = parse(
        "(float[2,4] x) => (float y) { a = Gemm(x, w) b = Bernoulli(a) c = Multinomial(b) y = Gemm(c, w) }", w=W(4, 4)
    )
    with pytest.raises(UnsupportedOp, match=r"2 node.* 'Bernoulli' Bernoulli, 'Multinomial' Multinomial"):
        make_plan(og.load(proto), ORT_TARGET)


def test_operators_of_other_domains_are_unsupported():
    proto = parse("(float[2,4] x) => (float y) { a = Gemm(x, w) y = Relu(a) }", w=W(4, 4))
    proto.graph.node[1].domain = "my.ops"
    proto.opset_import.append(onnx.helper.make_opsetid("my.ops", 1))
    with pytest.raises(UnsupportedOp, match=re.escape("'Relu' my.ops.Relu")):
        make_plan(og.load(proto), ORT_TARGET)


def test_many_unsupported_nodes_are_counted():
    nodes = " ".join(f"v{i + 1} = Bernoulli(v{i})" for i in range(12))
    proto = parse(f"(float[2,4] x) => (float y) {{ v0 = Gemm(x, w) {nodes} y = Relu(v12) }}", w=W(4, 4))
    with pytest.raises(UnsupportedOp, match=r"12 node.* and 4 more"):
        make_plan(og.load(proto), ORT_TARGET)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match="nothing to quantize"):
        plan_of(parse("(float[2,4] x) => (float[2,4] y) { y = Relu(x) }"))


# ---- edited plans

EDITS = {
    "no such value": ("e", {"value": "nowhere"}, "'nowhere' is no value"),
    "weight of 9 bits": ("w1", {"grid": Grid(9, True, 0)}, "'w1' has 9 bits"),
    "activation of 16 bits": ("e", {"grid": Grid(16, False)}, "'e' has 16 bits"),
    "bias of 8 bits": ("b1", {"grid": Grid(8, True, 0)}, "'b1' has 8 bits, but target 'onnxruntime' takes 32"),
    "bias as weight": ("b1", {"role": "weight", "grid": Grid(8, True, 0)}, "'b1' is not the weight"),
    "activation as constant": ("e", {"role": "constant"}, "'e' is no constant"),
    "tied to nothing": ("g", {"tied_to": "nowhere"}, "'g' needs nowhere"),
    "scale from nothing": ("b1", {"scale_from": ("image", "nowhere")}, "'b1' needs .*nowhere"),
    "scale from another layer": ("b2", {"scale_from": ("image", "w1")}, "'b2' takes its scale from .*its layer reads"),
    "tied to another grid": ("g", {"grid": Grid(4, False)}, "'g' is tied to 'f', whose grid differs"),
    "tied to what is tied": ("logits", {"tied_to": "g"}, "'logits' is tied to 'g'"),
    "tied to what comes later": ("c", {"tied_to": "e"}, "'c' is tied to 'e'"),
    "tied to a weight": ("c", {"tied_to": "w1", "grid": Grid(8, True, 0)}, "'c'"),
    "signed activation": ("e", {"grid": Grid(8, True)}, "'e' "),
    "activation per channel": ("e", {"grid": Grid(8, False, 1)}, "'e' "),
    "unsigned weight": ("w1", {"grid": Grid(8, False, 0)}, "'w1' "),
    "weight along another axis": ("w1", {"grid": Grid(8, True, 1)}, "'w1' "),
    "bias without its scales": ("b1", {"scale_from": None}, "'b1' "),
    "bias of scales that swapped": ("b1", {"scale_from": ("w1", "image")}, "'b1' "),
    "activation with a bias's scales": ("e", {"scale_from": ("image", "w1")}, "'e' "),
    "weight as activation": ("w1", {"role": "activation", "grid": Grid(8, False)}, "'w1' "),
    "bias of one scale although its weight has many": ("b1", {"grid": Grid(32, True)}, "'b1' needs axis 0"),
    "moved but not tied": ("e", {"moved": True}, "'e' is moved"),
    "moved although computed": ("e", {"moved": True, "tied_to": "c"}, "'e' is moved, but is not made of"),
    "moved from another grid": ("g", {"moved": True, "tied_to": "c"}, "'g' is moved, but is not made of"),
    "no such role": ("e", {"role": "actvation"}, "'e' "),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_plan_that_does_not_fit_is_refused(name):
    case = cached("residual")
    value, change, message = EDITS[name]
    points = [replace(point, **change) if point.value == value else point for point in case.plan.values()]
    edited = Plan.from_json(Plan({point.value: point for point in points}).to_json())
    with pytest.raises(UsageError, match=f"does not fit the model: {message}"):
        check_plan(case.graph, ORT_TARGET, edited)


def test_edited_plan_that_fits_is_taken():
    case = cached("residual")
    edited = Plan.from_json(case.plan.to_json())
    edited["w1"] = replace(edited["w1"], grid=Grid(4, True, 0))
    edited["w2"] = replace(edited["w2"], grid=Grid(4, True, None))
    edited["b2"] = replace(edited["b2"], grid=Grid(32, True, None))
    edited["e"] = replace(edited["e"], grid=Grid(5, False))
    edited["c"] = replace(edited["c"], tied_to="b")
    del edited["logits"], edited["w3"], edited["b3"]
    check_plan(case.graph, ORT_TARGET, edited)


def test_the_target_decides_what_fits():
    case = cached("residual")
    with pytest.raises(UsageError, match="target 'tiny' takes 4"):
        check_plan(case.graph, replace(TARGETS["onnx"], name="tiny", storage={4: "int4"}), case.plan)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1, "points": [{}]}', '{"version": 1, "points": 3}'])
def test_text_that_is_no_plan(text):
    with pytest.raises(UsageError, match="not a JSON plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 4.5}, "points.0.bits: .*integer"),
        ({"bits": "4"}, "points.0.bits: .*integer"),
        ({"bits": 0}, "points.0.bits: .*greater than or equal to 1"),
        ({"limits": [2, 1]}, "points.0.limits: the lower limit comes first"),
        ({"limits": [0, math.nan]}, "points.0.limits.1"),
        ({"limits": [0]}, "points.0.limits"),
        ({"reach": -1}, "points.0.reach"),
        ({"moved": "yes"}, "points.0.moved"),
        ({"with_of_grid": 3}, "points.0.with_of_grid: Extra inputs are not permitted"),
    ],
)
def test_a_row_that_says_what_no_plan_can_say_is_refused_by_its_place(change, message):
    plan = {"version": 1, "points": [{"value": "x", "role": "activation", "bits": 8, "signed": False} | change]}
    with pytest.raises(UsageError, match=message):
        Plan.from_json(json.dumps(plan))


@pytest.mark.parametrize("version", [{}, {"version": 2}])
def test_a_plan_of_another_version_is_refused(version):
    with pytest.raises(UsageError, match="version"):
        Plan.from_json(json.dumps({"points": [], **version}))


def test_two_points_for_one_value_are_refused():
    row = {"value": "x", "role": "activation", "bits": 8, "signed": False}
    with pytest.raises(UsageError, match="several points for 'x'"):
        Plan.from_json(json.dumps({"version": 1, "points": [row, {**row, "bits": 4}]}))


# ---- metamorphic


def renamed(proto, seed):
    """The same model under other names of nodes, values, inputs and outputs; and the mapping of values."""
    rng, found = random.Random(seed), {}
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)

    def new(name):
        return found.setdefault(name, f"{rng.choice('abxyz/')}{rng.randrange(10**6)}:{len(found)}") if name else name

    for part in (changed.graph.input, changed.graph.output, changed.graph.initializer, changed.graph.value_info):
        for item in part:
            item.name = new(item.name)
    for index, node in enumerate(changed.graph.node):
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
        node.name = f"node {rng.randrange(10**6)} {index}"
    return changed, found


def numbered(plan):
    """The plan with values replaced by their place in it."""
    place = {value: index for index, value in enumerate(plan)}
    return [
        replace(
            point,
            value=place[point.value],
            tied_to=place.get(point.tied_to),
            scale_from=point.scale_from and tuple(place[v] for v in point.scale_from),
        )
        for point in plan.values()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_renaming_changes_nothing(name):
    proto = MODELS[name]()
    plan = plan_of(proto)
    for seed in range(2):
        other = plan_of(renamed(proto, seed)[0])
        assert numbered(other) == numbered(plan)
        assert list(other.floats.values()) == list(plan.floats.values())


def reordered(proto, seed):
    """The same model with its nodes in another valid order, initializers shuffled."""
    rng = random.Random(seed)
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    known = {value.name for value in [*proto.graph.input, *proto.graph.initializer]} | {""}
    left, order = list(proto.graph.node), []
    while left:
        node = rng.choice([node for node in left if set(node.input) <= known])
        known |= set(node.output)
        left.remove(node)
        order.append(node)
    del changed.graph.node[:], changed.graph.initializer[:]
    changed.graph.node.extend(order)
    changed.graph.initializer.extend(rng.sample(list(proto.graph.initializer), len(proto.graph.initializer)))
    return changed


def structure(plan):
    """Who shares a grid with whom and what every grid is, whatever the order; copies of a constant are its equals."""

    def plain(value):
        return re.sub(r"/\d+$", "", value)

    ties = {value: sorted(plain(v) for v in plan if plan.root(v) is plan.root(value)) for value in plan}
    rows = [
        (
            *(plain(value), point.role, str(point.grid), str(point.limits), point.whole_range),
            *(str(ties[value]), str(point.scale_from and [ties[v] for v in point.scale_from])),
        )
        for value, point in plan.items()
    ]
    return sorted(rows), sorted(plan.floats.items())


@pytest.mark.parametrize("name", MODELS)
def test_reordering_changes_nothing(name):
    proto = MODELS[name]()
    orders = set()
    for seed in range(4):
        other = reordered(proto, seed)
        orders.add(tuple(node.output[0] for node in other.graph.node))
        assert structure(plan_of(other)) == structure(plan_of(proto))
    if name in ("concat", "attention", "two_towers", "spectrogram", "moves"):
        assert len(orders) > 1


def test_values_without_data_do_not_matter():
    """A plan depends on shapes and wiring, not on the numbers in the weights."""
    proto = models.residual()
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.raw_data = np.random.default_rng(1).permutation(onnx.numpy_helper.to_array(tensor)).tobytes()
    assert plan_of(proto) == plan_of("residual")


def group_norm() -> onnx.ModelProto:
    """As it is exported: groups normalized as channels, then a scale and a shift of each channel."""
    draw = weights(4)
    return parse(
        """(float[N,3,6,6] x) => (float[N,4,6,6] y) {
          a = Conv <pads=[1,1,1,1]> (x, w0, b0) b = Reshape(a, groups)
          n = InstanceNormalization(b, ones, zeros) c = Reshape(n, channels)
          s = Mul(c, gamma) d = Add(s, beta) r = Relu(d) y = Conv(r, w1)
        }""",
        w0=draw(8, 3, 3, 3, fan=27), b0=draw(8, fan=10), w1=draw(4, 8, 1, 1, fan=8),
        groups=np.array([0, 2, -1]), channels=np.array([-1, 8, 6, 6]), ones=np.ones(2, np.float32),
        zeros=np.zeros(2, np.float32), gamma=1 + draw(8, 1, 1, fan=4), beta=draw(8, 1, 1, fan=4),
    )  # fmt: skip


def test_scale_and_shift_belong_to_their_normalization():
    found = models.quantize(group_norm())
    assert set(found.plan.floats) == {"n", "c", "s"}
    assert set(found.plan.floats.values()) == {"between a normalization and its scale and shift"}
    assert {"x", "a", "b", "r", "y"} <= set(found.plan)
    assert not {"gamma", "beta", "d"} & set(found.plan)


DECODED = """(float[N,3,4,4] x) => (float[N,16,5] y) {
  a = Conv(x, w0, b0) r = Relu(a) o = Conv(r, w1, b1) f = Reshape(o, rows) t = Transpose <perm=[0,2,1]> (f)
  boxes, logits = Split <axis=-1, num_outputs=2> (t)
  scaled = Mul(boxes, stride) placed = Add(scaled, anchors) score = %s
  y = Concat <axis=-1> (placed, score)
}"""


def test_a_spectrogram_alone_is_a_front_and_a_small_network_with_a_head_is_none():
    draw = weights(4)
    power = "a = MatMul(x, w) p = Mul(a, a) m = MatMul(p, v) c = Clip(m, low) y = Log(c)"
    spectrogram = parse(
        f"(float[N,16] x) => (float[N,3] y) {{ {power} }}",
        w=draw(16, 8, fan=16), v=np.abs(draw(8, 3)), low=np.float32(1e-6),
    )  # fmt: skip
    found = models.quantize(spectrogram)
    assert "x" in found.plan.floats
    assert not [name for name, point in found.plan.items() if point.role == "activation"]
    for head in ("y = Exp(b)", "y = LpNormalization <axis=1> (b)"):
        text = f"(float[N,4] x) => (float[N,3] y) {{ a = Gemm(x, w) r = Relu(a) b = Gemm(r, v) {head} }}"
        found = models.quantize(parse(text, w=draw(4, 8, fan=4), v=draw(8, 3, fan=80)))
        assert {"x", "r", "w", "v"} <= found.plan.keys()
        assert {"b", "y"} <= found.plan.floats.keys()


def test_both_classes_of_one_score_share_a_grid():
    draw = weights(4)
    proto = parse("(float[N,4] x) => (float[N,2] y) { s = Gemm(x, w) p = Sigmoid(s) q = Sub(one, p) y = Concat <axis=1> (q, p) }",
                  w=draw(4, 1, fan=4), one=np.float32(1))  # fmt: skip
    assert {"p", "q", "y"} <= models.quantize(proto).plan.keys()


@pytest.mark.parametrize(("score", "mixes"), [("Sigmoid(logits)", True), ("Neg(logits)", False)])
def test_scores_and_coordinates_do_not_share_a_grid(score, mixes):
    """As the last operator of many detectors; joined with coordinates of 640, a score of 0.9 would be 0."""
    draw = weights(4)
    proto = parse(
        DECODED.replace("16,5", "16,6") % score,
        w0=draw(8, 3, 1, 1, fan=3), b0=draw(8, fan=10), w1=draw(6, 8, 1, 1, fan=8), b1=draw(6, fan=10),
        rows=np.array([0, 6, 16]), stride=np.float32(32),
        anchors=np.random.default_rng(0).uniform(0, 640, (1, 16, 3)).astype(np.float32),
    )  # fmt: skip
    found = models.quantize(proto)
    floats = {"boxes", "logits", "scaled", "placed", "score", "y"}
    assert floats <= set(found.plan.floats) if mixes else not floats & set(found.plan.floats)
    if mixes:
        assert found.plan.floats["y"] == "decoding: scores and coordinates join"
        assert "o" in found.plan
