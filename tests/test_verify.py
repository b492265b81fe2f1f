"""Parity passes on sound files and fails, naming the node, for every planted fault; fidelity against its definition."""

import copy
import re
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from models import MODELS, cached, case, feeds, initializer, node_named, parse, producer, quantize, run_ort, weights
from onnx_eptq import graph as graphs
from onnx_eptq import grid as grids
from onnx_eptq import verify
from onnx_eptq import write as writers
from onnx_eptq.errors import VerificationError
from onnx_eptq.mirror import build
from onnx_eptq.plan import Plan, Rules
from onnx_eptq.targets import TARGETS
from onnx_eptq.verify import check_parity, measure_fidelity, session


def check(found, batches=None):
    return check_parity(
        found.written, found.student, found.plan, found.layers, found.quantized, batches or found.batches, threads=1
    )


# ---- batches

TAKES = {
    "(float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }": True,
    "(float[N,4] x) => (float[3,N] y) { h = MatMul(x, w) y = Transpose(h) }": True,
    "(float[N,4] x) => (float[N,3] y, float[3,4] u) { y = MatMul(x, w) u = Transpose(w) }": True,
    "(float[N,4] x) => (float[2,K] picked) { n = NonZero(x) picked = Cast <to=1> (n) }": True,
    "(float[N,4] x) => (int64[N] y) { h = MatMul(x, w) y = ArgMax <keepdims=0> (h) }": True,
    "(float[N,4] x) => (float[N,3] y) { m = ReduceMean <axes=[0]> (x) d = Sub(x, m) y = MatMul(d, w) }": False,
    "(float[N,4] x) => (float[1,3] y) { m = ReduceMean <axes=[0]> (x) y = MatMul(m, w) }": False,
    "(float[N,4] x) => (float[1,3] y) { m = Reshape(x, one) y = MatMul(m, w) }": False,
    "(float[N,4] x) => (float[5,3] y) { m = Reshape(x, five) y = MatMul(m, w) }": None,
}


@pytest.mark.parametrize("text", TAKES)
def test_whether_a_model_takes_samples_together(text):
    constants = {"w": weights(0)(4, 3), "one": np.array([1, 4]), "five": np.array([5, 4])}
    model = parse(text, **{key: value for key, value in constants.items() if f"{key})" in text}, opset=17)
    samples = np.random.default_rng(0).normal(size=(2, 1, 4)).astype(np.float32)
    assert verify.takes_batches(model, {"x": samples[0]}, {"x": samples[1]}, ["picked"]) is TAKES[text]


# ---- sound files


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (3, 8), (2, 8), (4, 4)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_parity_holds(name, bits):
    found = cached(name, *bits)
    parity = check(found)
    activations = [point for point in found.plan.values() if point.role == "activation"]
    assert parity.float_values == len(activations) * len(found.batches)
    assert parity.float_differences <= 2
    assert parity.integer_differences == 0
    assert parity.basic_equals_off
    assert parity.fused_max_steps <= 1


@pytest.mark.parametrize("name", ["residual", "transposed", "matmul"])
def test_parity_holds_for_the_portable_form(name):
    found = case(name, 4)
    storage = dict.fromkeys(range(2, 9), "int4")
    found.written = writers.write(found.graph, found.plan, found.quantized, storage)
    assert check(found).float_differences <= 2


@pytest.mark.parametrize("limit", [0, 10**6], ids=["external data", "one file"])
@pytest.mark.parametrize("name", ["residual", "attention", "transposed"])
def test_a_file_is_verified_like_the_model_in_memory(tmp_path, monkeypatch, name, limit):
    monkeypatch.setattr(graphs, "EXTERNAL_BYTES", 2)
    found = copy.copy(cached(name, 4, 8))
    expected = check(found), measure_fidelity(found.proto, found.written, found.batches, threads=1)
    with graphs.staging(tmp_path / "q.onnx") as staged:
        staged.write(found.written, limit=limit)
        found.written = staged.path
        assert (check(found), measure_fidelity(found.proto, staged.path, found.batches, threads=1)) == expected
        assert {path.name for path in staged.path.parent.iterdir()} <= {"q.onnx", "q.onnx.data"}


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("residual", {"QLinearConv": 2, "QGemm": 1, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1}),
        ("depthwise", {"QLinearConv": 3}),
        ("gemm", {"QGemm": 2}),
        ("concat", {"QLinearConv": 3}),
        ("pooling", {"QLinearConv": 1, "QLinearAveragePool": 1}),
    ],
)
def test_the_runtime_executes_integers_and_they_are_checked(name, kernels):
    parity = check(cached(name))
    assert {kernel: parity.kernels.get(kernel, 0) for kernel in kernels} == kernels
    linear = sum(count for kernel, count in kernels.items() if kernel in ("QLinearConv", "QGemm"))
    assert parity.integer_values == 2 * linear
    assert parity.integer_elements > 0


def test_parity_holds_on_ties_and_saturated_data():
    found = cached("residual")
    scale, zero_point = found.quantized["image"].qparams
    steps = np.random.default_rng(0).integers(-300, 300, (4, 3, 8, 8)) + 0.5
    ties = ((steps - int(zero_point)) * float(scale)).astype(np.float32)
    check(found, [{"image": ties}, {"image": 1e6 * ties}, {"image": 0 * ties}])


# ---- planted faults


def planted(test):
    """Run with the fault in place; the file must not pass, and the message must name the node."""
    with pytest.raises(VerificationError) as error:
        test()
    return str(error.value)


def half_away(x):
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


def test_planted_fault_rounding_half_away_from_zero(monkeypatch):
    """Ties in the data show it at the first value; the weights' rounding is checked by the grid's own tests."""
    found = cached("residual")
    scale, zero_point = found.quantized["image"].qparams
    steps = np.random.default_rng(0).integers(0, 255, (4, 3, 8, 8)) + 0.5
    batch = {"image": ((steps - int(zero_point)) * float(scale)).astype(np.float32)}
    ratio = batch["image"] / scale.numpy()
    assert (ratio % 1 == 0.5).mean() > 0.3
    check(found, [batch])
    for name in ("round_half_even", "_round_in_place"):
        monkeypatch.setattr(grids, name, half_away)
    assert "value 'image'" in planted(lambda: check(found, [batch]))


def bias_as_float(proto, node_name):
    """Put float values, which need not lie on the grid, where the bias's DequantizeLinear was."""
    node = node_named(proto, node_name)
    dequantize = producer(proto, node.input[2])
    codes, scale = (numpy_helper.to_array(initializer(proto, name)) for name in dequantize.input[:2])
    values = (codes.astype(np.float32) * scale * np.float32(1.02)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(values, "float_bias"))
    node.input[2] = "float_bias"


@pytest.mark.parametrize("role", ["bias", "weight", "constant"])
@pytest.mark.parametrize("name", ["residual", "depthwise", "gemm", "matmul", "attention"])
def test_planted_fault_constants_left_float(monkeypatch, name, role):
    """At 8 bits the runtime's result hardly changes, as it quantizes a float bias by itself."""
    found = case(name)
    constants = [value for value, point in found.plan.items() if point.role == role]
    stored = writers.Writer.stored
    monkeypatch.setattr(writers.Writer, "stored", lambda self, p, form: p.role == role or stored(self, p, form))
    found.written = writers.write(found.graph, found.plan, found.quantized, dict.fromkeys(range(2, 9), "int8"))
    if not constants:
        check(found)
        return
    reader = next(node.name for node in found.graph.nodes if constants[0] in [t.name for t in node.inputs])
    assert f"node '{reader}', value '{constants[0]}'" in planted(lambda: check(found))


@pytest.mark.parametrize(("name", "node", "bias"), [("residual", "Conv", "b1"), ("matmul", "Add", "b1")])
def test_planted_fault_exact_bias_left_float(name, node, bias):
    """At 4 bits the bias's own grid is coarse enough for the values to differ."""
    found = case(name, 4)
    reader = node_named(found.written, node)
    exact = found.teacher.constant(bias).detach().numpy()
    found.written.graph.initializer.append(numpy_helper.from_array(exact, "exact"))
    reader.input[:] = ["exact" if name == f"{bias}_dequantized" else name for name in reader.input]
    assert "node 'Relu'" in planted(lambda: check(found))


def remove_quantizer(proto, value):
    """Let the value's producer write it directly."""
    dequantize = producer(proto, value)
    quantize_node = producer(proto, dequantize.input[0])
    raw = quantize_node.input[0]
    origin = producer(proto, raw)
    origin.output[list(origin.output).index(raw)] = value
    for node in (dequantize, quantize_node):
        proto.graph.node.remove(node)


def weight_dequantizer(proto, node_name):
    return producer(proto, node_named(proto, node_name).input[1])


def set_codes(proto, name, change):
    tensor = initializer(proto, name)
    values = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(np.array(change(values), order="C"), name))


def wrong_axis(proto, node_name):
    attribute = next(a for a in weight_dequantizer(proto, node_name).attribute if a.name == "axis")
    attribute.i = 1 - attribute.i


def transposed_spatially(proto, node_name):
    set_codes(proto, weight_dequantizer(proto, node_name).input[0], lambda codes: codes.swapaxes(-1, -2))


def one_wrong_code(proto, node_name):
    def change(codes):
        where = np.unravel_index(np.abs(codes.astype(int)).argmax(), codes.shape)
        codes[where] = -codes[where]
        return codes

    set_codes(proto, weight_dequantizer(proto, node_name).input[0], change)


def weight_zero_point_off_by_one(proto, node_name):
    """The zero points are shared by all weights of this shape, so this one gets its own."""
    node = weight_dequantizer(proto, node_name)
    shape = numpy_helper.to_array(initializer(proto, node.input[2])).shape
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.int8), "one_off"))
    node.input[2] = "one_off"


def zero_point_off_by_one(proto, value):
    """In DequantizeLinear alone, or QuantizeLinear would shift as well."""
    node = producer(proto, value)
    zero_point = numpy_helper.to_array(initializer(proto, node.input[2]))
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray(zero_point + 1, np.uint8), "one_off"))
    node.input[2] = "one_off"


def both_zero_points_off_by_one(proto, value):
    name = producer(proto, value).input[2]
    set_codes(proto, name, lambda zero_point: np.asarray(zero_point + 1, np.uint8))


def wrong_scale(proto, value):
    set_codes(proto, producer(proto, value).input[1], lambda scale: np.asarray(scale * np.float32(1.05), np.float32))


def wrong_attribute(proto, node_name):
    attribute = next(a for a in node_named(proto, node_name).attribute if a.name == "pads")
    attribute.ints[:] = [attribute.ints[2], attribute.ints[3], attribute.ints[0], attribute.ints[1]]


# model, fault, its argument, the node that the message must name
FAULTS = {
    "float bias in a Conv": ("residual", bias_as_float, "Conv_1", "'Conv_1'"),
    "float bias in a Gemm": ("gemm", bias_as_float, "Gemm", "'Relu'"),  # whose result is the layer's first
    "wrong axis on a Gemm's weight": ("gemm", wrong_axis, "Gemm_1", "'Gemm_1'"),
    "wrong axis on a MatMul's weight": ("attention", wrong_axis, "MatMul_1", "'MatMul_1'"),
    "depthwise weight transposed": ("depthwise", transposed_spatially, "Conv_1", "'Clip_1'"),
    "one wrong code in a Conv": ("residual", one_wrong_code, "Conv_1", "'Conv_1'"),
    "one wrong code in a Gemm": ("gemm", one_wrong_code, "Gemm_1", "'Gemm_1'"),
    "one wrong code in a ConvTranspose": ("transposed", one_wrong_code, "ConvTranspose_1", "'ConvTranspose_1'"),
    "weight zero point off by one": ("residual", weight_zero_point_off_by_one, "Conv_1", "'Conv_1'"),
    "pads swapped": ("depthwise", wrong_attribute, "Conv_1", "'Clip_1'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_in_the_file(fault):
    name, change, argument, node = FAULTS[fault]
    found = case(name)
    check(found)
    change(found.written, argument)
    onnx.checker.check_model(found.written, full_check=True)  # a valid file, that computes something else
    assert f"node {node}" in planted(lambda: check(found))


ACTIVATION_FAULTS = {
    "zero point of DequantizeLinear off by one": zero_point_off_by_one,
    "zero points off by one": both_zero_points_off_by_one,
    "wrong scale": wrong_scale,
}


@pytest.mark.parametrize("value", ["c", "f"])
@pytest.mark.parametrize("fault", ACTIVATION_FAULTS)
def test_planted_fault_in_an_activation(fault, value):
    found = case("residual")
    ACTIVATION_FAULTS[fault](found.written, value)
    onnx.checker.check_model(found.written, full_check=True)
    assert re.search(r"node '\w+', value '\w+'", planted(lambda: check(found)))


@pytest.mark.parametrize(
    ("name", "value"), [("residual", "c"), ("residual", "e"), ("residual", "logits"), ("attention", "m")]
)
def test_planted_fault_missing_quantizer(name, value):
    found = case(name)
    remove_quantizer(found.written, value)
    onnx.checker.check_model(found.written, full_check=True)
    node = next(node.name for node in found.graph.nodes if value in [t.name for t in node.outputs])
    assert f"node '{node}', value '{value}'" in planted(lambda: check(found))


def test_planted_fault_missing_quantizer_on_the_input():
    found = case("gemm")
    restored = next(n for n in found.written.graph.node if n.output[0] == "x_DequantizeLinear_Output")
    first = producer(found.written, restored.input[0])
    for node in found.written.graph.node:
        node.input[:] = ["x" if name == "x_DequantizeLinear_Output" else name for name in node.input]
    for node in (first, restored):
        found.written.graph.node.remove(node)
    assert "node 'x', value 'x'" in planted(lambda: check(found))


@pytest.mark.parametrize("form", ["cast", "lut"])
def test_planted_fault_in_packing(monkeypatch, form):
    """Nibbles in the wrong order."""
    plain = writers.graphs.pack

    def swapped(codes, bits):
        return bytes((byte >> 4 | byte << 4) & 255 for byte in plain(codes, bits)) if bits == 4 else plain(codes, bits)

    found = case("residual", 4)
    storage = dict.fromkeys(range(2, 9), form)
    found.written = writers.write(found.graph, found.plan, found.quantized, storage)
    check(found)
    monkeypatch.setattr(writers.graphs, "pack", swapped)
    found.written = writers.write(found.graph, found.plan, found.quantized, storage)
    assert "node 'Relu'" in planted(lambda: check(found))


def test_planted_fault_in_the_mirror():
    """A student whose weight is not what was exported."""
    found = case("residual")
    found.student = copy.deepcopy(found.student)
    with torch.no_grad():
        found.student.constant("w2")[0, 0, 0, 0] += 0.5
    assert "node 'Conv_1'" in planted(lambda: check(found))


def test_planted_fault_of_a_value_taken_to_be_moved():
    """The simulation goes on with it unrounded, and the file rounds it: each value alone looks right."""
    found = case("residual")
    plan = Plan(found.plan, found.plan.floats)
    plan["e"] = replace(plan["e"], moved=True, tied_to="c")
    found.student = build(found.graph, plan, {v: found.student.qparams_of(p) for v, p in found.plan.items()})
    found.plan, found.quantized = plan, found.student.export(plan)
    found.written = writers.write(found.graph, plan, found.quantized, TARGETS["onnxruntime"].storage)
    with pytest.raises(VerificationError, match="value 'e': the simulation takes it to be on the grid of 'c'"):
        check(found)


def test_planted_fault_in_the_exported_integers():
    """The runtime's integer kernels against integers that are not those of the file."""
    found = case("residual")
    codes = found.quantized["b2"].integers.clone()
    codes[1] += 5000
    found.quantized = {**found.quantized, "b2": found.quantized["b2"]._replace(integers=codes)}
    text = planted(lambda: check(found))
    assert "node 'Conv_1'" in text
    assert "QLinearConv" in text


FLOAT_LAYERS = {  # from x [N,4,6,6] to y: layers that stay float between quantized values, and the shape of their weight
    "Conv": ("a = Relu(x) y = Conv <pads=[1,1,1,1]> (a, kept, b)", (4, 4, 3, 3)),
    "shared input": ("a = Relu(x) c = Conv <pads=[1,1,1,1]> (a, kept, b) y = Add(a, c)", (4, 4, 3, 3)),
    "shared weight": ("a = Relu(x) c = Conv(a, kept, b) d = Conv(a, kept) y = Add(d, c)", (4, 4, 3, 3)),
    "depthwise": ("a = Relu(x) y = Conv <group=4> (a, kept, b)", (4, 1, 3, 3)),
    "one channel": ("a = ReduceMean <keepdims=1> (x, channels) y = Conv(a, kept, b)", (4, 1, 3, 3)),
    "first": ("y = Conv <pads=[1,1,1,1]> (x, kept, b)", (4, 4, 3, 3)),
    "ConvTranspose": ("a = Relu(x) y = ConvTranspose(a, kept, b)", (4, 4, 3, 3)),
    "Gemm": ("a = Relu(x) f = Flatten(a) g = Gemm(f, kept, b) y = Reshape(g, square)", (144, 4)),
    "Gemm transposed": ("a = Relu(x) f = Flatten(a) g = Gemm <transB=1> (f, kept, b) y = Reshape(g, square)", (4, 144)),
}


@pytest.mark.parametrize("name", FLOAT_LAYERS)
def test_the_runtime_leaves_float_layers_alone(name):
    """With basic optimisations as with none: it would round weights that it finds between quantized values."""
    nodes, shape = FLOAT_LAYERS[name]
    draw = weights(5)
    constants = {"kept": draw(*shape), "b": draw(4, fan=9), "point": draw(4, 4, 1, 1)}
    constants |= {"channels": np.array([1]), "square": np.array([0, 4, 1, 1])}
    text = f"(float[N,4,6,6] x) => (float[N,4,h,w] z) {{ {nodes} z = Conv(y, point) }}"
    names = set(re.findall(r"\w+", text))
    found = quantize(
        parse(text, **{k: v for k, v in constants.items() if k in names}),
        Rules(keep_float=["Gemm" if "Gemm" in name else "kept"]),
    )
    assert "kept float as asked" in found.plan.floats.values()
    assert check(found).basic_equals_off
    read = {tensor for node in found.written.graph.node for tensor in node.input} | {"z"}
    assert all(output in read for node in found.written.graph.node for output in node.output)  # nothing is left over


def test_planted_fault_in_the_weights_behind_a_float_output():
    found = quantize(MODELS["residual"](), Rules(keep_float=["logits"]))
    check(found)
    one_wrong_code(found.written, "Gemm")
    assert "logits" in planted(lambda: check(found))


def test_the_message_is_one_sentence_of_ours():
    found = case("residual")
    one_wrong_code(found.written, "Conv_1")
    text = planted(lambda: check(found))
    assert "\n" not in text
    assert text.endswith("this is a bug, please report it with the model")


def test_a_file_that_the_runtime_refuses(tmp_path):
    found = case("gemm")
    found.written.ir_version = 99
    with graphs.staging(tmp_path / "q.onnx") as staged:
        staged.write(found.written)
        with pytest.raises(VerificationError, match="Unsupported model IR version: 99") as error:
            session(staged.path)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(VerificationError, match=r"ONNX Runtime \S+ cannot load the model"):
        check(found)
    with pytest.raises(VerificationError, match="level 'all'"):
        session(found.written)


def test_a_frequent_value_beside_a_tie_is_no_fault():
    """One step off where the simulation lies within float rounding of a tie, in any number; elsewhere, or on it, in few."""
    ours, theirs = torch.full((1000,), 128), torch.full((1000,), 127)
    beside = torch.full((1000,), 127.5 + 127.5 * 2**-20)
    check_steps = partial(verify._check_steps, "v", "'node'", ours, theirs)
    assert check_steps(beside, averaged=False) == (1000, 0)
    for position in (torch.full((1000,), 127.5), torch.full((1000,), 127.6)):
        with pytest.raises(VerificationError, match="differ in 1000 of 1000"):
            check_steps(position, averaged=False)
    assert check_steps(torch.full((1000,), 127.5), averaged=True) == (1000, 0)  # of a mean, the last bit is open
    with pytest.raises(VerificationError, match="differ in 1000 of 1000"):
        check_steps(torch.full((1000,), 127.6), averaged=True)
    with pytest.raises(VerificationError, match="up to 2 steps"):
        verify._check_steps("v", "'node'", ours + 1, theirs, beside, averaged=False)


# ---- fidelity


def test_fidelity_is_signal_to_noise_and_agreement():
    found = cached("residual", 3, 8)
    fidelity = measure_fidelity(found.proto, found.written, found.batches, threads=1)
    pairs = [[run_ort(p, b, level="ENABLE_ALL")["logits"] for b in found.batches] for p in (found.proto, found.written)]
    expected, values = (np.concatenate(part).astype(np.float64) for part in pairs)
    sqnr = 10 * np.log10((expected**2).sum() / ((values - expected) ** 2).sum())
    assert fidelity.sqnr_db == {"logits": pytest.approx(sqnr, abs=0.01)}
    assert fidelity.agreement == {
        "logits": pytest.approx(100 * (expected.argmax(1) == values.argmax(1)).mean(), abs=0.01)
    }
    assert fidelity.samples == 16
    better = measure_fidelity(found.proto, cached("residual").written, found.batches, threads=1)
    assert better.sqnr_db["logits"] > fidelity.sqnr_db["logits"] + 6


def test_fidelity_of_a_model_with_itself():
    proto = MODELS["pooling"]()
    fidelity = measure_fidelity(proto, proto, feeds(proto), threads=1)
    assert set(fidelity.sqnr_db) == {"flat", "mean"}
    assert min(fidelity.sqnr_db.values()) > 200
    assert fidelity.agreement == {"flat": 100.0}  # the other one has no axis of classes
    axes = {"flat": 0, "mean": 1}
    assert measure_fidelity(proto, proto, feeds(proto), threads=1, axes=axes).agreement == {
        "flat": 100.0,
        "mean": 100.0,
    }


def test_agreement_is_along_the_axis_of_the_classes():
    found = cached("attention", 3, 8)
    name = found.proto.graph.output[0].name
    pairs = [[run_ort(p, b, level="ENABLE_ALL")[name] for b in found.batches] for p in (found.proto, found.written)]
    a, b = (np.concatenate(part) for part in pairs)
    for axis in range(1, a.ndim):
        share = 100 * (a.argmax(axis) == b.argmax(axis)).mean()
        fidelity = measure_fidelity(found.proto, found.written, found.batches, threads=1, axes={name: axis})
        assert fidelity.agreement == {name: pytest.approx(share, abs=0.01)}


def test_infinite_values_of_a_mask_are_no_noise():
    mask = np.array([[0, -np.inf, 0, 0]], np.float32)
    protos = [
        parse(
            "(float[N,3] x) => (float[N,4] y) { a = MatMul(x, w) y = Add(a, mask) }", w=weights(seed)(3, 4), mask=mask
        )
        for seed in (0, 1)
    ]
    batches = feeds(protos[0])
    pairs = [np.concatenate([run_ort(proto, batch)["y"] for batch in batches])[:, [0, 2, 3]] for proto in protos]
    sqnr = 10 * np.log10((pairs[0] ** 2).sum() / ((pairs[0] - pairs[1]) ** 2).sum())
    fidelity = measure_fidelity(*protos, batches, threads=1)
    assert fidelity.sqnr_db == {"y": pytest.approx(sqnr, abs=0.01)}
    assert fidelity.masked == {"y": 25.0}


def test_integers_agree_where_they_are_equal():
    found = cached("residual", 2, 8)
    protos = []
    for proto in (found.proto, found.written):
        chooses = onnx.ModelProto.FromString(proto.SerializeToString())
        (logits,) = chooses.graph.output
        chooses.graph.node.append(onnx.helper.make_node("ArgMax", [logits.name], ["best"], axis=1, keepdims=0))
        logits.CopyFrom(onnx.helper.make_tensor_value_info("best", onnx.TensorProto.INT64, ["N"]))
        protos.append(chooses)
    fidelity = measure_fidelity(*protos, found.batches, threads=1)
    alike = measure_fidelity(found.proto, found.written, found.batches, threads=1).agreement["logits"]
    assert (fidelity.sqnr_db, fidelity.agreement) == ({}, {"best": alike})
    assert alike < 100


def test_fidelity_has_no_agreement_where_there_is_nothing_to_choose():
    proto = parse("(float[N,3] x) => (float[N,1] y) { y = Gemm(x, w) }", w=weights(0)(3, 1))
    found = quantize(proto, Rules(8, 8))
    assert measure_fidelity(proto, found.written, found.batches, threads=1).agreement == {}
