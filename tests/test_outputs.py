"""What the network's outputs are: targets behind which nothing squashes, and where their classes lie."""

import numpy as np
import pytest

from models import f32, i64, parse, prepared, weights
from onnx_eptq.outputs import class_axes, distributed, learning_targets, selections

W = weights(3)

ENDS = {  # what stands behind `h = MatMul(x, w)`: the targets
    "y = Relu(h)": ["y"],
    "y = Softmax(h)": ["h"],
    "y = LogSoftmax(h)": ["h"],
    "y = Sigmoid(h)": ["h"],
    "t = Tanh(h) y = Softmax(t)": ["t"],
    "s = Softmax(h) i = ArgMax <axis=1, keepdims=0> (s) y = Cast <to=1> (i)": ["h"],
    "s = Sigmoid(h) y = Mul(h, s)": ["h"],
    "s = Sigmoid(h) m = Mul(h, s) y = MatMul(m, v)": ["y"],
    "s = Softmax(h) r = Reshape(s, flat) y = Identity(r)": ["h"],
    "y = Add(h, mask)": ["h"],
    "y = Where(keep, h, low)": ["h"],
    "m = Add(h, mask) y = Softmax(m)": ["h"],
    "m = Add(h, mask) y = MatMul(m, v)": ["y"],
    "a = MatMul(h, v) b = MatMul(h, v) s = Softmax(a) t = Sigmoid(b) y = Concat <axis=1> (s, t)": ["a", "b"],
}


@pytest.mark.parametrize("end", ENDS)
def test_squashing_ends_are_cut_off(end):
    text = f"(float[N,4] x) => (float[N,k] y) {{ h = MatMul(x, w) {end} }}"
    masks = {"mask": f32(0, -1e9, 0, 0), "low": f32(-np.inf), "keep": np.array([True, False, True, True])}
    graph = prepared(parse(text, w=W(4, 4), v=W(4, 4), flat=i64(-1, 4), **masks))
    assert sorted(learning_targets(graph)) == ENDS[end]


CLASSES = {  # what stands behind `h`, a Conv of [N,5,8,8]: the output's rank and its axis of classes
    "y = Relu(h)": (4, 1),
    "y = Transpose <perm=[0,2,3,1]> (h)": (4, 3),
    "t = Transpose <perm=[0,2,3,1]> (h) y = Softmax(t)": (4, 3),
    "y = Softmax <axis=2> (h)": (4, 2),  # whatever made it
    'y = Resize <mode="linear"> (h, , twice)': (4, 1),
    "s = Sigmoid(h) y = Mul(s, h)": (4, 1),
    "y = Concat <axis=2> (h, h)": (4, 1),
    "r = Reshape(h, cells) y = Transpose <perm=[0,2,1]> (r)": (3, 2),
    "y = Reshape(h, mixed)": (3, None),
    "r = Reshape(h, flat) y = MatMul(r, v)": (2, 1),
    "r = Reshape(h, mixed) y = MatMul(r, u)": (3, 2),
    "r = Reshape(h, mixed) a = MatMul(r, u) b = Reshape(a, rows) y = LogSoftmax(b)": (2, 1),
    "y = Reshape(h, flat)": (2, None),
    "r = Reshape(h, mixed) y = MatMul(rows_of, r)": (3, 1),
    "r = Reshape(h, flat) y = MatMul(r, single)": (1, None),
}


@pytest.mark.parametrize("end", CLASSES)
def test_where_the_classes_lie(end):
    rank, axis = CLASSES[end]
    dims = ",".join("abcd"[:rank])
    shapes = {"cells": i64(0, 5, -1), "mixed": i64(0, 8, -1), "flat": i64(0, 320), "rows": i64(-1, 6)}
    shapes |= {} if "rows_of" not in end else {"rows_of": W(6, 8)}
    shapes |= {} if "single" not in end else {"single": W(320)}
    values = {"w": W(5, 3, 1, 1), "v": W(320, 4), "u": W(40, 6), "twice": np.array([1, 1, 2, 2], np.float32)}
    proto = parse(f"(float[N,3,8,8] x) => (float[{dims}] y) {{ h = Conv(x, w) {end} }}", **values, **shapes)
    assert class_axes(prepared(proto)) == ({} if axis is None else {"y": axis})


PICTURES = {  # inputs and what is computed of them, whose axis 1 or 3 holds 3 numbers: whether those are colours
    "(float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Conv(x, w) }": True,
    "(float[N,3,A,B] x) => (float[N,3,A,B] y) { h = Conv(x, w) y = Sigmoid(h) }": True,
    "(float[N,3,8,8] x) => (float[N,3,16,16] y) { a = Concat <axis=1> (x, x, x, x) h = Conv(a, v) "
    "y = DepthToSpace <blocksize=2> (h) }": True,
    "(float[N,8,8,3] x) => (float[N,8,8,3] y) { a = Transpose <perm=[0,3,1,2]> (x) h = Conv(a, w) "
    "y = Transpose <perm=[0,2,3,1]> (h) }": True,
    "(float[N,3,8,8] x) => (float[N,3,8,8] y) { h = Conv(x, w) y = Softmax <axis=1> (h) }": False,
    "(float[N,3,8,8] x) => (float[N,3,8,8] y) { h = Conv(x, w) s = Softmax <axis=1> (h) y = Sqrt(s) }": False,
    "(float[N,3,8,8] x) => (float[N,3,4,4] y) { y = Conv <strides=[2,2]> (x, w) }": False,
    "(float[N,3,A,B] x) => (float[N,3,1,1] y) { h = Conv(x, w) y = GlobalAveragePool(h) }": False,
    "(float[N,12,8,8] x) => (float[N,3,16,16] y) { h = Conv(x, v) y = DepthToSpace <blocksize=2> (h) }": False,
}


@pytest.mark.parametrize("text", PICTURES)
def test_colours_are_no_classes(text):
    constants = {"w": W(3, 3, 1, 1), "v": W(12, 12, 1, 1)}
    graph = prepared(parse(text, **{name: array for name, array in constants.items() if f", {name})" in text}))
    axis = class_axes(graph)["y"]
    assert axis == 4 if PICTURES[text] else axis in (1, 3)


@pytest.mark.parametrize("reader", ["p = Softmax <axis=1> (y)", "p = ArgMax <axis=1> (y)"])
def test_three_channels_that_a_softmax_reads_are_classes(reader):
    kind = "int64" if "ArgMax" in reader else "float"
    proto = parse(
        f"(float[N,3,8,8] x) => (float[N,3,8,8] y, {kind}[N,a,8,8] p) {{ y = Conv(x, w) {reader} }}", w=W(3, 3, 1, 1)
    )
    assert class_axes(prepared(proto))["y"] == 1


SELECTIONS = {  # what is picked: by values of the network, or by what it is given besides
    "v, i = TopK(h, k) y = Identity(v)": ["h"],
    "v, i = TopK(x, k) y = GatherElements <axis=1> (h, i)": ["x", "h"],
    "v, i = TopK(lengths, k) f = Cast <to=1> (v) y = Add(h, f)": None,
    "e = Gather(table, lengths) s = ReduceMean <keepdims=0> (e, last) v, i = TopK(s, k) y = Add(h, v)": ["h", "s"],
}


@pytest.mark.parametrize("end", SELECTIONS)
def test_outputs_that_values_of_the_network_select(end):
    text = f"(float[N,3] x, int64[N,3] lengths) => (float[N,3] y) {{ h = MatMul(x, w) {end} }}"
    constants = {} if "table" not in end else {"table": W(9, 4), "last": i64(2)}
    found = selections(prepared(parse(text, w=W(3, 3), k=i64(3), **constants)))
    assert {name: sorted(values) for name, values in found.items()} == (
        {} if SELECTIONS[end] is None else {"y": sorted(SELECTIONS[end])}
    )


READERS = {
    "y = Softmax <axis=1> (h)": {"h": 1},
    "y = Softmax(h)": {"h": 2},
    "i = ArgMax <axis=2> (h) y = Cast <to=1> (i)": {"h": 2},
    "i = ArgMax(h) y = Cast <to=1> (i)": {},  # over the samples
    "y = Sigmoid(h)": {},
    "y = Relu(h)": {},
}


@pytest.mark.parametrize("end", READERS)
def test_what_is_a_distribution_along_an_axis(end):
    dims = "a,b" if "ArgMax <" in end else "a,b,c"
    graph = prepared(parse(f"(float[N,5,4] x) => (float[{dims}] y) {{ h = MatMul(x, w) {end} }}", w=W(4, 7)))
    assert distributed(graph, learning_targets(graph)) == READERS[end]
