"""Files in and out: nothing is lost on a round trip, every bad input has its own sentence."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser

from onnx_eptq import graph as og
from onnx_eptq.errors import ModelError, OutputError

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 3] y)
<float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
{
    h = MatMul(x, w)
    y = Relu(h)
}
"""


def model(text: str = CHAIN) -> onnx.ModelProto:
    return parser.parse_model(text)


def run(proto: onnx.ModelProto, *arrays: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: a for i, a in zip(session.get_inputs(), arrays, strict=True)})


X = np.array([[1.0, -2.0, 3.0, -4.0], [0.5, 0.25, -0.125, 1.0]], np.float32)


# ------------------------------------------------------------------------------------------------------- round trips


def test_round_trip_computes_the_same_and_leaves_the_source_alone():
    source = model()
    before = source.SerializeToString()
    graph = og.load(source)
    graph.nodes[0].inputs[1].name = "renamed"
    graph.nodes[0].inputs[1].values *= 2
    og.to_model(graph)
    assert source.SerializeToString() == before
    result = og.to_model(og.load(source))
    np.testing.assert_array_equal(run(result, X)[0], run(source, X)[0])


def test_everything_graphsurgeon_drops_comes_back():
    source = model()
    source.producer_name, source.producer_version = "maker", "1.5"
    source.domain, source.model_version, source.doc_string = "org.example", 7, "about the model"
    helper.set_model_props(source, {"author": "a", "task": "b"})
    source.graph.doc_string = "about the graph"
    helper.set_metadata_props(source.graph, {"g": "1"})
    source.graph.node[0].name, source.graph.node[0].doc_string = "first", "about the node"
    helper.set_metadata_props(source.graph.node[0], {"n": "2"})
    source.graph.input[0].doc_string = "about the input"
    source.graph.input[0].type.denotation = "IMAGE"
    hidden = helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 3], doc_string="about h")
    helper.set_metadata_props(hidden, {"v": "3"})
    source.graph.value_info.append(hidden)
    note = onnx.TensorAnnotation(tensor_name="h")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    source.graph.quantization_annotation.append(note)

    result = og.to_model(og.load(source), metadata={"task": "new", "quantized": "yes"})

    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(result, name) == getattr(source, name)
    assert {p.key: p.value for p in result.metadata_props} == {"author": "a", "task": "new", "quantized": "yes"}
    assert result.graph.doc_string == "about the graph"
    assert [p.key for p in result.graph.metadata_props] == ["g"]
    assert result.graph.node[0].doc_string == "about the node"
    assert result.graph.node[0].metadata_props == source.graph.node[0].metadata_props
    assert result.graph.input[0] == source.graph.input[0]
    assert result.graph.output[0] == source.graph.output[0]
    assert result.graph.value_info[0].doc_string == "about h"
    assert [p.value for p in result.graph.value_info[0].metadata_props] == ["3"]
    assert result.graph.quantization_annotation[0] == note


def test_extras_survive_removed_nodes_and_copies():
    source = model()
    helper.set_model_props(source, {"a": "b"})
    for i, node in enumerate(source.graph.node):
        node.name, node.doc_string = f"n{i}", f"doc {i}"
    graph = og.copy(og.load(source))
    relu = graph.nodes[1]
    relu.inputs[0].outputs.clear()
    graph.nodes[0].outputs = [relu.outputs[0]]
    graph.nodes.remove(relu)
    result = og.to_model(graph)
    assert [n.doc_string for n in result.graph.node] == ["doc 0"]
    assert result.metadata_props[0].key == "a"


def test_a_copy_shares_nothing_editable():
    text = CHAIN.replace("h = MatMul(x, w)", "t = Transpose<perm = [0, 1]>(x)\n h = MatMul(t, w)")
    graph = og.load(model(text))
    twin = og.copy(graph)
    twin.nodes[0].attrs["perm"][0] = 5
    twin.nodes[1].inputs[1].values = np.zeros((4, 3), np.float32)
    twin.inputs[0].shape[0] = 99
    og.extras(twin).metadata["k"] = "v"
    assert graph.nodes[0].attrs["perm"] == [0, 1]
    assert graph.inputs[0].shape == ["N", 4]
    assert og.array(graph.nodes[1].inputs[1]).sum() == 78
    assert og.extras(graph).metadata == {}


def test_loading_a_graph_copies_it_and_a_foreign_graph_has_extras():
    foreign = gs.import_onnx(model())
    graph = og.load(foreign)
    assert graph is not foreign
    assert og.extras(graph) == og.Extras()
    assert run(og.to_model(graph), X)[0].shape == (2, 3)


def test_initializers_listed_as_inputs_become_constants():
    source = model(CHAIN.replace("ir_version: 8", "ir_version: 3").replace('"" : 17', '"" : 8'))
    source.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3]))
    graph = og.load(source)
    assert [t.name for t in graph.inputs] == ["x"]
    assert isinstance(graph.nodes[0].inputs[1], gs.Constant)


@pytest.mark.parametrize(
    ("attribute", "values"),
    [
        ("value", helper.make_tensor("t", TensorProto.FLOAT, [2], [3.0, 4.0])),
        ("value_float", 2.5),
        ("value_floats", [1.0, 2.0]),
        ("value_int", 3),
        ("value_ints", [1, 2, 3]),
    ],
)
def test_constant_nodes_become_constants(attribute, values):
    node = helper.make_node("Constant", [], ["c"], **{attribute: values})
    cast = helper.make_node("Cast", ["c"], ["d"], to=TensorProto.FLOAT)
    add = helper.make_node("Add", ["x", "d"], ["y"])
    shape = [3] if attribute == "value_ints" else [2]
    info = helper.make_tensor_value_info
    body = helper.make_graph([node, cast, add], "g", [info("x", 1, shape)], [info("y", 1, shape)])
    source = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    graph = og.load(source)
    assert [n.op for n in graph.nodes] == ["Cast", "Add"]
    x = np.ones(shape, np.float32)
    np.testing.assert_array_equal(run(og.to_model(graph), x)[0], run(source, x)[0])


@pytest.mark.parametrize("place", ["initializer", "node", "branch"])
@pytest.mark.parametrize("by_axes", [False, True])
def test_sparse_constants_are_filled_in(place, by_axes):
    found = np.array([[0, 2], [1, 0], [3, 1]], np.int64)
    indices = found if by_axes else found @ np.array([3, 1])
    values = [numpy_helper.from_array(a, name) for a, name in ((np.float32([1.5, -2, 3]), "w"), (indices, "w_indices"))]
    sparse = helper.make_sparse_tensor(*values, [4, 3])
    constant = helper.make_node("Constant", [], ["w"], sparse_value=sparse)
    source = model(CHAIN.replace("<float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>", ""))
    if place == "initializer":
        source.graph.sparse_initializer.append(sparse)
    elif place == "node":
        source.graph.node.insert(0, constant)
    else:
        always = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
        branch = helper.make_graph([constant], "b", [], [onnx.ValueInfoProto(name="w")])
        picked = helper.make_node("If", ["yes"], ["w"], then_branch=branch, else_branch=branch)
        source.graph.node.insert(0, always)
        source.graph.node.insert(1, picked)
    result = og.to_model(og.load(source))
    assert not result.graph.sparse_initializer
    dense = np.zeros((4, 3), np.float32)
    dense[tuple(found.T)] = 1.5, -2, 3
    assert (X @ dense > 0).any()
    np.testing.assert_array_equal(run(result, X)[0], np.maximum(X @ dense, 0))
    if place != "branch":  # there, ONNX Runtime knows no sparse constants
        np.testing.assert_array_equal(run(source, X)[0], run(result, X)[0])


def test_a_constant_node_that_is_an_output_stays():
    source = model(CHAIN.replace("(float[N, 3] y)", "(float[N, 3] y, float z)").replace(
        "y = Relu(h)", "y = Relu(h)\n z = Constant<value = float {2.0}>()"))  # fmt: skip
    assert run(og.to_model(og.load(source)), X)[1] == 2.0


def test_duplicate_and_empty_node_names_are_made_unique():
    source = model()
    for node in source.graph.node:
        node.name = "same"
    names = [n.name for n in og.load(source).nodes]
    assert names[0] == "same"
    assert len(set(names)) == 2
    assert all(n.name for n in og.load(model()).nodes)


def test_duplicate_and_empty_value_names_are_made_unique_on_export():
    graph = og.load(model())
    matmul, relu = graph.nodes
    first, second = gs.Variable("y"), gs.Variable("")
    relu.inputs.clear()
    graph.nodes += [gs.Node("Neg", "same", inputs=[matmul.outputs[0]], outputs=[first])]
    graph.nodes += [gs.Node("Neg", "same", inputs=[first], outputs=[second])]
    relu.inputs = [second]
    result = og.to_model(graph)
    assert result.graph.output[0].name == "y"
    np.testing.assert_array_equal(run(result, X)[0], run(model(), X)[0])


def test_custom_domains_are_kept_and_unused_ones_dropped():
    source = model(
        """
        <ir_version: 8, opset_import: ["" : 17, "my.ops" : 3, "ai.onnx.ml" : 2]>
        g (float[4] x) => (float[4] y)
        { h = my.ops.Twist<bits = 3, name = "n">(x)
          y = Relu(h) }
        """
    )
    result = og.to_model(og.load(source))
    assert {o.domain: o.version for o in result.opset_import} == {"": 17, "my.ops": 3}
    assert result.graph.node[0].domain == "my.ops"
    assert {a.name for a in result.graph.node[0].attribute} == {"bits", "name"}


def test_attributes_graphsurgeon_cannot_hold_are_kept():
    source = model()
    node = source.graph.node[1]
    node.op_type, node.domain = "Custom", "my.ops"
    odd = [
        helper.make_attribute("empty", [], attr_type=onnx.AttributeProto.INTS),
        helper.make_attribute("bytes", b"\xff\xfe"),
        helper.make_attribute("tensors", [helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0])]),
    ]
    node.attribute.extend(odd)
    source.opset_import.append(helper.make_opsetid("my.ops", 1))
    result = og.to_model(og.load(source))
    assert sorted(a.name for a in result.graph.node[1].attribute) == ["bytes", "empty", "tensors"]
    assert og.to_model(og.copy(og.load(source))).graph.node[1] == result.graph.node[1]


def test_cast_keeps_its_type_and_empty_optional_inputs_stay_empty():
    source = model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x) => (float16[N, 4] y)
        <float high = {0.5}>
        { h = Clip(x, , high)
          y = Cast<to = 10>(h) }
        """
    )
    result = og.to_model(og.load(source))
    assert list(result.graph.node[0].input) == ["x", "", "high"]
    np.testing.assert_array_equal(run(result, X)[0], run(source, X)[0])


BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y)
<float zero = {0.0}, float[4] shift = {1, 2, 3, 4}>
{
    s = ReduceSum<keepdims = 0>(x)
    c = Less(s, zero)
    k = Relu(x)
    y = If (c) <
        then_branch = t () => (float[N, 4] a) { a = Add(k, shift) },
        else_branch = e () => (float[N, 4] b) { m = Neg(k)
          two = Constant<value = float {2.0}>()
          n = Mul(m, two)
          b = Sub(n, shift) }
    >
}
"""


def test_subgraphs_survive_with_their_outer_values():
    source = model(BRANCHES)
    graph = og.copy(og.load(source))
    graph.nodes.reverse()
    result = og.to_model(graph)
    for x in (X, -X):
        np.testing.assert_array_equal(run(result, x)[0], run(source, x)[0])
    assert og.remove_dead(graph) == 0


def test_an_outer_constant_is_not_written_into_the_subgraph_again():
    text = BRANCHES.replace("k = Relu(x)", "r = Relu(x)\n k = Add(r, shift)")
    result = og.to_model(og.load(model(text)))
    branches = [a.g for n in result.graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    assert all(t.name != "shift" for g in branches for t in g.initializer)
    np.testing.assert_array_equal(run(result, X)[0], run(model(text), X)[0])


def test_model_local_functions_are_inlined():
    source = model(
        """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1], metadata_props: ["k" : "v"]>
        g (float[N, 4] x) => (float[N, 4] y) { y = local.twice(x) }
        <domain: "local", opset_import: ["" : 17]>
        twice (a) => (b) { c = Add(a, a)
           b = Relu(c) }
        """
    )
    result = og.to_model(og.load(source))
    assert [n.op_type for n in result.graph.node] == ["Add", "Relu"]
    assert not result.functions
    assert result.metadata_props[0].key == "k"
    np.testing.assert_array_equal(run(result, X)[0], np.maximum(2 * X, 0))


@pytest.mark.parametrize("call", ["local.leak(x)", "local.leak <alpha: float = 0.25> (x)", "local.outer(x)"])
def test_functions_keep_the_defaults_of_their_attributes(call):
    source = model(
        f"""
        <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        g (float[N, 4] x) => (float[N, 4] y) {{ y = {call} }}
        <domain: "local", opset_import: ["" : 17]>
        leak <alpha: float = 0.5> (a) => (b) {{ b = LeakyRelu <alpha: float = @alpha> (a) }}
        <domain: "local", opset_import: ["" : 17, "local" : 1]>
        outer (a) => (b) {{ b = local.leak(a) }}
        """
    )
    np.testing.assert_array_equal(run(og.to_model(og.load(source)), X)[0], run(source, X)[0])


def test_branches_in_functions_return_constants_of_their_own():
    source = model(
        """
        <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        g (float[N, 4] x) => (float[N, 4] y) { y = local.shift(x) }
        <domain: "local", opset_import: ["" : 17]>
        shift (a) => (b) {
           sum = ReduceSum <keepdims=0> (a)
           zero = Constant <value_float=0.0> ()
           up = Greater (sum, zero)
           c = If (up) <then_branch = then () => (float[4] k) <float[4] k = {1, 2, 3, 4}> { },
                        else_branch = other () => (float[4] m) <float[4] m = {5, 6, 7, 8}> { }>
           b = Add (a, c)
        }
        """
    )
    for x in (X, -X):
        np.testing.assert_array_equal(run(og.to_model(og.load(source)), x)[0], run(source, x)[0])


def test_an_output_without_a_shape_is_exported():
    source = model()
    source.graph.output[0].type.tensor_type.ClearField("shape")
    graph = og.load(source)
    assert graph.outputs[0].shape is None
    assert run(og.to_model(graph), X)[0].shape == (2, 3)


def test_a_model_with_map_outputs_keeps_their_types():
    info = helper.make_tensor_value_info("x", TensorProto.INT64, [2])
    kind = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    node = helper.make_node("ZipMap", ["x"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    body = helper.make_graph([node], "g", [info], [helper.make_value_info("z", kind)])
    source = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 2)], ir_version=8
    )
    assert og.to_model(og.load(source)).graph.output[0] == source.graph.output[0]


@pytest.mark.parametrize("opset", og.OPSETS)
def test_every_supported_opset_loads(opset):
    text = CHAIN.replace('"" : 17', f'"" : {opset}').replace("h = MatMul(x, w)", "h = Gemm(x, w, b)")
    text = text.replace("11, 12}>", "11, 12}, float[3] b = {1, 1, 1}>")
    graph = og.load(model(text))
    assert graph.opset == opset
    assert og.to_model(graph).opset_import[0].version == opset
    assert og.to_model(graph, opset=25, ir_version=13).opset_import[0].version == 25
    assert og.to_model(graph, ir_version=13).ir_version == 13


def test_a_model_of_custom_operators_only_needs_no_standard_opset():
    source = model('<ir_version: 8, opset_import: ["my.ops" : 1]> g (float[4] x) => (float[4] y) { y = my.ops.F(x) }')
    assert og.load(source).nodes[0].op == "F"


# ---------------------------------------------------------------------------------------------------- order and edits


def test_toposort_keeps_a_right_order_and_repairs_a_wrong_one():
    text = CHAIN.replace("y = Relu(h)", "a = Neg(h)\n b = Abs(h)\n c = Add(a, b)\n y = Relu(c)")
    graph = og.load(model(text))
    before = [n.name for n in graph.nodes]
    og.toposort(graph)
    assert [n.name for n in graph.nodes] == before
    graph.nodes.reverse()
    og.toposort(graph)
    seen: set[int] = set()
    for node in graph.nodes:
        assert all(id(p) in seen for t in node.inputs for p in t.inputs)
        seen.add(id(node))


def test_toposort_is_not_recursive_and_finds_cycles():
    value = gs.Variable("x", np.float32, [1])
    graph = gs.Graph(inputs=[value])
    for i in range(5000):
        out = gs.Variable(f"v{i}", np.float32, [1])
        graph.nodes.insert(0, gs.Node("Relu", f"n{i}", inputs=[value], outputs=[out]))
        value = out
    graph.outputs = [value]
    og.toposort(graph)
    assert graph.nodes[0].name == "n0"
    graph.nodes[0].inputs[0] = value
    with pytest.raises(ModelError, match="cycle through node"):
        og.toposort(graph)


def test_remove_dead_takes_whole_branches():
    text = CHAIN.replace("y = Relu(h)", "a = Neg(h)\n b = Abs(a)\n y = Relu(h)")
    graph = og.load(model(text))
    assert og.remove_dead(graph) == 2
    assert [n.op for n in graph.nodes] == ["MatMul", "Relu"]
    assert og.remove_dead(graph) == 0


def test_infer_shapes_fills_in_values_but_not_the_interface():
    graph = og.load(model())
    graph.outputs[0].shape = ["anything", 3]
    og.infer_shapes(graph)
    assert graph.nodes[0].outputs[0].shape == ["N", 3]
    assert graph.nodes[0].outputs[0].dtype == np.float32
    assert graph.outputs[0].shape == ["anything", 3]


def test_infer_shapes_replaces_a_stale_shape():
    graph = og.load(model())
    graph.nodes[0].outputs[0].shape = [1, 2, 3]
    og.infer_shapes(graph)
    assert graph.nodes[0].outputs[0].shape == ["N", 3]


def test_an_invalid_graph_is_refused_on_export():
    graph = og.load(model())
    graph.nodes[1].attrs["nonsense"] = 3
    with pytest.raises(ModelError, match=r"not a valid ONNX model.*nonsense"):
        og.to_model(graph)


# ---------------------------------------------------------------------------------------------------------- constants

PACKED = [
    (TensorProto.INT4, 4, True),
    (TensorProto.UINT4, 4, False),
    (TensorProto.INT2, 2, True),
    (TensorProto.UINT2, 2, False),
]


def codes_of(bits: int, signed: bool, shape: tuple[int, ...]) -> np.ndarray:
    low = -(1 << (bits - 1)) if signed else 0
    values = np.arange(np.prod(shape)) % (1 << bits) + low
    return values.reshape(shape).astype(np.int8 if signed else np.uint8)


@pytest.mark.parametrize(("dtype", "bits", "signed"), PACKED)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 4, 3)])
def test_packed_constants_hold_what_onnx_reads(dtype, bits, signed, shape):
    codes = codes_of(bits, signed, shape)
    tensor = og.packed_constant("w", codes, dtype)
    assert og.is_packed(tensor)
    assert og.array(tensor) is None
    proto = tensor._values.tensor
    onnx.checker.check_tensor(proto)
    np.testing.assert_array_equal(numpy_helper.to_array(proto).astype(codes.dtype), codes)
    np.testing.assert_array_equal(og.unpack(proto.raw_data, bits, shape, signed), codes)


def test_packed_constants_refuse_codes_out_of_range():
    with pytest.raises(ValueError, match=r"codes of 'w' span -9\.\.7, outside -8\.\.7"):
        og.packed_constant("w", np.array([-9, 7], np.int8), TensorProto.INT4)


@given(st.sampled_from(PACKED), st.lists(st.integers(0, 15), max_size=40))
def test_unpack_inverts_pack(kind, values):
    _, bits, signed = kind
    low = -(1 << (bits - 1)) if signed else 0
    codes = (np.array(values, np.int16) % (1 << bits) + low).astype(np.int8 if signed else np.uint8)
    packed = og.pack(codes, bits)
    assert len(packed) == -(-len(values) * bits // 8)
    np.testing.assert_array_equal(og.unpack(packed, bits, codes.shape, signed), codes)


def test_pack_puts_the_first_code_in_the_low_bits():
    assert og.pack(np.array([1, -2, 3], np.int8), 4) == bytes([0xE1, 0x03])
    assert og.pack(np.array([0, 1, 2, 3, 1], np.uint8), 2) == bytes([0b11100100, 0b01])


@pytest.mark.parametrize("read_values", [False, True])
def test_int4_constants_survive_export_copy_and_a_careless_reader(read_values):
    codes = codes_of(4, True, (4, 3))
    graph = og.load(model(CHAIN.replace('"" : 17', '"" : 21').replace("ir_version: 8", "ir_version: 10")))
    scale = og.constant("scale", np.float32(0.5))
    weight = gs.Variable("dequantized")
    packed = og.packed_constant("codes", codes, TensorProto.INT4)
    graph.nodes.append(gs.Node("DequantizeLinear", "dq", inputs=[packed, scale], outputs=[weight]))
    graph.nodes[0].inputs[1] = weight
    if read_values:
        assert packed.values.shape == (4, 3)
    graph = og.copy(graph)
    og.infer_shapes(graph)
    result = og.load(og.to_model(graph))
    np.testing.assert_allclose(run(og.to_model(result), X)[0], np.maximum(X @ (codes * np.float32(0.5)), 0))


def test_string_and_scalar_constants_export():
    strings = og.constant("s", np.array(["a", "bc"], object))
    assert strings._values.tensor.data_type == TensorProto.STRING
    assert og.constant("f", np.float32(2)).values.shape == ()
    transposed = og.constant("t", np.arange(6, dtype=np.float32).reshape(2, 3).T)
    np.testing.assert_array_equal(
        numpy_helper.to_array(og.OnnxExporter.export_tensor_proto(transposed)), [[0, 3], [1, 4], [2, 5]]
    )


# ------------------------------------------------------------------------------------------------------------- saving


def save(model, path, *, limit=None):
    with og.staging(path) as staged:
        staged.write(model, limit=limit)
        staged.publish()


def large_model():
    source = model()
    source.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 300), np.float32), "w"))
    source.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 300
    return source


def test_publishing_writes_one_file_and_leaves_no_trace(tmp_path):
    path = tmp_path / "out.onnx"
    path.write_text("old")
    save(og.to_model(og.load(model())), path)
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    np.testing.assert_array_equal(run(onnx.load(path), X)[0], run(model(), X)[0])


def test_external_data_goes_out_and_comes_in(tmp_path):
    source = large_model()
    before = source.SerializeToString()
    path = tmp_path / "deep" / "out.onnx"
    path.parent.mkdir()
    save(source, path, limit=1000)
    assert source.SerializeToString() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.onnx", "out.onnx.data"]
    assert path.stat().st_size < 1000
    assert og.file_bytes(path) == path.stat().st_size + 4800
    graph = og.load(str(path))
    np.testing.assert_array_equal(run(og.to_model(graph), X)[0], run(source, X)[0])

    (path.parent / "out.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"external data file that cannot be read .*out\.onnx\.data"):
        og.load(path)
    with pytest.raises(ModelError, match=r"external data is not loaded .1 weights, the first is 'w'.; give the path"):
        og.load(onnx.load(path, load_external_data=False))


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.onnx"
    path.write_text("old")

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(og, "_write", full_disk)
    with pytest.raises(OutputError, match=r"'.*/out\.onnx' cannot be written: No space left on device"):
        save(model(), path)
    refused = pytest.raises(OutputError, match=r"A file in the temporary folder .* cannot be written: .*TMPDIR")
    with refused, og.staging() as staged:
        staged.write(model())
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails", ["out.onnx.data", "out.onnx"])
@pytest.mark.parametrize("old", [True, False], ids=["over an old file", "new"])
def test_model_and_data_are_moved_both_or_not_at_all(tmp_path, monkeypatch, fails, error, old):
    path = tmp_path / "out.onnx"
    if old:
        save(og.to_model(og.load(large_model())), path, limit=1000)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self.name == fails and target.parent == tmp_path:
            raise error
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    other = large_model()
    other.graph.initializer[0].raw_data = bytes(4800)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        save(other, path, limit=1000)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_working_folder_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        save(large_model(), "out.onnx", limit=1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data"]


def test_metadata_of_a_staged_file(tmp_path):
    for limit in (1000, 10**6):
        with og.staging(tmp_path / "out.onnx") as staged:
            staged.write(large_model(), limit=limit)
            staged.set_metadata({"key": "value"})
            staged.publish()
        found = onnx.load(tmp_path / "out.onnx")
        assert [(entry.key, entry.value) for entry in found.metadata_props] == [("key", "value")]
        assert found.graph.initializer[0].raw_data == large_model().graph.initializer[0].raw_data
    expected = large_model()
    onnx.helper.set_model_props(expected, {"key": "value"})
    assert (tmp_path / "out.onnx").read_bytes() == expected.SerializeToString()


def test_unwritable_places_are_output_errors(tmp_path):
    with pytest.raises(OutputError, match="Is a directory; choose another place"):
        save(model(), tmp_path)
    with pytest.raises(OutputError, match=r"cannot be written: No such file or directory; choose another place"):
        save(model(), tmp_path / "missing" / "out.onnx")


# ---------------------------------------------------------------------------------------------------------- bad input


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ModelError, match=r"No file at .*nothing\.onnx'; give the path of an \.onnx file"):
        og.load(tmp_path / "nothing.onnx")
    with pytest.raises(ModelError, match=r"is a folder, not an ONNX file; it holds no \.onnx file"):
        og.load(tmp_path)
    onnx.save(model(), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"give one of the files in it \(m.onnx\)"):
        og.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no nodes"),
        (b"hello, this is text", "is not an ONNX file; export the model to ONNX first"),
        (b"PK\x03\x04 and so on", "zip archive, perhaps a PyTorch checkpoint"),
        (b"\x89HDF\r\n", "HDF5 file, perhaps a Keras model"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    ],
)
def test_files_of_another_kind(tmp_path, content, message):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        og.load(path)


def test_truncated_files(tmp_path):
    whole = model().SerializeToString()
    path = tmp_path / "m.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            og.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="truncated or damaged ONNX file; copy or export it again"):
        og.load(path)


@pytest.mark.parametrize("opset", [1, 6, 26, 27])
def test_opsets_out_of_range(opset):
    source = model(CHAIN.replace('"" : 17', f'"" : {opset}'))
    with pytest.raises(ModelError, match=rf"uses opset {opset}, but opset 7 to 25 is wanted; export the model"):
        og.load(source)


def test_graphs_without_nodes_or_outputs():
    empty = model('<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] x) {}')
    with pytest.raises(ModelError, match="holds no nodes"):
        og.load(empty)
    source = model()
    del source.graph.output[:]
    with pytest.raises(ModelError, match="has no outputs"):
        og.load(source)


def test_broken_wiring():
    source = model()
    source.graph.node[1].input[0] = "nowhere"
    with pytest.raises(ModelError, match="reads the value 'nowhere', which nothing computes"):
        og.load(source)
    source = model(CHAIN.replace("y = Relu(h)", "h = Neg(x)\n y = Relu(h)"))
    with pytest.raises(ModelError, match="makes the value 'h' twice"):
        og.load(source)
