"""Passes: reshapes and transposes merge, move through the graph to where they cancel, and go into constants."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_eptq import graph as og
from onnx_eptq.graph import array, is_op
from onnx_eptq.prepare.edit import (
    LINEAR,
    RESHAPES,
    axes_of,
    axis_of,
    bypass,
    const_at,
    constant_operand,
    fresh_name,
    input_at,
    ints_at,
    mutate,
    new_constant,
    only_for,
    output_ids,
    producer,
    rank_of,
    set_constant,
    shape_of,
)
from onnx_eptq.prepare.precision import is_other_float


def _static_target(tensor: gs.Tensor) -> list[int] | None:
    """Return the shape as a Reshape target, with -1 for the one dimension that may be unknown."""
    shape = shape_of(tensor)
    if shape is None or sum(not isinstance(d, int) for d in shape) > 1:
        return None
    return [d if isinstance(d, int) else -1 for d in shape]


def _moves_only_ones(node: gs.Node) -> bool:
    """Tell whether a Transpose keeps the order of all dimensions but those of size 1, so that it is a Reshape."""
    shape, perm = shape_of(node.inputs[0]), node.attrs.get("perm")
    return shape is not None and perm is not None and _order(shape, perm) == sorted(_order(shape, perm))


def _order(shape: Sequence[Any], perm: Sequence[int]) -> list[int]:
    return [axis for axis in perm if shape[axis] != 1]


def merge_reshapes(graph: gs.Graph) -> int:
    """Turn a chain of Reshape, Flatten, Squeeze, Unsqueeze (and Transposes that only move 1s) into one Reshape."""
    changes = 0
    for node in graph.nodes:
        if not _is_reshape(node):
            continue
        before = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
        target = _static_target(node.outputs[0])
        if before is None or target is None or 0 in target or not _is_reshape(before):
            continue
        if is_op(node, "Transpose") and is_op(before, "Transpose"):
            continue  # merge_transposes may find that they cancel
        shape = new_constant(graph, f"{node.name}/shape", np.array(target, np.int64))
        mutate(node, "Reshape", [before.inputs[0], shape], {})
        changes += 1
    return changes


def _is_reshape(node: gs.Node) -> bool:
    return is_op(node, *RESHAPES) or (is_op(node, "Transpose") and _moves_only_ones(node))


def use_flatten(graph: gs.Graph) -> int:
    """Write a Reshape to [batch, everything else] as Flatten, which keeps a dynamic batch without a shape constant."""
    changes = 0
    for node in graph.nodes:
        if is_op(node, "Reshape") and _flattens(node):
            mutate(node, "Flatten", [node.inputs[0]], {"axis": 1})
            changes += 1
    return changes


def _flattens(node: gs.Node) -> bool:
    target = ints_at(node, 1)
    source = shape_of(node.inputs[0])
    if target is None or source is None or len(target) != 2 or len(source) < 3:
        return False
    rest = source[1:]
    if target == [0, -1] and not node.attrs.get("allowzero"):
        return True
    if isinstance(source[0], int) and target[0] == source[0] > 0:
        return target[1] == -1 or all(isinstance(d, int) for d in source)
    static = all(isinstance(d, int) and d > 0 for d in rest)
    return static and target[0] in (-1, 0) and target[1] == math.prod(rest)  # type: ignore[arg-type]


def merge_transposes(graph: gs.Graph) -> int:
    """Turn a Transpose of a Transpose into one."""
    changes = 0
    for node in graph.nodes:
        first = producer(node.inputs[0], "Transpose") if is_op(node, "Transpose") else None
        if first is not None and "perm" in first.attrs and "perm" in node.attrs:
            _merge(node, first)
            changes += 1
    return changes


def _merge(second: gs.Node, first: gs.Node) -> None:
    second.attrs["perm"] = [first.attrs["perm"][axis] for axis in second.attrs["perm"]]
    second.inputs[0] = first.inputs[0]


Handler = Callable[[gs.Graph, gs.Node, list[int]], "list[int] | None"]
_UNARY = (
    *("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "Celu", "Gelu", "Softplus"),
    *("Softsign", "Mish", "Exp", "Log", "Sqrt", "Neg", "Abs", "Erf", "Reciprocal", "Floor", "Ceil", "Round", "Sign"),
    *("Cast", "Clip", "Identity", "Dropout", "ThresholdedRelu", "Not", "Swish"),
)
_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow", "PRelu", "Min", "Max", "Sum", "Mean", "Where", "And", "Or", "Less",
                 "Greater", "Equal")  # fmt: skip
_REDUCING = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
             "ReduceSumSquare", "ReduceLogSumExp")  # fmt: skip


def sink_transposes(graph: gs.Graph) -> int:
    """Push Transposes towards the outputs until they cancel or reach a weight; kept only where that is of use.

    Of use is fewer Transposes, or fewer of them between a linear operator and a constant that it can take up.
    """
    before = _transposes(graph)
    if before == (0, 0):
        return 0
    trial = og.copy(graph)
    kept = output_ids(trial)
    budget = 20 * len(trial.nodes)  # a bound only: each step moves one Transpose past one node
    while budget > 0 and _sink_once(trial, kept):
        budget -= 1
    og.remove_dead(trial)
    after = _transposes(trial)
    if after >= before:
        return 0
    vars(graph).update(vars(trial))
    return max(1, before[0] - after[0])


def _transposes(graph: gs.Graph) -> tuple[int, int]:
    """Return the number of Transposes, and how many of them keep a linear operator and a constant apart."""
    found = [node for node in graph.nodes if is_op(node, "Transpose")]
    parting = [node for node in found if producer(node.inputs[0], *LINEAR) and _constant_consumer(node)]
    return len(found), len(parting)


def _constant_consumer(node: gs.Node) -> bool:
    readers = node.outputs[0].outputs
    return any(is_op(n, "Add", "Sub", "Mul", "Div") and constant_operand(n) is not None for n in readers)


def _sink_once(graph: gs.Graph, kept: set[int]) -> bool:
    local = {id(node) for node in graph.nodes}
    changed = False
    for node in list(graph.nodes):
        if not is_op(node, "Transpose") or not node.outputs or "perm" not in node.attrs:
            continue
        for consumer in list(node.outputs[0].outputs):
            reads = any(t is node.outputs[0] for t in consumer.inputs)  # an earlier step may have rewired it
            if reads and id(consumer) in local and _push(graph, node, consumer, kept):
                changed = True
        if not node.outputs[0].outputs and id(node.outputs[0]) not in kept:
            node.inputs.clear()
            node.outputs.clear()
    return changed


def _push(graph: gs.Graph, transpose: gs.Node, node: gs.Node, kept: set[int]) -> bool:
    """Let the node read the Transpose's input and transpose its outputs instead; False where that is not possible."""
    perm = transpose.attrs["perm"]
    if is_op(node, "Transpose"):
        _merge(node, transpose)
        if node.attrs["perm"] == sorted(perm):
            bypass(graph, node, node.inputs[0], kept)
        return True
    handler = _HANDLERS.get(node.op) if node.domain in og.STANDARD_DOMAINS else None
    count = len(node.inputs) if node.op in (*_BROADCASTING, "Concat") else 1  # inputs that have the layout
    if handler is None or not _all_transposed(node, perm, count):
        return False
    out_perm = handler(graph, node, perm)
    if out_perm is None:
        return False
    for index, tensor in enumerate(node.inputs[:count]):
        if isinstance(tensor, gs.Variable):
            node.inputs[index] = tensor.inputs[0].inputs[0]
    if out_perm != sorted(out_perm):
        _transpose_outputs(graph, node, out_perm)
    return True


def _all_transposed(node: gs.Node, perm: list[int], count: int) -> bool:
    """Tell whether every variable among the first inputs comes out of a Transpose of the same permutation."""
    variables = [t for t in node.inputs[:count] if isinstance(t, gs.Variable)]
    makers = [producer(t, "Transpose") for t in variables]
    return bool(makers) and all(m is not None and m.attrs.get("perm") == perm for m in makers)


def _transpose_outputs(graph: gs.Graph, node: gs.Node, perm: list[int]) -> None:
    for index, out in enumerate(list(node.outputs)):
        if not out.name:
            continue
        name = fresh_name(graph, f"{node.name}/transpose")
        shape = shape_of(out)
        before = None if shape is None else [shape[perm.index(axis)] for axis in range(len(perm))]
        inner = gs.Variable(f"{name}_in", out.dtype, before)
        node.outputs[index] = inner
        graph.nodes.append(gs.Node("Transpose", name, {"perm": list(perm)}, [inner], [out]))


def _inverse(perm: Sequence[int]) -> list[int]:
    return [list(perm).index(axis) for axis in range(len(perm))]


def _push_same(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int]:
    return perm


def _push_cast(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    between = any(is_other_float(tensor) for tensor in (*node.inputs, *node.outputs))
    return None if between else perm  # an input or output of another precision keeps its Cast beside it


def _push_broadcast(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    values = [array(tensor) for tensor in node.inputs]
    if any(v is not None and v.ndim > len(perm) for v in values):
        return None
    if any(v is None and isinstance(t, gs.Constant) for v, t in zip(values, node.inputs, strict=True)):
        return None
    for index, value in enumerate(values):
        if value is not None and value.size > 1:
            wide = value.reshape((1,) * (len(perm) - value.ndim) + value.shape)
            set_constant(graph, node, index, wide.transpose(_inverse(perm)))
    return perm


def _push_axis(default: int) -> Handler:
    def push(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int]:
        node.attrs["axis"] = perm[axis_of(node, len(perm), default)]
        return perm

    return push


def _push_concat(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    values = [array(tensor) for tensor in node.inputs]
    if any(v is None and isinstance(t, gs.Constant) for v, t in zip(values, node.inputs, strict=True)):
        return None
    for index, value in enumerate(values):
        if value is not None:
            set_constant(graph, node, index, value.transpose(_inverse(perm)))
    node.attrs["axis"] = perm[axis_of(node, len(perm), 0)]
    return perm


def _push_slice(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    starts = ints_at(node, 1)
    axes = None if starts is None else axes_of(node, 3, len(perm), range(len(starts)))
    if axes is None:
        return None
    set_constant(graph, node, 3, np.array([perm[axis] for axis in axes], np.int64))
    return perm


def _push_pad(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    axes = axes_of(node, 3, len(perm), range(len(perm)))
    if axes is None:
        return None
    set_constant(graph, node, 3, np.array([perm[axis] for axis in axes], np.int64))
    if input_at(node, 2) is None:
        node.inputs[2] = gs.Variable.empty()
    return perm


def _push_resize(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    index = 2 if input_at(node, 2) is not None else 3
    roi, sizes = input_at(node, 1), const_at(node, index)
    if (roi is not None and (array(roi) is None or array(roi).size)) or sizes is None:  # type: ignore[union-attr]
        return None
    if "axes" in node.attrs:
        node.attrs["axes"] = [perm[axis % len(perm)] for axis in node.attrs["axes"]]
    else:
        set_constant(graph, node, index, sizes[_inverse(perm)])
    return perm


def _without(perm: list[int], axes: Sequence[int]) -> list[int]:
    """Return the permutation that is left when the output's `axes` are gone."""
    left = [axis for i, axis in enumerate(perm) if i not in axes]
    return [sorted(left).index(axis) for axis in left]


def _push_reduce(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    axes = axes_of(node, 1, len(perm), range(len(perm)))
    if axes is None or node.attrs.get("noop_with_empty_axes"):
        return None
    set_constant(graph, node, 1, np.array(sorted(perm[axis] for axis in axes), np.int64))
    return perm if node.attrs.get("keepdims", 1) else _without(perm, axes)


def _push_arg(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int]:
    axis = axis_of(node, len(perm), 0)
    node.attrs["axis"] = perm[axis]
    return perm if node.attrs.get("keepdims", 1) else _without(perm, [axis])


def _push_squeeze(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    axes = axes_of(node, 1, len(perm), ())
    if not axes:
        return None
    set_constant(graph, node, 1, np.array(sorted(perm[axis] for axis in axes), np.int64))
    return _without(perm, axes)


def _push_unsqueeze(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    count = len(ints_at(node, 1) or ())
    axes = axes_of(node, 1, len(perm) + count, ()) or []
    if not axes:
        return None
    rank = len(perm) + count
    channels_last = [0, *range(2, rank), 1]
    if _without(channels_last, axes) == perm:  # then the layout of the wider value is most likely the usual one
        set_constant(graph, node, 1, np.array(sorted(channels_last[axis] for axis in axes), np.int64))
        return channels_last
    set_constant(graph, node, 1, np.arange(count))
    old, new = iter(perm), iter(range(count))
    return [next(new) if axis in axes else next(old) + count for axis in range(rank)]


def _push_gather(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    indices, axis = const_at(node, 1), axis_of(node, len(perm), 0)
    if indices is None or indices.ndim > 1:
        return None
    node.attrs["axis"] = perm[axis]
    return perm if indices.ndim else _without(perm, [axis])


def _push_reshape(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    """Drop a Transpose before a Reshape: one that only moves 1s, or one whose effect a following weight can take up."""
    transpose = node.inputs[0].inputs[0]
    target = _static_target(node.outputs[0])
    if target is None or 0 in target or not (_moves_only_ones(transpose) or _absorb(graph, node, transpose)):
        return None
    mutate(node, "Reshape", [node.inputs[0], new_constant(graph, f"{node.name}/shape", np.array(target))], {})
    return list(range(len(target)))


def _absorb(graph: gs.Graph, node: gs.Node, transpose: gs.Node) -> bool:
    """Permute the rows of the one weight that reads the flattened value; False where that is not exact."""
    perm, shape, out = transpose.attrs["perm"], shape_of(transpose.inputs[0]), node.outputs[0]
    linear = out.outputs[0] if len(out.outputs) == 1 else None
    if shape is None or perm[0] != 0 or rank_of(out) != 2 or linear is None or not is_op(linear, "Gemm", "MatMul"):
        return False
    rest = [shape[axis] for axis in perm[1:]]
    weight = const_at(linear, 1)
    usable = linear.inputs[0] is out and not linear.attrs.get("transA") and all(isinstance(d, int) for d in rest)
    if not usable or weight is None or weight.ndim != 2 or id(out) in output_ids(graph):
        return False
    rows = weight.T if linear.attrs.get("transB") else weight
    if rows.shape[0] != math.prod(rest) or len(linear.inputs[1].outputs) > 1:
        return False
    back = [axis - 1 for axis in _inverse(perm)[1:]]
    grid = rows.reshape(*rest, -1).transpose(*back, len(rest)).reshape(rows.shape)
    set_constant(graph, linear, 1, np.ascontiguousarray(grid.T if linear.attrs.get("transB") else grid))
    out.name = fresh_name(graph, f"{out.name}_reordered")  # in another order it is another value
    return True


_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_UNARY, _push_same),
    "Cast": _push_cast,
    **dict.fromkeys(_BROADCASTING, _push_broadcast),
    **dict.fromkeys(_REDUCING, _push_reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _push_axis(-1)),
    "Split": _push_axis(0),
    "Concat": _push_concat,
    "Slice": _push_slice,
    "Pad": _push_pad,
    "Resize": _push_resize,
    **dict.fromkeys(("ArgMax", "ArgMin"), _push_arg),
    "Squeeze": _push_squeeze,
    "Unsqueeze": _push_unsqueeze,
    "Gather": _push_gather,
    **dict.fromkeys(("Reshape", "Flatten"), _push_reshape),
}


def hoist_transposes(graph: gs.Graph) -> int:
    """Move a Transpose up to the graph input it comes from, past the nodes that scale or pad the input."""
    kept = output_ids(graph)
    inputs = {id(t) for t in graph.inputs}
    changes = 0
    for node in graph.nodes:
        while is_op(node, "Transpose") and "perm" in node.attrs and node.outputs:
            above = producer(node.inputs[0], "Pad", *_UNARY, *_BROADCASTING)
            if above is None or not only_for(node.inputs[0], node, kept) or not _leads_up(above, inputs):
                break
            inverse = _inverse(node.attrs["perm"])
            if _HANDLERS[above.op](graph, above, inverse) != inverse:
                break
            _swap_up(graph, node, above)
            changes += 1
    return changes


def _leads_up(node: gs.Node, inputs: set[int]) -> bool:
    """Tell whether the node's only variable input is, through nodes of the same kind, a graph input."""
    variables = [i for i, t in enumerate(node.inputs) if isinstance(t, gs.Variable) and t.name]
    if len(variables) != 1 or len(node.outputs) != 1 or (variables != [0] and node.op not in _BROADCASTING):
        return False
    source = node.inputs[variables[0]]
    above = producer(source, "Pad", *_UNARY, *_BROADCASTING)
    return id(source) in inputs or (above is not None and len(source.outputs) == 1 and _leads_up(above, inputs))


def _swap_up(graph: gs.Graph, transpose: gs.Node, above: gs.Node) -> None:
    index = next(i for i, t in enumerate(above.inputs) if isinstance(t, gs.Variable) and t.name)
    out, source = transpose.outputs[0], above.inputs[index]
    name = fresh_name(graph, transpose.name)
    shape = shape_of(source)
    moved = gs.Variable(
        f"{name}_out", source.dtype, None if shape is None else [shape[a] for a in transpose.attrs["perm"]]
    )
    transpose.inputs[0], transpose.outputs[0] = source, moved
    above.inputs[index], above.outputs[0] = moved, out
