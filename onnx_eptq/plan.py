"""Where quantizers sit: `make_plan` decides it once, `walk` tells it to every reader.

The PyTorch mirror and the QDQ writer both consume `walk(graph, plan)`, so what is simulated is what is written.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from onnx_eptq.errors import ModelError, UnsupportedOp, UsageError
from onnx_eptq.graph import array, extras, is_mask, is_op, masks_sum
from onnx_eptq.grid import Grid
from onnx_eptq.ops import QUANTIZED, op_name, op_of
from onnx_eptq.targets import Target

PointRole = Literal["activation", "weight", "bias", "constant"]
Limits = tuple[float | None, float | None]
CONSTANT_BITS = 8  # operands such as positional embeddings; narrower ones cost accuracy and save nothing
EDGE_BITS = 8  # the network's inputs and outputs: sensors and readers speak 8 bits; and what `wide` names
BIAS_BITS = 32
_HEADS = ("Exp", "LpNormalization")  # where nothing follows, ends of networks, not of spectrograms: rates, embeddings
_NORMALIZING = ("LayerNormalization", "InstanceNormalization", "LpNormalization", "GroupNormalization")
_WAVES = ("Sin", "Cos", "Tan", "Atan")
DEEPEST = 8  # operators between a mask's constant and the sum that applies it
_MAKING = (
    "ConstantOfShape", "Trilu", "Expand", "Tile", "Slice", "Gather", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Transpose"
)  # fmt: skip
DECODING, UNPLANNED = "decoding", "the plan leaves it float"  # reasons, or what they begin with
ISLAND_REASON = "{} is left to ONNX Runtime, in float"


@dataclass(frozen=True)
class QuantPoint:
    """One quantizer: the value it sits on, its grid, and what its parameters derive from.

    `tied_to` names the value whose parameters it shares; `moved` says that it is on that grid already when it is produced
    (a MaxPool or Reshape of it), so that quantizing changes nothing; `scale_from` (biases) the activation and the weight
    whose scales' product is its scale; `limits` the bounds that the producing operator guarantees (None: unbounded).
    `whole_range` says that no element may saturate: the largest ones decide (network outputs, inputs of a Softmax).
    `reach` is a number that an 8-bit grid covers even if no element is that large (`_reach`).
    """

    value: str
    grid: Grid
    role: PointRole
    tied_to: str | None = None
    scale_from: tuple[str, str] | None = None
    limits: Limits = (None, None)
    whole_range: bool = False
    moved: bool = False
    reach: float = 0.0

    @property
    def least_scale(self) -> float:
        """The smallest step with which the grid reaches as far as it must; 0 for most, and for all of less than 8 bits."""
        return self.reach / (self.grid.qmax - self.grid.qmin) if self.grid.bits >= 8 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, defaults left out."""
        row: dict[str, Any] = {
            "value": self.value,
            "role": self.role,
            "bits": self.grid.bits,
            "signed": self.grid.signed,
        }
        optional = {"axis": self.grid.axis, "tied_to": self.tied_to, "scale_from": self.scale_from}
        row |= {key: value for key, value in optional.items() if value is not None}
        if self.limits != (None, None):
            row["limits"] = list(self.limits)
        if self.reach:
            row["reach"] = self.reach
        row |= {flag: True for flag in ("whole_range", "moved") if getattr(self, flag)}
        return row


class _Row(BaseModel):
    """A point as JSON holds it; whether it fits a model is for `check_plan` to say."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    value: str
    role: str
    bits: int = Field(ge=1)
    signed: bool
    axis: int | None = Field(None, ge=0)
    tied_to: str | None = None
    scale_from: tuple[str, str] | None = None
    limits: Limits = (None, None)
    reach: float = Field(0.0, ge=0)
    whole_range: bool = False
    moved: bool = False

    @field_validator("limits")
    @classmethod
    def ordered(cls, limits: Limits) -> Limits:
        low, high = limits
        if low is not None and high is not None and low > high:
            raise ValueError("the lower limit comes first")
        return limits

    def point(self) -> QuantPoint:
        given = self.model_dump(exclude={"bits", "signed", "axis"})
        return QuantPoint(grid=Grid(self.bits, self.signed, self.axis), **given)


class _File(BaseModel):
    """A plan as JSON holds it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    points: list[_Row]
    floats: dict[str, str] = {}


class Plan(dict[str, QuantPoint]):
    """Quantizers by value name, in walk order; `floats` says of every value left float why."""

    def __init__(self, points: Mapping[str, QuantPoint] | None = None, floats: Mapping[str, str] | None = None) -> None:
        super().__init__(points or {})
        self.floats: dict[str, str] = dict(floats or {})

    def root(self, value: str) -> QuantPoint:
        """The point whose parameters `value` uses: itself, or the one it is tied to."""
        point = self[value]
        return self[point.tied_to] if point.tied_to else point

    def __str__(self) -> str:
        """One line per value: name, role, bits, ties; then what stays float."""
        lines = []
        for point in self.values():
            width = f"{'int' if point.grid.signed else 'uint'}{point.grid.bits}"
            note = (
                f"= {point.tied_to}" if point.tied_to else "" if point.grid.axis is None else f"axis {point.grid.axis}"
            )
            lines.append(f"{point.role:<11}{width:<7}{point.value}  {note}".rstrip())
        return "\n".join(lines + [f"{'float':<18}{value}  ({reason})" for value, reason in self.floats.items()])

    def to_json(self) -> str:
        """The plan as JSON text, one point per line so that it can be edited and compared."""
        rows = ",\n  ".join(json.dumps(point.to_json()) for point in self.values())
        return f'{{"version": 1,\n "points": [\n  {rows}\n ],\n "floats": {json.dumps(self.floats, indent=1)}\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; raises UsageError, which names the place, when the text is not one."""
        try:
            file = _File.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            where = f"{place}: {reason}" if place else reason
            raise UsageError(
                f"the plan is not a JSON plan as --plan-out writes it ({where}); mend it or write a fresh one"
            ) from None
        twice = [value for value, count in Counter(row.value for row in file.points).items() if count > 1]
        if twice:
            raise UsageError(f"the plan has several points for '{twice[0]}'; leave one of them")
        return cls({row.value: row.point() for row in file.points}, file.floats)


@dataclass(frozen=True)
class Layer:
    """A Conv, ConvTranspose, Gemm or MatMul with a constant weight, and the constant that acts as its bias.

    `bias_node` is the node that adds the bias: the layer itself, or the Add behind a MatMul. `output` is the value after it.
    """

    node: gs.Node
    weight: gs.Constant
    source: gs.Tensor
    axis: int | None
    bias: gs.Constant | None
    bias_node: gs.Node
    output: gs.Variable
    output_axis: int


@dataclass(frozen=True)
class Rules:
    """What the user asks of a plan: default widths, `bits` for name patterns, name or op patterns that stay float."""

    weight_bits: int = 8
    act_bits: int = 8
    bits: Mapping[str, int] = field(default_factory=dict)
    keep_float: Sequence[str] = ()


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether the tensor is an initializer."""
    return isinstance(tensor, gs.Constant)


def is_float(tensor: gs.Tensor) -> bool:
    """Whether the tensor holds float32 data as far as shape inference knows."""
    return tensor.dtype is not None and np.dtype(tensor.dtype) == np.float32


def role_of(node: gs.Node) -> str:
    """The quantization role of a node's operator; graphs are checked by `check_ops` first."""
    return str(op_of(node).role_of(node.attrs))


def is_stored(node: gs.Node) -> bool:
    """Whether a node only restores a constant that is stored in integers."""
    return is_op(node, "DequantizeLinear") and all(array(tensor) is not None for tensor in node.inputs if tensor.name)


def check_ops(graph: gs.Graph) -> None:
    """Raise UnsupportedOp that names every node which cannot be simulated."""
    unknown = [node for node in graph.nodes if not _is_known(node)]
    quantized = next((node.op for node in unknown if node.op in QUANTIZED and not is_stored(node)), None)
    if not quantized:  # weights that are stored in fewer bits become float constants
        unknown = [node for node in unknown if not is_stored(node)]
    if quantized:
        raise ModelError(
            f"the model is quantized already (it holds {quantized} nodes); give the float model it came from"
        )
    if unknown:
        names = ", ".join(f"'{node.name}' {op_name(node)}" for node in unknown[:8])
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise UnsupportedOp(
            f"{len(unknown)} node(s) cannot be simulated: {names}{more}; replace them by standard operators or cut the model "
            "before them"
        )


def _is_known(node: gs.Node) -> bool:
    try:
        op_of(node)
    except UnsupportedOp:
        return False
    return True


def _bias_of(node: gs.Node, outputs: set[int]) -> tuple[gs.Constant | None, gs.Node]:
    """The bias constant of a linear node and the node that adds it."""
    index = op_of(node).bias
    if index is not None:
        has = len(node.inputs) > index and is_constant(node.inputs[index])
        return (node.inputs[index] if has else None), node
    output = node.outputs[0]
    consumers = output.outputs
    if len(consumers) == 1 and is_op(consumers[0], "Add"):
        other = [tensor for tensor in consumers[0].inputs if tensor is not output]
        channels = node.inputs[1].shape[-1] if node.inputs[1].shape else None
        constant = len(other) == 1 and is_constant(other[0]) and list(other[0].shape) == [channels]
        if constant and not masks_sum(np.asarray(other[0].values), consumers[0].outputs[0], outputs):
            return other[0], consumers[0]
    return None, node


def linear_layers(graph: gs.Graph) -> list[Layer]:
    """Every linear node with a float constant weight, in execution order."""
    graph_outputs = {id(tensor) for tensor in graph.outputs}
    layers = []
    for node in graph.nodes:
        if role_of(node) != "linear":
            continue
        index = op_of(node).weight
        assert index is not None
        axis_of = op_of(node).channel_axis
        if not is_constant(node.inputs[index]) and node.op == "MatMul" and is_constant(node.inputs[0]):
            index, axis = 0, None  # rows of a left operand are no output channels that a runtime's kernel can scale
        else:
            ndim = len(node.inputs[index].shape or ())
            axis = axis_of(node.attrs, ndim) if axis_of and (node.op != "MatMul" or ndim == 2) else None
        weight = node.inputs[index]
        if not is_constant(weight) or not is_float(weight):
            continue
        bias, bias_node = _bias_of(node, graph_outputs) if index else (None, node)
        if bias_node is not node and id(node.outputs[0]) in graph_outputs:
            bias, bias_node = None, node
        layers.append(
            Layer(
                node,
                weight,
                node.inputs[1 - index],
                axis,
                bias,
                bias_node,
                bias_node.outputs[0],
                op_of(node).output_axis,
            )
        )
    return layers


def _matches(patterns: Sequence[str], *names: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def masks(node: gs.Node) -> bool:
    """Whether an operand rules elements out (`is_mask`): their scores are huge negative numbers or minus infinity.

    The operand is a constant, or made of constants and shapes, as a causal mask of open length is. What makes it masks, too.
    """
    if is_op(node, *_MAKING):
        return _is_made_mask(node.outputs[0])
    return op_of(node).operands and any(_is_made_mask(tensor) for tensor in node.inputs if is_float(tensor))


def _is_made_mask(tensor: gs.Tensor, depth: int = 0) -> bool:
    """Whether a value is a mask: a constant, or one that operators move, spread, or multiply by zeros and ones."""
    if is_constant(tensor):
        return is_float(tensor) and is_mask(np.asarray(tensor.values))
    (node,) = tensor.inputs or (None,)
    if node is None or depth == DEEPEST or not is_float(tensor):
        return False
    if is_op(node, "ConstantOfShape"):
        value = node.attrs.get("value")
        return value is not None and is_mask(np.asarray(getattr(value, "values", value)))
    made = (_is_made_mask(source, depth + 1) for source in node.inputs)
    if is_op(node, "Where"):
        return all(is_constant(source) for source in node.inputs[1:]) and any(made)
    return is_op(node, *_MAKING, "Mul") and any(made)


def _affine_ends(graph: gs.Graph) -> Iterator[gs.Node]:
    """Normalizations and what leads from them to the constant scale and shift behind them, as in an exported GroupNorm.

    No kernel runs a part of it on integers, and each quantizer inside would round anew what is rounded at its end.
    """
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        if not op_of(node).normalizes:
            continue
        chain, affine, tensor = [node], 0, node.outputs[0]
        while len(tensor.outputs) == 1 and id(tensor) not in outputs:
            (reader,) = tensor.outputs
            if is_op(reader, "Mul", "Add") and any(is_constant(other) for other in reader.inputs):
                affine = len(chain) + 1
            elif role_of(reader) != "same_grid":
                break
            chain.append(reader)
            tensor = reader.outputs[0]
        yield from chain[:affine]


def _decoding(graph: gs.Graph) -> dict[int, str]:
    """Nodes behind the last linear operators that select elements or join scores with coordinates, and what follows them.

    8 bits make scores equal that TopK has to order, and on one grid with coordinates all scores would be 0.
    """
    feeding: set[int] = set()  # linear operators, and what they depend on
    for node in reversed(graph.nodes):
        readers = (id(reader) for tensor in node.outputs for reader in tensor.outputs)
        if role_of(node) == "linear" or any(reader in feeding for reader in readers):
            feeding.add(id(node))
    found: dict[int, str] = {}
    for node in graph.nodes:
        if id(node) in feeding:
            continue
        before = [found[id(p)] for tensor in node.inputs for p in tensor.inputs if id(p) in found]
        if before:
            found[id(node)] = before[0]
        elif op_of(node).selects:
            found[id(node)] = f"{DECODING}, from {node.op} on"
        elif op_of(node).joins and {is_score(tensor) for tensor in node.inputs if not is_constant(tensor)} == {
            True,
            False,
        }:
            found[id(node)] = f"{DECODING}: scores and coordinates join"
    return found


def is_score(tensor: gs.Tensor) -> bool:
    """Whether the values are Sigmoids, Softmaxes or the like, their products, or moved from them, within limits or not."""
    (producer,) = tensor.inputs or (None,)
    if producer is None:
        return False
    if is_op(producer, "Mul"):
        return all(is_score(source) for source in producer.inputs)
    if is_op(producer, "Sub"):  # 1 - p
        return _constant_scalar(producer.inputs[0]) == 1 and is_score(producer.inputs[1])
    if role_of(producer) in ("same_grid", "clamp"):
        return is_score(producer.inputs[0])
    return op_of(producer).squashes and op_of(producer).bounds == (0.0, 1.0)


def _float_region(graph: gs.Graph, kept: set[int], fronts: bool = True) -> tuple[dict[int, str], set[int]]:
    """Nodes that run in float, by id, with the reason; and the linear operators among them that read float as well.

    Seeds are the nodes the user keeps, operators whose result 8 bits cannot hold (Log, Reciprocal, ...), and what decodes
    detections. Operators between seeds join: those whose every consumer is inside, and those that read an inside value which
    nothing outside needs. A linear operator joins when all that reads it is inside (the matrices of a spectrogram before its
    Log), but for a decoding or a mask: its weights are quantized all the same. Where other linear operators follow, its whole
    result must go through seeds, as it does not in a normalization: else all layers in front of those would run in float. What
    such an operator reads joins only near the inputs: a classifier that ends in a Log is no spectrogram, and no small network
    that ends in `_HEADS` is. So it reads float only if its whole result, and that of the linear operators before it, goes
    through seeds: of x / |x| some goes round. Without `fronts` no operator near the inputs joins for what it feeds.
    """
    region = {id(node): "kept float as asked" for node in graph.nodes if id(node) in kept}
    seeds = (n for n in graph.nodes if role_of(n) == "sensitive" and id(n) not in region)
    region |= {id(n): ISLAND_REASON.format(n.op) if op_of(n).island else f"{n.op} needs float" for n in seeds}
    masking = {id(n): "applies a mask of huge numbers" for n in graph.nodes if masks(n) and id(n) not in region}
    region |= masking
    decoding = {key: reason for key, reason in _decoding(graph).items() if key not in region}
    # Nodes that more than the head of a network follows: they could be what a Log reads.
    fronting: set[int] = set()
    for node in reversed(graph.nodes):
        for reader in (reader for tensor in node.outputs for reader in tensor.outputs):
            seed = fronts and id(reader) in region and not is_op(reader, *_HEADS)
            if seed or role_of(reader) == "linear" or id(reader) in fronting:
                fronting.add(id(node))
    heads = {id(n) for n in graph.nodes if (is_op(n, *_HEADS) or not fronts) and id(n) not in fronting}
    funnel = {
        id(n) for n in graph.nodes if id(n) in region and id(n) not in {*decoding, *masking, *heads} and n.op != "Div"
    }  # x / |x| goes on
    region |= decoding
    late = {*decoding, *masking}  # and what joins the region for their sake: no spectrogram leads to them
    islands = {id(node) for node in graph.nodes if op_of(node).island}  # what reads or feeds them can be quantized
    growing = {key for key, reason in region.items() if reason != "kept float as asked" and key not in islands}
    region |= {
        id(n): "between a normalization and its scale and shift" for n in _affine_ends(graph) if id(n) not in region
    }
    outputs = {id(tensor) for tensor in graph.outputs}
    leading: set[int] = set()  # nodes with a linear operator behind them
    for node in reversed(graph.nodes):
        behind = [reader for tensor in node.outputs for reader in tensor.outputs]
        if any(role_of(reader) == "linear" or id(reader) in leading for reader in behind):
            leading.add(id(node))
    depth: dict[int, int] = {}  # linear operators on the longest way from an input to a node, itself included
    for node in graph.nodes:
        above = [depth[id(producer)] for tensor in node.inputs for producer in tensor.inputs]
        depth[id(node)] = max(above, default=0) + (role_of(node) == "linear")

    def inside(consumer: gs.Node, node: gs.Node) -> bool:
        near = depth[id(node)] <= 1 and id(consumer) in fronting
        return id(consumer) in growing and (role_of(consumer) != "linear" or near)

    def joins(node: gs.Node) -> bool:
        if role_of(node) not in ("linear", "arithmetic", "same_grid", "clamp") or not is_float(node.outputs[0]):
            return False
        if role_of(node) == "linear" and not any(is_constant(tensor) for tensor in node.inputs[:2]):
            return False  # a product of two activations, before the mask of an attention: worth its 8 bits
        consumers = [consumer for tensor in node.outputs for consumer in tensor.outputs]
        if role_of(node) == "linear" and any(
            id(c) in late or (id(c) in leading and id(c) not in funnel) for c in consumers
        ):
            return False
        if role_of(node) == "clamp" and any(id(c) in masking for c in consumers):
            return False  # behind it is the better place for a quantizer
        if consumers and all(inside(c, node) for c in consumers) and not any(id(t) in outputs for t in node.outputs):
            return True
        for tensor in () if role_of(node) == "linear" else node.inputs:
            inner = tensor.inputs and id(tensor.inputs[0]) in growing and id(tensor) not in outputs
            if inner and all(id(c) in growing or c is node or role_of(c) not in ("linear",) for c in tensor.outputs):
                return True
        return False

    changed = True
    while changed:
        changed = False
        for node in graph.nodes:
            if id(node) not in region and joins(node):
                readers = (id(c) for tensor in node.outputs for c in tensor.outputs)
                reason = next((decoding[reader] for reader in readers if reader in decoding), None)
                if reason:
                    decoding[id(node)] = reason
                if any(id(c) in late for tensor in node.outputs for c in tensor.outputs):
                    late.add(id(node))
                region[id(node)] = reason or "between operators that need float"
                growing.add(id(node))
                if not reason and all(id(c) in funnel for tensor in node.outputs for c in tensor.outputs):
                    funnel.add(id(node))
                changed = True
    waving: set[int] = set()  # nodes whose whole result goes through a sine: layers of a network, but for the first
    for node in reversed(graph.nodes):
        behind = [reader for tensor in node.outputs for reader in tensor.outputs]
        if behind and all(is_op(reader, *_WAVES) or id(reader) in waving for reader in behind):
            waving.add(id(node))
    front: set[int] = set()  # nodes whose linear operators, themselves included, all lead to seeds
    for node in graph.nodes:
        clear = all(id(producer) in front for tensor in node.inputs for producer in tensor.inputs)
        leads = id(node) in funnel and (depth[id(node)] <= 1 or id(node) not in waving)
        if clear and (role_of(node) != "linear" or leads):
            front.add(id(node))
    return region, front


def _is_affine(node: gs.Node) -> bool:
    """Whether a node scales or shifts one activation by constants."""
    if is_op(node, "BatchNormalization") or (node.domain == "ai.onnx.ml" and node.op == "Scaler"):
        return True
    return is_op(node, "Add", "Sub", "Mul", "Div") and sum(map(is_constant, node.inputs)) == 1


def _passes_columns(node: gs.Node) -> bool:
    """Whether what evens out columns may lie on both sides of a node."""
    if is_op(node, "Where"):  # a number in place of what is missing
        return any(map(is_constant, node.inputs[1:]))
    return _picks_columns(node) or role_of(node) in ("same_grid", "clamp") or is_op(node, "Cast", "Concat")


def _picks_columns(node: gs.Node) -> bool:
    """Whether a node takes columns out of many."""
    tables = node.domain == "ai.onnx.ml" and node.op == "ArrayFeatureExtractor"
    return tables or is_op(node, "Split", "Slice", "Gather")


def _divides_by(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether a node divides by a value."""
    return node.inputs[0] is tensor if is_op(node, "Reciprocal") else is_op(node, "Div") and node.inputs[1] is tensor


class _Ways:
    """The ways that the columns of an input go, through nodes that pass them on, to the nodes that scale or shift them."""

    def __init__(self, outputs: set[int]) -> None:
        self.outputs = outputs
        self.known: dict[tuple[int, bool], set[int] | None] = {}

    def scaling(self, tensor: gs.Tensor, every: bool = False) -> set[int] | None:
        """The nodes on ways that scale, to the last that does; with `every`, None where another way leads elsewhere.

        A way ends, too, where columns become integers or truth values, as those of categories do, and where nobody reads.
        """
        key = id(tensor), every
        if key not in self.known:
            self.known[key] = self._scaling(tensor, every)
        return self.known[key]

    def _scaling(self, tensor: gs.Tensor, every: bool) -> set[int] | None:
        if id(tensor) in self.outputs:
            return None
        found: set[int] = set()
        beside: set[int] = set()  # what is picked goes its own way, on a grid of its own; questions need no grid
        for reader in tensor.outputs:
            asks = role_of(reader) == "untouched" and not is_float(reader.outputs[0])
            behind = [value for value in reader.outputs if value.name and (value.outputs or id(value) in self.outputs)]
            if _is_affine(reader):
                found |= {id(reader)} | (self.scaling(reader.outputs[0], True) or set())
            elif _passes_columns(reader) and not asks:
                ways = [self.scaling(value, every) for value in behind]
                if every and not all(ways):
                    return None
                if any(ways):
                    found |= {id(reader)}.union(*(nodes or () for nodes in ways))
                elif _picks_columns(reader):
                    beside.add(id(reader))
            elif every and not asks:
                return None
            elif asks:
                beside.add(id(reader))
        return found | beside if found else found


def _column_scalers(graph: gs.Graph) -> dict[int, str]:
    """Nodes that bring the columns of an uneven input to one scale, or give an output's columns theirs; with the reason."""
    outputs = {id(tensor) for tensor in graph.outputs}
    biases = {id(layer.bias_node) for layer in linear_layers(graph)}
    ways = _Ways(outputs)
    found: dict[int, str] = {}
    for tensor in graph.inputs:
        if tensor.name in extras(graph).uneven:
            found |= dict.fromkeys(ways.scaling(tensor) or (), f"evens out the columns of '{tensor.name}'")
    for tensor in graph.outputs:
        reason, chain = f"gives the columns of '{tensor.name}' their scales", list[gs.Node]()
        while tensor.name in extras(graph).uneven or chain:
            (node,) = tensor.inputs or (None,)
            alone = len(tensor.outputs) == 0 if not chain else len(tensor.outputs) == 1 and id(tensor) not in outputs
            if (
                node is None
                or not alone
                or id(node) in biases
                or not (_is_affine(node) or role_of(node) == "same_grid")
            ):
                break
            chain.append(node)
            if _is_affine(node):
                found |= {id(node): reason for node in chain}
            tensor = next(source for source in node.inputs if not is_constant(source))
    return found


def _sample_scalers(graph: gs.Graph) -> dict[int, str]:
    """Nodes that bring the samples of an unlike input to one size, up to the first normalization; with the reason."""
    found: dict[int, str] = {}
    for tensor in graph.inputs:
        if tensor.name not in extras(graph).unlike:
            continue
        derived, ends = {id(tensor)}, list[gs.Node]()
        for node in graph.nodes:
            read = [source for source in node.inputs if source.name and not is_constant(source)]
            if read and all(id(source) in derived for source in read) and role_of(node) != "linear":
                if is_op(node, *_NORMALIZING) or (is_op(node, "Div") and len(read) == 2):
                    ends.append(node)
                else:
                    derived |= {id(value) for value in node.outputs}
        for node in ends:  # which grows to all that leads to them
            found[id(node)] = f"brings the samples of '{tensor.name}' to one size"
            ends += [maker for source in node.inputs for maker in source.inputs if id(maker) not in found]
    return found


class _Planner:
    """The state of one `make_plan` call: the graph's facts, and the plan as it grows in walk order."""

    def __init__(self, graph: gs.Graph, target: Target, rules: Rules, fronts: bool = True) -> None:
        self.graph, self.target, self.rules = graph, target, rules
        self.plan = Plan()
        self.layers = linear_layers(graph)
        self.outputs = {id(tensor) for tensor in graph.outputs}
        self.nodes = {id(node) for node in graph.nodes}
        kept = {id(n) for n in graph.nodes if _matches(rules.keep_float, n.name, n.op)}
        kept |= {id(layer.node) for layer in self.layers if _matches(rules.keep_float, layer.weight.name)}
        self.kept = kept
        self.region, self.front = _float_region(graph, kept, fronts)
        self.scalers = _sample_scalers(graph) | _column_scalers(graph)
        self.region = self.scalers | self.region
        self.masked: set[int] = set()  # values that hold the huge numbers of a mask
        for node in graph.nodes:
            moved = role_of(node) == "same_grid" and id(node.inputs[0]) in self.masked
            self.masked |= {id(tensor) for tensor in node.outputs if masks(node) or moved}
        self.bias_sums = {id(layer.node.outputs[0]) for layer in self.layers if layer.bias_node is not layer.node}

    def bits(self, default: int, *names: str) -> int:
        for pattern, bits in self.rules.bits.items():
            if _matches([pattern], *names):
                return bits
        return default

    def fused(self, tensor: gs.Tensor) -> bool:
        """Whether no quantizer may sit here: before a Relu/Clip that alone reads it, or before the bias of a MatMul.

        But for a Softmax, as runtimes drop a Clip that its grid implies: if it runs on integers, its own must reach far enough.
        """
        if id(tensor) in self.outputs or len(tensor.outputs) != 1:
            return False
        if id(tensor) in self.bias_sums:
            return True
        (consumer,) = tensor.outputs
        if id(consumer) not in self.nodes:  # inside a subgraph, where nothing is quantized
            return False
        clamps = role_of(consumer) == "clamp" and id(consumer) not in self.region
        if not clamps or not tensor.inputs or role_of(tensor.inputs[0]) not in ("linear", "arithmetic"):
            return False
        return not _shares(tensor.inputs[0]) or self.reason_to_stay_float(consumer.outputs[0]) is not None

    def reason_to_stay_float(self, tensor: gs.Tensor) -> str | None:
        """Why an activation gets no quantizer although it is float32, or None."""
        if _matches(self.rules.keep_float, tensor.name):
            return "kept float as asked"
        neighbours = list(tensor.inputs) + list(tensor.outputs)
        layers = [n for n in tensor.outputs if role_of(n) == "linear" and id(n) not in self.front | self.kept]
        if neighbours and all(id(node) in self.region for node in neighbours) and not layers:
            return self.region[id(neighbours[0])]
        asked = tensor.inputs and id(tensor.inputs[0]) in self.kept and role_of(tensor.inputs[0]) != "linear"
        if asked and tensor.outputs and not any(role_of(n) == "linear" for n in tensor.outputs):
            return "kept float as asked"  # else a runtime would take the node for one between integers
        if self.counts(tensor) and tensor.outputs and all(id(n) in self.region for n in tensor.outputs) and not layers:
            return self.region[id(tensor.outputs[0])]
        if id(tensor) in self.masked & self.outputs:
            return "a masked output: on one grid with the mask, its scores would be equal"
        if id(tensor) in self.outputs and tensor.name in extras(self.graph).uneven and not tensor.outputs:
            if tensor.shape and tensor.shape[-1] == 1:
                return "an output that varies little beside its size: on one grid with zero, that would be lost"
            return "an output whose columns differ in scale or lie far from zero: one grid would lose the small ones"
        if id(tensor) in self.outputs and tensor.name in extras(self.graph).unlike and not tensor.outputs:
            return "an output whose samples differ in size: one grid would lose the small ones"
        if any(_divides_by(reader, tensor) for reader in tensor.outputs):
            return "a divisor, which could be 0 on a grid"
        if any(_is_single(node) for node in _made_by(tensor)):
            return "a Softmax of single elements, which integer kernels compute as 0"
        if tensor.outputs and id(tensor) not in self.outputs and all(role_of(n) == "untouched" for n in tensor.outputs):
            return f"read by {tensor.outputs[0].op} only"
        return None

    def counts(self, tensor: gs.Tensor) -> bool:
        """Whether the value holds integers turned into floats, such as positions on their way to a Sin: 256 steps are few."""
        (producer,) = tensor.inputs or (None,)
        return producer is not None and role_of(producer) == "untouched" and not any(map(is_float, producer.inputs))

    def wide(self, tensor: gs.Tensor) -> bool:
        """Whether the value keeps `EDGE_BITS` however narrow other activations are.

        Network inputs, also where something brings them to one scale first, and outputs; what only a Softmax, ArgMax or the like
        reads (ties would decide); and a linear operator's output that only an Add reads: kernels fuse the two, and no narrow
        tensor lies between.
        """
        readers = tensor.outputs
        if not tensor.inputs or id(tensor) in self.outputs or id(tensor.inputs[0]) in self.scalers:
            return True
        if len(readers) == 1 and masks(readers[0]):
            return self.wide(readers[0].outputs[0])
        if readers and all(op_of(reader).squashes for reader in readers):
            return True
        return len(readers) == 1 and op_of(readers[0]).accumulates and role_of(tensor.inputs[0]) == "linear"

    def whole(self, tensor: gs.Tensor) -> bool:
        """Whether the value's extremes must not saturate: outputs, and what decides, with or without a mask between."""
        if id(tensor) in self.outputs or any(op_of(reader).decides for reader in tensor.outputs):
            return True
        return len(tensor.outputs) == 1 and masks(tensor.outputs[0]) and self.whole(tensor.outputs[0].outputs[0])

    def activation(self, tensor: gs.Tensor) -> None:
        if not is_float(tensor) or self.fused(tensor):
            return
        reason = self.reason_to_stay_float(tensor)
        if reason:
            self.plan.floats[tensor.name] = reason
            return
        producer = tensor.inputs[0] if tensor.inputs else None
        tied = None
        if producer is not None and _only_moves(producer) and producer.inputs[0].name in self.plan:
            tied = self.plan.root(producer.inputs[0].name).value
        whole = self.whole(tensor)
        if tied:
            self.plan[tied] = replace(self.plan[tied], whole_range=whole or self.plan[tied].whole_range)
            point = replace(self.plan[tied], value=tensor.name, role="activation", tied_to=tied, moved=True)
        else:
            bits = self.rules.act_bits
            bits = self.bits(max(EDGE_BITS, bits) if self.wide(tensor) else bits, tensor.name)
            # Shares of one must not saturate, or they no longer sum to it; with few steps small ones would be lost for that.
            shares = producer is not None and _shares(producer)
            whole = whole or (shares and bits >= EDGE_BITS)
            point = QuantPoint(
                tensor.name,
                Grid(bits, False),
                "activation",
                limits=_limits(producer),
                whole_range=whole,
                reach=_reach(producer) if producer is not None and shares else 0.0,
            )
        self.plan[tensor.name] = point

    def join(self, node: gs.Node) -> None:
        """Let what this Concat alone reads share its output's grid: one rounding instead of two. What is on one grid stays on it.

        A state that goes around shares it, too: else it would be rounded anew at every step.
        """
        output = node.outputs[0]
        if not op_of(node).joins or output.name not in self.plan or self.plan[output.name].tied_to:
            return
        grid = self.plan[output.name].grid
        roots = {tensor.name: self.plan.root(tensor.name) for tensor in node.inputs if tensor.name in self.plan}
        roots = {name: root for name, root in roots.items() if root.role == "activation" and root.grid == grid}
        every = all(tensor.name in roots for tensor in node.inputs)
        group = {root.value for root in roots.values()}
        if not every or len(group) > 1:
            joined = [t for t in node.inputs if t.name in roots and (self.is_read_once(t) or self.is_state(t))]
            group = {roots[tensor.name].value for tensor in joined}
        same = every and all(root.value in group for root in roots.values())
        if not group:
            return
        # The one computed first holds the parameters: the others are built after it.
        holder, *others = (value for value in self.plan if value in group)
        members = [self.plan[value] for value in (holder, *others)]
        lows, highs = zip(*(member.limits for member in members), strict=True)
        shared = replace(
            members[0],
            limits=(
                None if None in lows or not same else min(lows),
                None if None in highs or not same else max(highs),
            ),
            whole_range=any(member.whole_range for member in (*members, self.plan[output.name])),
            reach=max(member.reach for member in members),
        )
        for value, point in list(self.plan.items()):
            if value in (*others, output.name) or point.tied_to in group:
                moved = same if value == output.name else point.moved
                self.plan[value] = replace(shared, value=value, tied_to=holder, moved=moved)
            elif point.scale_from and point.scale_from[0] in others:
                self.plan[value] = replace(point, scale_from=(holder, point.scale_from[1]))
        self.plan[holder] = shared

    def is_read_once(self, tensor: gs.Tensor) -> bool:
        """Whether one operator alone reads a value, and each of those that it moves from."""
        while len(self.readers(tensor)) == 1 and id(tensor) not in self.outputs:
            if not self.plan[tensor.name].moved:
                return self.plan[tensor.name].tied_to is None
            (mover,) = tensor.inputs
            if len(mover.outputs) > 1 or not _only_moves(mover):
                return False
            tensor = mover.inputs[0]
        return False

    def is_state(self, tensor: gs.Tensor) -> bool:
        """Whether a value is, or moves from, an input that is only joined to others, to leave the network with them.

        Such as the keys and values of an attention's past, which may be those of all layers in one.
        """
        while self.plan[tensor.name].moved and _only_moves(tensor.inputs[0]):
            tensor = tensor.inputs[0].inputs[0]
        return not tensor.inputs and self.only_leaves(tensor)

    def only_leaves(self, tensor: gs.Tensor) -> bool:
        """Whether nothing reads a value, moved or not, but operators that join it to others to leave the network."""
        return id(tensor) not in self.outputs and all(
            id(reader) in self.nodes
            and id(reader) not in self.region
            and (
                id(reader.outputs[0]) in self.leaving
                if op_of(reader).joins
                else _only_moves(reader) and all(map(self.only_leaves, reader.outputs))
            )
            for reader in self.readers(tensor)
        )

    @cached_property
    def leaving(self) -> set[int]:
        """Values that are outputs of the network, moved or joined to others on their way or not."""
        found = set(self.outputs)
        for node in reversed(self.graph.nodes):
            if (_only_moves(node) or op_of(node).joins) and any(id(output) in found for output in node.outputs):
                found |= {id(tensor) for tensor in (node.inputs if op_of(node).joins else node.inputs[:1])}
        return found

    @staticmethod
    def readers(tensor: gs.Tensor) -> list[gs.Node]:
        """The nodes that read the elements of a value."""
        return [reader for reader in tensor.outputs if not is_op(reader, "Shape", "Size")]

    def constants(self, node: gs.Node) -> None:
        """Constant operands of elementwise operators that run on integers."""
        if not op_of(node).operands or id(node) in self.region:
            return
        read = [t for t in node.inputs if not is_constant(t) and is_float(t)]
        if read and not any(tensor.name in self.plan for tensor in read):
            return  # it runs in float
        biases = {layer.bias.name for layer in self.layers if layer.bias is not None and layer.bias_node is node}
        for tensor in node.inputs:
            if is_constant(tensor) and is_float(tensor) and tensor.name not in self.plan and tensor.name not in biases:
                if _matches(self.rules.keep_float, tensor.name):
                    self.plan.floats[tensor.name] = "kept float as asked"
                    continue
                bits = max(CONSTANT_BITS, self.bits(CONSTANT_BITS, tensor.name))
                self.plan[tensor.name] = QuantPoint(tensor.name, Grid(bits, False), "constant")

    def weight(self, layer: Layer) -> None:
        name = layer.weight.name
        if id(layer.node) in self.kept:
            self.plan.floats[name] = self.region[id(layer.node)]
        elif layer.source.name not in self.plan and layer.node.op in self.target.rounds_inputs:
            self.plan.floats[name] = "its input stays float, and with an integer weight the runtime would round it"
        elif name not in self.plan:
            bits = self.bits(self.rules.weight_bits, layer.node.name, name)
            taken = self.target.bits_of(layer.node.op)
            if bits not in taken:
                raise UsageError(
                    f"target '{self.target.name}' takes {_spell(taken)} bits for {layer.node.op}, not {bits} "
                    f"('{layer.node.name}')"
                )
            self.plan[name] = QuantPoint(name, Grid(bits, True, layer.axis), "weight")

    def bias(self, layer: Layer) -> None:
        if layer.bias is None:
            return
        name, source = layer.bias.name, layer.source.name
        kept = id(layer.node) in self.kept or id(layer.bias_node) in self.kept
        if kept or layer.weight.name not in self.plan:
            self.plan.floats[name] = "bias of a layer that is kept float"
        elif source not in self.plan:
            self.plan.floats[name] = f"the layer's input '{source}' is float"
        else:
            pair = (self.plan.root(source).value, layer.weight.name)
            axis = 0 if self.plan[layer.weight.name].grid.axis is not None else None
            self.plan[name] = QuantPoint(name, Grid(BIAS_BITS, True, axis), "bias", scale_from=pair)

    def run(self) -> Plan:
        weights = {id(layer.node): layer for layer in self.layers}
        biases = {id(layer.bias_node): layer for layer in self.layers}
        for tensor in self.graph.inputs:
            self.activation(tensor)
        for node in self.graph.nodes:
            if id(node) in weights:
                self.weight(weights[id(node)])
            if id(node) in biases:
                self.bias(biases[id(node)])
            self.constants(node)
            for tensor in node.outputs:
                self.activation(tensor)
            self.join(node)
        self.check_overrides()
        return self.plan

    def check_overrides(self) -> None:
        """Raise UsageError for bits of what has no quantizer to take them."""
        taking = {value for value, point in self.plan.items() if point.role != "bias"}
        taking |= {layer.node.name for layer in self.layers if layer.weight.name in self.plan}
        for pattern in self.rules.bits:
            if not any(fnmatchcase(name, pattern) for name in taking):
                raise UsageError(
                    f"the bit override '{pattern}' matches no layer and no tensor that is quantized; --dry-run lists them"
                )


def _is_single(node: gs.Node) -> bool:
    """Whether the node shares 1 out among the elements of an axis that has one: always 1, but 0 in ONNX Runtime's kernel."""
    op, shape = op_of(node), node.outputs[0].shape
    shares = op.decides and op.bounds == (0.0, 1.0)
    return shares and shape is not None and bool(shape) and shape[int(node.attrs.get("axis", -1))] == 1


def _made_by(tensor: gs.Tensor) -> list[gs.Node]:
    """What computes a value, and what is before operators that move or limit it, which a runtime may drop or swap with it."""
    nodes = list(tensor.inputs)
    passing = [node for node in nodes if role_of(node) in ("clamp", "same_grid")]
    return nodes + [maker for node in passing for maker in _made_by(node.inputs[0])]


def _only_moves(node: gs.Node) -> bool:
    """Whether every element of the output is one of input 0, or a zero that was padded in (zero is on every grid)."""
    others = [tensor for tensor in node.inputs[1:] if tensor.name and is_float(tensor)]
    fills = [tensor for tensor in others if not is_constant(tensor) or np.size(tensor.values) == 1]
    return role_of(node) == "same_grid" and all(_constant_scalar(fill) == 0 for fill in fills)


def _is_on_grid(tensor: gs.Tensor, plan: Plan) -> bool:
    """Whether what a value is made of lies on its grid already: its one source moves, or its sources join."""
    (node,) = tensor.inputs or (None,)
    if node is None or not (_only_moves(node) or op_of(node).joins):
        return False
    sources = [source.name for source in (node.inputs if op_of(node).joins else node.inputs[:1])]
    return all(name in plan and (plan[name].tied_to or name) == plan[tensor.name].tied_to for name in sources)


def _limits(producer: gs.Node | None) -> Limits:
    """What the producing operator guarantees about its output."""
    if producer is None:
        return None, None
    if is_op(producer, "Clip"):
        low, high = ((*producer.inputs[1:], None, None))[:2]
        return _constant_scalar(low), _constant_scalar(high)
    # Ranges seen say the same, but of a Relu that lets nothing pass; the runtime fuses it only with a grid from 0 on.
    if is_op(producer, "Relu"):
        return 0.0, None
    bounds = op_of(producer).bounds
    if bounds is None:
        return None, None
    return tuple(None if math.isinf(bound) else float(bound) for bound in bounds)  # type: ignore[return-value]


def _shares(node: gs.Node) -> bool:
    """Whether a node's results are shares of one along an axis."""
    return bool(op_of(node).decides and op_of(node).bounds == (0.0, 1.0))


def _reach(softmax: gs.Node, shape: Sequence[Any] | None = None) -> float:
    """What the grid of a Softmax's output must cover: twice the share that each of its elements has on average.

    ONNX Runtime's QLinearSoftmax counts in 32 bits; with steps below 1 / (148 elements) it wraps around (1.31). Where their
    number is open, nothing is known until samples show it (`reach_open`): `shape` is what the output has there.
    """
    shape = shape or softmax.outputs[0].shape
    size = shape[int(softmax.attrs.get("axis", -1))] if shape else None
    return min(1.0, 2 / size) if isinstance(size, int) and size > 0 else 0.0


def open_shares(graph: gs.Graph, plan: Plan) -> dict[str, gs.Node]:
    """Planned outputs of a Softmax whose number of elements the graph leaves open, with their nodes."""
    nodes = [node for node in graph.nodes if node.outputs and node.outputs[0].name in plan and _shares(node)]
    return {node.outputs[0].name: node for node in nodes if not _reach(node)}


def reach_open(graph: gs.Graph, plan: Plan, shapes: Mapping[str, Sequence[int]]) -> Plan:
    """The plan whose `open_shares` reach as far as the shapes of samples ask; what is tied to them follows."""
    asked: dict[str, float] = {}
    for value, node in open_shares(graph, plan).items():
        root = plan.root(value).value
        asked[root] = max(asked.get(root, plan[root].reach), _reach(node, shapes[value]))
    points = {
        value: replace(point, reach=asked.get(plan.root(value).value, point.reach)) for value, point in plan.items()
    }
    return Plan(points, plan.floats)


def _constant_scalar(tensor: gs.Tensor | None) -> float | None:
    if tensor is None or not is_constant(tensor):
        return None
    value = float(np.asarray(tensor.values).reshape(-1)[0])
    return None if abs(value) > 1e30 else value


def make_plan(graph: gs.Graph, target: Target, rules: Rules | None = None) -> Plan:
    """Decide where quantizers sit and how wide they are.

    Quantized: the network's inputs and outputs, all weights (per output channel, symmetric), biases (int32), and every
    activation, except between a linear or arithmetic operator and its Relu/Clip, and between operators that need float.
    Values that only move data share the grid of what they move. The network's inputs and outputs have at least 8 bits.

    Raises:
        UnsupportedOp: a node's operator is one that `op_of` does not know.
        UsageError: a width that the target cannot store, or a pattern that matches nothing.
        ModelError: nothing in the graph can be quantized.
    """
    rules = rules or Rules()
    check_ops(graph)
    check_rules(graph, target, rules)
    if not linear_layers(graph):
        inner = next((node for node in graph.nodes if any(map(_has_layers, node.subgraphs(recursive=True)))), None)
        why = "was it exported without its parameters?"
        foreign = sorted({node.op for node in graph.nodes if op_of(node).island or is_op(node, "Einsum")})
        if foreign:
            why = f"the work of {', '.join(foreign)} is left to ONNX Runtime, in float"
        if inner is not None:
            why = (
                f"those inside of {inner.op} '{inner.name}' stay as they are: export the part that you deploy by itself"
            )
        raise ModelError(
            "the model has no Conv, ConvTranspose, Gemm or MatMul with constant weights, so there is nothing to quantize; "
            + why
        )
    plan = _Planner(graph, target, rules).run()
    biases = [layer.bias for layer in linear_layers(graph) if layer.bias is not None]
    # A spectrogram adds one number, if any, before its logarithm: what has biases is a small network that looks like one.
    trained = any(bias.values.size and np.ptp(bias.values) > 0 for bias in biases)
    if trained and not rules.keep_float and all(point.role != "weight" for point in plan.values()):
        plan = _Planner(graph, target, rules, fronts=False).run()
    return plan


def _has_layers(graph: gs.Graph) -> bool:
    return any(node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul") for node in graph.nodes)


def check_rules(graph: gs.Graph, target: Target, rules: Rules) -> None:
    """Raise UsageError for widths the target cannot store and for patterns that match no node, op or value."""
    values = set(graph.tensors())
    nodes = {node.name for node in graph.nodes}
    layers = {layer.node.name for layer in linear_layers(graph)} | {layer.weight.name for layer in linear_layers(graph)}
    for bits, wanted, what in (
        (rules.weight_bits, target.weight_bits, "weights"),
        (rules.act_bits, target.activation_bits, "activations"),
    ):
        if bits not in wanted:
            raise UsageError(f"target '{target.name}' stores {what} of {_spell(wanted)} bits, not {bits}")
    biases = {layer.bias.name for layer in linear_layers(graph) if layer.bias is not None}
    beside = {tensor.name for tensor in graph.tensors().values() if is_constant(tensor)} - layers - biases
    for pattern, bits in rules.bits.items():
        names = [name for name in values | nodes if fnmatchcase(name, pattern)]
        if not names:
            raise UsageError(f"the bit override '{pattern}' matches no layer and no tensor of the model")
        wanted = target.weight_bits if any(name in layers for name in names) else target.activation_bits
        if bits not in wanted:
            raise UsageError(
                f"target '{target.name}' stores {_spell(wanted)} bits there, not {bits} (override '{pattern}')"
            )
        if bits < CONSTANT_BITS and beside.issuperset(names):
            raise UsageError(
                f"the bit override '{pattern}' names constants that are no layer's weights (tables, operands): they have "
                f"{CONSTANT_BITS} bits, as fewer would cost accuracy and save nothing"
            )
    for pattern in rules.keep_float:
        matched = {name for name in values | nodes | {node.op for node in graph.nodes} if fnmatchcase(name, pattern)}
        if not matched:
            raise UsageError(f"--keep-float '{pattern}' matches no layer, operator or tensor of the model")
        if matched <= biases:
            raise UsageError(f"--keep-float '{pattern}' names a bias, which follows its layer; name the layer")


def _spell(widths: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(widths)))


def explained(plan: Plan, usual: Plan) -> Plan:
    """A plan of the user's that says of all that the usual one quantizes, and it does not, that it stays float."""
    left = {name: UNPLANNED for name in usual if name not in plan}
    return Plan(plan, {name: reason for name, reason in {**left, **plan.floats}.items() if name not in plan})


def check_plan(graph: gs.Graph, target: Target, plan: Plan) -> None:
    """Raise UsageError when a plan (as edited by the user) does not fit the graph or the target."""
    tensors = graph.tensors()
    layers = {layer.weight.name: layer for layer in linear_layers(graph)}
    place = {item.value: index for index, item in enumerate(walk(graph, plan)) if isinstance(item, QuantPoint)}
    sources: dict[str, list[tuple[str, str]]] = {}  # of a bias: the values whose scales make its own
    for layer in linear_layers(graph):
        if layer.bias is not None and layer.source.name in plan:
            source = plan[layer.source.name]
            sources.setdefault(layer.bias.name, []).append((source.tied_to or source.value, layer.weight.name))
    for value, point in plan.items():
        stored = target.bits_of(layers[value].node.op) if value in layers else target.weight_bits
        allowed: Sequence[int] = {"weight": stored, "bias": (BIAS_BITS,)}.get(point.role, target.activation_bits)
        axis = layers[value].axis if point.role == "weight" and value in layers else 0 if point.role == "bias" else None
        problem = None
        if value not in tensors or value not in place:
            problem = "is no value of this model"
        elif point.role not in get_args(PointRole):
            problem = f"has the role '{point.role}', which is none of {', '.join(get_args(PointRole))}"
        elif point.grid.bits not in allowed:
            problem = f"has {point.grid.bits} bits, but target '{target.name}' takes {_spell(allowed)}"
        elif point.role == "weight" and value not in layers:
            problem = "is not the weight of a linear layer"
        elif (point.role == "activation") == is_constant(tensors[value]):
            problem = f"is {'a' if point.role == 'activation' else 'no'} constant, so it cannot be a {point.role}"
        elif point.grid.signed != (point.role in ("weight", "bias")):
            problem = f"cannot be {'signed' if point.grid.signed else 'unsigned'}, as it has the role '{point.role}'"
        elif point.grid.axis not in (None, axis):
            problem = f"has one scale per slice of axis {point.grid.axis}, but its axis can only be {axis}"
        elif (point.scale_from is None) == (point.role == "bias"):
            problem = "must have scale_from if it is a bias, and only then"
        elif any(name not in plan for name in (point.scale_from or ()) + ((point.tied_to,) if point.tied_to else ())):
            problem = f"needs {point.scale_from or point.tied_to}, which the plan leaves float"
        elif point.scale_from and (
            plan[point.scale_from[0]].role not in ("activation", "constant")
            or plan[point.scale_from[1]].role != "weight"
        ):
            problem = f"takes its scale from {point.scale_from}, which must be an activation and a weight"
        elif point.role == "bias" and value in sources and point.scale_from not in sources[value]:
            problem = f"takes its scale from {point.scale_from}, but its layer reads {sources[value][0]}"
        elif point.scale_from and point.grid.axis is None and plan[point.scale_from[1]].grid.axis is not None:
            problem = f"needs axis 0, as '{point.scale_from[1]}' has one scale per channel"
        elif point.tied_to and plan[point.tied_to].grid != point.grid:
            problem = f"is tied to '{point.tied_to}', whose grid differs"
        elif point.tied_to and (plan[point.tied_to].tied_to or place[point.tied_to] >= place[value]):
            problem = f"is tied to '{point.tied_to}', which is tied itself or comes later"
        elif point.moved and not point.tied_to:
            problem = "is moved, but tied to nothing"
        elif point.moved and not _is_on_grid(tensors[value], plan):
            problem = f"is moved, but is not made of what is on the grid of '{point.tied_to}' alone"
        if problem:
            raise UsageError(f"the plan does not fit the model: '{value}' {problem}")
    for layer in layers.values():
        quantized = layer.weight.name in plan and layer.source.name in plan
        if quantized and layer.bias is not None and layer.bias.name not in plan:
            raise UsageError(
                f"the plan does not fit the model: '{layer.bias.name}' is the bias of '{layer.node.name}', whose weight and "
                f"input are quantized; it must be in the plan too, or '{layer.weight.name}' must leave it"
            )


def walk(graph: gs.Graph, plan: Mapping[str, QuantPoint]) -> Iterator[gs.Node | QuantPoint]:
    """Yield nodes and quantizers in execution order: a value's quantizer right after what produces it.

    Constants are quantized before the first node that reads them. Every reader of a quantized value reads its quantized form.
    """
    done: set[str] = set()
    for tensor in graph.inputs:
        if tensor.name in plan:
            yield plan[tensor.name]
    for node in graph.nodes:
        for tensor in node.inputs:
            if is_constant(tensor) and tensor.name in plan and tensor.name not in done:
                done.add(tensor.name)
                yield plan[tensor.name]
        yield node
        for tensor in node.outputs:
            if tensor.name in plan:
                yield plan[tensor.name]
