"""Pass: normalizations that exporters write in pieces become LayerNormalization or InstanceNormalization."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_eptq.graph import array, is_op
from onnx_eptq.prepare.edit import (
    Array,
    axes_of,
    const_at,
    constant_operand,
    ints_at,
    mutate,
    new_constant,
    new_node,
    output_ids,
    producer,
    rank_of,
)
from onnx_eptq.prepare.patterns import SCALAR_FUNCTIONS

_LINEAR = ("Add", "Sub", "Mul", "Div", "Neg", "Identity")  # of which affine functions are made
_ELEMENTWISE: dict[str, Callable[..., Array]] = {
    **{op: SCALAR_FUNCTIONS[op] for op in (*_LINEAR, "Pow", "Max", "Relu")},
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
}
_BEHIND = (*_LINEAR, "Reciprocal")  # behind a root; a bend there could lie where no probe reaches
_MEANS = ("ReduceMean", "ReduceSum", "GlobalAveragePool")
_SHAPING = ("Reshape", "Squeeze", "Unsqueeze")  # around means that do not keep their axes
_REACH = 12  # nodes from the means to the root, and from the root to the end
_ROWS = 16  # samples of every coefficient that is fitted, at least
_SHORT = 8  # elements of an axis that nothing fixes
_LARGEST = 2**22  # elements of a probe; a larger one would take seconds


@dataclass
class _Fit:
    """An elementwise gamma * normalized + beta, over some axes of the source."""

    axes: list[int]
    epsilon: float
    gamma: Array
    beta: Array

    @property
    def others(self) -> list[int]:
        """The axes that are not averaged over."""
        return [axis for axis in range(self.gamma.ndim) if axis not in self.axes]

    @property
    def kind(self) -> str:
        """What operator takes this gamma and beta: they vary within what is normalized, by channel, or in both."""
        varying = [axis for axis, size in enumerate(self.gamma.shape) if size > 1]
        if not set(varying) & set(self.others):
            return "layer"
        return "instance" if varying == self.others[1:] else "both"

    def leads_to(self, other: "_Fit") -> bool:
        """Whether an operator that ends in the other is as good."""
        even = float(np.ptp(self.gamma)) == float(np.ptp(self.beta)) == 0
        return other.kind == self.kind or (even and other.kind == "instance")


def fuse_normalizations(graph: gs.Graph) -> int:
    """Replace nodes that normalize with gamma and beta over the same axes (layer), or over all but channels or groups.

    They are recognised by the values they compute, so that every exporter's order of operations is found: the end of the
    nodes behind a root must be an affine function of the normalized source.
    """
    changes = 0
    kept = output_ids(graph)
    for root in [node for node in graph.nodes if _is_root(node)]:
        before = _before(root)
        for source, axes, epsilon in _sources(root, before):
            ends = list(_ends(root, before, source, axes, epsilon, kept))
            for end, fit in ends:
                changes += _replace(graph, end, source, fit)
            if ends:
                break
    return changes


def _is_root(node: gs.Node) -> bool:
    exponent = const_at(node, 1) if is_op(node, "Pow") else None
    return is_op(node, "Sqrt") or (
        exponent is not None and exponent.size == 1 and abs(float(exponent.reshape(()))) == 0.5
    )


def _before(root: gs.Node) -> list[gs.Node]:
    """The root and what may compute the variance under it."""
    nodes = [root]
    for node in nodes:
        for tensor in node.inputs:
            maker = producer(tensor, *_ELEMENTWISE, *_MEANS, *_SHAPING)
            if maker is not None and len(nodes) < _REACH and all(maker is not n for n in nodes):
                nodes.append(maker)
    return nodes


def _sources(root: gs.Node, before: list[gs.Node]) -> Iterator[tuple[gs.Variable, list[int], float]]:
    """Yield what the variance under the root may be of: what is averaged on the way, over which axes, and the epsilon."""
    added = producer(root.inputs[0], "Add")
    operand = None if added is None else constant_operand(added)
    if operand is None or operand[1].size != 1:
        return
    epsilon = float(operand[1].reshape(()))
    seen: set[int] = set()
    for node in before:
        axes = _reduced(node)
        if axes and isinstance(node.inputs[0], gs.Variable) and id(node.inputs[0]) not in seen:
            seen.add(id(node.inputs[0]))
            yield node.inputs[0], axes, epsilon


def _reduced(node: gs.Node) -> list[int] | None:
    """The axes that a node averages over, None for any other node."""
    rank = rank_of(node.inputs[0]) if is_op(node, *_MEANS) else None
    if rank is None:
        return None
    if node.op == "GlobalAveragePool":
        return list(range(2, rank))
    axes = axes_of(node, 1, rank, ()) if "axes" not in node.attrs else [axis % rank for axis in node.attrs["axes"]]
    return None if axes is None else sorted(axes)


def _ends(
    root: gs.Node, before: list[gs.Node], source: gs.Variable, axes: list[int], epsilon: float, kept: set[int]
) -> Iterator[tuple[gs.Node, _Fit]]:
    """Yield the nodes that end a normalization by the root, each as late as only one node reads on."""
    nodes = [root]
    for node in nodes:
        readers = [n for tensor in node.outputs for n in tensor.outputs if is_op(n, *_BEHIND)]
        nodes += [n for n in readers if len(nodes) < _REACH and all(n is not m for m in nodes)]
    compared = _Comparison(source, axes, epsilon, before, nodes)
    taken: set[int] = set()
    for node in nodes:
        behind = any(id(maker) in taken for tensor in node.inputs for maker in tensor.inputs)
        fit = compared.fit(node) if id(node) not in taken and not behind else None
        while fit is not None:
            taken.add(id(node))
            readers = node.outputs[0].outputs
            onward = readers[0] if len(readers) == 1 and id(node.outputs[0]) not in kept else None
            longer = compared.fit(onward) if onward is not None and any(onward is n for n in nodes) else None
            if onward is None or longer is None or not fit.leads_to(longer):
                yield node, fit
                break
            node, fit = onward, longer


class _Comparison:
    """Values of nodes behind a root on random sources, beside the normalized sources."""

    def __init__(
        self, source: gs.Variable, axes: list[int], epsilon: float, before: list[gs.Node], behind: list[gs.Node]
    ) -> None:
        self.source, self.axes, self.epsilon = source, axes, epsilon
        self.allowed = {id(node) for node in before} | {id(node) for node in behind}
        self.shape = list(source.shape or [])
        self.affine = [1] * len(self.shape)  # sizes of what may scale and shift, broadcast
        for tensor in (t for n in behind for t in n.inputs):
            values = array(tensor)
            if values is not None and values.ndim <= len(self.shape):
                with contextlib.suppress(ValueError):  # of a node that is no part of the normalization
                    found = list(np.broadcast_shapes(self.affine, values.shape))
                    pairs = zip(found, self.shape, strict=True)
                    if all(size in (1, whole) or not isinstance(whole, int) for size, whole in pairs):
                        self.affine = found
        self.counts = any(is_op(node, "ReduceSum") for node in before)  # whose divisor is a number
        self.probes: list[Array] = []
        self.known: list[dict[int, Array | None]] = []

    def _draw(self, short: bool) -> None:
        """Draw the probes; axes can be short where no constant and no shape fixes them."""
        sizes = []
        for axis, size in enumerate(self.shape):
            if self.affine[axis] > 1:
                sizes.append(self.affine[axis])
            elif short or not isinstance(size, int):
                sizes.append(
                    min(size, _SHORT) if isinstance(size, int) and size > 1 else 3 if axis not in self.axes else _SHORT
                )
            else:
                sizes.append(size)
        rows = math.prod(size for size, fitted in zip(sizes, self.affine, strict=True) if fitted == 1)
        count = 3 * max(1, -(-_ROWS // (3 * max(rows, 1))))
        self.probes = []
        if 0 < math.prod(sizes) * count <= _LARGEST:
            rng = np.random.default_rng(0)  # of unlike sizes, down to where another epsilon shows
            scales = (1.0, 0.03, math.sqrt(abs(self.epsilon)) or 1e-3)
            self.probes = [scales[i % 3] * (rng.standard_normal(sizes) + 0.1) for i in range(count)]
        self.known = [{id(self.source): probe} for probe in self.probes]

    def fit(self, node: gs.Node) -> _Fit | None:
        """What the node's value is as an affine function of the normalized source, None if it is none."""
        if rank_of(node.outputs[0]) not in (None, len(self.shape)):
            return None
        for short in (True, False):
            self._draw(short)
            values = self._values(node.outputs[0])
            found = self._fitted(values) if values else None
            if found is not None or (values is not None and not self.counts):
                return found
        return None

    def _fitted(self, values: list[Array]) -> _Fit | None:
        over = (0, *(axis + 1 for axis, size in enumerate(self.affine) if size == 1))
        with np.errstate(all="ignore"):
            y, n = np.stack(values), np.stack([self._normalized(probe) for probe in self.probes])
            spread = n - n.mean(over, keepdims=True)
            gamma = (spread * y).mean(over, keepdims=True) / np.square(spread).mean(over, keepdims=True)
            beta = y.mean(over, keepdims=True) - gamma * n.mean(over, keepdims=True)
            fits = np.abs(gamma * n + beta - y) <= 1e-6 * np.abs(gamma) + 1e-12 * np.abs(y)
            gamma, beta = gamma[0].astype(np.float32), beta[0].astype(np.float32)
        if not (fits.all() and np.isfinite(gamma).all() and np.isfinite(beta).all() and gamma.any()):
            return None
        for axis in set(range(gamma.ndim)) - set(self.axes):  # of constants that other nodes behind the root add
            first = gamma.take([0], axis), beta.take([0], axis)
            if np.allclose(gamma, first[0], rtol=1e-6) and np.allclose(beta, first[1], rtol=1e-6, atol=1e-6):
                gamma, beta = first
        return _Fit(self.axes, self.epsilon, gamma, beta)

    def _values(self, tensor: gs.Tensor) -> list[Array] | None:
        found = []
        for probe, known in zip(self.probes, self.known, strict=True):
            with np.errstate(all="ignore"):
                values = _evaluate(tensor, known, self.allowed)
            if values is None or values.shape != probe.shape:
                return None
            found.append(values)
        return found or None

    def _normalized(self, x: Array) -> Array:
        axes = tuple(self.axes)
        return np.asarray((x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + self.epsilon))


def _evaluate(
    tensor: gs.Tensor, known: dict[int, Array | None], allowed: set[int], depth: int = 4 * _REACH
) -> Array | None:
    """Return the tensor's values from the known ones, None if they depend on anything but allowed nodes."""
    if id(tensor) not in known:
        values = array(tensor)
        if values is not None:
            known[id(tensor)] = values.astype(np.float64)
        else:
            known[id(tensor)] = None
            node = producer(tensor, *_ELEMENTWISE, *_MEANS, *_SHAPING) if depth else None
            if node is not None and (id(node) in allowed or node.op in (*_BEHIND, *_MEANS, *_SHAPING)):
                known[id(tensor)] = _computed(node, known, allowed, depth - 1)
    return known[id(tensor)]


def _computed(node: gs.Node, known: dict[int, Array | None], allowed: set[int], depth: int) -> Array | None:
    count = len(node.inputs) if node.op in _ELEMENTWISE else 1
    inputs = [_evaluate(tensor, known, allowed, depth) for tensor in node.inputs[:count]]
    if any(x is None for x in inputs) or (isinstance(node.inputs[0], gs.Constant) and count == 1):
        return None
    if node.op == "Max" and not _floors_at_zero(node):
        return None
    try:
        if node.op in _ELEMENTWISE:
            return np.asarray(_ELEMENTWISE[node.op](*inputs))
        return _reduce(node, inputs[0]) if node.op in _MEANS else _shape(node, inputs[0])
    except (TypeError, ValueError):  # sizes that do not fit
        return None


def _floors_at_zero(node: gs.Node) -> bool:
    """Whether a Max changes no variance: that is not below 0 but by rounding."""
    operand = constant_operand(node) if len(node.inputs) == 2 else None
    return operand is not None and bool((operand[1] <= 0).all())


def _reduce(node: gs.Node, x: Any) -> Array | None:
    axes = _reduced(node)
    if not axes:
        return None
    keepdims = bool(node.attrs.get("keepdims", 1)) or node.op == "GlobalAveragePool"
    function = np.sum if node.op == "ReduceSum" else np.mean
    return np.asarray(function(x, axis=tuple(axes), keepdims=keepdims))


def _shape(node: gs.Node, x: Any) -> Array | None:
    sizes = ints_at(node, 1, "axes")
    if sizes is None:
        return None
    if node.op == "Unsqueeze":
        return np.asarray(np.expand_dims(x, tuple(sizes)))
    if node.op == "Squeeze":
        return np.asarray(np.squeeze(x, tuple(sizes)))
    if 0 in sizes and not node.attrs.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return np.asarray(np.reshape(x, sizes))


def _replace(graph: gs.Graph, end: gs.Node, source: gs.Variable, fit: _Fit) -> bool:
    """Turn the end into the operator that the fit is, on a transposed source where that is needed; False if there is none."""
    shape, others = list(source.shape or []), fit.others
    order = [*others, *fit.axes]
    inner = [shape[axis] if isinstance(shape[axis], int) else fit.gamma.shape[axis] for axis in fit.axes]
    channels = shape[others[1]] if len(others) == 2 else None
    if 0 in fit.axes or (fit.kind == "layer" and math.prod(inner) == 1):
        return False  # an open axis of which nothing tells the size; one element alone would be nothing but 0
    if fit.kind != "layer" and not isinstance(channels, int):
        return False
    moved = order != list(range(len(order)))
    given: gs.Tensor = new_node(graph, "Transpose", [source], end, {"perm": order}) if moved else source
    attributes: dict[str, Any] = {"epsilon": fit.epsilon}
    if fit.kind == "layer":
        op, attributes["axis"], sizes = "LayerNormalization", -len(fit.axes), inner
        parts = [values.reshape([values.shape[axis] for axis in fit.axes]) for values in (fit.gamma, fit.beta)]
        parts = parts if parts[1].any() else parts[:1]
    else:
        op, sizes = "InstanceNormalization", [channels]
        parts = [np.ones(1), np.zeros(1)] if fit.kind == "both" else [fit.gamma.reshape(-1), fit.beta.reshape(-1)]
    parts = [np.array(np.broadcast_to(values, sizes), np.float32) for values in parts]
    inputs = [given, *(new_constant(graph, end.name, values) for values in parts)]
    if not moved and fit.kind != "both":
        mutate(end, op, inputs, attributes)
        return True
    found = new_node(graph, op, inputs, end, attributes)
    back = {"perm": [order.index(axis) for axis in range(len(order))]}
    if fit.kind != "both":
        mutate(end, "Transpose", [found], back)
        return True
    found = new_node(graph, "Transpose", [found], end, back) if moved else found
    scaled = new_node(graph, "Mul", [found, new_constant(graph, end.name, fit.gamma)], end)
    mutate(end, "Add", [scaled, new_constant(graph, end.name, fit.beta)], {})
    return True
