"""Pass: stretches of float64 within a float32 graph become float32."""

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

from onnx_eptq.graph import STANDARD_DOMAINS, is_op, is_packed
from onnx_eptq.prepare.edit import Array, fresh_name, replace_uses

# What float64 reaches beyond is cut off: masks are often the least number of their type.
LIMITS = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)


def narrow_doubles(graph: gs.Graph) -> int:
    """Compute in float32 what exporters compute in float64 (positions, limits, constants of other libraries).

    Inputs and outputs of float64 keep their type, behind and before a Cast. Nothing is done where a node could depend on the
    type: one that has a body, or one of another domain that reads or makes such values.
    """
    tensors = list(graph.tensors().values())
    wide = [tensor for tensor in tensors if _is_double(tensor)]
    fixed = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    inner = [tensor for tensor in wide if id(tensor) not in fixed]
    if not inner or any(_may_depend(node) for node in graph.nodes):
        return 0
    for tensor in graph.inputs:
        if _is_double(tensor):
            narrow = gs.Variable(fresh_name(graph, tensor.name), np.float32, tensor.shape)
            replace_uses(tensor, narrow)
            _cast(graph, tensor, narrow)
    for tensor in graph.outputs:
        if _is_double(tensor) and tensor.inputs:
            narrow = gs.Variable(fresh_name(graph, tensor.name), np.float32, tensor.shape)
            replace_uses(tensor, narrow)
            (producer,) = tensor.inputs
            producer.outputs[producer.outputs.index(tensor)] = narrow
            _cast(graph, narrow, tensor)
    for tensor in inner:
        if isinstance(tensor, gs.Constant):
            tensor.values = _narrow(tensor.values)
        else:
            tensor.dtype = np.float32
    for node in graph.nodes:
        value = node.attrs.get("value")
        if (
            is_op(node, "Cast")
            and dtype_to_onnx(node.attrs["to"]) == TensorProto.DOUBLE
            and not _is_double(node.outputs[0])
        ):
            node.attrs["to"] = int(TensorProto.FLOAT)
        if is_op(node, "ConstantOfShape") and isinstance(value, gs.Constant) and _is_double(value):
            node.attrs["value"] = gs.Constant(value.name, _narrow(value.values))
    return len(inner)


def _may_depend(node: gs.Node) -> bool:
    foreign = node.domain not in STANDARD_DOMAINS and any(
        _is_double(tensor) for tensor in (*node.inputs, *node.outputs)
    )
    return foreign or bool(list(node.subgraphs()))


def _cast(graph: gs.Graph, source: gs.Tensor, result: gs.Variable) -> None:
    name = fresh_name(graph, f"{result.name}_cast")
    graph.nodes.append(gs.Node("Cast", name, {"to": int(dtype_to_onnx(result.dtype))}, [source], [result]))


def _narrow(values: Array) -> Array:
    return np.asarray(np.clip(values, *LIMITS), np.float32)


def _is_double(tensor: gs.Tensor) -> bool:
    return not (isinstance(tensor, gs.Constant) and is_packed(tensor)) and tensor.dtype == np.float64
