"""What a quantized ONNX file holds: how its weights are stored, how large it may be, where ONNX Runtime loads it."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
NARROW = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}
HEAD_ROOM, BYTES_PER_NODE = 1.03, 400


@dataclass(frozen=True)
class Weight:
    """A constant operand of a linear operator: its elements and the bytes they take in the file."""

    elements: int
    bytes: int

    @property
    def bits(self) -> float:
        """Stored bits per element; the last byte of a packed tensor may be padded."""
        return 8 * self.bytes / self.elements


class File:
    """A model with its constants and producers by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
        graph = self.model.graph
        self.nodes = graph.node
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producer = {name: node for node in graph.node for name in node.output}
        self.shapes = {
            item.name: [dim.dim_value for dim in item.type.tensor_type.shape.dim]
            for item in [*graph.value_info, *graph.input, *graph.output]
        }
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.initializers[node.output[0]] = node.attribute[0].t

    def parts(self, value: str) -> dict[str, onnx.TensorProto] | None:
        """The initializers whose data make up `value`, or None when it depends on the network's input."""
        if value in self.initializers:
            return {value: self.initializers[value]}
        node = self.producer.get(value)
        if node is None:
            return None
        found = {}
        for name in self._data_inputs(node):
            below = self.parts(name)
            if below is None:
                return None
            found |= below
        return found

    def _data_inputs(self, node: onnx.NodeProto) -> list[str]:
        # A table of 256 rows only spells out what each byte holds, a few factors what each bit is worth; scales, shapes and
        # bounds are no data either.
        table = node.op_type == "Gather" and self._dims(node.input[0])[:1] == [256]
        if node.op_type in ("Add", "Concat", "Mul", "Or", "BitwiseOr"):
            few = {name for name in node.input if name in self.initializers and math.prod(self._dims(name)) <= 8}
            return [name for name in node.input if name not in few]
        return [node.input[1] if table else node.input[0]] if node.input else []

    def _dims(self, value: str) -> list[int]:
        return list(self.initializers[value].dims) if value in self.initializers else self.shapes.get(value, [])

    def weights(self) -> dict[str, Weight]:
        """Every constant matrix or kernel that a linear operator reads, by value name."""
        found = {}
        for node in self.nodes:
            if node.op_type not in LINEAR or node.domain not in ("", "ai.onnx"):
                continue
            for value in node.input[:2]:
                parts = self.parts(value)
                dims = parts and self._weight_dims(value, parts)
                if parts and dims and len(dims) >= 2:
                    found[value] = Weight(math.prod(dims), sum(map(stored_bytes, parts.values())))
        return found

    def _weight_dims(self, value: str, parts: dict[str, onnx.TensorProto]) -> list[int]:
        dims = self._dims(value)
        if all(dims) and dims:
            return dims
        # Shape inference does not know vendor operators; a weight in one piece has the shape of that piece.
        return list(next(iter(parts.values())).dims) if len(parts) == 1 else []

    def scales(self) -> int:
        """Elements of all scales, each tensor once."""
        names = {node.input[1] for node in self.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
        return sum(math.prod(self.initializers[name].dims) for name in names if name in self.initializers)

    def biases(self) -> int:
        """Elements of all int32 initializers behind a DequantizeLinear, each tensor once."""
        names = {node.input[0] for node in self.nodes if node.op_type == "DequantizeLinear"}
        tensors = [self.initializers[name] for name in names if name in self.initializers]
        return sum(math.prod(t.dims) for t in tensors if t.data_type == onnx.TensorProto.INT32)

    def allowed(self, weight_bits: int, nodes: int) -> float:
        """Bytes of packed weights, int32 biases and scales with head room, and of the given number of nodes."""
        packed = sum(math.ceil(weight.elements * weight_bits / 8) for weight in self.weights().values())
        return (packed + 4 * self.biases() + 4 * self.scales()) * HEAD_ROOM + BYTES_PER_NODE * nodes


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that a tensor's elements take in a file."""
    elements = math.prod(tensor.dims)
    bits = NARROW.get(tensor.data_type) or 8 * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return math.ceil(elements * bits / 8)


def session(path: Path, level: str = "all", threads: int = 1) -> ort.InferenceSession:
    """A quiet CPU session."""
    options = ort.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads = LEVELS[level], threads
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def loads(path: Path) -> dict[str, bool]:
    """Per optimisation level, whether a session can be created."""
    return {level: _loads(path, level) for level in LEVELS}


def _loads(path: Path, level: str) -> bool:
    try:
        session(path, level)
    except Exception:  # onnxruntime raises a dozen unrelated classes
        return False
    return True


def describe(path: Path, float_path: Path, weight_bits: int) -> dict[str, Any]:
    """Everything the file itself tells.

    `low_bit_share` counts weight elements stored in at most `weight_bits` bits (in a byte where that is over 4).
    `size_ratio` is the size over what is allowed for as many nodes as the float model has, `size_ratio_written` for as
    many as the written one has.
    """
    file, before = File(path), onnx.load(float_path)
    weights = file.weights().values()
    elements = sum(weight.elements for weight in weights)
    limit = 8 if weight_bits > 4 else weight_bits
    low = sum(weight.elements for weight in weights if weight.bytes <= math.ceil(weight.elements * limit / 8) + 1)
    size = path.stat().st_size
    return {
        "bytes": size,
        "size_ratio": round(size / file.allowed(weight_bits, len(before.graph.node)), 3),
        "size_ratio_written": round(size / file.allowed(weight_bits, len(file.nodes)), 3),
        "weights": elements,
        "low_bit_share": round(100 * low / max(elements, 1), 2),
        "bits_per_weight": round(8 * sum(weight.bytes for weight in weights) / max(elements, 1), 3),
        "operators": dict(Counter(node.op_type for node in file.nodes)),
        "domains": sorted({node.domain for node in file.nodes} - {"", "ai.onnx"}),
        "opset": {item.domain or "ai.onnx": item.version for item in file.model.opset_import},
        "ir_version": file.model.ir_version,
        "loads": loads(path),
    }
