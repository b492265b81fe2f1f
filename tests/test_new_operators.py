"""One row in the table of operators is all that a new one takes, also one of another domain: every stage asks `op_of`."""

import importlib
import pkgutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import onnx_eptq
from models import ORT_TARGET, Case, feeds, i64, node_named, parse, prepared, run_ort, weights
from models import quantize as quantized
from onnx_eptq import ops
from onnx_eptq.errors import UnsupportedOp
from onnx_eptq.mirror import build
from onnx_eptq.ops import Op
from onnx_eptq.pipeline import quantize
from onnx_eptq.plan import check_ops, make_plan
from onnx_eptq.prepare.opset import lower_opset
from onnx_eptq.write import BEFORE

HEAD = "a = MatMul(x, w0) b = Relu(a) p = MatMul(b, w1) q = Relu(p) c = MatMul(q, w2)"  # `c` goes into the new operator


def head() -> dict[str, np.ndarray]:
    draw = weights(5)
    return {"w0": draw(6, 8, fan=6), "w1": draw(8, 8, fan=8), "w2": draw(8, 8, fan=8)}


def declared(proto: onnx.ModelProto, domain: str, value: str, shape: list[object]) -> onnx.ModelProto:
    """Import a domain, and say what one of its operators makes: shape inference cannot know."""
    proto.opset_import.append(helper.make_opsetid(domain, 1))
    proto.graph.value_info.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, shape))
    return proto


def gru(x, w, r, b, *, hidden_size):
    """The standard operator GRU, forward, without options."""
    size, h, states = hidden_size, x.new_zeros(x.shape[1], hidden_size), []
    for step in x:
        wz, wr, wh = torch.nn.functional.linear(step, w[0], b[0, : 3 * size]).split(size, -1)
        rz, rr = torch.nn.functional.linear(h, r[0, : 2 * size], b[0, 3 * size : 5 * size]).split(size, -1)
        update, reset = (wz + rz).sigmoid(), (wr + rr).sigmoid()
        rh = torch.nn.functional.linear(reset * h, r[0, 2 * size :], b[0, 5 * size :])
        h = (1 - update) * (wh + rh).tanh() + update * h
        states.append(h)
    return torch.stack(states)[:, None], h[None]


def recurrent() -> onnx.ModelProto:
    draw = weights(6)
    return parse(
        """(float[N,4,6] x) => (float[N,5] y) {"""
        + HEAD
        + """
          steps = Transpose <perm=[1,0,2]> (c)
          states, last = GRU <hidden_size=8> (steps, w, r, b0)
          flat = Squeeze(last, zero)
          y = Gemm(flat, w3, b3)
        }""",
        **head(),
        w=draw(1, 24, 8, fan=8),
        r=draw(1, 24, 8, fan=8),
        b0=draw(1, 48, fan=10),
        zero=i64(0),
        w3=draw(8, 5, fan=8),
        b3=draw(5, fan=10),
    )


def quick_gelu(x, *, alpha):
    return x * torch.sigmoid(alpha * x)


def gated() -> onnx.ModelProto:
    """With an operator of ONNX Runtime's own domain."""
    proto = parse(
        """(float[N,6] x) => (float[N,5] y) {"""
        + HEAD
        + """
          d = com.microsoft.QuickGelu <alpha=1.5> (c)
          e = Sigmoid(d)
          y = MatMul(e, w3)
        }""",
        **head(),
        w3=weights(6)(8, 5, fan=8),
    )
    return declared(proto, "com.microsoft", "d", ["N", 8])


BETWEEN = "between operators that need float"
NEW = {  # key in the table: function, model, what stays float and why
    "GRU": (gru, recurrent, {"c": BETWEEN, "steps": BETWEEN, "states": "GRU needs float", "last": "GRU needs float"}),
    "com.microsoft.QuickGelu": (quick_gelu, gated, {"c": BETWEEN, "d": "QuickGelu needs float"}),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", NEW)
def test_a_sensitive_operator_passes_all_stages(tmp_path, monkeypatch, name, known):
    """Whether the table has a function for it, or ONNX Runtime computes it."""
    function, model, floats = NEW[name]
    proto = model()
    if known:
        monkeypatch.setitem(ops.OPS, name, Op(function, "sensitive"))
    else:
        floats = {"states": "GRU is left to ONNX Runtime, in float"} if name == "GRU" else {}  # which nothing reads
    samples = {key: np.concatenate([feed[key] for feed in feeds(proto, count=8)]) for key in feeds(proto)[0]}
    result = quantize(proto, samples, tmp_path / "q.onnx", weight_bits=4, steps=4, threads=1)
    assert result.plan.floats == floats
    assert result.report.coverage.complete
    assert result.report.fidelity.sqnr_db["y"] > 10
    written = onnx.load(tmp_path / "q.onnx")
    (node,) = (node for node in written.graph.node if node.op_type == name.rpartition(".")[2])
    assert node.domain == name.rpartition(".")[0]
    assert {opset.domain for opset in written.opset_import} == {"", node.domain}
    quantizers = [node.input[0] for node in written.graph.node if node.op_type == "QuantizeLinear"]
    assert not {name for value in floats for name in (value, f"{value}{BEFORE}")} & set(quantizers)


def shifted(x, c):
    """What `my.ops.Add` computes here."""
    return torch.log(x.exp() + c.abs())


def foreign(name: str = "Add") -> onnx.ModelProto:
    """With an operator that no runtime knows, and that is called like a standard one."""
    proto = parse(
        """(float[N,6] x) => (float[N,5] y) {"""
        + HEAD
        + """
          d = my.ops."""
        + name
        + """ (c, bias)
          e = Sigmoid(d)
          y = MatMul(e, w3)
        }""",
        **head(),
        bias=weights(7)(8, fan=10),
        w3=weights(6)(8, 5, fan=8),
    )
    return declared(proto, "my.ops", "d", ["N", 8])


@pytest.fixture
def unheard_of(monkeypatch) -> Case:
    monkeypatch.setitem(ops.OPS, "my.ops.Add", Op(shifted, "sensitive"))
    return quantized(foreign())


def test_an_operator_of_an_unknown_domain_is_planned_simulated_and_written(unheard_of):
    check_ops(unheard_of.graph)
    assert unheard_of.plan.floats == {"c": BETWEEN, "d": "Add needs float"}
    assert [layer.bias for layer in unheard_of.layers] == [None] * 4
    node = node_named(unheard_of.written, next(n.name for n in unheard_of.graph.nodes if n.domain == "my.ops"))
    assert (node.op_type, node.domain) == ("Add", "my.ops")
    assert [list(node.input), list(node.output)] == [["c", "bias"], ["d"]]
    onnx.checker.check_model(unheard_of.written)
    for model in (unheard_of.teacher, unheard_of.student):
        (called,) = (n for n in model.graph.nodes if n.target is shifted)
        assert called.meta["onnx"] == node.name


def test_its_mirror_computes_what_it_says(unheard_of):
    """ONNX Runtime cannot run it, but the same in standard operators."""
    steps = [("Exp", ["c"], "t"), ("Abs", ["bias"], "u"), ("Add", ["t", "u"], "v"), ("Log", ["v"], "d")]
    standard = [helper.make_node(op, inputs, [output]) for op, inputs, output in steps]
    for proto, model in ((unheard_of.proto, unheard_of.teacher), (unheard_of.written, unheard_of.student)):
        nodes = [n for node in proto.graph.node for n in (standard if node.domain else [node])]
        twin = onnx.ModelProto.FromString(proto.SerializeToString())
        del twin.graph.node[:]
        twin.graph.node.extend(nodes)
        batch = unheard_of.batches[0]
        (found,) = model(torch.from_numpy(batch["x"]))
        np.testing.assert_allclose(found.numpy(), run_ort(twin, batch)["y"], rtol=1e-4, atol=1e-5)


def test_other_domains_do_not_borrow_the_standard_operators():
    graph = prepared(foreign())
    for refuses in (lambda: make_plan(graph, ORT_TARGET), lambda: build(graph), lambda: check_ops(graph)):
        with pytest.raises(UnsupportedOp, match=r"my\.ops\.Add"):
            refuses()


def test_an_older_opset_leaves_it_as_it_is():
    graph = prepared(foreign("ReduceMean"))
    lower_opset(graph, 13)
    (node,) = (node for node in graph.nodes if node.domain == "my.ops")
    assert ([tensor.name for tensor in node.inputs], node.attrs) == (["c", "bias"], {})


def test_nobody_else_reads_the_table():
    names = [module.name for module in pkgutil.iter_modules(onnx_eptq.__path__) if module.name != "ops"]
    modules = [importlib.import_module(f"onnx_eptq.{name}") for name in names]
    assert [module.__name__ for module in modules if any(found is ops.OPS for found in vars(module).values())] == []
