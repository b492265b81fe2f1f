"""One torch function per ONNX operator, and the role each operator plays in quantization.

The functions are named and signed like the ONNX specification, opset 21: inputs are positional, attributes are
keywords. Adding an operator is writing one function under the decorator `op`.

An input that `Op.static` lists arrives as plain Python data when it was a constant, and as a tensor when the graph
computes it; `ints` and `scalar` read both, and only the second costs a wait for the device.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_eptq import islands
from onnx_eptq.errors import UnsupportedOp
from onnx_eptq.graph import STANDARD_DOMAINS, nodes_within

Role = Literal["linear", "arithmetic", "same_grid", "clamp", "sensitive", "untouched"]
Attributes = Mapping[str, Any]
ChannelAxis = Callable[[Attributes, int], int | None]
Carries = Callable[[Attributes, int, Sequence[Any], Sequence[Any] | None], int | None]
Ints = Sequence[int] | None
Static = Any  # Python data or a tensor
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Op:
    """What the quantizer knows about one ONNX operator.

    Attributes:
        function: The operator in torch, signed like its ONNX specification.
        role: How it is quantized, or a function of the node's attributes that tells:
            linear (weights, a bias, an accumulator), arithmetic (inputs and outputs are quantized), same_grid (the
            outputs keep input 0's grid), clamp (fused on its producer), sensitive (8 bits destroy it: float),
            untouched (carries shapes, indices or truth values).
        weight: Index of the input that is a weight when it is constant.
        bias: Index of the bias input.
        channel_axis: From the attributes and the weight's number of dimensions to its output-channel axis (None: the
            weight has no axis that is one output channel per slice).
        output_axis: The axis of the output that holds a linear operator's channels.
        decides: Whether the largest inputs decide the result, so that they must not saturate (Softmax, ArgMax, TopK).
        squashes: Whether gradients vanish or end in it (Softmax, Sigmoid, ArgMax): as the end of a network, it is cut off
            before sensitivities and learning targets are taken.
        selects: Whether values decide which elements come out, in which order or how many (TopK, NonMaxSuppression): element
            by element, such outputs of two networks cannot be compared.
        accumulates: Whether a kernel that computes a linear operator can add the other input in its accumulator (Add), so that
            the linear operator's own output exists nowhere.
        windows: Whether each output position reads one window of the input, `strides` apart, with `pads` around it (Conv), so
            that some positions can be computed without the others.
        normalizes: Whether the output has a mean and a size of its own, whatever the input's (LayerNormalization); the scale
            and shift that follow belong to it.
        joins: Whether the output is made of the inputs' elements, so that they can share one grid (Concat).
        unary: Whether each output element depends on one element of input 0 alone (LeakyRelu): ranges are then chosen by
            the error behind it.
        operands: Whether constant inputs are operands like any activation (Add), not parameters (LayerNormalization).
        static: Indices of the inputs that are shapes or parameters: plain Python data when constant.
        carries: From the attributes, an axis of input 0 and the shapes of input 0 and the output to the output's axis that
            holds the same channels, when multiplying a channel by a positive number multiplies it in the output (Relu);
            None where it does not.
        affine: Indices of the inputs that scale and shift the output's channels, one number each (LayerNormalization).
        bounds: The range that outputs cannot leave, when it is finite.
        n_outputs: Whether `function` takes `n_outputs`, the number of outputs the node really has.
        island: Whether no function stands for the operator: ONNX Runtime computes it (`islands`).
    """

    function: Callable[..., Any]
    role: Role | Callable[[Attributes], Role]
    weight: int | None = None
    bias: int | None = None
    channel_axis: ChannelAxis | None = None
    output_axis: int = -1
    operands: bool = False
    decides: bool = False
    squashes: bool = False
    selects: bool = False
    accumulates: bool = False
    windows: bool = False
    normalizes: bool = False
    joins: bool = False
    unary: bool = False
    carries: Carries | None = None
    affine: tuple[int, ...] = ()
    static: tuple[int, ...] = ()
    bounds: tuple[float, float] | None = None
    n_outputs: bool = False
    island: bool = False

    def role_of(self, attributes: Attributes) -> Role:
        """Return the role of a node that has these attributes."""
        return self.role(attributes) if callable(self.role) else self.role


OPS: dict[str, Op] = {}  # by `op_name`


def op_name(node: gs.Node) -> str:
    """Return the name of a node's operator, with its domain in front unless that is the standard one."""
    return str(node.op) if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op}"


def _no_function(*inputs: Tensor) -> Tensor:
    raise NotImplementedError("an island is computed by ONNX Runtime")


ISLAND = Op(_no_function, "sensitive", squashes=True, island=True)
SELECTING_ISLAND = replace(ISLAND, selects=True)
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear")


def bounds_of(function: Callable[..., Any] | str) -> tuple[float, float] | None:
    """The range that the results of an operator's torch function cannot leave, when it is finite; None of other functions."""
    known = OPS.get(getattr(function, "__name__", ""))
    return None if known is None else known.bounds


def _selects(node: gs.Node) -> bool:
    found = OPS.get(op_name(node))
    return found is not None and found.selects


def op_of(node: gs.Node) -> Op:
    """Return what is known about a node's operator: the one place where every stage looks it up.

    What the table lacks and ONNX Runtime has is an island: it stays float, and gradients end in it. An If or Loop selects if
    something in it does.

    Raises:
        UnsupportedOp: nothing is known.
    """
    found = OPS.get(op_name(node))
    if found is None and node.op not in QUANTIZED and islands.can_run(node):
        return SELECTING_ISLAND if any(_selects(inner) for inner in nodes_within(node)) else ISLAND
    if found is None:
        raise UnsupportedOp(f"'{node.name}' {op_name(node)} cannot be simulated; replace it by standard operators")
    return found


def _in_place(_attributes: Attributes, axis: int, _before: Sequence[Any], _after: Sequence[Any] | None) -> int:
    """`Op.carries` of an operator that leaves every channel where it is."""
    return axis


def _beside_windows(
    _attributes: Attributes, axis: int, _before: Sequence[Any], _after: Sequence[Any] | None
) -> int | None:
    """`Op.carries` of pooling: neighbours along the axes that windows slide over come together."""
    return axis if axis < 2 else None


def _transposed(attributes: Attributes, axis: int, before: Sequence[Any], _after: Sequence[Any] | None) -> int:
    """`Op.carries` of a Transpose."""
    permutation = list(attributes.get("perm") or range(len(before))[::-1])
    return permutation.index(axis)


def _reshaped(_attributes: Attributes, axis: int, before: Sequence[Any], after: Sequence[Any] | None) -> int | None:
    """`Op.carries` of an operator that keeps the elements' order: an axis that stays, with as many elements behind it."""
    if not after or not isinstance(before[axis], int):
        return None
    if list(before[: axis + 1]) == list(after[: axis + 1]) and all(isinstance(n, int | str) for n in before[:axis]):
        return axis
    behind = _elements(before[axis + 1 :])
    if behind is None:
        return None
    fits = (i for i, n in enumerate(after) if n == before[axis] and _elements(after[i + 1 :]) == behind)
    return next(fits, None)


def _elements(shape: Sequence[Any]) -> int | None:
    return math.prod(shape) if all(isinstance(size, int) for size in shape) else None


def op(role: Role | Callable[[Attributes], Role], **facts: Any) -> Callable[[Function], Function]:
    """Return a decorator that registers a function in `OPS` under its own name; `facts` are fields of `Op`."""

    def register(function: Function) -> Function:
        n_outputs = "n_outputs" in inspect.signature(function).parameters
        OPS[function.__name__] = Op(function, role, n_outputs=n_outputs, **facts)
        return function

    return register


def _unary(name: str, role: Role, function: Callable[[Tensor], Tensor], **facts: Any) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor, /) -> Tensor:
        return function(x)

    apply.__name__ = apply.__qualname__ = name
    return op(role, **facts)(apply)


def _binary(
    name: str, role: Role, function: Callable[[Tensor, Tensor], Tensor], **facts: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    def apply(a: Tensor, b: Tensor, /) -> Tensor:
        return function(*_together(a, b))

    apply.__name__ = apply.__qualname__ = name
    return op(role, **facts)(apply)


def _variadic(name: str, function: Callable[..., Tensor], **facts: Any) -> Callable[..., Tensor]:
    def apply(*data_0: Tensor) -> Tensor:
        return function(*_together(*data_0))

    apply.__name__ = apply.__qualname__ = name
    return op("arithmetic", **facts)(apply)


# Reading inputs and attributes


def ints(values: Static) -> tuple[int, ...]:
    """Return integers given as Python data or as a tensor."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return tuple(int(v) for v in values) if isinstance(values, Sequence) else (int(values),)


def floats(values: Static) -> list[float]:
    """Return floats given as Python data or as a tensor."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return [float(v) for v in values]


def scalar(value: Static) -> Any:
    """Return the one number in Python data or in a tensor."""
    value = value.tolist() if hasattr(value, "tolist") else value
    while isinstance(value, Sequence):
        (value,) = value
    return value


def _together(*tensors: Tensor) -> tuple[Tensor, ...]:
    # Shapes and constants are made on the CPU, and may meet data from a GPU.
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    return tensors if device is None else tuple(t.to(device) for t in tensors)


def _positive(axes: Static, ndim: int) -> tuple[int, ...]:
    return tuple(axis % ndim if ndim else 0 for axis in ints(axes))


def _wrapped(indices: Tensor, size: int, device: torch.device) -> Tensor:
    """Return the indices as int64 on a device, with the negative ones counted from the end."""
    indices = indices.to(device, torch.int64)
    return torch.where(indices < 0, indices + size, indices)


_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
}  # fmt: skip


def _torch_dtype(to: Any) -> torch.dtype:
    """Return the torch dtype for an ONNX type number or a numpy type."""
    name = _DTYPES.get(int(to), f"ONNX type {to}") if isinstance(to, int) else np.dtype(to).name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise NotImplementedError(f"cannot hold {name} in a torch tensor")
    return dtype


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # graphsurgeon wraps a tensor attribute in a Constant, whose array is its `values`
    return torch.from_numpy(np.array(getattr(value, "values", value)))


def _flat_pads(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Return pads in the order of `torch.nn.functional.pad`: last axis first, begin before end."""
    return [pad for pair in zip(reversed(begin), reversed(end), strict=True) for pad in pair]


# Convolutions and matrix products


class _Window(NamedTuple):
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, ...]:
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))


def _halves(totals: Sequence[int], more_at_end: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    small, large = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    return (small, large) if more_at_end else (large, small)


def _window(
    size: Sequence[int], kernel: Sequence[int], strides: Ints, dilations: Ints, pads: Ints, auto_pad: str
) -> _Window:
    """Return a sliding window over axes of these sizes, with its pads resolved."""
    ones = (1,) * len(kernel)
    pads = pads if pads and auto_pad == "NOTSET" else (0, 0) * len(kernel)
    begin, end = tuple(pads[: len(kernel)]), tuple(pads[len(kernel) :])
    window = _Window(tuple(kernel), tuple(strides or ones), tuple(dilations or ones), begin, end)
    if not auto_pad.startswith("SAME"):
        return window
    along = zip(size, window.strides, window.extent, strict=True)
    totals = [max((-(-n // stride) - 1) * stride + extent - n, 0) for n, stride, extent in along]
    begin, end = _halves(totals, auto_pad == "SAME_UPPER")
    return window._replace(begin=begin, end=end)


@op("linear", weight=1, bias=2, channel_axis=lambda attributes, ndim: 0, output_axis=1, windows=True)
def Conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints = None,
    group: int = 1,
    kernel_shape: Ints = None,
    pads: Ints = None,
    strides: Ints = None,
) -> Tensor:
    """Convolution over 1, 2 or 3 spatial axes."""
    window = _window(x.shape[2:], w.shape[2:], strides, dilations, pads, auto_pad)
    begin = window.begin
    if begin != window.end:
        x, begin = F.pad(x, _flat_pads(begin, window.end)), (0,) * len(begin)
    no_pads = (0,) * len(begin)
    return torch.convolution(x, w, b, window.strides, begin, window.dilations, False, no_pads, group)


@op(
    "linear",
    weight=1,
    bias=2,
    channel_axis=lambda attributes, ndim: 1 if attributes.get("group", 1) == 1 else None,
    output_axis=1,
)
def ConvTranspose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints = None,
    group: int = 1,
    kernel_shape: Ints = None,
    output_padding: Ints = None,
    output_shape: Ints = None,
    pads: Ints = None,
    strides: Ints = None,
) -> Tensor:
    """Transposed convolution over 1, 2 or 3 spatial axes."""
    size = x.shape[2:]
    window = _window(size, w.shape[2:], strides, dilations, pads, "NOTSET" if auto_pad == "NOTSET" else "VALID")
    extra = tuple(output_padding or (0,) * len(size))
    if output_shape or auto_pad.startswith("SAME"):
        wanted = output_shape or [n * s for n, s in zip(size, window.strides, strict=True)]
        full = [(n - 1) * s + k for n, s, k in zip(size, window.strides, window.extent, strict=True)]
        totals = [f + e - n for f, e, n in zip(full, extra, wanted[-len(size) :], strict=True)]
        if not output_shape:  # between kernels shorter than their stride nothing is cut, nor added at the end
            totals = [max(total, 0) for total in totals]
        window = window._replace(**dict(zip(("begin", "end"), _halves(totals, auto_pad == "SAME_UPPER"), strict=True)))
    _, strides, dilations, begin, end = window
    steps = [max(pair) for pair in zip(strides, dilations, strict=True)]
    if begin == end and min(begin) >= 0 and all(e < step for e, step in zip(extra, steps, strict=True)):
        return torch.convolution(x, w, b, strides, begin, dilations, True, extra, group)
    zeros = (0,) * len(size)
    y = torch.convolution(x, w, None, strides, zeros, dilations, True, zeros, group)
    # Padding a transposed convolution cuts its output; where there is nothing to cut from, the bias stands alone.
    y = F.pad(y, _flat_pads([-n for n in begin], [e - n for e, n in zip(extra, end, strict=True)]))
    return y if b is None else y + b.reshape(-1, *(1 for _ in size))


@op("linear", weight=1, bias=2, channel_axis=lambda attributes, ndim: 0 if attributes.get("transB", 0) else 1)
def Gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Return alpha * a @ b + beta * c."""
    a, b = a.T if transA else a, b.T if transB else b
    if c is not None:
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)
    return a @ b if alpha == 1 else alpha * (a @ b)


MatMul = _binary(
    "MatMul", "linear", torch.matmul, weight=1, channel_axis=lambda attributes, ndim: ndim - 1 if ndim > 1 else None
)


@op("arithmetic")
def Einsum(*inputs: Tensor, equation: str) -> Tensor:
    """Sum of products, in Einstein's notation."""
    return torch.einsum(equation, *_together(*inputs))


# Pooling

_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOLS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _torch_can_pad(window: _Window) -> bool:
    # torch pads both ends alike, by no more than half a kernel
    halves = zip(window.begin, window.kernel, strict=True)
    return window.begin == window.end and all(2 * begin <= kernel for begin, kernel in halves)


def _fitted(window: _Window, size: Sequence[int], ceil_mode: int) -> _Window:
    """Return the window with the end pads at which its last position, rounded as `ceil_mode` says, just fits."""
    ends = []
    for n, stride, extent, begin, end in zip(
        size, window.strides, window.extent, window.begin, window.end, strict=True
    ):
        free = n + begin + end - extent
        last = -(-free // stride) if ceil_mode else free // stride
        if last * stride >= n + begin:  # a window may not start in the end pads
            last -= 1
        ends.append(last * stride + extent - n - begin)
    return window._replace(end=tuple(ends))


def _window_sum(x: Tensor, window: _Window) -> Tensor:
    """Return the sum over each window position, by a convolution with ones: the one pooling that torch dilates."""
    x = F.pad(x, _flat_pads(window.begin, window.end))
    planes, zeros = x.reshape(-1, 1, *x.shape[2:]), (0,) * len(window.kernel)
    ones = x.new_ones((1, 1, *window.kernel))
    y = torch.convolution(planes, ones, None, window.strides, zeros, window.dilations, False, zeros, 1)
    return y.reshape(*x.shape[:2], *y.shape[2:])


@op("arithmetic", carries=_beside_windows)
def AveragePool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Ints = None,
    kernel_shape: Sequence[int],
    pads: Ints = None,
    strides: Ints = None,
) -> Tensor:
    """Mean over a sliding window."""
    window = _window(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad)
    fits = all(n >= kernel for n, kernel in zip(x.shape[2:], window.kernel, strict=True))  # torch asks it of three axes
    if _torch_can_pad(window) and set(window.dilations) == {1} and (fits or len(window.kernel) < 3):
        pool = _AVERAGE_POOLS[len(window.kernel)]
        return pool(x, window.kernel, window.strides, window.begin, bool(ceil_mode), bool(count_include_pad))
    fitted = _fitted(window, x.shape[2:], ceil_mode)
    counted = x.new_ones((1, 1, *x.shape[2:]))
    if count_include_pad:  # the pads count, the overhang that ceil_mode adds behind them does not
        counted = F.pad(counted, _flat_pads(window.begin, window.end), value=1.0)
        overhang = tuple(e - declared for e, declared in zip(fitted.end, window.end, strict=True))
        return _window_sum(x, fitted) / _window_sum(counted, fitted._replace(begin=(0,) * len(overhang), end=overhang))
    return _window_sum(x, fitted) / _window_sum(counted, fitted)


@op("same_grid", carries=_beside_windows)
def MaxPool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints = None,
    kernel_shape: Sequence[int],
    pads: Ints = None,
    storage_order: int = 0,
    strides: Ints = None,
    n_outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over a sliding window, and on demand where in the input it was."""
    size, padded, shift = x.shape[2:], x, (0,) * len(kernel_shape)
    window = _window(size, kernel_shape, strides, dilations, pads, auto_pad)
    begin = window.begin
    if not _torch_can_pad(window):
        window = _fitted(window, size, ceil_mode)
        padded = F.pad(x, _flat_pads(window.begin, window.end), value=_worst(x.dtype, -1))
        begin, shift, ceil_mode = shift, begin, 0
    pool = functools.partial(_MAX_POOLS[len(size)], ceil_mode=bool(ceil_mode))
    if n_outputs == 1:
        return pool(padded, window.kernel, window.strides, begin, window.dilations)
    y, indices = pool(padded, window.kernel, window.strides, begin, window.dilations, return_indices=True)
    places = [i - s for i, s in zip(torch.unravel_index(indices, padded.shape[2:]), shift, strict=True)]
    steps = [math.prod(size[:i]) if storage_order else math.prod(size[i + 1 :]) for i in range(len(size))]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device) * math.prod(size)
    flat = sum(place * step for place, step in zip(places, steps, strict=True))
    return y, flat + planes.reshape(*x.shape[:2], *(1 for _ in size))


@op("arithmetic")
def LpPool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints = None,
    kernel_shape: Sequence[int],
    p: int = 2,
    pads: Ints = None,
    strides: Ints = None,
) -> Tensor:
    """p-norm over a sliding window."""
    window = _window(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad)
    powers = _window_sum(x.abs() ** p, _fitted(window, x.shape[2:], ceil_mode))
    return _zero_safe(powers, lambda positive: positive ** (1 / p))


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


GlobalAveragePool = _unary(
    "GlobalAveragePool",
    "arithmetic",
    lambda x: x.mean(_spatial(x), keepdim=True),
    decides=True,
    carries=_beside_windows,
)
GlobalMaxPool = _unary(
    "GlobalMaxPool", "same_grid", lambda x: x.amax(_spatial(x), keepdim=True), carries=_beside_windows
)


@op("arithmetic")
def GlobalLpPool(x: Tensor, *, p: int = 2) -> Tensor:
    """p-norm over the spatial axes."""
    return _norm(x, p, _spatial(x), True)


# Activations

Relu = _unary("Relu", "clamp", F.relu, unary=True, carries=_in_place)
Sigmoid = _unary("Sigmoid", "arithmetic", torch.sigmoid, bounds=(0.0, 1.0), unary=True, squashes=True)
Tanh = _unary("Tanh", "arithmetic", torch.tanh, bounds=(-1.0, 1.0), unary=True)
Softsign = _unary("Softsign", "arithmetic", F.softsign, bounds=(-1.0, 1.0), unary=True)
Softplus = _unary("Softplus", "arithmetic", F.softplus, unary=True)
Mish = _unary("Mish", "arithmetic", F.mish, unary=True)
HardSwish = _unary("HardSwish", "arithmetic", lambda x: x * (x / 6 + 0.5).clamp(0, 1), unary=True)
PRelu = _binary("PRelu", "arithmetic", lambda x, slope: torch.where(x < 0, slope * x, x), carries=_in_place)


@op("clamp", static=(1, 2), unary=True)
def Clip(input: Tensor, min: Static = None, max: Static = None) -> Tensor:
    """Limit to [min, max]; max wins where they cross."""
    if min is not None and max is not None and not isinstance(min, Tensor) and not isinstance(max, Tensor):
        low, high = scalar(min), scalar(max)
        if low < high and input.is_floating_point():
            return F.hardtanh(input, low, high)  # its gradient takes a tenth of clamp's time
    if isinstance(min, Tensor):
        input = torch.maximum(*_together(input, min))
    elif min is not None:
        input = input.clamp(min=scalar(min))
    if isinstance(max, Tensor):
        return torch.minimum(*_together(input, max))
    return input if max is None else input.clamp(max=scalar(max))


@op("arithmetic", unary=True, carries=_in_place)
def LeakyRelu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """Return x where positive, else alpha * x."""
    return F.leaky_relu(x, alpha)


@op("arithmetic", unary=True)
def ThresholdedRelu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Return x where above alpha, else 0."""
    return torch.where(x > alpha, x, 0.0)


@op("arithmetic", unary=True)
def Elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Exponential linear unit."""
    return F.elu(x, alpha)


@op("arithmetic", unary=True)
def Celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Continuously differentiable exponential linear unit."""
    return F.celu(x, alpha)


@op("arithmetic", unary=True)
def Selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """Scaled exponential linear unit."""
    return gamma * F.elu(x, alpha)


@op("arithmetic", bounds=(0.0, 1.0), unary=True, squashes=True)
def HardSigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """Return alpha * x + beta, limited to [0, 1]."""
    return (alpha * x + beta).clamp(0, 1)


@op("arithmetic", unary=True)
def Gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit."""
    return F.gelu(x, approximate=approximate)


@op("arithmetic")
def Shrink(input: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """0 inside [-lambd, lambd], moved by bias towards 0 outside."""
    return torch.where(input < -lambd, input + bias, torch.where(input > lambd, input - bias, 0)).to(input.dtype)


@op("arithmetic", bounds=(0.0, 1.0), decides=True, squashes=True)
def Softmax(input: Tensor, *, axis: int = -1) -> Tensor:
    """Exponentials along an axis, divided by their sum."""
    return torch.softmax(input, axis)


@op("arithmetic", decides=True, squashes=True)
def LogSoftmax(input: Tensor, *, axis: int = -1) -> Tensor:
    """Logarithm of Softmax."""
    return torch.log_softmax(input, axis)


@op("untouched", squashes=True)
def Hardmax(input: Tensor, *, axis: int = -1) -> Tensor:
    """1 at the first maximum along an axis, else 0."""
    return torch.zeros_like(input).scatter(axis, input.argmax(axis, keepdim=True), 1)


# Elementwise arithmetic


def _zero_safe(x: Tensor, root: Callable[[Tensor], Tensor]) -> Tensor:
    # A root's slope is infinite at 0: one exact 0 would turn a whole gradient into NaN.
    zero = x == 0
    return torch.where(zero, 0.0, root(torch.where(zero, 1.0, x)))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


Add = _binary("Add", "arithmetic", torch.add, operands=True, accumulates=True)
Sub = _binary("Sub", "arithmetic", torch.sub, operands=True)
Mul = _binary("Mul", "arithmetic", torch.mul, operands=True)
Div = _binary("Div", "sensitive", _divide)
Pow = _binary("Pow", "sensitive", lambda x, y: torch.pow(x, y).to(x.dtype))
Neg = _unary("Neg", "arithmetic", torch.neg)
Abs = _unary("Abs", "arithmetic", torch.abs)
Sqrt = _unary("Sqrt", "sensitive", lambda x: _zero_safe(x, torch.sqrt))
Reciprocal = _unary("Reciprocal", "sensitive", torch.reciprocal)
Exp = _unary("Exp", "sensitive", torch.exp, squashes=True)
Log = _unary("Log", "sensitive", torch.log)
Erf = _unary("Erf", "sensitive", torch.erf, bounds=(-1.0, 1.0))
Sin = _unary("Sin", "sensitive", torch.sin, bounds=(-1.0, 1.0))
Cos = _unary("Cos", "sensitive", torch.cos, bounds=(-1.0, 1.0))
Tan = _unary("Tan", "sensitive", torch.tan)
Asin = _unary("Asin", "sensitive", torch.asin)
Acos = _unary("Acos", "sensitive", torch.acos)
Atan = _unary("Atan", "sensitive", torch.atan)
Sinh = _unary("Sinh", "sensitive", torch.sinh)
Cosh = _unary("Cosh", "sensitive", torch.cosh)
Asinh = _unary("Asinh", "sensitive", torch.asinh)
Acosh = _unary("Acosh", "sensitive", torch.acosh)
Atanh = _unary("Atanh", "sensitive", torch.atanh)
Det = _unary("Det", "sensitive", torch.det)
Floor = _unary("Floor", "untouched", torch.floor)
Ceil = _unary("Ceil", "untouched", torch.ceil)
Round = _unary("Round", "untouched", torch.round)
Sign = _unary("Sign", "untouched", torch.sign)


Max = _variadic("Max", lambda *tensors: functools.reduce(torch.maximum, tensors), operands=True)
Min = _variadic("Min", lambda *tensors: functools.reduce(torch.minimum, tensors), operands=True)
Sum = _variadic("Sum", lambda *tensors: functools.reduce(torch.add, tensors), operands=True)
Mean = _variadic("Mean", lambda *tensors: functools.reduce(torch.add, tensors) / len(tensors))


@op("untouched")
def Mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Remainder, with the sign of a if fmod, else of b."""
    return (torch.fmod if fmod else torch.remainder)(*_together(a, b))


# Comparison and logic

Equal = _binary("Equal", "untouched", torch.eq)
Greater = _binary("Greater", "untouched", torch.gt)
GreaterOrEqual = _binary("GreaterOrEqual", "untouched", torch.ge)
Less = _binary("Less", "untouched", torch.lt)
LessOrEqual = _binary("LessOrEqual", "untouched", torch.le)
And = _binary("And", "untouched", torch.logical_and)
Or = _binary("Or", "untouched", torch.logical_or)
Xor = _binary("Xor", "untouched", torch.logical_xor)
Not = _unary("Not", "untouched", torch.logical_not)
BitwiseAnd = _binary("BitwiseAnd", "untouched", torch.bitwise_and)
BitwiseOr = _binary("BitwiseOr", "untouched", torch.bitwise_or)
BitwiseXor = _binary("BitwiseXor", "untouched", torch.bitwise_xor)
BitwiseNot = _unary("BitwiseNot", "untouched", torch.bitwise_not)
IsNaN = _unary("IsNaN", "untouched", torch.isnan)


@op("untouched")
def IsInf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Where x is infinite, of the signs asked for."""
    return (torch.isposinf(x) & bool(detect_positive)) | (torch.isneginf(x) & bool(detect_negative))


@op("arithmetic", operands=True)
def Where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return x where the condition holds, else y."""
    condition, x, y = _together(condition, x, y)
    return torch.where(condition, x, y)


# Normalization


@op("arithmetic", affine=(1, 2), output_axis=1)
def BatchNormalization(
    x: Tensor,
    scale: Tensor,
    b: Tensor,
    input_mean: Tensor,
    input_var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    """Normalization with stored means and variances."""
    if training_mode:
        raise NotImplementedError("BatchNormalization with training_mode=1: export the model for inference")
    return F.batch_norm(x, input_mean, input_var, scale, b, False, 0.0, epsilon)


@op("arithmetic", affine=(1, 2), normalizes=True)
def LayerNormalization(
    x: Tensor,
    scale: Tensor,
    b: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    n_outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Normalization over the axes from `axis` on, and on demand the means and inverse standard deviations used."""
    shape = x.shape[axis:]
    if n_outputs == 1 and scale.shape == shape and (b is None or b.shape == shape):
        return F.layer_norm(x, shape, scale, b, epsilon)
    variance, mean = torch.var_mean(x, tuple(range(axis % x.ndim, x.ndim)), correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + epsilon)
    y = (x - mean) * inverse * scale
    y = y if b is None else y + b
    return (y, mean, inverse)[:n_outputs] if n_outputs > 1 else y


def _group_norm(x: Tensor, groups: int, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    # torch.nn.functional.group_norm does the same, but refuses groups of one element
    return torch.group_norm(x, groups, scale, bias, epsilon, torch.backends.cudnn.enabled)


@op("arithmetic", affine=(1, 2), output_axis=1, normalizes=True)
def InstanceNormalization(input: Tensor, scale: Tensor, b: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Normalization of each channel of each sample."""
    return _group_norm(input, input.shape[1], scale, b, epsilon)


@op("arithmetic", affine=(1, 2), output_axis=1, normalizes=True)
def GroupNormalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5, num_groups: int, stash_type: int = 1
) -> Tensor:
    """Normalization of each group of channels of each sample."""
    return _group_norm(x, num_groups, scale, bias, epsilon)


@op("arithmetic", normalizes=True)
def MeanVarianceNormalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """Mean 0 and variance 1 over some axes."""
    variance, mean = torch.var_mean(x, tuple(axes), correction=0, keepdim=True)
    return (x - mean) / (variance.sqrt() + 1e-9)


@op("sensitive")
def LpNormalization(input: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Division by the p-norm along an axis; 0 where the norm is 0."""
    norm = _norm(input, p, (axis,), True)
    return input / torch.where(norm == 0, 1.0, norm)


@op("arithmetic")
def LRN(x: Tensor, *, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int) -> Tensor:
    """Local response normalization across channels."""
    ahead = (size - 1) // 2
    squares = F.pad(x * x, (*(0, 0) * (x.ndim - 2), ahead, size - 1 - ahead))
    return x / (bias + alpha / size * squares.unfold(1, size, 1).sum(-1)) ** beta


# Reductions


def _norm(x: Tensor, p: float, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, p, axes, keepdim)
    return norm


def _product(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


def _worst(dtype: torch.dtype, sign: int) -> float:
    if dtype.is_floating_point:
        return sign * math.inf
    limits = torch.iinfo(torch.uint8 if dtype == torch.bool else dtype)
    return limits.max if sign > 0 else limits.min


def _extreme(reduce: Callable[..., Tensor], sign: int) -> Callable[[Tensor, tuple[int, ...], bool], Tensor]:
    def extreme(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
        if any(x.shape[axis] == 0 for axis in axes):  # torch refuses; ONNX wants the value that any other beats
            return torch.full_like(x.any(axes, keepdim), _worst(x.dtype, sign), dtype=x.dtype)
        return reduce(x, axes, keepdim)

    return extreme


def _reduction(
    name: str, role: Role, reduce: Callable[[Tensor, tuple[int, ...], bool], Tensor]
) -> Callable[..., Tensor]:
    def apply(data: Tensor, axes: Static = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        chosen = _positive(axes, data.ndim) if axes is not None else ()
        if not chosen and noop_with_empty_axes:  # each element is reduced with itself: ReduceL1 is then Abs
            return reduce(data.unsqueeze(-1), (-1,), False)
        return reduce(data, chosen or tuple(range(data.ndim)), bool(keepdims))

    apply.__name__ = apply.__qualname__ = name
    return op(role, static=(1,))(apply)


ReduceMean = _reduction("ReduceMean", "arithmetic", torch.mean)
ReduceSum = _reduction("ReduceSum", "arithmetic", lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype))
ReduceMax = _reduction("ReduceMax", "arithmetic", _extreme(torch.amax, -1))
ReduceMin = _reduction("ReduceMin", "arithmetic", _extreme(torch.amin, 1))
ReduceProd = _reduction("ReduceProd", "sensitive", _product)
ReduceL1 = _reduction("ReduceL1", "sensitive", lambda x, axes, keep: _norm(x, 1, axes, keep))
ReduceL2 = _reduction("ReduceL2", "sensitive", lambda x, axes, keep: _norm(x, 2, axes, keep))
ReduceLogSum = _reduction("ReduceLogSum", "sensitive", lambda x, axes, keep: x.sum(axes, keep).log())
ReduceLogSumExp = _reduction("ReduceLogSumExp", "sensitive", torch.logsumexp)
ReduceSumSquare = _reduction("ReduceSumSquare", "sensitive", lambda x, axes, keep: (x * x).sum(axes, keep))


def _place(name: str, pick: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(data: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        if not select_last_index:
            return pick(data, axis, keepdim=bool(keepdims))
        return data.shape[axis] - 1 - pick(data.flip(axis), axis, keepdim=bool(keepdims))

    apply.__name__ = apply.__qualname__ = name
    return op("untouched", squashes=True)(apply)


ArgMax = _place("ArgMax", torch.argmax)
ArgMin = _place("ArgMin", torch.argmin)


@op("untouched", static=(1,), decides=True, squashes=True, selects=True)
def TopK(x: Tensor, k: Static, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """The k largest or smallest along an axis and their indices; among equals the first."""
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, scalar(k)), indices.narrow(axis, 0, scalar(k))


@op("untouched", static=(1,))
def CumSum(x: Tensor, axis: Static, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Sum of the elements up to here along an axis."""
    axis = scalar(axis) % x.ndim
    x = x.flip(axis) if reverse else x
    if exclusive:
        x = F.pad(x, (*(0, 0) * (x.ndim - 1 - axis), 1, -1))
    y = x.cumsum(axis, dtype=x.dtype)
    return y.flip(axis) if reverse else y


# Shapes and layout

Identity = _unary("Identity", "same_grid", lambda x: x, carries=_in_place)
Size = _unary("Size", "untouched", lambda x: torch.tensor(x.numel()))


@op("untouched")
def Shape(data: Tensor, *, end: int | None = None, start: int = 0) -> Tensor:
    """The shape, as int64 on the CPU."""
    return torch.tensor(data.shape[start:end], dtype=torch.int64)


@op("same_grid", static=(1,), carries=_reshaped)
def Reshape(data: Tensor, shape: Static, *, allowzero: int = 0) -> Tensor:
    """Another shape, where 0 keeps an axis and -1 takes the rest."""
    wanted = ints(shape)
    return data.reshape([data.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(wanted)])


@op("same_grid", carries=_reshaped)
def Flatten(input: Tensor, *, axis: int = 1) -> Tensor:
    """Two axes: those before `axis`, and the others."""
    return input.reshape(math.prod(input.shape[:axis]), math.prod(input.shape[axis:]))


@op("same_grid", carries=_transposed)
def Transpose(data: Tensor, *, perm: Ints = None) -> Tensor:
    """Axes in another order, by default reversed."""
    return data.permute(tuple(perm) if perm is not None else tuple(reversed(range(data.ndim))))


@op("same_grid", static=(1,), carries=_reshaped)
def Squeeze(data: Tensor, axes: Static = None) -> Tensor:
    """Without the given axes of size 1, by default without all of them."""
    return data.squeeze() if axes is None else data.squeeze(_positive(axes, data.ndim))


@op("same_grid", static=(1,), carries=_reshaped)
def Unsqueeze(data: Tensor, axes: Static) -> Tensor:
    """With new axes of size 1, at these places in the output."""
    for axis in sorted(_positive(axes, data.ndim + len(ints(axes)))):
        data = data.unsqueeze(axis)
    return data


@op("same_grid", static=(1,))
def Expand(input: Tensor, shape: Static) -> Tensor:
    """Broadcast, both ways, with a shape."""
    return input.expand(np.broadcast_shapes(tuple(input.shape), ints(shape)))


@op("same_grid", static=(1,))
def Tile(input: Tensor, repeats: Static) -> Tensor:
    """Repeated along each axis."""
    return input.repeat(ints(repeats))


@op("arithmetic", operands=True, joins=True)
def Concat(*inputs: Tensor, axis: int) -> Tensor:
    """Joined along an axis."""
    return torch.cat(_together(*inputs), axis)


@op("same_grid", static=(1,))
def Split(
    input: Tensor, split: Static = None, *, axis: int = 0, num_outputs: int | None = None, n_outputs: int = 1
) -> tuple[Tensor, ...]:
    """Cut along an axis, into equal parts (the last may be smaller) unless told."""
    if split is not None:
        return torch.split(input, list(ints(split)), axis)
    return torch.split(input, -(-input.shape[axis] // (num_outputs or n_outputs)), axis)


def _places(size: int, start: int, end: int, step: int) -> range:
    """Return the places that ONNX's slice of an axis takes; unlike Python's, a start before the axis is its start."""
    start, end = (place + size if place < 0 else place for place in (start, end))
    if step > 0:
        return range(min(max(start, 0), size), min(max(end, 0), size), step)
    return range(min(max(start, 0), size - 1), min(max(end, -1), size - 1), step)


@op("same_grid", static=(1, 2, 3, 4))
def Slice(data: Tensor, starts: Static, ends: Static, axes: Static = None, steps: Static = None) -> Tensor:
    """A range with a step, perhaps a negative one, along some axes."""
    first, last = ints(starts), ints(ends)
    chosen = _positive(axes, data.ndim) if axes is not None else range(len(first))
    strides = ints(steps) if steps is not None else (1,) * len(first)
    cut, backwards = [slice(None)] * data.ndim, []
    for axis, start, end, step in zip(chosen, first, last, strides, strict=True):
        places = _places(data.shape[axis], start, end, step)
        if step < 0:
            backwards.append(axis)
            places = places[::-1]
        cut[axis] = slice(places[0], places[-1] + 1, abs(step)) if places else slice(0, 0)
    data = data[tuple(cut)]
    return data.flip(backwards) if backwards else data


def _pad_index(size: int, begin: int, end: int, mode: str) -> Tensor:
    """Return which element of an axis each element of the padded axis copies."""
    index = torch.arange(-begin, size + end)
    if mode == "wrap":
        return index % size
    if mode == "edge":
        return index.clamp(0, size - 1)
    index = index % max(2 * size - 2, 1)  # reflect: there and back, without repeating the edges
    return torch.minimum(index, 2 * size - 2 - index)


@op("same_grid", static=(1, 2, 3))
def Pad(
    data: Tensor, pads: Static, constant_value: Static = None, axes: Static = None, *, mode: str = "constant"
) -> Tensor:
    """Elements added (or, where negative, removed) at both ends of some axes."""
    amounts = ints(pads)
    chosen = _positive(axes, data.ndim) if axes is not None else tuple(range(data.ndim))
    begin, end = ({axis: amounts[i + at] for i, axis in enumerate(chosen)} for at in (0, len(chosen)))
    if mode == "constant":
        every = range(data.ndim)
        flat = _flat_pads([begin.get(axis, 0) for axis in every], [end.get(axis, 0) for axis in every])
        return F.pad(data, flat, value=0 if constant_value is None else scalar(constant_value))
    for axis in (axis for axis in chosen if begin[axis] or end[axis]):
        index = _pad_index(data.shape[axis], begin[axis], end[axis], mode)
        data = data.index_select(axis, index.to(data.device))
    return data


@op("same_grid")
def DepthToSpace(input: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Blocks of channels laid out in space."""
    if mode == "CRD":
        return F.pixel_shuffle(input, blocksize)
    n, c, h, w = input.shape
    blocks = input.reshape(n, blocksize, blocksize, c // blocksize**2, h, w)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


@op("same_grid")
def SpaceToDepth(input: Tensor, *, blocksize: int) -> Tensor:
    """Blocks of space laid out in channels."""
    n, c, h, w = input.shape
    blocks = input.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


@op("untouched", static=(1,))
def Trilu(input: Tensor, k: Static = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of each matrix, from its k-th diagonal; else 0."""
    return (torch.triu if upper else torch.tril)(input, 0 if k is None else scalar(k))


# Gather and scatter


@op("same_grid", operands=True)
def Gather(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Elements along an axis, in an order and shape that the indices give."""
    axis %= data.ndim
    index = _wrapped(indices, data.shape[axis], data.device)
    wanted = [*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]]  # empty for one element of a vector
    return data.index_select(axis, index.reshape(-1)).reshape(wanted)


@op("untouched")
def GatherElements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Elements whose place along an axis the indices give, one by one."""
    return data.gather(axis, _wrapped(indices, data.shape[axis], data.device))


@op("untouched")
def GatherND(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Slices whose places the last axis of the indices gives."""
    index, ndim = indices.to(data.device, torch.int64), indices.ndim - 1
    batch = [torch.arange(data.shape[i], device=data.device) for i in range(batch_dims)]
    batch = [b.reshape([-1 if j == i else 1 for j in range(ndim)]) for i, b in enumerate(batch)]
    return data[(*batch, *index.unbind(-1))]


_SCATTER = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter(data: Tensor, axis: int, index: Tensor, updates: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return data.scatter(axis, index, updates)
    return data.scatter_reduce(axis, index, updates, _SCATTER[reduction])


@op("untouched")
def ScatterElements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """The data with single elements replaced, or reduced with the updates."""
    data, indices, updates = _together(data, indices, updates)
    return _scatter(data, axis, _wrapped(indices, data.shape[axis], data.device), updates, reduction)


@op("untouched")
def ScatterND(data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """The data with slices replaced, or reduced with the updates."""
    data, indices, updates = _together(data, indices, updates)
    depth = indices.shape[-1]
    row = torch.zeros_like(indices[..., 0])
    for size, index in zip(data.shape[:depth], indices.unbind(-1), strict=True):
        row = row * size + _wrapped(index, size, data.device)
    rows = data.reshape(math.prod(data.shape[:depth]), math.prod(data.shape[depth:]))
    new = updates.reshape(row.numel(), rows.shape[1])
    return _scatter(rows, 0, row.reshape(-1, 1).expand_as(new), new, reduction).reshape(data.shape)


@op("untouched", selects=True)
def Compress(input: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """The slices along an axis (or the elements) for which the condition holds."""
    input = input.reshape(-1) if axis is None else input
    return input.index_select(axis or 0, condition.to(input.device).nonzero().reshape(-1))


NonZero = _unary("NonZero", "untouched", lambda x: x.nonzero().T, selects=True)


@op("untouched", static=(1,), squashes=True)
def OneHot(indices: Tensor, depth: Static, values: Tensor, *, axis: int = -1) -> Tensor:
    """values[1] at the index along a new axis, else values[0]."""
    depth = int(scalar(depth))
    indices, values = _together(indices, values)
    hot = _wrapped(indices, depth, values.device).unsqueeze(-1) == torch.arange(depth, device=values.device)
    return torch.where(hot, values[1], values[0]).movedim(-1, axis)


def _corners(boxes: Tensor, center_point_box: int) -> tuple[Tensor, Tensor]:
    first, second = boxes[..., :2], boxes[..., 2:]
    if center_point_box:
        return first - second / 2, first + second / 2
    return torch.minimum(first, second), torch.maximum(first, second)


def _overlaps(low: Tensor, high: Tensor) -> Tensor:
    """Return the intersection over union of the first box with each."""
    shared = (torch.minimum(high[0], high) - torch.maximum(low[0], low)).clamp(min=0).prod(-1)
    areas = (high - low).prod(-1)
    return shared / (areas[0] + areas - shared)


@op("untouched", static=(2, 3, 4), squashes=True, selects=True)
def NonMaxSuppression(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: Static = None,
    iou_threshold: Static = None,
    score_threshold: Static = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """(batch, class, box) of the best boxes that overlap no better one, class by class, best first."""
    limit = int(scalar(max_output_boxes_per_class)) if max_output_boxes_per_class is not None else 0
    most = scalar(iou_threshold) if iou_threshold is not None else 0.0
    low, high = _corners(boxes, center_point_box)
    kept = []
    for batch, label in itertools.product(*map(range, scores.shape[:2])):
        best = scores[batch, label].sort(descending=True, stable=True)
        left = best.indices if score_threshold is None else best.indices[best.values > scalar(score_threshold)]
        for _ in range(limit):
            if not left.numel():
                break
            kept.append(torch.stack([left.new_tensor(batch), left.new_tensor(label), left[0]]))
            overlapping = (
                _overlaps(low[batch, left], high[batch, left])[1:] > most
            )  # never where both are empty (0 / 0)
            left = left[1:][~overlapping]
    return torch.stack(kept) if kept else torch.zeros((0, 3), dtype=torch.int64, device=scores.device)


# Constants and types


@op("untouched")
def Constant(
    *,
    sparse_value: Any = None,
    value: Any = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Ints = None,
    value_string: str | None = None,
    value_strings: Sequence[str] | None = None,
) -> Tensor:
    """A constant tensor; sparse and text ones are not supported."""
    if value is not None:
        return _tensor(value)
    floats = value_float if value_float is not None else value_floats
    if floats is not None:
        return torch.tensor(floats, dtype=torch.float32)
    integers = value_int if value_int is not None else value_ints
    if integers is None:
        raise NotImplementedError("Constant holds text or a sparse tensor")
    return torch.tensor(integers, dtype=torch.int64)


@op("untouched", static=(0,))
def ConstantOfShape(input: Static, *, value: Any = None) -> Tensor:
    """One value everywhere, by default the float 0."""
    one = torch.zeros(1) if value is None else _tensor(value).reshape(1)
    return one.expand(1).repeat(ints(input)) if len(ints(input)) else one.reshape(())


@op("untouched", static=(0, 1, 2))
def Range(start: Static, limit: Static, delta: Static) -> Tensor:
    """Numbers from start to below limit. From Python data: int64 or float32."""
    dtype = next((t.dtype for t in (start, limit, delta) if isinstance(t, Tensor)), None)
    first, last, step = scalar(start), scalar(limit), scalar(delta)
    count = max(math.ceil((last - first) / step), 0)
    places: Tensor = torch.arange(count, dtype=torch.int64) * step + first
    return places if dtype is None else places.to(dtype)


@op("untouched")
def EyeLike(input: Tensor, *, dtype: Any = None, k: int = 0) -> Tensor:
    """Ones on the k-th diagonal, in the shape of the input."""
    ones = torch.ones_like(input, dtype=input.dtype if dtype is None else _torch_dtype(dtype))
    return ones.triu(k).tril(k)


@op("untouched")
def Cast(input: Tensor, *, saturate: int = 1, to: Any) -> Tensor:
    """The values in another type, given as an ONNX type number or a numpy type."""
    return input.to(_torch_dtype(to))


@op("untouched")
def CastLike(input: Tensor, target_type: Tensor, *, saturate: int = 1) -> Tensor:
    """The values in the type of another tensor."""
    return input.to(target_type.dtype)


@op("same_grid", static=(1, 2))
def Dropout(
    data: Tensor, ratio: Static = None, training_mode: Static = None, *, seed: int | None = None, n_outputs: int = 1
) -> Tensor | tuple[Tensor, Tensor]:
    """The data as they are, and on demand a mask that keeps everything."""
    if training_mode is not None and scalar(training_mode):
        raise NotImplementedError("Dropout with training_mode=1: export the model for inference")
    return data if n_outputs == 1 else (data, torch.ones_like(data, dtype=torch.bool))


# Resampling


def _rounded(places: Tensor, nearest_mode: str) -> Tensor:
    if nearest_mode == "round_prefer_floor":
        return (places - 0.5).ceil()
    if nearest_mode == "round_prefer_ceil":
        return (places + 0.5).floor()
    return places.floor() if nearest_mode == "floor" else places.ceil()


def _linear_kernel(distance: Tensor, a: float) -> Tensor:
    return (1 - distance.abs()).clamp(min=0)


def _cubic_kernel(distance: Tensor, a: float) -> Tensor:
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


class _Axis(NamedTuple):
    """One axis to resample: its number, sizes, scale, and region of interest."""

    axis: int
    size: int
    wanted: int
    scale: float
    start: float
    end: float


def _source_places(axis: _Axis, coordinates: str) -> Tensor:
    """Return where in the input each element of the output lies."""
    _, size, wanted, scale, start, end = axis
    # float32 like ONNX Runtime: a nearest neighbour depends on the last bit at ties
    place = torch.arange(wanted, dtype=torch.float32)
    if coordinates == "asymmetric":
        return place / scale
    if coordinates == "align_corners":
        return place * (size - 1) / max(wanted - 1, 1)
    if coordinates == "tf_crop_and_resize":
        if wanted == 1:
            return torch.tensor([0.5 * (start + end) * (size - 1)])
        return start * (size - 1) + place * (end - start) * (size - 1) / (wanted - 1)
    if coordinates == "pytorch_half_pixel" and wanted == 1:
        return torch.zeros(1)
    offset = 0.0
    if coordinates == "half_pixel_symmetric":  # the middle stays in the middle when the size was rounded
        offset = size / 2 * (1 - wanted / (scale * size))
    return offset + (place + 0.5) / scale - 0.5


def _mixing_matrix(
    places: Tensor, size: int, kernel: Callable[[Tensor], Tensor], radius: float, exclude_outside: int
) -> Tensor:
    """Return how much of each input element (columns) each output element (rows) takes."""
    low = min(math.floor(places.min().item() - radius), 0)
    high = max(math.ceil(places.max().item() + radius), size - 1)
    matrix = kernel(torch.arange(low, high + 1, dtype=torch.float64) - places.double()[:, None])
    before, inside, after = torch.split(matrix, [-low, size, high + 1 - size], 1)
    if not exclude_outside:  # what lies outside equals the edge
        inside = inside + F.pad(before.sum(1, keepdim=True), (0, size - 1))
        inside = inside + F.pad(after.sum(1, keepdim=True), (size - 1, 0))
    return inside / inside.sum(1, keepdim=True)


def _resampled_axes(
    x: Tensor, roi: Static, scales: Static, sizes: Static, axes: Ints, keep_aspect_ratio_policy: str
) -> list[_Axis]:
    chosen = _positive(axes, x.ndim) if axes else tuple(range(x.ndim))
    now, n = [x.shape[axis] for axis in chosen], len(chosen)
    region = (floats(roi) if roi is not None else []) or [0.0] * n + [1.0] * n
    wanted = list(ints(sizes)) if sizes is not None else []
    if not wanted:
        factors = floats(scales)
        # in float32 like ONNX Runtime: 10 * 0.7 is 7 there, and 6.9999998 in double precision
        wanted = [int(np.float32(factor) * np.float32(size)) for factor, size in zip(factors, now, strict=True)]
    else:
        factors = [w / size for w, size in zip(wanted, now, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            factors = [min(factors) if keep_aspect_ratio_policy == "not_larger" else max(factors)] * n
            wanted = [math.floor(factor * size + 0.5) for factor, size in zip(factors, now, strict=True)]
    return [_Axis(*row) for row in zip(chosen, now, wanted, factors, region[:n], region[n:], strict=True)]


_LINEAR_MODES = {3: "linear", 4: "bilinear", 5: "trilinear"}


def _interpolate(x: Tensor, axes: list[_Axis], mode: str, coordinates: str, nearest_mode: str) -> Tensor | None:
    """Return what torch's own, faster resampling gives, or None where it would give something else."""
    spatial = all(a.axis >= 2 for a in axes) and 3 <= x.ndim <= 5 and x.is_floating_point()
    if not spatial or any(a.scale != a.wanted / a.size for a in axes):
        return None
    wanted = list(x.shape[2:])
    for a in axes:
        wanted[a.axis - 2] = a.wanted
    if mode == "nearest":
        whole = all(a.wanted % a.size == 0 or a.size % a.wanted == 0 for a in axes)
        as_torch = whole and (coordinates, nearest_mode) == ("asymmetric", "floor")
        return F.interpolate(x, wanted, mode="nearest") if as_torch else None
    if coordinates not in ("half_pixel", "half_pixel_symmetric", "align_corners") or (mode == "cubic" and x.ndim != 4):
        return None
    name = "bicubic" if mode == "cubic" else _LINEAR_MODES[x.ndim]
    return F.interpolate(x, wanted, mode=name, align_corners=coordinates == "align_corners")


def _resize_role(attributes: Attributes) -> Role:
    copies = attributes.get("mode", "nearest") == "nearest"
    crops = attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    return "same_grid" if copies and not crops else "arithmetic"


@op(_resize_role, static=(1, 2, 3))
def Resize(
    x: Tensor,
    roi: Static = None,
    scales: Static = None,
    sizes: Static = None,
    *,
    antialias: int = 0,
    axes: Ints = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Another size, axis by axis, by the nearest element or by linear or cubic interpolation."""
    coordinates, crops = coordinate_transformation_mode, coordinate_transformation_mode == "tf_crop_and_resize"
    resampled = _resampled_axes(x, roi if crops else None, scales, sizes, axes, keep_aspect_ratio_policy)
    resampled = [a for a in resampled if crops or a.scale != 1 or a.wanted != a.size]
    if not antialias and not exclude_outside and cubic_coeff_a == -0.75:
        y = _interpolate(x, resampled, mode, coordinates, nearest_mode)
        if y is not None:
            return y
    dtype, shape = x.dtype, [1] * x.ndim
    for a in resampled:
        places = _source_places(a, coordinates)
        if mode == "nearest":
            index = _rounded(places, nearest_mode).clamp(0, a.size - 1).to(x.device, torch.int64)
            x = x.index_select(a.axis, index)
        else:
            stretch = min(a.scale, 1.0) if antialias else 1.0
            kernel = functools.partial(_linear_kernel if mode == "linear" else _cubic_kernel, a=cubic_coeff_a)
            radius = (1 if mode == "linear" else 2) / stretch
            matrix = _mixing_matrix(places, a.size, lambda d: kernel(d * stretch), radius, exclude_outside)  # noqa: B023
            x = torch.tensordot(x, matrix.to(x), ([a.axis], [1])).movedim(-1, a.axis)
        if crops:
            shape[a.axis] = -1
            outside = ((places < 0) | (places > a.size - 1)).reshape(shape)
            x, shape[a.axis] = torch.where(outside.to(x.device), extrapolation_value, x), 1
    return x.to(dtype)


@op("sensitive", static=(1,))
def AffineGrid(theta: Tensor, size: Static, *, align_corners: int = 0) -> Tensor:
    """The places that an affine map sends the elements of a picture to."""
    return F.affine_grid(theta, list(ints(size)), bool(align_corners))


_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic", "nearest": "nearest"}


@op("arithmetic")
def GridSample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """The values at places that a grid gives."""
    return F.grid_sample(x, grid, _GRID_MODES[mode], padding_mode, bool(align_corners))
