"""Channels evened out: the float network computes the same bits, places are those it may be done at, errors fall."""

import numpy as np
import onnx
import pytest
import torch

import onnx_eptq
from models import MODELS, ORT_TARGET, feeds, i64, parse, prepared, run_ort, scalar, weights
from onnx_eptq import equalize as equalize_module
from onnx_eptq import graph as og
from onnx_eptq import mirror
from onnx_eptq.calibrate import apply_linear
from onnx_eptq.equalize import EXPONENTS, REACH, candidates, equalize, find_places, scaled_weight
from onnx_eptq.ops import OPS, op_of
from onnx_eptq.plan import linear_layers, make_plan

W = weights(8)
SPREAD = (2.0 ** np.linspace(-4, 4, 6)).astype(np.float32)  # channels of very different size


def spread(*shape, axis=0):
    """A weight whose output channels along `axis` differ in size."""
    sizes = SPREAD[: shape[axis]]
    return W(*shape) * sizes.reshape([-1 if i == axis else 1 for i in range(len(shape))])


B = W(6) * SPREAD
PLACES = {
    "conv": parse(
        "(float[N,4,8,8] x) => (float[N,5,8,8] y) { a = Conv (x, w, b) c = Relu (a) y = Conv (c, v) }",
        w=spread(6, 4, 1, 1),
        b=B,
        v=W(5, 6, 1, 1),
    ),
    "depthwise": parse(
        "(float[N,4,8,8] x) => (float[N,6,8,8] y) { c = Conv (x, w, b) y = Conv <group=6, pads=[1,1,1,1]> (c, v) }",
        w=spread(6, 4, 1, 1),
        b=B,
        v=W(6, 1, 3, 3),
    ),
    "grouped": parse(
        "(float[N,4,8,8] x) => (float[N,4,6,6] y) { c = Conv (x, w) y = Conv <group=2> (c, v) }",
        w=spread(6, 4, 1, 1),
        v=W(4, 3, 3, 3),
    ),
    "leaky and pooled": parse(
        "(float[N,4,8,8] x) => (float[N,5] y) { a = Conv (x, w, b) c = LeakyRelu (a) d = MaxPool <kernel_shape=[2,2], "
        "strides=[2,2]> (c) e = GlobalAveragePool (d) f = Flatten (e) y = Gemm (f, v) }",
        w=spread(6, 4, 1, 1),
        b=B,
        v=W(6, 5),
    ),
    "transposed convolutions": parse(
        "(float[N,4,5,5] x) => (float[N,5,11,11] y) { c = ConvTranspose <strides=[2,2]> (x, w, b) y = ConvTranspose (c, v) }",
        w=spread(4, 6, 3, 3, axis=1),
        b=B,
        v=W(6, 5, 1, 1),
    ),
    "matrices": parse(
        "(float[N,9,4] x) => (float[N,9,5] y) { a = MatMul (x, w) c = Add (a, b) y = MatMul (c, v) }",
        w=spread(4, 6, axis=1),
        b=B,
        v=W(6, 5),
    ),
    "moved": parse(
        "(float[N,4,8,8] x) => (float[N,64,5] y) { a = Conv (x, w, b) c = Transpose <perm=[0,2,3,1]> (a) "
        "d = Reshape (c, shape) y = MatMul (d, v) }",
        w=spread(6, 4, 1, 1),
        b=B,
        v=W(6, 5),
        shape=i64(0, 64, 6),
    ),
    "layer normalization": parse(
        "(float[N,9,6] x) => (float[N,9,5] y, float[N,9,3] z) { c = LayerNormalization (x, w, b) "
        "y = MatMul (c, v) z = MatMul (c, u) }",
        w=SPREAD,
        b=B,
        v=W(6, 5),
        u=W(6, 3),
    ),
    "joined": parse(
        "(float[N,4,8,8] x) => (float[N,5,8,8] y) { a = Conv (x, w, b) c = Conv (x, u) d = Relu (c) "
        "e = Concat <axis=1> (a, d) y = Conv (e, v) }",
        w=spread(4, 4, 1, 1),
        b=B[:4],
        u=W(2, 4, 1, 1),
        v=W(5, 6, 1, 1),
    ),
    "joined twice": parse(
        "(float[N,4,8,8] x) => (float[N,5,8,8] y) { a = Conv (x, w) c = Conv (x, u) d = Conv (x, t) "
        "e = Concat <axis=-3> (c, d) f = MaxPool <kernel_shape=[1,1]> (e) g = Concat <axis=1> (a, f) y = Conv (g, v) }",
        w=W(2, 4, 1, 1),
        u=spread(1, 4, 1, 1),
        t=spread(3, 4, 1, 1),
        v=W(5, 6, 1, 1),
    ),
    "joined along another axis": parse(
        "(float[N,4,8,8] x) => (float[N,5,16,8] y) { a = Conv (x, w) c = Conv (x, u) e = Concat <axis=2> (a, c) "
        "y = Conv (e, v) }",
        w=spread(6, 4, 1, 1),
        u=spread(6, 4, 1, 1),
        v=W(5, 6, 1, 1),
    ),
    "slope per channel": parse(
        "(float[N,4,8,8] x) => (float[N,5,8,8] y) { a = Conv (x, w) c = PRelu (a, slope) y = Conv (c, v) }",
        w=spread(6, 4, 1, 1),
        slope=np.abs(W(6, 1, 1)),
        v=W(5, 6, 1, 1),
    ),
}
CONV = "(float[N,4,8,8] x) => (float[N,5,8,8] y{more}) {{ {text} }}"
NO_PLACES = {
    "squashed": ("a = Conv (x, w) c = Sigmoid (a) y = Conv (c, v)", ""),
    "clipped": ("a = Conv (x, w) c = Clip (a, low, high) y = Conv (c, v)", ""),
    "an output": ("c = Conv (x, w) y = Conv (c, v)", ", float[N,6,8,8] c"),
    "added": ("c = Conv (x, w) d = Add (c, c) y = Conv (d, v)", ""),
    "also read by another": ("c = Conv (x, w) f = Sigmoid (c) y = Conv (c, v)", ", float[N,6,8,8] f"),
    "weights in two places": ("a = Conv (x, w) c = Relu (a) d = Conv (x, w) y = Conv (c, v)", ", float[N,6,8,8] d"),
    "joined with the input": ("c = Conv (x, p2) d = Concat <axis=1> (c, x) y = Conv (d, v)", ""),
    "joined with itself": ("c = Conv (x, p3) d = Concat <axis=1> (c, c) y = Conv (d, v)", ""),
    "one part read by another": (
        "a = Conv (x, p2) c = Conv (x, p4) f = Sigmoid (a) d = Concat <axis=1> (a, c) y = Conv (d, v)",
        ", float[N,2,8,8] f",
    ),
    "the input": ("y = Conv (x, v4)", ""),
    "pooled along its axis": (
        "a = Conv (x, w) p = AveragePool <kernel_shape=[1,3], pads=[0,1,0,1]> (a) y = MatMul (p, m)",
        "",
    ),
    "pooled to another length": (
        "a = MatMul (x, n) p = MaxPool <kernel_shape=[1,2], strides=[1,2]> (a) y = MatMul (p, m4)",
        "",
    ),
}


CARRYING = {  # operators that `Op.carries` has something to say of, with more inputs and attributes
    "AveragePool": ({}, {"kernel_shape": [1, 3], "pads": [0, 1, 0, 1]}),
    "MaxPool": ({}, {"kernel_shape": [3, 1], "strides": [2, 1]}),
    "GlobalAveragePool": ({}, {}),
    "GlobalMaxPool": ({}, {}),
    "Relu": ({}, {}),
    "LeakyRelu": ({}, {}),
    "PRelu": ({"slope": W(6, 1, 1)}, {}),
    "Identity": ({}, {}),
    "Reshape": ({"to": i64(0, 6, -1)}, {}),
    "Flatten": ({}, {"axis": 2}),
    "Transpose": ({}, {"perm": [0, 3, 1, 2]}),
    "Squeeze": ({"to": i64(0)}, {}),
    "Unsqueeze": ({"to": i64(1)}, {}),
}


NOT_CARRIED = {  # along windows, and where axes are merged
    **dict.fromkeys(["AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "Reshape"], (2, 3)),
    "Flatten": (0, 2, 3),
    "Squeeze": (0,),
}


def test_every_carrying_operator_is_tried():
    assert {name for name, op in OPS.items() if op.carries is not None} == set(CARRYING)


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("name", CARRYING)
def test_channels_are_carried_where_it_is_said(name, axis):
    """What is scaled by a power of two along one axis comes out so along the other, bit for bit."""
    constants, attributes = CARRYING[name]
    node = onnx.helper.make_node(name, ["x", *constants], ["y"], **attributes)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [value("x", 1, [1, 6, 4, 5])], [value("y", 1, None)],
        [onnx.numpy_helper.from_array(array, key) for key, array in constants.items()],
    )  # fmt: skip
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    x = W(1, 6, 4, 5)
    before = run_ort(proto, {"x": x})["y"]
    (node,) = og.load(proto).nodes
    after = op_of(node).carries(node.attrs, axis, x.shape, before.shape)
    assert (after is None) == (axis in NOT_CARRIED.get(name, ()))
    if after is not None:
        factors = 2.0 ** np.arange(x.shape[axis], dtype=np.float32)
        along = [[-1 if i == place else 1 for i in range(rank)] for place, rank in ((axis, 4), (after, before.ndim))]
        scaled = run_ort(proto, {"x": x * factors.reshape(along[0])})["y"]
        np.testing.assert_array_equal(scaled, before * factors.reshape(along[1]))


def ready(proto):
    graph = prepared(proto)
    plan = make_plan(graph, ORT_TARGET)
    return graph, plan, linear_layers(graph)


def equalized(proto, graph, plan, layers):
    return equalize(graph, mirror.build(graph), plan, layers, feeds(proto))


@pytest.mark.parametrize("name", PLACES)
def test_the_float_network_keeps_its_bits(name):
    proto = PLACES[name]
    graph, plan, layers = ready(proto)
    before = og.to_model(og.copy(graph))
    (found,) = equalized(proto, graph, plan, layers)
    assert found.spread >= 4
    assert found.error < 0.9
    after = og.to_model(graph)
    assert after != before
    for feed in feeds(proto):
        for name, values in run_ort(before, feed).items():
            np.testing.assert_array_equal(values, run_ort(after, feed)[name])


@pytest.mark.parametrize("name", NO_PLACES)
def test_where_channels_cannot_be_scaled(name):
    text, more = NO_PLACES[name]
    constants = {"w": spread(6, 4, 1, 1), "v": W(5, 6, 1, 1), "v4": W(5, 4, 1, 1), "low": scalar(0), "high": scalar(6)}
    constants |= {"m": W(8, 8), "n": W(8, 8) * 2.0 ** np.arange(8, dtype=np.float32), "m4": W(4, 8)}
    constants |= {f"p{n}": spread(n, 4, 1, 1) for n in (2, 3, 4)}
    used = {key: value for key, value in constants.items() if f" {key}" in text}
    proto = parse(CONV.format(text=text, more=more), **used)
    graph, plan, layers = ready(proto)
    assert find_places(graph, layers, plan) == []
    assert equalized(proto, graph, plan, layers) == []


def test_float_values_and_weights_are_left_alone():
    proto = PLACES["conv"]
    graph, plan, layers = ready(proto)
    (place,) = find_places(graph, layers, plan)
    for name in (place.value, layers[1].weight.name):
        fewer = plan.copy()
        del fewer[name]
        assert find_places(graph, layers, type(plan)(fewer)) == []


@pytest.mark.parametrize("name", ["conv", "grouped", "transposed convolutions", "matrices"])
def test_a_scaled_weight_reads_scaled_inputs(name):
    """W * s on x / s is W on x, for the operator itself."""
    proto = PLACES[name]
    graph, plan, layers = ready(proto)
    (place,) = find_places(graph, layers, plan)
    (layer,) = place.readers
    x = torch.randn(2, *[5 if i + 1 != place.axis else 6 for i in range(len(layer.source.shape) - 1)])
    s = 2.0 ** torch.arange(-2.0, 4.0)
    weight = torch.from_numpy(np.array(layer.weight.values))
    shape = [-1 if i == place.axis else 1 for i in range(x.ndim)]
    torch.testing.assert_close(
        apply_linear(layer, x / s.reshape(shape), scaled_weight(layer, weight, s)), apply_linear(layer, x, weight)
    )


def test_candidates_are_powers_of_two_and_begin_with_ones():
    graph, plan, layers = ready(PLACES["conv"])
    (place,) = find_places(graph, layers, plan)
    weight = torch.from_numpy(np.array(place.readers[0].weight.values))
    seen = torch.tensor([0.01, 1.0, 2.0, 8.0, 64.0, 0.0])
    found = candidates(place, seen, [weight])
    assert torch.equal(found[0], torch.ones(6))
    assert len(found) <= 1 + len(EXPONENTS)
    for factors in found:
        assert torch.equal(factors.log2(), factors.log2().round())
        assert factors.log2().abs().max() <= REACH
        assert factors[5] == 1  # a dead channel stays as it is
    assert any(factors[3] >= 4 * factors[1] for factors in found)


def test_even_channels_stay():
    proto = parse(
        "(float[N,4,8,8] x) => (float[N,5,8,8] y) { c = Conv (x, w) y = Conv (c, v) }",
        w=np.ones((6, 4, 1, 1), np.float32),
        v=W(5, 6, 1, 1),
    )
    assert equalized(proto, *ready(proto)) == []


@pytest.mark.parametrize(
    ("text", "constants"),
    [
        ("a = Conv (x, w, b) c = Relu (a) y = Conv (c, v)", {"b": np.full(6, -1e6, np.float32)}),
        ("a = Conv (x, w) c = Relu (a) y = Conv (c, v)", {"v": np.zeros((5, 6, 1, 1), np.float32)}),
    ],
    ids=["dead", "weights of zero"],
)
def test_where_nothing_is_wrong_nothing_is_done(text, constants):
    """Without an error there is none to compare with."""
    constants = {"w": spread(6, 4, 1, 1), "v": W(5, 6, 1, 1), **constants}
    proto = parse(CONV.format(text=text, more=""), **constants)
    data = np.concatenate([feed["x"] for feed in feeds(proto, batch=32)])
    assert onnx_eptq.quantize(proto, data, method="rtn", threads=1).report.equalized == []


@pytest.mark.parametrize("calibration", ["hmse", "mse"])
def test_layers_that_make_vectors(calibration):
    proto = parse(
        "(float[6] x) => (float[4] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }", w=W(6, 8), v=W(8, 4)
    )
    data = [{"x": x} for x in np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)]
    found = onnx_eptq.quantize(proto, data, method="rtn", calibration=calibration, threads=1)
    assert found.report.fidelity.sqnr_db["y"] > 25


def test_samples_of_several_sizes():
    draw = np.random.default_rng(0).standard_normal
    proto = parse(
        "(float[N,4,H,8] x) => (float[N,5,H,8] y) { a = Conv (x, w) c = Relu (a) y = Conv (c, v) }",
        w=spread(6, 4, 1, 1),
        v=W(5, 6, 1, 1),
    )
    data = [{"x": draw((1, 4, height, 8)).astype(np.float32)} for height in (8, 10) * 16]
    report = onnx_eptq.quantize(proto, data, method="rtn", calibration="mse", threads=1).report
    assert len(report.equalized) == 1


def test_channels_that_count_nothing_do_not_decide():
    """Both errors must fall: that of the outputs as they are, and as their channels count."""
    proto = PLACES["depthwise"]
    graph, plan, layers = ready(proto)
    small, large = torch.ones(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    large[:5], small[1:] = 1e-6, 1e-6
    name = layers[1].output.name
    assert equalize(graph, mirror.build(graph), plan, layers, feeds(proto), {name: large}) == []
    (found,) = equalize(graph, mirror.build(graph), plan, layers, feeds(proto), {name: small})
    assert found.error < 0.9


def test_factors_far_apart_must_be_worth_it():
    graph, plan, layers = ready(PLACES["conv"])
    (place,) = find_places(graph, layers, plan)
    seen = torch.tensor([0.01, 1.0, 2.0, 8.0, 64.0, 0.5])
    trial = equalize_module._Trial(place, plan, mirror.build(graph), (-seen, seen), {})
    spreads = [float(factors.log2().abs().sum()) for factors in trial.factors]
    mild, wild = sorted(range(1, len(spreads)), key=spreads.__getitem__)[:: len(spreads) - 2]
    for share, expected in ((0.3, wild), (0.4, mild)):
        trial.errors[:] = 1.0
        trial.errors[:, mild], trial.errors[:, wild] = 0.5, share
        assert torch.equal(trial.best()[0], trial.factors[expected])


def test_hopeless_factors_are_tried_on_one_batch_only():
    proto = PLACES["conv"]
    graph, plan, layers = ready(proto)
    (place,) = find_places(graph, layers, plan)
    seen = torch.tensor([0.01, 1.0, 2.0, 8.0, 64.0, 0.5])
    trial = equalize_module._Trial(place, plan, mirror.build(graph), (-seen, seen), {})
    x = seen.reshape(1, 6, 1, 1) * torch.from_numpy(
        np.random.default_rng(0).standard_normal((4, 6, 8, 8)).astype(np.float32)
    )
    trial.errors[:, 2] = 1e6  # as if it had been far worse than without factors before
    trial.see(x)
    assert trial.open[0] == 0
    assert 2 not in trial.open
    assert torch.isinf(trial.errors[:, 2]).all()
    best = trial._shares().min()
    assert all(trial._shares()[i] <= 2 * best for i in trial.open[1:])
    open_now, before = list(trial.open), trial.errors.clone()
    trial.see(x)
    assert set(trial.open) <= set(open_now)
    assert (trial.errors[0, 0] > before[0, 0]).all()  # what others are measured by goes on


def test_large_batches_are_looked_at_in_parts(monkeypatch):
    """The errors are the same, but for what became hopeless on the way."""
    graph, plan, layers = ready(PLACES["conv"])
    (place,) = find_places(graph, layers, plan)
    seen = torch.tensor([0.01, 1.0, 2.0, 8.0, 64.0, 0.5])
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 6, 8, 8)).astype(np.float32))
    trials, tried = {}, {}
    for most in (1e9, 1):
        monkeypatch.setattr(equalize_module, "MOST_WORK", most)
        trial = trials[most] = equalize_module._Trial(place, plan, mirror.build(graph), (-seen, seen), {})
        trial.errors[:, 2] = 1e6  # as if it had been far worse before
        parts = []
        monkeypatch.setattr(trial, "_add", lambda x, add=trial._add, parts=parts: (parts.append(len(x)), add(x)))
        trial.see(seen.reshape(1, 6, 1, 1) * noise)
        tried[most] = parts
    whole, parted = trials.values()
    assert tried == {1e9: [4], 1: [1, 1, 1, 1]}
    assert parted.open == whole.open
    assert 2 not in whole.open
    torch.testing.assert_close(parted._shares()[whole.open], whole._shares()[whole.open], rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["depthwise", "layer normalization"])
def test_the_written_file_gains(name):
    proto = PLACES[name]
    data = {key: np.concatenate([feed[key] for feed in feeds(proto, batch=32)]) for key in feeds(proto)[0]}
    found = {
        switch: onnx_eptq.quantize(proto, data, method="rtn", equalize=switch, threads=1).report
        for switch in (False, True)
    }
    assert not found[False].equalized
    assert "equalized  channels of 1 values" in str(found[True])
    for output, decibel in found[True].fidelity.sqnr_db.items():
        assert decibel > found[False].fidelity.sqnr_db[output] + 2


@pytest.mark.parametrize("name", MODELS)
def test_every_model_keeps_its_numbers(name):
    proto = MODELS[name]()
    graph, plan, layers = ready(proto)
    before = og.to_model(og.copy(graph))
    equalized(proto, graph, plan, layers)
    for feed in feeds(proto):
        for output, values in run_ort(before, feed).items():
            np.testing.assert_allclose(run_ort(og.to_model(graph), feed)[output], values, rtol=1e-5, atol=1e-6)
