"""Every pass finds its pattern, settles in one run, and never changes what the model computes."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser

from onnx_eptq import graph as og
from onnx_eptq.errors import ModelError
from onnx_eptq.prepare import PASSES, prepare, run_pass
from onnx_eptq.prepare.opset import lower_opset, to_opset

TOLERANCE = 1e-5  # of the output's scale
LEAST = np.float32(-1e30)  # stands for minus infinity
RNG = np.random.default_rng(0)


def rand(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return (RNG.random(shape) + 0.5).astype(np.float32)


def build(text: str, *, opset: int = 21, **constants: Any) -> onnx.ModelProto:
    """Parse the body of a graph; the keyword arguments become initializers."""
    header = f'<ir_version: 8, opset_import: ["" : {opset}, "my.ops" : 1]> g '
    model = parser.parse_model(header + text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return model


def feeds_for(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"N": 2, "H": 64, "W": 96, "height": 64, "width": 96}
    feeds = {}
    for value in model.graph.input:
        shape = [d.dim_value or sizes.get(d.dim_param, 2) for d in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = np.asarray(rng.standard_normal(shape) * 2).astype(dtype)
    return feeds


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    model = onnx.ModelProto.FromString(model.SerializeToString())
    model.ir_version = min(model.ir_version, 10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def showing(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """The model with these values as further outputs."""
    shown = onnx.ModelProto.FromString(model.SerializeToString())
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return shown


def difference(before: onnx.ModelProto, after: onnx.ModelProto) -> float:
    """Return the largest difference on random inputs of the outputs and of all that has a name in both, relative to its scale."""
    worst = 0.0
    feeds = feeds_for(before)
    # Second outputs may be what the specification leaves open, as the mask of an old Dropout.
    made = [{node.output[0] for node in model.graph.node if node.output[0]} for model in (before, after)]
    inner = sorted((made[0] & made[1]) - {output.name for output in before.graph.output})
    pairs = zip(run(showing(before, inner), feeds), run(showing(after, inner), feeds), strict=True)
    for index, (a, b) in enumerate(pairs):
        if isinstance(a, list):
            continue
        assert a.shape == b.shape
        assert a.dtype == b.dtype or (index >= len(before.graph.output) and "f" == a.dtype.kind == b.dtype.kind)
        a, b = (np.maximum(x, LEAST) if np.issubdtype(x.dtype, np.floating) else x for x in (a, b))
        finite = np.isfinite(a)
        np.testing.assert_array_equal(a[~finite], b[~finite])
        if finite.any():
            a, b = a[finite].astype(np.float64), b[finite].astype(np.float64)
            worst = max(worst, float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-6)))
    return worst


def tolerance(model: onnx.ModelProto) -> float:
    """What models may differ by, of the output's scale: the runtime rounds between the nodes of what is float16."""
    casts = [a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute]
    held = [tensor.data_type for tensor in model.graph.initializer] + casts
    held += [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    return 4e-3 if TensorProto.FLOAT16 in held else TOLERANCE


def interface(model: onnx.ModelProto) -> list[bytes]:
    return [v.SerializeToString() for v in [*model.graph.input, *model.graph.output]]


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def exported(graph: gs.Graph) -> onnx.ModelProto:
    """A model of a copy, as the writer makes it: graphsurgeon copies nothing but arrays for constants."""
    return og.to_model(og.copy(graph))


def prepared(model: onnx.ModelProto) -> gs.Graph:
    """Prepare the model and check that it computes the same, keeps its interface and is settled."""
    graph = og.load(model)
    prepare(graph)
    result = exported(graph)
    assert difference(model, result) < tolerance(model)
    assert interface(result) == interface(model)
    # an Einsum may become three nodes, a mean two, and inputs and outputs get Casts
    allowed = max(2, len(model.graph.input) + len(model.graph.output))
    assert len(result.graph.node) <= max(len(model.graph.node), 1) + allowed
    assert not any(prepare(graph).values())
    return graph


CONV = {"w": rand(4, 3, 3, 3), "b": rand(4)}
BN = {"gamma": rand(4), "beta": rand(4), "mean": rand(4), "var": positive(4)}
IMAGE = "(float[N,3,8,8] x) => (float[N,4,A,B] y)"


def one(values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def vec(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


Example = tuple[str, onnx.ModelProto, list[str]]
EXAMPLES: list[tuple[str, str, onnx.ModelProto, list[str]]] = []


def example(name: str, text: str, expected: str, **constants: Any) -> None:
    """Add a model in which the pass must find something, and the operators that it must leave."""
    label = f"{name}-{sum(e[0] == name for e in EXAMPLES)}"
    EXAMPLES.append((name, label, build(text, **constants), expected.split()))


V = "(float[N,4] x) => (float[N,4] y)"
M = "(float[N,3,8,8] x) => (float[N,3,8,8] y)"
example("use_float32", V + "{ a = Cast<to = 11>(x)\n b = Mul(a, d)\n c = Cast<to = 1>(b)\n y = Relu(c) }",
        "Cast Mul Cast Relu", d=np.array([1.0, 2.0, -3.0, 1e-3]))  # fmt: skip
example("use_float32", "(double[N,4] x) => (double[N,4] y) { a = Neg(x)\n b = Relu(a)\n y = Neg(b) }",
        "Cast Neg Relu Neg Cast")  # fmt: skip
example("use_float32", V + "{ s = Shape(x)\n a = ConstantOfShape<value = double[1] {0.5}>(s)\n b = Cast<to = 1>(a)\n"
        "y = Add(x, b) }", "Shape ConstantOfShape Cast Add")  # fmt: skip

HALF = np.array([1.0, 2.0, -3.0, 1e-3], np.float16)
example("use_float32", V.replace("float", "float16") + "{ a = Mul(x, d)\n y = Relu(a) }", "Cast Mul Relu Cast", d=HALF)
example("use_float32", "(float16[N,4] x) => (float16[N,4] y, float16[N,4] z) { y = Neg(x)\n z = Relu(y) }",
        "Cast Neg Relu Cast Cast")  # fmt: skip
example("use_float32", "(float16[N,4] x) => (float[N,4] y) { a = Mul(x, d)\n b = Cast<to = 1>(a)\n y = Relu(b) }",
        "Cast Mul Cast Relu", d=HALF)  # fmt: skip
example("use_float32", V + "{ g = ReduceSum<keepdims = 0>(x)\n c = Greater(g, o)\n a = Cast<to = 10>(x)\n b = If(c)<"
        "then_branch = t () => (float16[N,4] u) { u = Mul(a, d) }, else_branch = e () => (float16[N,4] v) {"
        " k = Cast<to = 11>(a)\n l = Neg(k)\n v = Cast<to = 10>(l) }>\n y = Cast<to = 1>(b) }", "ReduceSum Greater Cast If Cast",
        d=HALF, o=one(0))  # fmt: skip
example("use_float32", "(float16[N,6,6,3] x) => (float16[N,4,A,B] y) { t = Transpose<perm = [0, 3, 1, 2]>(x)\n"
        " a = Neg(t)\n y = Conv(a, w) }", "Cast Transpose Neg Conv Cast", w=rand(4, 3, 3, 3).astype(np.float16))  # fmt: skip
example("use_float32", V + "{ e = EyeLike<dtype = 11>(x)\n a = Cast<to = 1>(e)\n y = Add(x, a) }", "EyeLike Cast Add")

example("remove_noops", V + "{ a = Relu(x)\n y = Identity(a) }", "Relu")
example("remove_noops", V + "{ a = Identity(x)\n y = Relu(a) }", "Relu")
example("remove_noops", V + "{ a = Identity(w)\n y = Add(x, a) }", "Add", w=rand(4))
example("remove_noops", V + "{ a = Relu(x)\n y = Identity(a)\n z = Neg(a)\n v = Neg(y) }", "Relu")
example("remove_noops", V + "{ a = Relu(x)\n b, m = Dropout(a)\n y = Neg(b) }", "Relu Neg")
example("remove_noops", V + "{ a = Cast<to = 1>(x)\n y = Neg(a) }", "Neg")
example("remove_noops", V + "{ a = Reshape(x, s)\n y = Neg(a) }", "Neg", s=vec(-1, 4))
example("remove_noops", V + "{ a = Flatten(x)\n y = Neg(a) }", "Neg")
example("remove_noops", V + "{ a = Expand(x, s)\n y = Neg(a) }", "Neg", s=vec(1, 1))
example("remove_noops", V + "{ a = Transpose<perm = [0, 1]>(x)\n y = Neg(a) }", "Neg")
example("remove_noops", V + "{ a = Pad(x, p)\n y = Neg(a) }", "Neg", p=vec(0, 0, 0, 0))
example("remove_noops", V + "{ a = Slice(x, s, e, t)\n y = Neg(a) }", "Neg", s=vec(0, 0), e=vec(2**31, 4), t=vec(0, 1))
example("remove_noops", V + "{ a = Concat<axis = 0>(x)\n y = Neg(a) }", "Neg")
example("remove_noops", V + "{ a = Tile(x, r)\n y = Neg(a) }", "Neg", r=vec(1, 1))
example("remove_noops", V + "{ a = Clip(x)\n y = Neg(a) }", "Neg")
example("remove_noops", V + "{ a = Add(z, x)\n b = Sub(a, z)\n y = Neg(b) }", "Neg", z=one(0))
example(
    "remove_noops", V + "{ a = Mul(x, o)\n b = Div(a, o)\n c = Pow(b, o)\n y = Neg(c) }", "Neg", o=one([1, 1, 1, 1])
)
example("remove_noops", M + "{ a = MaxPool<kernel_shape = [1, 1]>(x)\n y = Neg(a) }", "Neg")
example("remove_noops", M + "{ a = Resize(x, , s)\n y = Neg(a) }", "Neg", s=one([1, 1, 1, 1]))
example("remove_noops", M + "{ a = Relu(x)\n b = MaxPool<kernel_shape = [1, 1]>(a)\n y = Relu(b) }", "Relu")

example("fold_constants", V + "{ a = Transpose(w)\n y = MatMul(x, a) }", "MatMul", w=rand(4, 4))
example("fold_constants", V + "{ a = Reshape(w, s)\n b = Cast<to = 1>(a)\n c = Exp(b)\n y = MatMul(x, c) }",
        "MatMul", w=rand(16).astype(np.float16), s=vec(4, 4))  # fmt: skip
example("fold_constants", V + "{ a = Transpose(w)\n b = Transpose(w)\n h = MatMul(x, a)\n y = MatMul(h, b) }",
        "MatMul MatMul", w=rand(4, 4))  # fmt: skip
example("fold_constants", V + "{ a, c = Split<axis = 0, num_outputs = 2>(w)\n h = Mul(x, a)\n y = Mul(h, c) }",
        "Mul Mul", w=rand(2, 4))  # fmt: skip
example("fold_constants", V + "{ a = ConstantOfShape<value: tensor = float[1] {3}>(s)\n"
        "b = ConstantOfShape<value: tensor = float[1] {5}>(s)\n h = Mul(x, a)\n y = Add(h, b) }",
        "Mul Add", s=vec(4))  # fmt: skip

example("fold_shapes", "(float[N,3,4,4] x) => (float[N,48] y)"
        "{ s = Shape(x)\n a = Gather(s, i)\n b = Unsqueeze(a, i1)\n c = Concat<axis = 0>(b, m)\n y = Reshape(x, c) }",
        "Reshape", i=np.int64(0), i1=vec(0), m=vec(-1))  # fmt: skip
example("fold_shapes", "(float[2,3,4] x) => (float[6,4] y)"
        "{ s = Shape<start = 1>(x)\n a = Mul(s, t)\n y = Reshape(x, a) }", "Reshape", t=vec(2, 1))  # fmt: skip
example("fold_shapes", "(float[N,3,H,W] x) => (float[N,3,P] y)"
        "{ s = Shape(x)\n a = Slice(s, i, j)\n c = Concat<axis = 0>(a, m)\n y = Reshape(x, c) }",
        "Reshape", i=vec(0), j=vec(2), m=vec(-1))  # fmt: skip
example("fold_shapes", "(float[N,6,H] x) => (float[N,2,3,H] y)"
        "{ s = Shape<start = 0, end = 1>(x)\n t = Shape<start = 2>(x)\n c = Concat<axis = 0>(s, m, t)\n"
        " y = Reshape(x, c) }", "Reshape", m=vec(2, 3))  # fmt: skip
for lines in (
    "a = Div(x, r)\n b = Erf(a)\n c = Add(b, o)\n d = Mul(x, c)\n y = Mul(d, h)",
    "a = Mul(x, q)\n b = Erf(a)\n c = Add(o, b)\n d = Mul(x, h)\n y = Mul(c, d)",
    "a = Mul(x, q)\n b = Erf(a)\n c = Add(b, o)\n d = Mul(c, h)\n y = Mul(d, x)",
    "a = Div(x, r)\n b = Erf(a)\n c = Add(b, o)\n d = Mul(c, x)\n y = Div(d, two)",
):
    example("fuse_activations", V + "{" + lines + "}", "Gelu",
            r=one(2**0.5), q=one([0.5**0.5]), o=one(1), h=one(0.5), two=one([2]))  # fmt: skip
for lines in (
    "p = Pow(x, three)\n a = Mul(p, k)\n b = Add(x, a)\n c = Mul(b, s)\n d = Tanh(c)\n e = Add(d, o)\n"
    " f = Mul(x, h)\n y = Mul(f, e)",
    "u = Mul(x, x)\n p = Mul(u, x)\n a = Mul(k, p)\n b = Add(a, x)\n c = Mul(s, b)\n d = Tanh(c)\n e = Add(o, d)\n"
    " f = Mul(e, x)\n y = Mul(f, h)",
):
    example("fuse_activations", V + "{" + lines + "}", "Gelu",
            three=one(3), k=one(0.044715), s=one(0.7978845608), o=one(1), h=one(0.5))  # fmt: skip
example("fuse_activations", V + "{ a = Add(x, t)\n b = Clip(a, z, s)\n c = Mul(x, b)\n y = Div(c, s) }", "HardSwish",
        t=one(3), z=one(0), s=one(6))  # fmt: skip
example("fuse_activations", V + "{ a = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x)\n y = Mul(x, a) }", "HardSwish")
example("fuse_activations", V + "{ a = Add(x, t)\n b = Clip(a, z, s)\n y = Mul(b, i) }", "HardSigmoid",
        t=one(3), z=one(0), s=one(6), i=one(1 / 6))  # fmt: skip
example("fuse_activations", V + "{ a = Softplus(x)\n b = Tanh(a)\n y = Mul(x, b) }", "Mish")

S = "(float[N,5,6] x) => (float[N,5,6] y)"
MEANS = "m = ReduceMean<keepdims = 1>(x, ax)\n d = Sub(x, m)\n "
for lines in (
    MEANS + "q = Pow(d, two)\n v = ReduceMean(q, ax)\n e = Add(v, eps)\n s = Sqrt(e)\n n = Div(d, s)\n g = Mul(n, ga)\n"
    " y = Add(g, be)",
    MEANS + "q = Mul(d, d)\n v = ReduceMean(q, ax)\n e = Add(eps, v)\n s = Sqrt(e)\n n = Div(d, s)\n y = Mul(ga, n)",
    MEANS
    + "q = Mul(d, d)\n v = ReduceMean(q, ax)\n e = Add(v, eps)\n s = Sqrt(e)\n r = Reciprocal(s)\n k = Mul(r, ga)\n"
    " i = Mul(x, k)\n j = Mul(m, k)\n o = Sub(be, j)\n y = Add(i, o)",
    "m = GlobalAveragePool(x)\n d = Sub(x, m)\n q = Mul(d, d)\n v = GlobalAveragePool(q)\n e = Add(v, eps)\n"
    " s = Sqrt(e)\n r = Reciprocal(s)\n k = Mul(ga, r)\n i = Mul(k, x)\n j = Mul(k, m)\n o = Sub(be, j)\n"
    " y = Add(o, i)",
    MEANS
    + "q = Mul(d, d)\n v = ReduceMean(q, ax)\n e = Add(v, eps)\n s = Sqrt(e)\n r = Reciprocal(s)\n n = Mul(d, r)\n"
    " g = Mul(n, ga)\n y = Add(g, be)",
):
    example("fuse_normalizations", S + "{" + lines + "}", "LayerNormalization",
            ax=vec(-1), two=one(2), eps=one(1e-3), ga=rand(6), be=rand(6))  # fmt: skip
example("fuse_normalizations", "(float[N,5,H] x) => (float[N,5,H] y) {" + MEANS
        + "q = Mul(d, d)\n v = ReduceMean(q, ax)\n e = Add(v, eps)\n s = Sqrt(e)\n n = Div(d, s)\n y = Mul(n, ga) }",
        "LayerNormalization", ax=vec(-1), eps=one(1e-3), ga=rand(64))  # fmt: skip

SPREAD = "q = Mul(d, d)\n v = ReduceMean(q, ax)\n e = Add(v, eps)\n s = Sqrt(e)\n r = Reciprocal(s)\n"
FORMS = {  # from MEANS and SPREAD, or from x; gamma and beta are ga and be
    "keras": MEANS
    + SPREAD
    + "k = Mul(r, ga)\n i = Mul(x, k)\n n = Neg(m)\n j = Mul(n, k)\n c = Add(j, be)\n y = Add(i, c)",
    "flax": "m = ReduceMean(x, ax)\n p = Mul(x, x)\n w = ReduceMean(p, ax)\n u = Mul(m, m)\n q = Sub(w, u)\n"
    " v = Max(q, none)\n e = Add(v, eps)\n s = Sqrt(e)\n r = Div(o, s)\n k = Mul(r, ga)\n d = Sub(x, m)\n"
    " z = Mul(d, k)\n y = Add(z, be)",
    "sums": "a = ReduceSum<keepdims = 0>(x, ax)\n b = Mul(a, part)\n m = Unsqueeze(b, ax)\n d = Sub(x, m)\n q = Mul(d, d)\n"
    " t = ReduceSum<keepdims = 0>(q, ax)\n b2 = Mul(t, part)\n v = Unsqueeze(b2, ax)\n e = Add(v, eps)\n r = Pow(e, root)\n"
    " n = Mul(d, r)\n g = Mul(n, ga)\n y = Add(g, be)",
    "plain": MEANS + SPREAD + "y = Mul(d, r)",
    "and more behind": MEANS
    + SPREAD
    + "n = Mul(d, r)\n g = Mul(n, ga)\n f = Add(g, be)\n h = Mul(f, two)\n y = Add(h, places)",
}
SHARED = {"ax": vec(-1), "eps": one(1e-3), "ga": rand(6), "be": rand(6), "o": one(1), "none": one(0), "part": one(1 / 6),
          "root": one(-0.5), "two": one(2), "places": rand(1, 5, 6)}  # fmt: skip
for form, lines in FORMS.items():
    used = {name: value for name, value in SHARED.items() if re.search(rf"\b{name}\b", lines)}
    example(
        "fuse_normalizations",
        S + "{" + lines + "}",
        "LayerNormalization" + " Add" * (form == "and more behind"),
        **used,
    )
GROUPS = MEANS + SPREAD + "k = Mul(r, ga)\n i = Mul(z, k)\n n = Neg(m)\n j = Mul(n, k)\n o = Add(j, be)\n w = Add(i, o)"
example("fuse_normalizations", "(float[N,4,6,6] x) => (float[N,4,6,6] y) { z = Reshape(x, split)\n"
        + re.sub(r"\bx\b", "z", GROUPS) + "\n y = Reshape(w, whole) }", "Reshape InstanceNormalization Mul Add Reshape",
        split=vec(-1, 2, 2, 6, 6), whole=vec(-1, 4, 6, 6), ax=vec(2, 3, 4), eps=one(1e-3), ga=rand(1, 2, 2, 1, 1),
        be=rand(1, 2, 2, 1, 1))  # fmt: skip
example("fuse_normalizations", "(float[N,4,6,6] z) => (float[N,4,6,6] w) {" + re.sub(r"\bx\b", "z", GROUPS) + "}",
        "InstanceNormalization", ax=vec(2, 3), eps=one(1e-3), ga=rand(4, 1, 1), be=rand(4, 1, 1))  # fmt: skip
example("fuse_normalizations", "(float[N,4,6,6] z) => (float[N,4,6,6] w) {" + re.sub(r"\bx\b", "z", GROUPS) + "}",
        "LayerNormalization", ax=vec(2, 3), eps=one(1e-3), ga=rand(6, 6), be=rand(6, 6))  # fmt: skip

# over the channels in front, as layouts are turned around; over groups of channels behind
example("fuse_normalizations", "(float[N,4,6,6] z) => (float[N,4,6,6] w) {" + re.sub(r"\bx\b", "z", GROUPS) + "}",
        "Transpose LayerNormalization Transpose", ax=vec(1), eps=one(1e-3), ga=rand(4, 1, 1), be=rand(4, 1, 1))  # fmt: skip
example("fuse_normalizations", "(float[N,5,6,2,4] z) => (float[N,5,6,2,4] w) {" + re.sub(r"\bx\b", "z", GROUPS) + "}",
        "Transpose InstanceNormalization Transpose Mul Add", ax=vec(1, 2, 4), eps=one(1e-3), ga=rand(2, 4),
        be=rand(2, 4))  # fmt: skip

HALVES = "(float[N,6] x) => (float[N,4] y)"
example("unpack_sequences", HALVES + "{ s = SplitToSequence<axis = 1>(x, two)\n a = SequenceAt(s, one)\n"
        " b = SequenceAt(s, last)\n y = Concat<axis = 1>(a, b) }", "Split Identity Identity Concat",
        two=np.int64(2), one=np.int64(1), last=np.int64(-1))  # fmt: skip
example("unpack_sequences", "(float[N,5] x) => (float[N,5] y) { s = SplitToSequence<axis = -1>(x, sizes)\n"
        " b = SequenceErase(s, last)\n a = SequenceAt(s, last)\n c = SequenceInsert(b, a, zero)\n"
        " y = ConcatFromSequence<axis = 1>(c) }", "Split Identity Concat",
        sizes=vec(1, 4), last=np.int64(-1), zero=np.int64(0))  # fmt: skip
example("unpack_sequences", "(float[N,3] x) => (float[N,2] y) { s = SplitToSequence<axis = 1, keepdims = 0>(x)\n"
        " e = SequenceEmpty()\n a = SequenceAt(s, two)\n b = SequenceInsert(e, a)\n i = Identity(b)\n c = SequenceInsert(i, a)\n"
        " y = ConcatFromSequence<axis = -1, new_axis = 1>(c) }", "", two=np.int64(2))  # fmt: skip
example("unpack_sequences", V + "{ a = Neg(x)\n s = SequenceConstruct(x, a, x)\n t = SequenceErase(s)\n n = SequenceLength(t)\n"
        " c = Cast<to = 1>(n)\n b = SequenceAt(t, one)\n y = Mul(b, c) }", "", one=np.int64(1))  # fmt: skip
example("unpack_sequences", "(float[N,7] x) => (float[N,1] y) { s = SplitToSequence<axis = 1>(x, three)\n"
        " y = SequenceAt(s, two) }", "Split Identity", three=np.int64(3), two=np.int64(2))  # fmt: skip

example("use_quotients", V + "{ e = Exp(x)\n r = Reciprocal(e)\n y = Mul(r, x) }", "Exp Div")
example("use_quotients", V + "{ e = Exp(x)\n r = Div(o, e)\n y = Mul(x, r) }", "Exp Div", o=one(1))
example("use_squares", V + "{ a = Pow(x, two)\n y = Neg(a) }", "Mul Neg", two=one(2))

example("merge_reshapes", "(float[N,3,4] x) => (float[N,12] y) { a = Unsqueeze(x, ax)\n b = Squeeze(a, ax)\n"
        " c = Reshape(b, s)\n y = Reshape(c, t) }", "Reshape", ax=vec(1), s=vec(-1, 6, 2), t=vec(-1, 12))  # fmt: skip
example("merge_reshapes", "(float[N,1,1,6] x) => (float[N,6] y) { a = Transpose<perm = [0, 3, 1, 2]>(x)\n"
        " y = Flatten(a) }", "Reshape")  # fmt: skip
example("merge_reshapes", "(float[N,6] x) => (float[N,6,1,1] y) { a = Reshape(x, s)\n"
        " y = Transpose<perm = [0, 3, 1, 2]>(a) }", "Reshape", s=vec(-1, 1, 1, 6))  # fmt: skip

for target in (vec(-1, 12), vec(0, -1), vec(0, 12)):
    example("use_flatten", "(float[N,3,4] x) => (float[N,12] y) { y = Reshape(x, s) }", "Flatten", s=target)
example("use_flatten", "(float[2,3,4] x) => (float[2,12] y) { y = Reshape(x, s) }", "Flatten", s=vec(2, -1))

example("merge_transposes", "(float[N,3,4] x) => (float[3,4,N] y) { a = Transpose<perm = [0, 2, 1]>(x)\n"
        " y = Transpose<perm = [2, 1, 0]>(a) }", "Transpose")  # fmt: skip

TO, BACK = "Transpose<perm = [0, 3, 1, 2]>", "Transpose<perm = [0, 2, 3, 1]>"


def sink(middle: str, count: int = 0, shape: str = "float[N,P,Q,R]", **constants: Any) -> None:
    """A model that is NCHW outside and NHWC inside; `middle` maps b to c."""
    text = f"(float[N,3,8,8] x) => ({shape} y) {{ b = {BACK}(x)\n {middle}\n y = {TO}(c) }}"
    EXAMPLES.append(("sink_transposes", f"sink-{len(EXAMPLES)}", build(text, **constants), []))


sink("c = Relu(b)")
sink("a = LeakyRelu<alpha = 0.1>(b)\n c = Clip(a, lo, hi)", lo=one(-1), hi=one(1))
sink("c = Add(b, k)", k=rand(3))
sink("a = Mul(k, b)\n c = Sub(k1, a)", k=rand(8, 1, 3), k1=one([[[[2]]]]))
sink("a = Relu(b)\n c = Add(a, b)")
sink("c = Mul(b, b)")
sink("c = PRelu(b, k)", k=rand(3))
sink("a = Less(b, z)\n d = Neg(b)\n c = Where(a, d, b)", z=one(0))
sink("c = Softmax<axis = -1>(b)")
sink("c = Softmax<axis = 1>(b)")
sink("c = Concat<axis = 3>(b, b)")
sink("c = Concat<axis = -1>(k, b)", k=rand(2, 8, 8, 2))
sink("p, q = Split<axis = 3>(b, s)\n r = Neg(p)\n c = Concat<axis = 3>(q, r)", s=vec(1, 2))
sink("c = Slice(b, s, e, t, u)", s=vec(1, 0), e=vec(7, 2), t=vec(1, -1), u=vec(2, 1))
sink("c = Slice(b, s, e)", s=vec(0, 1), e=vec(2, 7))
sink("c = Pad(b, p)", p=vec(0, 1, 2, 0, 0, 1, 0, 3))
sink("c = Pad(b, p, v, t)", p=vec(1, 2), v=one(0.5), t=vec(2))
sink("c = Resize(b, , s)", s=one([1, 2, 3, 1]))
sink("c = Resize<axes = [1, 2]>(b, , , s)", s=vec(4, 16))
sink("c = ReduceMean(b, t)", t=vec(1, 2))
sink("a = ReduceMax<keepdims = 0>(b, t)\n d = Unsqueeze(a, u)\n c = Relu(d)", t=vec(1), u=vec(2))
sink("a = ReduceSum<keepdims = 0>(b, t)\n c = Unsqueeze(a, u)", shape="float[N,1,1,3]", t=vec(1, 2), u=vec(-1, 1))
sink("a = ArgMax<axis = 3>(b)\n c = Cast<to = 1>(a)")
sink("a = ArgMax<axis = 1, keepdims = 0>(b)\n d = Cast<to = 1>(a)\n c = Unsqueeze(d, u)", u=vec(1))
sink("a = Slice(b, s, e, t)\n d = Squeeze(a, t)\n c = Unsqueeze(d, t)", s=vec(2), e=vec(3), t=vec(1))
sink("c = Gather<axis = 3>(b, i)", i=vec(2, 0))
sink("a = Gather<axis = 1>(b, i)\n c = Unsqueeze(a, t)", i=np.int64(3), t=vec(1))
sink("a, m = Dropout(b)\n d = Cast<to = 7>(a)\n c = Cast<to = 1>(d)")
for text in (
    "{ a = " + BACK + "(x)\n b = Flatten(a)\n y = MatMul(b, w) }",
    "{ a = " + BACK + "(x)\n b = Reshape(a, s)\n y = Gemm<transB = 1>(b, wt, bias) }",
):
    example("sink_transposes", "(float[N,3,2,4] x) => (float[N,5] y)" + text,
            "Reshape MatMul" if "MatMul" in text else "Reshape Gemm",
            w=rand(24, 5), wt=rand(5, 24), bias=rand(5), s=vec(-1, 24))  # fmt: skip
example("sink_transposes", "(float[N,6,1,1] x) => (float[N,6] y)"
        "{ a = " + BACK + "(x)\n b = Relu(a)\n y = Reshape(b, s) }", "Relu Reshape", s=vec(-1, 6))  # fmt: skip

example("sink_transposes", "(float[N,3,8,8] x) => (float[N,6,6,4] y) { a = Conv(x, w)\n b = " + BACK + "(a)\n"
        " c = Add(b, bias)\n y = Relu(c) }", "Conv Add Relu Transpose", w=CONV["w"], bias=rand(4))  # fmt: skip
IN = "(float[N,8,8,3] x) => (float[N,4,P,Q] y)"
for lines in (
    "a = Div(x, s)\n b = Sub(k, a)",
    "a = Pad(x, p)\n b = Mul(a, k)",
    "c = Relu(x)\n a = Clip(c, s)\n b = Neg(a)",
):
    example("hoist_transposes", IN + "{ " + lines + "\n t = " + TO + "(b)\n y = Conv(t, w) }", "",
            s=one(0.5), k=rand(3), p=vec(0, 1, 1, 0, 0, 0, 2, 0), w=CONV["w"])  # fmt: skip

for attrs in (
    'auto_pad = "SAME_UPPER"',
    'auto_pad = "SAME_LOWER", strides = [2, 3]',
    'auto_pad = "VALID"',
    'auto_pad = "VALID", dilations = [2, 1]',
    'auto_pad = "NOTSET", pads = [1, 0, 0, 1]',
):
    example("explicit_padding", f"{IMAGE} {{ y = Conv<{attrs}>(x, w, b) }}", "Conv", **CONV)
example("drop_dilations", "(float[N,3,9,9] x) => (float[N,3,P,Q] y)"
        "{ a = AveragePool<kernel_shape = [2, 2], dilations = [1, 1]>(x)\n"
        "y = MaxPool<kernel_shape = [2, 2], dilations = [1, 1]>(a) }", "AveragePool MaxPool")  # fmt: skip
example("explicit_padding", "(float[N,3,H,W] x) => (float[N,3,P,Q] y)"
        '{ y = MaxPool<kernel_shape = [2, 2], auto_pad = "SAME_UPPER">(x) }', "MaxPool")  # fmt: skip
example("explicit_padding", "(float[N,3,9,9] x) => (float[N,3,P,Q] y)"
        '{ y = AveragePool<kernel_shape = [3, 2], strides = [2, 2], auto_pad = "SAME_LOWER">(x) }',
        "AveragePool")  # fmt: skip

example("merge_pads", IMAGE + "{ a = Pad(x, p)\n y = Conv<pads = [1, 0, 0, 1]>(a, w, b) }", "Conv",
        p=vec(0, 0, 1, 2, 0, 0, 0, 1), **CONV)  # fmt: skip
example("merge_pads", IMAGE + "{ a = Pad(x, p, z, t)\n y = Conv(a, w, b) }", "Conv",
        p=vec(1, 1, 1, 1), z=one(0), t=vec(2, 3), **CONV)  # fmt: skip
POOLED = "(float[N,3,8,8] x) => (float[N,3,P,Q] y)"
example("merge_pads", POOLED + "{ a = Pad(x, p)\n y = AveragePool<kernel_shape = [3, 3]>(a) }", "AveragePool",
        p=vec(0, 0, 1, 1, 0, 0, 1, 1))  # fmt: skip
example("merge_pads", POOLED + "{ r = Relu(x)\n a = Pad(r, p)\n y = MaxPool<kernel_shape = [3, 3]>(a) }",
        "Relu MaxPool", p=vec(0, 0, 1, 1, 0, 0, 1, 1))  # fmt: skip
example("merge_pads", POOLED + "{ a = Pad(x, p, v)\n y = MaxPool<kernel_shape = [3, 3]>(a) }",
        "MaxPool", p=vec(0, 0, 1, 1, 0, 0, 1, 1), v=one(-np.inf))  # fmt: skip

example("use_global_pool", M.replace("8,8] y", "1,1] y") + "{ y = ReduceMean(x, t) }", "GlobalAveragePool", t=vec(2, 3))
example("use_global_pool", "(float[N,3,8,8] x) => (float[N,3] y) { y = ReduceMean<keepdims = 0>(x, t) }",
        "GlobalAveragePool Flatten", t=vec(-1, -2))  # fmt: skip
example("use_global_pool", M.replace("8,8] y", "1,1] y") + "{ y = AveragePool<kernel_shape = [8, 8]>(x) }",
        "GlobalAveragePool")  # fmt: skip

GEMM = "(float[N,4] x) => (float[N,3] y)"
for equation, shapes, wanted in (  # two activations, then an activation and a matrix
    ("bic,bjc->bij", "(float[N,3,4] x, float[N,5,4] z) => (float[N,3,5] y)", "Transpose MatMul"),
    ("bij,bjc->bic", "(float[N,3,4] x, float[N,4,5] z) => (float[N,3,5] y)", "MatMul"),
    ("bhic,bhcj->bhij", "(float[N,2,3,4] x, float[N,2,4,5] z) => (float[N,2,3,5] y)", "MatMul"),
    ("bci,bcj->bji", "(float[N,4,3] x, float[N,4,5] z) => (float[N,5,3] y)", ""),
    ("bic,co->bio", "(float[N,3,4] x) => (float[N,3,5] y)", "MatMul"),
    ("oc,bic->bio", "(float[N,3,4] x) => (float[N,3,5] y)", "MatMul"),
    ("bic,chd->bhid", "(float[N,3,4] x) => (float[N,2,3,5] y)", "MatMul Reshape Transpose"),
    ("bihd,hdo->bio", "(float[N,3,2,4] x) => (float[N,3,5] y)", "Reshape MatMul"),
    ("bic,c->bi", "(float[N,3,4] x) => (float[N,3] y)", "MatMul Reshape"),
):
    weight = {"bic,co->bio": (4, 5), "oc,bic->bio": (5, 4), "bic,chd->bhid": (4, 2, 5), "bihd,hdo->bio": (2, 4, 5),
              "bic,c->bi": (4,)}.get(equation)  # fmt: skip
    operands = "x, z" if weight is None else "w, x" if equation.startswith("oc") else "x, w"
    example("unfold_einsum", f'{shapes} {{ y = Einsum<equation = "{equation}">({operands}) }}', wanted,
            **({} if weight is None else {"w": rand(*weight)}))  # fmt: skip
for bias in (rand(3), rand(1, 3), one(0.5), one([2])):
    example("fuse_gemm", GEMM + "{ a = MatMul(x, w)\n y = Add(a, b) }", "Gemm", w=rand(4, 3), b=bias)
    example("normalize_gemm", GEMM + "{ y = Gemm<alpha = 0.5, beta = 3.0>(x, w, b) }", "Gemm", w=rand(4, 3), b=bias)
example("fuse_gemm", GEMM + "{ a = MatMul(x, w)\n y = Add(b, a) }", "Gemm", w=rand(4, 3), b=rand(3))
example("normalize_gemm", GEMM + "{ y = Gemm<transB = 1, alpha = 2.0>(x, w) }", "Gemm", w=rand(3, 4))
example("normalize_gemm", "(float[4,N] x) => (float[N,3] y) { y = Gemm<transA = 1>(x, w) }", "Gemm", w=rand(4, 3))
example("normalize_gemm", "(float[2,4] x) => (float[2,3] y) { y = Gemm<beta = 2.0>(x, w, b) }", "Gemm Add",
        w=rand(4, 3), b=rand(2, 1))  # fmt: skip

NORM = "BatchNormalization<epsilon = 0.001>(a, gamma, beta, mean, var)"
for conv in (
    "Conv(x, w)",
    "Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w, b)",
):
    example("fold_batchnorm", IMAGE + f"{{ a = {conv}\n y = {NORM} }}", "Conv", **CONV, **BN)
example("fold_batchnorm", "(float[N,4,8,8] x) => (float[N,4,A,B] y)" + f"{{ a = Conv<group = 4>(x, w)\n y = {NORM} }}",
        "Conv", w=rand(4, 1, 3, 3), **BN)  # fmt: skip
example("fold_batchnorm", "(float[N,3,8] x) => (float[N,4,A] y)" + f"{{ a = Conv(x, w)\n y = {NORM} }}",
        "Conv", w=rand(4, 3, 3), **BN)  # fmt: skip
example("fold_batchnorm", "(float[N,3,4,4,4] x) => (float[N,4,A,B,C] y)" + f"{{ a = Conv(x, w)\n y = {NORM} }}",
        "Conv", w=rand(4, 3, 2, 2, 2), **BN)  # fmt: skip
example("fold_batchnorm", IMAGE + f"{{ a = ConvTranspose<strides = [2, 2]>(x, w, b)\n y = {NORM} }}",
        "ConvTranspose", w=rand(3, 4, 3, 3), b=rand(4), **BN)  # fmt: skip
example("fold_batchnorm", "(float[N,6,8,8] x) => (float[N,4,A,B] y)"
        f"{{ a = ConvTranspose<group = 2>(x, w)\n y = {NORM} }}", "ConvTranspose",
        w=rand(6, 2, 3, 3), **BN)  # fmt: skip
GEMM4 = "(float[N,3] x) => (float[N,4] y)"
example(
    "fold_batchnorm", GEMM4 + f"{{ a = Gemm<transB = 1>(x, w, b)\n y = {NORM} }}", "Gemm", w=rand(4, 3), b=rand(4), **BN
)
example("fold_batchnorm", GEMM4 + f"{{ a = Gemm(x, w)\n y = {NORM} }}", "Gemm", w=rand(3, 4), **BN)
example("fold_batchnorm", GEMM4 + f"{{ a = MatMul(x, w)\n y = {NORM} }}", "Gemm", w=rand(3, 4), **BN)

for line in ("y = Mul(a, s)", "y = Mul(s, a)", "y = Div(a, s)"):
    for scale in (one(3), positive(4, 1, 1), positive(1, 4, 1, 1)):
        example("fold_scale", IMAGE + "{ a = Conv(x, w, b)\n " + line + " }", "Conv", s=scale, **CONV)
example("fold_scale", "(float[N,5,3] x) => (float[N,5,4] y) { a = MatMul(x, w)\n y = Mul(a, s) }", "MatMul",
        w=rand(3, 4), s=rand(4))  # fmt: skip
LAYERS = "(float[N,5,3] x) => (float[N,5,4] y) { a = MatMul(x, w)\n b = Add(a, bias)\n "
for line in ("y = Mul(b, s)", "y = Mul(s, b)", "y = Div(b, s)"):
    example("fold_scale", LAYERS + line + " }", "MatMul Add", w=rand(3, 4), bias=rand(4), s=positive(1, 4))
for bias in (rand(), rand(5, 1), rand(1, 5, 4)):
    example("fold_scale", LAYERS + "y = Mul(b, s) }", "MatMul Add", w=rand(3, 4), bias=bias, s=positive(4))
example("fold_scale", "(float[N,5,6,3] x) => (float[N,4,5,6] y) { a = MatMul(x, w)\n b = Add(bias, a)\n"
        "t = Transpose<perm = [0, 3, 1, 2]>(b)\n c = Add(t, plus)\n y = Mul(c, s) }", "",
        w=rand(3, 4), bias=rand(4), plus=rand(5, 1), s=rand(4, 1, 1))  # fmt: skip
example("fold_scale", "(float[N,3,8,8] x) => (float[N,6,6,4] y) { a = Conv(x, w, b)\n t = Transpose<perm = [0, 2, 3, 1]>(a)\n"
        " y = Mul(t, s) }", "Conv Transpose", s=rand(4), **CONV)  # fmt: skip
QUERY = "a = MatMul(x, w)\n b = Add(a, bias)\n c = Reshape(b, heads)\n q = Transpose<perm = [0, 2, 1, 3]>(c)\n"
KEYS = "k = Transpose<perm = [0, 1, 3, 2]>(u)\n"
for line in ("y = Mul(q, s)", "y = Mul(s, q)"):
    example("fold_factor", "(float[N,5,3] x) => (float[N,2,5,2] y) {" + QUERY + line + " }",
            "MatMul Add Reshape Transpose", w=rand(3, 4), bias=rand(4), heads=vec(0, 5, 2, 2), s=one(0.5))  # fmt: skip
for line in ("p = MatMul(q, k)\n y = Mul(p, s)", "p = MatMul(k, q)\n y = Mul(p, s)"):
    example("fold_factor", "(float[N,5,3] x, float[N,2,5,5] u) => (float[N,2,5,5] y) {" + QUERY + KEYS + line + " }",
            "MatMul Add Reshape Transpose Transpose MatMul", w=rand(3, 10), bias=rand(10), heads=vec(0, 5, 2, 5),
            s=one(-3))  # fmt: skip
for number in (np.array(0.5, np.float32), one(0.5)):  # numpy makes no array of what it computes of arrays without axes
    example("fold_factor", "(float[N,5,3] x) => (float[N,5,4] y) { a = MatMul(x, w)\n b = Add(a, number)\n y = Mul(b, s) }",
            "MatMul Add", w=rand(3, 4), number=number, s=one(0.5))  # fmt: skip
example(
    "sort_selected",
    "(float[N,6] x) => (float[N,1] y, int64[N,1] i) { y, i = TopK<sorted = 0>(x, k) }",
    "TopK",
    k=vec(1),
)
for divisor in (one(8), positive(4), np.array([-0.3, 7.0, 1e-3, 255.0], np.float32)):
    example("use_products", V + "{ a = Relu(x)\n y = Div(a, s) }", "Relu Mul", s=divisor)
for line in ("y = Add(a, s)", "y = Add(s, a)", "y = Sub(a, s)", "y = Sub(s, a)"):
    example("fold_bias", IMAGE + "{ a = Conv(x, w, b)\n " + line + " }", "Conv", s=rand(1, 4, 1, 1), **CONV)
    example("fold_bias", IMAGE + "{ a = Conv(x, w)\n " + line + " }", "Conv", s=rand(4, 1, 1), w=CONV["w"])
example("fold_bias", GEMM4 + "{ a = Gemm(x, w)\n y = Add(a, s) }", "Gemm", w=rand(3, 4), s=rand(1, 4))

RULED_OUT = np.array([0.5, -1e9, 0.25, -1], np.float32)
DIVIDED_OUT = np.array([0.5, -np.inf, 0.25, -1], np.float32)
example("split_masks", GEMM4 + "{ y = Gemm<transB = 1>(x, w, b) }", "Gemm Add", w=rand(4, 3), b=RULED_OUT)
example("split_masks", GEMM4 + "{ y = Gemm<transB = 1>(x, w, b) }", "Gemm Add", w=rand(4, 3), b=DIVIDED_OUT)
example("split_masks", IMAGE + "{ a = Conv(x, w, b)\n y = Sigmoid(a) }", "Conv Add Sigmoid", w=CONV["w"], b=RULED_OUT)
example(
    "split_masks",
    IMAGE + "{ y = ConvTranspose<group = 1>(x, w, b) }",
    "ConvTranspose Add",
    w=rand(3, 4, 2, 2),
    b=RULED_OUT,
)

example(
    "split_masks",
    GEMM4 + "{ a = Gemm(x, w, b)\n y = Clip(a, , six) }",
    "Gemm Add Clip",
    w=rand(3, 4),
    b=RULED_OUT,
    six=one(6),
)
example(
    "split_masks", "(float[N,3] x) => (float[N,4] a, float[N,4] y) { a = Gemm(x, w, b)\n y = Relu(a) }", "Gemm Add Relu",
    w=rand(3, 4), b=RULED_OUT,
)  # fmt: skip
example("split_masks", GEMM4 + "{ a = Gemm(x, w, b)\n y = Relu(a) }", "Gemm Relu", w=rand(3, 4), b=DIVIDED_OUT)
example(
    "fuse_gemm", GEMM4 + "{ a = MatMul(x, w)\n b = Add(a, c)\n y = Relu(b) }", "Gemm Relu", w=rand(3, 4), c=RULED_OUT
)

BN3 = {"gamma": rand(3), "beta": rand(3), "mean": rand(3), "var": positive(3)}
BEFORE = "a = BatchNormalization(x, gamma, beta, mean, var)\n"
example("fold_forward", IMAGE + "{" + BEFORE + "y = Conv(a, w, b) }", "Conv", **CONV, **BN3)
example("fold_forward", IMAGE + "{" + BEFORE + "y = Conv<strides = [2, 2]>(a, w) }", "Conv", w=CONV["w"], **BN3)
example("fold_forward", "(float[N,4,8,8] x) => (float[N,6,A,B] y) {" + BEFORE + "y = Conv<group = 2>(a, w) }", "Conv",
        w=rand(6, 2, 3, 3), **BN)  # fmt: skip
example(
    "fold_forward", GEMM4 + "{" + BEFORE + "y = Gemm<transB = 1>(a, w, b) }", "Gemm", w=rand(4, 3), b=rand(4), **BN3
)
example(
    "fold_forward",
    IMAGE + "{ a = Mul(x, s)\n y = Conv<pads = [1, 1, 1, 1]>(a, w, b) }",
    "Conv",
    s=rand(3, 1, 1),
    **CONV,
)
example("fold_forward", IMAGE + "{ c = Sub(x, m)\n a = Div(c, s)\n y = Conv(a, w, b) }", "Conv",
        m=rand(3, 1, 1), s=positive(1, 3, 1, 1), **CONV)  # fmt: skip
example("fold_forward", "(float[N,4,8,8] x) => (float[N,4,A,B] y)"
        "{ a = Mul(x, s)\n y = ConvTranspose<group = 2>(a, w) }", "ConvTranspose",
        w=rand(4, 2, 3, 3), s=rand(4, 1, 1))  # fmt: skip

example("split_biases", IMAGE.replace("3,8,8", "4,8,8") + "{ a = Conv(x, w, b)\n y = Conv(a, w1, b) }", "Conv Conv",
        w=rand(4, 4, 3, 3), w1=rand(4, 4, 3, 3), b=rand(4))  # fmt: skip
example("split_weights", V + "{ a = MatMul(x, w)\n y = Gemm<transB = 1>(a, w) }", "MatMul Gemm", w=rand(4, 4))
example("split_weights", V + "{ a = MatMul(x, w)\n g = Gather(w, i)\n y = Add(a, g) }", "MatMul Gather Add",
        w=rand(4, 4), i=np.int64(1))  # fmt: skip


NO_NORMALIZATIONS = {
    "clipped": FORMS["sums"].replace("y =", "u =") + "\n c = Min(u, two)\n y = Max(c, low)",
    "clipped, of the mean": "m = ReduceMean(x, ax)\n c = Max(m, low)\n d = Sub(x, c)\n" + SPREAD + "y = Mul(d, r)",
    "rectified": FORMS["keras"].replace("y =", "u =") + "\n h = Add(u, two)\n y = Relu(h)",
    "with a floor": FORMS["flax"].replace("none", "part"),
    "of the root mean square": "q = Mul(x, x)\n v = ReduceMean(q, ax)\n e = Add(v, eps)\n s = Sqrt(e)\n y = Div(x, s)",
    "unbiased": MEANS + "q = Mul(d, d)\n t = ReduceSum(q, ax)\n v = Mul(t, fifth)\n e = Add(v, eps)\n s = Sqrt(e)\n"
    " y = Div(d, s)",
    "with an epsilon outside": MEANS + "q = Mul(d, d)\n v = ReduceMean(q, ax)\n e = Add(v, eps)\n s = Sqrt(e)\n t = Add(s, eps)\n"
    " y = Div(d, t)",
    "with two": MEANS + "q = Mul(d, d)\n v = ReduceMean(q, ax)\n e = Add(v, eps)\n f = Add(e, eps)\n s = Sqrt(f)\n y = Div(d, s)",
    "squared": FORMS["plain"].replace("y =", "u =") + "\n y = Mul(u, u)",
    "times a function of x": FORMS["plain"].replace("y =", "u =") + "\n h = Tanh(x)\n y = Mul(u, h)",
}  # fmt: skip
SOURCES = {"open": "(float[N,5,6] x) => (float[N,5,6] y)", "one sample": "(float[1,1,6] x) => (float[1,1,6] y)"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", NO_NORMALIZATIONS)
def test_what_is_no_normalization_computes_the_same(form: str, source: str) -> None:
    """On samples of every size, and on such as hold one large number among small ones."""
    lines = NO_NORMALIZATIONS[form]
    numbers = {**SHARED, "fifth": one(0.2), "low": one(-0.5)}
    used = {name: value for name, value in numbers.items() if re.search(rf"\b{name}\b", lines)}
    model = build(SOURCES[source] + "{" + lines + "}", **used)
    graph = og.load(model)
    prepare(graph)
    rng = np.random.default_rng(0)
    for scale in (1e-3, 0.03, 1.0, 30.0):
        x = (
            scale * rng.standard_normal((1 if source == "one sample" else 4, 1 if source == "one sample" else 5, 6))
        ).astype(np.float32)
        x[..., 0] *= 10
        (before,), (after,) = run(model, {"x": x}), run(og.to_model(graph), {"x": x})
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * np.abs(before).max())


def test_gammas_that_expand_what_was_normalized_stay_behind_it() -> None:
    lines = FORMS["plain"].replace("y =", "u =") + "\n y = Mul(u, wide)"
    graph = prepared(
        build("(float[N,1,6] x) => (float[N,5,6] y) {" + lines + "}", wide=rand(5, 1), ax=vec(-1), eps=one(1e-3))
    )
    assert ops(graph) == ["LayerNormalization", "Mul"]


GELUS = {
    "none": ("a = Div(x, r)\n b = Erf(a)\n c = Add(b, o)\n d = Mul(x, c)\n y = Mul(d, h)", {"r": 2**0.5}),
    "tanh": (
        "p = Pow(x, three)\n a = Mul(p, k)\n b = Add(x, a)\n c = Mul(b, s)\n d = Tanh(c)\n e = Add(d, o)\n"
        " f = Mul(x, h)\n y = Mul(f, e)",
        {"three": 3, "k": 0.044715, "s": (2 / np.pi) ** 0.5},
    ),
}


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("form", GELUS)
def test_activations_are_known_by_constants_that_float16_has_rounded(form: str, halves: bool) -> None:
    lines, numbers = GELUS[form]
    constants = {name: np.array(value * 1.0001, np.float16).astype(np.float32) for name, value in numbers.items()}
    if not halves:  # other numbers that lie as near are other functions
        constants = {name: one(value * 1.0001) for name, value in numbers.items()}
    model = build(V + "{" + lines + "}", o=one(1), h=one(0.5), **constants)
    graph = og.load(model)
    prepare(graph)
    assert (ops(graph) == ["Gelu"]) == halves
    if halves:
        assert graph.nodes[0].attrs.get("approximate", "none") == form
        assert difference(model, og.to_model(graph)) < 1e-3


@pytest.mark.parametrize("cap", ["y = Min(u, ten)", "y = Clip(u, low, ten)"])
def test_activations_that_are_capped_far_out_keep_their_cap(cap: str) -> None:
    lines = "a = Add(x, t)\n b = Clip(a, z, s)\n c = Mul(x, b)\n u = Div(c, s)\n" + cap
    model = build(V + "{" + lines + "}", t=one(3), z=one(0), s=one(6), ten=one(10), low=one(-5))
    graph = og.load(model)
    prepare(graph)
    assert "HardSwish" in ops(graph)
    assert ops(graph)[-1] in ("Min", "Clip")


def test_an_activation_with_its_cap_inside_is_another_function() -> None:
    lines = "a = Add(x, t)\n b = Clip(a, z, s)\n c = Mul(x, b)\n d = Min(c, sixty)\n y = Div(d, s)"
    graph = og.load(build(V + "{" + lines + "}", t=one(3), z=one(0), s=one(6), sixty=one(60)))
    prepare(graph)
    assert "HardSwish" not in ops(graph)


@pytest.mark.parametrize(("name", "model", "expected"), [pytest.param(e[0], e[2], e[3], id=e[1]) for e in EXAMPLES])
def test_pass_fires_keeps_outputs_and_settles(name, model, expected):
    graph = og.load(model)
    og.infer_shapes(graph)
    assert run_pass(name, graph) > 0
    assert not expected or ops(graph) == expected
    result = og.to_model(graph)
    assert difference(model, result) < tolerance(model)
    assert interface(result) == interface(model)
    assert run_pass(name, graph) == 0
    if name == "sink_transposes":
        prepare(graph)
        assert "Transpose" not in ops(graph)[:-1]  # one may remain before an output


def test_every_pass_has_an_example():
    assert {e[0] for e in EXAMPLES} == set(PASSES)


@pytest.mark.parametrize("model", [pytest.param(e[2], id=e[1]) for e in EXAMPLES])
def test_prepare_settles_on_every_example(model):
    prepared(model)


# ------------------------------------------------------------------------------------------- what must not be changed

UNTOUCHED = {
    "a scale along another axis than channels": LAYERS.replace("bias", "v4").replace("w)", "w34)")
    + "y = Mul(b, s51) }",
    "a scale of a sum that is an output": "(float[N,5,3] x) => (float[N,5,4] y, float[N,5,4] b)"
    "{ a = MatMul(x, w34)\n b = Add(a, v4)\n y = Mul(b, v4) }",
    "a scale of a product that others read": "(float[N,5,3] x) => (float[N,5,4] y)"
    "{ a = MatMul(x, w34)\n b = Add(a, v4)\n c = Mul(b, v4)\n y = Add(c, a) }",
    "a scale of what rules classes out": LAYERS.replace("bias", "ruled4").replace("w)", "w34)") + "y = Mul(b, v4) }",
    "a member that is computed": "(float[N,6] x, int64 i) => (float[N,2] y)"
    "{ s = SplitToSequence<axis = 1>(x, by2)\n j = Mod(i, by2)\n y = SequenceAt(s, j) }",
    "parts of unknown number": "(float[N,4] x) => (float[1,4] y) { s = SplitToSequence(x)\n y = SequenceAt(s, at1) }",
    "an identity from input to output": V + "{ y = Identity(x) }",
    "dropout whose mask is used": "(float[N,4] x) => (float[N,4] y, bool[N,4] m) { y, m = Dropout(x) }",
    "adding zeros that broadcast": "(float[1,4] x) => (float[2,4] y) { y = Add(x, z) }",
    "a BatchNormalization before padding": IMAGE + "{" + BEFORE + "y = Conv<pads = [1, 1, 1, 1]>(a, w, b) }",
    "a BatchNormalization read twice": IMAGE
    + "{ a = Conv(x, w, b)\n n = BatchNormalization(a, gamma4, gamma4, gamma4, gamma4)\n y = Add(n, a) }",
    "a Conv whose output is an output": "(float[N,3,8,8] x) => (float[N,4,A,B] y, float[N,4,A,B] a)"
    "{ a = Conv(x, w, b)\n y = Mul(a, s4) }",
    "a scale along another axis": IMAGE + "{ a = Conv(x, w, b)\n y = Mul(a, row) }",
    "a constant divided by a Conv": IMAGE + "{ a = Conv(x, w, b)\n y = Div(s4, a) }",
    "a scale of a broadcast input": "(float[N,1,8,8] x) => (float[N,4,A,B] y) { a = Mul(x, s3)\n y = Conv(a, w, b) }",
    "a zero pad before a max": POOLED + "{ a = Pad(x, p)\n y = MaxPool<kernel_shape = [3, 3]>(a) }",
    "a wide pad before a mean": POOLED + "{ a = Pad(x, p3)\n y = AveragePool<kernel_shape = [3, 3]>(a) }",
    "a pad of another value": IMAGE + "{ a = Pad(x, p, half)\n y = Conv(a, w, b) }",
    "a reflecting pad": IMAGE + '{ a = Pad<mode = "reflect">(x, p)\n y = Conv(a, w, b) }',
    "a pad of the channels": "(float[N,2,8,8] x) => (float[N,4,A,B] y) { a = Pad(x, pc)\n y = Conv(a, w, b) }",
    "a pad before uncounted padding": POOLED
    + "{ a = Pad(x, p)\n y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(a) }",
    "three-dimensional MatMul and Add": "(float[N,5,3] x) => (float[N,5,4] y) { a = MatMul(x, w34)\n y = Add(a, v4) }",
    "MatMul plus a matrix": "(float[2,3] x) => (float[2,4] y) { a = MatMul(x, w34)\n y = Add(a, m24) }",
    "x * Sigmoid(x)": V + "{ a = Sigmoid(x)\n y = Mul(x, a) }",
    "two Transposes that do not cancel": "(float[N,3,8,8] x) => (float[P,Q,R,S] y)"
    "{ b = Transpose<perm = [0, 2, 3, 1]>(x)\n c = Relu(b)\n y = Neg(c) }",
    "a mean over channels": "(float[N,3,8,8] x) => (float[N,1,8,8] y) { y = ReduceMean(x, one1) }",
    "a mean over a sequence": "(float[N,5,6] x) => (float[N,5,1] y) { y = ReduceMean(x, last) }",
    "integer mean": "(int32[N,3,8,8] x) => (int32[N,3,1,1] y) { y = ReduceMean(x, hw) }",
    "a reshape across the batch": "(float[N,6,H] x) => (float[H,2,3,N] y) { s = Shape<start = 0, end = 1>(x)\n"
    " t = Shape<start = 2>(x)\n c = Concat<axis = 0>(t, m23, s)\n y = Reshape(x, c) }",
    "a large expansion of a constant": "(float[64,64] x) => (float[64,64] y) { a = Expand(half, s64)\n y = Mul(x, a) }",
    "a mask that is scaled": "(float[N,3] x, float[3,4] v) => (float[N,4] y) { y = Gemm<beta = 0.5>(x, v, ruled) }",
    "a mask in an Add": GEMM4 + "{ a = Gemm<transB = 1>(x, w43)\n y = Add(a, ruled) }",
    "random numbers": V + "{ a = RandomNormalLike<seed = 1.0>(v4)\n b = Mul(a, z0)\n y = Add(x, b) }",
    "another domain's Relu": V.replace("x)", "x)") + "{ a = com.microsoft.Gelu(x)\n y = Relu(a) }",
}
CONSTANTS = dict(
    z=np.zeros((2, 4), np.float32), **CONV, **BN3, gamma4=positive(4), s4=rand(4, 1, 1), row=rand(6), s3=rand(3, 1, 1),
    p=vec(0, 0, 1, 1, 0, 0, 1, 1), p3=vec(0, 0, 3, 3, 0, 0, 3, 3), half=one(0.5), pc=vec(0, 1, 0, 0, 0, 0, 0, 0),
    w34=rand(3, 4), v4=rand(4), s51=rand(5, 1), ruled4=one([0.5, -np.inf, 0.25, 1]),
    m24=rand(2, 4), one1=vec(1), last=vec(-1), hw=vec(2, 3), m23=vec(2, 3), s64=vec(64, 64),
    ruled=RULED_OUT, w43=rand(4, 3), by2=np.int64(2), at1=np.int64(1),
    z0=one(0), codes=RNG.integers(-8, 8, (4, 4)).astype(np.int8), scale=one(0.25),
)  # fmt: skip


@pytest.mark.parametrize("title", UNTOUCHED)
def test_what_is_not_exact_stays(title):
    text = UNTOUCHED[title].replace("com.microsoft", "my.ops")
    model = build(text, **{k: v for k, v in CONSTANTS.items() if k in text and f"{k} = " not in text})
    graph = og.load(model)
    before = ops(graph)
    counts = prepare(graph)
    assert ops(graph) == before, counts
    if "my.ops" not in text:
        assert difference(model, og.to_model(graph)) == 0


def test_shared_weights_stay_shared_and_their_norms_stay():
    text = """(float[N,3,8,8] x) => (float[N,3,A,B] y) {
        a = Conv(x, w)
        n = BatchNormalization(a, gamma, beta, mean, var)
        c = Conv(n, w)
        d = Mul(c, s)
        e = Relu(d)
        y = Add(e, s)
    }"""
    graph = prepared(build(text, w=rand(3, 3, 3, 3), s=rand(3, 1, 1), **BN3))
    weights = {id(n.inputs[1]) for n in graph.nodes if n.op == "Conv"}
    assert len(weights) == 1
    assert "BatchNormalization" in ops(graph)


def test_rewritten_layers_keep_the_names_users_know():
    model = build(
        "(float[N,3] x) => (float[N,4] y, float[N,4] z) { a = MatMul(x, w)\n b = Add(a, b0)\n c = Mul(b, s)\n y = Relu(c)\n"
        " d = Gemm<alpha = 0.5>(x, v, b1)\n z = Gemm<transB = 1>(d, v2, b1) }",
        w=rand(3, 4), v=rand(3, 4), v2=rand(4, 4), b0=rand(1, 4), b1=rand(4), s=positive(4),
    )  # fmt: skip
    for node, name in zip(model.graph.node, ("dense", "add", "scale", "relu", "half", "last"), strict=True):
        node.name = name
    graph = og.load(model)
    prepare(graph)
    layers = [(n.name, n.inputs[1].name, n.inputs[2].name) for n in graph.nodes if n.op == "Gemm"]
    assert [layer[:2] for layer in layers] == [("dense", "w"), ("half", "v"), ("last", "v2")]
    assert layers[0][2] == "b0"
    assert sorted(bias == "b1" for _, _, bias in layers[1:]) == [False, True]  # one bias became two: one keeps its name
    names = [t.name for t in og.tensors_of(graph)]
    assert len(names) == len(set(names))
    assert difference(model, og.to_model(graph)) < 1e-5


def test_a_mask_that_is_subtracted_is_split_off_too():
    model = build(GEMM4 + "{ a = Gemm(x, w)\n y = Sub(a, b) }", w=rand(3, 4), b=-RULED_OUT)
    graph = og.load(model)
    prepare(graph)
    assert ops(graph) == ["Gemm", "Add"]
    assert difference(model, og.to_model(graph)) < TOLERANCE
    assert not any(prepare(graph).values())


def test_equal_gemm_weights_stay_shared_after_normalizing():
    text = V + "{ a = Gemm(x, w, b)\n c = Relu(a)\n d = Gemm(c, w, b)\n e = Relu(d)\n y = Gemm<alpha = 2.0>(e, w) }"
    graph = prepared(build(text, w=rand(4, 4), b=rand(4)))
    gemms = [n for n in graph.nodes if n.op == "Gemm"]
    assert gemms[0].inputs[1] is gemms[1].inputs[1]
    assert gemms[0].inputs[1] is not gemms[2].inputs[1]
    assert gemms[0].inputs[2] is not gemms[1].inputs[2]


def test_a_missing_bias_stays_missing():
    text = """(float[N,3,8,8] x) => (float[N,5] y) {
        a = Conv(x, w)
        b = Relu(a)
        c = ReduceMean<keepdims = 0>(b, t)
        y = Gemm(c, v)
    }"""
    graph = prepared(build(text, w=CONV["w"], t=vec(2, 3), v=rand(4, 5)))
    assert [len(n.inputs) for n in graph.nodes if n.op in ("Conv", "Gemm")] == [2, 2]


def test_second_outputs_are_not_lost():
    text = "(float[N,4] x) => (float[N,4] y, bool[N,4] m) { a = Relu(x)\n y, m = Dropout(a) }"
    assert ops(prepared(build(text))) == ["Relu", "Dropout"]


def test_empty_attributes_are_converted_with_their_node():
    model = build(V + "{ a = ReduceSum(x)\n y = Mul(x, a) }", opset=11)
    model.graph.node[0].attribute.append(helper.make_attribute("axes", [], attr_type=onnx.AttributeProto.INTS))
    graph = og.load(model)
    prepare(graph)
    assert difference(model, og.to_model(graph)) < TOLERANCE


def test_a_consumer_in_a_subgraph_counts():
    text = (
        V
        + """{
        a = Gemm(x, w, b)
        n = Mul(a, two)
        s = ReduceSum<keepdims = 0>(x)
        c = Less(s, zero)
        y = If (c) <then_branch = t () => (float[N,4] p) { p = Neg(a) },
                    else_branch = e () => (float[N,4] q) { q = Add(n, a) }>
    }"""
    )
    model = build(text, w=rand(4, 4), b=rand(4), two=one(2), zero=one(0))
    assert "Mul" in ops(prepared(model))


# ------------------------------------------------------------------------------------------------- composed patterns


def test_a_tensorflow_block_becomes_plain():
    body = f"""(float[N,8,8,3] x) => (float[N,5] y) {{
        k0 = Reshape(k, ks)
        w = Transpose<perm = [3, 2, 0, 1]>(k0)
        a = {TO}(x)
        b = Conv<auto_pad = "SAME_UPPER">(a, w)
        c = {BACK}(b)
        d = Add(c, bias)
        e = {TO}(d)
        f = BatchNormalization(e, gamma, beta, mean, var)
        g = {BACK}(f)
        h = Relu(g)
        i = {TO}(h)
        j = Conv<pads = [1, 1, 1, 1]>(i, w2)
        l = {BACK}(j)
        m = Mul(l, scale)
        n = Add(m, h)
        gap = ReduceMean<keepdims = 0>(n, hw)
        s1 = Reshape(gap, se)
        s2 = {TO}(s1)
        s3 = Conv(s2, w3)
        s4 = {BACK}(s3)
        s5 = Sigmoid(s4)
        r = Mul(n, s5)
        o = {TO}(r)
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(o)
        q = {BACK}(p)
        s = Reshape(q, flat)
        t = MatMul(s, v)
        y = Add(t, vb)
    }}"""
    model = build(
        body, k=rand(3, 3, 3, 4), ks=vec(3, 3, 3, 4), bias=rand(4), **BN, w2=rand(4, 4, 3, 3), scale=rand(4),
        hw=vec(1, 2), se=vec(-1, 1, 1, 4), w3=rand(4, 4, 1, 1), flat=vec(-1, 64), v=rand(64, 5), vb=rand(5),
    )  # fmt: skip
    counts = Counter(ops(prepared(model)))
    assert counts["Transpose"] == 1
    assert counts["BatchNormalization"] == 0
    assert (counts["Conv"], counts["Gemm"], counts["Add"], counts["Mul"]) == (3, 1, 1, 1)


def test_names_metadata_and_documentation_survive():
    model = build(V + "{ a = Identity(x)\n b = MatMul(a, w)\n c = Add(b, bias)\n y = Relu(c) }", opset=13,
                  w=rand(4, 4), bias=rand(4))  # fmt: skip
    helper.set_model_props(model, {"k": "v"})
    model.graph.node[3].name, model.graph.node[3].doc_string = "last", "the last node"
    helper.set_metadata_props(model.graph.node[3], {"n": "1"})
    graph = og.load(model)
    prepare(graph)
    result = og.to_model(graph)
    assert [n.op_type for n in result.graph.node] == ["Gemm", "Relu"]
    assert (result.graph.node[1].name, result.graph.node[1].doc_string) == ("last", "the last node")
    assert result.graph.node[1].metadata_props[0].key == "n"
    assert result.metadata_props[0].value == "v"
    assert result.ir_version == 10


# ------------------------------------------------------------------------------------------------------------- opsets

OLD = {
    "7 BatchNormalization": (7, M, "y = BatchNormalization<spatial = 1>(x, gamma, beta, mean, var)"),
    "7 Dropout": (7, M, "a = Dropout<ratio = 0.4>(x)\n y = Relu(a)"),
    "10 Dropout": (10, M, "a, m = Dropout<ratio = 0.4>(x)\n y = Relu(a)"),
    "7 Upsample": (7, M, 'y = Upsample<mode = "nearest", scales = [1.0, 1.0, 2.0, 2.0]>(x)'),
    "7 Upsample linear": (7, M, 'y = Upsample<mode = "linear", scales = [1.0, 1.0, 2.0, 2.0]>(x)'),
    "9 Upsample": (9, M, 'y = Upsample<mode = "nearest">(x, up)'),
    "9 Upsample linear": (9, M, 'y = Upsample<mode = "linear">(x, up)'),
    "10 Resize": (10, M, 'y = Resize<mode = "nearest">(x, down)'),
    "10 Resize linear": (10, M, 'y = Resize<mode = "linear">(x, up)'),
    "11 Resize": (11, M, 'y = Resize<mode = "nearest">(x, roi, up)'),
    "7 Slice": (7, M, "y = Slice<starts = [1, 0], ends = [3, 2], axes = [1, 2]>(x)"),
    "10 Slice": (10, M, "y = Slice(x, i1, i2, i3)"),
    "7 Squeeze": (7, M, "a = ReduceMax<axes = [2, 3]>(x)\n y = Squeeze<axes = [2, 3]>(a)"),
    "11 Unsqueeze": (11, M, "y = Unsqueeze<axes = [-1, 0]>(x)"),
    "7 ReduceSum": (7, M, "y = ReduceSum<axes = [2, 3], keepdims = 0>(x)"),
    "17 ReduceMean": (17, M, "y = ReduceMean<axes = [2, 3], keepdims = 0>(x)"),
    "7 Clip": (7, M, "y = Clip<min = -0.5>(x)"),
    "11 Clip": (11, M, "y = Clip(x, low, high)"),
    "7 Pad": (7, M, "y = Pad<pads = [0, 0, 1, 1, 0, 0, 2, 2], value = 0.3>(x)"),
    "7 Pad reflect": (7, M, 'y = Pad<mode = "reflect", pads = [0, 0, 1, 1, 0, 0, 2, 2]>(x)'),
    "11 Pad": (11, M, "y = Pad(x, pads)"),
    "7 Softmax": (7, M, "y = Softmax(x)"),
    "11 Softmax axis 2": (11, M, "y = Softmax<axis = 2>(x)"),
    "12 Softmax last": (12, M, "y = Softmax<axis = -1>(x)"),
    "7 LogSoftmax": (7, M, "y = LogSoftmax<axis = 1>(x)"),
    "7 Split": (7, M, "a, b = Split<axis = 3, split = [3, 5]>(x)\n y = Concat<axis = 3>(b, a)"),
    "13 Split": (13, M, "a, b = Split<axis = 3>(x)\n y = Concat<axis = 3>(b, a)"),
    "9 TopK": (9, M, "y, i = TopK<k = 2>(x)"),
    "9 AveragePool": (9, M, "y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1>(x)"),
    "9 Scatter": (9, "(float[2,3] x) => (float[2,3] y)", "y = Scatter<axis = 0>(x, si, su)"),
    "11 Hardmax": (11, "(float[N,4] x) => (float[N,4] y)", "y = Hardmax(x)"),
    "16 GridSample": (16, "(float[1,3,4,4] x, float[1,2,2,2] r) => (float[1,3,2,2] y)",
                      'y = GridSample<mode = "bilinear">(x, r)'),
    "17 LayerNormalization": (17, M, "y = LayerNormalization(x, ln)"),
    "20 Gelu": (20, M, "y = Gelu(x)"),
}  # fmt: skip
OLD_CONSTANTS = dict(
    **BN3, up=one([1, 1, 2, 2]), down=one([1, 1, 0.7, 0.7]), roi=np.zeros(0, np.float32), i1=vec(1), i2=vec(-1),
    i3=vec(3), low=one(-0.5), high=one(0.5), pads=vec(0, 0, 1, 1, 0, 0, 2, 2), si=np.array([[1, 0, 1]]), su=rand(1, 3),
    ln=rand(8),
)  # fmt: skip


def old_model(title: str) -> onnx.ModelProto:
    opset, signature, body = OLD[title]
    names = {name for name in OLD_CONSTANTS if f" {name}" in body}
    model = build(signature.replace("[N,3,8,8] y", "[P,Q,R,S] y") + "{" + body + "}", opset=opset,
                  **{k: OLD_CONSTANTS[k] for k in names})  # fmt: skip
    model.graph.output[0].type.tensor_type.ClearField("shape")
    del model.opset_import[1:]
    return model


@pytest.mark.parametrize("title", OLD)
def test_old_operators_keep_their_meaning(title):
    model = old_model(title)
    graph = og.load(model)
    to_opset(graph)
    result = og.to_model(graph)
    assert result.opset_import[0].version == 21
    assert difference(model, result) < 1e-6
    prepare(graph)
    assert difference(model, og.to_model(graph)) < TOLERANCE


@pytest.mark.parametrize("opset", og.OPSETS)
def test_every_opset_comes_to_21(opset):
    body = "(float[N,3,8,8] x) => (float[N,4] y) { a = Conv<pads = [1, 1, 1, 1]>(x, w, b)\n c = Relu(a)\n" \
           " d = GlobalAveragePool(c)\n e = Flatten(d)\n y = Gemm(e, v, u) }"  # fmt: skip
    model = build(body, opset=opset, **CONV, v=rand(4, 4), u=rand(4))
    graph = og.load(model)
    prepare(graph)
    assert graph.opset == 21
    assert difference(model, og.to_model(graph)) < TOLERANCE


def test_newer_types_keep_their_opset():
    graph = og.load(build(V + "{ a = Cast<to = 24>(x)\n y = Cast<to = 1>(a) }", opset=25))
    prepare(graph)
    assert graph.opset == 25


@pytest.mark.parametrize(("opset", "line"), [(23, "y = RMSNormalization(x, scale)"), (24, "y = Swish<alpha = 1.5>(x)")])
def test_operators_of_newer_opsets_become_older_ones(opset, line):
    model = build(V + "{" + line + "}", opset=opset, **({"scale": rand(4)} if "scale" in line else {}))
    graph = og.load(model)
    prepare(graph)
    assert graph.opset == 21
    assert difference(model, og.to_model(graph)) < TOLERANCE


def test_branches_are_converted_too_and_custom_nodes_pass():
    text = """(float[2,3,1] x) => (float[2,3] y) {
        s = ReduceSum<keepdims = 0>(x)
        z = Constant<value = float {0.0}>()
        c = Less(s, z)
        y = If (c) <then_branch = t () => (float[2,3] a) { a = Squeeze<axes = [2]>(x) },
                    else_branch = e () => (float[2,3] b) { q = Squeeze<axes = [2]>(x)
                                                           b = Neg(q) }>
    }"""
    model = build(text, opset=11)
    graph = og.load(model)
    prepare(graph)
    assert difference(model, og.to_model(graph)) == 0
    custom = build(
        "(float[2,3,1] x) => (float[2,3] y) { a = my.ops.F<k = 3>(x)\n y = Squeeze<axes = [2]>(a) }", opset=11
    )
    graph = og.load(custom)
    prepare(graph)
    result = og.to_model(graph)
    assert {o.domain: o.version for o in result.opset_import} == {"": 21, "my.ops": 1}
    assert result.graph.node[0].attribute[0].i == 3


YOUNG = {  # younger than opset 13, or with younger attributes: what is left, and the result
    "LayerNormalization(x, g)": "Mul",
    "LayerNormalization <epsilon = 0.1> (x, g, b)": "Add",
    "LayerNormalization <axis = 1> (x, m, m)": "Add",
    "LayerNormalization <axis = -2> (x, m)": "Mul",
    "GroupNormalization <num_groups = 2> (x, c, d)": "Add",
    "GroupNormalization <num_groups = 4, epsilon = 0.1> (x, c, d)": "Add",
    "Gelu(x)": "Mul",
    'Gelu <approximate = "tanh"> (x)': "Mul",
    "HardSwish(x)": "Mul",
    "Mish(x)": "Mul",
    "Reshape <allowzero = 1> (x, flat)": "Reshape",
    'Resize <mode = "linear", keep_aspect_ratio_policy = "stretch"> (x, , twice)': "Resize",
    "Expand(one, part)": "Expand",
    "Reshape <allowzero = 1> (x, joined)": "Reshape",
}


@pytest.mark.parametrize("call", YOUNG)
def test_young_operators_compute_the_same_in_pieces(call):
    text = (
        "(float[N,4,6] x) => (float[A,B,C] y) { part = Shape <start = 1, end = 3> (x)\n batch = Shape <end = 1> (x)\n"
        " joined = Concat <axis = 0> (batch, ends)\n y = " + call + " }"
    )
    constants = {
        "g": rand(6),
        "b": rand(6),
        "m": rand(4, 6),
        "c": rand(4),
        "d": rand(4),
        "flat": vec(-1, 3, 8),
        "ends": vec(2, 12),
        "one": rand(2, 1, 1),
    }
    constants["twice"] = np.array([1, 1, 2], np.float32)
    model = build(text, opset=21, **{name: value for name, value in constants.items() if name in text})
    graph = og.load(model)
    prepare(graph)
    lower_opset(graph, 13)
    lowered = og.to_model(graph, ir_version=8)
    onnx.checker.check_model(lowered, full_check=True)
    assert lowered.opset_import[0].version == 13
    assert lowered.graph.node[-1].op_type == YOUNG[call]
    assert difference(model, lowered) < 1e-6


@pytest.mark.parametrize("equation", ["bic,co->bio", "bic,chd->bhid", "bic,c->bi"])
def test_the_product_of_an_einsum_keeps_its_name(equation):
    shape = {"bic,co->bio": (4, 5), "bic,chd->bhid": (4, 2, 5), "bic,c->bi": (4,)}[equation]
    out = "[N,3,5]" if len(shape) == 2 else "[N,2,3,5]" if len(shape) == 3 else "[N,3]"
    text = f'(float[N,3,4] x) => (float{out} y) {{ y = Einsum<equation = "{equation}">(x, w) }}'
    model = build(text, w=rand(*shape))
    model.graph.node[0].name = "projection"
    graph = og.load(model)
    prepare(graph)
    assert [node.op for node in graph.nodes if node.name == "projection"] == ["MatMul"]
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)


def test_unread_outputs_of_a_normalization_do_not_keep_it():
    model = build(V + "{ y, mean, deviation = LayerNormalization(x, g) }", opset=21, g=rand(4))
    graph = og.load(model)
    lower_opset(graph, 13)
    lowered = og.to_model(graph, ir_version=8)
    onnx.checker.check_model(lowered, full_check=True)
    assert difference(model, lowered) < 1e-6


def test_young_operators_in_a_branch_are_named():
    branch = parser.parse_graph("b () => (float[N,4] u) { u = HardSwish(x) }")
    model = build("(float[N,4] x, bool c) => (float[N,4] y) { y = Relu(x) }", opset=21)
    node = helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch, else_branch=branch)
    del model.graph.node[:]
    model.graph.node.append(node)
    graph = og.load(model)
    with pytest.raises(ModelError, match="HardSwish"):
        lower_opset(graph, 13)


def test_group_normalization_gets_scales_per_channel():
    text = "(float[N,4,6] x) => (float[N,4,6] y) { y = GroupNormalization<num_groups = 2>(x, s, b) }"
    scale, bias = rand(2), rand(2)
    graph = og.load(build(text, opset=18, s=scale, b=bias))
    prepare(graph)
    feeds = feeds_for(build(text, opset=18))
    x = feeds["x"].reshape(2, 2, -1)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale[:, None] + bias[
        :, None
    ]
    np.testing.assert_allclose(run(og.to_model(graph), feeds)[0], expected.reshape(2, 4, 6), atol=1e-5)


def test_what_has_no_newer_form_is_named():
    wide = build(M + "{ y = Hardmax<axis = 1>(x) }", opset=11)
    with pytest.raises(ModelError, match=r"1 nodes cannot be converted from opset 11 to 21: 'Hardmax' Hardmax over"):
        prepare(og.load(wide))
    model = build(
        M + "{ a = Relu(x)\n y = BatchNormalization<spatial = 0>(a, g, g, g, g) }", opset=7, g=positive(3, 8, 8)
    )
    with pytest.raises(ModelError, match="'BatchNormalization' BatchNormalization with spatial = 0"):
        prepare(og.load(model))


# ------------------------------------------------------------------------------------------------------ random graphs

STEPS: list[tuple[str, Callable[[str, str, int], str], dict[str, Any]]] = [
    ("relu", lambda a, b, i: f"{b} = Relu({a})", {}),
    ("identity", lambda a, b, i: f"{b} = Identity({a})", {}),
    ("transpose", lambda a, b, i: f"{b}t = {BACK}({a})\n {b}u = Relu({b}t)\n {b} = {TO}({b}u)", {}),
    ("nhwc bias", lambda a, b, i: f"{b}t = {BACK}({a})\n {b}u = Add({b}t, s{i})\n {b} = {TO}({b}u)", {"s": (3,)}),
    ("conv", lambda a, b, i: f"{b} = Conv<pads = [1, 1, 1, 1]>({a}, w{i})", {"w": (3, 3, 3, 3)}),
    ("depthwise", lambda a, b, i: f"{b} = Conv<group = 3>({a}, w{i}, c{i})", {"w": (3, 1, 1, 1), "c": (3,)}),
    ("norm", lambda a, b, i: f"{b} = BatchNormalization({a}, g{i}, h{i}, m{i}, r{i})",
     {"g": (3,), "h": (3,), "m": (3,), "r": (3,)}),
    ("scale", lambda a, b, i: f"{b} = Mul({a}, s{i})", {"s": (3, 1, 1)}),
    ("shift", lambda a, b, i: f"{b} = Sub(s{i}, {a})", {"s": (1, 3, 1, 1)}),
    ("self", lambda a, b, i: f"{b} = Add({a}, x)", {}),
    ("double", lambda a, b, i: f"{b} = Mul({a}, {a})", {}),
    ("shape", lambda a, b, i: f"{b}s = Shape({a})\n {b}r = Reshape({a}, {b}s)\n {b} = Neg({b}r)", {}),
    ("pad", lambda a, b, i: f"{b}p = Pad({a}, p2)\n {b} = Conv({b}p, w{i})", {"w": (3, 3, 3, 3)}),
    ("pool", lambda a, b, i: f"{b}p = Pad({a}, p2)\n {b} = AveragePool<kernel_shape = [3, 3]>({b}p)", {}),
    ("gate", lambda a, b, i: f"{b}m = ReduceMean({a}, hw)\n {b}g = Sigmoid({b}m)\n {b} = Mul({a}, {b}g)", {}),
    ("softmax", lambda a, b, i: f"{b}t = {BACK}({a})\n {b}u = Softmax<axis = 3>({b}t)\n {b} = {TO}({b}u)", {}),
    ("hardswish", lambda a, b, i: f"{b}a = Add({a}, n3)\n {b}b = Clip({b}a, n0, n6)\n {b}c = Mul({b}b, {a})\n"
     f" {b} = Div({b}c, n6)", {}),
]  # fmt: skip
ENDS = {
    "map": ("float[N,3,6,6] y", "y = Relu(LAST)"),
    "gap": ("float[N,3] y", "y = ReduceMean<keepdims = 0>(LAST, hw)"),
    "flat": ("float[N,5] y", "f = Reshape(LAST, flat)\n a = MatMul(f, wd)\n y = Add(a, bd)"),
    "nhwc flat": ("float[N,5] y", f"t = {BACK}(LAST)\n f = Reshape(t, flat)\n a = MatMul(f, wd)\n y = Add(a, bd)"),
}


@st.composite
def random_models(draw: st.DrawFn) -> onnx.ModelProto:
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    lines, last = [], "x"
    constants: dict[str, Any] = {
        "p2": vec(0, 0, 1, 1, 0, 0, 1, 1), "hw": vec(2, 3), "flat": vec(-1, 108),
        "n0": one(0), "n3": one(3), "n6": one(6),
        "wd": rng.standard_normal((108, 5)).astype(np.float32), "bd": rng.standard_normal(5).astype(np.float32),
    }  # fmt: skip
    for i, (_, text, shapes) in enumerate(draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=7))):
        earlier = draw(st.sampled_from([last, last, "x", *(f"v{j}" for j in range(i))]))
        lines.append(text(earlier if draw(st.booleans()) else last, f"v{i}", i))
        last = f"v{i}"
        for name, shape in shapes.items():
            values = rng.random(shape) + 0.5 if name == "r" else rng.standard_normal(shape) / 2
            constants[f"{name}{i}"] = values.astype(np.float32)
    signature, end = ENDS[draw(st.sampled_from(sorted(ENDS)))]
    body = "\n ".join([*lines, end.replace("LAST", last)])
    return build(f"(float[N,3,6,6] x) => ({signature}) {{ {body} }}", **constants)


@settings(max_examples=150, deadline=None)
@given(random_models())
def test_random_graphs_compute_the_same(model):
    graph = og.load(model)
    prepare(graph)
    result = exported(graph)
    assert difference(model, result) < 5e-5
    assert interface(result) == interface(model)
    assert len(result.graph.node) <= len(og.load(model).nodes) + 1
    assert not any(prepare(graph).values())


# --------------------------------------------------------------------------------------------------------------- beds

FOLDER = os.environ.get("ONNX_EPTQ_BEDS", "")
BEDS = sorted(Path(FOLDER).glob("**/*.onnx")) if FOLDER else []


@pytest.mark.beds
@pytest.mark.skipif(not FOLDER, reason="ONNX_EPTQ_BEDS names no folder")
@pytest.mark.parametrize("path", BEDS, ids=lambda p: p.stem)
def test_bed_models_compute_the_same(path):
    model = onnx.load(path)
    graph = og.load(path)
    prepare(graph)
    result = exported(graph)
    assert difference(model, result) < 1e-4
    assert interface(result) == interface(model)
    assert len(graph.nodes) <= len(og.load(path).nodes)
    assert not any(prepare(graph).values())


@pytest.mark.beds
@pytest.mark.skipif(not FOLDER, reason="ONNX_EPTQ_BEDS names no folder")
@pytest.mark.parametrize("path", [p for p in BEDS if p.stem.endswith("_raw")], ids=lambda p: p.stem)
def test_raw_exports_come_out_like_clean_ones(path):
    raw, clean = og.load(path), og.load(path.with_name(path.name.replace("_raw", "")))
    prepare(raw)
    prepare(clean)
    found, wanted = Counter(ops(raw)), Counter(ops(clean))
    assert found["Transpose"] <= 1
    assert found["BatchNormalization"] == 0
    found.pop("Transpose", None)
    assert found == wanted
