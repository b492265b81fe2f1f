"""What each quantizer would cost at each width: the loss to expect, without labels, before anything is learned.

A loss of 1 means that the error at the network's outputs is as large as the outputs. Two ways to measure it (`MEASURES`):

local: the rounding error of one value or one weight, weighted by the Label-Free Hessian: the square of what the float network's
    gradients make of it. Weights are rounded as the closed-form start of learning rounds them (`compensate`), as what counts
    is the loss after learning. The samples are run once forward, and some times backward, for every set of layers that fits
    the memory, whatever the number of widths.
output: the distance of the network's outputs with one quantizer on at a time; one run per quantizer and width.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnx_eptq import compensate, hessian, mirror
from onnx_eptq.calibrate import Reader, Stats, absmax, apply_linear, calibrate, weight_mse
from onnx_eptq.compensate import Moments, as_rows, from_rows
from onnx_eptq.eptq import Judge
from onnx_eptq.graph import tensors_read
from onnx_eptq.grid import Grid, QParams, fake_quantize
from onnx_eptq.mirror import Mirror, Probe
from onnx_eptq.ops import op_of
from onnx_eptq.outputs import learning_targets
from onnx_eptq.plan import Layer, Plan
from onnx_eptq.widths import Group, with_widths

log = logging.getLogger(__name__)

PASSES = 64  # backward passes over the samples: about 20 % error, the same for all widths of a layer
Losses = dict[str, dict[int, float]]  # by group and width
Row = tuple[str, dict[int, float]]


@dataclass
class Setting:
    """What measuring reads.

    `stats` knows nothing of widths. Losses are measured on `samples` (one tensor per network input), and weights are rounded by
    what they do on `fitting`: on samples that they were rounded by, layers of few positions and many inputs look too good.
    """

    graph: gs.Graph
    plan: Plan
    layers: Sequence[Layer]
    teacher: Mirror
    stats: Stats
    samples: Sequence[Tensor]
    fitting: Sequence[Tensor]
    batch: int = 32
    seed: int = 0
    cache_bytes: int = 2**30
    calibration: str = "mse"
    readers: Mapping[str, Reader] = field(default_factory=dict)

    def batches(self, samples: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The samples, `batch` at a time."""
        for start in range(0, len(samples[0]), self.batch):
            yield [x[start : start + self.batch] for x in samples]


Measure = Callable[[Setting, Sequence[Group]], Iterator[Row]]
MEASURES: dict[str, Measure] = {}


def measure(name: str) -> Callable[[Measure], Measure]:
    """Register a way to measure: (setting, groups) -> per group, in any order, its name and the loss by width."""

    def register(function: Measure) -> Measure:
        MEASURES[name] = function
        return function

    return register


@measure("local")
def local(setting: Setting, groups: Sequence[Group]) -> Iterator[Row]:
    """The rounding error times the Label-Free Hessian, as a share of the outputs' power.

    Where gradients say nothing or not all, what is before an island or a rounding, it is the distance of the outputs instead.
    """
    hidden = _before_islands(setting.graph)
    yield from output(setting, [group for group in groups if hidden & set(group.values)])
    groups = [group for group in groups if not hidden & set(group.values)]
    activations = [group for group in groups if group.role == "activation"]
    values = [value for group in activations for value in _computed(setting.plan, group)]
    power = _output_power(setting)
    curvature = _curvature(setting, values) if values else {}
    for group in activations:
        importance = sum(curvature[value] for value in _computed(setting.plan, group)) / power
        if importance:
            yield group.name, {bits: importance * error for bits, error in activation_errors(setting, group).items()}
        else:  # made of constants alone: no gradient reaches it
            yield from output(setting, [group])
    for part in _sets(setting, groups):
        losses = _projected(setting, part, _rounded(setting, part), power)
        silent = [group for group, _ in part if not any(losses[group.name].values())]
        yield from ((name, row) for name, row in losses.items() if any(row.values()))
        yield from output(setting, silent)


def _before_islands(graph: gs.Graph) -> set[str]:
    """All values, constants included, from which a way leads through a node that ONNX Runtime computes, without gradients."""
    stack = [node for node in graph.nodes if op_of(node).island]
    found: set[str] = set()
    while stack:
        for tensor in tensors_read(stack.pop()):
            if tensor.name not in found:
                found.add(tensor.name)
                stack += tensor.inputs
    return found


def _projected(
    setting: Setting,
    weights: Sequence[tuple[Group, Layer]],
    roundings: Mapping[str, Mapping[int, Rounding]],
    power: float,
) -> Losses:
    """Hutchinson's estimate of |J (W - rounded W)|**2 / power, J the Jacobian of the outputs with respect to the weights.

    One backward pass per vector serves all weights and widths. Other than with the Jacobian with respect to the layer's output,
    errors add up over positions as they do in the network: most of those behind a global average do.
    """
    changes = [
        (group.name, bits, _changes(setting.teacher, layer, rounding))
        for group, layer in weights
        for bits, rounding in roundings[group.name].items()
    ]
    tensors = {id(tensor): tensor for _, _, parts in changes for tensor, _ in parts}
    losses: Losses = {group.name: dict.fromkeys(group.widths, 0.0) for group, _ in weights}
    for gradients in hessian.projected_gradients(
        setting.teacher,
        setting.graph,
        list(tensors.values()),
        setting.samples,
        passes=PASSES,
        batch=setting.batch,
        seed=setting.seed,
    ):
        by_id = dict(zip(tensors, gradients, strict=True))
        for name, bits, parts in changes:
            total = sum(float(torch.dot(by_id[id(tensor)].flatten(), delta.flatten())) for tensor, delta in parts)
            losses[name][bits] += total**2 / power / len(setting.samples[0])
    return losses


@measure("output")
def output(setting: Setting, groups: Sequence[Group]) -> Iterator[Row]:
    """The distance of the outputs with one quantizer at a time, all others off."""
    if not groups:
        return
    judge = Judge(setting.teacher, setting.graph, learning_targets(setting.graph), list(setting.samples), setting.batch)
    device = setting.samples[0].device
    for group in groups:
        if group.role == "activation":
            losses = {}
            for bits, qparams in _ranges(setting, group).items():
                alone = {value: with_widths(setting.plan, {group.name: bits})[value] for value in group.values}
                student = mirror.build(setting.graph, alone, {group.name: qparams}).to(device)
                losses[bits] = judge.distance(student)
            yield group.name, losses
    student = mirror.build(setting.graph).to(device)
    for part in _sets(setting, groups):
        roundings = _rounded(setting, part)
        for group, layer in part:
            losses = {}
            for bits, rounding in roundings[group.name].items():
                with _replaced(student, layer, rounding):
                    losses[bits] = judge.distance(student)
            yield group.name, losses


# Activations


def _computed(plan: Plan, group: Group) -> list[str]:
    """The values whose own elements are rounded; moved ones repeat them."""
    return [value for value in group.values if not plan[value].moved]


def _ranges(setting: Setting, group: Group) -> dict[int, QParams]:
    """Parameters of an activation by width, as a run with that width would choose them."""
    root = {group.name: setting.plan[group.name]}
    found = {}
    for bits in group.widths:
        plan = with_widths(Plan(root), {group.name: bits})
        chosen = calibrate(plan, setting.stats, setting.teacher, setting.calibration, setting.readers)
        found[bits] = chosen[group.name]
    return found


def activation_errors(setting: Setting, group: Group) -> dict[int, float]:
    """Mean squared rounding error per element by width, from the histogram of the value: no run is needed.

    Where the histogram knows the elements' Label-Free Hessian, they count by it.
    """
    histogram = setting.stats.histograms[group.name]
    counts = histogram.counts if histogram.importance is None else histogram.importance
    used = counts > 0
    x, share = histogram.centers[used], counts[used] / counts.sum().clamp(min=1e-30)
    errors = {}
    for bits, qparams in _ranges(setting, group).items():
        exact = QParams(qparams.scale.double(), qparams.zero_point)
        grid = Grid(bits, setting.plan[group.name].grid.signed)
        errors[bits] = float(((fake_quantize(x, exact, grid) - x).square() * share).sum())
    return errors


def _curvature(setting: Setting, names: Sequence[str]) -> dict[str, float]:
    """Per value: LFH summed over the elements of a sample, mean over samples (unit: output**2 / value**2)."""
    unique = list(dict.fromkeys(names))
    totals = dict.fromkeys(unique, 0.0)
    found = hessian.squared_gradients(
        setting.teacher,
        learning_targets(setting.graph),
        unique,
        setting.samples,
        batch=setting.batch,
        seed=setting.seed,
        reduced=lambda index, square: square.sum(),
    )
    for sums in found:
        for name, part in zip(unique, sums, strict=True):
            totals[name] += float(part) / len(setting.samples[0])
    return totals


@torch.no_grad()
def _output_power(setting: Setting) -> float:
    """Mean squared norm of the learning targets per sample, in the scale that `hessian` takes them in."""
    targets = learning_targets(setting.graph)
    if len(targets) > 1:
        return float(len(targets))  # brought to power 1 each
    total = 0.0

    def see(value: str, x: Tensor) -> Tensor:
        nonlocal total
        total += float(x.double().square().sum()) if value == targets[0] else 0.0
        return x

    for inputs in setting.batches(setting.samples):
        Probe(setting.teacher, see).run(*inputs)
    return max(total / len(setting.samples[0]), 1e-30)


# Weights


@dataclass
class Rounding:
    """A layer's weight on a grid, and the change of its bias that makes up for the mean error of the output."""

    weight: Tensor
    shift: Tensor | None


def _sets(setting: Setting, groups: Sequence[Group]) -> Iterator[list[tuple[Group, Layer]]]:
    """Weights, each with the first layer that reads it, in sets whose covariances and roundings fit the memory."""
    first: dict[str, Layer] = {}
    for layer in setting.layers:
        first.setdefault(layer.weight.name, layer)
    part: list[tuple[Group, Layer]] = []
    size = 0
    for group in groups:
        if group.role != "weight":
            continue
        own = _bytes(first[group.name], len(group.widths))
        if part and size + own > setting.cache_bytes:
            yield part
            part, size = [], 0
        part.append((group, first[group.name]))
        size += own
    if part:
        yield part


def _bytes(layer: Layer, widths: int) -> int:
    weight = torch.empty(tuple(layer.weight.shape), device="meta")
    own = 4 * weight.numel() * (widths + 1)
    if not compensate.can_solve(layer):
        return own
    groups, rows, unknowns = as_rows(layer, weight).shape
    return own + 8 * groups * unknowns * (unknowns + rows)


def _rounded(setting: Setting, weights: Sequence[tuple[Group, Layer]]) -> dict[str, dict[int, Rounding]]:
    """Every weight at each of its widths, after one run of the float network."""
    moments = _gathered(setting, [layer for _, layer in weights if compensate.can_solve(layer)])
    found: dict[str, dict[int, Rounding]] = {}
    for group, layer in weights:
        weight, grid = setting.teacher.constant(group.name), setting.plan[group.name].grid
        seen = moments.get(group.name)
        found[group.name] = {bits: rounded(layer, weight, seen, grid.with_bits(bits)) for bits in group.widths}
    return found


@torch.no_grad()
def _gathered(setting: Setting, layers: Sequence[Layer]) -> dict[str, Moments]:
    """The moments of the layers' inputs, by weight."""
    by_source: dict[str, list[Layer]] = {}
    for layer in layers:
        by_source.setdefault(layer.source.name, []).append(layer)
    moments: dict[str, Moments] = {}

    def see(value: str, x: Tensor) -> Tensor:
        for layer in by_source.get(value, ()) if x.numel() else ():
            name = layer.weight.name
            weight = setting.teacher.constant(name)
            pair = [(x, apply_linear(layer, x, weight))]
            found = compensate.gather(layer, pair, weight, len(setting.fitting[0]))
            moments[name] = _sum(moments[name], found) if name in moments else found
        return x

    for inputs in setting.batches(setting.fitting):
        Probe(setting.teacher, see).run(*inputs)
    return moments


def _sum(a: Moments, b: Moments) -> Moments:
    return Moments(a.xx + b.xx, a.yx + b.yx, a.x + b.x, a.y + b.y, a.count + b.count)


@torch.no_grad()
def rounded(layer: Layer, weight: Tensor, moments: Moments | None, grid: Grid) -> Rounding:
    """Round column by column, each error absorbed by the columns still to come, as the closed-form start does.

    Without moments (weights that are no matrix of output channels), each to its nearest.
    """
    if moments is None:
        return Rounding(fake_quantize(weight, weight_mse(weight, grid), grid), None)
    rows = as_rows(layer, weight).double()
    _, damped = compensate.solve(rows, moments)
    scale = absmax(weight, grid).scale.double().reshape(rows.shape[:2])
    latent, scale = compensate.best_scale(rows, damped, scale, grid)
    latent, scale = compensate.descend(latent, rows, damped, scale, grid)
    flat = latent.reshape(-1, latent.shape[2])
    qparams = QParams(scale.reshape(-1), torch.zeros(len(flat), dtype=torch.int32, device=flat.device))
    found = fake_quantize(flat, qparams, Grid(grid.bits, grid.signed, 0)).reshape(rows.shape)
    shift = None
    if layer.bias is not None:  # it takes the mean of the error
        shift = ((rows - found) @ (moments.x / moments.count)[:, :, None]).reshape(-1).to(weight.dtype)
    return Rounding(from_rows(layer, found, weight).to(weight.dtype), shift)


def _changes(network: Mirror, layer: Layer, rounding: Rounding) -> list[tuple[Tensor, Tensor]]:
    """The constants that a rounding changes, and by how much."""
    weight = network.constant(layer.weight.name)
    changes = [(weight, rounding.weight - weight)]
    if layer.bias is not None and rounding.shift is not None:
        bias = network.constant(layer.bias.name)
        changes.append((bias, rounding.shift.reshape(bias.shape)))
    return changes


@contextlib.contextmanager
def _replaced(student: Mirror, layer: Layer, rounding: Rounding) -> Iterator[None]:
    """The float network with one rounded weight."""
    changes = _changes(student, layer, rounding)
    before = [tensor.clone() for tensor, _ in changes]
    with torch.no_grad():
        for tensor, change in changes:
            tensor.add_(change)
        try:
            yield
        finally:
            for (tensor, _), value in zip(changes, before, strict=True):
                tensor.copy_(value)


# What was measured before


class Cache:
    """Measured losses in one JSON file per key, so that other budgets and widths need no new runs.

    Rows are written as they come: who is interrupted loses none. A folder that cannot be written is said and done without.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.path = None if folder is None else folder / f"{key}.json"
        self.losses: Losses = {}
        if self.path is not None and self.path.exists():
            try:
                stored = json.loads(self.path.read_text())["losses"]
                self.losses = {
                    name: {int(bits): float(loss) for bits, loss in row.items()} for name, row in stored.items()
                }
                if not all(math.isfinite(loss) for row in self.losses.values() for loss in row.values()):
                    raise ValueError("a loss is no finite number")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                self.losses = {}
                log.warning("the sensitivities in %s cannot be read (%s) and are measured anew", self.path, error)

    def missing(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with the widths that are not known yet."""
        left = [replace(g, widths=tuple(b for b in g.widths if b not in self.losses.get(g.name, {}))) for g in groups]
        return [group for group in left if group.widths]

    def add(self, name: str, row: Mapping[int, float]) -> None:
        """Keep a row, on disk too."""
        self.losses.setdefault(name, {}).update(row)
        if self.path is None:
            return
        staged = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")  # others may measure the same
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(json.dumps({"version": 1, "losses": self.losses}))
            staged.replace(self.path)
        except OSError as error:
            log.warning("sensitivities are not kept: %s cannot be written (%s)", self.path, error.strerror)
            self.path = None


def parted(samples: Sequence[Tensor], judged: int) -> tuple[list[Tensor], list[Tensor]]:
    """The samples to measure on and those to round by; with too few for both, all serve for both."""
    if len(samples[0]) < 2 * judged:
        return list(samples), list(samples)
    return [x[:judged] for x in samples], [x[judged:] for x in samples]


def default_folder() -> Path:
    """Where this user's programs keep what they can compute again."""
    try:
        home = Path.home()
    except RuntimeError:  # of a user that the system does not know, as containers have
        home = Path(tempfile.gettempdir())
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "onnx-eptq"


def monotone(losses: Mapping[int, float], step: float) -> dict[int, float]:
    """Losses that rise by at least `step` with every narrower width: fewer bits are never free."""
    found: dict[int, float] = {}
    least = float("-inf")
    for bits in sorted(losses, reverse=True):
        least = max(losses[bits], least + step)
        found[bits] = least
    return found
