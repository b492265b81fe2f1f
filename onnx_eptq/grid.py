"""Integer grids and the one definition of rounding: nothing else in this package rounds.

Every function follows ONNX QuantizeLinear and DequantizeLinear bit for bit: divide by the scale, round half to even, add
the zero point, saturate. Multiplying by the reciprocal instead changes about 4 % of the values that lie on ties.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_SCALE = 2.0**-60  # the product of two scales must still be a normal float32 number


def _range(bits: int, signed: bool) -> tuple[int, int]:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


class Dtype(NamedTuple):
    """An ONNX integer type that can hold quantized values."""

    onnx: int  # onnx.TensorProto.DataType
    bits: int
    signed: bool
    opset: int  # first opset whose QuantizeLinear/DequantizeLinear accept it

    @property
    def qmin(self) -> int:
        """Smallest value the type holds."""
        return _range(self.bits, self.signed)[0]

    @property
    def qmax(self) -> int:
        """Largest value the type holds."""
        return _range(self.bits, self.signed)[1]


DTYPES: dict[str, Dtype] = {
    "uint8": Dtype(2, 8, False, 10),
    "int8": Dtype(3, 8, True, 10),
    "int32": Dtype(6, 32, True, 10),
    "uint4": Dtype(21, 4, False, 21),
    "int4": Dtype(22, 4, True, 21),
}


@dataclass(frozen=True)
class Grid:
    """The integers a value may take: `bits` wide, signed or not, per tensor (`axis` None) or per slice along `axis`."""

    bits: int
    signed: bool
    axis: int | None = None

    @property
    def qmin(self) -> int:
        """Smallest integer of the grid."""
        return _range(self.bits, self.signed)[0]

    @property
    def qmax(self) -> int:
        """Largest integer of the grid."""
        return _range(self.bits, self.signed)[1]

    def with_bits(self, bits: int) -> Grid:
        """The same grid at another width."""
        return replace(self, bits=bits)


class QParams(NamedTuple):
    """Scale (float32) and zero point (integer), both of shape [] per tensor or [channels] per axis."""

    scale: Tensor
    zero_point: Tensor


class Quantized(NamedTuple):
    """Integers of a constant (None for an activation) and the parameters that give them their meaning."""

    integers: Tensor | None
    qparams: QParams
    grid: Grid


class _RoundStraightThrough(torch.autograd.Function):
    """Round half to even; the gradient passes unchanged (straight-through estimator)."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def setup_context(_ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(_info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        """What `pieces.function` maps over samples."""
        return round_half_even(x), in_dims[0]

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def round_half_even(x: Tensor) -> Tensor:
    """Round half to even, differentiable by the straight-through estimator."""
    rounded: Tensor = _RoundStraightThrough.apply(x) if x.requires_grad else torch.round(x)  # type: ignore[no-untyped-call]
    return rounded


def _round_in_place(x: Tensor) -> Tensor:
    """The same of a tensor that needs no gradient."""
    return x.round_()


def along(parameter: Tensor, axis: int | None, ndim: int) -> Tensor:
    """Reshape a per-axis parameter of shape [channels] so that it broadcasts against a tensor of `ndim` dimensions."""
    if axis is None or parameter.ndim == 0:
        return parameter
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.reshape(shape)


def snap(x: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Return the grid's integers nearest to `x / scale + zero_point`, as floats of x's dtype, differentiable."""
    scale = along(qparams.scale, grid.axis, x.ndim)
    zero_point = along(qparams.zero_point, grid.axis, x.ndim).to(x.dtype)
    return torch.clamp(round_half_even(x / scale) + zero_point, grid.qmin, grid.qmax)


def quantize(x: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Return int32 integers; source: ONNX QuantizeLinear. Grids wider than 16 bits are computed in float64."""
    if grid.bits > 16:
        x, qparams = x.double(), QParams(qparams.scale.double(), qparams.zero_point)
    return snap(x.detach(), qparams, grid).to(torch.int32)


def dequantize(integers: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Return float32 values; source: ONNX DequantizeLinear."""
    scale = along(qparams.scale, grid.axis, integers.ndim)
    zero_point = along(qparams.zero_point, grid.axis, integers.ndim)
    # int32 first: torch would keep uint8 when the zero point is a scalar, and wrap below zero
    return (integers.to(torch.int32) - zero_point).to(scale.dtype) * scale


class _FakeQuantize(torch.autograd.Function):
    """`fake_quantize` with its gradient written out: a third of the memory traffic of recording each operation."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
        s, z = _factors(x, scale, zero_point, grid)
        out = _round_in_place(x / s)
        if isinstance(z, Tensor) or z:
            return out.add_(z).clamp_(grid.qmin, grid.qmax).sub_(z).mul_(s)
        return out.clamp_(grid.qmin, grid.qmax).mul_(s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Grid], output: Tensor) -> None:
        x, scale, zero_point, grid = inputs
        s, z = _factors(x, scale, zero_point, grid)
        ctx.grid, ctx.bounds = grid, ((grid.qmin - 0.5 - z) * s, (grid.qmax + 0.5 - z) * s)
        ctx.save_for_backward(x, output, scale)

    @staticmethod
    def vmap(
        _info: Any, in_dims: tuple[int | None, ...], x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
    ) -> tuple[Tensor, int]:
        """Over samples, of which each has the same scale: all of them at once (torch's own rule is many times slower)."""
        if in_dims[0] is None or in_dims[1:3] != (None, None):
            raise RuntimeError("only values can be mapped, not their scales")
        x = x.movedim(in_dims[0], 0)
        if grid.axis is not None:
            grid = replace(grid, axis=grid.axis % (x.ndim - 1) + 1)
        return fake_quantize(x, QParams(scale, zero_point), grid), 0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, out, scale), (low, high) = gradients, ctx.saved_tensors, ctx.bounds
        if _one_number(x, scale):
            inner = torch.ops.aten.hardtanh_backward(gradient, x, low, high)
        else:
            inner = gradient * ((x > low) & (x < high))
        if not ctx.needs_input_grad[1]:
            return inner, None, None, None
        # d out / d scale is (out - x) / scale inside the range, out / scale outside
        if scale.ndim == 0:
            slope = _dot(gradient, out) - _dot(inner, x)
        else:
            axes = [axis for axis in range(x.ndim) if axis != ctx.grid.axis % x.ndim]
            slope = (gradient * out - inner * x).sum(axes) if axes else gradient * out - inner * x
        return inner if ctx.needs_input_grad[0] else None, slope / scale, None, None


def _one_number(x: Tensor, scale: Tensor) -> bool:
    """Whether the scale can be read as a Python number: fewer and faster kernels, but on a GPU it would wait."""
    return scale.ndim == 0 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _factors(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[float, int] | tuple[Tensor, Tensor]:
    """Scale and zero point, as numbers where they can be read as such."""
    if _one_number(x, scale):
        return float(scale), int(zero_point)
    return along(scale, grid.axis, x.ndim), along(zero_point, grid.axis, x.ndim).to(x.dtype)


def flat(x: Tensor) -> Tensor:
    """All elements in memory order, without a copy where the tensor is dense (contiguous or channels last)."""
    if x.ndim == 4 and not x.is_contiguous() and x.permute(0, 2, 3, 1).is_contiguous():
        x = x.permute(0, 2, 3, 1)
    return x.reshape(-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(flat(a), flat(b)) if a.stride() == b.stride() else (a * b).sum()


def fake_quantize(x: Tensor, qparams: QParams, grid: Grid) -> Tensor:
    """Quantize and dequantize: bit-equal to ONNX Runtime's QuantizeLinear -> DequantizeLinear.

    Differentiable in x (zero outside the range) and in the scale (the LSQ gradient, arXiv 1902.08153, without its
    step-size normalisation).
    """
    out: Tensor = _FakeQuantize.apply(x, qparams.scale, qparams.zero_point, grid)  # type: ignore[no-untyped-call]
    return out


def rounding_errors(x: Tensor, scale: Tensor, grid: Grid, out: Tensor) -> Tensor:
    """Squared errors of x on a symmetric grid, whose scale broadcasts against it; written into `out`, which is returned."""
    torch.div(x, scale, out=out)
    return _round_in_place(out).clamp_(grid.qmin, grid.qmax).mul_(scale).sub_(x).square_()


def fake_quantize_bias(bias: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Put a bias on the int32 grid of `scale`; source: ONNX DequantizeLinear of int32.

    Float32 cannot count to 2**31, so the integers are computed in float64 and only then cast, as the runtime casts.
    """
    codes = torch.clamp(round_half_even(bias.double() / scale.double()), grid.qmin, grid.qmax)
    return codes.to(scale.dtype) * scale


def affine_qparams(low: float, high: float, grid: Grid) -> QParams:
    """Scale and zero point whose grid spans [low, high], widened to hold zero exactly; source: ONNX QuantizeLinear."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = torch.tensor(max((high - low) / (grid.qmax - grid.qmin), MIN_SCALE), dtype=torch.float32)
    zero_point = torch.clamp(torch.round(grid.qmin - low / scale.double()), grid.qmin, grid.qmax)
    return QParams(scale, zero_point.to(torch.int32))


def symmetric_qparams(threshold: Tensor, grid: Grid) -> QParams:
    """Per-channel scale whose largest integer is `threshold` (shape [channels] or []), zero point 0."""
    scale = torch.clamp(threshold / grid.qmax, min=MIN_SCALE).to(torch.float32)
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32))
