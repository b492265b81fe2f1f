"""The PyTorch mirror: the float teacher against ONNX Runtime, the student's gradients, copies and exported integers."""

import ast
import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from models import MODELS, cached, feeds, i64, parse, prepared, quantize, run_ort, weights
from onnx_eptq import graph as graphs
from onnx_eptq import graph as og
from onnx_eptq import ops
from onnx_eptq.calibrate import feed
from onnx_eptq.grid import QParams, dequantize
from onnx_eptq.mirror import BiasQuantizer, Mirror, Probe, Quantizer, build, same_on_batches
from onnx_eptq.plan import Rules
from onnx_eptq.prepare import free_batch, prepare

TOLERANCE = 1e-5  # of the output's scale: float32 sums in another order


def outputs(mirror, batch):
    with torch.no_grad():
        return dict(zip(mirror.output_names, mirror(*feed(mirror, batch)), strict=True))


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * max(np.abs(theirs).max(), 1e-3))


# ---- the teacher


@pytest.mark.parametrize("name", MODELS)
def test_teacher_is_onnx_runtimes_float_model(name):
    case = cached(name)
    for batch in feeds(case.proto, batch=3, count=1, seed=4) + feeds(case.proto, batch=1, count=1, seed=5):
        expected = run_ort(case.proto, batch)
        found = outputs(case.teacher, batch)
        assert list(found) == list(expected)
        for output, values in expected.items():
            assert_close(found[output].numpy(), values)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "images1d"])
def test_a_batch_is_its_samples(name):
    case = cached(name)
    for mirror in (case.teacher, case.student):
        (batch,) = feeds(case.proto, batch=5, count=1, seed=6)
        together = outputs(mirror, batch)
        for index in range(5):
            single = outputs(mirror, {key: value[index : index + 1] for key, value in batch.items()})
            for output, values in single.items():
                # one step of the output's grid: a sum in another order may fall on the other side of a tie
                step = (
                    float(case.quantized[case.plan.root(output).value].qparams.scale) if mirror is case.student else 0
                )
                difference = (together[output][index : index + 1] - values).abs()
                assert float(difference.max()) <= step + TOLERANCE * float(values.abs().max())
                assert float((difference > TOLERANCE).float().mean()) < 0.02


def test_probe_sees_every_value_under_its_onnx_name(case):
    names = [t.name for node in case.graph.nodes for t in node.outputs] + [t.name for t in case.graph.inputs]
    proto = graphs.to_model(graphs.copy(case.graph))
    expected = run_ort(proto, case.batches[0], [n.output[0] for n in proto.graph.node])
    seen = {}
    Probe(case.teacher, lambda value, x: seen.setdefault(value, x)).run(*feed(case.teacher, case.batches[0]))
    assert set(seen) == set(names)
    for value in set(seen) & set(expected):
        assert_close(seen[value].detach().numpy(), expected[value])


def test_probe_goes_on_with_what_the_callback_returns():
    case = cached("gemm")
    zero = Probe(case.teacher, lambda value, x: torch.zeros_like(x) if value == "b" else x)
    (y,) = zero.run(*feed(case.teacher, case.batches[0]))
    bias = case.teacher.constant("b2")
    assert torch.equal(y, bias.expand_as(y))


# ---- the student


def test_code_can_be_printed_and_compiled(case):
    ast.parse(case.student.code.strip())
    text = str(case.student)
    for name in case.student.quantizers.values():
        assert f"({name}): " in text
        assert f"self.{name}(" in case.student.code


def test_student_is_near_the_teacher(case):
    for batch in case.batches:
        ours, float_ = outputs(case.student, batch), outputs(case.teacher, batch)
        for output, values in float_.items():
            noise = (ours[output] - values).square().mean() / values.square().mean()
            assert float(noise) < 0.02


def test_every_quantized_value_is_on_its_grid(case):
    seen = {}
    Probe(case.student, lambda value, x: seen.setdefault(value, x)).run(*feed(case.student, case.batches[0]))
    for value, point in case.plan.items():
        if point.role == "activation":
            scale, zero_point = case.student.qparams_of(point)
            codes = seen[value].detach().double() / scale.double() + zero_point
            assert torch.allclose(codes, codes.round(), atol=1e-3)
            assert codes.min() > point.grid.qmin - 0.01
            assert codes.max() < point.grid.qmax + 0.01


def test_bias_is_used_on_its_int32_grid(case):
    exported = case.student.export(case.plan)
    for layer in case.layers:
        if layer.bias is None:
            continue
        point = case.plan[layer.bias.name]
        if point.role != "bias":
            continue
        module = case.student.quantizer(point.value)
        assert isinstance(module, BiasQuantizer)
        scales = [case.student.quantizer(name).scale for name in point.scale_from]
        used = module(case.student.constant(point.value), *scales)
        codes, qparams, grid = exported[point.value]
        assert torch.equal(used, dequantize(codes, qparams, grid))
        assert torch.equal(qparams.scale, scales[0] * scales[1])
        assert not qparams.zero_point.any()
        assert float((used - case.student.constant(point.value)).abs().max()) <= 0.5001 * float(qparams.scale.max())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["residual", "transposed", "attention"])
def test_exported_integers_are_in_range_and_mean_what_the_student_uses(name, bits):
    case = cached(name, bits)
    exported = case.student.export(case.plan)
    assert list(exported) == list(case.plan)
    for value, point in case.plan.items():
        codes, qparams, grid = exported[value]
        assert grid == point.grid
        assert qparams.scale.dtype == torch.float32
        assert (qparams.scale > 0).all()
        if point.role == "activation":
            assert codes is None
            continue
        assert codes.dtype == torch.int32
        assert codes.shape == case.teacher.constant(value).shape
        assert grid.qmin <= int(codes.min())
        assert int(codes.max()) <= grid.qmax
        if point.role == "weight":
            assert int(codes.abs().max()) == grid.qmax
            used = case.student.quantizer(value)(case.student.constant(value))
            assert torch.equal(used, dequantize(codes, qparams, grid))


def test_tied_values_use_one_quantizer(case):
    for value, point in case.plan.items():
        assert (value in case.student.quantizers) == (point.tied_to is None)
        if point.tied_to:
            root = case.student.quantizer(point.tied_to)
            assert isinstance(root, Quantizer)
            assert case.student.qparams_of(point).scale is root.scale


LEARNED = {"residual": "logits", "depthwise": "features", "matmul": "e", "attention": "mixed", "two_towers": "code"}


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_reach_weights_scales_and_biases(name):
    case = cached(name)
    student = copy.deepcopy(case.student)
    targets = {}
    for layer in case.layers:
        targets[f"weight {layer.weight.name}"] = student.constant(layer.weight.name)
        scale = student.quantizer(layer.weight.name).scale
        targets[f"scale {layer.weight.name}"] = scale
        if layer.bias is not None:
            targets[f"bias {layer.bias.name}"] = student.constant(layer.bias.name)
    for value, point in case.plan.items():
        exact = value == "r"  # a multiple of `s`, whose integers it takes over: it has no error to learn from
        if point.role == "activation" and not point.tied_to and not exact:
            targets[f"scale {value}"] = student.quantizer(value).scale
    for tensor in targets.values():
        tensor.requires_grad_()
    found = student(*feed(student, case.batches[0]))
    generator = torch.Generator().manual_seed(0)
    sum((y * torch.randn(y.shape, generator=generator)).sum() for y in found).backward()
    for what, tensor in targets.items():
        assert tensor.grad is not None, what
        assert torch.isfinite(tensor.grad).all(), what
        assert tensor.grad.any(), what


def test_gradient_of_a_bias_scale_reaches_both_factors():
    case = cached("gemm")
    student = copy.deepcopy(case.student)
    scales = [student.quantizer(name).scale.requires_grad_() for name in case.plan["b1"].scale_from]
    student.quantizer("b1")(student.constant("b1"), *scales).sum().backward()
    assert scales[0].grad.any()
    assert scales[1].grad.any()


def test_teacher_gradient_is_that_of_finite_differences():
    case = cached("matmul")
    teacher = copy.deepcopy(case.teacher).double()
    x = torch.from_numpy(case.batches[0]["tokens"][:1]).double().requires_grad_()
    torch.autograd.gradcheck(lambda t: teacher(t)[0], (x,), atol=1e-6)


# ---- copies


def test_a_deep_copy_is_whole_and_independent(case):
    twin = copy.deepcopy(case.student)
    assert isinstance(twin, Mirror)
    before = outputs(case.student, case.batches[0])
    for name, values in outputs(twin, case.batches[0]).items():
        assert torch.equal(values, before[name])
    for value, exported in twin.export(case.plan).items():
        assert torch.equal(exported.qparams.scale, case.quantized[value].qparams.scale)
    for tensor in [*twin.parameters(), *twin.buffers()]:
        if tensor.is_floating_point():
            tensor.data.fill_(0.5)
    twin.quantizers.clear()
    for name, values in outputs(case.student, case.batches[0]).items():
        assert torch.equal(values, before[name])
    assert case.student.quantizers


def test_probe_works_on_a_copy():
    case = cached("residual")
    seen = []
    Probe(copy.deepcopy(case.student), lambda value, x: seen.append(value) or x).run(
        *feed(case.student, case.batches[0])
    )
    assert {"image", "b", "c", "e", "f", "g", "logits"} <= set(seen)


def test_state_survives_a_file(case, tmp_path):
    torch.save(case.student.state_dict(), tmp_path / "state.pt")
    qparams = {v: QParams(torch.ones_like(q.qparams.scale), q.qparams.zero_point) for v, q in case.quantized.items()}
    again = build(case.graph, case.plan, qparams)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    for name, values in outputs(again, case.batches[0]).items():
        assert torch.equal(values, outputs(case.student, case.batches[0])[name])


def test_building_changes_neither_graph_nor_parameters():
    proto = MODELS["residual"]()
    graph = prepared(proto)
    case = cached("residual")
    qparams = {v: QParams(q.qparams.scale.clone(), q.qparams.zero_point) for v, q in case.quantized.items()}
    student = build(graph, case.plan, qparams)
    for tensor in [*student.parameters(), *student.buffers()]:
        tensor.data.zero_()
    assert all(bool(q.scale.any()) for q in qparams.values())
    assert all(
        np.asarray(layer_weight.values).any() for layer_weight in graph.tensors().values() if layer_weight.name == "w1"
    )
    assert prepare(graph) == dict.fromkeys(prepare(graph), 0)


# ---- odd names and constants


TAKEN = (  # in place of x, a, c, d, y, w, b, v, u
    ("forward", "a.b", "a/b", "class", "training", "0", "parameters", "::", "code"),
    ("meta", "graph", "replace", "output_names", "whole", "scale", "constant", "quantizers", "constants"),
    ("root", "inf", "torch", "device", "qparams_of", "self", "input_names", "quantizer", "print_readable"),
    ("self", "self_1", "nan", "None_", "v_self", "export", "v_scale", "scale", "Mirror"),
)


@pytest.mark.parametrize("taken", TAKEN)
def test_names_that_are_no_identifiers_or_taken(taken):
    w = weights(3)
    proto = parse("(float[2,4] x) => (float[2,4] y) { a = Gemm(x, w, b) c = Relu(a) d = Gemm(c, v) y = Add(d, u) }",
                  w=w(4, 4), b=w(4, fan=4), v=w(4, 4), u=w(2, 4))  # fmt: skip
    names = dict(zip("xacdywbvu", taken, strict=True))
    for part in (proto.graph.input, proto.graph.output, proto.graph.initializer):
        for item in part:
            item.name = names[item.name]
    for node in proto.graph.node:
        node.input[:] = [names[name] for name in node.input]
        node.output[:] = [names[name] for name in node.output]
    case = quantize(proto, Rules(8, 8))
    (batch,) = feeds(proto, count=1)
    assert_close(outputs(case.teacher, batch)[names["y"]].numpy(), run_ort(proto, batch)[names["y"]])
    assert names["b"] in case.plan
    assert set(case.student.export(case.plan)) == set(case.plan)


def test_an_input_or_a_constant_may_be_an_output():
    w = weights(3)
    proto = parse("(float[2,4] x) => (float[2,4] y, float[4,4] w) { y = Gemm(x, w) }", w=w(4, 4))
    teacher = build(prepared(proto))
    (batch,) = feeds(proto, count=1)
    expected = run_ort(proto, batch)
    for name, values in outputs(teacher, batch).items():
        assert_close(values.numpy(), expected[name])


def test_attributes_that_are_tensors_become_buffers():
    proto = parse(
        "(float[2,4] x) => (float[2,4] y) { a = Gemm(x, w) s = Shape(x) o = ConstantOfShape(s) y = Add(a, o) }",
        w=weights(3)(4, 4),
    )
    node = next(n for n in proto.graph.node if n.op_type == "ConstantOfShape")
    node.attribute.append(
        onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(np.array([2.5], np.float32)))
    )
    graph = og.load(proto)  # not prepared: that would fold it
    og.infer_shapes(graph)
    (batch,) = feeds(proto, count=1)
    assert_close(outputs(build(graph), batch)["y"].numpy(), run_ort(proto, batch)["y"])


def test_planted_fault_in_the_mirror_is_found(monkeypatch):
    """A teacher whose Conv forgets a pad does not pass for ONNX Runtime's model."""
    conv = ops.OPS["Conv"]

    def wrong(x, w, b=None, **attributes):
        return conv.function(x, w.flip(-1), b, **attributes)

    monkeypatch.setitem(ops.OPS, "Conv", replace(conv, function=wrong))
    case = cached("depthwise")
    teacher = build(prepared(case.proto))
    with pytest.raises(AssertionError):
        assert_close(
            outputs(teacher, case.batches[0])["features"].numpy(), run_ort(case.proto, case.batches[0])["features"]
        )


@pytest.mark.parametrize("mixes", [False, True])
def test_a_fixed_batch_is_freed_only_where_samples_stay_apart(mixes):
    """Reshapes that spell the batch size are freed; a sum over the batch must be noticed."""
    last = "y = ReduceSum <keepdims=1> (c, zero)" if mixes else "y = Relu(c)"
    proto = parse(
        "(float[1,3,4] x) => (float[1,12] y) { a = Reshape(x, flat) b = Gemm(a, w) c = Reshape(b, back) " + last + " }",
        flat=i64(3, 4),
        back=i64(1, 12),
        zero=i64(0),
        w=weights(3)(4, 4),
    )
    graph = og.load(proto)
    prepare(graph)
    free = free_batch(graph)
    assert free is not None
    batches = [[torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed))] for seed in range(3)]
    assert same_on_batches(build(graph), build(free), batches) is not mixes


def test_a_dynamic_batch_needs_no_freeing():
    assert free_batch(prepared(MODELS["residual"]())) is None
