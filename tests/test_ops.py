"""Every operator against its ONNX schema, ONNX's own cases, ONNX Runtime, and finite differences."""

import functools
import inspect
import pickle
import warnings
from collections import defaultdict

import numpy as np
import onnx
import onnx.defs
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnx_eptq.ops import OPS

torch.set_num_threads(1)

OPSET = 21
KEYWORDS_OF_OURS = {"n_outputs"}
POSITIONAL_ONLY, VARIADIC = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL


# ---- against the schema


def parameters(name):
    """Return the function's inputs and attributes."""
    found = inspect.signature(OPS[name].function).parameters.values()
    return [p for p in found if p.kind != p.KEYWORD_ONLY], [p for p in found if p.kind == p.KEYWORD_ONLY]


def schema(name):
    return onnx.defs.get_schema(name, OPSET)


@pytest.mark.parametrize("name", OPS)
class TestSchema:
    def test_function_is_named_like_the_operator(self, name):
        assert OPS[name].function.__name__ == name

    def test_function_can_be_pickled(self, name):
        assert pickle.loads(pickle.dumps(OPS[name].function)) is OPS[name].function

    def test_inputs(self, name):
        inputs, _ = parameters(name)
        assert len(inputs) == len(schema(name).inputs)
        for ours, theirs in zip(inputs, schema(name).inputs, strict=True):
            if ours.kind != POSITIONAL_ONLY:
                assert ours.name == theirs.name.lower()
            assert (ours.kind == VARIADIC) == (theirs.option.name == "Variadic")
            assert (ours.default is None) == (theirs.option.name == "Optional")

    def test_attributes(self, name):
        _, attributes = parameters(name)
        ours = {p.name: p.default for p in attributes if p.name not in KEYWORDS_OF_OURS}
        assert set(ours) == set(schema(name).attributes)
        for key, theirs in schema(name).attributes.items():
            if theirs.required:
                assert ours[key] is inspect.Parameter.empty
            elif theirs.default_value.name:
                default = plain(theirs.default_value)
                assert ours[key] == (default if isinstance(default, str) else pytest.approx(default, rel=1e-6))
            else:
                assert ours[key] is None

    def test_indices_are_in_range(self, name):
        op, (inputs, _) = OPS[name], parameters(name)
        indices = [i for i in (op.weight, op.bias, *op.static) if i is not None]
        assert all(0 <= i < len(inputs) for i in indices)
        assert len(indices) == len(set(indices))
        assert (op.channel_axis is None) == (op.weight is None)

    def test_several_outputs(self, name):
        several = len(schema(name).outputs) > 1 or schema(name).max_output > 1
        assert not OPS[name].n_outputs or several


def test_roles():
    assert OPS["Conv"].role_of({}) == "linear"
    assert OPS["Resize"].role_of({}) == "same_grid"
    assert OPS["Resize"].role_of({"mode": "linear"}) == "arithmetic"
    assert OPS["Resize"].role_of({"coordinate_transformation_mode": "tf_crop_and_resize"}) == "arithmetic"


def test_channel_axes():
    axes = {name: op.channel_axis({}, 4) for name, op in OPS.items() if op.channel_axis}
    assert axes == {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 3}
    assert OPS["Gemm"].channel_axis({"transB": 1}, 2) == 0
    assert OPS["ConvTranspose"].channel_axis({"group": 2}, 4) is None  # a slice of it serves one output per group
    assert OPS["MatMul"].channel_axis({}, 1) is None


def test_output_axes():
    axes = {name: op.output_axis for name, op in OPS.items() if op.weight is not None}
    assert axes == {"Conv": 1, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1}


# ---- against ONNX's own cases

SKIPPED = {  # part of a case's name: why it is not run
    "_training_mode": "quantization is about inference",
    "training_dropout": "quantization is about inference",
    "identity_sequence": "sequences are not tensors",
    "identity_opt": "optionals are not tensors",
    "downsample_scales_linear_align_corners": "unlike ONNX Runtime, divides by an unrounded length",
    "downsample_scales_cubic_align_corners": "unlike ONNX Runtime, divides by an unrounded length",
    "spacetodepth_dcr_mode": "the attribute `mode` is younger than opset 21",
    "spacetodepth_crd_mode": "the attribute `mode` is younger than opset 21",
}
SKIPPED_AS_DATA = {"test_range_float16_type_positive_delta", "test_range_int32_type_negative_delta"}  # lose their type
TORCH_HOLDS = {"float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "bool"}
TORCH_ONLY_HOLDS = {"uint16", "uint32", "uint64"}  # and computes almost nothing in
WITHOUT_CASES = {"GlobalLpPool"}
SHAPE_FROM_DATA = {"NonZero", "Compress", "NonMaxSuppression"}


def plain(attribute):
    """Return an attribute's value as graphsurgeon gives it."""
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def as_array(value):
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def as_data(value):
    return tuple(as_data(v) for v in value) if isinstance(value, list) else value


def call(name, inputs, attributes, n_outputs=1, constant=True):
    """Run an operator on numpy inputs, the static ones as Python data if `constant`."""
    op = OPS[name]
    arguments = [
        None if x is None else as_data(x.tolist()) if constant and i in op.static else torch.from_numpy(np.array(x))
        for i, x in enumerate(inputs)
    ]
    outputs = {"n_outputs": n_outputs} if op.n_outputs else {}
    found = op.function(*arguments, **attributes, **outputs)
    return [y.numpy() for y in (found if isinstance(found, tuple) else (found,))]


def call_elsewhere(name, inputs, attributes, n_outputs=1):
    """Run an operator with its data on another device, and index tensors on the CPU."""
    op = OPS[name]
    mixed = any(x is not None and x.dtype != np.int64 for i, x in enumerate(inputs) if i not in op.static)
    arguments = []
    for i, x in enumerate(inputs):
        if x is None or i in op.static:
            arguments.append(None if x is None else as_data(x.tolist()))
        else:
            device = "cpu" if mixed and x.dtype == np.int64 else "meta"
            arguments.append(torch.from_numpy(np.array(x)).to(device))
    found = op.function(*arguments, **attributes, **({"n_outputs": n_outputs} if op.n_outputs else {}))
    return found if isinstance(found, tuple) else (found,)


def assert_same(found, wanted, rtol=1e-3, atol=1e-5):
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol, atol)


def why_skipped(case, arrays):
    """Return why a case is not run, or None."""
    for part, why in SKIPPED.items():
        if part in case.name:
            return why
    types = {str(getattr(a, "dtype", "no tensor")) for a in arrays if a is not None}
    casts = case.model.graph.node[0].op_type in ("Cast", "CastLike")
    foreign = types - TORCH_HOLDS - (TORCH_ONLY_HOLDS if casts else set())
    return f"torch does not compute in {sorted(foreign)}" if foreign else None


@functools.cache
def onnx_cases():
    """Return ONNX's single-node cases by operator."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about the overflows that are the point of some cases
        collected = collect_testcases(None)
    cases = defaultdict(list)
    for case in collected:
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].domain in ("", "ai.onnx"):
            cases[nodes[0].op_type].append(case)
    return cases


@functools.cache
def ready_cases(name):
    """Return an operator's cases as (case name, inputs, attributes, output names, outputs), and why others are not."""
    ready, skipped = [], {}
    for case in onnx_cases()[name]:
        node, names = case.model.graph.node[0], [value.name for value in case.model.graph.input]
        for inputs, outputs in case.data_sets:
            given, wanted = dict(zip(names, map(as_array, inputs), strict=True)), [as_array(o) for o in outputs]
            if why := why_skipped(case, [*given.values(), *wanted]):
                skipped[case.name] = why
                continue
            arguments = [given[n] if n else None for n in node.input]
            ready.append((case.name, arguments, {a.name: plain(a) for a in node.attribute}, list(node.output), wanted))
    return ready, skipped


@pytest.mark.parametrize("name", [name for name in OPS if name not in WITHOUT_CASES])
def test_onnx_cases(name):
    ready, _ = ready_cases(name)
    assert ready
    for case, arguments, attributes, outputs, wanted in ready:
        for constant in (True, False) if case not in SKIPPED_AS_DATA else (False,):
            found = call(name, arguments, attributes, len(outputs), constant)
            try:
                assert_same([y for y, n in zip(found, outputs, strict=True) if n], wanted)
            except AssertionError as error:
                raise AssertionError(f"{case}, constant={constant}") from error


def test_how_many_onnx_cases_run():
    results = [ready_cases(name) for name in OPS]
    assert sum(len(ready) for ready, _ in results) >= 775
    reasons = {why for _, skipped in results for why in skipped.values()}
    assert set(SKIPPED.values()) <= reasons  # a reason that no case needs any more goes


@pytest.mark.parametrize("name", [name for name in OPS if name not in SHAPE_FROM_DATA])
def test_data_may_live_on_another_device(name):
    for case, arguments, attributes, outputs, wanted in ready_cases(name)[0]:
        if case in SKIPPED_AS_DATA:
            continue
        found = call_elsewhere(name, arguments, attributes, len(outputs))
        found = [y for y, n in zip(found, outputs, strict=True) if n]
        assert [tuple(y.shape) for y in found] == [y.shape for y in wanted], case


# ---- against ONNX Runtime


def ort_run(name, inputs, attributes, n_outputs=1):
    """Run one node in ONNX Runtime, without optimisations."""
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    outputs = [f"y{i}" for i in range(n_outputs)]
    given = {n: x for n, x in zip(names, inputs, strict=True) if n}
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in given.items()
    ]
    node = helper.make_node(name, names, outputs, **attributes)
    graph = helper.make_graph([node], "g", values, [onnx.ValueInfoProto(name=o) for o in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, given)


def assert_same_as_ort(name, inputs, attributes, n_outputs=1, rtol=1e-4, atol=1e-5):
    """Compare on inputs that are arrays, or shapes to fill with random floats."""
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(x).astype(np.float32) if isinstance(x, tuple) else x for x in inputs]
    wanted = ort_run(name, arrays, attributes, n_outputs)
    for constant in (True, False):
        assert_same(call(name, arrays, attributes, n_outputs, constant), wanted, rtol, atol)


def i64(*values):
    return np.array(values, dtype=np.int64)


def f32(*values):
    return np.array(values, dtype=np.float32)


X, K33 = (2, 4, 9, 12), {"kernel_shape": [3, 3]}
CONFIGURATIONS = [
    ("Conv", [X, (6, 4, 3, 3), (6,)], {"pads": [1, 1, 1, 1]}),
    ("Conv", [X, (6, 4, 3, 3)], {"strides": [2, 2], "pads": [0, 0, 1, 1], **K33}),
    ("Conv", [X, (8, 1, 5, 5), (8,)], {"group": 4, "auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    ("Conv", [X, (8, 2, 4, 4), (8,)], {"group": 2, "auto_pad": "SAME_LOWER"}),
    ("Conv", [X, (8, 4, 3, 3), (8,)], {"auto_pad": "VALID", "dilations": [2, 3]}),
    ("Conv", [(2, 3, 20), (5, 3, 4), (5,)], {"pads": [3, 0], "dilations": [2]}),
    ("Conv", [(1, 2, 6, 7, 8), (4, 2, 3, 3, 3), (4,)], {"pads": [1, 0, 1, 1, 2, 1], "strides": [1, 2, 1]}),
    ("ConvTranspose", [X, (4, 6, 3, 3), (6,)], {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    ("ConvTranspose", [X, (4, 3, 2, 2), (6,)], {"strides": [2, 2], "group": 2}),
    ("ConvTranspose", [X, (4, 6, 4, 4), (6,)], {"strides": [2, 3], "pads": [1, 0, 2, 1]}),
    ("ConvTranspose", [X, (4, 6, 3, 3), (6,)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("ConvTranspose", [X, (4, 6, 3, 3), (6,)], {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ("ConvTranspose", [X, (4, 6, 3, 3), (6,)], {"strides": [2, 2], "output_shape": [19, 25], "auto_pad": "SAME_UPPER"}),
    ("ConvTranspose", [X, (4, 6, 3, 3), (6,)], {"strides": [2, 2], "output_shape": [18, 24]}),
    ("ConvTranspose", [(2, 3, 9), (3, 4, 5), (4,)], {"dilations": [2], "strides": [3], "pads": [2, 2]}),
    ("ConvTranspose", [(1, 2, 4, 5, 6), (2, 4, 3, 3, 3), (4,)], {"strides": [2, 2, 2], "pads": [1, 1, 1, 1, 1, 1]}),
    ("Gemm", [(3, 5), (5, 4), (4,)], {}),
    ("Gemm", [(3, 5), (4, 5), (4,)], {"transB": 1}),
    ("Gemm", [(5, 3), (4, 5), (3, 1)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [(3, 5), (5, 4)], {"alpha": 0.25}),
    ("Gemm", [(3, 5), (5, 4), ()], {}),
    ("MatMul", [(2, 3, 4, 5), (5, 6)], {}),
    ("MatMul", [(3, 4, 5), (2, 3, 5, 6)], {}),
    ("MatMul", [(5,), (2, 5, 6)], {}),
    ("MatMul", [(4, 5), (5,)], {}),
    ("MatMul", [(5,), (5,)], {}),
    ("AveragePool", [X], {"strides": [2, 2], **K33}),
    ("AveragePool", [X], {"strides": [2, 2], "ceil_mode": 1, **K33}),
    ("AveragePool", [X], {"strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1, "ceil_mode": 1, **K33}),
    ("AveragePool", [X], {"strides": [2, 2], "pads": [0, 1, 1, 0], **K33}),
    ("AveragePool", [X], {"strides": [2, 2], "pads": [0, 1, 1, 0], "count_include_pad": 1, **K33}),
    ("AveragePool", [X], {"auto_pad": "SAME_UPPER", "strides": [2, 2], "kernel_shape": [2, 4]}),
    ("AveragePool", [X], {"auto_pad": "SAME_LOWER", "strides": [2, 2], "kernel_shape": [2, 4]}),
    ("AveragePool", [X], {"dilations": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1, "strides": [2, 2], **K33}),
    ("AveragePool", [(2, 3, 11)], {"kernel_shape": [4], "strides": [3], "ceil_mode": 1}),
    ("AveragePool", [(2, 3, 5, 6, 7)], {"kernel_shape": [2, 3, 2], "pads": [0, 1, 0, 0, 1, 1]}),
    ("MaxPool", [X], {"strides": [2, 2], "pads": [1, 1, 1, 1], **K33}),
    ("MaxPool", [X], {"strides": [2, 2], "ceil_mode": 1, **K33}),
    ("MaxPool", [X], {"strides": [2, 2], "pads": [0, 0, 1, 1], **K33}),
    ("MaxPool", [X], {"strides": [2, 2], "pads": [0, 1, 2, 1], "ceil_mode": 1, **K33}),
    ("MaxPool", [X], {"dilations": [2, 2], "pads": [2, 2, 2, 2], **K33}),
    ("MaxPool", [X], {"auto_pad": "SAME_UPPER", "strides": [2, 2], "kernel_shape": [2, 2]}),
    ("MaxPool", [X], {"auto_pad": "SAME_LOWER", "kernel_shape": [2, 4]}),
    ("MaxPool", [(2, 3, 11)], {"kernel_shape": [4], "strides": [3], "pads": [3, 1]}),
    ("MaxPool", [(2, 3, 5, 6, 7)], {"kernel_shape": [2, 3, 2], "strides": [2, 2, 2], "pads": [0, 1, 0, 0, 1, 1]}),
    ("LpPool", [X], {"p": 2, "strides": [2, 2], "pads": [1, 0, 1, 1], **K33}),
    ("LpPool", [X], {"p": 3, "strides": [2, 2], **K33}),
    ("GlobalAveragePool", [X], {}),
    ("GlobalMaxPool", [(2, 3, 4, 5, 6)], {}),
    ("GlobalLpPool", [X], {"p": 1}),
    ("GlobalLpPool", [X], {}),
    ("BatchNormalization", [X, (4,), (4,), (4,), f32(0.5, 1, 2, 3)], {"epsilon": 1e-3}),
    ("LayerNormalization", [(2, 5, 8), (8,), (8,)], {}),
    ("LayerNormalization", [(2, 5, 8), (5, 8)], {"axis": 1}),
    ("LayerNormalization", [(2, 5, 8), (5, 8), (5, 8)], {"axis": -2, "epsilon": 1e-2}),
    ("InstanceNormalization", [X, (4,), (4,)], {}),
    ("InstanceNormalization", [(1, 4, 1, 1), (4,), (4,)], {}),
    ("GroupNormalization", [X, (4,), (4,)], {"num_groups": 2}),
    ("LRN", [X], {"size": 3, "alpha": 0.1}),
    ("LpNormalization", [X], {"axis": 1}),
    ("MeanVarianceNormalization", [X], {}),
    ("PRelu", [X, (4, 1, 1)], {}),
    ("HardSwish", [X], {}),
    ("HardSigmoid", [X], {"alpha": 1 / 6}),
    ("Gelu", [X], {"approximate": "tanh"}),
    ("Celu", [X], {"alpha": 0.7}),
    ("Selu", [X], {}),
    ("Shrink", [X], {"bias": 0.3, "lambd": 0.4}),
    ("Softmax", [X], {"axis": 1}),
    ("LogSoftmax", [X], {"axis": -2}),
    ("NonMaxSuppression", [(2, 30, 4), (2, 3, 30), i64(9), f32(0.3), f32(-0.5)], {}),
    ("NonMaxSuppression", [(2, 30, 4), (2, 3, 30), i64(4)], {}),
    ("Clip", [X, np.array(-0.5, np.float32), None], {}),
    ("Clip", [X, None, np.array(0.5, np.float32)], {}),
    ("Clip", [X, np.array(0.7, np.float32), np.array(0.1, np.float32)], {}),
    ("Resize", [X, None, f32(1, 1, 2, 2)], {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    ("Resize", [X, None, f32(1, 1, 2, 2)], {}),
    ("Resize", [X, None, f32(1, 1, 0.6, 1.7)], {}),
    ("Resize", [X, None, f32(1, 1, 0.6, 1.7)], {"mode": "linear"}),
    ("Resize", [X, None, None, i64(2, 4, 7, 30)], {"mode": "linear"}),
    (
        "Resize",
        [X, None, None, i64(2, 4, 7, 30)],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    ("Resize", [X, None, f32(1, 1, 0.6, 1.7)], {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
    (
        "Resize",
        [X, None, None, i64(2, 4, 1, 30)],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    (
        "Resize",
        [X, None, None, i64(2, 4, 1, 5)],
        {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
    ),
    ("Resize", [X, None, None, i64(2, 4, 20, 5)], {"mode": "cubic"}),
    ("Resize", [X, None, f32(1, 1, 2.3, 1.6)], {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}),
    ("Resize", [X, None, None, i64(20, 5)], {"mode": "linear", "axes": [2, 3]}),
    ("Resize", [X, None, None, i64(20, 5)], {"axes": [2, 3], "keep_aspect_ratio_policy": "not_larger"}),
    ("Resize", [X, None, f32(1, 1, 0.6, 1.7)], {"mode": "linear", "antialias": 1}),
    ("Resize", [X, None, f32(1, 1, 0.6, 0.3)], {"mode": "cubic", "antialias": 1}),
    ("Resize", [(2, 3, 10), None, None, i64(2, 3, 25)], {"mode": "linear"}),
    ("Resize", [(1, 2, 4, 5, 6), None, f32(1, 1, 2, 2, 2)], {"mode": "linear"}),
    ("Pad", [X, i64(0, 0, 1, 2, 0, 0, 3, 4)], {}),
    ("Pad", [X, i64(0, 0, 1, -2, 0, 1, 3, -4), np.array(1.5, np.float32)], {}),
    ("Pad", [X, i64(1, 2, 3, 1), None, i64(2, -1)], {"mode": "reflect"}),
    ("Pad", [X, i64(0, 1, 3, 2, 1, 0, 3, 1)], {"mode": "edge"}),
    ("Pad", [X, i64(0, 0, 3, 2, 0, 0, 3, 1)], {"mode": "wrap"}),
    ("Slice", [X, i64(1, -1), i64(100, -100), i64(2, 3), i64(2, -3)], {}),
    ("Slice", [X, i64(5), i64(2), i64(3)], {}),
    ("Slice", [X, i64(0, 1), i64(2, 9223372036854775807)], {}),
    ("Split", [X, i64(2, 3, 4)], {"axis": 2}, 3),
    ("Split", [X], {"axis": 2, "num_outputs": 2}, 2),
    ("Gather", [X, i64(0, -1, 3)], {"axis": 1}),
    ("Gather", [X, np.array(2, np.int64)], {"axis": -1}),
    ("Gather", [X, np.array([[0, 1], [-2, 3]], np.int64)], {"axis": 2}),
    ("Reshape", [X, i64(0, -1, 12)], {}),
    ("Flatten", [X], {"axis": 2}),
    ("Flatten", [X], {"axis": -1}),
    ("Flatten", [X], {"axis": 0}),
    ("Squeeze", [(1, 3, 1, 5), i64(-2)], {}),
    ("Unsqueeze", [(3, 5), i64(-1, 0)], {}),
    ("Expand", [(3, 1), i64(2, 1, 6)], {}),
    ("Einsum", [(2, 3, 4), (2, 5, 4)], {"equation": "bic, bjc -> bij"}),
    ("Where", [np.array([[True], [False]]), (2, 3), (3,)], {}),
    ("Mod", [X, X], {"fmod": 1}),
    ("Div", [i64(7, -7, 5, -5), i64(2, 2, -3, -3)], {}),
    ("Pow", [f32(1, 2, 3), np.array(2, np.int64)], {}),
    ("Round", [f32(0.5, 1.5, 2.5, -0.5, -1.5)], {}),
    ("TopK", [X, i64(3)], {"axis": 1}, 2),
    ("CumSum", [X, np.array(2, np.int64)], {"exclusive": 1, "reverse": 1}),
    ("DepthToSpace", [X], {"blocksize": 2, "mode": "CRD"}),
    ("ReduceMean", [X, i64(2, 3)], {}),
    ("ReduceMean", [X], {"keepdims": 0}),
    ("ReduceSum", [X, i64(-1)], {"keepdims": 0}),
    ("ReduceMax", [X, i64(1)], {}),
    ("ReduceL2", [X, i64(1)], {}),
    ("ReduceLogSumExp", [X, i64(1, 2)], {"keepdims": 0}),
    ("ReduceSum", [X, i64()], {"noop_with_empty_axes": 1}),
    ("ReduceSumSquare", [X, i64()], {"noop_with_empty_axes": 1}),
    ("ReduceL1", [X], {"noop_with_empty_axes": 1}),
    ("ReduceL2", [X], {"noop_with_empty_axes": 1, "keepdims": 0}),
    ("ReduceLogSumExp", [X], {"noop_with_empty_axes": 1}),
    ("ReduceMax", [X], {"noop_with_empty_axes": 1}),
    ("ReduceProd", [X], {"noop_with_empty_axes": 1}),
    ("ReduceMean", [X], {"noop_with_empty_axes": 1}),
    ("GridSample", [(1, 2, 5, 6), (1, 3, 4, 2)], {"padding_mode": "border", "align_corners": 1}),
    ("GridSample", [(1, 2, 5, 6), (1, 3, 4, 2)], {"padding_mode": "reflection", "mode": "cubic"}),
]


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=lambda case: f"{case[0]}-{case[2]}")
def test_onnx_runtime(case):
    assert_same_as_ort(*case)


few = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@st.composite
def windows(draw):
    """Attributes of a 2-D window that fits in 9 x 12 elements."""
    pair = lambda low, high: [draw(st.integers(low, high)) for _ in range(2)]  # noqa: E731
    kernel = pair(1, 4)
    pads = [draw(st.integers(0, k - 1)) for k in kernel * 2]
    return {"kernel_shape": kernel, "strides": pair(1, 3), "pads": pads, "dilations": pair(1, 2)}


@few
@given(window=windows(), group=st.sampled_from([1, 2, 4]))
def test_any_conv(window, group):
    assert_same_as_ort("Conv", [X, (8, 4 // group, *window["kernel_shape"]), (8,)], {**window, "group": group})


@few
@given(window=windows(), group=st.sampled_from([1, 2, 4]))
def test_any_conv_transpose(window, group):
    assert_same_as_ort("ConvTranspose", [X, (4, 2, *window["kernel_shape"]), (2 * group,)], {**window, "group": group})


@few
@given(window=windows(), ceil=st.integers(0, 1), n_outputs=st.integers(1, 2))
def test_any_max_pool(window, ceil, n_outputs):
    assert_same_as_ort("MaxPool", [X], {**window, "ceil_mode": ceil}, n_outputs)


@few
@given(window=windows(), ceil=st.integers(0, 1), include=st.integers(0, 1))
def test_any_average_pool(window, ceil, include):
    assert_same_as_ort("AveragePool", [X], {**window, "ceil_mode": ceil, "count_include_pad": include})


@few
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    coordinates=st.sampled_from(["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]),
    rounding=st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
)
def test_any_resize(sizes, mode, coordinates, rounding):
    attributes = {"mode": mode, "coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
    assert_same_as_ort("Resize", [X, None, None, i64(2, 4, *sizes)], attributes, rtol=1e-3, atol=1e-4)


@few
@given(
    start=st.integers(-15, 15),
    end=st.integers(-15, 15),
    step=st.sampled_from([-3, -2, -1, 1, 2, 3]),
    axis=st.integers(-4, 3),
)
def test_any_slice(start, end, step, axis):
    assert_same_as_ort("Slice", [X, i64(start), i64(end), i64(axis), i64(step)], {})


# ---- against finite differences

SMALL = (2, 2, 4, 5)
SMOOTH = [
    ("Conv", [SMALL, (4, 1, 3, 3), (4,)], {"group": 2, "pads": [0, 1, 1, 1], "strides": [2, 1]}),
    ("ConvTranspose", [SMALL, (2, 3, 3, 3), (3,)], {"strides": [2, 2], "pads": [0, 1, 1, 1], "output_padding": [1, 0]}),
    ("Gemm", [(3, 4), (5, 4), (5,)], {"transB": 1, "alpha": 0.5}),
    ("MatMul", [(2, 3, 4), (4, 2)], {}),
    ("AveragePool", [SMALL], {"pads": [0, 1, 1, 0], "ceil_mode": 1, "strides": [2, 2], **K33}),
    ("MaxPool", [SMALL], {"pads": [0, 1, 1, 0], "ceil_mode": 1, "strides": [2, 2], **K33}),
    ("LpPool", [SMALL], {"pads": [0, 1, 1, 0], **K33}),
    ("GlobalAveragePool", [SMALL], {}),
    ("GlobalMaxPool", [SMALL], {}),
    ("Resize", [SMALL, None, None, (2, 2, 7, 3)], {"mode": "linear"}),
    ("Resize", [SMALL, None, (1.0, 1.0, 1.7, 0.6)], {"mode": "linear"}),
    ("Resize", [SMALL, None, (1.0, 1.0, 1.7, 0.6)], {"mode": "cubic", "antialias": 1}),
    ("Resize", [SMALL, None, (1.0, 1.0, 2.0, 2.0)], {}),
    ("Pad", [SMALL, (1, 1, 1, 2), None, (2, 3)], {"mode": "reflect"}),
    ("Slice", [SMALL, (-1,), (-9,), (3,), (-2,)], {}),
    ("BatchNormalization", [SMALL, (2,), (2,), torch.zeros(2).double(), torch.ones(2).double()], {}),
    ("LayerNormalization", [SMALL, (5,), (5,)], {}),
    ("InstanceNormalization", [SMALL, (2,), (2,)], {}),
    ("GroupNormalization", [SMALL, (2,), (2,)], {"num_groups": 2}),
    ("LRN", [SMALL], {"size": 2}),
    ("LpNormalization", [SMALL], {}),
    ("Softmax", [SMALL], {"axis": 1}),
    ("LogSoftmax", [SMALL], {}),
    ("PRelu", [SMALL, (2, 1, 1)], {}),
    *[(name, [SMALL], {}) for name in ("HardSwish", "HardSigmoid", "Gelu", "Elu", "Celu", "Selu", "Mish", "Softplus")],
    *[(name, [SMALL], {}) for name in ("Sigmoid", "Tanh", "LeakyRelu", "Softsign", "Relu", "Erf", "Exp")],
    *[(name, [SMALL, SMALL], {}) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean")],
    *[(name, [SMALL, (1, 3)], {}) for name in ("ReduceMean", "ReduceMax", "ReduceL2", "ReduceLogSumExp", "ReduceProd")],
]


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: f"{case[0]}-{case[2]}")
def test_gradient(case):
    name, inputs, attributes = case
    torch.manual_seed(0)
    arguments = [
        torch.randn(x, dtype=torch.float64, requires_grad=True)
        if isinstance(x, tuple) and i not in OPS[name].static
        else x
        for i, x in enumerate(inputs)
    ]
    free = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.requires_grad]

    def function(*values):
        given = dict(zip(free, values, strict=True))
        return OPS[name].function(*[given.get(i, a) for i, a in enumerate(arguments)], **attributes)

    assert torch.autograd.gradcheck(function, [arguments[i] for i in free])


@pytest.mark.parametrize("name", ["Sqrt", "ReduceL2", "GlobalLpPool", "LpNormalization"])
def test_gradient_at_zero_is_finite(name):
    x = torch.zeros(1, 1, 3, requires_grad=True)
    OPS[name].function(x).sum().backward()
    assert x.grad.isfinite().all()


def test_gradient_of_lp_pool_at_zero_is_finite():
    x = torch.zeros(1, 1, 3, requires_grad=True)
    OPS["LpPool"].function(x, kernel_shape=[2]).sum().backward()
    assert x.grad.isfinite().all()


# ---- what the graph's types do to the functions


def test_shapes_stay_on_the_cpu_as_int64():
    shape = OPS["Shape"].function(torch.zeros(2, 3), start=-1)
    assert (shape.tolist(), shape.dtype, shape.device.type) == ([3], torch.int64, "cpu")


@pytest.mark.parametrize("to", [7, np.int64, np.dtype("int64")])
def test_cast_takes_onnx_and_numpy_types(to):
    assert OPS["Cast"].function(torch.tensor([1.7, -1.7]), to=to).tolist() == [1, -1]


def test_cast_to_a_type_torch_lacks():
    with pytest.raises(NotImplementedError, match="ONNX type 8"):
        OPS["Cast"].function(torch.zeros(1), to=8)


@pytest.mark.parametrize(
    ("attributes", "wanted"),
    [({"value": np.array([1, 2])}, [1, 2]), ({"value_floats": [0.5]}, [0.5]), ({"value_int": 3}, 3)],
)
def test_constant(attributes, wanted):
    assert OPS["Constant"].function(**attributes).tolist() == wanted


@pytest.mark.parametrize("name", [name for name in OPS if name.startswith("Reduce")])
def test_reduction_of_a_scalar(name):
    assert_same(call(name, [np.array(2.0, np.float32)], {}), ort_run(name, [np.array(2.0, np.float32)], {}))


def test_training_is_refused():
    with pytest.raises(NotImplementedError, match="training_mode"):
        OPS["Dropout"].function(torch.zeros(1), None, True)
