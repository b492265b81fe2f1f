"""Passes: nodes without effect go, what depends on constants or sizes alone is computed."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter, dtype_to_onnx

from onnx_eptq import graph as og
from onnx_eptq.graph import array, constant, is_op
from onnx_eptq.prepare.edit import (
    INT_MAX,
    RESHAPES,
    Array,
    axis_of,
    bypass,
    const_at,
    constant_operand,
    dtype_of,
    input_at,
    ints_at,
    new_constant,
    output_ids,
    producer,
    rank_of,
    replace_uses,
    same_dims,
    shape_of,
)

LOG = logging.getLogger(__name__)
Memo = dict[int, tuple[gs.Tensor, Array | None]]  # holds the tensor, so that its id is not given to another
_FOLDED_BYTES = 4096  # a folded constant may be this large even where its inputs were smaller


def _keeps_elements(node: gs.Node) -> bool:
    # The number of elements is kept, so one dimension that is not known to agree agrees as well.
    source, out = node.inputs[0], node.outputs[0]
    return same_dims(source, out, 1) or (is_op(node, "Flatten") and rank_of(source) == 2 and axis_of(node, 2) == 1)


def _drops_nothing(node: gs.Node) -> bool:
    training = input_at(node, 2)
    return training is None or (array(training) is not None and not np.any(array(training)))


def _slices_all(node: gs.Node) -> bool:
    starts, ends = ints_at(node, 1), ints_at(node, 2)
    if starts is None or ends is None:
        return False
    axes = ints_at(node, 3) if input_at(node, 3) is not None else list(range(len(starts)))
    steps = ints_at(node, 4) if input_at(node, 4) is not None else [1] * len(starts)
    shape = shape_of(node.inputs[0])
    if axes is None or steps is None:
        return False
    return all(
        start == 0 and step == 1 and (end >= INT_MAX or (shape is not None and _at_most(shape[axis], end)))
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    )


def _at_most(dim: int | str | None, end: int) -> bool:
    return isinstance(dim, int) and 0 <= dim <= end


def _is_neutral(value: float, positions: Sequence[int]) -> Callable[[gs.Node], bool]:
    def check(node: gs.Node) -> bool:
        found = constant_operand(node)
        if found is None or found[2] not in positions or not np.all(found[1] == value):
            return False
        return (
            found[1].ndim == 0
            or (found[1].size == 1 and found[1].ndim <= (rank_of(found[0]) or 0))
            or (same_dims(found[0], node.outputs[0], 0))
        )

    return check


def _all_equal(index: int, value: float) -> Callable[[gs.Node], bool]:
    def check(node: gs.Node) -> bool:
        values = const_at(node, index)
        return values is not None and values.size > 0 and bool(np.all(values == value))

    return check


def _pools_single(node: gs.Node) -> bool:
    plain = all(k == 1 for k in [*node.attrs["kernel_shape"], *node.attrs.get("strides", [])])
    return plain and not any(node.attrs.get("pads", []))


def _is_positive_already(node: gs.Node) -> bool:
    return is_nonnegative(node.inputs[0])


def is_nonnegative(tensor: gs.Tensor) -> bool:
    """Whether a value is seen to be nowhere below 0."""
    if producer(tensor, "Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Softplus") is not None:
        return True
    clip = producer(tensor, "Clip")
    low = None if clip is None else const_at(clip, 1)
    if low is not None and low.size == 1 and float(low.reshape(-1)[0]) >= 0:
        return True
    through = producer(tensor, "MaxPool", "AveragePool", "GlobalAveragePool", "Transpose", *RESHAPES)
    return through is not None and is_nonnegative(through.inputs[0])


NOOPS: dict[str, Callable[[gs.Node], bool]] = {
    "Identity": lambda node: True,
    "Dropout": _drops_nothing,
    "Cast": lambda node: dtype_of(node.inputs[0]) == dtype_to_onnx(node.attrs["to"]),
    "CastLike": lambda node: (
        dtype_of(node.inputs[0]) is not None and dtype_of(node.inputs[0]) == dtype_of(node.inputs[1])
    ),
    **dict.fromkeys(RESHAPES, _keeps_elements),
    "Expand": lambda node: same_dims(node.inputs[0], node.outputs[0], 0),
    "Tile": _all_equal(1, 1),
    "Transpose": lambda node: node.attrs.get("perm") == sorted(node.attrs.get("perm", [-1])),
    "Pad": _all_equal(1, 0),
    "Slice": _slices_all,
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), lambda node: len(node.inputs) == 1),
    "Split": lambda node: len(node.outputs) == 1,
    "Clip": lambda node: input_at(node, 1) is None and input_at(node, 2) is None,
    "Add": _is_neutral(0, (0, 1)),
    "Sub": _is_neutral(0, (1,)),
    "Mul": _is_neutral(1, (0, 1)),
    "Div": _is_neutral(1, (1,)),
    "Pow": _is_neutral(1, (1,)),
    **dict.fromkeys(("MaxPool", "AveragePool"), _pools_single),
    "Resize": lambda node: _all_equal(2, 1)(node) and input_at(node, 3) is None,
    "Relu": _is_positive_already,
}


def remove_noops(graph: gs.Graph) -> int:
    """Remove nodes that hand on their input unchanged."""
    kept = output_ids(graph)
    changes = 0
    for node in list(graph.nodes):
        single = node.outputs and not any(t.outputs or id(t) in kept for t in node.outputs[1:])
        if single and is_op(node, *NOOPS) and node.inputs and NOOPS[node.op](node):
            found = constant_operand(node) if len(node.inputs) == 2 and node.op in ("Add", "Mul") else None
            changes += bypass(graph, node, found[0] if found else node.inputs[0], kept)
    return changes


_UNFOLDABLE = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"),
    *("If", "Loop", "Scan", "QuantizeLinear", "DynamicQuantizeLinear", "Constant"),
}


def fold_constants(graph: gs.Graph) -> int:
    """Compute the nodes whose inputs are all constant, unless that makes the model larger."""
    kept = output_ids(graph)
    done: dict[Any, list[gs.Constant]] = {}
    changes = 0
    for node in list(graph.nodes):
        inputs = [t for t in node.inputs if t.name]
        values = [array(t) for t in inputs]
        folds = node.domain in og.STANDARD_DOMAINS and node.op not in _UNFOLDABLE and inputs
        if not folds or any(v is None for v in values) or any(id(t) in kept for t in node.outputs):
            continue
        attributes = sorted(a.SerializeToString() for a in OnnxExporter.export_node(node).attribute)
        key = (node.op, len(node.outputs), *attributes, *(id(t) for t in node.inputs))
        if key not in done:
            results = _evaluate(node, graph.opset)
            limit = max(_FOLDED_BYTES, sum(v.nbytes for v in values if v is not None))
            restored = node.op == "DequantizeLinear"  # of a weight, which is stored in integers again
            if results is None or (sum(r.nbytes for r in results) > limit and not restored):
                continue
            done[key] = [constant(t.name, r) for t, r in zip(node.outputs, results, strict=False)]
        for tensor, folded in zip(list(node.outputs), done[key], strict=False):
            replace_uses(tensor, folded)
        node.outputs.clear()
        changes += 1
    return changes


def _evaluate(node: gs.Node, opset: int) -> list[Array] | None:
    """Return the node's results on its constant inputs, or None where ONNX's reference cannot compute them."""
    if node.op == "Transpose":
        return [np.transpose(const_at(node, 0), node.attrs.get("perm"))]  # type: ignore[arg-type]
    from onnx.reference import ReferenceEvaluator  # slow to import

    names = [t.name for t in node.inputs]
    feeds = {t.name: array(t) for t in node.inputs if t.name}
    proto = OnnxExporter.export_node(node)
    empty = onnx.helper.make_empty_tensor_value_info
    body = onnx.helper.make_graph(
        [proto], "fold", [empty(n) for n in dict.fromkeys(names) if n], [empty(t.name) for t in node.outputs if t.name]
    )
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(model).run(None, feeds)
    except Exception as error:  # the reference raises whatever numpy raises; such a node simply stays
        LOG.debug("%s '%s' is not folded: %s", node.op, node.name, error)
        return None
    if not all(isinstance(r, np.ndarray | np.generic) for r in results):
        return None
    dtypes = [t.dtype for t in node.outputs if t.name]
    native = [r.dtype if d is None or isinstance(d, int) else d for r, d in zip(results, dtypes, strict=True)]
    return [np.asarray(r, d) for r, d in zip(results, native, strict=True)]


def fold_shapes(graph: gs.Graph) -> int:
    """Replace computed shapes whose dimensions are known, and computed Reshape targets with one unknown dimension."""
    kept = output_ids(graph)
    memo: Memo = {}
    changes = 0
    for node in list(graph.nodes):
        if not node.outputs:
            continue
        out = node.outputs[0]
        dims = _symbols(out, memo) if isinstance(out, gs.Variable) and id(out) not in kept else None
        if dims is not None and all(isinstance(d, int) for d in dims.reshape(-1)):
            dtype = np.int64 if out.dtype is None else out.dtype
            replace_uses(out, constant(out.name, np.array(dims.tolist(), dtype)))
            node.outputs.clear()
            changes += 1
        elif is_op(node, "Reshape") and isinstance(node.inputs[1], gs.Variable):
            changes += _fix_target(graph, node, _symbols(node.inputs[1], memo))
    return changes


def _fix_target(graph: gs.Graph, node: gs.Node, dims: Array | None) -> bool:
    if dims is None or node.attrs.get("allowzero"):
        return False
    target = list(dims)
    unknown = [i for i, d in enumerate(target) if not isinstance(d, int)]
    shape = shape_of(node.inputs[0]) or []
    free = 1 - sum(d == -1 for d in target if isinstance(d, int))
    if len(unknown) > free:
        for i in unknown:
            if i < len(shape) and target[i] is not None and target[i] == shape[i]:
                target[i] = 0  # copies the input's dimension
    unknown = [i for i in unknown if not isinstance(target[i], int)]
    if len(unknown) > free:
        return False
    for i in unknown:
        target[i] = -1
    node.inputs[1] = new_constant(graph, node.inputs[1].name, np.array(target, np.int64))
    return True


def _symbols(tensor: gs.Tensor, memo: Memo, depth: int = 0) -> Array | None:
    """Return the contents of a small integer tensor: ints where known, else the dimension's name, else None."""
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor, None
        if depth < 100:
            memo[id(tensor)] = tensor, _compute_symbols(tensor, memo, depth)
    return memo[id(tensor)][1]


def _compute_symbols(tensor: gs.Tensor, memo: Memo, depth: int) -> Array | None:
    values = array(tensor)
    if values is not None:
        small = values.dtype.kind in "iu" and values.size <= 64
        return _objects(values.tolist(), values.shape) if small else None
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or not is_op(node, *_SYMBOLIC):
        return None
    if node.op in ("Shape", "Size"):
        dims = shape_of(node.inputs[0])
        return None if dims is None else _symbolic_shape(node, dims)
    inputs = [_symbols(t, memo, depth + 1) for t in node.inputs if t.name]
    if any(i is None for i in inputs) or dtype_of(tensor) not in (None, onnx.TensorProto.INT64, onnx.TensorProto.INT32):
        return None
    try:
        return np.asarray(_SYMBOLIC[node.op](node, inputs), object)
    except (IndexError, ValueError, TypeError, ZeroDivisionError):
        return None


def _objects(values: Any, shape: Sequence[int]) -> Array:
    result = np.empty(math.prod(shape), object)
    result[:] = list(np.array(values, object).reshape(-1))
    return result.reshape(shape)


def _symbolic_shape(node: gs.Node, dims: list[int | str | None]) -> Array | None:
    if node.op == "Shape":
        dims = dims[node.attrs.get("start", 0) : node.attrs.get("end", len(dims))]
        return _objects(dims, [len(dims)])
    known = [d for d in dims if isinstance(d, int)]
    return _objects([math.prod(known)], []) if len(known) == len(dims) else None


def _symbolic_gather(node: gs.Node, inputs: list[Array]) -> Array:
    picked: Array = inputs[0].take(inputs[1].astype(np.int64).reshape(-1), node.attrs.get("axis", 0))
    return picked.reshape(inputs[1].shape) if inputs[0].ndim == 1 else picked


def _symbolic_slice(node: gs.Node, inputs: list[Array]) -> Array:
    data, starts, ends = inputs[:3]
    axes = inputs[3] if len(inputs) > 3 else np.arange(len(starts))
    steps = inputs[4] if len(inputs) > 4 else [1] * len(starts)
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, end if step > 0 or end > -INT_MAX else None, step)
    return data[tuple(index)]


def _symbolic_arithmetic(function: Callable[[int, int], int]) -> Callable[[gs.Node, list[Array]], Array]:
    def apply(a: Any, b: Any) -> int | None:
        return function(a, b) if isinstance(a, int) and isinstance(b, int) else None

    vectorized = np.vectorize(apply, otypes=[object])
    return lambda node, inputs: np.asarray(vectorized(*inputs), object)


_SYMBOLIC: dict[str, Callable[[gs.Node, list[Any]], Any]] = {
    **dict.fromkeys(("Shape", "Size"), lambda node, inputs: None),  # need the input's shape, not its contents
    **dict.fromkeys(("Identity", "Cast"), lambda node, inputs: inputs[0]),
    "Gather": _symbolic_gather,
    "Slice": _symbolic_slice,
    "Concat": lambda node, inputs: np.concatenate(inputs, node.attrs["axis"]),
    "Unsqueeze": lambda node, inputs: np.expand_dims(inputs[0], tuple(int(i) for i in inputs[1])),
    "Squeeze": lambda node, inputs: np.squeeze(inputs[0], tuple(int(i) for i in inputs[1]) if inputs[1:] else None),
    "Reshape": lambda node, inputs: inputs[0].reshape([int(i) for i in inputs[1]]),
    "Add": _symbolic_arithmetic(lambda a, b: a + b),
    "Sub": _symbolic_arithmetic(lambda a, b: a - b),
    "Mul": _symbolic_arithmetic(lambda a, b: a * b),
    "Div": _symbolic_arithmetic(lambda a, b: int(a / b)),
}
