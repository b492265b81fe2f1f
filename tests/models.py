"""Tiny models of many architectures, and the way from one of them to its quantized file."""

from __future__ import annotations

import copy
import functools
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import torch
from onnx import numpy_helper, parser

from onnx_eptq import graph as og
from onnx_eptq.calibrate import Stats, calibrate, feed, fit_biases, observe
from onnx_eptq.eptq import Problem
from onnx_eptq.grid import Quantized
from onnx_eptq.methods import METHODS, Effort, Method
from onnx_eptq.mirror import Mirror, build
from onnx_eptq.plan import Layer, Plan, Rules, linear_layers, make_plan
from onnx_eptq.prepare import prepare
from onnx_eptq.targets import TARGETS, Target
from onnx_eptq.write import write

torch.set_num_threads(1)

ORT_TARGET = TARGETS["onnxruntime"]
Feed = dict[str, np.ndarray]


def parse(text: str, *, opset: int = 21, **constants: Any) -> onnx.ModelProto:
    """Parse the body of a graph; the keyword arguments become initializers."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return model


def weights(seed: int) -> Weights:
    """Return a function from a shape to weights that keep a layer's output at about unit size."""
    return Weights(seed)


class Weights:
    """Draws one weight after another; from the start again where a test asks for it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.restart()

    def restart(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def __call__(self, *shape: int, fan: int | None = None) -> np.ndarray:
        fan = fan or max(int(np.prod(shape[1:])), 1)
        return (self.rng.standard_normal(shape) * np.sqrt(2 / fan)).astype(np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {}


def model(function: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
    MODELS[function.__name__] = function
    return function


@model
def residual() -> onnx.ModelProto:
    """Two convolutions (stride 2 in the first), a skip connection, a classifier."""
    w = weights(1)
    return parse(
        """(float[N,3,8,8] image) => (float[N,5] logits) {
          a = Conv <pads=[1,1,1,1], strides=[2,2]> (image, w1, b1)
          b = Relu(a)
          c = Conv <pads=[1,1,1,1]> (b, w2, b2)
          d = Add(c, b)
          e = Relu(d)
          f = GlobalAveragePool(e)
          g = Flatten(f)
          logits = Gemm <transB=1> (g, w3, b3)
        }""",
        w1=w(6, 3, 3, 3),
        b1=w(6, fan=20),
        w2=w(6, 6, 3, 3),
        b2=w(6, fan=20),
        w3=w(5, 6),
        b3=w(5, fan=20),
    )


@model
def depthwise() -> onnx.ModelProto:
    """A MobileNet block: Clip(0, 6), asymmetric pads, depthwise and pointwise convolutions."""
    w = weights(2)
    return parse(
        """(float[N,3,7,7] image) => (float[N,4,4,4] features) {
          a = Conv <pads=[1,1,1,1]> (image, w1, b1)
          b = Clip(a, zero, six)
          c = Conv <group=8, pads=[0,0,1,1], strides=[2,2]> (b, w2, b2)
          d = Clip(c, zero, six)
          features = Conv(d, w3, b3)
        }""",
        w1=w(8, 3, 3, 3) * 2,
        b1=w(8, fan=10),
        w2=w(8, 1, 2, 2) * 2,
        b2=w(8, fan=10),
        w3=w(4, 8, 1, 1),
        b3=w(4, fan=10),
        zero=scalar(0),
        six=scalar(6),
    )


@model
def gemm() -> onnx.ModelProto:
    """Gemm with the weight stored either way round; as many inputs as outputs, so that no axis is told by its size."""
    w = weights(3)
    return parse(
        """(float[N,6] x) => (float[N,6] y) {
          a = Gemm <transB=1> (x, w1, b1)
          b = Relu(a)
          y = Gemm(b, w2, b2)
        }""",
        w1=w(6, 6),
        b1=w(6, fan=10),
        w2=w(6, 6),
        b2=w(6, fan=10),
    )


@model
def matmul() -> onnx.ModelProto:
    """A token-wise perceptron: MatMul + 1-D Add, no bias, Softmax over tokens."""
    w = weights(4)
    return parse(
        """(float[N,4,6] tokens) => (float[N,4,5] shares) {
          a = MatMul(tokens, w1)
          b = Add(a, b1)
          c = Relu(b)
          d = MatMul(c, w2)
          e = Add(b2, d)
          f = MatMul(e, w3)
          shares = Softmax <axis=-1> (f)
        }""",
        w1=w(6, 8, fan=6),
        b1=w(8, fan=10),
        w2=w(8, 8),
        b2=w(8, fan=10),
        w3=w(8, 5, fan=8),
    )


@model
def attention() -> onnx.ModelProto:
    """One head of attention between two LayerNormalizations: products of activations, a scaling constant, Transpose."""
    w = weights(5)
    return parse(
        """(float[N,4,6] tokens) => (float[N,4,6] mixed) {
          n = LayerNormalization <axis=-1> (tokens, g1, h1)
          q = MatMul(n, wq)
          k = MatMul(n, wk)
          v = MatMul(n, wv)
          t = Transpose <perm=[0,2,1]> (k)
          s = MatMul(q, t)
          r = Mul(s, root)
          p = Softmax <axis=-1> (r)
          o = MatMul(p, v)
          m = Add(o, tokens)
          u = Add(m, position)
          mixed = LayerNormalization <axis=-1> (u, g2, h2)
        }""",
        g1=f32(1, 0.9, 1.1, 1, 0.8, 1.2),
        h1=f32(0, 0.1, -0.1, 0, 0.2, 0),
        g2=f32(1, 0.7, 1.1, 1, 0.8, 1),
        h2=f32(0.3, 0.1, -0.1, 0, 0, 0),
        wq=w(6, 6),
        wk=w(6, 6),
        wv=w(6, 6),
        root=scalar(6**-0.5),
        position=w(4, 6, fan=10),
    )


@model
def pooling() -> onnx.ModelProto:
    """MaxPool and Reshape keep their input's grid, AveragePool does not; two outputs."""
    w = weights(6)
    return parse(
        """(float[N,3,8,8] image) => (float[N,32] flat, float[N,8,1,1] mean) {
          a = Conv <pads=[1,1,1,1]> (image, w1, b1)
          b = Relu(a)
          c = MaxPool <kernel_shape=[2,2], strides=[2,2]> (b)
          d = AveragePool <kernel_shape=[2,2], strides=[2,2]> (c)
          flat = Reshape(d, shape)
          mean = GlobalAveragePool(c)
        }""",
        w1=w(8, 3, 3, 3),
        b1=w(8, fan=10),
        shape=i64(-1, 32),
    )


@model
def concat() -> onnx.ModelProto:
    """Concat of two branches that it alone reads (the second is computed first), then a convolution."""
    w = weights(7)
    return parse(
        """(float[N,3,6,6] image) => (float[N,4,6,6] out) {
          a = Conv <pads=[1,1,1,1]> (image, w1, b1)
          left = Relu(a)
          b = Conv(image, w2, b2)
          right = Relu(b)
          joined = Concat <axis=1> (right, left)
          out = Conv(joined, w3)
        }""",
        w1=w(4, 3, 3, 3),
        b1=w(4, fan=10),
        w2=w(3, 3, 1, 1) * 3,
        b2=w(3, fan=10),
        w3=w(4, 7, 1, 1),
    )


@model
def activations() -> onnx.ModelProto:
    """LeakyRelu, HardSwish, and a squeeze-and-excitation gate (Sigmoid, Mul)."""
    w = weights(8)
    return parse(
        """(float[N,3,6,6] image) => (float[N,4,6,6] out) {
          a = Conv <pads=[1,1,1,1]> (image, w1, b1)
          b = LeakyRelu <alpha=0.1> (a)
          c = Conv(b, w2, b2)
          d = HardSwish(c)
          e = GlobalAveragePool(d)
          f = Conv(e, w3, b3)
          g = Sigmoid(f)
          out = Mul(d, g)
        }""",
        w1=w(4, 3, 3, 3),
        b1=w(4, fan=10),
        w2=w(4, 4, 1, 1),
        b2=w(4, fan=10),
        w3=w(4, 4, 1, 1),
        b3=w(4, fan=10),
    )


@model
def transposed() -> onnx.ModelProto:
    """ConvTranspose, plain and grouped."""
    w = weights(9)
    return parse(
        """(float[N,4,4,4] x) => (float[N,4,9,9] y) {
          a = ConvTranspose <strides=[2,2]> (x, w1, b1)
          b = Relu(a)
          y = ConvTranspose <group=2, pads=[1,1,1,1]> (b, w2, b2)
        }""",
        w1=w(4, 6, 3, 3, fan=18),
        b1=w(6, fan=10),
        w2=w(6, 2, 3, 3, fan=27),
        b2=w(4, fan=10),
    )


@model
def two_towers() -> onnx.ModelProto:
    """Two inputs through one weight and one bias, two outputs, one of them an inner value."""
    w = weights(10)
    return parse(
        """(float[N,6] left, float[N,6] right) => (float[N,5] distance, float[N,5] code) {
          a = Gemm <transB=1> (left, shared, offset)
          code = Relu(a)
          b = Gemm <transB=1> (right, shared, offset)
          c = Relu(b)
          distance = Sub(code, c)
        }""",
        shared=w(5, 6),
        offset=w(5, fan=10),
    )


@model
def moves() -> onnx.ModelProto:
    """Operators that only move data; one Pad fills with zero, one with something else."""
    w = weights(11)
    return parse(
        """(float[N,4,6,6] x) => (float[N,3,8,8] y, float[N,4,9] z) {
          a = Conv <pads=[1,1,1,1]> (x, w1, b1)
          b = Transpose <perm=[0,2,3,1]> (a)
          c = Slice(b, from, to, axes)
          d = Transpose <perm=[0,3,1,2]> (c)
          e, f = Split <axis=1> (d, sizes)
          g = Pad(e, pads, filler)
          h = Pad(e, pads)
          i = Conv(g, w2)
          y = Add(i, h)
          j = Unsqueeze(f, one)
          k = Squeeze(j, one)
          l = Expand(k, grown)
          m = MaxPool <kernel_shape=[2,2], strides=[2,2]> (l)
          z = Reshape(m, flat)
        }""",
        w1=w(4, 4, 3, 3),
        b1=w(4, fan=10),
        w2=w(3, 3, 1, 1),
        to=i64(6, 6),
        axes=i64(1, 2),
        sizes=i64(3, 1),
        pads=i64(0, 0, 1, 1, 0, 0, 1, 1),
        filler=scalar(1.5),
        one=i64(1),
        grown=i64(1, 4, 1, 1),
        flat=i64(0, 4, 9),
        **{"from": i64(0, 0)},
    )


@model
def spectrogram() -> onnx.ModelProto:
    """Power spectrum and its logarithm: float, but the transform's weights are quantized; then a classifier."""
    w = weights(12)
    return parse(
        """(float[N,16] wave) => (float[N,4] logits) {
          re = MatMul(wave, cosines)
          im = MatMul(wave, sines)
          re2 = Mul(re, re)
          im2 = Mul(im, im)
          power = Add(re2, im2)
          safe = Add(power, tiny)
          log = Log(safe)
          half = Mul(log, scaling)
          logits = Gemm(half, w1, b1)
        }""",
        cosines=w(16, 9),
        sines=w(16, 9),
        tiny=scalar(1e-3),
        scaling=scalar(0.5),
        w1=w(9, 4, fan=9),
        b1=w(4, fan=10),
    )


@model
def images1d() -> onnx.ModelProto:
    """A 1-D convolution with dilation, a global maximum, a fixed batch of one."""
    w = weights(13)
    return parse(
        """(float[1,2,12] wave) => (float[1,3] y) {
          a = Conv <dilations=[2], pads=[2,2]> (wave, w1, b1)
          b = Relu(a)
          c = GlobalMaxPool(b)
          d = Flatten(c)
          y = Gemm(d, w2)
        }""",
        w1=w(4, 2, 3),
        b1=w(4, fan=10),
        w2=w(4, 3),
    )


def feeds(proto: onnx.ModelProto, *, batch: int = 8, count: int = 2, seed: int = 0) -> list[Feed]:
    """Random batches for a model's inputs; N is `batch`."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        row = {}
        for value in proto.graph.input:
            shape = [d.dim_value or batch for d in value.type.tensor_type.shape.dim]
            row[value.name] = rng.standard_normal(shape).astype(np.float32)
        found.append(row)
    return found


def run_ort(
    proto: onnx.ModelProto, feed: Mapping[str, np.ndarray], names: list[str] | None = None, level: str = "DISABLE_ALL"
) -> dict[str, np.ndarray]:
    """Outputs (or other values) by name."""
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if names:
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        known = {output.name for output in proto.graph.output}
        changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        proto = changed
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = names or [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def collapsed() -> onnx.ModelProto:
    """An attention over the six rows of the one sample that the model takes: no axis of samples is left within."""
    draw = weights(3)
    return parse(
        """(float[1,6,8] x) => (float[1,3] y) {
          f = Reshape(x, rows) q = MatMul(f, a) t = Transpose <perm=[1,0]> (f) s = MatMul(q, t) p = Softmax <axis=-1> (s)
          m = MatMul(p, f) h = Gemm(m, b, c) r = Relu(h) g = ReduceMean <keepdims=1> (r, first) y = MatMul(g, d) }""",
        rows=np.array([6, 8]), a=draw(8, 8), b=draw(8, 16), c=f32(*[0.1] * 16), first=np.array([0]), d=draw(16, 3),
    )  # fmt: skip


def one_image() -> onnx.ModelProto:
    """A small CNN of two outputs that takes one image, and flattens it to rows that are no samples."""
    draw = weights(4)
    return parse(
        """(float[1,3,6,6] x) => (float[1,4] y, float[1,2,6,6] map) {
          c = Conv <pads=[1,1,1,1]> (x, a, b) r = Relu(c) d = Conv <pads=[1,1,1,1], group=8> (r, e, b) s = Add(r, d)
          f = Reshape(s, rows) g = MatMul(f, h) k = Relu(g) m = ReduceMean <keepdims=1> (k, first) y = MatMul(m, w)
          map = Conv(r, maps) }""",
        a=draw(8, 3, 3, 3), b=f32(*[0.1] * 8), e=draw(8, 1, 3, 3), rows=np.array([8, 36]), h=draw(36, 12),
        first=np.array([0]), w=draw(12, 4), maps=draw(2, 8, 1, 1),
    )  # fmt: skip


def prepared(proto: onnx.ModelProto) -> gs.Graph:
    graph = og.load(proto)
    prepare(graph)
    return graph


@dataclass
class Case:
    """Everything there is on the way from a float model to its quantized file."""

    proto: onnx.ModelProto
    graph: gs.Graph
    plan: Plan
    layers: list[Layer]
    batches: list[Feed]
    teacher: Mirror
    stats: Stats
    student: Mirror
    quantized: dict[str, Quantized]
    written: onnx.ModelProto


def quantize(
    proto: onnx.ModelProto,
    rules: Rules | None = None,
    *,
    target: Target = ORT_TARGET,
    storage: Mapping[int, str] | None = None,
    method: str = "minmax",
    **options: Any,
) -> Case:
    """Quantize without any learning."""
    graph = prepared(proto)
    plan = make_plan(graph, target, rules)
    layers = linear_layers(graph)
    batches = feeds(proto)
    teacher = build(graph)
    stats = observe(teacher, plan, layers, batches)
    student = build(graph, plan, calibrate(plan, stats, teacher, method))
    fit_biases(student, plan)
    quantized = student.export(plan)
    written = write(graph, plan, quantized, storage or target.storage, **options)
    return Case(proto, graph, plan, layers, batches, teacher, stats, student, quantized, written)


@functools.cache
def cached(name: str, weight_bits: int = 8, act_bits: int = 8) -> Case:
    return quantize(MODELS[name](), Rules(weight_bits, act_bits))


def case(name: str, weight_bits: int = 8, act_bits: int = 8) -> Case:
    """A quantized tiny model; made once, its written file may be edited."""
    found = copy.copy(cached(name, weight_bits, act_bits))
    found.written = copy.deepcopy(found.written)
    return found


def samples_of(found: Case, count: int = 48, seed: int = 1) -> list[torch.Tensor]:
    """`count` random samples, one tensor per input."""
    alone = found.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value or count
    parts = [feed(found.teacher, batch) for batch in feeds(found.proto, batch=alone, count=count // alone, seed=seed)]
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def problem(
    found: Case, method: str | Method, *, steps: int = 6, count: int = 48, starts: int = 2, **options: Any
) -> Problem:
    """What `eptq.Learner` needs to learn a tiny model."""
    batch = found.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 16
    chosen = METHODS[method] if isinstance(method, str) else method
    effort = Effort(steps, count, batch, starts)
    return Problem(
        found.graph, found.plan, found.layers, found.teacher, samples_of(found, count), chosen, effort, **options
    )


def initializer(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def producer(proto: onnx.ModelProto, value: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if value in node.output)


def node_named(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.name == name)


def heed_sigint() -> None:
    """Let a child process be interrupted even where the tests run in the background, which ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
