"""Passes: activations and normalisations that exporters write in pieces become the operators they are."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_eptq.graph import array, is_op
from onnx_eptq.prepare.edit import (
    Array,
    axes_of,
    const_at,
    constant_operand,
    mutate,
    new_constant,
    producer,
    rank_of,
    same_dims,
)

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
            mutate(node, found[0], [found[2]], found[1])
            changes += 1
    return changes


def _scalar_cone(node: gs.Node, limit: int = 12) -> list[gs.Node]:
    """Return the node and those before it, nearest first, that compute one number from numbers."""
    cone = [node]
    for current in cone:
        for tensor in current.inputs:
            maker = producer(tensor, *_SCALAR_FUNCTIONS)
            if maker is not None and len(cone) < limit and all(maker is not n for n in cone):
                cone.append(maker)
    return cone


def _recognise(node: gs.Node, source: gs.Tensor) -> tuple[str, dict[str, Any], gs.Tensor] | None:
    if not isinstance(source, gs.Variable) or not same_dims(source, node.outputs[0], 0):
        return None
    numbers: list[Array] = []
    with np.errstate(all="ignore"):
        values = _on_grid(node.outputs[0], source, 12, numbers)
        halves = all(np.float16(number) == number for number in numbers)
    if values is None:
        return None
    # float16 rounded what its constants were; tanh and erf make Gelus that lie 5e-4 apart
    exact, rounded = (1e-6, 2e-6), (1e-3, 2e-4)
    for rtol, atol in (exact, rounded) if halves else (exact,):
        for op, attrs, expected in _ACTIVATIONS:
            if np.allclose(values, expected, rtol=rtol, atol=atol):
                return op, attrs, source
    return None


def _on_grid(tensor: gs.Tensor, source: gs.Tensor, depth: int, numbers: list[Array]) -> Array | None:
    """Return the tensor's values where `source` holds the grid, or None if they depend on anything else.

    The constants in them are added to `numbers`.
    """
    if tensor is source:
        return _GRID
    values = array(tensor)
    if values is not None:
        if values.size != 1:
            return None
        numbers.append(values.astype(np.float64).reshape(()))
        return numbers[-1]
    node = producer(tensor, *_SCALAR_FUNCTIONS) if depth else None
    if node is None or any(not t.name for t in node.inputs):
        return None
    inputs = [_on_grid(t, source, depth - 1, numbers) for t in node.inputs]
    if any(i is None for i in inputs):
        return None
    return np.asarray(_SCALAR_FUNCTIONS[node.op](*inputs, **node.attrs))


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
                    *(new_constant(graph, end.name, np.array(v)) for v in (gamma, beta) if v is not None),
                ]
                mutate(end, "LayerNormalization", inputs, {"axis": -1, "epsilon": epsilon})
                changes += 1
                break
    return changes


def _normalized(root: gs.Node) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor, float] | None:
    """Return input, mean, input - mean and epsilon if the node computes the standard deviation over the last axis."""
    added = producer(root.inputs[0], "Add")
    operand = None if added is None else constant_operand(added)
    variance = None if operand is None or operand[1].size != 1 else _mean_input(operand[0])
    square = producer(variance, "Mul", "Pow")
    if square is None or operand is None:
        return None
    exponent = const_at(square, 1)
    squares = square.inputs[0] is square.inputs[1] if square.op == "Mul" else (exponent is not None and exponent == 2)
    difference = producer(square.inputs[0], "Sub")
    if not squares or difference is None or _mean_input(difference.inputs[1]) is not difference.inputs[0]:
        return None
    return difference.inputs[0], difference.inputs[1], square.inputs[0], float(operand[1].reshape(-1)[0])


def _mean_input(tensor: gs.Tensor) -> gs.Tensor | None:
    """Return what the tensor is the mean of over the last axis (kept as size 1), or None."""
    node = producer(tensor, "ReduceMean", "GlobalAveragePool")
    rank = None if node is None else rank_of(node.inputs[0])
    if node is None or rank is None:
        return None
    if node.op == "GlobalAveragePool":
        return node.inputs[0] if rank == 3 else None
    last = node.attrs.get("keepdims", 1) and axes_of(node, 1, rank, ()) == [rank - 1]
    return node.inputs[0] if last else None


def _ends(
    root: gs.Node, source: gs.Tensor, mean: gs.Tensor, centred: gs.Tensor
) -> list[tuple[gs.Node, Array, Array | None]]:
    """Return the nodes that end the normalization, each with gamma and beta."""
    inverse = next((n for n in root.outputs[0].outputs if is_op(n, "Reciprocal")), None)
    found: list[tuple[gs.Node, Array, Array | None]] = []
    if inverse is not None:
        for scaled in inverse.outputs[0].outputs:
            operand = constant_operand(scaled) if is_op(scaled, "Mul") else None
            if operand is not None:
                found += _tensorflow_end(scaled.outputs[0], operand[1], source, mean)
    divisor = root if inverse is None else inverse
    for unit in divisor.outputs[0].outputs:
        if is_op(unit, "Div" if inverse is None else "Mul") and any(t is centred for t in unit.inputs):
            found += _torch_end(unit)
    return found


def _torch_end(unit: gs.Node) -> list[tuple[gs.Node, Array, Array | None]]:
    scaled = unit.outputs[0].outputs[0] if len(unit.outputs[0].outputs) == 1 else None
    operand = constant_operand(scaled) if scaled is not None and is_op(scaled, "Mul") else None
    if scaled is None or operand is None:
        return []
    shifted = scaled.outputs[0].outputs[0] if len(scaled.outputs[0].outputs) == 1 else None
    shift = constant_operand(shifted) if shifted is not None and is_op(shifted, "Add") else None
    return [(scaled, operand[1], None)] if shifted is None or shift is None else [(shifted, operand[1], shift[1])]


def _tensorflow_end(
    scale: gs.Tensor, gamma: Array, source: gs.Tensor, mean: gs.Tensor
) -> list[tuple[gs.Node, Array, Array | None]]:
    """Match source * scale + (beta - mean * scale)."""
    products = {id(t): n.outputs[0] for n in scale.outputs if is_op(n, "Mul") for t in n.inputs if t is not scale}
    left, right = products.get(id(source)), products.get(id(mean))
    for offset in [] if right is None else right.outputs:
        beta = const_at(offset, 0) if is_op(offset, "Sub") else None
        for end in [] if beta is None else offset.outputs[0].outputs:
            if is_op(end, "Add") and {id(t) for t in end.inputs} == {id(left), id(offset.outputs[0])}:
                return [(end, gamma, beta)]
    return []
