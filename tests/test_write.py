"""The written file: valid, standard, and holding exactly the integers and parameters that were exported."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, qdq_loss_debug

import models
from models import MODELS, cached, feeds, initializer, parse, prepared, producer, quantize, run_ort, weights
from onnx_eptq import graph as og
from onnx_eptq.calibrate import fit_biases
from onnx_eptq.errors import ModelError
from onnx_eptq.plan import Rules
from onnx_eptq.prepare.opset import lower_opset
from onnx_eptq.targets import TARGETS
from onnx_eptq.verify import check_parity
from onnx_eptq.write import BEFORE, BEHIND, STORAGE, footprint, write

LEVELS = ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"]
WIDTHS = {"int8": range(2, 9), "int4": (2, 3, 4), "cast": (2, 3, 4), "lut": (2, 3, 4)}
SHAPES = {"Gemm": [(1, 1), (3, 1), (1, 5), (3, 3), (2, 4), (5, 7)], "Conv": [(3, 3, 1, 1), (2, 3, 3, 3), (1, 3, 1, 2)]}
IN_PIECES = ("attention", "activations")  # hold operators younger than opset 13: LayerNormalization, Gelu, HardSwish
UINT8, INT8, INT4, INT32 = TensorProto.UINT8, TensorProto.INT8, TensorProto.INT4, TensorProto.INT32


def with_storage(form):
    return dict.fromkeys(range(2, 9), form)


def rewritten(case, form="int8", **options):
    return write(case.graph, case.plan, case.quantized, with_storage(form), **options)


def dequantizer(proto, value):
    """The DequantizeLinear node of a planned value."""
    names = (value, f"{value}_dequantized", f"{value}{BEHIND}")
    return next(node for node in proto.graph.node if node.output[0] in names and node.op_type == "DequantizeLinear")


def codes_of(proto, value, level):
    """The integers that ONNX Runtime hands to a constant's DequantizeLinear."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    node = dequantizer(exposed, value)
    exposed.graph.node.append(helper.make_node("Cast", [node.input[0]], ["its codes"], to=INT32))
    (feed,) = feeds(proto, batch=1, count=1)
    return run_ort(exposed, feed, ["its codes"], level)["its codes"]


def kernels(proto: onnx.ModelProto, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime makes of a file at full optimisation."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


class Feeds(CalibrationDataReader):
    """Batches one by one."""

    def __init__(self, batches):
        self.left = list(batches)

    def get_next(self):
        return self.left.pop(0) if self.left else None


def one_layer(shape):
    """A model of one layer whose weight has this shape."""
    w = weights(30)
    if len(shape) == 2:
        return parse(
            f"(float[N,{shape[1]}] x) => (float[N,{shape[0]}] y) {{ y = Gemm <transB=1> (x, w) }}", w=w(*shape)
        )
    out = f"N,{shape[0]},{5 - shape[2]},{5 - shape[3]}"
    return parse(f"(float[N,{shape[1]},4,4] x) => (float[{out}] y) {{ y = Conv(x, w) }}", w=w(*shape))


# ---- storage forms


def test_every_storage_form_and_width_is_covered():
    assert set(WIDTHS) == set(STORAGE)
    for target in TARGETS.values():
        for bits, form in target.storage.items():
            assert bits in WIDTHS[form]


@pytest.mark.parametrize("shape", [shape for group in SHAPES.values() for shape in group], ids=str)
@pytest.mark.parametrize(("form", "bits"), [(form, bits) for form, widths in WIDTHS.items() for bits in widths])
def test_integers_read_back_by_the_runtime_are_the_exported_ones(form, bits, shape):
    case = quantize(one_layer(shape), Rules(bits))
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = np.random.default_rng(bits).integers(qmin, qmax + 1, shape, np.int32)
    codes.flat[0] = qmin  # no calibrator makes it, learned roundings may
    codes.flat[-1] = qmax
    quantized = {**case.quantized, "w": case.quantized["w"]._replace(integers=torch.from_numpy(codes))}
    written = write(case.graph, case.plan, quantized, {bits: form})
    onnx.checker.check_model(written, full_check=True)
    for level in ("DISABLE_ALL", "ENABLE_ALL"):
        np.testing.assert_array_equal(codes_of(written, "w", level), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sub_byte_forms_are_small(bits):
    sizes = {}
    case = quantize(one_layer((64, 128)), Rules(bits))
    for form in STORAGE:
        sizes[form] = sum(
            len(t.raw_data) for t in rewritten(case, form).graph.initializer if t.data_type in (UINT8, INT8, INT4)
        )
    table = 256 * (8 if bits == 3 else 8 // bits)
    assert sizes["int8"] > 64 * 128
    assert sizes["int4"] <= sizes["cast"] + 64 <= 64 * 128 // 2 + 200
    assert sizes["lut"] <= 64 * 128 * bits // 8 + table + 200


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["residual", "depthwise", "gemm", "matmul", "transposed", "two_towers"])
def test_cast_lut_and_int8_give_the_same_bits_at_every_level(name, bits):
    case = cached(name, bits)
    written = {form: rewritten(case, form) for form in ("int8", "cast", "lut")}
    for level in LEVELS:
        expected = run_ort(written["int8"], case.batches[0], level=level)
        for form in ("cast", "lut"):
            for output, values in run_ort(written[form], case.batches[0], level=level).items():
                np.testing.assert_array_equal(values, expected[output])
    off, basic = (run_ort(rewritten(case, "int4"), case.batches[0], level=level) for level in LEVELS[:2])
    expected = run_ort(written["int8"], case.batches[0])
    for output, values in off.items():
        np.testing.assert_array_equal(values, expected[output])
        np.testing.assert_array_equal(values, basic[output])


@pytest.mark.parametrize("bits", [4, 7, 8])
@pytest.mark.parametrize("name", ["residual", "attention"])
def test_files_load_where_the_runtime_shifts_weights_for_older_processors(name, bits):
    """`session.x64quantprecision` makes uint8 of int8 weights that kernels without VNNI would let saturate."""
    case = cached(name, bits)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    shifted = ort.InferenceSession(case.written.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = run_ort(case.written, case.batches[0], level="ENABLE_ALL")
    for output, values in zip(expected, shifted.run(list(expected), dict(case.batches[0])), strict=True):
        step = float(case.quantized[output].qparams.scale)
        assert np.abs(values - expected[output]).max() < 1.5 * step


def test_layers_of_different_widths_share_no_table():
    """Bytes of two-bit weights stand for four codes, those of three-bit ones for a bit of eight."""
    widths = {"w1": 3, "w2": 2, "w3": 4}
    case = quantize(MODELS["residual"](), Rules(bits=widths))
    written = write(case.graph, case.plan, case.quantized, dict.fromkeys(range(2, 9), "lut") | {8: "int8"})
    for level in ("DISABLE_ALL", "ENABLE_ALL"):
        for name in widths:
            np.testing.assert_array_equal(codes_of(written, name, level), case.quantized[name].integers)


def test_three_bit_layers_read_one_table_of_int32():
    """A Cast behind each Gather would be as right; OpenVINO does not fold it, and then runs the layers in float."""
    case = cached("residual", 3)
    written = rewritten(case, "lut")
    (wide,) = (node for node in written.graph.node if node.op_type == "Cast" and node.input[0] == "table_bit")
    rows = [node.input[0] for node in written.graph.node if node.op_type == "Gather"]
    assert len(rows) > 1
    assert set(rows) == set(wide.output)


# ---- the file as a whole


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 8), (3, 5)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_file_is_valid_standard_onnx_of_opset_21(name, bits):
    for target in TARGETS.values():
        case = cached(name, *bits)
        written = write(case.graph, case.plan, case.quantized, target.storage)
        onnx.checker.check_model(written, full_check=True)
        assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", 21)]
        assert written.ir_version == 10
        assert {node.domain for node in written.graph.node} == {""}
        names = [node.name for node in written.graph.node]
        assert len(set(names)) == len(names)
        assert not {t.data_type for t in written.graph.initializer} & {
            TensorProto.INT2,
            TensorProto.UINT2,
            TensorProto.UINT4,
        }


@pytest.mark.parametrize("form", ["int8", "lut"])
@pytest.mark.parametrize("name", MODELS)
def test_opset_13_computes_the_same(name, form):
    case = cached(name, 4)
    old = rewritten(case, form, opset=13, metadata={"who": "we"})
    onnx.checker.check_model(old, full_check=True)
    assert [(entry.domain, entry.version) for entry in old.opset_import] == [("", 13)]
    assert old.ir_version == 8
    assert {entry.key: entry.value for entry in old.metadata_props} == {"who": "we"}
    expected = run_ort(rewritten(case, form), case.batches[0])
    for output, values in run_ort(old, case.batches[0]).items():
        if name in IN_PIECES:  # some last digits of float kernels differ, and few of them cross a step
            step = float(case.quantized[output].qparams.scale)
            assert np.abs(values - expected[output]).max() < 1.5 * step
            assert np.mean(values != expected[output]) < 0.02
        else:
            np.testing.assert_array_equal(values, expected[output])


@pytest.mark.parametrize(("opset", "version"), [(15, 8), (17, 8), (18, 8), (19, 9), (20, 9)])
@pytest.mark.parametrize("name", IN_PIECES)
def test_opsets_in_between_keep_whole_what_they_have(name, opset, version):
    case = cached(name, 4)
    old = rewritten(case, "lut", opset=opset)
    onnx.checker.check_model(old, full_check=True)
    assert (old.opset_import[0].version, old.ir_version) == (opset, version)
    kinds, wanted = ({node.op_type for node in model.graph.node} for model in (old, case.written))
    for op, first in (("HardSwish", 14), ("LayerNormalization", 17), ("Gelu", 20)):
        assert (op in kinds) == (op in wanted and first <= opset)
    step = float(case.quantized[old.graph.output[0].name].qparams.scale)
    expected = run_ort(rewritten(case, "lut"), case.batches[0])
    for output, values in run_ort(old, case.batches[0]).items():
        assert np.abs(values - expected[output]).max() < 1.5 * step
        assert np.mean(values != expected[output]) < 0.02


@pytest.mark.parametrize("opset", [13, 18, 20])
def test_group_normalization_has_its_scales_of_channels_in_every_opset(opset):
    """Before opset 21 the operator had them per group."""
    text = "(float[N,4,5,5] x) => (float[N,4,5,5] y) { h = Conv(x, w) y = GroupNormalization <num_groups=2> (h, s, b) }"
    numbers = weights(1)
    found = quantize(parse(text, w=numbers(4, 4, 1, 1), s=numbers(4), b=numbers(4)))
    old = rewritten(found, "int8", opset=opset)
    onnx.checker.check_model(old, full_check=True)
    expected = run_ort(rewritten(found, "int8"), found.batches[0])["y"]
    step = float(found.quantized["y"].qparams.scale)
    assert np.abs(run_ort(old, found.batches[0])["y"] - expected).max() < 1.5 * step


LOWERED = {  # what means the same in an older opset in other words: nodes, its constants, the opset
    "GridSample": ("y = GridSample (h, g)", {"g": (2, 5, 5, 2)}, 17),
    "GridSample, cubic": ('y = GridSample <mode="cubic"> (h, g)', {"g": (2, 5, 5, 2)}, 16),
    "RoiAlign": ('y = RoiAlign <output_height=3, output_width=3, coordinate_transformation_mode="output_half_pixel"> (h, r, i)',
                 {"r": (2, 4)}, 13),
    "Split in equal parts": ("a, b = Split <axis=1, num_outputs=2> (h) y = Concat <axis=1> (b, a)", {}, 13),
    "Split in unequal parts": ("a, b = Split <axis=2, num_outputs=2> (h) y = Concat <axis=2> (b, a)", {}, 17),
    "Reduce over all axes": ("r = ReduceMax (h, none) y = Add(h, r)", {}, 17),
    "AveragePool": ("y = AveragePool <kernel_shape=[2,2], dilations=[1,1]> (h)", {}, 18),
}  # fmt: skip


@pytest.mark.parametrize("form", LOWERED)
def test_older_opsets_say_the_same_in_their_words(form):
    nodes, shapes, opset = LOWERED[form]
    numbers = weights(2)
    constants = {name: np.abs(numbers(*shape)) for name, shape in shapes.items()}
    constants |= {"w": numbers(4, 4, 1, 1), "i": np.array([0, 1]), "none": np.zeros(0, np.int64)}
    found = quantize(parse(f"(float[2,4,7,7] x) => (float[a,b,c,d] y) {{ h = Conv(x, w) {nodes} }}", **constants))
    old = rewritten(found, "int8", opset=opset)
    onnx.checker.check_model(old, full_check=True)
    expected = run_ort(rewritten(found, "int8"), found.batches[0])["y"]
    step = float(found.quantized["y" if "y" in found.quantized else "h"].qparams.scale)
    np.testing.assert_allclose(run_ort(old, found.batches[0])["y"], expected, atol=1.01 * step)


STUCK = {
    "RoiAlign": ("y = RoiAlign <output_height=3, output_width=3> (h, r, i)", 13),
    "Split": ("a, b = Split <axis=2, num_outputs=2> (h) y = Concat <axis=2> (b, a)", 17),
    "ReduceMean": ("e = ReduceMean <noop_with_empty_axes=1> (h) y = Add(h, e)", 17),
    "AveragePool": ("y = AveragePool <kernel_shape=[2,2], dilations=[2,2]> (h)", 18),
}


@pytest.mark.parametrize("op", STUCK)
def test_what_an_older_opset_cannot_say_is_named(op):
    nodes, opset = STUCK[op]
    constants = {"w": weights(0)(4, 4, 1, 1), "r": np.ones((2, 4), np.float32), "i": np.array([0, 1])}
    graph = prepared(parse(f"(float[2,4,H,7] x) => (float[a,b,c,d] y) {{ h = Conv(x, w) {nodes} }}", **constants))
    with pytest.raises(ModelError, match=f"no form in opset {opset}: .*{op}"):
        lower_opset(graph, opset)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax", "ReduceL2", "ReduceSum"])
def test_opset_13_reduces_over_the_same_axes(op):
    text = f"(float[N,4,5] x) => (float[N,4,3] y) {{ h = MatMul(x, w) r = {op} <keepdims=1> (h, axes) y = Add(h, r) }}"
    found = quantize(parse(text, w=weights(0)(5, 3), axes=np.array([-1])))
    old = rewritten(found, "int8", opset=13)
    onnx.checker.check_model(old, full_check=True)
    expected = run_ort(rewritten(found, "int8"), found.batches[0])["y"]
    np.testing.assert_array_equal(run_ort(old, found.batches[0])["y"], expected)


@pytest.mark.parametrize("form", ["int4", "cast"])
def test_four_bit_types_need_opset_21(form):
    with pytest.raises(ModelError, match="13"):
        rewritten(cached("gemm", 4), form, opset=13)


def test_an_operator_that_opset_13_lacks_is_named():
    text = "(float[N,1,5,5] x, float[N,3,3,2] g) => (float[N,1,3,3] y) { h = MatMul(x, w) y = GridSample(h, g) }"
    found = quantize(parse(text, w=weights(0)(5, 5)))
    with pytest.raises(ModelError, match="GridSample"):
        rewritten(found, opset=13)


def test_outputs_and_inputs_keep_names_types_and_shapes(case):
    for kind in ("input", "output"):
        before, after = getattr(case.proto.graph, kind), getattr(case.written.graph, kind)
        assert [value.name for value in after] == [value.name for value in before]
        for old, new in zip(before, after, strict=True):
            assert new.type.tensor_type.elem_type == old.type.tensor_type.elem_type
            assert new.type.tensor_type.shape == old.type.tensor_type.shape
    for level in ("DISABLE_ALL", "ENABLE_ALL"):
        found, expected = (run_ort(proto, case.batches[0], level=level) for proto in (case.written, case.proto))
        assert {name: values.shape for name, values in found.items()} == {n: v.shape for n, v in expected.items()}


def test_scales_and_zero_points_are_the_exported_ones_bit_for_bit(case):
    for value, point in case.plan.items():
        node = dequantizer(case.written, value)
        qparams = case.quantized[point.tied_to or value].qparams
        scale = numpy_helper.to_array(initializer(case.written, node.input[1]))
        assert scale.dtype == np.float32
        np.testing.assert_array_equal(scale, qparams.scale.numpy())
        axis = [a.i for a in node.attribute if a.name == "axis"]
        assert axis == ([] if point.grid.axis is None else [point.grid.axis])
        zero_point = numpy_helper.to_array(initializer(case.written, node.input[2]))
        np.testing.assert_array_equal(zero_point, qparams.zero_point.numpy())
        assert zero_point.dtype == {"bias": np.int32, "weight": np.int8}.get(point.role, np.uint8)


def test_constants_hold_the_exported_integers(case):
    for value, (codes, _, _) in case.quantized.items():
        if codes is not None:
            np.testing.assert_array_equal(codes_of(case.written, value, "DISABLE_ALL"), codes.numpy())


def test_zero_points_are_explicit(case):
    for node in case.written.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.input) == 3
            assert all(node.input)


def test_nothing_but_quantizers_is_added(case):
    before = Counter(node.op for node in case.graph.nodes)
    after = Counter(node.op_type for node in case.written.graph.node)
    activations = [point for point in case.plan.values() if point.role == "activation"]
    added = {"QuantizeLinear": len(activations), "DequantizeLinear": len(case.plan)}
    assert after == before + Counter(added)
    floats = {layer.weight.name for layer in case.layers} & {t.name for t in case.written.graph.initializer}
    assert floats <= set(case.plan.floats)  # no other float weight is left in the file


def test_onnx_runtimes_own_format_takes_the_files(tmp_path):
    """Its converter runs what it wrote; it lays aside what other devices may want, and there biases need their zero points."""
    onnx.save(cached("residual", 4).written, tmp_path / "model.onnx")
    command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.glob("*.ort")} == {"model.ort", "model.with_runtime_opt.ort"}


@pytest.mark.parametrize("name", ["residual", "attention", "gemm"])
def test_onnx_runtimes_debugger_finds_the_activations(tmp_path, name):
    """By name, in the file and in the float model that was prepared for it."""
    found, paths = cached(name, 8), [str(tmp_path / part) for part in ("float.onnx", "qdq.onnx")]
    values = []
    for path, proto in zip(paths, (og.to_model(found.graph), found.written), strict=True):
        onnx.save(proto, path)
        qdq_loss_debug.modify_model_output_intermediate_tensors(path, path)
        reader = Feeds(found.batches)
        values.append(qdq_loss_debug.collect_activations(path, reader))
    matched = qdq_loss_debug.create_activation_matching(values[1], values[0])
    planned = {point.value for point in found.plan.values() if point.role == "activation"}
    assert planned <= set(matched)
    for value in planned - set(found.batches[0]):
        exact, restored = (matched[value][key][0] for key in ("float", "post_qdq"))
        assert qdq_loss_debug.compute_signal_to_quantization_noice_ratio(exact, restored) > 15


@pytest.mark.parametrize(("factor", "opened"), [(1, True), (1.7, False)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_clip_in_front_of_a_narrower_grid_is_opened(tmp_path, bits, factor, opened):
    """ONNX Runtime then runs the layer before it on integers; where the grid reaches beyond the bound, it still counts."""
    text = """(float[N,4,6,6] x) => (float[N,3,6,6] y) {
      a = Conv <pads=[1,1,1,1]> (x, w, b) c = Clip(a, low, six) y = Conv(c, v) }"""
    draw = weights(3)
    constants = {"w": 9 * draw(8, 4, 3, 3), "b": draw(8), "v": draw(3, 8, 1, 1)}
    found = quantize(parse(text, low=np.float32(0), six=np.float32(6), **constants), Rules(4, bits))
    scale = found.student.quantizer("c").scale
    scale.fill_(factor * 6 / found.plan["c"].grid.qmax)
    fit_biases(found.student, found.plan)
    quantized = found.student.export(found.plan)
    storage = TARGETS["onnxruntime"].storage
    written = write(found.graph, found.plan, quantized, storage)
    clip = next(node for node in written.graph.node if node.op_type == "Clip" and node.input[1])
    bound = float(numpy_helper.to_array(initializer(written, clip.input[2])))
    assert bound == (np.finfo(np.float32).max if opened and bits < 8 else 6)
    check_parity(written, found.student, found.plan, found.layers, quantized, found.batches, 1)
    assert kernels(written, tmp_path)["QLinearConv"] == (2 if opened else 1)
    assert footprint(found.graph, found.plan, storage).total == og.model_bytes(written)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_narrow_activations_are_limited_by_an_integer_clip(bits):
    """QuantizeLinear to uint8 -> Clip(max=2**bits - 1) -> DequantizeLinear: four-bit types would not load, or run float."""
    case = cached("residual", 8, bits)
    qmax = 2**bits - 1
    for value, point in case.plan.items():
        if point.role != "activation":
            continue
        node = producer(case.written, dequantizer(case.written, value).input[0])
        if point.grid.bits == 8:  # the network's input and output
            assert node.op_type == "QuantizeLinear"
            continue
        assert node.op_type == "Clip"  # for uint8 in ONNX Runtime long before Min is
        assert node.input[1] == ""  # no lower limit
        limit = numpy_helper.to_array(initializer(case.written, node.input[2]))
        assert (limit.dtype, int(limit)) == (np.uint8, qmax)
        assert producer(case.written, node.input[0]).op_type == "QuantizeLinear"
        zero_point = initializer(case.written, producer(case.written, node.input[0]).input[2])
        assert zero_point.data_type == UINT8
    value = "e"
    codes = run_ort(case.written, case.batches[0], [dequantizer(case.written, value).input[0]])
    (codes,) = codes.values()
    assert codes.dtype == np.uint8
    assert codes.max() <= qmax
    unlimited = run_ort(case.written, case.batches[0], [f"{value}{BEFORE}"])[f"{value}{BEFORE}"]
    scale, zero_point = (tensor.numpy() for tensor in case.quantized[value].qparams)
    np.testing.assert_array_equal(codes, np.clip(np.round(unlimited / scale) + zero_point, 0, qmax))


def test_eight_bit_activations_are_not_limited(case):
    assert not any(node.output[0].endswith("_limited") for node in case.written.graph.node)


def test_metadata_is_kept_and_added_to():
    proto = models.residual()
    helper.set_model_props(proto, {"labels": "a,b,c", "who": "they"})
    proto.doc_string, proto.graph.node[0].doc_string = "what it is", "the stem"
    case = quantize(proto, metadata={"who": "we", "onnx_eptq": "1"})
    found = {entry.key: entry.value for entry in case.written.metadata_props}
    assert found == {"labels": "a,b,c", "who": "we", "onnx_eptq": "1"}
    assert case.written.doc_string == "what it is"
    assert next(node.doc_string for node in case.written.graph.node if node.op_type == "Conv") == "the stem"


@pytest.mark.parametrize("name", MODELS)
def test_same_input_same_bytes(name):
    case = cached(name, 4)
    again = quantize(MODELS[name](), Rules(4, 8))
    assert again.written.SerializeToString() == case.written.SerializeToString()


def test_writing_changes_nothing_it_is_given():
    proto = models.concat()
    graph = prepared(proto)
    before = og.to_model(graph).SerializeToString()
    case = cached("concat", 4)
    integers = {value: q.integers.clone() for value, q in case.quantized.items() if q.integers is not None}
    write(graph, case.plan, case.quantized, models.ORT_TARGET.storage)
    assert og.to_model(graph).SerializeToString() == before
    for value, codes in integers.items():
        assert torch.equal(case.quantized[value].integers, codes)


def test_an_empty_plan_writes_the_float_model():
    proto = models.residual()
    written = write(prepared(proto), {}, {}, {})
    (feed,) = feeds(proto, count=1)
    for output, values in run_ort(written, feed).items():
        np.testing.assert_allclose(values, run_ort(proto, feed)[output], atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_operators_of_the_file_are_the_golden_ones(name, golden):
    lines = []
    for target in TARGETS.values():
        case = cached(name, 4)
        written = write(case.graph, case.plan, case.quantized, target.storage)
        lines += [target.name] + [f"  {node.op_type:<20} {' '.join(node.output)}" for node in written.graph.node]
    golden(f"{name}.ops.txt", "\n".join(lines) + "\n")
