"""Learned quantizers: rounding parametrisations of weights as a table, activation steps, biases.

All scales are learned as logarithms of a factor on the calibrated one. The integers that a weight stands for never depend on
its learned scale: `weight = scale * codes()`, and codes are final once rounding is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from onnx_eptq import grid as grids
from onnx_eptq.grid import QParams, along
from onnx_eptq.mirror import BiasQuantizer, Quantizer

GAMMA, ZETA = -0.1, 1.1  # the stretched sigmoid reaches 0 and 1 exactly (AdaRound, arXiv 2004.10568)

ROUNDINGS: dict[str, Callable[[Quantizer, Tensor], WeightQuantizer]] = {}


def rounding(name: str) -> Callable[[type[WeightQuantizer]], type[WeightQuantizer]]:
    """Register a rounding parametrisation: a `WeightQuantizer` made from (calibrated quantizer, latent weight)."""

    def register(cls: type[WeightQuantizer]) -> type[WeightQuantizer]:
        ROUNDINGS[name] = cls
        return cls

    return register


class LearnedScale(nn.Module):
    """What learned quantizers share: `scale = calibrated scale * exp(log_factor)`, of shape [] or [channels]."""

    base: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.point = quantizer.point
        self.register_buffer("base", quantizer.scale.clone())
        self.register_buffer("zero_point", quantizer.zero_point.clone())
        self.log_factor = nn.Parameter(torch.zeros_like(quantizer.scale))

    @property
    def scale(self) -> Tensor:
        """The scale in use, positive by construction."""
        return self._learned()

    def _learned(self) -> Tensor:  # a property of a base class is beyond what torch.compile traces
        return self.base * torch.exp(self.log_factor)

    @property
    def qparams(self) -> QParams:
        """The parameters in use."""
        return QParams(self.scale, self.zero_point)


class ActivationQuantizer(LearnedScale):
    """A per-tensor grid with a learned step (LSQ, arXiv 1902.08153).

    `share` of the quantization is applied: 1 all of it; below, `share * q(x) + (1 - share) * x` (gradual activation
    quantization), or, when `drop` is set, q(x) in a random `share` of the elements and x in the others (QDrop,
    arXiv 2203.05740).
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.share, self.drop = 1.0, False

    @property
    def scale(self) -> Tensor:
        """The scale in use; where the grid must reach, it never shrinks much below what calibration may choose."""
        least = 0.9 * self.point.least_scale
        return self._learned().clamp(min=least) if least else self._learned()

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid, as far as `share` says."""
        if self.share <= 0:
            return x
        quantized = grids.fake_quantize(x, self.qparams, self.point.grid)
        if self.share >= 1:
            return quantized
        if self.drop:
            return torch.where(torch.rand_like(x) < self.share, quantized, x)
        return torch.lerp(x, quantized, self.share)


class LearnedBias(nn.Module):
    """A bias on its int32 grid, learned in units of what its layer's outputs typically are (`unit`, [] or shaped like it)."""

    unit: Tensor

    def __init__(self, quantizer: BiasQuantizer, bias: Tensor, unit: Tensor) -> None:
        super().__init__()
        self.point = quantizer.point
        self.register_buffer("unit", unit)
        self.shift = nn.Parameter(torch.zeros_like(bias))

    def forward(self, bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        """Return the shifted bias on its grid."""
        return grids.fake_quantize_bias(self.shifted(bias), input_scale * weight_scale, self.point.grid)

    def shifted(self, bias: Tensor) -> Tensor:
        """The bias before it is put on the grid."""
        return bias + self.unit * self.shift


class WeightQuantizer(LearnedScale):
    """A weight as `scale * codes`; how codes are parametrised is a row of `ROUNDINGS`.

    Made from a calibrated quantizer and a latent weight, whose rounding is the start.
    """

    hardened = False  # set: the forward pass uses the final integers

    def codes(self) -> Tensor:
        """The codes as the forward pass uses them, differentiable."""
        raise NotImplementedError

    def hard(self) -> Tensor:
        """The final integers, as floats."""
        return self.codes().detach()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on its grid."""
        grid = self.point.grid
        codes = self.hard() if self.hardened else self.codes()
        return codes * along(self.scale, grid.axis, weight.ndim)

    def regularizer(self, _beta: float) -> Tensor | None:
        """The sum over elements that is 0 when all of them are decided."""
        return None

    def undecided(self) -> tuple[int, int]:
        """How many elements are not decided yet, of how many."""
        return 0, self.hard().numel()

    def project(self) -> None:
        """Bring parameters back into their range after a step."""


def _in_steps(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """Weight / scale, in float64: near integers float32 could fall on the wrong side."""
    scale = along(quantizer.scale, quantizer.point.grid.axis, weight.ndim)
    return weight.detach().double() / scale.double()


@rounding("latent")
class Latent(WeightQuantizer):
    """Latent weights in steps, rounded with a straight-through gradient: codes may move as far as learning takes them."""

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__(quantizer)
        grid = self.point.grid
        self.limits = (grid.qmin - 0.49, grid.qmax + 0.49)
        self.steps = nn.Parameter(_in_steps(quantizer, weight).clamp(*self.limits).float())

    def codes(self) -> Tensor:
        """Rounded latent weights."""
        return grids.round_half_even(self.steps)

    def project(self) -> None:
        """Keep latent weights within reach of the grid."""
        self.steps.data.clamp_(*self.limits)


@rounding("soft")
class Soft(WeightQuantizer):
    """Soft rounding: floor plus a stretched sigmoid that an annealed regulariser drives to 0 or 1 (AdaRound, EPTQ).

    floor belongs to the calibrated scale; elements whose two candidates both lie outside the grid are frozen.
    """

    floor: Tensor

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__(quantizer)
        grid = self.point.grid
        steps = _in_steps(quantizer, weight).clamp(grid.qmin, grid.qmax)
        floor = torch.floor(steps).clamp(max=grid.qmax - 1)
        rest = (steps - floor).clamp(0, 1)
        self.register_buffer("floor", floor.float())
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1).float())

    def soft(self) -> Tensor:
        """h(alpha) in [0, 1]."""
        return torch.clamp(torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def codes(self) -> Tensor:
        """Floor + h(alpha)."""
        return self.floor + self.soft()

    def hard(self) -> Tensor:
        """floor, plus one where h(alpha) is at least one half."""
        return self.floor + (self.alpha.detach() >= 0)

    def regularizer(self, beta: float) -> Tensor | None:
        """The sum of 1 - |2 h - 1| ** beta (AdaRound, eq. 24)."""
        return (1 - (2 * self.soft() - 1).abs().pow(beta)).sum()

    def undecided(self) -> tuple[int, int]:
        """Elements whose h lies in (0.01, 0.99)."""
        h = self.soft().detach()
        return int(((h > 0.01) & (h < 0.99)).sum()), h.numel()


@rounding("flex")
class Flex(WeightQuantizer):
    """Division by a learned, positive step per element and channel (FlexRound, arXiv 2306.00317)."""

    start: Tensor

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__(quantizer)
        self.register_buffer("start", _in_steps(quantizer, weight).float())
        self.log_divisor = nn.Parameter(torch.zeros_like(self.start))

    def codes(self) -> Tensor:
        """The rounded quotients."""
        grid = self.point.grid
        return torch.clamp(grids.round_half_even(self.start * torch.exp(-self.log_divisor)), grid.qmin, grid.qmax)


@rounding("frozen")
class Frozen(WeightQuantizer):
    """Codes that are final: only scales, biases and steps are left to learn."""

    fixed: Tensor

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__(quantizer)
        grid = self.point.grid
        self.register_buffer("fixed", grids.snap(weight.detach(), quantizer.qparams, grid))

    def codes(self) -> Tensor:
        """The codes of the calibrated weight."""
        return self.fixed


def annealed_beta(step: int, steps: int, warm: float = 0.2, first: float = 20.0, last: float = 2.0) -> float:
    """The regulariser's exponent: `first` for a share `warm` of the steps, then falling linearly to `last`."""
    done = step / max(steps, 1)
    return first if done < warm else first + (done - warm) / (1 - warm) * (last - first)


def cosine(step: int, steps: int, warm: int = 0) -> float:
    """Learning-rate factor: a linear rise over `warm` steps, then half a cosine from 1 to 0."""
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
