"""Passes: activations in pieces become the operators they are, quotients and squares take their plain form."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_eptq.graph import array, is_op
from onnx_eptq.prepare.edit import (
    Array,
    const_at,
    mutate,
    only_for,
    output_ids,
    producer,
    rank_of,
    same_dims,
)

_ERF = np.vectorize(math.erf, otypes=[np.float64])
SCALAR_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Min": lambda *x: functools.reduce(np.minimum, x),
    "Max": lambda *x: functools.reduce(np.maximum, x),
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
_FAR = np.array([12.0, 20, 40, 100, 300])  # where a cap would show; squares of exponentials are finite there
_GRID = np.concatenate([-_FAR, np.linspace(-9, 9, 145), _FAR])  # covers every bend of the functions below
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


def use_quotients(graph: gs.Graph) -> int:
    """Divide by what is inverted first: x * (1 / s), as ONNX Runtime does of itself, which rounds once instead of twice."""
    changes = 0
    kept = output_ids(graph)
    for node in [node for node in graph.nodes if is_op(node, "Mul")]:
        for index, tensor in enumerate(list(node.inputs)):
            divisor = _inverted(tensor)
            other = node.inputs[1 - index]
            if divisor is not None and other is not tensor and only_for(tensor, node, kept):
                mutate(node, "Div", [other, divisor], {})
                changes += 1
                break
    return changes


def _inverted(tensor: gs.Tensor) -> gs.Tensor | None:
    """What the tensor is the reciprocal of."""
    inverse = producer(tensor, "Reciprocal")
    if inverse is not None:
        return inverse.inputs[0]
    quotient = producer(tensor, "Div")
    one = None if quotient is None else const_at(quotient, 0)
    if (
        quotient is None
        or one is None
        or one.size != 1
        or one.reshape(()) != 1
        or isinstance(quotient.inputs[1], gs.Constant)
    ):
        return None
    rank = rank_of(quotient.inputs[1])
    return quotient.inputs[1] if one.ndim == 0 or (rank is not None and one.ndim <= rank) else None


def use_squares(graph: gs.Graph) -> int:
    """Multiply a value with itself where it is raised to the power of 2: products have integer kernels."""
    changes = 0
    for node in [node for node in graph.nodes if is_op(node, "Pow")]:
        exponent = const_at(node, 1)
        if (
            exponent is not None
            and exponent.size == 1
            and exponent.ndim <= (rank_of(node.inputs[0]) or 0)
            and exponent.reshape(()) == 2
        ):
            mutate(node, "Mul", [node.inputs[0], node.inputs[0]], {})
            changes += 1
    return changes


def _scalar_cone(node: gs.Node, limit: int = 12) -> list[gs.Node]:
    """Return the node and those before it, nearest first, that compute one number from numbers."""
    cone = [node]
    for current in cone:
        for tensor in current.inputs:
            maker = producer(tensor, *SCALAR_FUNCTIONS)
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
    node = producer(tensor, *SCALAR_FUNCTIONS) if depth else None
    if node is None or any(not t.name for t in node.inputs):
        return None
    inputs = [_on_grid(t, source, depth - 1, numbers) for t in node.inputs]
    if any(i is None for i in inputs):
        return None
    return np.asarray(SCALAR_FUNCTIONS[node.op](*inputs, **node.attrs))


def sort_selected(graph: gs.Graph) -> int:
    """Let a TopK sort what it picks; where the order is left open, no two engines need agree on it."""
    found = [node for node in graph.nodes if is_op(node, "TopK") and not node.attrs.get("sorted", 1)]
    for node in found:
        del node.attrs["sorted"]
    return len(found)
