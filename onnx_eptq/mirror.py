"""A PyTorch mirror of an ONNX graph, with fake quantizers where the plan puts them.

`build(graph, {})` is the float teacher; `build(graph, plan, qparams)` the quantized student. Both are `torch.fx` modules
made from the same `walk` that the writer reads: their code can be printed (`module.code`) and compiled.
"""

from __future__ import annotations

import copy
import functools
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor, fx, nn

from onnx_eptq import graph as graphs
from onnx_eptq import grid as grids
from onnx_eptq.columns import NOISE, column_axis
from onnx_eptq.data import no_batch_axis
from onnx_eptq.errors import ModelError
from onnx_eptq.grid import QParams, Quantized
from onnx_eptq.islands import Island
from onnx_eptq.ops import op_of
from onnx_eptq.plan import QuantPoint, walk


class Quantizer(nn.Module):
    """Fake-quantizes one value; `scale` and `zero_point` have shape [] or [channels]."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, point: QuantPoint, qparams: QParams) -> None:
        super().__init__()
        self.point = point
        self.register_buffer("scale", qparams.scale.clone())
        self.register_buffer("zero_point", qparams.zero_point.clone())

    @property
    def qparams(self) -> QParams:
        """The parameters in use."""
        return QParams(self.scale, self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid."""
        return grids.fake_quantize(x, self.qparams, self.point.grid)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"{self.point.value!r}, {self.point.grid}"


class BiasQuantizer(nn.Module):
    """Puts a bias on the int32 grid whose scale is the product of its layer's input scale and weight scale."""

    def __init__(self, point: QuantPoint) -> None:
        super().__init__()
        self.point = point

    def forward(self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        """Return the bias on its grid."""
        return grids.fake_quantize_bias(bias, input_scale * weight_scale, self.point.grid)


class Mirror(fx.GraphModule):
    """The traced module. Inputs are positional in the graph's order, outputs a tuple in the graph's order.

    Where inputs have no batch axis in common (`feeds_whole`), each comes with an axis of size 1 in front of its own.

    `node.meta["value"]` names the ONNX value that an fx node holds in its final (quantized, if planned) form;
    `node.meta["onnx"]` the ONNX node it computes.
    """

    quantizers: dict[str, str]  # value -> submodule name
    constants: dict[str, str]  # value -> parameter or buffer name
    input_names: list[str]
    output_names: list[str]
    uneven: list[str]  # outputs whose columns differ in scale
    whole: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> Mirror:
        """An independent copy; fx alone would forget the tables above."""
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, Mirror)
        for table in ("quantizers", "constants", "input_names", "output_names", "uneven", "whole"):
            setattr(twin, table, copy.deepcopy(getattr(self, table)))
        return twin

    def quantizer(self, value: str) -> nn.Module:
        """The quantizer of a value: a `Quantizer`, a `BiasQuantizer`, or one that learns in its place."""
        return self.get_submodule(self.quantizers[value])

    def replace(self, value: str, quantizer: nn.Module) -> None:
        """Put another quantizer on a value; all that is tied to it follows."""
        setattr(self, self.quantizers[value], quantizer)

    def scale(self, value: str) -> Tensor:
        """The scale of an activation, a constant operand or a weight."""
        scale = self.quantizer(value).scale
        assert isinstance(scale, Tensor)
        return scale

    def constant(self, value: str) -> Tensor:
        """The parameter or buffer that holds a constant."""
        tensor = getattr(self, self.constants[value])
        assert isinstance(tensor, Tensor)
        return tensor

    def qparams_of(self, point: QuantPoint) -> QParams:
        """Scale and zero point of any planned value, biases included."""
        if point.scale_from is None:
            qparams = self.quantizer(point.tied_to or point.value).qparams
            assert isinstance(qparams, QParams)
            return qparams
        source, weight = (self.scale(name) for name in point.scale_from)
        scale = source * weight
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32))

    def export(self, plan: Mapping[str, QuantPoint]) -> dict[str, Quantized]:
        """Integers of constants and parameters of every planned value: all that the writer needs."""
        written = {}
        for value, point in plan.items():
            qparams = QParams(*(tensor.detach().cpu() for tensor in self.qparams_of(point)))
            constant = point.role != "activation"
            codes = grids.quantize(self.constant(value).detach().cpu(), qparams, point.grid) if constant else None
            written[value] = Quantized(codes, qparams, point.grid)
        return written


@functools.cache
def _own_names() -> frozenset[str]:
    """Names that a mirror has attributes of its own under, whatever it is built from."""
    return frozenset({"self", *dir(Mirror(nn.Module(), fx.Graph())), *Mirror.__annotations__, *dir(nn.Module)})


def _identifier(name: str, taken: set[str]) -> str:
    """A Python identifier that resembles an ONNX name."""
    stem = re.sub(r"\W", "_", name).strip("_") or "value"
    stem = f"v_{stem}" if stem[0].isdigit() or keyword.iskeyword(stem) or stem in _own_names() else stem
    return graphs.fresh(stem, taken)


class _Builder:
    """Turns the items of a walk into an fx graph over a root module."""

    def __init__(self, graph: gs.Graph, plan: Mapping[str, QuantPoint], qparams: Mapping[str, QParams]) -> None:
        self.source, self.plan, self.qparams = graph, plan, qparams
        self.tensors = graph.tensors()
        self.root, self.graph = nn.Module(), fx.Graph()
        self.taken: set[str] = set()
        self.env: dict[str, fx.Node] = {}
        self.quantizers: dict[str, str] = {}
        self.constants: dict[str, str] = {}

    def constant(self, tensor: gs.Constant) -> fx.Node:
        """A float constant becomes a parameter, any other a buffer; each only once however many nodes read it."""
        if tensor.name not in self.env:
            data = torch.from_numpy(np.array(tensor.values))
            name = _identifier(tensor.name, self.taken)
            if data.dtype == torch.float32:
                self.root.register_parameter(name, nn.Parameter(data, requires_grad=False))
            else:
                self.root.register_buffer(name, data)
            self.constants[tensor.name] = name
            self.put(tensor.name, self.graph.get_attr(name))
        return self.env[tensor.name]

    def put(self, value: str, node: fx.Node) -> None:
        node.meta["value"] = value
        self.env[value] = node

    def argument(self, tensor: gs.Tensor, static: bool) -> Any:
        if tensor.is_empty():
            return None
        if isinstance(tensor, gs.Constant):
            return _python(tensor.values) if static else self.constant(tensor)
        return self.env[tensor.name]

    def attribute(self, name: str, value: Any) -> Any:
        """Attributes are plain data; tensors among them become buffers, since code cannot spell them."""
        if isinstance(value, gs.Constant | np.ndarray):
            data = np.array(value.values if isinstance(value, gs.Constant) else value)
            unique = _identifier(name, self.taken)
            self.root.register_buffer(unique, torch.from_numpy(data))
            return self.graph.get_attr(unique)
        return tuple(value) if isinstance(value, list) else value

    def island(self, node: gs.Node) -> fx.Node:
        """A node that ONNX Runtime computes, with what its subgraphs capture; its outputs come as a tuple."""
        name = _identifier(node.name or node.op, self.taken)
        self.root.add_module(name, Island(node, self.source))
        return self.graph.call_module(name, tuple(self.env[tensor.name] for tensor in graphs.variables_read(node)))

    def node(self, node: gs.Node) -> None:
        op = op_of(node)
        if op.island:
            self.outputs(node, self.island(node), [t for t in node.outputs if not t.is_empty()])
            return
        args = [self.argument(tensor, index in op.static) for index, tensor in enumerate(node.inputs)]
        while args and args[-1] is None:
            args.pop()
        kwargs = {name: self.attribute(f"{node.name}_{name}", value) for name, value in node.attrs.items()}
        if op.n_outputs:
            kwargs["n_outputs"] = len(node.outputs)
        result = self.graph.call_function(op.function, tuple(args), kwargs)
        if len(node.outputs) == 1:
            result.meta["onnx"] = node.name
            self.put(node.outputs[0].name, result)
        else:
            self.outputs(node, result, node.outputs)

    def outputs(self, node: gs.Node, result: fx.Node, tensors: Sequence[gs.Tensor]) -> None:
        """Take the outputs out of the tuple that holds them."""
        result.meta["onnx"] = node.name
        for index, tensor in enumerate(tensors):
            if not tensor.is_empty():
                item = self.graph.call_function(_item, (result, index))
                item.meta["onnx"] = node.name
                self.put(tensor.name, item)

    def quantizer(self, point: QuantPoint) -> None:
        if point.moved:  # already on the grid it shares: quantizing again would change nothing
            return
        if point.role != "activation":
            self.constant(self.tensors[point.value])
        before = self.env[point.value]
        if point.tied_to:
            self.put(point.value, self.graph.call_module(self.quantizers[point.tied_to], (before,)))
            before.meta.pop("value")
            return
        name = _identifier(f"q_{point.value}", self.taken)
        args: tuple[fx.Node, ...] = (before,)
        if point.scale_from:
            scales = [self.graph.get_attr(f"{self.quantizers[value]}.scale") for value in point.scale_from]
            args = (before, *scales)
        module = BiasQuantizer(point) if point.scale_from else Quantizer(point, self.qparams[point.value])
        self.root.add_module(name, module)
        self.quantizers[point.value] = name
        after = self.graph.call_module(name, args)
        before.meta.pop("value")
        self.put(point.value, after)

    def build(self) -> Mirror:
        whole = feeds_whole(self.source)
        for tensor in self.source.inputs:
            place = self.graph.placeholder(_identifier(tensor.name, self.taken))
            self.put(tensor.name, self.graph.call_function(_alone, (place,)) if whole else place)
        for item in walk(self.source, self.plan):
            if isinstance(item, QuantPoint):
                self.quantizer(item)
            else:
                self.node(item)
        self.graph.output(tuple(self.output(tensor) for tensor in self.source.outputs))
        mirror = Mirror(self.root, self.graph, class_name="Mirror")
        mirror.quantizers, mirror.constants = self.quantizers, self.constants
        mirror.input_names = [tensor.name for tensor in self.source.inputs]
        mirror.output_names = [tensor.name for tensor in self.source.outputs]
        mirror.uneven = [name for name in graphs.extras(self.source).uneven if name in mirror.output_names]
        mirror.whole = whole
        return mirror

    def output(self, tensor: gs.Tensor) -> fx.Node:
        return self.constant(tensor) if isinstance(tensor, gs.Constant) else self.env[tensor.name]


def feeds_whole(graph: gs.Graph) -> bool:
    """Whether one sample is all that the model takes in a run: its inputs have no batch axis in common, or it is marked so."""
    return graphs.extras(graph).feeds_whole or no_batch_axis(tensor.shape or () for tensor in graph.inputs)


def _alone(samples: Tensor) -> Tensor:
    """The one sample that a model without a batch axis is fed."""
    if len(samples) != 1:
        raise ValueError(f"a model without a batch axis takes one sample at a time, not {len(samples)}")
    return samples[0]


def _item(values: Sequence[Tensor], index: int) -> Tensor:
    """One output of a node that has several."""
    return values[index]


def _python(values: np.ndarray) -> Any:
    """A constant as plain Python data: a scalar, or nested tuples."""

    def freeze(data: Any) -> Any:
        return tuple(freeze(item) for item in data) if isinstance(data, list) else data

    return freeze(np.asarray(values).tolist())


def build(
    graph: gs.Graph, plan: Mapping[str, QuantPoint] | None = None, qparams: Mapping[str, QParams] | None = None
) -> Mirror:
    """Return the mirror of `graph` with a fake quantizer at every point of `plan`.

    Args:
        graph: a prepared graph (opset 21) whose operators `op_of` knows all.
        plan: quantizers by value; empty gives the float model.
        qparams: scale and zero point of every planned value that is neither tied nor a bias.
    """
    return _Builder(graph, plan or {}, qparams or {}).build()


@torch.no_grad()
def same_on_batches(fixed: Mirror, free: Mirror, batches: Sequence[Sequence[Tensor]]) -> bool:
    """Whether `free`, built of a `free_batch` graph, computes of all batches at once what `fixed` computes of each."""
    together = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    try:
        found = free(*together)
    except (RuntimeError, IndexError, ValueError, ModelError):  # the last one comes of an island
        return False
    each = list(zip(*(fixed(*batch) for batch in batches), strict=True))
    if any(part.ndim == 0 or part.shape[1:] != parts[0].shape[1:] for parts in each for part in parts):
        return False  # one number, whatever the batch, or what is selected of each sample
    expected = [torch.cat(parts) for parts in each]
    return all(same_values(a, b) for a, b in zip(found, expected, strict=True))


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by no more than what float rounding in another order explains."""
    if a.shape != b.shape or not b.numel():
        return a.shape == b.shape
    a, b = a.float(), b.float()  # of truth values, too
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max() + 1e-9))


class Probe(fx.Interpreter):
    """Runs a mirror and hands every value, under its ONNX name, to a callback that may replace it.

    The callback gets (value name, tensor in its final form) and returns the tensor to go on with.
    """

    def __init__(self, mirror: Mirror, callback: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__(mirror, garbage_collect_values=True)
        self.extra_traceback = False  # fx would append its own words to errors meant for users
        self.callback = callback

    def run_node(self, n: fx.Node) -> Any:
        """Compute one node, then let the callback see the value it holds."""
        result = super().run_node(n)
        value = n.meta.get("value")
        return result if value is None or n.op == "get_attr" else self.callback(value, result)


def column_factors(mirror: Mirror, names: Sequence[str], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """By the name of each output whose columns differ in scale: what brings every one of them to a standard deviation of 1."""
    found = {}
    for name, value in zip(names, values, strict=True):
        if name in mirror.uneven:
            axis = column_axis(value.shape)
            others = tuple(i for i in range(value.ndim) if i != axis)
            x = value.double()
            spread = (x - x.mean(others, keepdim=True)).square().mean(others, keepdim=True).sqrt()
            least = NOISE * x.abs().amax(others, keepdim=True)  # of a column that does not vary
            found[name] = (1 / torch.maximum(spread, least).clamp(min=1e-30)).to(value)
    return found
