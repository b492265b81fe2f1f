"""Pass: what a model computes in float16, bfloat16 or float64 becomes float32."""

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx
from onnx_graphsurgeon.logger import G_LOGGER

from onnx_eptq.graph import STANDARD_DOMAINS, is_packed, scopes
from onnx_eptq.prepare.edit import Array, fresh_name, replace_uses

# What float64 reaches beyond is cut off: masks are often the least number of their type.
LIMITS = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)
LEAST = float(np.finfo(np.float32).tiny)
_OTHERS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_TYPE_ATTRIBUTES = ("to", "dtype", "output_datatype")  # of Cast; of EyeLike, RandomNormal and the like; of windows
_GENERIC_DOMAINS = (*STANDARD_DOMAINS, "com.microsoft")  # their operators take float32 wherever they take the others


def use_float32(graph: gs.Graph) -> int:
    """Compute in float32 what the model computes in float16, bfloat16 (whole exports) or float64 (positions, other libraries).

    Inputs and outputs keep their type, behind and before a Cast. Nothing is done where a node of another domain could depend
    on the type.
    """
    fixed = {id(tensor): tensor for tensor in (*graph.inputs, *graph.outputs)}
    inner = [
        tensor
        for scope in scopes(graph)
        for tensor in scope.tensors().values()
        if is_other_float(tensor) and id(tensor) not in fixed
    ]
    turning = [tensor for tensor in fixed.values() if is_other_float(tensor) and not is_turned(tensor)]
    if not (inner or turning) or any(_may_depend(node) for scope in scopes(graph) for node in scope.nodes):
        return 0
    for tensor in turning:
        inside = gs.Variable(fresh_name(graph, tensor.name), np.float32, tensor.shape)
        replace_uses(tensor, inside)
        if tensor.inputs:
            (producer,) = tensor.inputs
            producer.outputs[producer.outputs.index(tensor)] = inside
            _cast(graph, inside, tensor)
        else:
            _cast(graph, tensor, inside)
    for tensor in inner:
        if isinstance(tensor, gs.Constant):
            with G_LOGGER.suppress(G_LOGGER.CRITICAL):  # which has a lot to say about bfloat16
                tensor.values = _in_float32(tensor.values)
        else:
            tensor.dtype = np.float32
    for scope in scopes(graph):
        for node in scope.nodes:
            _retype(node)
    return len(inner) + len(turning)


def is_other_float(tensor: gs.Tensor) -> bool:
    """Tell whether the tensor is float16, bfloat16 or float64."""
    if getattr(tensor, "type", "tensor_type") != "tensor_type":  # a sequence of them
        return False
    if isinstance(tensor.dtype, int):  # numpy lacks it
        return tensor.dtype == int(TensorProto.BFLOAT16)
    return not (isinstance(tensor, gs.Constant) and is_packed(tensor)) and tensor.dtype in (np.float16, np.float64)


def is_turned(tensor: gs.Tensor) -> bool:
    """Tell whether only Casts make and read the tensor."""
    return all(node.op == "Cast" for node in (*tensor.inputs, *tensor.outputs))


def _may_depend(node: gs.Node) -> bool:
    return node.domain not in _GENERIC_DOMAINS and any(is_other_float(x) for x in (*node.inputs, *node.outputs))


def _retype(node: gs.Node) -> None:
    """Let a node make float32 that says by an attribute that it makes another type."""
    if any(is_other_float(tensor) for tensor in node.outputs):
        return  # an output of the model
    for name in _TYPE_ATTRIBUTES:
        if name in node.attrs and dtype_to_onnx(node.attrs[name]) in _OTHERS:
            node.attrs[name] = int(TensorProto.FLOAT)
    value = node.attrs.get("value")
    if isinstance(value, gs.Constant) and is_other_float(value):  # of a ConstantOfShape
        node.attrs["value"] = gs.Constant(value.name, _in_float32(value.values))


def _cast(graph: gs.Graph, source: gs.Tensor, result: gs.Variable) -> None:
    name = fresh_name(graph, f"{result.name}_cast")
    graph.nodes.append(gs.Node("Cast", name, {"to": int(dtype_to_onnx(result.dtype))}, [source], [result]))


def _in_float32(values: Array) -> Array:
    if values.dtype == np.float64:
        values = np.clip(values, *LIMITS)
        small = (np.abs(values) < LEAST) & (values != 0)  # what keeps a logarithm or a quotient finite
        values = np.where(small, np.copysign(LEAST, values), values)
    return np.asarray(values, np.float32)
