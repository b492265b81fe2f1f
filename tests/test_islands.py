"""Operators that only ONNX Runtime computes: simulated by it, left float, and named."""

import copy
import pickle
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from models import feeds, parse, prepared, quantize, run_ort, weights
from onnx_eptq import graph as graphs
from onnx_eptq import pipeline
from onnx_eptq.calibrate import feed
from onnx_eptq.errors import ModelError, UnsupportedOp
from onnx_eptq.islands import Island
from onnx_eptq.mirror import build
from onnx_eptq.pieces import crossing
from onnx_eptq.plan import check_ops

W = weights(3)


def branch(op: str, name: str, **attributes: float) -> onnx.GraphProto:
    """A branch that captures the value `b` and the constant `w2`."""
    nodes = [
        helper.make_node("MatMul", ["b", "w2"], [f"{name}_m"]),
        helper.make_node(op, [f"{name}_m"], [f"{name}_y"], **attributes),
    ]
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)])


def choice() -> onnx.ModelProto:
    """If: two branches that read a value and a weight of the graph around them; the condition is computed."""
    proto = parse(
        """(float[N,6] x) => (float[N,5] y) {
          a = MatMul(x, w0) b = Relu(a)
          sum = ReduceSum <keepdims=0> (b)
          cond = Greater(sum, limit)
          c = Identity(b)
          y = MatMul(c, w3)
        }""",
        w0=W(6, 8, fan=6),
        w2=W(8, 8, fan=8),
        w3=W(8, 5, fan=8),
        limit=np.float32(16),
    )
    chosen = [branch("LeakyRelu", "then", alpha=0.1), branch("Tanh", "otherwise")]
    node = helper.make_node("If", ["cond"], ["c"], "choose", then_branch=chosen[0], else_branch=chosen[1])
    index = next(i for i, n in enumerate(proto.graph.node) if n.op_type == "Identity")
    del proto.graph.node[index]
    proto.graph.node.insert(index, node)
    return proto


def loop() -> onnx.ModelProto:
    """Loop: three times h = tanh(h @ w1)."""
    body = parse(
        "(int64 i, bool go, float[N,8] h) => (bool on, float[N,8] g) { on = Identity(go) m = MatMul(h, w1) g = Tanh(m) }"
    )
    proto = parse(
        "(float[N,6] x) => (float[N,5] y) { a = MatMul(x, w0) b = Relu(a) c = Identity(b) y = MatMul(c, w3) }",
        w0=W(6, 8, fan=6),
        w1=W(8, 8, fan=8),
        w3=W(8, 5, fan=8),
        times=np.int64(3),
        go=np.bool_(True),
    )
    node = helper.make_node("Loop", ["times", "go", "b"], ["c"], "again", body=body.graph)
    index = next(i for i, n in enumerate(proto.graph.node) if n.op_type == "Identity")
    del proto.graph.node[index]
    proto.graph.node.insert(index, node)
    return proto


def sequence() -> onnx.ModelProto:
    """A list of tensors of which a computed one is taken."""
    return parse(
        """(float[N,6] x) => (float[N,8] y) { a = MatMul(x, w0) b = Neg(a) s = SequenceConstruct(a, b)
          m = ReduceMax <keepdims=0> (a) g = Greater(m, zero) i = Cast <to=7> (g) y = SequenceAt(s, i) }""",
        w0=W(6, 8, fan=6),
        zero=np.float32(0),
    )


def returned() -> onnx.ModelProto:
    """If one of whose branches returns an initializer of its own."""
    proto = choice()
    (taken,) = (a.g for n in proto.graph.node for a in n.attribute if a.name == "then_branch")
    taken.ClearField("node")
    taken.initializer.append(onnx.numpy_helper.from_array(np.arange(32, dtype=np.float32).reshape(4, 8), "then_y"))
    return proto


MODELS = {"If": (choice, "choose"), "Loop": (loop, "again"), "constant": (returned, "choose")}


@pytest.mark.parametrize("name", MODELS)
def test_the_mirror_computes_what_the_runtime_does(name):
    proto = MODELS[name][0]()
    teacher = build(prepared(proto))
    for batch in feeds(proto, count=6, batch=4):
        (found,) = teacher(*feed(teacher, batch))
        np.testing.assert_allclose(found.numpy(), run_ort(proto, batch)["y"], rtol=1e-5, atol=1e-6)


def test_both_branches_are_taken():
    proto = choice()
    sums = [np.maximum(batch["x"] @ graph_constant(proto, "w0"), 0).sum() for batch in feeds(proto, count=6, batch=4)]
    assert min(sums) < 16 < max(sums)


def graph_constant(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return next(onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == name)


@pytest.mark.parametrize("name", MODELS)
def test_control_flow_is_quantized_around_and_verified(tmp_path, name):
    make, node = MODELS[name]
    proto = make()
    samples = {"x": np.concatenate([batch["x"] for batch in feeds(proto, count=8)])}
    result = pipeline.quantize(proto, samples, tmp_path / "q.onnx", weight_bits=8, steps=4, threads=1)
    op = "Loop" if name == "Loop" else "If"
    assert result.report.islands == {node: op}
    assert f"'{node}' {op}" in str(result.report)
    assert result.report.coverage.quantized_bytes < result.report.coverage.bytes  # the weight inside stays float
    assert {"w0", "w3", "b"} <= set(result.plan)
    assert result.report.fidelity.sqnr_db["y"] > 25
    assert [n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node].count(op) == 1


def test_constants_that_layers_share_with_control_flow_stay_float_there(tmp_path):
    """Captured by a subgraph (w1) or read by the node itself (start): simulated in float, so written in float."""
    proto = loop()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(W(1, 8, fan=4), "start"))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    again = next(node for node in proto.graph.node if node.op_type == "Loop")
    again.input[2] = "start"
    again.attribute[0].g.input[2].type.tensor_type.shape.dim[0].dim_value = 1
    position = list(proto.graph.node).index(again)
    for offset, (op, inputs, output) in enumerate(
        [("MatMul", ["b", "w1"], "d"), ("Mul", ["d", "start"], "e"), ("Add", ["e", "c"], "f")]
    ):
        proto.graph.node.insert(position + offset + (op == "Add"), helper.make_node(op, inputs, [output]))
    proto.graph.node[-1].input[0] = "f"
    samples = {"x": np.concatenate([batch["x"][:1] for batch in feeds(proto, count=24)])}
    result = pipeline.quantize(proto, samples, tmp_path / "q.onnx", weight_bits=3, method="rtn", threads=1)
    assert {"w1", "start"} <= set(result.plan)
    written = onnx.load(tmp_path / "q.onnx")
    body = next(node for node in written.graph.node if node.op_type == "Loop").attribute[0].g
    floats = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for g in (written.graph, body) for tensor in g.initializer
    }
    for name in ("w1", "start"):
        np.testing.assert_array_equal(floats[name], graph_constant(proto, name))
        assert any(known.startswith((f"{name}_quantized", f"{name}_packed")) for known in floats)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_call_the_runtime():
    """What is traced would be a session's answer to one batch, for good."""
    proto, curves = choice(), []
    samples = {"x": np.concatenate([batch["x"] for batch in feeds(proto, count=8)])}
    for compiled in (False, True):
        result = pipeline.quantize(proto, samples, steps=8, weight_bits=3, threads=1, compile=compiled)
        assert result.report.learning is not None
        curves.append([point["loss"] for point in result.report.learning.curve])
    assert curves[1] == pytest.approx(curves[0], rel=0.02)
    assert len(set(curves[0])) > 1


def test_importing_the_package_leaves_the_compiler_alone():
    """torch.compile's own modules take seconds to import, which plain rounding has no use for."""
    code = "import sys, onnx_eptq.cli, onnx_eptq.pipeline; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_values_that_a_subgraph_captures_cross_a_cut():
    graph = prepared(choice())
    cuts = crossing(graph)
    last = next(i for i, node in enumerate(graph.nodes) if node.op == "If")
    assert "b" in cuts[last]


@pytest.fixture
def island():
    graph = prepared(choice())
    node = next(node for node in graph.nodes if node.op == "If")
    return Island(node, graph), [t.name for t in graphs.variables_read(node)]


def test_gradients_end_and_copies_work_alone(island):
    module, names = island
    b = torch.ones(2, 8, requires_grad=True)
    given = {"b": b, "cond": torch.tensor(True)}
    inputs = [given[name] for name in names]
    (found,) = module(*inputs)
    assert not found.requires_grad
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.session is None
        torch.testing.assert_close(twin(*inputs)[0], found)
    torch.testing.assert_close(module(*[x.bfloat16() if x.is_floating_point() else x for x in inputs])[0], found)


def test_what_cannot_run_says_so(island):
    module, _ = island
    with pytest.raises(ModelError, match=r"cannot run the node 'choose' If by itself"):
        module(torch.ones(2, 3), torch.tensor(True))
    proto = sequence()
    with pytest.raises(ModelError, match="no tensor of numbers"):
        build(prepared(proto))(torch.zeros(2, 6))


def vendor(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    """A model with operators of ONNX Runtime's own domain."""
    proto = parse(text, **constants)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


def test_layers_behind_what_only_the_runtime_knows_the_type_of_are_quantized():
    """Files that ONNX Runtime's own tools write name no types."""
    proto = vendor(
        "(float[N,3,8] x) => (float[N,3,8] y) { a = MatMul(x, w0) b = com.microsoft.BiasGelu(a, c) d = MatMul(b, w1) "
        "e = com.microsoft.QuickGelu(d) y = MatMul(e, w2) }",
        w0=W(8, 8),
        w1=W(8, 8),
        w2=W(8, 8),
        c=W(8),
    )
    graph = prepared(proto)
    found = graph.tensors()
    assert {found[name].dtype for name in "bde"} == {np.dtype(np.float32)}
    assert [found["e"].shape[i] for i in (1, 2)] == [3, 8]
    data = {"x": np.concatenate([batch["x"] for batch in feeds(proto, count=8)])}
    report = pipeline.quantize(proto, data, method="rtn", threads=1).report
    assert report.coverage.quantized_layers == report.coverage.layers == 3


def test_a_shape_that_the_runtime_does_not_infer_is_no_scalar():
    proto = vendor(
        "(float[N,8] x) => (float[N,4] y) { a = MatMul(x, w0) b = com.microsoft.CDist(a, c) s = Size(b) f = Cast <to=1> (s) "
        "d = MatMul(b, w1) y = Div(d, f) }",
        w0=W(8, 8),
        w1=W(6, 4),
        c=W(6, 8),
    )
    assert prepared(proto).tensors()["b"].shape is None
    batch = feeds(proto, count=1, batch=4)[0]
    (found,) = build(prepared(proto))(*feed(build(prepared(proto)), batch))
    np.testing.assert_allclose(found.numpy(), run_ort(proto, batch)["y"], rtol=1e-4, atol=1e-6)


def test_what_no_runtime_knows_is_refused():
    proto = parse("(float[N,6] x) => (float[N,8] y) { a = MatMul(x, w0) y = my.own.Op(a) }", w0=W(6, 8))
    proto.opset_import.append(helper.make_opsetid("my.own", 1))
    with pytest.raises(UnsupportedOp, match=r"my\.own\.Op"):
        check_ops(prepared(proto))


def test_a_table_of_words_shares_its_grid_with_what_is_looked_up():
    proto = parse(
        "(int64[N,3] x) => (float[N,3,4] y) { e = Gather(table, x) y = MatMul(e, w) }", table=W(10, 8), w=W(8, 4)
    )
    found = quantize(proto)
    assert (found.plan["table"].role, found.plan["e"].tied_to, found.plan["e"].moved) == ("constant", "table", True)
