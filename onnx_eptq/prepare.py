"""Bring a float graph into the plain form that the rest of the package expects, without changing what it computes.

`prepare` raises the opset, then runs the rewrites of `PASSES` until none of them finds anything. Every pass takes a
graph whose shapes are inferred, edits it in place and returns how many changes it made. Names, shapes and types of the
graph's inputs and outputs never change. Only the top-level graph is rewritten, never the body of an If or a Loop.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter, dtype_to_onnx

from onnx_eptq import graph as og
from onnx_eptq.errors import ModelError
from onnx_eptq.graph import array, constant, is_bounded_below, is_op, masks_sum, ruled_out

LOG = logging.getLogger(__name__)
OPSET = 21
Pass = Callable[[gs.Graph], int]
Array = np.ndarray[Any, Any]
Memo = dict[int, tuple[gs.Tensor, Array | None]]  # holds the tensor, so that its id is not given to another
PASSES: dict[str, Pass] = {}
_ROUNDS = 20  # a bound on the repetitions; real models settle in two to four
_FOLDED_BYTES = 4096  # a folded constant may be this large even where its inputs were smaller
_INT_MAX = 2**31 - 1
_LEAST = -1e30  # stands for minus infinity
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NUMBERED = re.compile(r"/\d+$")  # what `_name` puts behind a name
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def rewrite(function: Pass) -> Pass:
    """Register a pass under its function's name; passes run in the order of definition."""
    PASSES[function.__name__] = function
    return function


def prepare(graph: gs.Graph, *, opset: int = OPSET) -> dict[str, int]:
    """Rewrite the graph in place and return how many changes each pass made.

    Raises:
        ModelError: The graph cannot be brought to the opset.
    """
    tensors = graph.tensors()
    named = {name for name, tensor in tensors.items() if isinstance(tensor, gs.Constant)}
    numbers = (match.group(0)[1:] for match in map(_NUMBERED.search, tensors) if match and len(match.group(0)) < 8)
    graph.name_idx = max(graph.name_idx, *map(int, numbers), 0)  # names to come are taken by none
    to_opset(graph, opset)
    og.remove_dead(graph)
    og.infer_shapes(graph)
    counts = dict.fromkeys(PASSES, 0)
    for _ in range(_ROUNDS):
        before = sum(counts.values())
        for name in PASSES:
            counts[name] += run_pass(name, graph)
        if sum(counts.values()) == before:
            break
    _restore_names(graph, named)
    return counts


def _restore_names(graph: gs.Graph, named: set[str]) -> None:
    """Give rewritten constants the names they came with, by which users know them, where one alone has taken the place."""
    taken = {tensor.name for scope in og.scopes(graph) for tensor in og.tensors_of(scope)}
    heirs: dict[str, list[gs.Tensor]] = {}
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and tensor.name not in named:
            origin = tensor.name
            while origin not in named and _NUMBERED.search(origin):
                origin = _NUMBERED.sub("", origin)
            heirs.setdefault(origin, []).append(tensor)
    for name, tensors in heirs.items():
        if name in named and name not in taken and len(tensors) == 1:
            tensors[0].name = name


def run_pass(name: str, graph: gs.Graph) -> int:
    """Run one pass on a graph with inferred shapes, tidy up after it, and return how many changes it made."""
    changes = PASSES[name](graph)
    if changes:
        LOG.debug("%s: %d", name, changes)
        og.remove_dead(graph)
        og.infer_shapes(graph)
    return changes


# ------------------------------------------------------------------------------------------------------------- opset


def to_opset(graph: gs.Graph, opset: int = OPSET) -> None:
    """Convert the graph's nodes to the opset, in place; a newer graph that needs its own opset is left as it is.

    Raises:
        ModelError: A node has no form in the opset wanted.
    """
    if graph.opset < opset:
        _raise_opset(graph, opset)
    elif graph.opset > opset:
        og.infer_shapes(graph)
        if all(_fits(node, opset) for scope in og.scopes(graph) for node in scope.nodes):
            _declare_opset(graph, opset)


def lower_opset(graph: gs.Graph, opset: int) -> None:
    """Rewrite the nodes of a graph for an older opset, in place, and declare it; younger ones go to pieces where that is exact.

    Raises:
        ModelError: A node has no form in the opset wanted.
    """
    for node in [node for node in graph.nodes if is_op(node, *_PIECES) and not _fits(node, opset)]:
        _PIECES[node.op](graph, node)
    og.toposort(graph)
    for node in (node for node in graph.nodes if node.domain in og.STANDARD_DOMAINS):
        axes = _const(node, 1)
        if node.op.startswith("Reduce") and node.op != "ReduceSum" and axes is not None:
            node.attrs["axes"] = [int(axis) for axis in axes.ravel()]
            _shorten(node.inputs, 1)
        schema, older = onnx.defs.get_schema(node.op, graph.opset, ""), _schema(node.op, opset)
        if older:
            for name in set(node.attrs) - set(older.attributes):
                default = onnx.helper.get_attribute_value(schema.attributes[name].default_value)
                default = default.decode() if isinstance(default, bytes) else default
                if node.attrs[name] == default or (node.op, name) == ("Split", "num_outputs"):
                    del node.attrs[name]
    nodes = (node for scope in og.scopes(graph) for node in scope.nodes)
    stuck = [f"'{node.name}' {node.op}" for node in nodes if not _fits(node, opset)]
    if stuck:
        raise ModelError(f"These nodes have no form in opset {opset}: {', '.join(stuck)}; use a newer one.")
    _declare_opset(graph, opset)


def _layer_norm_pieces(graph: gs.Graph, node: gs.Node) -> None:
    """LayerNormalization: (x - mean) / sqrt(variance + epsilon) * scale + bias."""
    x, rank = node.inputs[0], _rank(node.inputs[0])
    axis = int(node.attrs.get("axis", -1))
    kept = _output_ids(graph)
    if rank is None or any(output.outputs or id(output) in kept for output in node.outputs[1:]):
        return
    _shorten(node.outputs, 1)
    mean = {"axes": list(range(axis % rank, rank)), "keepdims": 1}
    error = _new_node(graph, "Sub", [x, _new_node(graph, "ReduceMean", [x], node, mean)], node)
    variance = _new_node(graph, "ReduceMean", [_new_node(graph, "Mul", [error, error], node)], node, mean)
    shifted = _new_node(graph, "Add", [variance, _number(graph, node, node.attrs.get("epsilon", 1e-5))], node)
    unit = _new_node(graph, "Div", [error, _new_node(graph, "Sqrt", [shifted], node)], node)
    bias = _input(node, 2)
    if bias is None:
        _mutate(node, "Mul", [unit, node.inputs[1]], {})
    else:
        _mutate(node, "Add", [_new_node(graph, "Mul", [unit, node.inputs[1]], node), bias], {})


def _gelu_pieces(graph: gs.Graph, node: gs.Node) -> None:
    """Gelu: x / 2 * (1 + erf(x / sqrt 2)), or with tanh(sqrt(2 / pi) (x + 0.044715 x ** 3)) for the error function."""
    x = node.inputs[0]
    if node.attrs.get("approximate", "none") == "tanh":
        cube = _new_node(graph, "Mul", [x, _new_node(graph, "Mul", [x, x], node)], node)
        part = _new_node(graph, "Mul", [cube, _number(graph, node, 0.044715)], node)
        total = _new_node(graph, "Add", [x, part], node)
        inner = _new_node(graph, "Mul", [total, _number(graph, node, math.sqrt(2 / math.pi))], node)
        bent = _new_node(graph, "Tanh", [inner], node)
    else:
        inner = _new_node(graph, "Div", [x, _number(graph, node, math.sqrt(2))], node)
        bent = _new_node(graph, "Erf", [inner], node)
    gate = _new_node(graph, "Add", [bent, _number(graph, node, 1)], node)
    _mutate(node, "Mul", [_new_node(graph, "Mul", [x, gate], node), _number(graph, node, 0.5)], {})


def _hard_swish_pieces(graph: gs.Graph, node: gs.Node) -> None:
    """HardSwish: x * HardSigmoid(x)."""
    x = node.inputs[0]
    _mutate(node, "Mul", [x, _new_node(graph, "HardSigmoid", [x], node, {"alpha": 1 / 6, "beta": 0.5})], {})


def _mish_pieces(graph: gs.Graph, node: gs.Node) -> None:
    """Mish: x * tanh(softplus(x))."""
    x = node.inputs[0]
    _mutate(node, "Mul", [x, _new_node(graph, "Tanh", [_new_node(graph, "Softplus", [x], node)], node)], {})


def _shape_pieces(graph: gs.Graph, node: gs.Node) -> None:
    """Shape with bounds: a slice of the whole shape."""
    ends = (node.attrs.get("start", 0), node.attrs.get("end", _INT_MAX))
    bounds = [_new_constant(graph, f"{node.name}_bound", np.array([end], np.int64)) for end in ends]
    _mutate(node, "Slice", [_new_node(graph, "Shape", node.inputs, node), *bounds], {})


def _reshape_pieces(graph: gs.Graph, node: gs.Node) -> None:
    """Reshape with `allowzero`: without it, where no size is 0."""
    if _is_never_zero(node.inputs[1]):
        node.attrs.pop("allowzero", None)


def _is_never_zero(sizes: gs.Tensor) -> bool:
    """Whether no element of a shape is 0, dimensions of values being none."""
    values = array(sizes)
    if values is not None:
        return bool(np.all(values != 0))
    node = sizes.inputs[0] if sizes.inputs else None
    if node is None or not is_op(node, "Shape", "Concat", "Gather", "Slice", "Squeeze", "Unsqueeze", "Cast"):
        return False
    return is_op(node, "Shape") or all(
        _is_never_zero(tensor) for tensor in (node.inputs if is_op(node, "Concat") else node.inputs[:1])
    )


def _number(graph: gs.Graph, node: gs.Node, value: float) -> gs.Constant:
    return _new_constant(graph, f"{node.name}_constant", np.array(value, np.float32))


_PIECES: dict[str, Callable[[gs.Graph, gs.Node], None]] = {
    "LayerNormalization": _layer_norm_pieces,
    "Gelu": _gelu_pieces,
    "HardSwish": _hard_swish_pieces,
    "Mish": _mish_pieces,
    "Shape": _shape_pieces,
    "Reshape": _reshape_pieces,
}


def _schema(op: str, opset: int) -> Any:
    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None


def _declare_opset(graph: gs.Graph, opset: int) -> None:
    for scope in og.scopes(graph):
        scope.opset = opset


def _raise_opset(graph: gs.Graph, opset: int) -> None:
    floor_nodes = _help_converter(graph, opset)
    proto = og.skeleton(graph)
    try:
        converted = onnx.version_converter.convert_version(proto, opset)
    except RuntimeError as error:
        raise ModelError(_inconvertible(proto, opset, error)) from error
    names = {node.output[0]: node.name for node in proto.graph.node if node.output}
    for node in converted.graph.node:
        node.name = names.get(node.output[0], node.name)  # an Upsample loses its name
        if node.output[0] in floor_nodes:
            _set_floor(node, floor_nodes[node.output[0]])
    weights = {t.name: t for scope in og.scopes(graph) for node in scope.nodes for t in node.inputs}
    inputs = {t.name: t for t in graph.inputs}
    outputs = {t.name: t for t in graph.outputs}
    new = og.load(converted)
    for tensor in new.inputs:
        if tensor.name not in inputs:
            _replace_uses(tensor, weights[tensor.name])
    new.inputs = [t for t in new.inputs if t.name in inputs]
    for tensor in [*new.inputs, *new.outputs]:
        old = inputs.get(tensor.name) or outputs[tensor.name]
        if isinstance(tensor, gs.Variable):
            tensor.dtype, tensor.shape, tensor.type = old.dtype, old.shape, old.type
    for node in [node for scope in og.scopes(graph) for node in scope.nodes]:
        node.inputs.clear()  # else the kept weights would count them as readers
    for name, kept in og.extras(graph).nodes.items():
        found = og.extras(new).nodes.get(name)
        kept.op, kept.attributes = (found.op, found.attributes) if found else ("", [])
    graph.nodes, graph.inputs, graph.outputs = new.nodes, new.inputs, new.outputs
    _declare_opset(graph, opset)


def _help_converter(graph: gs.Graph, opset: int) -> dict[str, bool]:
    """Rewrite what onnx's converter refuses or gets wrong, and return the values that nodes make by resizing.

    Before opset 11 those nodes took the pixel below (asymmetric, floor); the converter leaves the newer default. The
    value tells whether the node shrinks the image, where the old definition took the pixel above.

    Raises:
        ModelError: A node's old meaning has no simple form in the newer opset.
    """
    og.infer_shapes(graph)
    sampling: dict[str, bool] = {}
    stuck = []
    for node in [node for scope in og.scopes(graph) for node in scope.nodes]:
        rank = _rank(node.inputs[0]) if node.inputs else None
        if is_op(node, "Upsample", "Resize") and graph.opset < 11:
            scales = _const(node, 1)
            sampling[node.outputs[0].name] = scales is not None and bool(np.any(scales < 1))
        elif is_op(node, "BatchNormalization") and node.attrs.pop("spatial", 1) != 1 and rank != 2:
            stuck.append(f"'{node.name}' BatchNormalization with spatial = 0")
        elif is_op(node, "Scan") and graph.opset < 9:
            stuck.append(f"'{node.name}' Scan over a batch")
        elif is_op(node, "Hardmax") and graph.opset < 13 and (rank is None or _axis(node, rank) != rank - 1):
            stuck.append(f"'{node.name}' Hardmax over several axes")
        elif is_op(node, "GroupNormalization") and graph.opset < 21 <= opset and not _widen_group_norm(graph, node):
            stuck.append(f"'{node.name}' GroupNormalization with computed scales")
    if stuck:
        raise ModelError(
            f"{len(stuck)} nodes cannot be converted from opset {graph.opset} to {opset}: {', '.join(stuck)}; "
            "export the model again with a newer opset, or without them."
        )
    return sampling


def _widen_group_norm(graph: gs.Graph, node: gs.Node) -> bool:
    """Write scale and bias per channel; before opset 21 they were per group."""
    shape = _shape(node.inputs[0])
    channels = shape[1] if shape is not None else None
    for index in (1, 2):
        values = _const(node, index)
        if values is None or not isinstance(channels, int):
            return False
        _set_constant(graph, node, index, np.repeat(values, channels // values.size))
    return True


def _set_floor(node: onnx.NodeProto, shrinks: bool) -> None:
    wanted = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "ceil" if shrinks else "floor"}
    kept = [a for a in node.attribute if a.name not in wanted]
    del node.attribute[:]
    node.attribute.extend([*kept, *(onnx.helper.make_attribute(k, v) for k, v in wanted.items())])


def _inconvertible(proto: onnx.ModelProto, opset: int, error: Exception) -> str:
    """Say which nodes the converter refuses, by converting each of them alone."""
    refused = []
    for node in proto.graph.node:
        single = onnx.ModelProto()
        single.CopyFrom(proto)
        del single.graph.node[:]
        single.graph.node.append(node)
        del single.graph.output[:]
        single.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in node.output if name)
        made = {v.name for v in single.graph.input} | {t.name for t in single.graph.initializer}
        missing = [name for name in dict.fromkeys(node.input) if name and name not in made]
        single.graph.input.extend(onnx.helper.make_tensor_value_info(n, 1, None) for n in missing)
        try:
            onnx.version_converter.convert_version(single, opset)
        except RuntimeError:
            refused.append(f"'{node.name}' {node.op_type}")
    found = proto.opset_import[0].version
    reason = f"these nodes have no known newer form: {', '.join(refused)}" if refused else " ".join(str(error).split())
    return (
        f"The model (opset {found}) cannot be converted to opset {opset}: {reason}; export it with opset 17 or later."
    )


def _fits(node: gs.Node, opset: int) -> bool:
    """Tell whether the node, written for a newer opset, is valid and means the same in the older one."""
    if node.domain not in og.STANDARD_DOMAINS:
        return True
    schema = _schema(node.op, opset)
    if schema is None:
        return False
    present = len(node.inputs) <= schema.max_input and len(node.outputs) <= schema.max_output
    return present and set(node.attrs) <= set(schema.attributes) and _types_fit(node, schema)


def _types_fit(node: gs.Node, schema: Any) -> bool:
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    for formals, tensors in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for index, tensor in enumerate(tensors):
            formal = formals[min(index, len(formals) - 1)]
            if tensor.name and tensor.dtype is not None:
                name = onnx.TensorProto.DataType.Name(dtype_to_onnx(tensor.dtype)).lower()
                if f"tensor({name})" not in allowed.get(formal.type_str, {formal.type_str}):
                    return False
    return True


# ------------------------------------------------------------------------------------------------- looking and editing


def _output_ids(graph: gs.Graph) -> set[int]:
    """Return the ids of the values that must keep their meaning: outputs of the graph and of its subgraphs."""
    return {id(tensor) for scope in og.scopes(graph) for tensor in scope.outputs}


def _input(node: gs.Node, index: int) -> gs.Tensor | None:
    """Return the input, or None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) and node.inputs[index].name else None


def _const(node: gs.Node, index: int) -> Array | None:
    tensor = _input(node, index)
    return None if tensor is None else array(tensor)


def _ints(node: gs.Node, index: int, attribute: str = "") -> list[int] | None:
    """Return a constant integer vector that is an input or, in other operators, an attribute."""
    values = _const(node, index)
    return node.attrs.get(attribute) if values is None else [int(v) for v in values.reshape(-1)]


def _shape(tensor: gs.Tensor) -> list[int | str | None] | None:
    return None if tensor.shape is None else list(tensor.shape)


def _rank(tensor: gs.Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


def _producer(tensor: gs.Tensor | None, *ops: str) -> gs.Node | None:
    """Return the node that makes the value if it is one of these operators."""
    if tensor is None or not tensor.inputs or not is_op(tensor.inputs[0], *ops):
        return None
    return tensor.inputs[0]


def _only_for(tensor: gs.Tensor, node: gs.Node, kept: set[int]) -> bool:
    """Tell whether nothing but this node reads the value."""
    return id(tensor) not in kept and all(consumer is node for consumer in tensor.outputs)


def _replace_uses(old: gs.Tensor, new: gs.Tensor) -> None:
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def _bypass(graph: gs.Graph, node: gs.Node, source: gs.Tensor, kept: set[int]) -> bool:
    """Take out a node whose only value in use equals `source`; False where an output's name forbids it."""
    out = node.outputs[0]
    if id(out) not in kept:
        _replace_uses(out, source)
        node.inputs.clear()
        node.outputs.clear()
        return True
    movable = isinstance(source, gs.Variable) and source.inputs and id(source) not in kept
    if not movable or not any(out is t for t in graph.outputs):
        return False
    maker = source.inputs[0]
    index = next(i for i, t in enumerate(maker.outputs) if t is source)
    node.inputs.clear()
    node.outputs.clear()
    maker.outputs[index] = out
    _replace_uses(source, out)
    return True


def _name(graph: gs.Graph, base: str) -> str:
    graph.name_idx += 1
    return f"{base}/{graph.name_idx}"


def _new_constant(graph: gs.Graph, base: str, values: Array) -> gs.Constant:
    return constant(_name(graph, base), values)


def _new_node(
    graph: gs.Graph, op: str, inputs: Sequence[gs.Tensor], like: gs.Node, attrs: dict[str, Any] | None = None
) -> gs.Variable:
    """Add a node named after another one and return its value, of unknown shape."""
    name = _name(graph, like.name)
    out = gs.Variable(f"{name}_out")
    graph.nodes.append(gs.Node(op, name, attrs or {}, list(inputs), [out]))
    return out


def _mutate(node: gs.Node, op: str, inputs: Sequence[gs.Tensor], attrs: dict[str, Any]) -> None:
    """Turn the node into another one that makes the same value."""
    inputs = list(inputs)
    node.op, node.domain, node.attrs = op, None, dict(attrs)
    node.inputs.clear()
    node.inputs.extend(inputs)


def _shorten(tensors: list[gs.Tensor], length: int) -> None:
    """Drop all but the first of a node's inputs or outputs: graphsurgeon's lists know no slices."""
    while len(tensors) > length:
        tensors.pop()


def _set_constant(graph: gs.Graph, node: gs.Node, index: int, values: Array) -> None:
    """Give the node new constant values for an input, in place where no other node reads them."""
    old = _input(node, index)
    if isinstance(old, gs.Constant):
        values = values.astype(array(old).dtype)  # type: ignore[union-attr]
        if len(old.outputs) == 1:
            old.values = values
            return
        node.inputs[index] = _new_constant(graph, old.name, values)
        return
    while len(node.inputs) <= index:
        node.inputs.append(gs.Variable.empty())
    node.inputs[index] = _new_constant(graph, f"{node.name}/input{index}", values)


def _constant_operand(node: gs.Node) -> tuple[gs.Tensor, Array, int] | None:
    """Return the variable, the constant values and the constant's position for a node with one of each."""
    for index in (1, 0):
        values = _const(node, index)
        other = _input(node, 1 - index)
        if values is not None and isinstance(other, gs.Variable):
            return other, values, index
    return None


# ------------------------------------------------------------------------------------------------ nodes without effect


def _same_dims(a: gs.Tensor, b: gs.Tensor, unknown: int) -> bool:
    """Tell whether two shapes agree but for at most `unknown` dimensions that are not known to agree."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    differing = [(x, y) for x, y in zip(a.shape, b.shape, strict=True) if x is None or x != y]
    static = any(isinstance(x, int) and isinstance(y, int) for x, y in differing)
    return not static and len(differing) <= unknown


def _keeps_elements(node: gs.Node) -> bool:
    # The number of elements is kept, so one dimension that is not known to agree agrees as well.
    source, out = node.inputs[0], node.outputs[0]
    return _same_dims(source, out, 1) or (is_op(node, "Flatten") and _rank(source) == 2 and _axis(node, 2) == 1)


def _axis(node: gs.Node, rank: int, default: int = 1) -> int:
    return int(node.attrs.get("axis", default)) % rank


def _dtype(tensor: gs.Tensor) -> int | None:
    return None if tensor.dtype is None else dtype_to_onnx(tensor.dtype)


def _drops_nothing(node: gs.Node) -> bool:
    training = _input(node, 2)
    return training is None or (array(training) is not None and not np.any(array(training)))


def _slices_all(node: gs.Node) -> bool:
    starts, ends = _ints(node, 1), _ints(node, 2)
    if starts is None or ends is None:
        return False
    axes = _ints(node, 3) if _input(node, 3) is not None else list(range(len(starts)))
    steps = _ints(node, 4) if _input(node, 4) is not None else [1] * len(starts)
    shape = _shape(node.inputs[0])
    if axes is None or steps is None:
        return False
    return all(
        start == 0 and step == 1 and (end >= _INT_MAX or (shape is not None and _at_most(shape[axis], end)))
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    )


def _at_most(dim: int | str | None, end: int) -> bool:
    return isinstance(dim, int) and 0 <= dim <= end


def _is_neutral(value: float, positions: Sequence[int]) -> Callable[[gs.Node], bool]:
    def check(node: gs.Node) -> bool:
        found = _constant_operand(node)
        if found is None or found[2] not in positions or not np.all(found[1] == value):
            return False
        return (
            found[1].ndim == 0
            or (found[1].size == 1 and found[1].ndim <= (_rank(found[0]) or 0))
            or (_same_dims(found[0], node.outputs[0], 0))
        )

    return check


def _all_equal(index: int, value: float) -> Callable[[gs.Node], bool]:
    def check(node: gs.Node) -> bool:
        values = _const(node, index)
        return values is not None and values.size > 0 and bool(np.all(values == value))

    return check


def _pools_single(node: gs.Node) -> bool:
    plain = all(k == 1 for k in [*node.attrs["kernel_shape"], *node.attrs.get("strides", [])])
    return plain and not any(node.attrs.get("pads", []))


def _is_positive_already(node: gs.Node) -> bool:
    return _is_nonnegative(node.inputs[0])


def _is_nonnegative(tensor: gs.Tensor) -> bool:
    if _producer(tensor, "Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Softplus") is not None:
        return True
    clip = _producer(tensor, "Clip")
    low = None if clip is None else _const(clip, 1)
    if low is not None and low.size == 1 and float(low.reshape(-1)[0]) >= 0:
        return True
    through = _producer(tensor, "MaxPool", "AveragePool", "GlobalAveragePool", "Transpose", *_RESHAPES)
    return through is not None and _is_nonnegative(through.inputs[0])


NOOPS: dict[str, Callable[[gs.Node], bool]] = {
    "Identity": lambda node: True,
    "Dropout": _drops_nothing,
    "Cast": lambda node: _dtype(node.inputs[0]) == dtype_to_onnx(node.attrs["to"]),
    "CastLike": lambda node: _dtype(node.inputs[0]) is not None and _dtype(node.inputs[0]) == _dtype(node.inputs[1]),
    **dict.fromkeys(_RESHAPES, _keeps_elements),
    "Expand": lambda node: _same_dims(node.inputs[0], node.outputs[0], 0),
    "Tile": _all_equal(1, 1),
    "Transpose": lambda node: node.attrs.get("perm") == sorted(node.attrs.get("perm", [-1])),
    "Pad": _all_equal(1, 0),
    "Slice": _slices_all,
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), lambda node: len(node.inputs) == 1),
    "Split": lambda node: len(node.outputs) == 1,
    "Clip": lambda node: _input(node, 1) is None and _input(node, 2) is None,
    "Add": _is_neutral(0, (0, 1)),
    "Sub": _is_neutral(0, (1,)),
    "Mul": _is_neutral(1, (0, 1)),
    "Div": _is_neutral(1, (1,)),
    "Pow": _is_neutral(1, (1,)),
    **dict.fromkeys(("MaxPool", "AveragePool"), _pools_single),
    "Resize": lambda node: _all_equal(2, 1)(node) and _input(node, 3) is None,
    "Relu": _is_positive_already,
}


@rewrite
def remove_noops(graph: gs.Graph) -> int:
    """Remove nodes that hand on their input unchanged."""
    kept = _output_ids(graph)
    changes = 0
    for node in list(graph.nodes):
        single = node.outputs and not any(t.outputs or id(t) in kept for t in node.outputs[1:])
        if single and is_op(node, *NOOPS) and node.inputs and NOOPS[node.op](node):
            found = _constant_operand(node) if len(node.inputs) == 2 and node.op in ("Add", "Mul") else None
            changes += _bypass(graph, node, found[0] if found else node.inputs[0], kept)
    return changes


# ---------------------------------------------------------------------------------------------------------- constants

_UNFOLDABLE = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"),
    *("If", "Loop", "Scan", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant"),
}


@rewrite
def fold_constants(graph: gs.Graph) -> int:
    """Compute the nodes whose inputs are all constant, unless that makes the model larger."""
    kept = _output_ids(graph)
    done: dict[Any, list[gs.Constant]] = {}
    changes = 0
    for node in list(graph.nodes):
        inputs = [t for t in node.inputs if t.name]
        values = [array(t) for t in inputs]
        folds = node.domain in og.STANDARD_DOMAINS and node.op not in _UNFOLDABLE and inputs
        if not folds or any(v is None for v in values) or any(id(t) in kept for t in node.outputs):
            continue
        key = (node.op, repr(sorted(node.attrs.items())), *(id(t) for t in node.inputs))
        if key not in done:
            results = _evaluate(node, graph.opset)
            limit = max(_FOLDED_BYTES, sum(v.nbytes for v in values if v is not None))
            if results is None or sum(r.nbytes for r in results) > limit:
                continue
            done[key] = [constant(t.name, r) for t, r in zip(node.outputs, results, strict=False)]
        for tensor, folded in zip(list(node.outputs), done[key], strict=False):
            _replace_uses(tensor, folded)
        node.outputs.clear()
        changes += 1
    return changes


def _evaluate(node: gs.Node, opset: int) -> list[Array] | None:
    """Return the node's results on its constant inputs, or None where ONNX's reference cannot compute them."""
    if node.op == "Transpose":
        return [np.transpose(_const(node, 0), node.attrs.get("perm"))]  # type: ignore[arg-type]
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


@rewrite
def fold_shapes(graph: gs.Graph) -> int:
    """Replace computed shapes whose dimensions are known, and computed Reshape targets with one unknown dimension."""
    kept = _output_ids(graph)
    memo: Memo = {}
    changes = 0
    for node in list(graph.nodes):
        if not node.outputs:
            continue
        out = node.outputs[0]
        dims = _symbols(out, memo) if isinstance(out, gs.Variable) and id(out) not in kept else None
        if dims is not None and all(isinstance(d, int) for d in dims.reshape(-1)):
            dtype = np.int64 if out.dtype is None else out.dtype
            _replace_uses(out, constant(out.name, np.array(dims.tolist(), dtype)))
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
    shape = _shape(node.inputs[0]) or []
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
    node.inputs[1] = _new_constant(graph, node.inputs[1].name, np.array(target, np.int64))
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
        dims = _shape(node.inputs[0])
        return None if dims is None else _symbolic_shape(node, dims)
    inputs = [_symbols(t, memo, depth + 1) for t in node.inputs if t.name]
    if any(i is None for i in inputs) or _dtype(tensor) not in (None, onnx.TensorProto.INT64, onnx.TensorProto.INT32):
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
        index[axis] = slice(start, end if step > 0 or end > -_INT_MAX else None, step)
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


# ------------------------------------------------------------------------------------------- patterns of the exporters

_ERF = np.vectorize(math.erf, otypes=[np.float64])
_SCALAR_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Min": np.minimum,
    "Max": np.maximum,
    "Tanh": np.tanh,
    "Exp": np.exp,
    "Log": np.log,
    "Erf": _ERF,
    "Identity": lambda x: x,
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Softplus": lambda x: np.log1p(np.exp(x)),
    "Clip": lambda x, low=-np.inf, high=np.inf: np.minimum(np.maximum(x, low), high),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: np.clip(alpha * x + beta, 0, 1),
}
_GRID = np.linspace(-9, 9, 145)  # covers every bend of the functions below
_TANH_GELU = 0.5 * _GRID * (1 + np.tanh(math.sqrt(2 / math.pi) * (_GRID + 0.044715 * _GRID**3)))
_ACTIVATIONS: tuple[tuple[str, dict[str, Any], Array], ...] = (
    ("Gelu", {}, 0.5 * _GRID * (1 + _ERF(_GRID / math.sqrt(2)))),
    ("Gelu", {"approximate": "tanh"}, _TANH_GELU),
    ("HardSwish", {}, _GRID * np.clip(_GRID / 6 + 0.5, 0, 1)),
    ("Mish", {}, _GRID * np.tanh(np.log1p(np.exp(_GRID)))),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, np.clip(_GRID / 6 + 0.5, 0, 1)),
)
_BENDING = ("Erf", "Tanh", "Clip", "HardSigmoid", "Relu", "Min", "Softplus")  # one of them is in every form of those


@rewrite
def fuse_activations(graph: gs.Graph) -> int:
    """Replace nodes that together compute Gelu, HardSwish, Mish or HardSigmoid by that operator.

    The nodes are recognised by the values they compute, so that every exporter's order of operations is found.
    """
    changes = 0
    for node in reversed(graph.nodes):  # the last node of a pattern first: a HardSwish holds a HardSigmoid
        if not is_op(node, "Mul", "Div") or not node.outputs:
            continue
        cone = _scalar_cone(node)
        if not any(is_op(n, *_BENDING) for n in cone):
            continue
        found = next(filter(None, (_recognise(node, t) for n in cone for t in n.inputs)), None)
        if found is not None:
            _mutate(node, found[0], [found[2]], found[1])
            changes += 1
    return changes


def _scalar_cone(node: gs.Node, limit: int = 12) -> list[gs.Node]:
    """Return the node and those before it, nearest first, that compute one number from numbers."""
    cone = [node]
    for current in cone:
        for tensor in current.inputs:
            maker = _producer(tensor, *_SCALAR_FUNCTIONS)
            if maker is not None and len(cone) < limit and all(maker is not n for n in cone):
                cone.append(maker)
    return cone


def _recognise(node: gs.Node, source: gs.Tensor) -> tuple[str, dict[str, Any], gs.Tensor] | None:
    if not isinstance(source, gs.Variable) or not _same_dims(source, node.outputs[0], 0):
        return None
    with np.errstate(all="ignore"):
        values = _on_grid(node.outputs[0], source, 12)
    if values is None:
        return None
    for op, attrs, expected in _ACTIVATIONS:
        if np.allclose(values, expected, rtol=1e-6, atol=2e-6):
            return op, attrs, source
    return None


def _on_grid(tensor: gs.Tensor, source: gs.Tensor, depth: int) -> Array | None:
    """Return the tensor's values where `source` holds the grid, or None if they depend on anything else."""
    if tensor is source:
        return _GRID
    values = array(tensor)
    if values is not None:
        return values.astype(np.float64).reshape(()) if values.size == 1 else None
    node = _producer(tensor, *_SCALAR_FUNCTIONS) if depth else None
    if node is None or any(not t.name for t in node.inputs):
        return None
    inputs = [_on_grid(t, source, depth - 1) for t in node.inputs]
    if any(i is None for i in inputs):
        return None
    return np.asarray(_SCALAR_FUNCTIONS[node.op](*inputs, **node.attrs))


@rewrite
def fuse_layernorm(graph: gs.Graph) -> int:
    """Replace nodes that normalize over the last axis by LayerNormalization (PyTorch's and TensorFlow's order)."""
    changes = 0
    for root in [node for node in graph.nodes if is_op(node, "Sqrt")]:
        spread = _normalized(root)
        if spread is None:
            continue
        source, mean, centred, epsilon = spread
        for end, gamma, beta in _ends(root, source, mean, centred):
            size, last = gamma.shape[-1], (source.shape or [None])[-1]
            fits = size == last or (size > 1 and not isinstance(last, int))  # one element alone would be nothing but 0
            if fits and gamma.ndim == 1 and (beta is None or beta.shape == gamma.shape):
                inputs = [
                    source,
                    *(_new_constant(graph, end.name, np.array(v)) for v in (gamma, beta) if v is not None),
                ]
                _mutate(end, "LayerNormalization", inputs, {"axis": -1, "epsilon": epsilon})
                changes += 1
                break
    return changes


def _normalized(root: gs.Node) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor, float] | None:
    """Return input, mean, input - mean and epsilon if the node computes the standard deviation over the last axis."""
    added = _producer(root.inputs[0], "Add")
    operand = None if added is None else _constant_operand(added)
    variance = None if operand is None or operand[1].size != 1 else _mean_input(operand[0])
    square = _producer(variance, "Mul", "Pow")
    if square is None or operand is None:
        return None
    exponent = _const(square, 1)
    squares = square.inputs[0] is square.inputs[1] if square.op == "Mul" else (exponent is not None and exponent == 2)
    difference = _producer(square.inputs[0], "Sub")
    if not squares or difference is None or _mean_input(difference.inputs[1]) is not difference.inputs[0]:
        return None
    return difference.inputs[0], difference.inputs[1], square.inputs[0], float(operand[1].reshape(-1)[0])


def _mean_input(tensor: gs.Tensor) -> gs.Tensor | None:
    """Return what the tensor is the mean of over the last axis (kept as size 1), or None."""
    node = _producer(tensor, "ReduceMean", "GlobalAveragePool")
    rank = None if node is None else _rank(node.inputs[0])
    if node is None or rank is None:
        return None
    if node.op == "GlobalAveragePool":
        return node.inputs[0] if rank == 3 else None
    last = node.attrs.get("keepdims", 1) and _axes(node, 1, rank, ()) == [rank - 1]
    return node.inputs[0] if last else None


def _ends(
    root: gs.Node, source: gs.Tensor, mean: gs.Tensor, centred: gs.Tensor
) -> list[tuple[gs.Node, Array, Array | None]]:
    """Return the nodes that end the normalization, each with gamma and beta."""
    inverse = next((n for n in root.outputs[0].outputs if is_op(n, "Reciprocal")), None)
    found: list[tuple[gs.Node, Array, Array | None]] = []
    if inverse is not None:
        for scaled in inverse.outputs[0].outputs:
            operand = _constant_operand(scaled) if is_op(scaled, "Mul") else None
            if operand is not None:
                found += _tensorflow_end(scaled.outputs[0], operand[1], source, mean)
    divisor = root if inverse is None else inverse
    for unit in divisor.outputs[0].outputs:
        if is_op(unit, "Div" if inverse is None else "Mul") and any(t is centred for t in unit.inputs):
            found += _torch_end(unit)
    return found


def _torch_end(unit: gs.Node) -> list[tuple[gs.Node, Array, Array | None]]:
    scaled = unit.outputs[0].outputs[0] if len(unit.outputs[0].outputs) == 1 else None
    operand = _constant_operand(scaled) if scaled is not None and is_op(scaled, "Mul") else None
    if scaled is None or operand is None:
        return []
    shifted = scaled.outputs[0].outputs[0] if len(scaled.outputs[0].outputs) == 1 else None
    shift = _constant_operand(shifted) if shifted is not None and is_op(shifted, "Add") else None
    return [(scaled, operand[1], None)] if shifted is None or shift is None else [(shifted, operand[1], shift[1])]


def _tensorflow_end(
    scale: gs.Tensor, gamma: Array, source: gs.Tensor, mean: gs.Tensor
) -> list[tuple[gs.Node, Array, Array | None]]:
    """Match source * scale + (beta - mean * scale)."""
    products = {id(t): n.outputs[0] for n in scale.outputs if is_op(n, "Mul") for t in n.inputs if t is not scale}
    left, right = products.get(id(source)), products.get(id(mean))
    for offset in [] if right is None else right.outputs:
        beta = _const(offset, 0) if is_op(offset, "Sub") else None
        for end in [] if beta is None else offset.outputs[0].outputs:
            if is_op(end, "Add") and {id(t) for t in end.inputs} == {id(left), id(offset.outputs[0])}:
                return [(end, gamma, beta)]
    return []


# ------------------------------------------------------------------------------------------------- layout: reshapes


def _static_target(tensor: gs.Tensor) -> list[int] | None:
    """Return the shape as a Reshape target, with -1 for the one dimension that may be unknown."""
    shape = _shape(tensor)
    if shape is None or sum(not isinstance(d, int) for d in shape) > 1:
        return None
    return [d if isinstance(d, int) else -1 for d in shape]


def _moves_only_ones(node: gs.Node) -> bool:
    """Tell whether a Transpose keeps the order of all dimensions but those of size 1, so that it is a Reshape."""
    shape, perm = _shape(node.inputs[0]), node.attrs.get("perm")
    return shape is not None and perm is not None and _order(shape, perm) == sorted(_order(shape, perm))


def _order(shape: Sequence[Any], perm: Sequence[int]) -> list[int]:
    return [axis for axis in perm if shape[axis] != 1]


@rewrite
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
        shape = _new_constant(graph, f"{node.name}/shape", np.array(target, np.int64))
        _mutate(node, "Reshape", [before.inputs[0], shape], {})
        changes += 1
    return changes


def _is_reshape(node: gs.Node) -> bool:
    return is_op(node, *_RESHAPES) or (is_op(node, "Transpose") and _moves_only_ones(node))


@rewrite
def use_flatten(graph: gs.Graph) -> int:
    """Write a Reshape to [batch, everything else] as Flatten, which keeps a dynamic batch without a shape constant."""
    changes = 0
    for node in graph.nodes:
        if is_op(node, "Reshape") and _flattens(node):
            _mutate(node, "Flatten", [node.inputs[0]], {"axis": 1})
            changes += 1
    return changes


def _flattens(node: gs.Node) -> bool:
    target = _ints(node, 1)
    source = _shape(node.inputs[0])
    if target is None or source is None or len(target) != 2 or len(source) < 3:
        return False
    rest = source[1:]
    if target == [0, -1] and not node.attrs.get("allowzero"):
        return True
    if isinstance(source[0], int) and target[0] == source[0] > 0:
        return target[1] == -1 or all(isinstance(d, int) for d in source)
    static = all(isinstance(d, int) and d > 0 for d in rest)
    return static and target[0] in (-1, 0) and target[1] == math.prod(rest)  # type: ignore[arg-type]


@rewrite
def merge_transposes(graph: gs.Graph) -> int:
    """Turn a Transpose of a Transpose into one."""
    changes = 0
    for node in graph.nodes:
        first = _producer(node.inputs[0], "Transpose") if is_op(node, "Transpose") else None
        if first is not None and "perm" in first.attrs and "perm" in node.attrs:
            _merge(node, first)
            changes += 1
    return changes


def _merge(second: gs.Node, first: gs.Node) -> None:
    second.attrs["perm"] = [first.attrs["perm"][axis] for axis in second.attrs["perm"]]
    second.inputs[0] = first.inputs[0]


# ------------------------------------------------------------------------------------------------- layout: transposes

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


@rewrite
def sink_transposes(graph: gs.Graph) -> int:
    """Push Transposes towards the outputs until they cancel or reach a weight; kept only where that is of use.

    Of use is fewer Transposes, or fewer of them between a linear operator and a constant that it can take up.
    """
    before = _transposes(graph)
    if before == (0, 0):
        return 0
    trial = og.copy(graph)
    kept = _output_ids(trial)
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
    parting = [node for node in found if _producer(node.inputs[0], *_LINEAR) and _constant_consumer(node)]
    return len(found), len(parting)


def _constant_consumer(node: gs.Node) -> bool:
    readers = node.outputs[0].outputs
    return any(is_op(n, "Add", "Sub", "Mul", "Div") and _constant_operand(n) is not None for n in readers)


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
            _bypass(graph, node, node.inputs[0], kept)
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
    makers = [_producer(t, "Transpose") for t in variables]
    return bool(makers) and all(m is not None and m.attrs.get("perm") == perm for m in makers)


def _transpose_outputs(graph: gs.Graph, node: gs.Node, perm: list[int]) -> None:
    for index, out in enumerate(list(node.outputs)):
        if not out.name:
            continue
        name = _name(graph, f"{node.name}/transpose")
        shape = _shape(out)
        before = None if shape is None else [shape[perm.index(axis)] for axis in range(len(perm))]
        inner = gs.Variable(f"{name}_in", out.dtype, before)
        node.outputs[index] = inner
        graph.nodes.append(gs.Node("Transpose", name, {"perm": list(perm)}, [inner], [out]))


def _inverse(perm: Sequence[int]) -> list[int]:
    return [list(perm).index(axis) for axis in range(len(perm))]


def _push_same(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int]:
    return perm


def _push_broadcast(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    values = [array(tensor) for tensor in node.inputs]
    if any(v is not None and v.ndim > len(perm) for v in values):
        return None
    if any(v is None and isinstance(t, gs.Constant) for v, t in zip(values, node.inputs, strict=True)):
        return None
    for index, value in enumerate(values):
        if value is not None and value.size > 1:
            wide = value.reshape((1,) * (len(perm) - value.ndim) + value.shape)
            _set_constant(graph, node, index, wide.transpose(_inverse(perm)))
    return perm


def _push_axis(default: int) -> Handler:
    def push(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int]:
        node.attrs["axis"] = perm[_axis(node, len(perm), default)]
        return perm

    return push


def _push_concat(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    values = [array(tensor) for tensor in node.inputs]
    if any(v is None and isinstance(t, gs.Constant) for v, t in zip(values, node.inputs, strict=True)):
        return None
    for index, value in enumerate(values):
        if value is not None:
            _set_constant(graph, node, index, value.transpose(_inverse(perm)))
    node.attrs["axis"] = perm[_axis(node, len(perm), 0)]
    return perm


def _axes(node: gs.Node, index: int, rank: int, default: Sequence[int]) -> list[int] | None:
    """Return the axes input, made non-negative, or the default where it is left out; None if it is computed."""
    if _input(node, index) is None:
        return list(default)
    axes = _ints(node, index)
    return None if axes is None else [axis % rank for axis in axes]


def _push_slice(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    starts = _ints(node, 1)
    axes = None if starts is None else _axes(node, 3, len(perm), range(len(starts)))
    if axes is None:
        return None
    _set_constant(graph, node, 3, np.array([perm[axis] for axis in axes], np.int64))
    return perm


def _push_pad(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    axes = _axes(node, 3, len(perm), range(len(perm)))
    if axes is None:
        return None
    _set_constant(graph, node, 3, np.array([perm[axis] for axis in axes], np.int64))
    if _input(node, 2) is None:
        node.inputs[2] = gs.Variable.empty()
    return perm


def _push_resize(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    index = 2 if _input(node, 2) is not None else 3
    roi, sizes = _input(node, 1), _const(node, index)
    if (roi is not None and (array(roi) is None or array(roi).size)) or sizes is None:  # type: ignore[union-attr]
        return None
    if "axes" in node.attrs:
        node.attrs["axes"] = [perm[axis % len(perm)] for axis in node.attrs["axes"]]
    else:
        _set_constant(graph, node, index, sizes[_inverse(perm)])
    return perm


def _without(perm: list[int], axes: Sequence[int]) -> list[int]:
    """Return the permutation that is left when the output's `axes` are gone."""
    left = [axis for i, axis in enumerate(perm) if i not in axes]
    return [sorted(left).index(axis) for axis in left]


def _push_reduce(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    axes = _axes(node, 1, len(perm), range(len(perm)))
    if axes is None or node.attrs.get("noop_with_empty_axes"):
        return None
    _set_constant(graph, node, 1, np.array(sorted(perm[axis] for axis in axes), np.int64))
    return perm if node.attrs.get("keepdims", 1) else _without(perm, axes)


def _push_arg(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int]:
    axis = _axis(node, len(perm), 0)
    node.attrs["axis"] = perm[axis]
    return perm if node.attrs.get("keepdims", 1) else _without(perm, [axis])


def _push_squeeze(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    axes = _axes(node, 1, len(perm), ())
    if not axes:
        return None
    _set_constant(graph, node, 1, np.array(sorted(perm[axis] for axis in axes), np.int64))
    return _without(perm, axes)


def _push_unsqueeze(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    count = len(_ints(node, 1) or ())
    axes = _axes(node, 1, len(perm) + count, ()) or []
    if not axes:
        return None
    rank = len(perm) + count
    channels_last = [0, *range(2, rank), 1]
    if _without(channels_last, axes) == perm:  # then the layout of the wider value is most likely the usual one
        _set_constant(graph, node, 1, np.array(sorted(channels_last[axis] for axis in axes), np.int64))
        return channels_last
    _set_constant(graph, node, 1, np.arange(count))
    old, new = iter(perm), iter(range(count))
    return [next(new) if axis in axes else next(old) + count for axis in range(rank)]


def _push_gather(graph: gs.Graph, node: gs.Node, perm: list[int]) -> list[int] | None:
    indices, axis = _const(node, 1), _axis(node, len(perm), 0)
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
    _mutate(node, "Reshape", [node.inputs[0], _new_constant(graph, f"{node.name}/shape", np.array(target))], {})
    return list(range(len(target)))


def _absorb(graph: gs.Graph, node: gs.Node, transpose: gs.Node) -> bool:
    """Permute the rows of the one weight that reads the flattened value; False where that is not exact."""
    perm, shape, out = transpose.attrs["perm"], _shape(transpose.inputs[0]), node.outputs[0]
    linear = out.outputs[0] if len(out.outputs) == 1 else None
    if shape is None or perm[0] != 0 or _rank(out) != 2 or linear is None or not is_op(linear, "Gemm", "MatMul"):
        return False
    rest = [shape[axis] for axis in perm[1:]]
    weight = _const(linear, 1)
    usable = linear.inputs[0] is out and not linear.attrs.get("transA") and all(isinstance(d, int) for d in rest)
    if not usable or weight is None or weight.ndim != 2 or id(out) in _output_ids(graph):
        return False
    rows = weight.T if linear.attrs.get("transB") else weight
    if rows.shape[0] != math.prod(rest) or len(linear.inputs[1].outputs) > 1:
        return False
    back = [axis - 1 for axis in _inverse(perm)[1:]]
    grid = rows.reshape(*rest, -1).transpose(*back, len(rest)).reshape(rows.shape)
    _set_constant(graph, linear, 1, np.ascontiguousarray(grid.T if linear.attrs.get("transB") else grid))
    return True


_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_UNARY, _push_same),
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


@rewrite
def hoist_transposes(graph: gs.Graph) -> int:
    """Move a Transpose up to the graph input it comes from, past the nodes that scale or pad the input."""
    kept = _output_ids(graph)
    inputs = {id(t) for t in graph.inputs}
    changes = 0
    for node in graph.nodes:
        while is_op(node, "Transpose") and "perm" in node.attrs and node.outputs:
            above = _producer(node.inputs[0], "Pad", *_UNARY, *_BROADCASTING)
            if above is None or not _only_for(node.inputs[0], node, kept) or not _leads_up(above, inputs):
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
    above = _producer(source, "Pad", *_UNARY, *_BROADCASTING)
    return id(source) in inputs or (above is not None and len(source.outputs) == 1 and _leads_up(above, inputs))


def _swap_up(graph: gs.Graph, transpose: gs.Node, above: gs.Node) -> None:
    index = next(i for i, t in enumerate(above.inputs) if isinstance(t, gs.Variable) and t.name)
    out, source = transpose.outputs[0], above.inputs[index]
    name = _name(graph, transpose.name)
    shape = _shape(source)
    moved = gs.Variable(
        f"{name}_out", source.dtype, None if shape is None else [shape[a] for a in transpose.attrs["perm"]]
    )
    transpose.inputs[0], transpose.outputs[0] = source, moved
    above.inputs[index], above.outputs[0] = moved, out


# -------------------------------------------------------------------------------------------- convolutions and pooling


@rewrite
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


def _auto_pads(node: gs.Node, mode: str) -> list[int] | None:
    weight = _input(node, 1)
    kernel = node.attrs.get("kernel_shape") or (None if weight is None or weight.shape is None else weight.shape[2:])
    if kernel is None or not all(isinstance(k, int) for k in kernel):
        return None
    if mode == "NOTSET":
        return list(node.attrs.get("pads", [0] * 2 * len(kernel)))
    if mode == "VALID":
        return [0] * 2 * len(kernel)
    strides = node.attrs.get("strides", [1] * len(kernel))
    dilations = node.attrs.get("dilations", [1] * len(kernel))
    sizes = (_shape(node.inputs[0]) or [None] * (2 + len(kernel)))[2:]
    totals = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        if stride > 1 and not isinstance(size, int):
            return None
        last = 0 if stride == 1 else (-(-size // stride) - 1) * stride - size + 1  # type: ignore[operator]
        totals.append(max(0, last + dilation * (k - 1)))
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return small + large if mode == "SAME_UPPER" else large + small


@rewrite
def merge_pads(graph: gs.Graph) -> int:
    """Move a spatial zero Pad into the padding of the Conv or pooling that reads it, where that computes the same."""
    changes = 0
    for node in graph.nodes:
        pad = _producer(node.inputs[0], "Pad") if is_op(node, "Conv", "MaxPool", "AveragePool") else None
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
    rank, pads = _rank(pad.inputs[0]), _ints(pad, 1)
    if rank is None or rank < 3 or pads is None or pad.attrs.get("mode", "constant") != "constant":
        return None
    axes = _axes(pad, 3, rank, range(rank))
    if axes is None or min(pads, default=0) < 0 or _pad_value(pad) is None:
        return None
    full = [0] * 2 * rank
    for i, axis in enumerate(axes):
        full[axis], full[rank + axis] = pads[i], pads[len(axes) + i]
    if any(full[:2]) or any(full[rank : rank + 2]):
        return None
    return full[2:rank] + full[rank + 2 :]


def _pad_value(pad: gs.Node) -> float | None:
    if _input(pad, 2) is None:
        return 0.0
    value = _const(pad, 2)
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
    lowest = value is not None and (value == -math.inf or (value == 0 and _is_nonnegative(pad.inputs[0])))
    return {} if lowest and len(node.outputs) == 1 else None


@rewrite
def use_global_pool(graph: gs.Graph) -> int:
    """Write a mean over all spatial axes as GlobalAveragePool, followed by Flatten where the axes are dropped."""
    changes = 0
    for node in list(graph.nodes):
        if is_op(node, "ReduceMean") and _reduces_map(node):
            if node.attrs.get("keepdims", 1):
                _mutate(node, "GlobalAveragePool", node.inputs[:1], {})
            else:
                pooled = _new_node(graph, "GlobalAveragePool", node.inputs[:1], node)
                _mutate(node, "Flatten", [pooled], {"axis": 1})
            changes += 1
        elif is_op(node, "AveragePool") and _pools_map(node):
            _mutate(node, "GlobalAveragePool", node.inputs[:1], {})
            changes += 1
    return changes


def _reduces_map(node: gs.Node) -> bool:
    rank = _rank(node.inputs[0])
    if rank is None or rank < 4 or not _is_float(node):  # a sequence's mean over the last axis: a normalization
        return False
    axes = _axes(node, 1, rank, ())
    return axes is not None and sorted(axes) == list(range(2, rank))


def _is_float(node: gs.Node) -> bool:
    return _dtype(node.inputs[0]) in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def _pools_map(node: gs.Node) -> bool:
    shape = _shape(node.inputs[0])
    padded = any(node.attrs.get("pads", [])) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    dilated = any(d != 1 for d in node.attrs.get("dilations", []))
    return shape is not None and not padded and not dilated and shape[2:] == list(node.attrs["kernel_shape"])


# ----------------------------------------------------------------------------------------------------- Gemm


@rewrite
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
    weight = _const(node, list(node.inputs).index(found[1]))
    source = _ordered(graph, node, found[0], a, [*batch, *left, *summed])
    shape = None
    if weight is not None and not batch:
        weight = weight.transpose([b.index(i) for i in (*summed, *right)])
        sizes = weight.shape[len(summed) :]
        if len(summed) > 1:
            source = _new_node(graph, "Reshape", [source, _axes_kept(graph, node, left, (-1,))], node)
        other: gs.Tensor = _new_constant(
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
        source = _new_node(graph, op, [source, *inputs], node, attrs)
    op, inputs, attrs = steps[-1]
    _mutate(node, op, [source, *inputs], attrs)
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
    return _new_node(graph, "Transpose", [tensor], node, {"perm": [axes.index(i) for i in wanted]})


def _axes_kept(graph: gs.Graph, node: gs.Node, axes: Sequence[str], sizes: Sequence[int]) -> gs.Constant:
    """Return a target of Reshape: the first axes as they are, then some of these sizes."""
    return _new_constant(graph, node.name, np.array([0] * len(axes) + list(sizes)))


@rewrite
def fuse_gemm(graph: gs.Graph) -> int:
    """Turn MatMul by a constant matrix plus a constant bias into Gemm, for two-dimensional activations."""
    kept = _output_ids(graph)
    changes = 0
    for node in graph.nodes:
        found = _constant_operand(node) if is_op(node, "Add") else None
        matmul = None if found is None else _producer(found[0], "MatMul")
        if found is None or matmul is None or not _only_for(found[0], node, kept):
            continue
        weight = _const(matmul, 1)
        if weight is None or weight.ndim != 2 or _rank(matmul.inputs[0]) != 2:
            continue
        if _row(found[1], weight.shape[1]) is not None and not masks_sum(found[1], node.outputs[0], kept):
            _mutate(node, "Gemm", [*matmul.inputs, node.inputs[found[2]]], {})
            node.name, matmul.name = matmul.name, node.name  # layers are known by their matrix
            changes += 1
    return changes


def _row(bias: Array, channels: int) -> Array | None:
    """Return the bias as a vector over the channels, or None where it differs from row to row."""
    if bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1) or (bias.ndim and bias.shape[-1] not in (1, channels)):
        return None
    return np.broadcast_to(bias.reshape(-1), (channels,))


@rewrite
def normalize_gemm(graph: gs.Graph) -> int:
    """Bring Gemm with a constant weight to alpha = beta = 1, transB = 1, weight [out, in] and bias [out]."""
    weights: dict[Any, tuple[gs.Constant, gs.Constant]] = {}
    changes = 0
    for node in graph.nodes:
        if is_op(node, "Gemm") and _const(node, 1) is not None:
            before = dict(node.attrs), list(node.inputs)
            _normalize_weight(graph, node, weights)
            _normalize_bias(graph, node)
            changed = any(a is not b for a, b in zip(before[1], node.inputs, strict=True))
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
        done[key] = old, _new_constant(graph, old.name, scaled.astype(values.dtype))
    node.inputs[1] = done[key][1]


def _normalize_bias(graph: gs.Graph, node: gs.Node) -> None:
    beta = node.attrs.pop("beta", 1.0)
    bias = _const(node, 2)
    row = None if bias is None else _row(bias, node.inputs[1].shape[0])
    if bias is not None and row is not None:
        if beta != 1 or bias.shape != row.shape:
            node.inputs[2] = _new_constant(graph, node.inputs[2].name, (row * beta).astype(bias.dtype))
    elif beta != 1 and _input(node, 2) is not None:
        node.attrs["beta"] = beta


# -------------------------------------------------------------------------- scales and shifts into linear operators


def _affine(node: gs.Node, axis: int, rank: int, channels: int) -> tuple[gs.Tensor, Array, Array] | None:
    """Return the input, scale [channels] and shift [channels] of a node that computes scale * input + shift."""
    if is_op(node, "BatchNormalization"):
        return _batchnorm(node, channels) if axis == 1 else None
    found = _constant_operand(node) if is_op(node, "Add", "Sub", "Mul", "Div") else None
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
    values = [_const(node, i) for i in range(1, 5)]
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
    weight = _const(node, 1)
    if weight is None or (_input(node, 2) is not None and _const(node, 2) is None):
        return None
    if node.op == "MatMul":
        rank = _rank(node.outputs[0])
        return None if weight.ndim != 2 or rank is None else (rank - 1, rank, weight.shape[1])
    if node.op == "Gemm":
        plain = node.attrs.get("alpha", 1) == node.attrs.get("beta", 1) == 1 and (_const(node, 2) is None or (
            _const(node, 2).ndim == 1))  # type: ignore[union-attr]  # fmt: skip
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
    kept = _output_ids(graph)
    changes = 0
    for node in list(graph.nodes):
        if not is_op(node, *ops) or not node.outputs:
            continue
        for source in node.inputs[:2]:
            linear = _producer(source, *_LINEAR)
            if linear is not None and _only_for(source, node, kept) and _absorb_affine(graph, linear, node, kept):
                _bypass(graph, node, source, kept)
                changes += 1
                break
    return changes


def _absorb_affine(graph: gs.Graph, linear: gs.Node, node: gs.Node, kept: set[int]) -> bool:
    shape = _linear_shape(linear)
    found = None if shape is None else _affine(node, *shape)
    if found is None or found[0] is not linear.outputs[0]:
        return False
    _, scale, shift = found
    weight, bias = array(linear.inputs[1]), _const(linear, 2)
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
        _mutate(linear, "Gemm", linear.inputs, {})
    if rescales:
        _set_constant(graph, linear, 1, _scale_outputs(linear, weight.astype(np.float64), scale))
    if shifts or (bias is not None and rescales):
        total = shift if bias is None else bias.astype(np.float64) * scale + shift
        _set_constant(graph, linear, 2, total.astype(weight.dtype))
    return True


@rewrite
def fold_batchnorm(graph: gs.Graph) -> int:
    """Fold BatchNormalization into the Conv, ConvTranspose or Gemm before it; others stay as they are."""
    return _fold_into_producer(graph, "BatchNormalization")


@rewrite
def fold_scale(graph: gs.Graph) -> int:
    """Fold a product with a constant per channel into the weight of the linear operator before it."""
    return _fold_into_producer(graph, "Mul", "Div")


@rewrite
def fold_factor(graph: gs.Graph) -> int:
    """Fold a product with one number (of an attention) into the linear operator that its operand comes from.

    Through operators that move data, and products of two activations, into the weight of one of the two.
    """
    kept = _output_ids(graph)
    changes = 0
    for node in list(graph.nodes):
        found = _constant_operand(node) if is_op(node, "Mul") and node.outputs else None
        if found is None or found[1].size != 1 or not np.isfinite(found[1]).all() or not found[1].all():
            continue
        source, factor, _ = found
        constants = _scaled_by(source, node, kept) if _same_dims(source, node.outputs[0], 0) else None
        if constants and _bypass(graph, node, source, kept):
            for linear, index in constants:
                values = array(linear.inputs[index])
                assert values is not None
                _set_constant(graph, linear, index, values.astype(np.float64) * float(factor.reshape(-1)[0]))
            changes += 1
    return changes


def _scaled_by(tensor: gs.Tensor, reader: gs.Node, kept: set[int]) -> list[tuple[gs.Node, int]] | None:
    """Return constants, as node and input, that must be multiplied for the value to be, or None where others read it too."""
    node = tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None
    if node is None or not _only_for(tensor, reader, kept) or len(node.outputs) != 1:
        return None
    if is_op(node, *_LINEAR) and _const(node, 1) is not None:
        if _linear_shape(node) is None or len(node.inputs[1].outputs) > 1:
            return None
        return [(node, 1)] if _const(node, 2) is None else [(node, 1), (node, 2)]
    if is_op(node, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"):
        return _scaled_by(node.inputs[0], node, kept)
    if is_op(node, "MatMul"):  # of one value with itself, the product would be scaled twice
        squares = node.inputs[0] is node.inputs[1]
        return None if squares else next(filter(None, (_scaled_by(t, node, kept) for t in node.inputs)), None)
    bias = _constant_operand(node) if is_op(node, "Add") else None
    before = None if bias is None else _scaled_by(bias[0], node, kept)
    return None if bias is None or before is None else [*before, (node, bias[2])]


@rewrite
def use_products(graph: gs.Graph) -> int:
    """Write the division by a constant as a product, which runtimes execute on integers."""
    changes = 0
    for node in graph.nodes:
        divisor = _const(node, 1) if is_op(node, "Div") else None
        if divisor is not None and divisor.dtype == np.float32 and np.all(np.isfinite(1 / divisor.astype(np.float64))):
            node.op = "Mul"
            node.inputs[1] = _new_constant(
                graph, node.inputs[1].name, (1 / divisor.astype(np.float64)).astype(np.float32)
            )
            changes += 1
    return changes


@rewrite
def fold_bias(graph: gs.Graph) -> int:
    """Fold a sum with a constant per channel into the bias of the linear operator before it."""
    return _fold_into_producer(graph, "Add", "Sub")


@rewrite
def split_masks(graph: gs.Graph) -> int:
    """Take out of biases what rules classes out (-inf, -1e9): on one grid with it, all other scores would be equal."""
    kept = _output_ids(graph)
    changes = 0
    for node in list(graph.nodes):
        bias = _const(node, 2) if is_op(node, "Conv", "ConvTranspose", "Gemm") and _linear_shape(node) else None
        if bias is None or bias.ndim != 1 or not node.outputs:
            continue
        if not masks_sum(bias, node.outputs[0], kept):
            if np.isneginf(bias).any() and is_bounded_below(node.outputs[0], kept):  # a number does as well there
                _set_constant(graph, node, 2, np.maximum(bias, _LEAST))
                changes += 1
            continue
        out = ruled_out(bias)
        mask = np.where(out, bias, 0).astype(bias.dtype)
        _set_constant(graph, node, 2, np.where(out, 0, bias))
        masked = node.outputs[0]
        scores = gs.Variable(_name(graph, f"{masked.name}_unmasked"), masked.dtype, masked.shape)
        node.outputs.clear()
        node.outputs.append(scores)
        spread = () if node.op == "Gemm" else (1,) * (len(node.inputs[1].shape) - 2)
        operand = _new_constant(graph, f"{masked.name}_mask", mask.reshape(-1, *spread))
        graph.nodes.append(gs.Node("Add", _name(graph, f"{node.name}_mask"), {}, [scores, operand], [masked]))
        changes += 1
    return changes


@rewrite
def fold_forward(graph: gs.Graph) -> int:
    """Fold a BatchNormalization, product or sum per channel into the linear operator after it, where it is exact."""
    kept = _output_ids(graph)
    changes = 0
    for node in graph.nodes:
        while is_op(node, "Conv", "ConvTranspose", "Gemm"):
            before = _producer(node.inputs[0], "BatchNormalization", "Add", "Sub", "Mul", "Div")
            alone = before is not None and _only_for(node.inputs[0], node, kept)
            if before is None or not alone or not _absorb_before(graph, node, before):
                break
            before.inputs.clear()
            before.outputs.clear()
            changes += 1
    return changes


def _absorb_before(graph: gs.Graph, linear: gs.Node, node: gs.Node) -> bool:
    weight, bias = _const(linear, 1), _const(linear, 2)
    if weight is None or _linear_shape(linear) is None or linear.attrs.get("transA"):
        return False
    group = linear.attrs.get("group", 1)
    grouped, inputs = _input_channels(linear, weight.astype(np.float64))
    found = _affine(node, 1, 2 if linear.op == "Gemm" else weight.ndim, inputs)
    if found is None or not (np.isfinite(found[1]).all() and np.isfinite(found[2]).all()):
        return False
    source, scale, shift = found
    rescales, shifts = bool(np.any(scale != 1)), bool(np.any(shift != 0))
    shape = _shape(source) or []
    if len(shape) != (2 if linear.op == "Gemm" else weight.ndim) or shape[1] != inputs:
        return False  # the constant widens its input
    if (shifts and not _sees_no_padding(linear)) or (rescales and len(linear.inputs[1].outputs) > 1):
        return False
    wide = scale.reshape(group, 1, -1, *(1,) * (grouped.ndim - 3))
    if shifts:
        offset = (grouped * shift.reshape(wide.shape)).sum(axis=tuple(range(2, grouped.ndim))).reshape(-1)
        _set_constant(graph, linear, 2, (offset + (0 if bias is None else bias)).astype(weight.dtype))
    if rescales:
        _set_constant(graph, linear, 1, _from_grouped(linear, grouped * wide, weight))
    linear.inputs[0] = source
    return True


def _input_channels(linear: gs.Node, weight: Array) -> tuple[Array, int]:
    """Return the weight as [group, out, in, ...] and the number of input channels."""
    group = linear.attrs.get("group", 1)
    if linear.op == "Gemm":
        matrix = weight if linear.attrs.get("transB") else weight.T
        return matrix[None], matrix.shape[1]
    if linear.op == "Conv":
        return weight.reshape(group, -1, *weight.shape[1:]), weight.shape[1] * group
    return weight.reshape(group, -1, *weight.shape[1:]).swapaxes(1, 2), weight.shape[0]


def _from_grouped(linear: gs.Node, grouped: Array, weight: Array) -> Array:
    if linear.op == "Gemm":
        matrix: Array = grouped[0]
        return matrix if linear.attrs.get("transB") else matrix.T
    return (grouped.swapaxes(1, 2) if linear.op == "ConvTranspose" else grouped).reshape(weight.shape)


def _sees_no_padding(linear: gs.Node) -> bool:
    if linear.op == "Gemm":
        return True
    explicit = linear.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and not any(linear.attrs.get("pads", []))
    return linear.op == "Conv" and explicit


# ------------------------------------------------------------------------------------------------- sharing of constants


@rewrite
def split_biases(graph: gs.Graph) -> int:
    """Give every Conv, ConvTranspose and Gemm a bias of its own: its grid depends on the node's input and weight."""
    changes = 0
    for node in graph.nodes:
        bias = _input(node, 2) if is_op(node, "Conv", "ConvTranspose", "Gemm") else None
        if isinstance(bias, gs.Constant) and len(bias.outputs) > 1 and array(bias) is not None:
            node.inputs[2] = _new_constant(graph, bias.name, np.array(array(bias)))
            changes += 1
    return changes


@rewrite
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
            copy = _new_constant(graph, tensor.name, np.array(values))
            for node in roles[role]:
                node.inputs[1] = copy
            changes += 1
    return changes


def _role(node: gs.Node, tensor: gs.Tensor) -> tuple[str, int] | None:
    """Return what a linear operator uses the weight for and along which axis its channels lie; None for other uses."""
    if not is_op(node, *_LINEAR) or node.inputs[1] is not tensor or sum(t is tensor for t in node.inputs) > 1:
        return None
    if node.op in ("Gemm", "MatMul"):
        return "matrix", 0 if node.attrs.get("transB") else 1
    return node.op, 0 if node.op == "Conv" else 1


def add_biases(graph: gs.Graph) -> int:
    """Give every Conv, ConvTranspose and Gemm without a bias one of zeros, for what bias correction will find.

    Not a pass: it makes the graph larger, so it runs only on demand.
    """
    added = 0
    taken = set(graph.tensors())
    for node in graph.nodes:
        if not is_op(node, "Conv", "ConvTranspose", "Gemm") or not isinstance(node.inputs[1], gs.Constant):
            continue
        if len(node.inputs) > 2 and not node.inputs[2].is_empty():
            continue
        shape = node.inputs[1].shape
        axis = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if node.attrs.get("transB", 0) else 1}[node.op]
        channels = shape[axis] * (node.attrs.get("group", 1) if node.op == "ConvTranspose" else 1)
        bias = constant(og.fresh(f"{node.inputs[1].name}_bias", taken), np.zeros(channels, np.float32))
        _shorten(node.inputs, 2)
        node.inputs.append(bias)
        added += 1
    return added


def free_batch(graph: gs.Graph) -> gs.Graph | None:
    """Return a copy whose mirror takes any multiple of the batch size that the graph fixes, or None where that is not known.

    Exports with a fixed batch size spell it in the targets of their Reshapes. Whether the copy computes the same is for
    the caller to try (`mirror.same_on_batches`): other operators may mix the samples.
    """
    sizes = {tensor.shape[0] if tensor.shape else None for tensor in graph.inputs}
    if len(sizes) != 1 or not all(isinstance(size, int) for size in sizes):
        return None
    copy = og.copy(graph)
    for node in copy.nodes:
        if is_op(node, "Reshape") and isinstance(node.inputs[1], gs.Constant):
            shape = node.outputs[0].shape
            if not shape or not all(isinstance(size, int) for size in shape):
                return None
            target = np.array([-1, *shape[1:]], np.int64)
            node.inputs[1] = gs.Constant(f"{node.name}_free_shape", target)
    return copy
