"""Even out the channels of a value before it gets one grid: factors move from the layer that makes it to those that read it.

Cross-layer equalisation (arXiv 1906.04721) and SmoothQuant (arXiv 2211.10438) on one table of places. Between a linear layer
or a normalisation with an affine part and the linear layers behind it, a channel may be divided by any positive number if
the readers' weights are multiplied by it: `W @ x = (W * s) @ (x / s)`. Factors are powers of two, so that the float network
computes the same numbers, bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnx_eptq.calibrate import absmax, apply_linear, feed
from onnx_eptq.grid import Grid, affine_qparams, along, fake_quantize
from onnx_eptq.mirror import Mirror, Probe
from onnx_eptq.ops import op_of
from onnx_eptq.plan import Layer, Plan, is_constant

log = logging.getLogger(__name__)

# How much of the spread of a value's channels, and of the readers' weights, goes into the factors.
EXPONENTS = ((0.25, 0.0), (0.5, 0.0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 0.0))
RANGES = (1.0, 0.8, 0.6, 0.4)  # shares of the range that compete, as calibration would cut outliers off
MILDER = 0.7  # of the error that milder factors leave: wilder ones must leave less, as few samples show the extremes
HOPELESS = 2.0  # times the least error so far: such factors are not tried on more samples
MOST_WORK = 2**28  # multiplications of a reader, about, before what is hopeless is looked for again
GAIN = 0.9  # of the error that is left at most: less is not worth a change
REACH = 8  # powers of two that a factor may be away from the middle


@dataclass(frozen=True)
class Maker:
    """A constant with one number (or slice) per channel along `axis`, for the value's channels from `first` on."""

    constant: gs.Constant
    axis: int
    first: int = 0

    def own(self, factors: Tensor) -> Tensor:
        """The factors of its channels, shaped to divide it by."""
        shape = self.constant.shape
        return along(factors[self.first : self.first + shape[self.axis]], self.axis, len(shape))


@dataclass(frozen=True)
class Place:
    """A value whose channels (along `axis`) can be scaled.

    `makers` are the constants that are divided by the factors; `readers` the linear layers that read the value, and nothing
    else does.
    """

    value: str
    axis: int
    makers: tuple[Maker, ...]
    readers: tuple[Layer, ...]


@dataclass(frozen=True)
class Equalized:
    """What was done at a place: the factors' spread (largest by smallest), and the readers' error after by before."""

    value: str
    spread: float
    error: float


def find_places(graph: gs.Graph, layers: Sequence[Layer], plan: Plan) -> list[Place]:
    """All places of a prepared graph whose value and whose readers' weights are quantized."""
    made = {layer.output.name: layer for layer in layers}
    outputs = {id(tensor) for tensor in graph.outputs}
    by_source: dict[str, list[Layer]] = {}
    for layer in layers:
        by_source.setdefault(layer.source.name, []).append(layer)
    places = []
    for value, readers in by_source.items():
        source = readers[0].source
        if value not in plan or source.shape is None or len(source.outputs) != len(readers):
            continue
        axes = {_read_axis(layer) for layer in readers}
        if len(axes) != 1 or None in axes or any(layer.weight.name not in plan for layer in readers):
            continue
        axis = next(iter(axes))
        assert axis is not None
        makers = _makers(source, axis, made, outputs)
        channels = source.shape[axis]
        if makers and isinstance(channels, int) and all(_fits(layer, channels) for layer in readers):
            places.append(Place(value, axis, makers, tuple(readers)))
    return places


def _read_axis(layer: Layer) -> int | None:
    """The axis of a layer's input that holds the channels it sums over; linear operators keep it where their output's is."""
    if layer.axis is None or layer.node.attrs.get("transA", 0) or layer.source.shape is None:
        return None
    return layer.output_axis % len(layer.source.shape)


def _fits(layer: Layer, channels: int) -> bool:
    weight = layer.weight.shape
    assert layer.axis is not None
    return len(layer.weight.outputs) == 1 and weight[1 - layer.axis] * layer.node.attrs.get("group", 1) == channels


def _makers(tensor: gs.Tensor, axis: int, made: dict[str, Layer], outputs: set[int]) -> tuple[Maker, ...]:
    """The constants that scale the channels of `tensor`, across operators that keep channels apart; none: ()."""
    channels = tensor.shape[axis] if tensor.shape is not None else None
    while id(tensor) not in outputs and tensor.inputs and tensor.shape is not None and tensor.shape[axis] == channels:
        if tensor.name in made:
            layer = made[tensor.name]
            adds = layer.node.inputs[2:3]  # of a Gemm or a convolution; one that is computed could not be scaled
            if any(not bias.is_empty() and not is_constant(bias) for bias in adds):
                return ()
            if layer.axis is None or layer.output_axis % len(tensor.shape) != axis:
                return ()
            biases = [Maker(layer.bias, -1)] if layer.bias is not None else []
            return _sole([Maker(layer.weight, layer.axis), *biases], channels)
        node = tensor.inputs[0]
        if op_of(node).joins:
            return _joined(node, axis, made, outputs)
        affine = [Maker(node.inputs[i], -1) for i in op_of(node).affine if i < len(node.inputs)]
        if affine:
            here = op_of(node).output_axis % len(tensor.shape) == axis
            return _sole(affine, channels) if here else ()
        before = _axis_before(node, axis)
        if before is None or len(node.inputs[0].outputs) != 1:
            return ()
        tensor, axis = node.inputs[0], before
    return ()


def _sole(makers: list[Maker], channels: Any) -> tuple[Maker, ...]:
    """The constants, if each has one number (or slice) per channel and nothing else reads it."""
    sound = all(
        is_constant(maker.constant)
        and len(maker.constant.outputs) == 1
        and maker.constant.shape
        and maker.constant.shape[maker.axis] == channels
        for maker in makers
    )
    return tuple(makers) if sound else ()


def _joined(node: gs.Node, axis: int, made: dict[str, Layer], outputs: set[int]) -> tuple[Maker, ...]:
    """The constants that scale the channels of all parts of a Concat, which lie behind each other or are the same."""
    found: list[Maker] = []
    first = 0
    for part in node.inputs:
        makers = _makers(part, axis, made, outputs) if len(part.outputs) == 1 else ()
        if not makers:
            return ()
        found += [replace(maker, first=first + maker.first) for maker in makers]
        if node.attrs["axis"] % len(part.shape) == axis:
            first += part.shape[axis]
    return tuple(found)


def _axis_before(node: gs.Node, axis: int) -> int | None:
    """Where the channels along `axis` of the node's output lie in its input, if scaling them passes through it."""
    carries, shape = op_of(node).carries, node.inputs[0].shape
    if carries is None or shape is None:
        return None
    found = (i for i in range(len(shape)) if carries(node.attrs, i, shape, node.outputs[0].shape) == axis)
    return next(found, None)


def scaled_weight(layer: Layer, weight: Tensor, factors: Tensor) -> Tensor:
    """The weight with its input channels multiplied by `factors` [channels]."""
    groups = int(layer.node.attrs.get("group", 1))
    assert layer.axis is not None
    if groups == 1:
        return weight * along(factors, 1 - layer.axis, weight.ndim)
    parted = weight.reshape(groups, -1, *weight.shape[1:])
    return (parted * factors.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)


def _columns(layer: Layer, weight: Tensor) -> Tensor:
    """Per input channel, the largest weight in units of its output channel's largest: [channels]."""
    groups = int(layer.node.attrs.get("group", 1))
    assert layer.axis is not None
    others = [axis for axis in range(weight.ndim) if axis != layer.axis]
    relative = weight.abs() / weight.abs().amax(others, keepdim=True).clamp(min=1e-12)
    if groups == 1:
        return relative.amax([axis for axis in range(weight.ndim) if axis != 1 - layer.axis])
    parted = relative.reshape(groups, -1, *relative.shape[1:])
    return parted.amax([1, *range(3, parted.ndim)]).reshape(-1)


def candidates(place: Place, seen: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Factors to try, powers of two [channels], all ones first.

    Args:
        place: where.
        seen: the largest magnitude of each of the value's channels.
        weights: of the readers.
    """
    columns = torch.stack([_columns(layer, weight) for layer, weight in zip(place.readers, weights, strict=True)]).amax(
        0
    )
    alive = (seen > 1e-6 * seen.max()) & (columns > 1e-6)
    found = [torch.ones_like(seen)]
    if not alive.any():
        return found
    spread = [torch.where(alive, x.clamp(min=1e-20).log2(), torch.zeros_like(x)) for x in (seen, columns)]
    spread = [torch.where(alive, x - x[alive].median(), torch.zeros_like(x)) for x in spread]
    for of_value, of_weights in EXPONENTS:
        factors = 2.0 ** (of_value * spread[0] - of_weights * spread[1]).round().clamp(-REACH, REACH)
        if not any(torch.equal(factors, other) for other in found):
            found.append(factors)
    return found


class _Trial:
    """The readers' errors at one place, for each candidate and range."""

    def __init__(
        self, place: Place, plan: Plan, teacher: Mirror, ends: tuple[Tensor, Tensor], importance: Mapping[str, Tensor]
    ) -> None:
        low, high = ends
        self.place, self.grid = place, plan.root(place.value).grid
        self.importance = [importance.get(layer.output.name) for layer in place.readers]
        self.weights = [teacher.constant(layer.weight.name) for layer in place.readers]
        self.factors = candidates(place, torch.maximum(low.abs(), high.abs()), self.weights)
        self.options = []
        for factors in self.factors:
            least, most = float((low / factors).min()), float((high / factors).max())
            grids = [affine_qparams(least * share, most * share, self.grid) for share in RANGES]
            rounded = [
                _rounded(scaled_weight(layer, weight, factors), plan[layer.weight.name].grid)
                for layer, weight in zip(place.readers, self.weights, strict=True)
            ]
            self.options.append((factors, grids, rounded))
        self.errors = torch.zeros(2, len(self.factors), len(RANGES), dtype=torch.float64)
        # What is still in the running; the first, without factors, is what all the rest is measured by.
        self.open = list(range(len(self.factors)))

    def see(self, x: Tensor) -> None:
        """Add the errors of one batch, part by part where it is large, so that what is hopeless is not tried on all of it."""
        work = sum(weight.numel() for weight in self.weights) * x.numel() / x.shape[self.place.axis]
        for part in x.tensor_split(min(len(x), max(1, round(work / MOST_WORK)))) if self.place.axis else [x]:
            self._add(part)

    def _add(self, x: Tensor) -> None:
        """Add the errors of some samples: in units of the reader's output, and by what they count where that is known."""
        exact = [apply_linear(layer, x, w) for layer, w in zip(self.place.readers, self.weights, strict=True)]
        for i in self.open:
            factors, grids, rounded = self.options[i]
            scaled = x / along(factors, self.place.axis, x.ndim)
            for j, qparams in enumerate(grids):
                quantized = fake_quantize(scaled, qparams, self.grid)
                for layer, weight, y, counts in zip(self.place.readers, rounded, exact, self.importance, strict=True):
                    error = (apply_linear(layer, quantized, weight) - y).square()
                    self.errors[0, i, j] += float(error.mean() / y.square().mean().clamp(min=1e-20))
                    if counts is not None:
                        by_channel = error.movedim(layer.output_axis, 0)
                        means = by_channel.reshape(len(by_channel), -1).mean(1)
                        self.errors[1, i, j] += float(means.double() @ counts)
        shares = self._shares()
        hopeless = [i for i in self.open[1:] if shares[i] > HOPELESS * shares.min()]
        self.errors[:, hopeless] = math.inf
        self.open = [i for i in self.open if i not in hopeless]

    def _shares(self) -> Tensor:
        """What each candidate leaves of the error that is there without factors: the larger share of the two errors."""
        least = self.errors.amin(2)
        known = [error / error[0] for error in least if 0 < error[0] < math.inf]
        return torch.stack(known).amax(0).nan_to_num(math.inf) if known else torch.ones(len(self.factors))

    def best(self) -> tuple[Tensor, float] | None:
        """The best factors and the share of the error without any that they leave; None if that gains too little.

        Both errors must fall, as gradients are a linear approximation, and large channels are not all that counts.
        """
        shares = self._shares()
        if shares.min() >= GAIN:
            return None
        near = [i for i, share in enumerate(shares) if share < GAIN and MILDER * share <= shares.min()]
        chosen = min(near, key=lambda i: float(self.factors[i].log2().abs().sum()))
        return self.factors[chosen], float(shares[chosen])


def _rounded(weight: Tensor, grid: Grid) -> Tensor:
    return fake_quantize(weight, absmax(weight, grid), grid)


@torch.no_grad()
def equalize(
    graph: gs.Graph,
    teacher: Mirror,
    plan: Plan,
    layers: Sequence[Layer],
    batches: Iterable[dict[str, np.ndarray]],
    importance: Mapping[str, Tensor] | None = None,
) -> list[Equalized]:
    """Scale channels wherever that lowers the error of the layers behind; the graph's constants are changed in place.

    Args:
        graph: the prepared graph; it computes the same afterwards.
        teacher: its float mirror, which keeps the old constants: build another one.
        plan: where quantizers sit and how wide they are.
        layers: the graph's linear layers.
        batches: samples to choose by, read twice.
        importance: what errors count in the channels of the layers' outputs, by output; those of a place's readers are known
            all or not at all.
    """
    places = {place.value: place for place in find_places(graph, layers, plan)}
    if not places:
        return []
    ends: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(value: str, x: Tensor) -> Tensor:
        if value in places and x.numel():
            channels = x.movedim(places[value].axis, 0)
            rows = channels.reshape(len(channels), -1)
            low, high = rows.amin(1), rows.amax(1)
            if value in ends:
                low, high = torch.minimum(low, ends[value][0]), torch.maximum(high, ends[value][1])
            ends[value] = low, high
        return x

    _run(teacher, observe, batches)
    trials = {
        value: _Trial(places[value], plan, teacher, ends[value], importance or {}) for value in places if value in ends
    }

    def compare(value: str, x: Tensor) -> Tensor:
        if value in trials and x.numel():
            trials[value].see(x)
        return x

    _run(teacher, compare, batches)
    return list(_apply(trials.values()))


def _run(teacher: Mirror, see: Callable[[str, Tensor], Tensor], batches: Iterable[dict[str, np.ndarray]]) -> None:
    probe = Probe(teacher, see)
    for batch in batches:
        probe.run(*feed(teacher, batch))


def _apply(trials: Iterable[_Trial]) -> Iterator[Equalized]:
    for trial in trials:
        best = trial.best()
        if best is None:
            continue
        factors, share = best[0].cpu(), best[1]
        place = trial.place
        for maker in place.makers:
            values = torch.from_numpy(np.array(maker.constant.values))
            maker.constant.values = (values / maker.own(factors)).numpy()
        for layer in place.readers:
            weight = torch.from_numpy(np.array(layer.weight.values))
            layer.weight.values = scaled_weight(layer, weight, factors).numpy()
        spread = float(factors.max() / factors.min())
        log.info("'%s': channels scaled by factors %g apart, error x %.2f", place.value, spread, share)
        yield Equalized(place.value, spread, share)
