"""Looking at graphs and editing them: what the preparation passes share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

from onnx_eptq import graph as og
from onnx_eptq.graph import array, constant, is_op

Array = np.ndarray[Any, Any]
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
INT_MAX = 2**31 - 1


def output_ids(graph: gs.Graph) -> set[int]:
    """Return the ids of the values that must keep their meaning: outputs of the graph and of its subgraphs."""
    return {id(tensor) for scope in og.scopes(graph) for tensor in scope.outputs}


def input_at(node: gs.Node, index: int) -> gs.Tensor | None:
    """Return the input, or None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) and node.inputs[index].name else None


def const_at(node: gs.Node, index: int) -> Array | None:
    """The values of an input that is a constant, else None."""
    tensor = input_at(node, index)
    return None if tensor is None else array(tensor)


def ints_at(node: gs.Node, index: int, attribute: str = "") -> list[int] | None:
    """Return a constant integer vector that is an input or, in other operators, an attribute."""
    values = const_at(node, index)
    return node.attrs.get(attribute) if values is None else [int(v) for v in values.reshape(-1)]


def shape_of(tensor: gs.Tensor) -> list[int | str | None] | None:
    """A value's sizes, as far as they are known; None without a rank."""
    return None if tensor.shape is None else list(tensor.shape)


def rank_of(tensor: gs.Tensor) -> int | None:
    """How many axes a value has, None where that is unknown."""
    return None if tensor.shape is None else len(tensor.shape)


def producer(tensor: gs.Tensor | None, *ops: str) -> gs.Node | None:
    """Return the node that makes the value if it is one of these operators."""
    if tensor is None or not tensor.inputs or not is_op(tensor.inputs[0], *ops):
        return None
    return tensor.inputs[0]


def only_for(tensor: gs.Tensor, node: gs.Node, kept: set[int]) -> bool:
    """Tell whether nothing but this node reads the value."""
    return id(tensor) not in kept and all(consumer is node for consumer in tensor.outputs)


def replace_uses(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let all readers of a value read another one."""
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def bypass(graph: gs.Graph, node: gs.Node, source: gs.Tensor, kept: set[int]) -> bool:
    """Take out a node whose only value in use equals `source`; False where an output's name forbids it."""
    out = node.outputs[0]
    if id(out) not in kept:
        replace_uses(out, source)
        node.inputs.clear()
        node.outputs.clear()
        return True
    movable = isinstance(source, gs.Variable) and source.inputs and id(source) not in kept
    if not movable or not any(out is t for t in graph.outputs):
        return False
    take_place(node, source)
    replace_uses(source, out)
    return True


def take_place(node: gs.Node, source: gs.Tensor) -> None:
    """Let what makes `source` make the node's value instead, under that value's name, and take the node out."""
    maker, out = source.inputs[0], node.outputs[0]
    index = next(i for i, tensor in enumerate(maker.outputs) if tensor is source)
    node.inputs.clear()
    node.outputs.clear()
    maker.outputs[index] = out


def fresh_name(graph: gs.Graph, base: str) -> str:
    """A name that begins with `base` and is taken by none."""
    graph.name_idx += 1
    return f"{base}/{graph.name_idx}"


def new_constant(graph: gs.Graph, base: str, values: Array) -> gs.Constant:
    """A constant under a fresh name."""
    return constant(fresh_name(graph, base), values)


def new_node(
    graph: gs.Graph, op: str, inputs: Sequence[gs.Tensor], like: gs.Node, attrs: dict[str, Any] | None = None
) -> gs.Variable:
    """Add a node named after another one and return its value, of unknown shape."""
    name = fresh_name(graph, like.name)
    out = gs.Variable(f"{name}_out")
    graph.nodes.append(gs.Node(op, name, attrs or {}, list(inputs), [out]))
    return out


def mutate(node: gs.Node, op: str, inputs: Sequence[gs.Tensor], attrs: dict[str, Any]) -> None:
    """Turn the node into another one that makes the same value."""
    inputs = list(inputs)
    node.op, node.domain, node.attrs = op, None, dict(attrs)
    node.inputs.clear()
    node.inputs.extend(inputs)


def shorten(tensors: list[gs.Tensor], length: int) -> None:
    """Drop all but the first of a node's inputs or outputs: graphsurgeon's lists know no slices."""
    while len(tensors) > length:
        tensors.pop()


def set_constant(graph: gs.Graph, node: gs.Node, index: int, values: Array) -> None:
    """Give the node new constant values for an input, in place where no other node reads them."""
    old = input_at(node, index)
    if isinstance(old, gs.Constant):
        values = np.asarray(values, array(old).dtype)  # type: ignore[union-attr]  # numpy makes numbers of 0-d arrays
        if len(old.outputs) == 1:
            old.values = values
            return
        node.inputs[index] = new_constant(graph, old.name, values)
        return
    while len(node.inputs) <= index:
        node.inputs.append(gs.Variable.empty())
    weight = node.inputs[1] if index == 2 else None  # by which a bias is known, in few bytes
    base = f"{weight.name}_bias" if isinstance(weight, gs.Constant) else f"{node.name}/input{index}"
    node.inputs[index] = new_constant(graph, base, values)


def constant_operand(node: gs.Node) -> tuple[gs.Tensor, Array, int] | None:
    """Return the variable, the constant values and the constant's position for a node with one of each."""
    for index in (1, 0):
        values = const_at(node, index)
        other = input_at(node, 1 - index)
        if values is not None and isinstance(other, gs.Variable):
            return other, values, index
    return None


def same_dims(a: gs.Tensor, b: gs.Tensor, unknown: int) -> bool:
    """Tell whether two shapes agree but for at most `unknown` dimensions that are not known to agree."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    differing = [(x, y) for x, y in zip(a.shape, b.shape, strict=True) if x is None or x != y]
    static = any(isinstance(x, int) and isinstance(y, int) for x, y in differing)
    return not static and len(differing) <= unknown


def axis_of(node: gs.Node, rank: int, default: int = 1) -> int:
    """A node's axis, counted from the front."""
    return int(node.attrs.get("axis", default)) % rank


def dtype_of(tensor: gs.Tensor) -> int | None:
    """A value's ONNX element type, None where it is unknown."""
    return None if tensor.dtype is None else dtype_to_onnx(tensor.dtype)


def axes_of(node: gs.Node, index: int, rank: int, default: Sequence[int]) -> list[int] | None:
    """Return the axes input, made non-negative, or the default where it is left out; None if it is computed."""
    if input_at(node, index) is None:
        return list(default)
    axes = ints_at(node, index)
    return None if axes is None else [axis % rank for axis in axes]
