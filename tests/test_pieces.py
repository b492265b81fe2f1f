"""Parts of a mirror: where the cuts lie, and that the parts together are the whole."""

import itertools
import re

import numpy as np
import pytest
import torch

import models
from models import MODELS, parse, prepared, weights
from onnx_eptq import pieces
from onnx_eptq.mirror import Probe, build
from onnx_eptq.plan import Rules, linear_layers, role_of


def values_of(mirror, samples):
    """Every value as its readers see it, by an interpreter."""
    kept = {}
    Probe(mirror, lambda name, x: kept.setdefault(name, x)).run(*samples)
    return kept


def cut(name, scope, samples=None):
    found = models.cached(name, 4, 8)
    samples = samples or models.samples_of(found, 6)
    allowed = pieces.allowed_cuts(found.graph, found.teacher, samples)
    return found, samples, pieces.pieces(found.graph, found.layers, scope, allowed)


@pytest.mark.parametrize("scope", pieces.SCOPES)
@pytest.mark.parametrize("name", MODELS)
def test_pieces_hold_every_layer_once_and_in_order(name, scope):
    found, _, parts = cut(name, scope)
    assert [layer.node.name for part in parts for layer in part.layers] == [layer.node.name for layer in found.layers]
    made = [tensor.name for tensor in found.graph.inputs]
    for part in parts:
        assert set(part.inputs) <= set(made)
        assert not set(part.outputs) & set(made)
        made += part.outputs
    assert {tensor.name for tensor in found.graph.outputs} <= set(made)
    if scope == "network":
        assert len(parts) == 1


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("scope", pieces.SCOPES)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pieces_advance_to_the_values_of_the_whole(name, scope, quantized):
    found, samples, parts = cut(name, scope)
    mirror = found.student if quantized else found.teacher
    expected = values_of(mirror, samples)
    kept = dict(zip([tensor.name for tensor in found.graph.inputs], samples, strict=True))
    finals = pieces.final_nodes(mirror)
    for index, part in enumerate(parts):
        run = pieces.function(
            mirror, pieces.input_nodes(mirror, part.inputs, index == 0), [finals[value] for value in part.outputs]
        )
        kept = pieces.advance(run, part, kept, batch=4)
        for value in part.outputs:
            torch.testing.assert_close(kept[value], expected[value], rtol=0, atol=1e-5)
    for output, tensor in zip(mirror(*samples), found.graph.outputs, strict=True):
        torch.testing.assert_close(kept[tensor.name], output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_function_reads_the_mirror_as_it_is(name):
    found = models.case(name, 4, 8)
    samples, mirror = models.samples_of(found, 6), found.teacher
    finals = pieces.final_nodes(mirror)
    value = found.layers[-1].output.name
    run = pieces.function(mirror, pieces.placeholders(mirror), [finals[value]])
    before = run(*samples)[0].clone()
    assert torch.equal(before, values_of(mirror, samples)[value])
    weight = mirror.constant(found.layers[-1].weight.name)
    kept = weight.clone()
    try:
        weight.mul_(1.5)
        assert torch.equal(run(*samples)[0], values_of(mirror, samples)[value])
        assert not torch.equal(run(*samples)[0], before)
    finally:
        weight.copy_(kept)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_raw_values_become_final_ones_by_their_quantizers(name):
    found = models.case(name, 4, 8)
    samples, student = models.samples_of(found, 6), found.student
    raw, finals = pieces.raw_nodes(student), pieces.final_nodes(student)
    names = [value for value, point in found.plan.items() if point.role == "activation" and not point.moved]
    places = pieces.placeholders(student)
    both = pieces.function(student, places, [*(raw[value] for value in names), *(finals[value] for value in names)])
    values = both(*samples)
    for value, before, after in zip(names, values[: len(names)], values[len(names) :], strict=True):
        quantizer = student.quantizer(found.plan[value].tied_to or value)
        assert torch.equal(quantizer(before), after)
        assert not torch.equal(before, after)


def brute_crossing(graph):
    """Per cut, the names of activations made before it and read at or behind it."""
    nodes = list(graph.nodes)
    found = []
    for k in range(len(nodes) + 1):
        before = {tensor.name for tensor in graph.inputs} | {t.name for node in nodes[:k] for t in node.outputs}
        read = {t.name for node in nodes[k:] for t in node.inputs}
        found.append(before & read)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_crossing_values(name):
    graph = models.cached(name).graph
    assert [set(names) for names in pieces.crossing(graph)] == brute_crossing(graph)


def chain(blocks=3):
    """A stem and residual blocks of two convolutions each, a classifier."""
    w, lines, x = weights(0), ["h0 = Conv <pads=[1,1,1,1]> (image, w0)", "r0 = Relu(h0)"], "r0"
    constants = {"w0": w(4, 3, 3, 3)}
    for i in range(1, blocks + 1):
        lines += [f"a{i} = Conv <pads=[1,1,1,1]> ({x}, u{i})", f"b{i} = Relu(a{i})"]
        lines += [f"c{i} = Conv <pads=[1,1,1,1]> (b{i}, v{i})", f"d{i} = Add(c{i}, {x})", f"r{i} = Relu(d{i})"]
        constants |= {f"u{i}": w(4, 4, 3, 3), f"v{i}": w(4, 4, 3, 3)}
        x = f"r{i}"
    lines += [f"g = GlobalAveragePool({x})", "f = Flatten(g)", "y = Gemm(f, wy)"]
    body = "\n".join(lines)
    return parse(f"(float[N,3,6,6] image) => (float[N,5] y) {{{body}}}", **constants, wy=w(4, 5))


def test_blocks_of_a_residual_network_end_where_one_value_goes_on():
    found = models.quantize(chain())
    samples = [torch.randn(4, 3, 6, 6)]
    allowed = pieces.allowed_cuts(found.graph, found.teacher, samples)
    parts = pieces.pieces(found.graph, found.layers, "block", allowed)
    assert [part.outputs for part in parts] == [("r1",), ("r2",), ("r3",), ("y",)]
    assert [len(part.layers) for part in parts] == [3, 2, 2, 1]
    layers = pieces.pieces(found.graph, found.layers, "layer", allowed)
    assert [len(part.layers) for part in layers] == [1] * 8
    assert set(layers[2].inputs) == {"r0", "b1"}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_do_not_split_a_layer_from_what_is_fused_on_it(name):
    found, _, parts = cut(name, "block")
    producers = {tensor.name: node for node in found.graph.nodes for tensor in node.outputs}
    for part in parts[:-1]:
        for value in part.outputs:
            readers = found.graph.tensors()[value].outputs
            fused = [reader for reader in readers if role_of(reader) == "clamp"]
            assert not (role_of(producers[value]) == "linear" and fused)


def test_a_long_stretch_without_single_cuts_is_cut_anyway():
    w, count = weights(1), 30
    lines = ["s = MatMul(x, w0)"]
    for i in range(count):
        lines += [f"a{i} = MatMul({'s' if i == 0 else f'd{i - 1}'}, v{i})", f"d{i} = Add(a{i}, s)"]
    constants = {f"v{i}": w(4, 4) * 0.3 for i in range(count)}
    graph = prepared(
        parse(f"(float[N,4] x) => (float[N,4] d{count - 1}) {{{chr(10).join(lines)}}}", w0=w(4, 4), **constants)
    )
    layers = linear_layers(graph)
    parts = pieces.pieces(graph, layers, "block", set(range(len(graph.nodes))))
    assert len(parts) >= 3
    assert max(len(part.layers) for part in parts) <= pieces.MAX_LAYERS + 1


def test_values_without_a_sample_axis_are_not_cut():
    """Tokens are folded into axis 0 between the layers: such values cannot be kept and fed again in other batches."""
    w = weights(2)
    found = models.quantize(
        parse(
            """(float[N,3,4] x) => (float[N,3,5] y) {
              f = Reshape(x, flat) a = MatMul(f, w1) r = Relu(a) b = MatMul(r, w2)
              u = Reshape(b, back) c = MatMul(u, w3) s = Relu(c) y = MatMul(s, w4) }""",
            flat=models.i64(-1, 4),
            back=models.i64(-1, 3, 4),
            w1=w(4, 4),
            w2=w(4, 4),
            w3=w(4, 4),
            w4=w(4, 5),
        )
    )
    allowed = pieces.allowed_cuts(found.graph, found.teacher, [torch.randn(4, 3, 4)])
    inner = {value for k in allowed for value in pieces.crossing(found.graph)[k]}
    assert inner
    shapes = values_of(found.teacher, [torch.randn(5, 3, 4)])
    assert all(len(shapes[value]) == 5 for value in inner)
    assert [len(p.layers) for p in pieces.pieces(found.graph, found.layers, "layer", allowed)] == [2, 1, 1]


def test_needed_nodes_stop_at_the_inputs():
    found = models.cached("residual")
    raw = pieces.raw_nodes(found.teacher)
    needed = pieces.needed_nodes([raw["b"]], [raw["d"]])
    assert raw["c"] in needed
    assert raw["d"] in needed
    assert not {raw["a"], raw["b"], *pieces.placeholders(found.teacher)} & needed
    assert not pieces.needed_nodes([raw["b"]], [raw["b"]])


def test_names_are_those_of_the_graph_in_order():
    found, _, parts = cut("residual", "layer")
    order = {node.name: i for i, node in enumerate(found.graph.nodes)}
    for one, two in itertools.pairwise(parts):
        assert max(order[layer.node.name] for layer in one.layers) < min(order[x.node.name] for x in two.layers)


def whole_functions(mirror):
    inputs, outputs = pieces.placeholders(mirror), list(pieces.raw_nodes(mirror).values())
    return (pieces.function(mirror, inputs, outputs, mapped=mapped) for mapped in (True, False))


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("one", [models.collapsed, models.one_image])
def test_a_mapped_function_does_of_each_sample_what_the_mirror_does(one, bits):
    found = models.quantize(one(), Rules(bits, 8))
    samples = models.samples_of(found, 5)
    for mirror in (found.teacher, found.student):
        assert pieces.can_map(mirror, samples)
        together, alone = whole_functions(mirror)
        each = [alone(*[x[i : i + 1] for x in samples]) for i in range(5)]
        for a, b in zip(together(*samples), zip(*each, strict=True), strict=True):
            assert a.shape[1:] == b[0].shape[1:]
            torch.testing.assert_close(a, torch.cat(b))


UNMAPPED = {
    "an island": "h = MatMul(x, w) m = Reshape(h, seq) s, l = GRU <hidden_size=4> (m, v, u) f = Reshape(l, flat) y = Add(h, f)",
    "values that decide a size": "h = MatMul(x, w) n = NonZero(h) c = Cast <to=1> (n) y = ReduceSum <keepdims=0> (c, axes)",
}


@pytest.mark.parametrize("name", UNMAPPED)
def test_what_cannot_be_mapped(name):
    draw = weights(0)
    constants = {"w": draw(6, 4), "v": draw(1, 12, 1), "u": draw(1, 12, 4), "axes": np.array([0])}
    constants |= {"seq": np.array([4, 1, 1]), "flat": np.array([1, 4])}
    used = {key: value for key, value in constants.items() if re.search(rf"\b{key}\b", UNMAPPED[name])}
    mirror = build(prepared(parse(f"(float[1,6] x) => (float[A,B] y) {{ {UNMAPPED[name]} }}", **used)))
    assert not pieces.can_map(mirror, [torch.randn(4, 6)])
