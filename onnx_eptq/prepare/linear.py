"""Passes: padding, pooling, Gemm, and the scales, shifts and masks around linear operators."""

import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_eptq.columns import INPUT_STEPS, are_served
from onnx_eptq.graph import array, extras, is_bounded_below, is_op, masks_sum, ruled_out
from onnx_eptq.prepare.constants import is_nonnegative
from onnx_eptq.prepare.edit import (
    LINEAR,
    Array,
    axes_of,
    const_at,
    constant_operand,
    dtype_of,
    fresh_name,
    input_at,
    ints_at,
    mutate,
    new_constant,
    new_node,
    only_for,
    output_ids,
    producer,
    rank_of,
    same_dims,
    set_constant,
    shape_of,
    shorten,
    take_place,
)

LOG = logging.getLogger(__name__)
FAR = 8.0  # times its range: from so far from zero on, a column is shifted
_LEAST = -1e30  # stands for minus infinity
_COLUMNWISE = (
    "BatchNormalization", "Add", "Sub", "Mul", "Div", "Clip", "Min", "Max", "Cast", "Concat", "Split", "Where", "Reshape",
    "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Gather",
)  # fmt: skip


def explicit_padding(graph: gs.Graph) -> int:
    """Write `auto_pad` as explicit pads, where the size of the input does not matter or is known."""
    changes = 0
    for node in graph.nodes:
        if not is_op(node, "Conv", "MaxPool", "AveragePool", "LpPool") or "auto_pad" not in node.attrs:
            continue
        pads = _auto_pads(node, node.attrs["auto_pad"])
        if pads is not None:
            node.attrs = {k: v for k, v in node.attrs.items() if k != "auto_pad"} | {"pads": pads}
            changes += 1
    return changes


def drop_dilations(graph: gs.Graph) -> int:
    """Drop dilations of 1, which ONNX Runtime's integer kernels of AveragePool do not know as an attribute."""
    changes = 0
    for node in graph.nodes:
        if is_op(node, "AveragePool", "MaxPool", "LpPool") and set(node.attrs.get("dilations", ())) == {1}:
            del node.attrs["dilations"]
            changes += 1
    return changes


def _auto_pads(node: gs.Node, mode: str) -> list[int] | None:
    weight = input_at(node, 1)
    kernel = node.attrs.get("kernel_shape") or (None if weight is None or weight.shape is None else weight.shape[2:])
    if kernel is None or not all(isinstance(k, int) for k in kernel):
        return None
    if mode == "NOTSET":
        return list(node.attrs.get("pads", [0] * 2 * len(kernel)))
    if mode == "VALID":
        return [0] * 2 * len(kernel)
    strides = node.attrs.get("strides", [1] * len(kernel))
    dilations = node.attrs.get("dilations", [1] * len(kernel))
    sizes = (shape_of(node.inputs[0]) or [None] * (2 + len(kernel)))[2:]
    totals = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        if stride > 1 and not isinstance(size, int):
            return None
        last = 0 if stride == 1 else (-(-size // stride) - 1) * stride - size + 1  # type: ignore[operator]
        totals.append(max(0, last + dilation * (k - 1)))
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return small + large if mode == "SAME_UPPER" else large + small


def merge_pads(graph: gs.Graph) -> int:
    """Move a spatial zero Pad into the padding of the Conv or pooling that reads it, where that computes the same."""
    changes = 0
    for node in graph.nodes:
        pad = producer(node.inputs[0], "Pad") if is_op(node, "Conv", "MaxPool", "AveragePool") else None
        pads = None if pad is None else _spatial_pads(pad)
        if pad is None or pads is None or node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
            continue
        own = node.attrs.get("pads", [0] * len(pads))
        total = [a + b for a, b in zip(own, pads, strict=True)]
        attrs = _padded(node, pad, own, total)
        if attrs is not None:
            node.attrs = {**node.attrs, **attrs, "pads": total}
            node.inputs[0] = pad.inputs[0]
            changes += 1
    return changes


def _spatial_pads(pad: gs.Node) -> list[int] | None:
    """Return begins then ends of a Pad of the spatial axes only, by a positive number of one constant value."""
    rank, pads = rank_of(pad.inputs[0]), ints_at(pad, 1)
    if rank is None or rank < 3 or pads is None or pad.attrs.get("mode", "constant") != "constant":
        return None
    axes = axes_of(pad, 3, rank, range(rank))
    if axes is None or min(pads, default=0) < 0 or _pad_value(pad) is None:
        return None
    full = [0] * 2 * rank
    for i, axis in enumerate(axes):
        full[axis], full[rank + axis] = pads[i], pads[len(axes) + i]
    if any(full[:2]) or any(full[rank : rank + 2]):
        return None
    return full[2:rank] + full[rank + 2 :]


def _pad_value(pad: gs.Node) -> float | None:
    if input_at(pad, 2) is None:
        return 0.0
    value = const_at(pad, 2)
    return None if value is None or value.size != 1 else float(value.reshape(-1)[0])


def _padded(node: gs.Node, pad: gs.Node, own: list[int], total: list[int]) -> dict[str, Any] | None:
    """Return the attributes to change when the node pads by `total` itself, or None where that is not exact."""
    value = _pad_value(pad)
    if is_op(node, "Conv"):
        return {} if value == 0 else None
    kernel = node.attrs["kernel_shape"]
    spatial = len(kernel)
    fits = all(total[i] < kernel[i % spatial] for i in range(2 * spatial))  # else a window may see padding only
    if not fits or node.attrs.get("ceil_mode") or any(d != 1 for d in node.attrs.get("dilations", [])):
        return None
    if is_op(node, "AveragePool"):
        counted = not any(own) or node.attrs.get("count_include_pad")
        return {"count_include_pad": 1} if value == 0 and counted else None
    lowest = value is not None and (value == -math.inf or (value == 0 and is_nonnegative(pad.inputs[0])))
    return {} if lowest and len(node.outputs) == 1 else None


def use_global_pool(graph: gs.Graph) -> int:
    """Write a mean over all spatial axes as GlobalAveragePool, followed by Flatten where the axes are dropped."""
    changes = 0
    for node in list(graph.nodes):
        if is_op(node, "ReduceMean") and _reduces_map(node):
            if node.attrs.get("keepdims", 1):
                mutate(node, "GlobalAveragePool", node.inputs[:1], {})
            else:
                pooled = new_node(graph, "GlobalAveragePool", node.inputs[:1], node)
                mutate(node, "Flatten", [pooled], {"axis": 1})
            changes += 1
        elif is_op(node, "AveragePool") and _pools_map(node):
            mutate(node, "GlobalAveragePool", node.inputs[:1], {})
            changes += 1
    return changes


def _reduces_map(node: gs.Node) -> bool:
    rank = rank_of(node.inputs[0])
    if rank is None or rank < 4 or not _is_float(node):  # a sequence's mean over the last axis: a normalization
        return False
    axes = axes_of(node, 1, rank, ())
    return axes is not None and sorted(axes) == list(range(2, rank))


def _is_float(node: gs.Node) -> bool:
    return dtype_of(node.inputs[0]) in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def _pools_map(node: gs.Node) -> bool:
    shape = shape_of(node.inputs[0])
    padded = any(node.attrs.get("pads", [])) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    dilated = any(d != 1 for d in node.attrs.get("dilations", []))
    return shape is not None and not padded and not dilated and shape[2:] == list(node.attrs["kernel_shape"])


def unfold_einsum(graph: gs.Graph) -> int:
    """Turn an Einsum of two operands into MatMul, with what moves the axes, where that needs no sizes but a constant's."""
    return sum(_unfold(graph, node) for node in list(graph.nodes) if is_op(node, "Einsum") and _is_float(node))


def _unfold(graph: gs.Graph, node: gs.Node) -> bool:
    terms, found = _terms(node.attrs["equation"]), list(node.inputs)
    if terms is None or len(found) != 2:
        return False
    if isinstance(found[0], gs.Constant):
        terms, found = (terms[1], terms[0], terms[2]), found[::-1]
    a, b, out = terms
    batch = [i for i in a if i in b and i in out]
    summed = [i for i in a if i in b and i not in out]
    left, right = [i for i in a if i not in b], [i for i in b if i not in a]
    if not summed or not left or any(i not in out for i in (*left, *right)):
        return False
    weight = const_at(node, list(node.inputs).index(found[1]))
    source = _ordered(graph, node, found[0], a, [*batch, *left, *summed])
    shape = None
    if weight is not None and not batch:
        weight = weight.transpose([b.index(i) for i in (*summed, *right)])
        sizes = weight.shape[len(summed) :]
        if len(summed) > 1:
            source = new_node(graph, "Reshape", [source, _axes_kept(graph, node, left, (-1,))], node)
        other: gs.Tensor = new_constant(
            graph, found[1].name, weight.reshape(math.prod(weight.shape[: len(summed)]), -1)
        )
        shape = None if len(right) == 1 else _axes_kept(graph, node, left, sizes)
    elif len(summed) == len(left) == len(right) == 1:
        other = _ordered(graph, node, found[1], b, [*batch, *summed, *right])
    else:
        return False
    perm = [[*batch, *left, *right].index(i) for i in out]
    steps: list[tuple[str, list[gs.Tensor], dict[str, Any]]] = [("MatMul", [other], {})]
    steps += [("Reshape", [shape], {})] if shape is not None else []
    steps += [("Transpose", [], {"perm": perm})] if perm != sorted(perm) else []
    for op, inputs, attrs in steps[:-1]:
        source = new_node(graph, op, [source, *inputs], node, attrs)
        if op == "MatMul":  # the layer, by whose name users know it
            made = source.inputs[0]
            made.name, node.name = node.name, made.name
    op, inputs, attrs = steps[-1]
    mutate(node, op, [source, *inputs], attrs)
    return True


def _terms(equation: str) -> tuple[str, str, str] | None:
    """Return the axes of both operands and of the result, None where some repeat, are summed alone, or are not spelled."""
    given, _, out = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    if len(terms) != 2 or "." in equation or any(len(set(term)) < len(term) for term in terms):
        return None
    return terms[0], terms[1], out if "->" in equation else "".join(sorted(set(terms[0]) ^ set(terms[1])))


def _ordered(graph: gs.Graph, node: gs.Node, tensor: gs.Tensor, axes: str, wanted: list[str]) -> gs.Tensor:
    if list(axes) == wanted:
        return tensor
    return new_node(graph, "Transpose", [tensor], node, {"perm": [axes.index(i) for i in wanted]})


def _axes_kept(graph: gs.Graph, node: gs.Node, axes: Sequence[str], sizes: Sequence[int]) -> gs.Constant:
    """Return a target of Reshape: the first axes as they are, then some of these sizes."""
    return new_constant(graph, node.name, np.array([0] * len(axes) + list(sizes)))


def fuse_gemm(graph: gs.Graph) -> int:
    """Turn MatMul by a constant matrix plus a constant bias into Gemm, for two-dimensional activations."""
    kept = output_ids(graph)
    changes = 0
    for node in graph.nodes:
        found = constant_operand(node) if is_op(node, "Add") else None
        matmul = None if found is None else producer(found[0], "MatMul")
        if found is None or matmul is None or not only_for(found[0], node, kept):
            continue
        weight = const_at(matmul, 1)
        if weight is None or weight.ndim != 2 or rank_of(matmul.inputs[0]) != 2:
            continue
        if _row(found[1], weight.shape[1]) is not None and not masks_sum(found[1], node.outputs[0], kept):
            mutate(node, "Gemm", [*matmul.inputs, node.inputs[found[2]]], {})
            node.name, matmul.name = matmul.name, node.name  # layers are known by their matrix
            changes += 1
    return changes


def _row(bias: Array, channels: int) -> Array | None:
    """Return the bias as a vector over the channels, or None where it differs from row to row."""
    if bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1) or (bias.ndim and bias.shape[-1] not in (1, channels)):
        return None
    return np.broadcast_to(bias.reshape(-1), (channels,))


def normalize_gemm(graph: gs.Graph) -> int:
    """Bring Gemm with a constant weight to alpha = beta = 1, transB = 1, weight [out, in] and bias [out], else an Add."""
    weights: dict[Any, tuple[gs.Constant, gs.Constant]] = {}
    changes = 0
    for node in list(graph.nodes):
        if is_op(node, "Gemm") and const_at(node, 1) is not None:
            before = dict(node.attrs), list(node.inputs)
            _normalize_weight(graph, node, weights)
            _normalize_bias(graph, node)
            changed = any(a is not b for a, b in itertools.zip_longest(before[1], node.inputs))
            changes += changed or before[0] != node.attrs
    return changes


def _normalize_weight(graph: gs.Graph, node: gs.Node, done: dict[Any, tuple[gs.Constant, gs.Constant]]) -> None:
    alpha, transposed = node.attrs.pop("alpha", 1.0), bool(node.attrs.pop("transB", 0))
    node.attrs["transB"] = 1
    if not node.attrs.get("transA"):
        node.attrs.pop("transA", None)
    if alpha == 1 and transposed:
        return
    old = node.inputs[1]
    key = id(old), alpha, transposed
    if key not in done:  # a weight that several nodes share in one form stays shared
        values = np.asarray(array(old))
        scaled = np.ascontiguousarray(values if transposed else values.T) * alpha
        done[key] = old, new_constant(graph, old.name, scaled.astype(values.dtype))
    node.inputs[1] = done[key][1]


def _normalize_bias(graph: gs.Graph, node: gs.Node) -> None:
    beta = node.attrs.pop("beta", 1.0)
    bias = const_at(node, 2)
    row = None if bias is None else _row(bias, node.inputs[1].shape[0])
    if bias is not None and row is not None:
        if beta != 1 or bias.shape != row.shape:
            node.inputs[2] = new_constant(graph, node.inputs[2].name, (row * beta).astype(bias.dtype))
    elif bias is not None:  # a number per element
        shorten(node.inputs, 2)
        _add_behind(graph, node, (bias * beta).astype(bias.dtype), "bias")
    elif beta != 1 and input_at(node, 2) is not None:
        node.attrs["beta"] = beta


def _add_behind(graph: gs.Graph, node: gs.Node, values: Array, name: str) -> None:
    """Let an Add of these values come between a node and what it makes."""
    total = node.outputs[0]
    part = gs.Variable(fresh_name(graph, f"{total.name}_without_{name}"), total.dtype, total.shape)
    node.outputs.clear()
    node.outputs.append(part)
    operand = new_constant(graph, f"{total.name}_{name}", values)
    graph.nodes.append(gs.Node("Add", fresh_name(graph, f"{node.name}_{name}"), {}, [part, operand], [total]))


def _affine(node: gs.Node, axis: int, rank: int, channels: int) -> tuple[gs.Tensor, Array, Array] | None:
    """Return the input, scale [channels] and shift [channels] of a node that computes scale * input + shift."""
    if is_op(node, "BatchNormalization"):
        return _batchnorm(node, channels) if axis == 1 else None
    found = constant_operand(node) if is_op(node, "Add", "Sub", "Mul", "Div") else None
    if found is None:
        return None
    source, values, position = found
    vector = _channel_vector(values, axis, rank, channels)
    if vector is None or (node.op == "Div" and position == 0):
        return None
    ones, zeros = np.ones(channels), np.zeros(channels)
    if node.op in ("Mul", "Div"):
        return source, vector if node.op == "Mul" else 1 / vector, zeros
    if node.op == "Add":
        return source, ones, vector
    return (source, ones, -vector) if position == 1 else (source, -ones, vector)


def _batchnorm(node: gs.Node, channels: int) -> tuple[gs.Tensor, Array, Array] | None:
    values = [const_at(node, i) for i in range(1, 5)]
    trains = node.attrs.get("training_mode") or any(t.outputs for t in node.outputs[1:])
    if trains or any(v is None or v.size != channels for v in values):
        return None
    gamma, beta, mean, variance = (np.asarray(v, np.float64) for v in values)
    scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    return node.inputs[0], scale, beta - mean * scale


def _channel_vector(values: Array, axis: int, rank: int, channels: int) -> Array | None:
    """Return the constant as a vector over the channels, or None where it varies along another axis."""
    if values.ndim > rank or values.dtype.kind != "f":
        return None
    shape = (1,) * (rank - values.ndim) + values.shape
    if any(d != 1 for i, d in enumerate(shape) if i != axis % rank) or shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(values.reshape(-1).astype(np.float64), (channels,))


def _linear_shape(node: gs.Node) -> tuple[int, int, int] | None:
    """Return the output's channel axis, rank and number of channels of a linear operator with a constant weight."""
    weight = const_at(node, 1)
    if weight is None or (input_at(node, 2) is not None and const_at(node, 2) is None):
        return None
    if node.op == "MatMul":
        rank = rank_of(node.outputs[0])
        return None if weight.ndim != 2 or rank is None else (rank - 1, rank, weight.shape[1])
    if node.op == "Gemm":
        plain = node.attrs.get("alpha", 1) == node.attrs.get("beta", 1) == 1 and (const_at(node, 2) is None or (
            const_at(node, 2).ndim == 1))  # type: ignore[union-attr]  # fmt: skip
        return (1, 2, weight.shape[0 if node.attrs.get("transB") else 1]) if plain else None
    channels = weight.shape[0] if node.op == "Conv" else weight.shape[1] * node.attrs.get("group", 1)
    return 1, weight.ndim, channels


def _scale_outputs(node: gs.Node, weight: Array, scale: Array) -> Array:
    if node.op == "Conv":
        return weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    if node.op == "ConvTranspose":
        group = node.attrs.get("group", 1)
        grouped = weight.reshape(group, -1, *weight.shape[1:])
        return (grouped * scale.reshape(group, 1, -1, *(1,) * (weight.ndim - 2))).reshape(weight.shape)
    return weight * (scale[:, None] if node.attrs.get("transB") else scale)


def _fold_into_producer(graph: gs.Graph, *ops: str) -> int:
    kept = output_ids(graph)
    changes = 0
    for node in list(graph.nodes):
        if not is_op(node, *ops) or not node.outputs:
            continue
        for source in node.inputs[:2]:
            linear = producer(source, *LINEAR)
            if linear is not None and only_for(source, node, kept) and _absorb_affine(graph, linear, node, kept):
                take_place(node, source)
                changes += 1
                break
    return changes


def _absorb_affine(graph: gs.Graph, linear: gs.Node, node: gs.Node, kept: set[int]) -> bool:
    shape = _linear_shape(linear)
    found = None if shape is None else _affine(node, *shape)
    if found is None or found[0] is not linear.outputs[0]:
        return False
    _, scale, shift = found
    weight, bias = array(linear.inputs[1]), const_at(linear, 2)
    rescales, shifts = bool(np.any(scale != 1)), bool(np.any(shift != 0))
    shared = len(linear.inputs[1].outputs) > 1
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()) or weight is None:
        return False
    if is_op(node, "Add") and masks_sum(shift, node.outputs[0], kept):  # `split_masks` would take it out again
        return False
    if (rescales and shared) or (shifts and linear.op == "MatMul" and shape != (1, 2, len(scale))):
        LOG.debug("%s '%s' stays: '%s' is shared or has no bias", node.op, node.name, linear.name)
        return False
    if shifts and linear.op == "MatMul":
        mutate(linear, "Gemm", linear.inputs, {})
    if rescales:
        set_constant(graph, linear, 1, _scale_outputs(linear, weight.astype(np.float64), scale))
    if shifts or (bias is not None and rescales):
        total = shift if bias is None else bias.astype(np.float64) * scale + shift
        set_constant(graph, linear, 2, total.astype(weight.dtype))
    return True


def fold_batchnorm(graph: gs.Graph) -> int:
    """Fold BatchNormalization into the Conv, ConvTranspose or Gemm before it; others stay as they are."""
    return _fold_into_producer(graph, "BatchNormalization")


def fold_scale(graph: gs.Graph) -> int:
    """Fold a product with a constant per channel into the weight of the linear operator before it.

    Through Transposes and sums with constants, too, as the scales of blocks lie in ConvNeXt and vision transformers.
    """
    changes = _fold_into_producer(graph, "Mul", "Div")
    kept = output_ids(graph)
    for node in list(graph.nodes):
        found = constant_operand(node) if is_op(node, "Mul", "Div") and node.outputs else None
        if found is not None and not (node.op == "Div" and found[2] == 0):
            source, values, _ = found
            with np.errstate(divide="ignore"):  # what is divided by 0 is not folded
                factors = values.astype(np.float64) if node.op == "Mul" else 1 / values.astype(np.float64)
            changes += _scale_before(graph, node, source, factors, kept)
    return changes


def _scale_before(graph: gs.Graph, node: gs.Node, source: gs.Tensor, factors: Array, kept: set[int]) -> bool:
    """Scale the weight and what is added to its products instead of `source`, as `node` does; False where that cannot be."""
    rank = rank_of(source)
    if rank is None or rank_of(node.outputs[0]) != rank or not np.isfinite(factors).all():
        return False
    places = list(range(rank))  # of the axes of `value`: where they lie in the node's output
    sums: list[tuple[gs.Node, int, Array, list[int]]] = []
    between: list[gs.Tensor] = []
    value, reader = source, node
    while True:
        maker = producer(value, "Transpose", "Add", *LINEAR)
        if maker is None or not only_for(value, reader, kept) or rank_of(value) != rank:
            return False
        if maker.op in LINEAR:
            break
        before, added, index = constant_operand(maker) or (maker.inputs[0], None, 0)
        if maker.op == "Transpose":
            order = list(maker.attrs.get("perm") or range(rank)[::-1])
            places = [places[order.index(axis)] for axis in range(rank)]
        elif added is None or not np.isfinite(added).all():
            return False
        else:
            sums.append((maker, index, added.astype(np.float64), places))
        value, reader = before, maker
        between.append(value)
    shape, weight, bias = _linear_shape(maker), const_at(maker, 1), const_at(maker, 2)
    if not between or shape is None or weight is None or len(maker.inputs[1].outputs) > 1:
        return False
    place = places[shape[0]]
    vector = _channel_vector(factors, place, rank, shape[2])
    if vector is None:
        return False
    set_constant(graph, maker, 1, _scale_outputs(maker, weight.astype(np.float64), vector))
    if bias is not None:
        set_constant(graph, maker, 2, bias.astype(np.float64) * vector)
    for adder, index, added, where in sums:
        total = added * vector.reshape([-1 if axis == place else 1 for axis in where])
        leading = next((axis for axis, size in enumerate(total.shape) if size > 1), rank - 1)
        set_constant(graph, adder, index, total.reshape(total.shape[leading:]))
    for tensor in between:
        tensor.name = fresh_name(graph, f"{tensor.name}_scaled")
    take_place(node, source)
    return True


def fold_factor(graph: gs.Graph) -> int:
    """Fold a product with one number (of an attention) into the linear operator that its operand comes from.

    Through operators that move data, and products of two activations, into the weight of one of the two.
    """
    kept = output_ids(graph)
    changes = 0
    for node in list(graph.nodes):
        found = constant_operand(node) if is_op(node, "Mul") and node.outputs else None
        if found is None or found[1].size != 1 or not np.isfinite(found[1]).all() or not found[1].all():
            continue
        source, factor, _ = found
        scaled = _scaled_by(source, node, kept) if same_dims(source, node.outputs[0], 0) else None
        if scaled:
            take_place(node, source)
            for reader, index in scaled:
                values = const_at(reader, index)
                if values is None:
                    reader.inputs[index].name = fresh_name(graph, f"{reader.inputs[index].name}_scaled")
                else:
                    set_constant(graph, reader, index, values.astype(np.float64) * float(factor.reshape(-1)[0]))
            changes += 1
    return changes


def _scaled_by(tensor: gs.Tensor, reader: gs.Node, kept: set[int]) -> list[tuple[gs.Node, int]] | None:
    """Return all inputs, as node and index, that are multiplied where the value is: the constants and what lies between.

    None where others read the value or what it comes from.
    """
    node = tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None
    if node is None or not only_for(tensor, reader, kept) or len(node.outputs) != 1:
        return None
    if is_op(node, *LINEAR) and const_at(node, 1) is not None:
        if _linear_shape(node) is None or len(node.inputs[1].outputs) > 1:
            return None
        return [(node, 1)] if const_at(node, 2) is None else [(node, 1), (node, 2)]
    if is_op(node, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"):
        return _scaled_through(node, 0, kept)
    if is_op(node, "MatMul"):  # of one value with itself, the product would be scaled twice
        squares = node.inputs[0] is node.inputs[1]
        return None if squares else _scaled_through(node, 0, kept) or _scaled_through(node, 1, kept)
    bias = constant_operand(node) if is_op(node, "Add") else None
    before = None if bias is None else _scaled_through(node, 1 - bias[2], kept)
    return None if bias is None or before is None else [*before, (node, bias[2])]


def _scaled_through(node: gs.Node, index: int, kept: set[int]) -> list[tuple[gs.Node, int]] | None:
    """The same where an input of the node is multiplied, that input among them."""
    before = _scaled_by(node.inputs[index], node, kept)
    return None if before is None else [*before, (node, index)]


def use_products(graph: gs.Graph) -> int:
    """Write the division by a constant as a product, which runtimes execute on integers."""
    changes = 0
    for node in graph.nodes:
        divisor = const_at(node, 1) if is_op(node, "Div") else None
        if divisor is not None and divisor.dtype == np.float32 and np.all(np.isfinite(1 / divisor.astype(np.float64))):
            node.op = "Mul"
            node.inputs[1] = new_constant(
                graph, node.inputs[1].name, (1 / divisor.astype(np.float64)).astype(np.float32)
            )
            changes += 1
    return changes


def fold_bias(graph: gs.Graph) -> int:
    """Fold a sum with a constant per channel into the bias of the linear operator before it."""
    return _fold_into_producer(graph, "Add", "Sub")


def split_masks(graph: gs.Graph) -> int:
    """Take out of biases what rules classes out (-inf, -1e9): on one grid with it, all other scores would be equal."""
    kept = output_ids(graph)
    changes = 0
    for node in list(graph.nodes):
        bias = const_at(node, 2) if is_op(node, "Conv", "ConvTranspose", "Gemm") and _linear_shape(node) else None
        if bias is None or bias.ndim != 1 or not node.outputs:
            continue
        if not masks_sum(bias, node.outputs[0], kept):
            if np.isneginf(bias).any() and is_bounded_below(node.outputs[0], kept):  # a number does as well there
                set_constant(graph, node, 2, np.maximum(bias, _LEAST))
                changes += 1
            continue
        out = ruled_out(bias)
        mask = np.where(out, bias, 0).astype(bias.dtype)
        set_constant(graph, node, 2, np.where(out, 0, bias))
        spread = () if node.op == "Gemm" else (1,) * (len(node.inputs[1].shape) - 2)
        _add_behind(graph, node, mask.reshape(-1, *spread), "mask")
        changes += 1
    return changes


def fold_forward(graph: gs.Graph) -> int:
    """Fold a BatchNormalization, product or sum per channel into the linear operator after it, where it is exact.

    But for what evens out the columns of an input: without it, one grid would have to serve them all.
    """
    kept = output_ids(graph)
    uneven = {id(tensor) for tensor in graph.inputs if tensor.name in extras(graph).uneven}
    changes = 0
    for node in graph.nodes:
        while is_op(node, "Conv", "ConvTranspose", "Gemm"):
            before = producer(node.inputs[0], "BatchNormalization", "Add", "Sub", "Mul", "Div")
            alone = before is not None and only_for(node.inputs[0], node, kept)
            if before is None or not alone or _comes_from(before, uneven) or not _absorb_before(graph, node, before):
                break
            before.inputs.clear()
            before.outputs.clear()
            changes += 1
    return changes


def _comes_from(node: gs.Node, inputs: set[int]) -> bool:
    """Whether a node reads one of these inputs by way of sums, products and moves alone."""
    stack, seen = [node] if inputs else [], set[int]()
    while stack:
        for tensor in stack.pop().inputs:
            if id(tensor) in inputs:
                return True
            if id(tensor) not in seen:
                seen.add(id(tensor))
                stack += [before for before in tensor.inputs if is_op(before, *_COLUMNWISE)]
    return False


def _absorb_before(graph: gs.Graph, linear: gs.Node, node: gs.Node) -> bool:
    weight, bias = const_at(linear, 1), const_at(linear, 2)
    if weight is None or _linear_shape(linear) is None or linear.attrs.get("transA"):
        return False
    group = linear.attrs.get("group", 1)
    grouped, inputs = _input_channels(linear, weight.astype(np.float64))
    found = _affine(node, 1, 2 if linear.op == "Gemm" else weight.ndim, inputs)
    if found is None or not (np.isfinite(found[1]).all() and np.isfinite(found[2]).all()):
        return False
    source, scale, shift = found
    rescales, shifts = bool(np.any(scale != 1)), bool(np.any(shift != 0))
    shape = shape_of(source) or []
    if len(shape) != (2 if linear.op == "Gemm" else weight.ndim) or shape[1] != inputs:
        return False  # the constant widens its input
    if (shifts and not _sees_no_padding(linear)) or (rescales and len(linear.inputs[1].outputs) > 1):
        return False
    wide = scale.reshape(group, 1, -1, *(1,) * (grouped.ndim - 3))
    if shifts:
        offset = (grouped * shift.reshape(wide.shape)).sum(axis=tuple(range(2, grouped.ndim))).reshape(-1)
        set_constant(graph, linear, 2, (offset + (0 if bias is None else bias)).astype(weight.dtype))
    if rescales:
        set_constant(graph, linear, 1, _from_grouped(linear, grouped * wide, weight))
    linear.inputs[0] = source
    return True


def behind_affine(source: gs.Tensor, low: Array, high: Array) -> tuple[gs.Tensor, Array, Array]:
    """The value behind the sums and products per column that alone read another one, and the ranges of its columns."""
    rank = rank_of(source) or 0
    while len(source.outputs) == 1:
        (node,) = source.outputs
        found = _affine(node, 1, rank, len(low)) if rank_of(node.outputs[0]) == rank > 1 else None
        if found is None:
            break
        _, scale, shift = found
        ends = scale * low + shift, scale * high + shift
        source, low, high = node.outputs[0], np.minimum(*ends), np.maximum(*ends)
    return source, low, high


def even_columns(graph: gs.Graph, source: gs.Tensor, low: Array, high: Array) -> bool:
    """Bring columns of these ranges to one size; True where that was needed, and all that reads them are layers that can."""
    readers = list({id(node): node for node in source.outputs}.values())
    if (
        are_served(low, high, INPUT_STEPS)
        or not readers
        or not all(_reads_columns(node, source, len(low)) for node in readers)
    ):
        return False
    reach = np.maximum(np.abs(low), np.abs(high))
    far = (reach > FAR * (high - low)) & (high > low)
    shift = np.where(far, ((low + high) / 2).astype(np.float32), 0.0)
    if far.any() and not all(_sees_no_padding(node) and not is_op(node, "MatMul") for node in readers):
        shift = np.zeros_like(shift)
    size = np.maximum(np.abs(low - shift), np.abs(high - shift))
    scale = 2.0 ** -np.clip(np.round(np.log2(np.where(size > 0, size, 1.0))), -60, 60)
    spread = (-1, *(1,) * (len(source.shape or ()) - 2))
    value, spread = source, (1, *spread)
    first = readers[0]
    for op, by, neutral in (("Sub", shift, 0.0), ("Mul", scale, 1.0)):
        if np.any(by != neutral):
            constant = new_constant(graph, f"{source.name}_{op.lower()}", by.reshape(spread).astype(np.float32))
            value = new_node(graph, op, [value, constant], like=first)
            value.dtype, value.shape = source.dtype, source.shape
    for node in readers:
        weight = const_at(node, 1)
        assert weight is not None
        grouped, _ = _input_channels(node, weight.astype(np.float64))
        wide = (node.attrs.get("group", 1), 1, -1, *(1,) * (grouped.ndim - 3))
        if shift.any():
            bias = const_at(node, 2)
            offset = (grouped * shift.reshape(wide)).sum(axis=tuple(range(2, grouped.ndim))).reshape(-1)
            set_constant(graph, node, 2, (offset + (0 if bias is None else bias)).astype(weight.dtype))
        set_constant(graph, node, 1, _from_grouped(node, grouped / scale.reshape(wide), weight))
        node.inputs[0] = value
    graph.toposort()
    return True


def _reads_columns(node: gs.Node, source: gs.Tensor, columns: int) -> bool:
    """Whether a node is a layer that multiplies so many columns (channels) of a value by constants of its own."""
    weight = const_at(node, 1) if is_op(node, *LINEAR) else None
    if weight is None or node.inputs[0] is not source or node.attrs.get("transA") or len(node.inputs[1].outputs) > 1:
        return False
    bias = const_at(node, 2)
    if bias is None and input_at(node, 2) is not None:
        return False
    rank = 2 if is_op(node, "Gemm", "MatMul") else weight.ndim
    return weight.ndim == rank and rank_of(source) == rank and _input_channels(node, weight)[1] == columns


def _input_channels(linear: gs.Node, weight: Array) -> tuple[Array, int]:
    """Return the weight as [group, out, in, ...] and the number of input channels."""
    group = linear.attrs.get("group", 1)
    if linear.op in ("Gemm", "MatMul"):
        matrix = weight if linear.attrs.get("transB") else weight.T
        return matrix[None], matrix.shape[1]
    if linear.op == "Conv":
        return weight.reshape(group, -1, *weight.shape[1:]), weight.shape[1] * group
    return weight.reshape(group, -1, *weight.shape[1:]).swapaxes(1, 2), weight.shape[0]


def _from_grouped(linear: gs.Node, grouped: Array, weight: Array) -> Array:
    if linear.op in ("Gemm", "MatMul"):
        matrix: Array = grouped[0]
        return matrix if linear.attrs.get("transB") else matrix.T
    return (grouped.swapaxes(1, 2) if linear.op == "ConvTranspose" else grouped).reshape(weight.shape)


def _sees_no_padding(linear: gs.Node) -> bool:
    if linear.op in ("Gemm", "MatMul"):
        return True
    explicit = linear.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and not any(linear.attrs.get("pads", []))
    return linear.op == "Conv" and explicit


def split_biases(graph: gs.Graph) -> int:
    """Give every linear operator a bias of its own: its grid depends on the node's input and weight."""
    changes = 0
    for node in graph.nodes:
        index = 2 if is_op(node, "Conv", "ConvTranspose", "Gemm") else _added_bias(node)
        bias = None if index is None else input_at(node, index)
        if index is not None and isinstance(bias, gs.Constant) and len(bias.outputs) > 1 and array(bias) is not None:
            node.inputs[index] = new_constant(graph, bias.name, np.array(array(bias)))
            changes += 1
    return changes


def _added_bias(node: gs.Node) -> int | None:
    """Which input of an Add is the bias of the MatMul that the other one comes from; None where there is none."""
    found = constant_operand(node) if is_op(node, "Add") else None
    if found is None or found[1].ndim != 1:
        return None
    source = producer(found[0], "MatMul")
    return found[2] if source is not None and const_at(source, 1) is not None else None


def split_weights(graph: gs.Graph) -> int:
    """Copy a weight that nodes use in different roles or with different channel axes; equal uses keep sharing it."""
    shared = {id(t): t for n in graph.nodes for t in n.inputs if isinstance(t, gs.Constant) and len(t.outputs) > 1}
    changes = 0
    for tensor in shared.values():
        values = array(tensor)
        roles: dict[Any, list[gs.Node]] = {}
        for node in tensor.outputs:
            roles.setdefault(_role(node, tensor), []).append(node)
        weights = [role for role in roles if role is not None]
        if values is None or values.ndim < 2 or not weights:
            continue
        for role in weights[0 if None in roles else 1 :]:
            copy = new_constant(graph, tensor.name, np.array(values))
            for node in roles[role]:
                node.inputs[1] = copy
            changes += 1
    return changes


def _role(node: gs.Node, tensor: gs.Tensor) -> tuple[str, int] | None:
    """Return what a linear operator uses the weight for and along which axis its channels lie; None for other uses."""
    if not is_op(node, *LINEAR) or node.inputs[1] is not tensor or sum(t is tensor for t in node.inputs) > 1:
        return None
    if node.op in ("Gemm", "MatMul"):
        return "matrix", 0 if node.attrs.get("transB") else 1
    return node.op, 0 if node.op == "Conv" else 1
