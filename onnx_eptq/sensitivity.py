"""What each quantizer would cost at each width: the loss to expect, without labels, before anything is learned.

A loss of 1 means that the error at the network's outputs is as large as the outputs. Two ways to measure it (`MEASURES`):

local: the error that rounding makes in one value or one layer's output, weighted by the Label-Free Hessian. Layers are rounded
    as the closed-form start of learning rounds them (`compensate`), as what counts is the loss after learning. The samples
    are run once for every set of layers that fits the memory, whatever the number of widths.
output: the distance of the network's outputs with one quantizer on at a time; one run per quantizer and width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnx_eptq import compensate, hessian, mirror
from onnx_eptq.calibrate import Stats, View, absmax, apply_linear, calibrate, weight_mse
from onnx_eptq.compensate import Moments, as_rows, from_rows
from onnx_eptq.eptq import Judge
from onnx_eptq.grid import Grid, QParams, fake_quantize
from onnx_eptq.mirror import Mirror, Probe
from onnx_eptq.plan import Layer, Plan
from onnx_eptq.widths import Group, with_widths

log = logging.getLogger(__name__)

Losses = dict[str, dict[int, float]]  # by group and width
Row = tuple[str, dict[int, float]]


@dataclass
class Setting:
    """What measuring reads; `stats` knows nothing of widths, `samples` holds one tensor per network input."""

    graph: gs.Graph
    plan: Plan
    layers: Sequence[Layer]
    teacher: Mirror
    stats: Stats
    samples: Sequence[Tensor]
    batch: int = 32
    seed: int = 0
    cache_bytes: int = 2**30
    calibration: str = "mse"
    views: Mapping[str, View] = field(default_factory=dict)

    def batches(self) -> Iterator[list[Tensor]]:
        """The samples, `batch` at a time."""
        for start in range(0, len(self.samples[0]), self.batch):
            yield [x[start : start + self.batch] for x in self.samples]


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
    """The local error times the Label-Free Hessian, as a share of the outputs' power."""
    weights = _weight_groups(setting, groups)
    values = [value for group in groups if group.role == "activation" for value in _computed(setting.plan, group)]
    outputs = [layer.output.name for _, layers in weights for layer in layers]
    curvature = _curvature(setting, [*values, *outputs])
    for group in groups:
        if group.role == "activation":
            errors = activation_errors(setting, group)
            importance = sum(float(curvature[value].sum()) for value in _computed(setting.plan, group))
            if importance:
                yield group.name, {bits: importance * error for bits, error in errors.items()}
            else:  # made of constants alone: no gradient reaches it
                yield from output(setting, [group])
    for group, layers, roundings in _rounded(setting, weights):
        losses = dict.fromkeys(group.widths, 0.0)
        for layer, by_width in zip(layers, roundings, strict=True):
            for bits, rounding in by_width.items():
                losses[bits] += float((rounding.errors * curvature[layer.output.name]).sum())
        yield group.name, losses


@measure("output")
def output(setting: Setting, groups: Sequence[Group]) -> Iterator[Row]:
    """The distance of the outputs with one quantizer at a time, all others off."""
    judge = Judge(setting.teacher, hessian.learning_targets(setting.graph), list(setting.samples), setting.batch)
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
    for group, layers, roundings in _rounded(setting, _weight_groups(setting, groups)):
        losses = {}
        for bits, rounding in roundings[0].items():
            with _replaced(student, layers[0], rounding):
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
        chosen = calibrate(plan, setting.stats, setting.teacher, setting.calibration, setting.views)
        found[bits] = chosen[group.name]
    return found


def activation_errors(setting: Setting, group: Group) -> dict[int, float]:
    """Mean squared rounding error per element by width, from the histogram of the value: no run is needed."""
    histogram = setting.stats.histograms[group.name]
    used = histogram.counts > 0
    x, share = histogram.centers[used], histogram.counts[used] / histogram.counts.sum().clamp(min=1)
    errors = {}
    for bits, qparams in _ranges(setting, group).items():
        exact = QParams(qparams.scale.double(), qparams.zero_point)
        grid = Grid(bits, setting.plan[group.name].grid.signed)
        errors[bits] = float(((fake_quantize(x, exact, grid) - x).square() * share).sum())
    return errors


def _curvature(setting: Setting, names: Sequence[str]) -> dict[str, Tensor]:
    """Per value and channel: LFH summed over the positions of a sample, mean over samples, per power of the outputs.

    Times a mean squared error per element, this is the share of the outputs' power that the error will be.
    """
    axes = {layer.output.name: layer.output_axis for layer in setting.layers}
    unique = list(dict.fromkeys(names))
    totals: dict[str, Tensor] = {}
    count, start = len(setting.samples[0]), 0
    options = {"batch": setting.batch, "seed": setting.seed}
    for squares in hessian.squared_gradients(setting.teacher, setting.graph, unique, setting.samples, **options):
        size = min(setting.batch, count - start)
        start += size
        for name, square in zip(unique, squares, strict=True):
            by_channel = (
                hessian.per_sample(square, size, axes.get(name, -1)) if square.ndim else square.reshape(1, 1, 1)
            )
            totals[name] = totals.get(name, 0) + by_channel.sum((0, 2)).cpu() / count
    power = _output_power(setting)
    return {name: total / power for name, total in totals.items()}


@torch.no_grad()
def _output_power(setting: Setting) -> float:
    """Mean squared norm of the learning targets per sample, in the scale that `squared_gradients` takes them in."""
    targets = hessian.learning_targets(setting.graph)
    if len(targets) > 1:
        return float(len(targets))  # brought to power 1 each
    total = 0.0

    def see(value: str, x: Tensor) -> Tensor:
        nonlocal total
        total += float(x.double().square().sum()) if value == targets[0] else 0.0
        return x

    for inputs in setting.batches():
        Probe(setting.teacher, see).run(*inputs)
    return max(total / len(setting.samples[0]), 1e-30)


# Weights


@dataclass
class Rounding:
    """A layer's weight on a grid, the mean squared error of its output per channel, the bias that makes up for its mean."""

    weight: Tensor
    errors: Tensor
    shift: Tensor | None


def _weight_groups(setting: Setting, groups: Sequence[Group]) -> list[tuple[Group, list[Layer]]]:
    users: dict[str, list[Layer]] = {}
    for layer in setting.layers:
        users.setdefault(layer.weight.name, []).append(layer)
    return [(group, users[group.name]) for group in groups if group.role == "weight"]


def _rounded(
    setting: Setting, weights: Sequence[tuple[Group, list[Layer]]]
) -> Iterator[tuple[Group, list[Layer], list[dict[int, Rounding]]]]:
    """Per weight: its layers, and for each of them the rounding by width."""
    for part in _sets(weights, setting.cache_bytes):
        moments, batches = _gathered(setting, [layer for _, layers in part for layer in layers])
        for group, layers in part:
            grid = setting.plan[group.name].grid
            roundings = []
            for layer in layers:
                weight = setting.teacher.constant(layer.weight.name)
                found = {}
                for bits in group.widths:
                    if id(layer.node) in moments:
                        found[bits] = solved(layer, weight, moments[id(layer.node)], grid.with_bits(bits))
                    else:
                        found[bits] = direct(layer, weight, batches[id(layer.node)], grid.with_bits(bits))
                roundings.append(found)
            yield group, layers, roundings


def _sets(weights: Sequence[tuple[Group, list[Layer]]], room: int) -> Iterator[list[tuple[Group, list[Layer]]]]:
    """Weights whose layers' covariances fit into `room` bytes together."""
    part: list[tuple[Group, list[Layer]]] = []
    size = 0
    for group, layers in weights:
        own = sum(_bytes(layer) for layer in layers)
        if part and size + own > room:
            yield part
            part, size = [], 0
        part.append((group, layers))
        size += own
    if part:
        yield part


def _bytes(layer: Layer) -> int:
    if not compensate.can_solve(layer):
        return 0
    groups, rows, unknowns = as_rows(layer, torch.empty(tuple(layer.weight.shape), device="meta")).shape
    return 8 * groups * unknowns * (unknowns + rows)


@torch.no_grad()
def _gathered(setting: Setting, layers: Sequence[Layer]) -> tuple[dict[int, Moments], dict[int, list[Tensor]]]:
    """One run of the float network: the moments of layers that can be solved, the inputs of the (rare) others."""
    by_source: dict[str, list[Layer]] = {}
    for layer in layers:
        by_source.setdefault(layer.source.name, []).append(layer)
    moments: dict[int, Moments] = {}
    kept: dict[int, list[Tensor]] = {id(layer.node): [] for layer in layers if not compensate.can_solve(layer)}

    def see(value: str, x: Tensor) -> Tensor:
        for layer in by_source.get(value, ()):
            key = id(layer.node)
            if key in kept:
                kept[key].append(x)
                continue
            weight = setting.teacher.constant(layer.weight.name)
            pair = [(x, apply_linear(layer, x, weight))]
            found = compensate.gather(layer, pair, weight, len(setting.samples[0]))
            moments[key] = _sum(moments[key], found) if key in moments else found
        return x

    for inputs in setting.batches():
        Probe(setting.teacher, see).run(*inputs)
    return moments, kept


def _sum(a: Moments, b: Moments) -> Moments:
    return Moments(a.xx + b.xx, a.yx + b.yx, a.x + b.x, a.y + b.y, a.count + b.count)


@torch.no_grad()
def solved(layer: Layer, weight: Tensor, moments: Moments, grid: Grid) -> Rounding:
    """Round column by column, each error absorbed by the columns still to come, as the closed-form start does."""
    rows = as_rows(layer, weight).double()
    _, damped = compensate.solve(rows, moments)
    scale = absmax(weight, grid).scale.double().reshape(rows.shape[:2])
    latent, scale = compensate.best_scale(rows, damped, scale, grid)
    latent, scale = compensate.descend(latent, rows, damped, scale, grid)
    own = Grid(grid.bits, grid.signed, 0)
    flat = latent.reshape(-1, latent.shape[2])
    qparams = QParams(scale.reshape(-1), torch.zeros(len(flat), dtype=torch.int32, device=flat.device))
    rounded = fake_quantize(flat, qparams, own).reshape(rows.shape)
    delta = rows - rounded
    mean = moments.x / moments.count
    second = moments.xx / moments.count
    shift = None
    if layer.bias is not None:  # it takes the mean of the error
        second = second - mean[:, :, None] * mean[:, None, :]
        shift = (delta @ mean[:, :, None]).reshape(-1)
    errors = ((delta @ second) * delta).sum(2).clamp(min=0).reshape(-1)
    return Rounding(from_rows(layer, rounded, weight).to(weight.dtype), errors.cpu(), shift)


@torch.no_grad()
def direct(layer: Layer, weight: Tensor, inputs: Sequence[Tensor], grid: Grid) -> Rounding:
    """Round each weight to its nearest: for layers whose weights are no matrix of output channels."""
    rounded = fake_quantize(weight, weight_mse(weight, grid), grid)
    total, count = torch.zeros(()), 0
    for x in inputs:
        error = apply_linear(layer, x, weight - rounded)
        error = error.movedim(layer.output_axis, 0).flatten(1) if error.ndim > 1 else error.reshape(-1, 1)
        total = total + error.double().square().sum(1).cpu()
        count += error.shape[1]
    return Rounding(rounded, total / max(count, 1), None)


@contextlib.contextmanager
def _replaced(student: Mirror, layer: Layer, rounding: Rounding) -> Iterator[None]:
    """The float network with one rounded weight."""
    changes = [(student.constant(layer.weight.name), rounding.weight)]
    if layer.bias is not None and rounding.shift is not None:
        bias = student.constant(layer.bias.name)
        changes.append((bias, bias + rounding.shift.reshape(bias.shape).to(bias.dtype)))
    before = [tensor.clone() for tensor, _ in changes]
    with torch.no_grad():
        for tensor, value in changes:
            tensor.copy_(value)
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
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
        staged = self.path.with_name(f"{self.path.name}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(json.dumps({"version": 1, "losses": self.losses}))
            staged.replace(self.path)
        except OSError as error:
            log.warning("sensitivities are not kept: %s cannot be written (%s)", self.path, error.strerror)
            self.path = None


def default_folder() -> Path:
    """Where this user's programs keep what they can compute again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnx-eptq"


def fingerprint(parts: Iterable[bytes | str]) -> str:
    """A key of whatever decides the losses."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def monotone(losses: Mapping[int, float], step: float) -> dict[int, float]:
    """Losses that rise by at least `step` with every narrower width: fewer bits are never free."""
    found: dict[int, float] = {}
    least = float("-inf")
    for bits in sorted(losses, reverse=True):
        least = max(losses[bits], least + step)
        found[bits] = least
    return found
