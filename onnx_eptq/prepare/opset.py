"""The opset of a graph: raised to the one that all else is written for, lowered again for older runtimes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

from onnx_eptq import graph as og
from onnx_eptq.errors import ModelError
from onnx_eptq.graph import array, is_op
from onnx_eptq.prepare.edit import (
    INT_MAX,
    axis_of,
    const_at,
    input_at,
    mutate,
    new_constant,
    new_node,
    output_ids,
    rank_of,
    replace_uses,
    set_constant,
    shape_of,
    shorten,
)

OPSET = 21


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
    for node in graph.nodes:
        if node.domain in og.STANDARD_DOMAINS and _schema(node.op, opset):
            _lower(graph, node, opset)
    nodes = (node for scope in og.scopes(graph) for node in scope.nodes)
    stuck = [f"'{node.name}' {node.op}" for node in nodes if not _fits(node, opset)]
    if stuck:
        advice = "use a newer one" if opset < OPSET else f"export the model with opset {OPSET} or older"
        raise ModelError(f"These nodes have no form in opset {opset}: {', '.join(stuck)}; {advice}.")
    _declare_opset(graph, opset)


def _lower(graph: gs.Graph, node: gs.Node, opset: int) -> None:
    """Write a node's inputs and attributes as an older opset has them; what has no form there stays, for `_fits` to find."""
    axes, older = const_at(node, 1), _schema(node.op, opset).attributes
    if node.op.startswith("Reduce") and axes is not None and "axes" in older:
        if axes.size:  # none are all of them
            node.attrs["axes"] = [int(axis) for axis in axes.ravel()]
        shorten(node.inputs, 1)
    if node.op == "GridSample" and opset < 20:
        mode = node.attrs.get("mode", "linear")
        node.attrs["mode"] = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    if node.op == "Split" and "num_outputs" in node.attrs and "num_outputs" not in older:
        _write_sizes(graph, node)
    if node.op == "RoiAlign" and opset < 16:  # which had one mode, not today's default
        if node.attrs.setdefault("coordinate_transformation_mode", "half_pixel") == "output_half_pixel":
            del node.attrs["coordinate_transformation_mode"]
        return
    schema = onnx.defs.get_schema(node.op, graph.opset, "")
    for name in set(node.attrs) - set(older):
        default = onnx.helper.get_attribute_value(schema.attributes[name].default_value)
        default = default.decode() if isinstance(default, bytes) else default
        if node.attrs[name] == default:
            del node.attrs[name]


def _layer_norm_pieces(graph: gs.Graph, node: gs.Node) -> None:
    """LayerNormalization: (x - mean) / sqrt(variance + epsilon) * scale + bias."""
    x, rank = node.inputs[0], rank_of(node.inputs[0])
    axis = int(node.attrs.get("axis", -1))
    kept = output_ids(graph)
    if rank is None or any(output.outputs or id(output) in kept for output in node.outputs[1:]):
        return
    shorten(node.outputs, 1)
    mean = {"axes": list(range(axis % rank, rank)), "keepdims": 1}
    error = new_node(graph, "Sub", [x, new_node(graph, "ReduceMean", [x], node, mean)], node)
    variance = new_node(graph, "ReduceMean", [new_node(graph, "Mul", [error, error], node)], node, mean)
    shifted = new_node(graph, "Add", [variance, _number(graph, node, node.attrs.get("epsilon", 1e-5))], node)
    unit = new_node(graph, "Div", [error, new_node(graph, "Sqrt", [shifted], node)], node)
    bias = input_at(node, 2)
    if bias is None:
        mutate(node, "Mul", [unit, node.inputs[1]], {})
    else:
        mutate(node, "Add", [new_node(graph, "Mul", [unit, node.inputs[1]], node), bias], {})


def _group_norm_pieces(graph: gs.Graph, node: gs.Node) -> None:
    """GroupNormalization: InstanceNormalization of [N, groups, all else], then scale and bias of the channels."""
    x, rank, groups = node.inputs[0], rank_of(node.inputs[0]), int(node.attrs["num_groups"])
    if rank is None:
        return
    rows = new_constant(graph, f"{node.name}_rows", np.array([0, groups, -1], np.int64))
    neutral = [new_constant(graph, f"{node.name}_unit", np.full(groups, value, np.float32)) for value in (1, 0)]
    epsilon = {"epsilon": node.attrs.get("epsilon", 1e-5)}
    unit = new_node(
        graph, "InstanceNormalization", [new_node(graph, "Reshape", [x, rows], node), *neutral], node, epsilon
    )
    unit = new_node(graph, "Reshape", [unit, new_node(graph, "Shape", [x], node)], node)
    axes = new_constant(graph, f"{node.name}_axes", np.arange(1, rank - 1, dtype=np.int64))
    scale, bias = (new_node(graph, "Unsqueeze", [tensor, axes], node) for tensor in node.inputs[1:])
    mutate(node, "Add", [new_node(graph, "Mul", [unit, scale], node), bias], {})


def _gelu_pieces(graph: gs.Graph, node: gs.Node) -> None:
    """Gelu: x / 2 * (1 + erf(x / sqrt 2)), or with tanh(sqrt(2 / pi) (x + 0.044715 x ** 3)) for the error function."""
    x = node.inputs[0]
    if node.attrs.get("approximate", "none") == "tanh":
        cube = new_node(graph, "Mul", [x, new_node(graph, "Mul", [x, x], node)], node)
        part = new_node(graph, "Mul", [cube, _number(graph, node, 0.044715)], node)
        total = new_node(graph, "Add", [x, part], node)
        inner = new_node(graph, "Mul", [total, _number(graph, node, math.sqrt(2 / math.pi))], node)
        bent = new_node(graph, "Tanh", [inner], node)
    else:
        inner = new_node(graph, "Div", [x, _number(graph, node, math.sqrt(2))], node)
        bent = new_node(graph, "Erf", [inner], node)
    gate = new_node(graph, "Add", [bent, _number(graph, node, 1)], node)
    mutate(node, "Mul", [new_node(graph, "Mul", [x, gate], node), _number(graph, node, 0.5)], {})


def _hard_swish_pieces(graph: gs.Graph, node: gs.Node) -> None:
    """HardSwish: x * HardSigmoid(x)."""
    x = node.inputs[0]
    mutate(node, "Mul", [x, new_node(graph, "HardSigmoid", [x], node, {"alpha": 1 / 6, "beta": 0.5})], {})


def _mish_pieces(graph: gs.Graph, node: gs.Node) -> None:
    """Mish: x * tanh(softplus(x))."""
    x = node.inputs[0]
    mutate(node, "Mul", [x, new_node(graph, "Tanh", [new_node(graph, "Softplus", [x], node)], node)], {})


def _shape_pieces(graph: gs.Graph, node: gs.Node) -> None:
    """Shape with bounds: a slice of the whole shape."""
    ends = (node.attrs.get("start", 0), node.attrs.get("end", INT_MAX))
    bounds = [new_constant(graph, f"{node.name}_bound", np.array([end], np.int64)) for end in ends]
    mutate(node, "Slice", [new_node(graph, "Shape", node.inputs, node), *bounds], {})


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


def _write_sizes(graph: gs.Graph, node: gs.Node) -> None:
    """Split with a number of outputs: with their sizes, where what is split has a known one."""
    shape, count = shape_of(node.inputs[0]), int(node.attrs["num_outputs"])
    size = shape[axis_of(node, len(shape), 0)] if shape is not None else None
    if isinstance(size, int):
        each = -(-size // count)
        sizes = [each] * (count - 1) + [size - each * (count - 1)]
        shorten(node.inputs, 1)
        node.inputs.append(new_constant(graph, f"{node.name}_sizes", np.array(sizes, np.int64)))
        del node.attrs["num_outputs"]


def _number(graph: gs.Graph, node: gs.Node, value: float) -> gs.Constant:
    return new_constant(graph, f"{node.name}_constant", np.array(value, np.float32))


_PIECES: dict[str, Callable[[gs.Graph, gs.Node], None]] = {
    "LayerNormalization": _layer_norm_pieces,
    "GroupNormalization": _group_norm_pieces,
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
            replace_uses(tensor, weights[tensor.name])
    new.inputs = [t for t in new.inputs if t.name in inputs]
    for tensor in [*new.inputs, *new.outputs]:
        old = inputs.get(tensor.name) or outputs[tensor.name]
        if isinstance(tensor, gs.Variable):
            tensor.dtype, tensor.shape, tensor.type = old.dtype, old.shape, old.type
    known = graph.tensors()  # what operators of other domains make has no type any more
    for tensor in new.tensors().values():
        old = known.get(tensor.name)
        if isinstance(tensor, gs.Variable) and isinstance(old, gs.Variable) and tensor.dtype is None:
            tensor.dtype, tensor.shape = old.dtype, old.shape
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
        rank = rank_of(node.inputs[0]) if node.inputs else None
        if is_op(node, "Upsample", "Resize") and graph.opset < 11:
            scales = const_at(node, 1)
            sampling[node.outputs[0].name] = scales is not None and bool(np.any(scales < 1))
        elif is_op(node, "Pad") and node.attrs.get("mode", "constant") != "constant":
            node.attrs.pop("value", None)  # means nothing there, and the converter leaves it
        elif is_op(node, "BatchNormalization") and node.attrs.pop("spatial", 1) != 1 and rank != 2:
            stuck.append(f"'{node.name}' BatchNormalization with spatial = 0")
        elif is_op(node, "Scan") and graph.opset < 9:
            stuck.append(f"'{node.name}' Scan over a batch")
        elif is_op(node, "Hardmax") and graph.opset < 13 and (rank is None or axis_of(node, rank) != rank - 1):
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
    shape = shape_of(node.inputs[0])
    channels = shape[1] if shape is not None else None
    for index in (1, 2):
        values = const_at(node, index)
        if values is None or not isinstance(channels, int):
            return False
        set_constant(graph, node, index, np.repeat(values, channels // values.size))
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


_CHANGED = {  # operators that mean something else before an opset, in the same words
    "GroupNormalization": 21,  # a scale per group
    "DFT": 20,  # another axis by default
}
_VALUES = {  # of attributes, by the opset that brought them
    ("Pad", "mode", "wrap"): 19,
    ("Resize", "coordinate_transformation_mode", "half_pixel_symmetric"): 19,
    ("ScatterND", "reduction", "max"): 18,
    ("ScatterND", "reduction", "min"): 18,
    ("ScatterElements", "reduction", "max"): 18,
    ("ScatterElements", "reduction", "min"): 18,
}


def _fits(node: gs.Node, opset: int) -> bool:
    """Tell whether the node, written for a newer opset, is valid and means the same in the older one."""
    if node.domain not in og.STANDARD_DOMAINS:
        return True
    schema = _schema(node.op, opset)
    if schema is None:
        return False
    present = len(node.inputs) <= schema.max_input and len(node.outputs) <= schema.max_output
    if opset < _CHANGED.get(node.op, 0):
        return False
    younger = (_VALUES.get((node.op, name, value), 0) for name, value in node.attrs.items() if isinstance(value, str))
    if max(younger, default=0) > opset or (opset < 22 and _skips_ends(node)):
        return False
    return present and set(node.attrs) <= set(schema.attributes) and _types_fit(node, schema)


def _skips_ends(node: gs.Node) -> bool:
    """Whether a pooling rounded up could begin behind its input: before opset 22 the shape counts such windows, too."""
    if not is_op(node, "MaxPool", "AveragePool", "LpPool") or not node.attrs.get("ceil_mode"):
        return False
    kernel = node.attrs["kernel_shape"]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, node.attrs.get("dilations") or [1] * len(kernel), strict=True)]
    return any(stride > span for stride, span in zip(node.attrs.get("strides") or [], spans, strict=False))


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
