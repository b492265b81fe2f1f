"""The Label-Free Hessian (LFH): how strongly the network's outputs answer to each value or weight.

For an output z and a value a of the float network, LFH = sum over outputs of (dz/da)**2, the squared Frobenius norm of the
Jacobian (arXiv 2309.11531): for losses whose second derivative does not depend on the label, the trace of their Hessian
follows it. With few outputs it is computed exactly, one backward pass per output; otherwise by Hutchinson's estimate with
Rademacher vectors. Every pass gives all layers at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_eptq import pieces
from onnx_eptq.calibrate import Stats, weight_mse
from onnx_eptq.grid import QParams
from onnx_eptq.mirror import Mirror, column_factors
from onnx_eptq.outputs import judged_targets, learning_targets
from onnx_eptq.plan import Layer, Plan

LEANING = 0.5  # how far what positions count leans on their gradients
FEW_PROBES = 4  # where a mean over channels evens out the rest
PROBES = 16  # Rademacher vectors: about 10 % error, which no use of the scores notices


def per_sample(x: Tensor, samples: int, channel_axis: int) -> Tensor:
    """A layer's output as [samples, channels, positions]: tokens and windows are positions, features are channels.

    Rows that are not as many for every sample (what a model selects) are all given to each.
    """
    moved = x.movedim(channel_axis, -1)
    even = moved.numel() % (samples * moved.shape[-1]) == 0
    return moved.reshape(samples if even else 1, -1, moved.shape[-1]).transpose(1, 2).expand(samples, -1, -1)


@torch.no_grad()
def _head_scales(
    teacher: Mirror, run: pieces.Function, targets: Sequence[str], samples: Sequence[Tensor], batch: int
) -> list[float | Tensor]:
    """Factors that bring several targets to equal power per sample, so that a large head does not drown a small one.

    The same goes for the columns of a head where they differ in scale.
    """
    if len(targets) == 1 and not teacher.uneven:
        return [1.0]
    powers, factors = [0.0] * len(targets), list[float | Tensor]()
    for inputs in _batches(samples, batch):
        outputs = run(*inputs)
        if not factors:
            even = column_factors(teacher, targets, outputs)
            factors = [even.get(name, 1.0) for name in targets]
        found = [float((z.double() * f).square().sum()) for z, f in zip(outputs, factors, strict=True)]
        powers = [a + b for a, b in zip(powers, found, strict=True)]
    return [
        f * (len(samples[0]) / power) ** 0.5 if power > 0 else 0.0 for f, power in zip(factors, powers, strict=True)
    ]


def _together(outputs: Sequence[Tensor], scales: Sequence[float | Tensor], samples: int) -> Tensor:
    """All targets as one tensor [samples, d]; what holds no rows of samples (a mean over all, a constant) is in the first."""
    scaled = [z * scale for z, scale in zip(outputs, scales, strict=True)]
    rows = (
        z.reshape(samples, -1) if z.numel() % samples == 0 else F.pad(z.reshape(1, -1), (0, 0, 0, samples - 1))
        for z in scaled
    )
    return torch.cat(list(rows), 1)


def directions(d: int, samples: int, probes: int, exact: bool, generator: torch.Generator) -> Iterator[Tensor]:
    """Vectors v [samples, d] such that the sum of (v' J)**2 over them estimates the sum over rows of J, squared.

    Unit vectors when `exact`, else scaled Rademacher vectors, independent per sample.
    """
    if exact:
        yield from torch.eye(d)[:, None, :].expand(d, samples, d)
        return
    for _ in range(probes):
        yield (torch.randint(0, 2, (samples, d), generator=generator).float() * 2 - 1) / probes**0.5


def _products(v: Tensor, z: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The product v' J with the Jacobian J of z with respect to each leaf; 0 where z does not depend on it."""
    together = torch.dot(v.to(z).flatten(), z.flatten())  # `grad_outputs` would have torch import sympy: half a second
    return torch.autograd.grad(together, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def _batches(samples: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    for start in range(0, len(samples[0]), size):
        yield [tensor[start : start + size] for tensor in samples]


def label_free_hessian(
    teacher: Mirror,
    graph: gs.Graph,
    layers: Sequence[Layer],
    samples: Sequence[Tensor],
    *,
    probes: int = PROBES,
    batch: int = 32,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sensitivity of the outputs to every linear layer's output, per sample (unit: output**2 / value**2).

    Args:
        teacher: the float mirror of `graph`.
        graph: the prepared graph.
        layers: the layers; their outputs (bias added, before any activation function) are the interest points.
        samples: one tensor per network input, samples on axis 0.
        probes: exact by unit vectors up to that many outputs, else that many Rademacher vectors.
        batch: samples per pass; the result does not depend on it when exact.
        seed: of the Rademacher vectors.

    Returns:
        Two dicts by layer output, shapes [samples], float64: the trace, summed over all elements (reference of EPTQ v1), and
        the Sample-Layer Attention score, the mean over positions and largest over channels (EPTQ v2).
    """
    names = [layer.output.name for layer in layers]
    traces: dict[str, list[Tensor]] = {name: [] for name in names}
    attention: dict[str, list[Tensor]] = {name: [] for name in names}
    start = 0
    targets = learning_targets(graph)
    for squares in squared_gradients(teacher, targets, names, samples, probes=probes, batch=batch, seed=seed):
        count = min(batch, len(samples[0]) - start)
        start += count
        for layer, square in zip(layers, squares, strict=True):
            by_channel = per_sample(square, count, layer.output_axis)
            given = square.numel() / max(1, by_channel.numel())  # 1, or less where samples share what they have
            traces[layer.output.name].append(by_channel.sum((1, 2)).cpu() * given)
            attention[layer.output.name].append(by_channel.mean(2).amax(1).cpu())
    return tuple({name: torch.cat(parts) for name, parts in found.items()} for found in (traces, attention))  # type: ignore[return-value]


def squared_gradients(
    teacher: Mirror,
    targets: Sequence[str],
    names: Sequence[str],
    samples: Sequence[Tensor],
    *,
    probes: int = PROBES,
    batch: int = 32,
    seed: int = 0,
    reduced: Callable[[int, Tensor], Tensor] = lambda index, square: square,
) -> Iterator[list[Tensor]]:
    """Yield, batch by batch, sum over targets of (d target / d element)**2 for the named values, shaped like them, float64.

    `reduced` says what to keep of the squares of value number `index`, to save memory: any linear function of them. Values that
    no input reaches (an expanded class token) have 0. Other arguments as for `label_free_hessian`.
    """
    raw = pieces.raw_nodes(teacher)
    ends = [raw[name] for name in targets]
    places = pieces.placeholders(teacher)
    run = pieces.function(teacher, places, [*(raw[name] for name in names), *ends])
    scales = _head_scales(teacher, pieces.function(teacher, places, ends), targets, samples, batch)
    generator = torch.Generator().manual_seed(seed)
    for inputs in _batches(samples, batch):
        count = len(inputs[0])
        results = run(*[x.detach().requires_grad_(x.is_floating_point()) for x in inputs])
        values, z = results[: len(names)], _together(results[len(names) :], scales, count)
        squares = [torch.zeros_like(reduced(i, value.detach()), dtype=torch.float64) for i, value in enumerate(values)]
        reached = [i for i, value in enumerate(values) if value.requires_grad]
        if not z.requires_grad:  # float islands, which have no gradient, cut all paths to the targets
            reached = []
        for v in directions(z.shape[1], count, probes, z.shape[1] <= probes, generator) if reached else ():
            gradients = _products(v, z, [values[i] for i in reached])
            for i, gradient in zip(reached, gradients, strict=True):
                squares[i] += reduced(i, gradient.double().square())
        yield squares


def projected_gradients(
    teacher: Mirror,
    graph: gs.Graph,
    constants: Sequence[Tensor],
    samples: Sequence[Tensor],
    *,
    passes: int,
    batch: int = 32,
    seed: int = 0,
) -> Iterator[Sequence[Tensor]]:
    """Yield about `passes` random combinations v' J of the rows of the outputs' Jacobians with respect to the constants.

    Each is shaped like its constant. The expected square of (v' J) d, summed over all that is yielded, is the sum over samples
    of |J d|**2: vectors are Rademacher, independent per sample, so that samples do not mix.
    """
    raw = pieces.raw_nodes(teacher)
    targets = learning_targets(graph)
    run = pieces.function(teacher, pieces.placeholders(teacher), [raw[name] for name in targets])
    scales = _head_scales(teacher, run, targets, samples, batch)
    generator = torch.Generator().manual_seed(seed)
    batches = list(_batches(samples, batch))
    each = max(1, -(-passes // len(batches)))
    leaves = [tensor.requires_grad_(True) for tensor in constants]
    try:
        for inputs in batches:
            count = len(inputs[0])
            z = _together(run(*inputs), scales, count)
            for v in directions(z.shape[1], count, each, False, generator):
                yield _products(v, z, leaves)
    finally:
        for tensor in leaves:
            tensor.requires_grad_(False)


def position_importance(
    teacher: Mirror,
    graph: gs.Graph,
    layers: Sequence[Layer],
    samples: Sequence[Tensor],
    *,
    batch: int = 32,
    seed: int = 0,
) -> dict[str, list[Tensor]]:
    """What an error at each position of a layer's output counts, per batch; arguments as for `label_free_hessian`.

    The squared gradient of what students are judged by, mean over channels, in units of the layer's mean, mixed with 1: an
    error of the linear approximation must not decide alone. Layers that no gradient reaches are left out.

    Returns:
        By layer output, one tensor per batch, shaped like the output without its channel axis; mean 1.
    """
    names = [layer.output.name for layer in layers]
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def reduced(index: int, square: Tensor) -> Tensor:
        return square.movedim(layers[index].output_axis, 0).mean(0)

    options: dict[str, Any] = {"probes": FEW_PROBES, "batch": batch, "seed": seed, "reduced": reduced}
    for means in squared_gradients(teacher, judged_targets(graph), names, samples, **options):
        for name, part in zip(names, means, strict=True):
            found[name].append(part)
    scaled = {}
    for name, parts in found.items():
        mean = sum(float(part.sum()) for part in parts) / max(1, sum(part.numel() for part in parts))
        if mean > 0 and math.isfinite(mean):
            scaled[name] = [(1 - LEANING + LEANING / mean * part).float() for part in parts]
    return scaled


def channel_importance(
    teacher: Mirror,
    graph: gs.Graph,
    layers: Sequence[Layer],
    samples: Sequence[Tensor],
    *,
    batch: int = 32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """What an error counts in each channel of a layer's output: the mean squared gradient of what students are judged by.

    Arguments as for `label_free_hessian`. Layers that no gradient reaches are left out.

    Returns:
        By layer output, [channels], float64 (unit: output**2 / value**2, summed over a sample's positions).
    """
    totals = [torch.zeros(1, dtype=torch.float64)] * len(layers)

    def reduced(index: int, square: Tensor) -> Tensor:
        by_channel = square.movedim(layers[index].output_axis, 0)
        return by_channel.reshape(len(by_channel), -1).sum(1)

    names = [layer.output.name for layer in layers]
    options: dict[str, Any] = {"probes": FEW_PROBES, "batch": batch, "seed": seed, "reduced": reduced}
    for sums in squared_gradients(teacher, judged_targets(graph), names, samples, **options):
        totals = [total.to(part.device) + part for total, part in zip(totals, sums, strict=True)]
    found = {name: total / len(samples[0]) for name, total in zip(names, totals, strict=True)}
    return {name: total for name, total in found.items() if 0 < float(total.sum()) < math.inf}


def weigh_ranges(
    teacher: Mirror,
    graph: gs.Graph,
    plan: Plan,
    stats: Stats,
    samples: Sequence[Tensor],
    *,
    batch: int = 32,
    seed: int = 0,
) -> None:
    """Tell the histograms of `stats` what the elements in each of their bins count: their share of the squared gradients.

    Values that share a grid count together, each by its own gradients; histograms that no gradient reaches stay as they are.
    The mixture with counting all alike is `calibrate.Stats.lean`.
    Other arguments as for `label_free_hessian`; the gradients are those of what students are judged by.
    """
    known, targets = pieces.raw_nodes(teacher), judged_targets(graph)
    names = [p.value for p in plan.values() if p.role == "activation" and not p.moved and p.value in known]
    if not targets:
        return
    roots = [plan.root(name).value for name in names]
    totals = {root: torch.zeros_like(stats.histograms[root].counts) for root in roots}
    run = pieces.function(teacher, pieces.placeholders(teacher), [known[name] for name in names])
    options: dict[str, Any] = {"probes": FEW_PROBES, "batch": batch, "seed": seed}
    found = squared_gradients(teacher, targets, names, samples, **options)
    for inputs, squares in zip(_batches(samples, batch), found, strict=True):
        with torch.no_grad():
            values = run(*inputs)
        for root, value, square in zip(roots, values, squares, strict=True):
            totals[root] += stats.histograms[root].tally(value, square)
    for root, total in totals.items():
        if 0 < float(total.sum()) < math.inf:
            stats.histograms[root].importance = total / total.sum()


def weight_hessian(
    teacher: Mirror,
    graph: gs.Graph,
    layers: Sequence[Layer],
    samples: Sequence[Tensor],
    *,
    probes: int = PROBES,
    batch: int = 32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """LFH per weight element, averaged over samples: by weight name, shaped like the weight, float64.

    The square of a gradient summed over samples is not the sum of squares; vectors drawn independently per sample make it so
    in expectation, and a whole batch goes through at once. With one sample per batch and few outputs it is exact.
    """
    raw = pieces.raw_nodes(teacher)
    targets = learning_targets(graph)
    names = list(dict.fromkeys(layer.weight.name for layer in layers))
    run = pieces.function(teacher, pieces.placeholders(teacher), [raw[name] for name in targets])
    scales = _head_scales(teacher, run, targets, samples, batch)
    generator = torch.Generator().manual_seed(seed)
    weights = [teacher.constant(name).requires_grad_(True) for name in names]
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    try:
        for inputs in _batches(samples, batch):
            count = len(inputs[0])
            z = _together(run(*inputs), scales, count)
            exact = count == 1 and z.shape[1] <= probes  # unit vectors would mix the samples
            for v in directions(z.shape[1], count, probes, exact, generator):
                for total, gradient in zip(sums, _products(v, z, weights), strict=True):
                    total += gradient.detach().double().square()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {name: total / len(samples[0]) for name, total in zip(names, sums, strict=True)}


def hmse_scales(plan: Plan, teacher: Mirror, sensitivity: Mapping[str, Tensor]) -> dict[str, QParams]:
    """Weight scales of least error, each element weighted by `sensitivity` as `weight_hessian` returns it (Hmse, EPTQ v2).

    Elements of no importance still count a little, and channels without any fall back to the plain squared error.
    """
    found = {}
    for name, h in sensitivity.items():
        if name in plan:
            weight, grid = teacher.constant(name).detach(), plan[name].grid
            floor = 1e-3 * h.mean()
            importance = (h + (floor if floor > 0 else 1.0)).to(weight.dtype)
            found[name] = weight_mse(weight, grid, importance=importance)
    return found


def log_normalised(traces: Mapping[str, Tensor], normalise: bool = True) -> dict[str, float]:
    """EPTQ v1's layer weights: logarithm of the mean trace, less that of the least sensitive layer.

    Args:
        traces: LFH per layer and sample, shape [samples].
        normalise: first divide each sample's traces by their sum over layers.
    """
    table = torch.stack(list(traces.values()), 1).double()
    if normalise:
        table = table / (table.sum(1, keepdim=True) + 1e-8)
    mean = table.mean(0)
    positive = mean[mean > 0]
    smallest = float(positive.min()) if len(positive) else 1.0
    logs = torch.log10(torch.where(mean > 0, mean, torch.full_like(mean, smallest)))
    return dict(zip(traces, (logs - logs.min()).tolist(), strict=True))


def capped(attention: Mapping[str, Tensor], last: Sequence[str]) -> dict[str, Tensor]:
    """SLA scores whose output layers `last` (score 1 by construction) weigh no more on average than any other layer."""
    others = [float(score.mean()) for name, score in attention.items() if name not in last]
    limit = max(others, default=float("inf"))
    return {
        name: score * min(1.0, limit / max(float(score.mean()), 1e-30)) if name in last else score
        for name, score in attention.items()
    }


def sample_ids(count: int, wanted: int, seed: int) -> Tensor:
    """A seeded choice of samples, in order."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(count)[:wanted]))
