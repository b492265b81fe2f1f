"""From data to scales and zero points: `observe` gathers statistics, calibrators turn them into parameters.

Statistics know nothing of bits, so bits may change after them.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnx_eptq.errors import DataError
from onnx_eptq.grid import (
    MIN_SCALE,
    Grid,
    QParams,
    affine_qparams,
    fake_quantize,
    flat,
    rounding_errors,
    symmetric_qparams,
)
from onnx_eptq.mirror import Mirror, Probe
from onnx_eptq.ops import op_of
from onnx_eptq.plan import Layer, Limits, Plan, QuantPoint, is_constant, role_of

log = logging.getLogger(__name__)

BINS = 4096
CHUNK = 2**16  # elements that are worked on together: they stay in the processor's cache
KEPT = 2**26  # numbers that candidates for weights may take in memory
SLACK = 0.05  # an error this much above the least still counts as least: the optimum is flat, saturation is not
LEANINGS = (0.9, 0.5, 0.0)  # how far what elements count may lean on their gradients
MAX_BIAS = 2**30  # leaves the other half of int32 to the sum of products it is added to

Batch = Mapping[str, np.ndarray]
Reader = Callable[[Tensor], Tensor]
Calibrator = Callable[["Histogram", Grid, Limits, Reader], QParams]
WeightCalibrator = Callable[[Tensor, Grid], QParams]
Calibrating = TypeVar("Calibrating", bound=WeightCalibrator)

CALIBRATORS: dict[str, Calibrator] = {}
WEIGHT_CALIBRATORS: dict[str, WeightCalibrator] = {}


def calibrator(name: str) -> Callable[[Calibrator], Calibrator]:
    """Register an activation calibrator: (histogram, grid, limits, reader) -> parameters.

    `reader` is what the value's only reader makes of it, where that reader is elementwise; else the identity.
    """

    def register(function: Calibrator) -> Calibrator:
        CALIBRATORS[name] = function
        return function

    return register


def weight_calibrator(name: str) -> Callable[[Calibrating], Calibrating]:
    """Register a weight calibrator: (weights, grid) -> parameters."""

    def register(function: Calibrating) -> Calibrating:
        WEIGHT_CALIBRATORS[name] = function
        return function

    return register


class Histogram:
    """A streaming histogram of constant size; exact minimum and maximum.

    When data falls outside, the range doubles and neighbouring bins merge, so counts never have to be split and at least half
    of the bins lie inside the data's range.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.min, self.max = float("inf"), float("-inf")
        self.low, self.high = 0.0, 0.0
        self.importance: Tensor | None = None  # what the elements of each bin count together, from `hessian`
        self.leaning = LEANINGS[0]  # how far that decides, rather than the number of elements

    def update(self, x: Tensor) -> None:
        """Add every element of x; an empty tensor adds nothing."""
        if x.numel() == 0:
            return
        low, high = (float(bound) for bound in torch.aminmax(x))
        if math.isnan(low):
            raise DataError("is not a number (NaN)")
        if math.isinf(low) or math.isinf(high):  # infinities saturate on any grid
            self.update(x[torch.isfinite(x)])
            return
        first = self.min > self.max
        self.min, self.max = min(self.min, low), max(self.max, high)
        if first:
            self.low, self.high = low, high if high > low else low + max(abs(low), 1.0) * 1e-6
        self._cover(low, high)
        self.counts += self.tally(flat(x))

    def _cover(self, low: float, high: float) -> None:
        half = self.counts.numel() // 2
        while low < self.low or high > self.high:
            merged, width = self.counts.reshape(half, 2).sum(1), self.high - self.low
            self.counts = torch.zeros_like(self.counts)
            if high > self.high:
                self.counts[:half], self.high = merged, self.low + 2 * width
            else:
                self.counts[half:], self.low = merged, self.high - 2 * width

    def tally(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """How many elements of x fall into each bin, or what they count together; float64, on the CPU."""
        total = torch.zeros_like(self.counts)
        size = CHUNK if x.device.type == "cpu" else max(1, x.numel())
        parts = torch.split(x.reshape(-1), size)
        weights = [None] * len(parts) if counts is None else torch.split(counts.reshape(-1), size)
        for part, weight in zip(parts, weights, strict=True):
            total += torch.bincount(self.bins_of(part), weight, len(total)).cpu()
        return total

    def bins_of(self, x: Tensor) -> Tensor:
        """The bin of every element of x; the outermost ones take what lies outside the range."""
        low, high = torch.tensor([self.low, self.high], dtype=torch.float32, device=x.device)
        bins, width = self.counts.numel(), (high - low).clamp(min=1e-30)
        places: Tensor = (x.float() - low).mul_(bins).div_(width).nan_to_num_().clamp_(0, bins - 1)
        return places.int()

    def weighted(self) -> Histogram:
        """The same data with elements that count by their importance and, a little, all alike."""
        if self.importance is None or self.leaning == 0:
            return self
        found = copy.copy(self)
        found.counts = (1 - self.leaning) * self.counts / self.counts.sum() + self.leaning * self.importance
        return found

    @property
    def centers(self) -> Tensor:
        """The middle of every bin, float64."""
        bins = self.counts.numel()
        return self.low + (torch.arange(bins, dtype=torch.float64) + 0.5) * (self.high - self.low) / bins


@dataclass
class Stats:
    """What `observe` saw: a histogram per quantized activation, the mean (over samples) of every linear layer's input."""

    histograms: dict[str, Histogram] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0

    @property
    def is_weighed(self) -> bool:
        """Whether anything is known of how much elements count."""
        return any(histogram.importance is not None for histogram in self.histograms.values())

    def lean(self, leaning: float) -> None:
        """Say how far elements count by their importance (1) rather than all alike (0)."""
        for histogram in self.histograms.values():
            histogram.leaning = leaning


class _Mean:
    """Running mean over axis 0; samples of another shape than the first are left out."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def update(self, x: Tensor) -> None:
        part = x.double().sum(0)
        if self.total is None:
            self.total = torch.zeros_like(part)
        if part.shape == self.total.shape:
            self.total, self.count = self.total + part, self.count + len(x)

    @property
    def value(self) -> Tensor:
        assert self.total is not None
        return (self.total / self.count).float().unsqueeze(0)


def feed(mirror: Mirror, batch: Batch) -> list[Tensor]:
    """The batch as positional tensors on the mirror's device; a sample that is fed alone gets a batch axis."""
    device = next((parameter.device for parameter in mirror.parameters()), torch.device("cpu"))
    tensors = [torch.from_numpy(np.asarray(batch[name], order="C")).to(device) for name in mirror.input_names]
    return [x[None] for x in tensors] if mirror.whole else tensors


@torch.no_grad()
def observe(teacher: Mirror, plan: Plan, layers: Iterable[Layer], batches: Iterable[Batch]) -> Stats:
    """Run the float model over all batches and gather statistics; memory is constant in the number of samples."""
    shared = {p.value: p.tied_to or p.value for p in plan.values() if p.role == "activation" and not p.moved}
    histograms = {root: Histogram() for value, root in shared.items() if value == root}
    means = {layer.source.name: _Mean() for layer in layers if layer.bias is not None}
    stats = Stats(histograms)

    def see(value: str, x: Tensor) -> Tensor:
        if value in shared:
            try:
                histograms[shared[value]].update(x)
            except DataError as error:
                raise DataError(
                    f"the value '{value}' {error} on the calibration data; check the data and the model"
                ) from None
        if value in means and x.ndim:
            means[value].update(x)
        return x

    probe = Probe(teacher, see)
    for batch in batches:
        inputs = feed(teacher, batch)
        probe.run(*inputs)
        stats.samples += len(inputs[0]) if inputs[0].ndim else 1
    stats.means = {value: mean.value for value, mean in means.items() if mean.count}
    return stats


def _bounded(histogram: Histogram, limits: Limits) -> tuple[float, float]:
    """The range seen, within what the producing operator guarantees, widened to zero."""
    low = histogram.min if limits[0] is None else max(histogram.min, limits[0])
    high = histogram.max if limits[1] is None else min(histogram.max, limits[1])
    return min(low, 0.0), max(high, 0.0)


@calibrator("minmax")
def minmax(histogram: Histogram, grid: Grid, limits: Limits, reader: Reader = torch.clone) -> QParams:
    """The whole range that was seen."""
    return affine_qparams(*_bounded(histogram, limits), grid)


@calibrator("percentile")
def percentile(
    histogram: Histogram, grid: Grid, limits: Limits, reader: Reader = torch.clone, share: float = 0.9999
) -> QParams:
    """The range that holds `share` of all elements, cutting the same number at either end."""
    low, high = _bounded(histogram, limits)
    cumulated = torch.cumsum(histogram.counts, 0) / histogram.counts.sum()
    width = (histogram.high - histogram.low) / histogram.counts.numel()
    first = int(torch.searchsorted(cumulated, torch.tensor((1 - share) / 2, dtype=torch.float64)))
    last = int(torch.searchsorted(cumulated, torch.tensor(1 - (1 - share) / 2, dtype=torch.float64)))
    return affine_qparams(max(low, histogram.low + first * width), min(high, histogram.low + (last + 1) * width), grid)


def _affine_candidates(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zero points (float64, shape [candidates]) exactly as `affine_qparams` makes them."""
    scale = torch.clamp((high - low) / (grid.qmax - grid.qmin), min=MIN_SCALE).float().double()
    zero_point = torch.clamp(torch.round(grid.qmin - low / scale), grid.qmin, grid.qmax)
    return scale, zero_point


def _histogram_error(histogram: Histogram, scale: Tensor, zero_point: Tensor, grid: Grid, reader: Reader) -> Tensor:
    """Mean squared error behind `reader` of quantizing the histogram's data, per candidate; bins count with their centers."""
    used = histogram.counts > 0
    x, weight = histogram.centers[used], histogram.counts[used]
    exact = reader(x)
    errors = []
    for s, z in zip(torch.split(scale, 64), torch.split(zero_point, 64), strict=True):
        s, z = s[:, None], z[:, None]
        snapped = (torch.clamp(torch.round(x / s) + z, grid.qmin, grid.qmax) - z) * s
        errors.append(((reader(snapped) - exact) ** 2 * weight).sum(1))
    return torch.cat(errors) / weight.sum()


@calibrator("mse")
def mse(
    histogram: Histogram, grid: Grid, limits: Limits, reader: Reader = torch.clone, rounds: int = 3, points: int = 12
) -> QParams:
    """The range of least mean squared error behind `reader`: a grid search over both ends, refined around the best.

    Of the ranges about as good, on the way from there to the whole range, the widest: what saturates is lost for good,
    while rounding errors average out in the sums that follow.
    """
    low, high = _bounded(histogram, limits)
    if low == high:
        return affine_qparams(low, high, grid)
    best_low, best_high, reach = 0.55, 0.55, 0.45  # shares of the two ends; covers (0.1, 1)
    for _ in range(rounds):
        steps = torch.linspace(-reach, reach, points, dtype=torch.float64)
        lows = (best_low + steps).clamp(1e-3, 1) if low < 0 else torch.zeros(1, dtype=torch.float64)
        highs = (best_high + steps).clamp(1e-3, 1) if high > 0 else torch.zeros(1, dtype=torch.float64)
        pairs = torch.cartesian_prod(lows, highs)
        scale, zero_point = _affine_candidates(pairs[:, 0] * low, pairs[:, 1] * high, grid)
        best = int(torch.argmin(_histogram_error(histogram, scale, zero_point, grid, reader)))
        best_low, best_high = float(pairs[best, 0]), float(pairs[best, 1])
        reach *= 2.5 / points
    wider = torch.linspace(0, 1, 33, dtype=torch.float64)
    lows, highs = (best_low + (1 - best_low) * wider) * low, (best_high + (1 - best_high) * wider) * high
    errors = _histogram_error(histogram, *_affine_candidates(lows, highs, grid), grid, reader)
    last = int(torch.nonzero(errors <= errors[0] * (1 + SLACK)).max())
    return affine_qparams(float(lows[last]), float(highs[last]), grid)


@calibrator("hmse")
def hmse(histogram: Histogram, grid: Grid, limits: Limits, reader: Reader = torch.clone) -> QParams:
    """As `mse`, but errors count by the Label-Free Hessian of their elements: what no output answers to may saturate."""
    return mse(histogram.weighted(), grid, limits, reader)


@calibrator("entropy")
def entropy(
    histogram: Histogram, grid: Grid, limits: Limits, reader: Reader = torch.clone, points: int = 64
) -> QParams:
    """The range whose quantized distribution has the least Kullback-Leibler divergence from the data's.

    Both ends shrink together; data beyond them counts in the outermost levels, as it does when it saturates.
    """
    low, high = _bounded(histogram, limits)
    if low == high:
        return affine_qparams(low, high, grid)
    # Zero lies on every grid: the many zeros behind a Relu say nothing about the range.
    bin_width = (histogram.high - histogram.low) / histogram.counts.numel()
    used = (histogram.counts > 0) & (histogram.centers.abs() > bin_width)
    x, p = histogram.centers[used], histogram.counts[used] / histogram.counts[used].sum()
    shares = torch.linspace(1.0, 0.1, points, dtype=torch.float64)
    scales, zero_points = _affine_candidates(shares * low, shares * high, grid)
    divergence = []
    for scale, zero_point in zip(scales, zero_points, strict=True):
        level = torch.clamp(torch.round(x / scale) + zero_point, grid.qmin, grid.qmax).long() - grid.qmin
        inside = (torch.round(x / scale) + zero_point >= grid.qmin) & (torch.round(x / scale) + zero_point <= grid.qmax)
        levels = grid.qmax - grid.qmin + 1
        mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, p)
        members = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside.double()).clamp(min=1)
        # A saturated bin is reproduced with a vanishing probability: clipping must cost.
        q = torch.where(inside, mass[level] / members[level], torch.tensor(1e-12, dtype=torch.float64))
        divergence.append((p * torch.log(p / (q / q.sum()))).sum())
    best = shares[int(torch.argmin(torch.stack(divergence)))]
    return affine_qparams(float(best * low), float(best * high), grid)


def _rows(weight: Tensor, grid: Grid) -> Tensor:
    """The weight as [channels, elements]; one row when the grid is per tensor."""
    return (
        weight.reshape(1, -1)
        if grid.axis is None
        else weight.movedim(grid.axis, 0).reshape(weight.shape[grid.axis], -1)
    )


@weight_calibrator("absmax")
def absmax(weight: Tensor, grid: Grid) -> QParams:
    """The largest magnitude of a channel becomes the largest integer."""
    threshold = _rows(weight, grid).abs().amax(1)
    return symmetric_qparams(threshold if grid.axis is not None else threshold[0], grid)


def _share_of_absmax(share: float, weight: Tensor, grid: Grid) -> QParams:
    qparams = absmax(weight, grid)
    return QParams(qparams.scale * share, qparams.zero_point)


SHARES = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.14)  # 8/7: the largest magnitude lands on -8


@weight_calibrator("mse")
def weight_mse(weight: Tensor, grid: Grid, points: int = 60, importance: Tensor | None = None) -> QParams:
    """The threshold of least squared error per channel, among shares 0.2 to 1.1 of the largest magnitude.

    `importance`, shaped like the weight, is what each element's error counts (all the same by default).
    """
    rows = _rows(weight, grid).contiguous()
    counts = None if importance is None else _rows(importance, grid)
    largest = rows.abs().amax(1)
    limits = [largest * share for share in torch.linspace(1.1, 0.2, points).tolist()]
    scales = [symmetric_qparams(limit, Grid(grid.bits, grid.signed, 0)).scale[:, None] for limit in limits]
    best, chosen = torch.full_like(largest, float("inf")), largest.clone()
    step = max(1, CHUNK // max(1, rows.shape[1]))
    for some in (slice(start, start + step) for start in range(0, len(rows), step)):
        error = torch.empty_like(rows[some])
        for limit, scale in zip(limits, scales, strict=True):
            rounding_errors(rows[some], scale[some], grid, error)
            total = (error if counts is None else error * counts[some]).sum(1)
            better = total < best[some]
            best[some] = torch.where(better, total, best[some])
            chosen[some] = torch.where(better, limit[some], chosen[some])
    return symmetric_qparams(chosen if grid.axis is not None else chosen[0], grid)


def elementwise_readers(graph: gs.Graph) -> dict[str, Reader]:
    """What elementwise operators make of the values that they alone read."""
    found: dict[str, Reader] = {}
    for node in graph.nodes:
        parameters = node.inputs[1:]
        if not op_of(node).unary or len(node.inputs[0].outputs) != 1 or not all(map(is_constant, parameters)):
            continue
        numbers = [
            float(np.asarray(tensor.values).reshape(-1)[0]) for tensor in parameters if np.size(tensor.values) == 1
        ]
        if len(numbers) == len(parameters):
            value = node.inputs[0]
            reader = partial(_read, op_of(node).function, numbers, dict(node.attrs))
            found[value.name] = reader
            while (
                value.inputs and role_of(value.inputs[0]) == "same_grid" and len(value.inputs[0].inputs[0].outputs) == 1
            ):
                value = value.inputs[0].inputs[0]  # a Reshape in between moves elements, no more
                found[value.name] = reader
    return found


def _read(function: Reader, parameters: list[float], attributes: dict[str, object], x: Tensor) -> Tensor:
    return function(x, *parameters, **attributes)


def calibrate(
    plan: Plan, stats: Stats, mirror: Mirror, method: str = "mse", seen: Mapping[str, Reader] | None = None
) -> dict[str, QParams]:
    """Parameters of every planned activation, constant operand and weight (weights: abs-max, to be refined).

    `seen`: what the only reader of a value makes of it, as `elementwise_readers` returns it.
    """
    qparams: dict[str, QParams] = {}
    for value, point in plan.items():
        if point.role == "weight":
            qparams[value] = absmax(mirror.constant(value).cpu(), point.grid)
        elif point.role == "constant":
            data = mirror.constant(value)
            low, high = (float(data.min()), float(data.max())) if data.numel() else (0.0, 0.0)
            qparams[value] = affine_qparams(low, high, point.grid)
        elif point.role == "activation" and not point.tied_to:
            histogram = stats.histograms[value]
            if histogram.min > histogram.max:
                log.warning("no data reached '%s'; its scale is 1", value)
                histogram.update(torch.tensor([0.0, 255.0]))
            if (
                histogram.min == histogram.max == 0
            ):  # a state before the first step: what it will be in use is not known
                low, high = (
                    end if end is not None else other for end, other in zip(point.limits, (-1.0, 1.0), strict=True)
                )
                qparams[value] = affine_qparams(max(low, -1.0), min(high, 1.0), point.grid)
                continue
            chosen = CALIBRATORS["minmax" if point.whole_range else method]
            qparams[value] = chosen(histogram, point.grid, point.limits, (seen or {}).get(value, torch.clone))
            if float(qparams[value].scale) < point.least_scale:
                qparams[value] = affine_qparams(min(histogram.min, 0.0), point.reach, point.grid)
    return qparams


def _candidates(method: str, point: QuantPoint) -> list[WeightCalibrator]:
    """The weight calibrators that compete; from 7 bits on, shares of abs-max win nothing and only cost time."""
    if method != "output":
        return [WEIGHT_CALIBRATORS[method]]
    shares = [partial(_share_of_absmax, share) for share in SHARES] if point.grid.bits < 7 else []
    return [*WEIGHT_CALIBRATORS.values(), *shares]


def apply_linear(layer: Layer, x: Tensor, weight: Tensor, **changed: Any) -> Tensor:
    """The layer's operator without its bias, with other attributes where `changed` names them."""
    function = op_of(layer.node).function
    attributes = {name: tuple(v) if isinstance(v, list) else v for name, v in layer.node.attrs.items()}
    args = (weight, x) if layer.node.inputs[0] is layer.weight else (x, weight)
    result: Tensor = function(*args, **attributes | changed)
    return result


def _channels(layer: Layer, output: Tensor) -> Tensor:
    """The layer's output as [channels, everything else]."""
    return output.movedim(layer.output_axis, 0).flatten(1)


@torch.no_grad()
def choose_weight_scales(
    teacher: Mirror,
    plan: Plan,
    layers: Iterable[Layer],
    batches: Iterable[Batch],
    method: str = "output",
) -> dict[str, QParams]:
    """Weight parameters by one of `WEIGHT_CALIBRATORS`, or by `output`, which compares them and more.

    `output` takes, per channel, among abs-max, the least squared error and a range of shares of abs-max the one whose
    rounding disturbs the layer's output least on the given batches.
    Where the layer has a bias, only the spread of the error counts: its mean is what bias correction removes.
    """
    users: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.weight.name in plan:
            users.setdefault(layer.weight.name, []).append(layer)
    candidates = {
        name: [
            candidate(teacher.constant(name).cpu(), plan[name].grid) for candidate in _candidates(method, plan[name])
        ]
        for name in users
    }
    if all(len(options) == 1 for options in candidates.values()):
        return {name: options[0] for name, options in candidates.items()}
    by_source: dict[str, list[Layer]] = {}
    for layer in (layer for group in users.values() for layer in group):
        by_source.setdefault(layer.source.name, []).append(layer)

    def deltas(name: str) -> Iterator[Tensor]:
        weight = teacher.constant(name)
        for option in candidates[name]:
            on_device = QParams(*(part.to(weight.device) for part in option))
            yield fake_quantize(weight, on_device, plan[name].grid) - weight

    # Together they are a dozen times as large as the model: those of a large one are made anew for every batch.
    size = sum(teacher.constant(name).numel() * len(options) for name, options in candidates.items())
    kept = {name: list(deltas(name)) for name in candidates} if size <= KEPT else {}
    errors: dict[str, Tensor] = {}

    def see(value: str, x: Tensor) -> Tensor:
        for layer in by_source.get(value, ()) if x.numel() else ():
            changes = kept.get(layer.weight.name) or deltas(layer.weight.name)
            found = [_disturbance(layer, apply_linear(layer, x, delta)) for delta in changes]
            per_channel = torch.stack(found).double().cpu()
            if plan[layer.weight.name].grid.axis is None:
                per_channel = per_channel.sum(1, keepdim=True)
            errors[layer.weight.name] = errors.get(layer.weight.name, 0) + per_channel
        return x

    probe = Probe(teacher, see)
    for batch in batches:
        probe.run(*feed(teacher, batch))
    return {name: _pick(options, errors.get(name), plan[name].grid) for name, options in candidates.items()}


def _disturbance(layer: Layer, error: Tensor) -> Tensor:
    """Mean squared output error per channel; about its mean, where the bias will take that up."""
    error = error if error.ndim > 1 else error.reshape(1, -1)  # a product with a vector has no axis but the samples
    others = [axis for axis in range(error.ndim) if axis != layer.output_axis % error.ndim]
    power: Tensor = torch.linalg.vector_norm(error, dim=others).square() * (
        error.shape[layer.output_axis] / error.numel()
    )
    return power if layer.bias is None else power - error.mean(others).square()


def _pick(options: list[QParams], errors: Tensor | None, grid: Grid) -> QParams:
    """Per channel the option of least error; the last one where no data arrived."""
    if errors is None:
        return options[-1]
    best = errors.argmin(0)
    scales = torch.stack([option.scale.reshape(-1) for option in options])
    scale = scales.gather(0, best[None])[0]
    return QParams(scale if grid.axis is not None else scale[0], options[0].zero_point)


@torch.no_grad()
def correct_biases(student: Mirror, teacher: Mirror, plan: Plan, layers: Iterable[Layer], stats: Stats) -> int:
    """Add to every bias the mean output error of its layer's rounded weights; returns how many biases changed.

    Analytic: linear operators commute with the mean, so E[op(x, W - Wq)] = op(E[x], W - Wq), padding included.
    """
    corrected = 0
    for layer in layers:
        if layer.bias is None or layer.bias.name not in plan or layer.source.name not in stats.means:
            continue
        if layer.node.attrs.get("transA", 0):  # its means are over features, not over samples
            continue
        weight = teacher.constant(layer.weight.name)
        rounded = student.quantizer(layer.weight.name)(weight)
        mean = stats.means[layer.source.name].to(weight.device)
        shift = _channels(layer, apply_linear(layer, mean, weight - rounded)).mean(1)
        bias = student.constant(layer.bias.name)
        bias.copy_(teacher.constant(layer.bias.name) + shift.reshape(bias.shape))
        corrected += 1
    return corrected


@torch.no_grad()
def fit_biases(student: Mirror, plan: Plan) -> list[str]:
    """Raise scales so that every bias fits its int32 grid with room for the products; returns the values touched.

    A channel of (nearly) zero weights has a tiny scale, and its bias would overflow `bias / (s_x * s_w)`: the scale of the
    weight is raised. Where layers share a weight, the widest of their inputs decides that; narrower ones are raised instead,
    as what one of them sees must not cost the others their weights.
    """
    touched = set()
    readers: dict[tuple[str, str], list[Tensor]] = {}
    for point in plan.values():
        if point.scale_from is not None:
            readers.setdefault(point.scale_from, []).append(student.constant(point.value).abs() / MAX_BIAS)
    sources: dict[str, list[str]] = {}
    for pair in readers:
        sources.setdefault(pair[1], []).append(pair[0])
    for name, names in sources.items():
        weight = student.scale(name)
        widest = max((student.scale(source) for source in names), key=float)
        for least in (least for source in names for least in readers[source, name]):
            needed = least / widest
            needed = needed if plan[name].grid.axis is not None else needed.max()
            if bool((needed > weight).any()):
                weight.copy_(torch.maximum(weight, needed))
                touched.add(name)
        for source in names:
            scale = student.scale(source)
            needed = torch.stack([(least / weight).max() for least in readers[source, name]]).max()
            if scale < widest and needed > scale:
                scale.copy_(needed)
                touched.add(source)
    return sorted(touched)
