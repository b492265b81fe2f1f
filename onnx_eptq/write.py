"""Writes the quantized graph as standard QDQ ONNX: follows `walk`, places integers that are given, computes none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from onnx_eptq import graph as graphs
from onnx_eptq import grid as grids
from onnx_eptq.grid import DTYPES, Grid, QParams, Quantized
from onnx_eptq.ops import op_of
from onnx_eptq.plan import QuantPoint, walk
from onnx_eptq.prepare.opset import lower_opset

Storage = Callable[["Writer", str, np.ndarray, Grid], gs.Tensor]
STORAGE: dict[str, Storage] = {}
# What `onnxruntime.quantization.qdq_loss_debug` knows values by in front of their quantizers, and inputs behind them.
BEFORE, BEHIND = "_QuantizeLinear_Input", "_DequantizeLinear_Output"
NAME_LENGTH = 56  # every value gives its name to a dozen others, which in a small model outweigh its weights
SHIELDED = ("Conv", "ConvTranspose", "Gemm")  # where ONNX Runtime rounds float weights: `float_channels`
SUB_BYTE = {DTYPES["int4"].onnx, DTYPES["uint4"].onnx}


def storage(name: str) -> Callable[[Storage], Storage]:
    """Register a storage form: (writer, name, integers, grid) -> the tensor that DequantizeLinear reads."""

    def register(function: Storage) -> Storage:
        STORAGE[name] = function
        return function

    return register


class Writer:
    """The graph under construction, and the small constants that many of its nodes share."""

    def __init__(self, graph: gs.Graph, plan: Mapping[str, QuantPoint], quantized: Mapping[str, Quantized]) -> None:
        self.graph, self.plan, self.quantized = graph, plan, quantized
        self.tensors = graph.tensors()
        self.simulated = {id(node) for node in graph.nodes if not op_of(node).island}
        self.taken = set(self.tensors) | {node.name for node in graph.nodes}
        self.shared: dict[str, gs.Tensor] = {}
        self.readers: dict[str, set[str]] = {}  # of what is shared: the values it was asked for by
        self.zero_points: set[str] = set()  # those that are not shared
        # Constants that nothing but planned Clips read: they are in the file as long as one of those keeps them.
        read = {
            node.inputs[2].name: node.inputs[2]
            for node in graph.nodes
            if graphs.is_op(node, "Clip") and node.inputs[2:]
        }
        self.bounds = {
            name for name, tensor in read.items() if all(self._bounds(tensor, node) for node in tensor.outputs)
        }
        self.owners: dict[str, str] = {}  # of nodes and initializers: the value, or the key of what is shared
        # Numbers for short names: a value's is the same whatever the widths, as names are bytes that budgets count.
        self.numbers = {value: number for number, value in enumerate(plan)}
        self.value = ""  # whose quantizer is being written

    def _bounds(self, tensor: gs.Tensor, node: gs.Node) -> bool:
        """Whether the tensor is nothing to the node but the upper bound of a planned Clip."""
        planned = graphs.is_op(node, "Clip") and node.outputs[0].name in self.plan
        return planned and [index for index, read in enumerate(node.inputs) if read is tensor] == [2]

    def name(self, wanted: str) -> str:
        """A name nothing else has; long ones, which exporters make of whole paths, keep their end only."""
        short = wanted if len(wanted) <= NAME_LENGTH else wanted[-NAME_LENGTH:].lstrip("/_.")
        name = graphs.fresh(short, self.taken)
        self.owners[name] = self.value
        return name

    def constant(self, wanted: str, values: np.ndarray) -> gs.Constant:
        """A new initializer."""
        return gs.Constant(self.name(wanted), np.array(values, order="C"))

    def common(self, key: str, values: np.ndarray) -> gs.Tensor:
        """An initializer that all who ask for `key` share."""
        if key not in self.shared:
            self.share(key, self.constant(key, values))
        return self.share(key)

    def zeros(self, dtype: str, shape: tuple[int, ...]) -> gs.Tensor:
        """A shared zero point of all zeros."""
        key = f"zero_point_{dtype}_{'x'.join(map(str, shape)) or 'scalar'}"
        if DTYPES[dtype].onnx not in SUB_BYTE:
            return self.common(key, np.zeros(shape, dtype))
        if key not in self.shared:
            codes = np.zeros(shape, np.int8)
            self.share(key, graphs.packed_constant(self.name(key), codes, DTYPES[dtype].onnx))
        return self.share(key)

    def own_zeros(self, value: str, shape: tuple[int, ...]) -> gs.Tensor:
        """A zero point that is not shared, of a weight of 8 bits.

        ONNX Runtime's `session.x64quantprecision`, for processors without VNNI, refuses a second layer that reads the same one;
        layers of narrower weights it leaves alone.
        """
        zero_point = self.constant(f"{value}_zero_point", np.zeros(shape, np.int8))
        self.zero_points.add(zero_point.name)
        return zero_point

    def share(self, key: str, tensor: gs.Tensor | None = None) -> gs.Tensor:
        """The initializer, or the output of a node of its name, under that key, a new one when given; notes who asks."""
        if tensor is not None:
            self.shared[key] = tensor
            self.owners[tensor.name] = key
        self.readers.setdefault(key, set()).add(self.value)
        return self.shared[key]

    def widened(self, table: gs.Tensor) -> gs.Tensor:
        """A shared initializer as int32, by one Cast for all who ask."""
        key = f"{table.name}_int32"
        if key not in self.shared:
            self.share(key, self.node("Cast", key, [table], to=DTYPES["int32"].onnx))
        return self.share(key)

    def node(
        self, op: str, name: str, inputs: list[gs.Tensor], output: gs.Variable | None = None, **attrs: object
    ) -> gs.Variable:
        """Append a node and return its output, by default a new variable called like the node."""
        unique = self.name(name)
        output = output if output is not None else gs.Variable(unique)
        self.graph.nodes.append(gs.Node(op, unique, attrs=attrs, inputs=inputs, outputs=[output]))
        return output

    def activation(self, point: QuantPoint) -> None:
        """Put Quantize -> Dequantize on a variable; whoever reads the variable then reads the dequantized one."""
        value = self.tensors[point.value]
        root = point.tied_to or point.value
        readers = list(value.outputs)
        restored: gs.Variable
        if value.inputs:  # the name stays with the dequantized value, so that graph outputs keep theirs
            source = gs.Variable(self.name(f"{value.name}{BEFORE}"), dtype=value.dtype, shape=value.shape)
            producer = value.inputs[0]
            producer.outputs[[output is value for output in producer.outputs].index(True)] = source
            restored = value
            if graphs.is_op(producer, "Clip"):
                self.bound(producer, point)
        else:
            source, restored = (
                value,
                gs.Variable(self.name(f"{value.name}{BEHIND}"), dtype=value.dtype, shape=value.shape),
            )
            for reader in readers:
                _replace_input(reader, value, restored)
        codes = self.node("QuantizeLinear", f"{value.name}_quantized", [source, *self.parameters(root)])
        if point.grid.bits < 8:
            # No runtime executes narrower activations, but an integer Clip keeps its kernels usable. Not a Min: ONNX Runtime has
            # it for uint8 only since 1.24, and OpenVINO leaves it outside of its kernels.
            limit = self.common(f"qmax_{point.grid.qmax}", np.array(point.grid.qmax, np.uint8))
            codes = self.node("Clip", f"{value.name}_limited", [codes, gs.Variable.empty(), limit])
        shielded = [(node, channels) for node in restored.outputs if (channels := self.float_channels(node, restored))]
        alone = len(shielded) == len(restored.outputs) and not self.leaves(restored)
        plain = shielded[0][1] if shielded and alone else None
        self.dequantized(f"{value.name}_dq", codes, root, plain, restored)
        for node, channels in shielded:
            if channels != plain:
                node.inputs[0] = self.dequantized(f"{node.name or node.op}_input", codes, root, channels)

    def bound(self, clip: gs.Node, point: QuantPoint) -> None:
        """Lift the upper bound of a Clip from 0 on where the grid behind it, narrower than its type, ends before.

        ONNX Runtime leaves out a Clip in front of a quantizer whose whole type lies inside its bounds, and only then runs the
        layer before it on integers. Lifted or not, such a bound is a constant of its own: sizes must not depend on scales.
        """
        low, high = (clip.inputs[i] if i < len(clip.inputs) else None for i in (1, 2))
        if not (isinstance(low, gs.Constant) and isinstance(high, gs.Constant)):
            return
        self.owners[clip.name] = point.value  # it spells the bound's name
        if point.grid.bits == 8:
            if high.name in self.bounds:
                self.share(high.name, high)
            return
        _, qparams, grid = self.quantized[point.tied_to or point.value]
        codes = [grids.quantize(torch.from_numpy(np.array(end.values)), qparams, grid) for end in (low, high)]
        covers = float(low.values) == 0 and int(codes[0]) == grid.qmin and int(codes[1]) == grid.qmax
        highest = np.finfo(np.float32).max if covers else high.values
        clip.inputs[2] = self.constant(f"{point.value}_max", np.array(highest, np.float32))

    def parameters(self, root: str, channels: tuple[int, int] | None = None) -> list[gs.Tensor]:
        """Scale and zero point of an activation's grid, or as many equal ones as an axis is long: (axis, size)."""
        scale, zero_point = (number.numpy() for number in self.quantized[root].qparams)
        suffix = ""
        if channels is not None:
            size = channels[1]
            scale, zero_point, suffix = np.full(size, scale), np.full(size, zero_point), f"_{size}"
        return [
            self.common(f"{root}_scale{suffix}", scale),
            self.common(f"{root}_zero_point{suffix}", zero_point.astype(np.uint8)),
        ]

    def dequantized(
        self,
        name: str,
        codes: gs.Tensor,
        root: str,
        channels: tuple[int, int] | None,
        output: gs.Variable | None = None,
    ) -> gs.Variable:
        """Append the DequantizeLinear of an activation, with `parameters` of these channels."""
        attrs = {} if channels is None else {"axis": channels[0]}
        return self.node("DequantizeLinear", name, [codes, *self.parameters(root, channels)], output, **attrs)

    def leaves(self, tensor: gs.Variable) -> bool:
        """Whether the tensor is a network output, or a subgraph reads it."""
        if any(tensor is output for output in self.graph.outputs):
            return True
        inner = (node for node in self.graph.nodes if all(node is not reader for reader in tensor.outputs))
        return any(read is tensor for node in inner for read in graphs.variables_read(node))

    def float_channels(self, node: gs.Node, source: gs.Tensor) -> tuple[int, int] | None:
        """Axis and size of the channels that a layer reads whose weights stay float; any axis that has a size will do.

        With one scale per channel, all the same, it gets the numbers that one scale would give. But behind a single scale
        ONNX Runtime takes it upon itself to round float weights and biases, per tensor (`WeightBiasQuantization`, on at all
        but the lowest level of optimisation).
        """
        if node.op not in SHIELDED or node.inputs[0] is not source or not isinstance(node.inputs[1], gs.Constant):
            return None
        if node.inputs[1].name in self.plan:
            return None
        sizes = [(axis, size) for axis, size in enumerate(source.shape or ()) if isinstance(size, int) and size > 1]
        return next((pair for pair in sizes if pair[0] == 1), sizes[-1] if sizes else None)

    def stored(self, point: QuantPoint, form: str) -> None:
        """Replace a float constant by its integers and a DequantizeLinear, but for islands: they are simulated in float."""
        value = self.tensors[point.value]
        integers, qparams, grid = self.quantized[point.value]
        assert integers is not None
        codes = integers.numpy()
        scale = self.common(f"{value.name}_scale", qparams.scale.numpy())
        inputs: list[gs.Tensor]
        if point.role == "bias":
            # Said although it is always 0: converters to ONNX Runtime's own format stumble where it is left out.
            zero_point = self.zeros("int32", tuple(qparams.scale.shape))
            inputs = [self.constant(f"{value.name}_quantized", codes), scale, zero_point]
        elif point.role == "constant":
            zero_point = self.common(f"{value.name}_zero_point", qparams.zero_point.numpy().astype(np.uint8))
            inputs = [self.constant(f"{value.name}_quantized", codes.astype(np.uint8)), scale, zero_point]
        else:
            dtype = "int4" if form == "int4" else "int8"
            stored = STORAGE[form](self, value.name, codes.astype(np.int8), grid)
            shape = tuple(qparams.scale.shape)
            inputs = [stored, scale, self.own_zeros(value.name, shape) if grid.bits == 8 else self.zeros(dtype, shape)]
        attrs = {} if grid.axis is None else {"axis": grid.axis}
        readers = [node for node in value.outputs if id(node) in self.simulated]
        restored = self.node("DequantizeLinear", f"{value.name}_dequantized", inputs, **attrs)
        for reader in readers:
            _replace_input(reader, value, restored)


def _replace_input(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    for index, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[index] = new


@storage("int8")
def _int8(writer: Writer, name: str, codes: np.ndarray, grid: Grid) -> gs.Tensor:
    """One byte per weight, whatever its width."""
    return writer.constant(f"{name}_quantized", codes)


@storage("int4")
def _int4(writer: Writer, name: str, codes: np.ndarray, grid: Grid) -> gs.Tensor:
    """A plain INT4 initializer (opset 21)."""
    return graphs.packed_constant(writer.name(f"{name}_quantized"), codes, DTYPES["int4"].onnx)


@storage("cast")
def _cast(writer: Writer, name: str, codes: np.ndarray, grid: Grid) -> gs.Tensor:
    """INT4 -> Cast(INT8): folded when the session is created, so that the integer kernels see INT8."""
    packed = graphs.packed_constant(writer.name(f"{name}_packed"), codes, DTYPES["int4"].onnx)
    return writer.node("Cast", f"{name}_quantized", [packed], to=DTYPES["int8"].onnx)


@storage("lut")
def _lut(writer: Writer, name: str, codes: np.ndarray, grid: Grid) -> gs.Tensor:
    """Packed bytes that a Gather from a table of 256 rows unpacks; runs on every runtime, also at 2 and at true 3 bits.

    Row b of the table holds what byte b stands for: several codes, or of codes of 3 bits one bit of eight. Bytes are stored as
    INT8, whose negative ones count from the table's end, to the same rows: OpenCV 4 shifts UINT8 by 128. What it takes has short
    names: in a small model long ones would outweigh what is saved.
    """
    count, planes = codes.size, (1, 2, -4) if grid.bits == 3 else None
    width, unit = (1, "bit") if planes else (grid.bits, f"int{grid.bits}")
    parts = [codes >> place & 1 for place in range(len(planes))] if planes else [codes]
    packed = np.stack([np.frombuffer(graphs.pack(part, width), np.int8) for part in parts])
    table = graphs.unpack(bytes(range(256)), width, (256, 8 // width), not planes).astype(np.int8)
    prefix = f"lut{writer.numbers[name]}"
    index = writer.node("Cast", f"{prefix}_index", [writer.constant(f"{name}_packed", packed)], to=DTYPES["int32"].onnx)
    rows = writer.common(f"table_{unit}", table)
    if planes:
        # In int32: runtimes neither multiply nor add int8. A Cast behind each Gather would keep OpenVINO from folding.
        rows = writer.widened(rows)
    values = writer.node("Gather", f"{prefix}_values", [rows, index])
    if planes:
        places = writer.common("bit_values", np.array(planes, np.int32).reshape(-1, 1, 1))
        terms = writer.node("Mul", f"{prefix}_terms", [values, places])
        total = writer.node("ReduceSum", f"{prefix}_sum", [terms, writer.common("bit_axis", np.array([0]))], keepdims=0)
        values = writer.node("Cast", f"{prefix}_codes", [total], to=DTYPES["int8"].onnx)
    if count % (8 // width):
        flat = writer.node("Reshape", f"{prefix}_flat", [values, writer.common("shape_flat", np.array([-1]))])
        ends = [writer.common(f"index_{end}", np.array([end])) for end in (0, count)]
        values = writer.node("Slice", f"{prefix}_cut", [flat, *ends])
    shape = "x".join(map(str, codes.shape))
    return writer.node("Reshape", prefix, [values, writer.common(f"shape_{shape}", np.array(codes.shape, np.int64))])


def write(
    graph: gs.Graph,
    plan: Mapping[str, QuantPoint],
    quantized: Mapping[str, Quantized],
    storage_of: Mapping[int, str],
    *,
    opset: int = 21,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Return the model with the plan's quantizers as Q/DQ nodes and the given integers as initializers.

    Args:
        graph: the prepared float graph; not modified.
        plan: where quantizers sit.
        quantized: integers and parameters of every planned value, as `Mirror.export` returns them.
        storage_of: storage form (a key of `STORAGE`) per weight width in bits.
        opset: 21, or 13 and more for older runtimes (no sub-byte types there).
        metadata: entries for the model's metadata_props.

    Raises:
        ModelError: a node or a storage form cannot be expressed in `opset`.
    """
    return _written(graph, plan, quantized, storage_of, opset, metadata)[0]


def _written(
    graph: gs.Graph,
    plan: Mapping[str, QuantPoint],
    quantized: Mapping[str, Quantized],
    storage_of: Mapping[int, str],
    opset: int,
    metadata: Mapping[str, str] | None,
) -> tuple[onnx.ModelProto, Writer]:
    writer = Writer(graphs.copy(graph), plan, quantized)
    for item in list(walk(writer.graph, plan)):
        if isinstance(item, QuantPoint):
            writer.value = item.value
            if item.role == "activation":
                writer.activation(item)
            else:
                writer.stored(item, storage_of[item.grid.bits] if item.role == "weight" else "int8")
    if opset < writer.graph.opset:
        lower_opset(writer.graph, opset)
    model = graphs.to_model(writer.graph, ir_version=ir_version_of(opset), metadata=metadata)
    _forget_shapes(model)
    return model, writer


def ir_version_of(opset: int) -> int:
    """The IR version that came with an opset, 13 to 25; never an older one than 8."""
    return next(version for least, version in ((21, 10), (19, 9), (13, 8)) if opset >= least)


@dataclass
class Footprint:
    """Where the bytes of a written file are.

    Attributes:
        total: Of the whole file.
        own: Of the nodes and initializers of each planned value.
        payload: Of the integers alone of each planned constant.
        shared: Of initializers that several values share, by key.
        readers: The values that share them.
    """

    total: int
    own: dict[str, int]
    payload: dict[str, int]
    shared: dict[str, int]
    readers: dict[str, set[str]]


def footprint(
    graph: gs.Graph,
    plan: Mapping[str, QuantPoint],
    storage_of: Mapping[int, str],
    *,
    opset: int = 21,
    metadata: Mapping[str, str] | None = None,
) -> Footprint:
    """Write the file with zeros for integers, as large as with any others, and attribute its bytes; arguments as `write`'s."""
    model, writer = _written(graph, plan, _zeros(graph, plan), storage_of, opset, metadata)
    found = Footprint(graphs.model_bytes(model), dict.fromkeys(plan, 0), dict.fromkeys(plan, 0), {}, writer.readers)
    items: list[onnx.NodeProto | onnx.TensorProto] = [*model.graph.node, *model.graph.initializer]
    for item in items:
        owner = writer.owners.get(item.name)
        if owner is None:
            continue
        size = item.ByteSize()
        size += 1 + _varint(size)  # the field's number and length stand before it
        sizes = found.shared if owner in writer.readers else found.own
        sizes[owner] = sizes.get(owner, 0) + size
        held = isinstance(item, onnx.TensorProto) and item.data_type in INTEGERS and owner in found.payload
        if held and item.name not in writer.zero_points:
            found.payload[owner] += len(item.raw_data)
    return found


INTEGERS = {dtype.onnx for dtype in DTYPES.values()}


def _varint(number: int) -> int:
    """Bytes of a protobuf length."""
    return max(1, -(-number.bit_length() // 7))


def _zeros(graph: gs.Graph, plan: Mapping[str, QuantPoint]) -> dict[str, Quantized]:
    """Integers and parameters of the right shapes."""
    tensors, found = graph.tensors(), {}
    for value, point in plan.items():
        shape = tensors[value].shape
        channels = () if point.grid.axis is None else (int(shape[point.grid.axis]),)
        qparams = QParams(torch.ones(channels), torch.zeros(channels, dtype=torch.int32))
        codes = None if point.role == "activation" else torch.zeros(tuple(shape), dtype=torch.int32)
        found[value] = Quantized(codes, qparams, point.grid)
    return found


def _forget_shapes(model: onnx.ModelProto) -> None:
    """Drop shapes that a runtime infers again by itself, and symbols that claim two outputs to be equally large.

    Exporters give one symbol to dimensions that differ, which harms nothing until a runtime plans its memory by them.
    """
    standard = {output for node in model.graph.node if not node.domain for output in node.output}
    kept = [value for value in model.graph.value_info if value.name not in standard]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    known = {dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim}
    for value in model.graph.output:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and dim.dim_param not in known:
                dim.dim_param = f"{value.name}_{axis}"
