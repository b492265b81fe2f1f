"""Learning: the quantized network is distilled from the float one, stage by stage and piece by piece.

A method (`methods.METHODS`) is a start and a list of stages; a stage has a scope (`pieces.SCOPES`), a rounding
(`rounding.ROUNDINGS`) and a loss. The student is always a plain mirror between two pieces: learned quantizers stand in only
while their piece learns, and are then baked into constants and scales.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_eptq import checkpoint, heldout, hessian, islands, pieces
from onnx_eptq.calibrate import fit_biases
from onnx_eptq.checkpoint import State
from onnx_eptq.compensate import compensate
from onnx_eptq.grid import along, flat
from onnx_eptq.methods import Effort, Method, Stage
from onnx_eptq.mirror import BiasQuantizer, Mirror, Quantizer, column_factors
from onnx_eptq.outputs import decisions, distributed, judged_targets, learning_targets, moved_from
from onnx_eptq.pieces import Piece
from onnx_eptq.plan import Layer, Plan
from onnx_eptq.rounding import (
    ROUNDINGS,
    ActivationQuantizer,
    LearnedBias,
    LearnedScale,
    WeightQuantizer,
    annealed_beta,
    cosine,
)
from onnx_eptq.views import count_views, with_views

# The part of plain rounding's distance that must be won where hardly any sample is held out to judge by; but no more is asked
# for than of a network at the distance BROKEN, where top-1 is lost and there is little to lose.
UNSURE, BROKEN = 0.5, 0.2
SCARCE = 32  # different samples to learn from; below, a more cautious start is tried, too
CAUTION = 100.0  # how much more solved weights are drawn to the float ones then, per sample
# Standard errors by which learning must beat where it began: the luckiest of all its checks is compared with the luckier
# of two starts, which is worth about so much.
LUCK = 0.5
STARTS = ("rtn", "compensated", "weighted", "cautious")
SPREADS = 8.0  # standard deviations of a channel that its bias is learned in units of, at most
CHECKS = 8  # times per network-wide stage that the held-out samples are looked at
CHECK_STEPS = 5  # steps between two such looks, at least: one costs as much as one or two steps
DRAWING = threading.Lock()  # torch's own generator, which runs in other threads would draw from, too
SEEDS = 2**63  # that torch's generators take
CURVE = 50  # points of a recorded loss curve
INTERVAL = 40.0  # seconds between checkpoints, which hold the model several times: with a step, what a killed run loses
# Between the largest score and the next, mostly: classifiers that are sure of themselves come to 20.
NO_SCORES = 50.0
HESSIAN_SAMPLES = 64
BATCH = 32  # samples per step that falling rates are made for
START_BATCH = 8  # samples that gradients for the closed-form start are taken of together: few, as all values are kept
Tensors = dict[str, Tensor]


@dataclass
class Problem:
    """What learning reads: the graph, its plan and layers, the float teacher, and samples (one tensor per input)."""

    graph: gs.Graph
    plan: Plan
    layers: Sequence[Layer]
    teacher: Mirror
    samples: list[Tensor]
    method: Method
    effort: Effort
    seed: int = 0
    judges: int = heldout.MOST  # samples that may be held out
    multiple: int = 1  # the model takes multiples of so many samples
    chunk: int = 0  # and runs so many at a time; 0: as many as there are
    mapped: bool = False  # it takes one sample, but learning can map it over several
    begun: Tensors | None = None  # the state that the method begins with, where that is not plain rounding's
    views: int | None = 1  # of each image that are learned from; None: more, the fewer images there are
    cache_bytes: int = 2**30
    compile: bool = False
    bf16: bool = False

    @property
    def together(self) -> int:
        """Samples of one run of a mirror."""
        return self.chunk or self.effort.batch

    @property
    def learned_together(self) -> int:
        """Samples of one run of what learns, and of its teacher."""
        return self.effort.batch if self.mapped else self.together


@dataclass
class Learning:
    """What learning has to say: held-out distances (0: as the float model), rest of soft rounding, loss curves.

    `held_out` samples were judged by, none of them if there were too few to learn from others; `different` is how many samples
    there are that are no copies of others, nor nearly.
    """

    distances: dict[str, float] = field(default_factory=dict)
    kept: str = "rtn"
    undecided: float = 0.0
    gap: float = 0.0
    targets: list[str] = field(default_factory=list)
    steps: int = 0
    held_out: int = 0
    different: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


class Judge:
    """Distance of a student from the teacher on held-out samples.

    Per learning target: the error's share of power, and the divergence of its distribution where it holds one; where columns
    differ in scale, the error of each as a share of its variance.
    """

    def __init__(
        self,
        teacher: Mirror,
        graph: gs.Graph,
        targets: Sequence[str],
        samples: list[Tensor],
        batch: int,
        mapped: bool = False,
    ) -> None:
        self.targets, self.samples, self.batch, self.mapped = targets, samples, batch, mapped
        self.axes = distributed(graph, targets)
        places, raw = pieces.placeholders(teacher), pieces.raw_nodes(teacher)
        self.decisions = pieces.between(teacher, places, [raw[name] for name in targets], decisions(graph))
        self.decided: list[Sequence[Tensor]] = []  # by the teacher, of every batch
        self.expected = self._outputs(teacher, self.decisions)
        self.factors = column_factors(teacher, targets, self.expected)

    @torch.no_grad()
    def _outputs(self, mirror: Mirror, deciding: Sequence[str] = ()) -> list[Tensor]:
        """The targets of a mirror, which decides `deciding` itself, or selects what the teacher did."""
        raw, places = pieces.raw_nodes(mirror), pieces.placeholders(mirror)
        given = [] if deciding else [raw[name] for name in self.decisions]
        wanted = [raw[name] for name in (*self.targets, *deciding)]
        run = pieces.function(mirror, [*places, *given], wanted, mapped=self.mapped)
        parts = []
        for batch, start in enumerate(range(0, len(self.samples[0]), self.batch)):
            found = run(*[x[start : start + self.batch] for x in self.samples], *(self.decided[batch] if given else ()))
            parts.append(found[: len(self.targets)])
            if deciding:
                self.decided.append(found[len(self.targets) :])
        return [_joined(tensors) for tensors in zip(*parts, strict=True)]

    def losses(self, student: Mirror) -> Tensor:
        """What each sample adds to the distance; [samples], float64."""
        total = torch.zeros(len(self.samples[0]), dtype=torch.float64)
        for target, expected, found in zip(self.targets, self.expected, self._outputs(student), strict=True):
            if target in self.factors:
                total += _by_sample(((expected - found) * self.factors[target]).square(), len(total))
                continue
            total += _by_sample((expected - found).square() / expected.square().mean().clamp(min=1e-20), len(total))
            axis = distribution_axis(expected, self.axes.get(target))
            if axis is not None:
                parts = zip(torch.split(found, self.batch), torch.split(expected, self.batch), strict=True)
                terms = torch.cat([divergence(a.double(), b.double(), axis, "none").sum(1) for a, b in parts])
                total += _by_sample(terms.clamp(min=0), len(total))  # rounding leaves less than nothing
        return total

    def distance(self, student: Mirror) -> float:
        """Mean over the samples: 0 when the student's outputs are the teacher's; infinite when they are no numbers."""
        return mean(self.losses(student))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """What several runs gave, one after another; a single number each time becomes a row of them.

    Selected elements, of which there are not always as many, are joined along the axis that they lie on.
    """
    rows = [x if x.ndim else x[None] for x in parts]
    uneven = [axis for axis in range(1, rows[0].ndim) if len({x.shape[axis] for x in rows}) > 1]
    return torch.cat(rows, uneven[0] if uneven else 0)


def _by_sample(x: Tensor, samples: int) -> Tensor:
    """Mean of each sample's elements (none: 0); the same for all where the first axis does not hold them one after another."""
    if not x.numel():
        return torch.zeros(samples)
    rows = x.reshape(samples, -1) if x.numel() % samples == 0 else x.flatten()
    return rows.mean(-1).cpu()


def mean(losses: Tensor) -> float:
    """Mean of the samples' losses, infinite when they are no numbers."""
    found = float(losses.mean())
    return found if math.isfinite(found) else math.inf


def gain(losses: Tensor, kept: Tensor, errors: float = 0.0) -> float:
    """By how much a candidate's mean loss is below the kept one's, less so many standard errors of that difference.

    Args:
        losses: of the candidate, per held-out sample.
        kept: of what is kept so far, for the same samples.
        errors: standard errors that count as luck.

    Returns:
        Positive where the candidate is better; of students whose losses are no numbers only the sign means anything.
    """
    found, other = mean(losses), mean(kept)
    if math.isinf(found) or math.isinf(other):
        return -1.0 if math.isinf(found) else 1.0
    spread = float((kept - losses).std()) / len(kept) ** 0.5 if len(kept) > 1 else 0.0
    return other - found - errors * spread


def distribution_axis(z: Tensor, known: int | None = None) -> int | None:
    """The axis along which an output holds one score per class, or None.

    The `known` one, as `outputs.distributed` finds it; else 1 of [samples, classes] with any further axes of size 1, unless the
    largest is mostly so far ahead that they are no scores: a Softmax of measured quantities says nothing of the smaller ones.
    """
    axis = 1 if known is None else known
    if z.ndim <= axis or z.shape[axis] < 2:
        return None
    if known is not None:
        return axis
    if math.prod(z.shape[2:]) != 1 or not len(z):
        return None
    first, second = z.flatten(1).topk(2).values.T
    return axis if float((first - second).median()) < NO_SCORES else None


def divergence(found: Tensor, expected: Tensor, axis: int = 1, reduction: str = "batchmean") -> Tensor:
    """Kullback-Leibler divergence of softmax(found) from softmax(expected) along an axis.

    Returns:
        Its mean over all other axes; with reduction "none" its terms [positions, classes], positions in their order.
    """
    ours, theirs = (F.log_softmax(z.movedim(axis, -1).reshape(-1, z.shape[axis]), 1) for z in (found, expected))
    return F.kl_div(ours, theirs, log_target=True, reduction=reduction)


@dataclass
class Parts:
    """The learned quantizers of a piece, by planned value, and per bias the width of what its layer multiplies."""

    weights: dict[str, WeightQuantizer] = field(default_factory=dict)
    biases: dict[str, LearnedBias] = field(default_factory=dict)
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def groups(self, stage: Stage) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser; parameters that are not learned get no gradient."""
        by_rate: dict[float, list[Tensor]] = {}
        for parameter, rate in self._rates(stage):
            parameter.requires_grad_(rate > 0)
            if rate > 0:
                by_rate.setdefault(rate, []).append(parameter)
        return [{"params": params, "lr": rate, "peak": rate} for rate, params in by_rate.items()]

    def _rates(self, stage: Stage) -> Iterator[tuple[Tensor, float]]:
        """Every parameter with its learning rate."""

        def finer(bits: int) -> float:
            return 2.0 ** min(0, 4 - bits) if stage.finer else 1.0

        for weight in self.weights.values():
            roundings = [p for name, p in weight.named_parameters() if name != "log_factor"]
            yield from ((parameter, stage.weight_rate) for parameter in roundings)
            yield weight.log_factor, stage.scale_rate * finer(weight.point.grid.bits)
        for value, bias in self.biases.items():
            yield bias.shift, stage.bias_rate * finer(self.widths[value])
        for activation in self.activations.values():
            yield activation.log_factor, stage.step_rate * finer(activation.point.grid.bits)

    def judged(self, hard: bool) -> None:
        """Quantize as the written file will (`hard`), or as learning does."""
        for weight in self.weights.values():
            weight.hardened = hard

    def schedule(self, stage: Stage, done: float) -> None:
        """Set how much of each activation is quantized; `done` is the share of the steps taken, 1 at the end."""
        share = {"all": 1.0, "gradual": done, "drop": 1.0 if done >= 1 else 0.5}[stage.activations]
        for quantizer in self.activations.values():
            quantizer.share, quantizer.drop = share, stage.activations == "drop"


def install(student: Mirror, problem: Problem, piece: Piece, stage: Stage, nodes: set[Any], done: set[str]) -> Parts:
    """Put learned quantizers in place of the piece's plain ones, except those that an earlier piece has learned."""
    parts, plan = Parts(), problem.plan
    units = _units(problem, piece)
    for layer in piece.layers:
        weight = layer.weight.name
        if weight in plan and weight not in parts.weights and weight not in done:
            quantizer = student.quantizer(weight)
            assert isinstance(quantizer, Quantizer)
            parts.weights[weight] = ROUNDINGS[stage.rounding](quantizer, student.constant(weight))
        bias = layer.bias.name if layer.bias is not None else ""
        if bias in plan and bias not in parts.biases and bias not in done:
            plain = student.quantizer(bias)
            assert isinstance(plain, BiasQuantizer)
            parts.biases[bias] = LearnedBias(plain, student.constant(bias), units[layer.output.name])
            factors = [plan.root(tensor.name).grid for tensor in (layer.weight, layer.source) if tensor.name in plan]
            parts.widths[bias] = min(grid.bits for grid in factors)
    used = {node.target for node in nodes if node.op == "call_module"}
    for value, name in student.quantizers.items():
        module = student.quantizer(value)
        if name in used and isinstance(module, Quantizer) and module.point.role == "activation" and value not in done:
            parts.activations[value] = ActivationQuantizer(module)
    for value, learned in {**parts.weights, **parts.biases, **parts.activations}.items():
        student.replace(value, learned)
    return parts


@torch.no_grad()
def _units(problem: Problem, piece: Piece) -> dict[str, Tensor]:
    """By layer output: what its biases are learned in units of, on a few samples.

    The root mean square of the float output; less for channels whose spread is far below, as where columns differ in scale.
    """
    raw = pieces.raw_nodes(problem.teacher)
    names = [layer.output.name for layer in piece.layers]
    run = pieces.function(problem.teacher, pieces.placeholders(problem.teacher), [raw[name] for name in names])
    chunks = torch.split(torch.arange(min(problem.effort.batch, len(problem.samples[0]))), problem.together)
    found = [run(*[x[chunk] for x in problem.samples]) for chunk in chunks]
    return {
        layer.output.name: _unit(layer, _joined(values))
        for layer, values in zip(piece.layers, zip(*found, strict=True), strict=True)
    }


def _unit(layer: Layer, output: Tensor) -> Tensor:
    """What a step of the layer's bias is a share of: one number, or one per element of the bias."""
    whole = output.square().mean().sqrt().clamp(min=1e-6)
    channels = output.movedim(layer.output_axis, 0).reshape(output.shape[layer.output_axis], -1)
    bias = None if layer.bias is None else layer.bias.values
    if bias is None or bias.size != len(channels) or channels.shape[1] < 2:
        return whole
    return torch.minimum(whole, SPREADS * channels.std(1)).clamp(min=1e-9).reshape(bias.shape)


@torch.no_grad()
def baked_state(student: Mirror) -> Tensors:
    """The state that the student has as a plain mirror: constants on their grids, learned scales."""
    state = {key: value.clone() for key, value in student.state_dict().items()}
    for value, name in student.quantizers.items():
        module = student.quantizer(value)
        if isinstance(module, LearnedBias | LearnedScale):
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
        if isinstance(module, LearnedBias):
            state[student.constants[value]] = module.shifted(student.constant(value)).clone()
        if isinstance(module, LearnedScale):
            scale = module.scale.clone()
            state |= {f"{name}.scale": scale, f"{name}.zero_point": module.zero_point.clone()}
            if isinstance(module, WeightQuantizer):
                constant = student.constant(value)
                state[student.constants[value]] = module.hard() * along(scale, module.point.grid.axis, constant.ndim)
    return state


@torch.no_grad()
def bake(student: Mirror, plan: Plan) -> None:
    """Turn all learned quantizers back into constants on their grids and plain quantizers with the learned scales."""
    state = baked_state(student)
    for value in student.quantizers:
        module = student.quantizer(value)
        if isinstance(module, LearnedBias):
            student.replace(value, BiasQuantizer(module.point))
        elif isinstance(module, LearnedScale):
            student.replace(value, Quantizer(module.point, module.qparams))
    student.load_state_dict(state)
    fit_biases(student, plan)


def _coefficients(
    problem: Problem, stage: Stage, values: Sequence[Tensor], layers: Sequence[Layer]
) -> list[float | Tensor]:
    """Per compared value, what its mean squared error counts: one number, or one per sample."""
    n = len(values)
    power = [1 / (n * max(float(value.square().mean()), 1e-20)) if value.numel() else 0.0 for value in values]
    if stage.weighting == "none" or n == 0:
        return [stage.features * c for c in power]
    if stage.weighting == "mse" or len(layers) != n:
        return [stage.features * _channels(value) for value in values]
    raw = problem.samples
    if stage.weighting == "lfh":
        wanted = -(-HESSIAN_SAMPLES // problem.multiple) * problem.multiple
        few = hessian.sample_ids(len(raw[0]), wanted, problem.seed)
        traces, _ = hessian.label_free_hessian(
            problem.teacher, problem.graph, layers, [x[few] for x in raw], batch=problem.together, seed=problem.seed
        )
        weights = hessian.log_normalised(traces)
        return [stage.features * weights[layer.output.name] for layer in layers]
    _, scores = hessian.label_free_hessian(
        problem.teacher, problem.graph, layers, raw, batch=problem.together, seed=problem.seed
    )
    if stage.last == "cap":
        scores = hessian.capped(scores, moved_from(problem.graph, learning_targets(problem.graph)))
    most = max(float(score.mean()) for score in scores.values()) or 1.0
    return [
        (stage.features * _channels(value) / most * scores[layer.output.name]).float().to(value.device)
        for layer, value in zip(layers, values, strict=True)
    ]


def _channels(value: Tensor) -> float:
    return float(value.shape[1]) if value.ndim > 1 else 1.0


class _SquaredError(torch.autograd.Function):
    """factor * mean((a - b) ** 2) in half the memory traffic of torch's own, whose gradient allocates once more."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, factor: float) -> Tensor:
        difference = a - b
        ctx.save_for_backward(difference)
        ctx.factor = factor / max(1, difference.numel())
        total: Tensor = torch.dot(flat(difference), flat(difference)) * ctx.factor
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * ctx.factor * gradients[0]), None, None


def squared_error(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Factor * mean((a - b) ** 2)."""
    error: Tensor = _SquaredError.apply(a.float(), b, factor)  # type: ignore[no-untyped-call]
    return error


class _Order:
    """Sample indices of one batch after another: every sample once before any comes again."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch = count, min(batch, count)
        self.generator = torch.Generator().manual_seed(seed)
        self.left = torch.empty(0, dtype=torch.long)

    def next(self) -> Tensor:
        while len(self.left) < self.batch:
            self.left = torch.cat([self.left, torch.randperm(self.count, generator=self.generator)])
        batch, self.left = self.left[: self.batch], self.left[self.batch :]
        return batch


@dataclass
class Cache:
    """The teacher's values for all samples, kept for the stages that learn from the same ones.

    Attributes:
        visits: samples that will be asked for, counted as often as they are; keeping them is not worth it below twice each.
    """

    visits: float = math.inf
    names: tuple[str, ...] | None = None
    values: list[Tensor] | None = None

    def of(self, names: tuple[str, ...], count: int, compute: Callable[[], list[Tensor] | None]) -> list[Tensor] | None:
        """What is kept of `count` samples under these names, or else what `compute` returns."""
        if names != self.names:
            self.values = None  # before the others need their place
            self.names, self.values = names, compute() if self.visits >= 2 * count else None
        return self.values


class _Piece:
    """One piece while it learns: its functions, learned quantizers, targets and optimiser."""

    def __init__(
        self,
        problem: Problem,
        student: Mirror,
        stage: Stage,
        piece: Piece,
        first: bool,
        ours: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        done: set[str],
        cache: Cache | None = None,
    ) -> None:
        self.problem, self.stage = problem, stage
        teacher, whole = problem.teacher, stage.scope == "network"
        mine, its = pieces.raw_nodes(student), pieces.raw_nodes(teacher)
        inputs = [pieces.input_nodes(mirror, piece.inputs, first) for mirror in (student, teacher)]
        if whole:  # behind a final Sigmoid: where most of a detector's scores are near 0, the others count
            targets = judged_targets(problem.graph)
        else:
            inside = _inside(problem.graph, piece)
            targets = [target for target in learning_targets(problem.graph) if target in inside]
        self.layers = [layer for layer in piece.layers if layer.output.name in its] if whole and stage.features else []
        compared = [layer.output.name for layer in self.layers]
        self.distributions = len(targets) if whole and stage.kl else 0
        known = distributed(problem.graph, targets)
        self.axes = [known.get(target) for target in targets]
        ends = [pieces.final_nodes(mirror) for mirror in (student, teacher)]
        crossing = (
            [] if whole else [name for name in piece.outputs if name not in {t.name for t in problem.graph.outputs}]
        )
        wanted = [*compared, *(targets if self.distributions or not whole else [])]
        outputs = [
            [*(raw[name] for name in wanted), *(final[name] for name in crossing)]
            for raw, final in zip((mine, its), ends, strict=True)
        ]
        nodes = pieces.needed_nodes(inputs[0], outputs[0])
        self.parts = install(student, problem, piece, stage, nodes, done)
        self.student, self.teacher, self.deciding = pieces.in_step(
            student, teacher, inputs, outputs, decisions(problem.graph), mapped=problem.mapped
        )
        self.ours, self.theirs = ([kept[name] for name in piece.inputs] for kept in (ours, theirs))
        if first:
            self.ours = self.theirs = list(problem.samples)
        self.cache = (cache or Cache()).of((*wanted, *crossing), len(self.theirs[0]), self._cached)
        first_batch = torch.split(torch.arange(min(problem.effort.batch, len(self.ours[0]))), problem.learned_together)
        found = [self._expected(chunk)[: len(outputs[1])] for chunk in first_batch]
        few = [_joined(values) for values in zip(*found, strict=True)]
        names = [*wanted, *crossing]
        factors = column_factors(teacher, names, few)
        self.factors = [factors.get(name) for name in names]
        few = [x if f is None else torch.ones_like(x) for x, f in zip(few, self.factors, strict=True)]
        self.coefficients = _coefficients(problem, stage, few[: len(few) - self.distributions], self.layers)
        self.penalties = self._penalties()
        groups = self.parts.groups(stage)
        self.optimizer = optimizer(stage.optimizer, groups) if groups else None
        if problem.compile:
            islands.keep_from_compiling()
            self.student = torch.compile(self.student)

    @torch.no_grad()
    def _cached(self) -> list[Tensor] | None:
        """The teacher's values for all samples, if they fit."""
        if self.deciding:  # what is decided may not come sample by sample
            return None
        batch, count = self.problem.learned_together, len(self.theirs[0])
        first = self.teacher(*[x[:batch] for x in self.theirs])
        size = sum(value.numel() * value.element_size() for value in first) / min(batch, count) * count
        shares = [len(value) // min(batch, count) if value.ndim else 0 for value in first]
        uneven = (rows < 1 or len(x) != rows * min(batch, count) for rows, x in zip(shares, first, strict=True))
        if size > self.problem.cache_bytes or any(uneven) or (set(shares) != {1} and not self.problem.mapped):
            return None
        kept = [
            torch.empty(count * rows, *x.shape[1:], dtype=x.dtype, device=x.device, memory_format=_layout(x))
            for rows, x in zip(shares, first, strict=True)
        ]
        for start in range(0, count, batch):
            values = self.teacher(*[x[start : start + batch] for x in self.theirs])
            for place, rows, value in zip(kept, shares, values, strict=True):
                place[start * rows : (start + batch) * rows] = value
        return kept

    @torch.no_grad()
    def _expected(self, index: Tensor) -> Sequence[Tensor]:
        """What the student should compute, and behind it what the teacher decides."""
        if self.cache is None:
            return self.teacher(*[x[index] for x in self.theirs])
        return [_of_samples(value, index, len(self.theirs[0])) for value in self.cache]

    def _penalties(self) -> dict[str, float]:
        """What each weight's regulariser counts: as much as its layer's error under sla, else the same."""
        factor = self.stage.regularizer
        if self.stage.weighting != "sla":
            return dict.fromkeys(self.parts.weights, factor)
        means = {
            layer.weight.name: float(c.mean())
            for layer, c in zip(self.layers, self.coefficients, strict=True)
            if isinstance(c, Tensor)
        }
        most = max(means.values(), default=1.0) or 1.0
        return {name: factor * means.get(name, most) / most for name in self.parts.weights}

    def inputs(self, index: Tensor) -> list[Tensor]:
        """What the piece is fed: the quantized network's values, under QDrop mixed with the float network's."""
        ours = [x[index] for x in self.ours]
        if self.stage.activations != "drop":
            return ours
        pairs = zip(ours, (x[index] for x in self.theirs), strict=True)
        mixed = [(a, b, a.is_floating_point()) for a, b in pairs]  # ids and truth values are the same in both
        return [torch.where(torch.rand_like(a) < 0.5, a, b) if mixes else a for a, b, mixes in mixed]

    def loss(self, index: Tensor, step: int, steps: int) -> Tensor:
        """The loss of one batch."""
        expected = self._expected(index)
        count = len(expected) - self.deciding
        expected, decided = expected[:count], expected[count:]
        with torch.autocast(self.ours[0].device.type, torch.bfloat16, enabled=self.problem.bf16):
            found: Sequence[Tensor] = self.student(*self.inputs(index), *decided)
        total = torch.zeros((), device=self.ours[0].device)
        found, expected = self._evened(found), self._evened(expected)
        plain = len(found) - self.distributions
        for a, b, c in zip(found[:plain], expected[:plain], self.coefficients, strict=True):
            if isinstance(c, float):
                total = total + squared_error(a, b, c)
            else:
                total = total + (c[index] * _by_sample((a.float() - b).square(), len(index)).to(c)).mean()
        heads = zip(found[plain:], expected[plain:], self.axes[: self.distributions], self.factors[plain:], strict=True)
        for a, b, known, factor in heads:
            axis = distribution_axis(b, known)
            if not b.numel():  # nothing was selected
                continue
            if factor is not None:
                total = total + self.stage.kl * F.mse_loss(a.float(), b)
            elif axis is not None:
                total = total + self.stage.kl * divergence(a.float(), b, axis)
            elif self.problem.mapped:  # each sample by its own power, as where they run one by one
                a, b = (x.reshape(len(index), -1) for x in (a.float(), b))
                total = total + self.stage.kl * ((a - b).square().mean(1) / b.square().mean(1).clamp(min=1e-20)).mean()
            else:
                total = total + self.stage.kl * F.mse_loss(a.float(), b) / b.square().mean().clamp(min=1e-20)
        beta = annealed_beta(step, steps)
        for name, weight in self.parts.weights.items():
            penalty = weight.regularizer(beta)
            if penalty is not None:
                total = total + self.penalties[name] * penalty
        return total

    def _evened(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Compared values, with columns of different scales brought to one."""
        return tuple(x if factor is None else x * factor for x, factor in zip(values, self.factors, strict=True))

    def step(self, index: Tensor, step: int, steps: int) -> Tensor:
        """One step of learning; returns the loss before it."""
        assert self.optimizer is not None
        factor = 1.0
        if not self.stage.constant:  # smaller batches have noisier gradients
            factor = cosine(step, steps, min(20, steps // 10)) * min(1.0, len(index) / BATCH) ** 0.5
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.parts.schedule(self.stage, step / steps)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.ours[0].device)
        for part in torch.split(index, self.problem.learned_together):
            loss = self.loss(part, step, steps) * (len(part) / len(index))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.optimizer.step()
        for weight in self.parts.weights.values():
            weight.project()
        return total

    def undecided(self) -> tuple[int, int]:
        counts = [weight.undecided() for weight in self.parts.weights.values()]
        return sum(count for count, _ in counts), sum(total for _, total in counts)


def _of_samples(x: Tensor, index: Tensor, count: int) -> Tensor:
    """The rows of some of `count` samples, which have as many each, one sample behind the other.

    Taken as rows of a matrix, as they lie in memory: a third of the time that indexing takes.
    """
    last = _layout(x) is torch.channels_last
    dense = x.permute(0, 2, 3, 1) if last else x
    rows = len(x) // count * len(index)
    taken = dense.reshape(count, -1).index_select(0, index.to(x.device)).reshape(rows, *dense.shape[1:])
    return taken.permute(0, 3, 1, 2) if last else taken


def _layout(x: Tensor) -> torch.memory_format:
    """How a copy is laid out so that it meets x element by element in memory."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser of a stage; Adam updates all parameters in one kernel."""
    return torch.optim.RAdam(groups) if name == "radam" else torch.optim.Adam(groups, fused=True)


def _inside(graph: gs.Graph, piece: Piece) -> set[str]:
    """Names of all values made between the piece's inputs and outputs."""
    tensors, found = graph.tensors(), set()
    stack = list(piece.outputs)
    while stack:
        name = stack.pop()
        if name in found or name in piece.inputs:
            continue
        found.add(name)
        for node in tensors[name].inputs:
            stack += [
                tensor.name for tensor in node.inputs if isinstance(tensor, gs.Variable) and not tensor.is_empty()
            ]
    return found


class Learner:
    """A whole run of learning, as an iterator over its steps; the student is plain and final when it ends.

    Args:
        problem: what to learn from.
        student: the plainly rounded student; changed in place.
        saved: where checkpoints go (None: nowhere), and the fingerprint that makes them this run's.
        resume: the state to go on from.
    """

    def __init__(
        self,
        problem: Problem,
        student: Mirror,
        saved: tuple[Path, str] | None = None,
        resume: State | None = None,
    ) -> None:
        self.problem, self.student, self.saved, self.resume = problem, student, saved, resume
        self.learning = Learning(targets=learning_targets(problem.graph))
        scenes = heldout.scenes(problem.samples)
        index, judging = heldout.split(scenes, problem.seed, problem.multiple, problem.judges)
        samples, held = ([x[chosen] for x in problem.samples] for chosen in (index, judging))
        self.scenes = [scenes[i] for i in index.tolist()]
        self.learning.different = len(set(scenes))
        self.learning.held_out = 0 if torch.equal(index, judging) else len(judging)
        judges = {scenes[i] for i in judging.tolist()}
        self.sure = self.learning.held_out > 0 and len(judges) >= heldout.LEAST
        self.images = len(samples[0])  # views come behind them; the closed-form start needs samples as they really are
        problem.samples = with_views(samples, count_views(samples, problem.views, problem.cache_bytes), problem.seed)
        self.judge = Judge(
            problem.teacher,
            problem.graph,
            judged_targets(problem.graph),
            held,
            problem.learned_together,
            problem.mapped,
        )
        self.best: Tensors = {}
        self.losses = torch.empty(0, dtype=torch.float64)  # of the best, per held-out sample
        self.stage = self.piece = self.step = 0
        self.running: _Piece | None = None
        self.pieces = [self._pieces(stage) for stage in problem.method.stages]
        self.total = sum(self.steps_of(i) * sum(bool(p.layers) for p in found) for i, found in enumerate(self.pieces))
        stages = enumerate(problem.method.stages)
        steps = sum(self.steps_of(i) for i, stage in stages if stage.scope == "network")
        self.cache = Cache(steps * problem.effort.batch)
        self.saved_at = time.monotonic()

    def _pieces(self, stage: Stage) -> list[Piece]:
        problem, allowed = self.problem, set()
        if stage.scope != "network" and not problem.chunk:
            allowed = pieces.allowed_cuts(problem.graph, problem.teacher, problem.samples, problem.multiple)
        return pieces.pieces(problem.graph, problem.layers, stage.scope, allowed)

    def steps_of(self, stage: int) -> int:
        """Steps that each piece of a stage learns."""
        return max(1, round(self.problem.effort.steps * self.problem.method.stages[stage].share))

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the loss of each step."""
        started = time.monotonic()
        try:
            if self.resume:
                self._restore(self.resume)
            else:
                self._start()
                self.save()
            for stage in range(self.stage, len(self.problem.method.stages)):
                self.stage = stage
                yield from self._stage()
                self.piece = 0
            self.stage = len(self.problem.method.stages)
            self.student.load_state_dict(self.best)
            self.save()
        finally:
            self.learning.seconds += time.monotonic() - started

    def _start(self) -> None:
        """Judge plain rounding, then begin where the method begins."""
        problem, student = self.problem, self.student
        self._keep("rtn")
        if problem.begun is not None:
            student.load_state_dict(problem.begun)
        if problem.method.start == "float":
            with torch.no_grad():
                for layer in problem.layers:
                    if layer.bias is not None and layer.bias.name in problem.plan:
                        student.constant(layer.bias.name).copy_(problem.teacher.constant(layer.bias.name))
        elif problem.method.start == "compensated":
            self._solve()
            student.load_state_dict(self.best)

    def _solve(self) -> None:
        """Solve layer after layer, with positions that count by their gradients and, if there is time, all alike."""
        problem = self.problem
        batch = problem.chunk or max(min(START_BATCH, problem.effort.batch) // problem.multiple, 1) * problem.multiple
        few = max(1, problem.effort.samples // batch) * batch
        chosen = [x[: self.images][:few] for x in problem.samples]
        batches = [[x[i : i + batch] for x in chosen] for i in range(0, len(chosen[0]), batch)]
        importance = hessian.position_importance(
            problem.teacher, problem.graph, problem.layers, chosen, batch=batch, seed=problem.seed
        )
        starts = {"weighted": importance} if importance else {}
        if problem.effort.starts > len(starts):
            starts["compensated"] = {}
        rounded = {key: value.clone() for key, value in self.student.state_dict().items()}
        selected = decisions(problem.graph)
        different = len(set(self.scenes[:few]))
        caution = dict.fromkeys(starts, 0.0)
        if different < SCARCE:  # positions of one sample are alike, and are no equations of their own
            starts["cautious"], caution["cautious"] = importance, CAUTION / different
        for name, counts in starts.items():
            self.student.load_state_dict(rounded)
            compensate(
                self.student, problem.teacher, problem.plan, problem.layers, batches, counts, selected, caution[name]
            )
            fit_biases(self.student, problem.plan)
            self._keep(name)

    def _keep(self, name: str) -> None:
        """Judge the student as it is, and remember it if it is better than the best so far."""
        losses = self.judge.losses(self.student)
        self.learning.distances[name] = min(mean(losses), self.learning.distances.get(name, math.inf))
        replaces = self.learning.kept in STARTS and name not in STARTS
        if self.best and self.learning.kept == "rtn" and not self.sure:
            rounded = mean(self.losses)
            if mean(losses) > rounded - UNSURE * min(rounded, BROKEN):
                return
        if not self.best or gain(losses, self.losses, errors=LUCK if replaces else 0.0) > 0:
            self.learning.kept = name
            self.best, self.losses = baked_state(self.student), losses

    def _stage(self) -> Iterator[Tensor]:
        problem, stage = self.problem, self.problem.method.stages[self.stage]
        names = [tensor.name for tensor in problem.graph.inputs]
        ours = theirs = dict(zip(names, problem.samples, strict=True))
        done: set[str] = set()
        for index, piece in enumerate(self.pieces[self.stage]):
            first = index == 0
            if index >= self.piece:
                self.piece = index
                yield from self._learn(stage, piece, first, ours, theirs, done)
            if index + 1 < len(self.pieces[self.stage]):
                ours, theirs = self._advance(piece, first, ours, theirs)
            done |= self._values(piece, first)
        self._keep(stage_name(self.stage, stage))
        if stage.scope == "network":  # the next stage goes on from the best student so far
            self.student.load_state_dict(self.best)

    def _values(self, piece: Piece, first: bool) -> set[str]:
        """Planned values whose quantizers the piece has learned."""
        finals = pieces.final_nodes(self.student)
        outputs = [finals[name] for name in piece.outputs]
        nodes = pieces.needed_nodes(pieces.input_nodes(self.student, piece.inputs, first), outputs)
        used = {node.target for node in nodes if node.op == "call_module"}
        return {value for value, name in self.student.quantizers.items() if name in used}

    @torch.no_grad()
    def _advance(
        self, piece: Piece, first: bool, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What crosses the piece's end in both networks; the student selects what the teacher does."""
        mirrors, batch = (self.student, self.problem.teacher), self.problem.together
        places = [pieces.input_nodes(mirror, piece.inputs, first) for mirror in mirrors]
        ends = [[pieces.final_nodes(mirror)[name] for name in piece.outputs] for mirror in mirrors]
        student, teacher, _ = pieces.in_step(*mirrors, places, ends, decisions(self.problem.graph))
        decided: list[Sequence[Tensor]] = []

        def decide(*inputs: Tensor) -> tuple[Tensor, ...]:
            found = teacher(*inputs)
            decided.append(found[len(ends[1]) :])
            return found[: len(ends[1])]

        exact = pieces.advance(decide, piece, theirs, batch)
        batches = iter(decided)
        return pieces.advance(lambda *inputs: student(*inputs, *next(batches)), piece, ours, batch), exact

    def _learn(
        self,
        stage: Stage,
        piece: Piece,
        first: bool,
        ours: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        done: set[str],
    ) -> Iterator[Tensor]:
        problem, steps = self.problem, self.steps_of(self.stage)
        if not piece.layers:
            self.step = 0
            return
        whole = stage.scope == "network"
        cache = self.cache if whole else Cache(steps * problem.effort.batch)
        running = self.running = _Piece(problem, self.student, stage, piece, first, ours, theirs, done, cache)
        seed = (problem.seed * 1_000_003 + self.stage * 10_007 + self.piece) % SEEDS
        order = _Order(len(running.ours[0]), problem.effort.batch, seed)
        if self.resume:
            self._restore_running(running, self.resume)
            self.resume = None
        for _ in range(self.step):
            order.next()
        if running.optimizer is None:  # all of it was learned by an earlier piece
            yield from torch.zeros(steps)
            self.step = steps
        while self.step < steps:
            index = order.next()
            if stage.activations == "drop":
                with DRAWING, torch.random.fork_rng(devices=[]):
                    # A resumed run draws what the whole one draws.
                    torch.manual_seed((seed * 65_537 + self.step) % SEEDS)
                    loss = running.step(index, self.step, steps)
            else:
                loss = running.step(index, self.step, steps)
            self.step += 1
            self.learning.steps += 1
            if self.step % max(1, steps // CURVE) == 0:
                self.learning.curve.append(
                    {"stage": self.stage, "piece": self.piece, "step": self.step, "loss": float(loss)}
                )
            if whole and self.step % max(-(-steps // CHECKS), CHECK_STEPS) == 0 and self.step < steps:
                self._check(running, stage)
            self._checkpoint()
            try:
                yield loss
            except (KeyboardInterrupt, GeneratorExit):  # within a step nothing would belong together
                self.save()
                raise
        self._harden(running, stage)

    def _check(self, running: _Piece, stage: Stage) -> None:
        """Judge the student as the written file would be, in the middle of a stage."""
        running.parts.schedule(stage, 1.0)
        running.parts.judged(True)
        self._keep(stage_name(self.stage, stage))
        running.parts.judged(False)

    def _harden(self, running: _Piece, stage: Stage) -> None:
        """End a piece: log what hard rounding costs, then bake."""
        running.parts.schedule(stage, 1.0)
        open_, total = running.undecided()
        if stage.scope == "network":
            soft = self.judge.distance(self.student) if open_ else 0.0
            running.parts.judged(True)
            self.learning.gap = self.judge.distance(self.student) - soft if open_ else 0.0
        self.learning.undecided = max(self.learning.undecided, open_ / max(total, 1))
        self.running, self.step = None, 0
        bake(self.student, self.problem.plan)

    def _checkpoint(self) -> None:
        if self.saved and time.monotonic() - self.saved_at > INTERVAL:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, if there is a place for it; only called between steps, when all of the state belongs together."""
        if self.saved is None:
            return
        facts = {"stage": self.stage, "piece": self.piece, "step": self.step, "learning": asdict(self.learning)}
        tensors = {f"student.{key}": value for key, value in self.student.state_dict().items()}
        tensors |= {"losses": self.losses} | {f"best.{key}": value for key, value in self.best.items()}
        if self.running is not None and self.running.optimizer is not None:
            for index, entry in self.running.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        checkpoint.save(self.saved[0], State(tensors, facts), self.saved[1])
        self.saved_at = time.monotonic()

    def _restore(self, state: State) -> None:
        """Take over counters and the best student so far; the student itself follows when its quantizers are in place."""
        self.stage, self.piece, self.step = (int(state.facts[key]) for key in ("stage", "piece", "step"))
        self.learning = Learning(**state.facts["learning"])
        self.best, self.losses = state.part("best."), state.tensors["losses"]
        own = self.student.state_dict()
        plain = {key: value for key, value in state.part("student.").items() if key in own}
        self.student.load_state_dict(plain, strict=False)
        if self.step == 0:
            self.resume = None

    def _restore_running(self, running: _Piece, state: State) -> None:
        self.student.load_state_dict(state.part("student."))
        if running.optimizer is not None:
            entries: dict[int, dict[str, Tensor]] = {}
            for key, value in state.part("optimizer.").items():
                index, name = key.split(".")
                entries.setdefault(int(index), {})[name] = value
            running.optimizer.load_state_dict({**running.optimizer.state_dict(), "state": entries})


def stage_name(index: int, stage: Stage) -> str:
    """How reports call a stage."""
    return f"{index + 1} {stage.scope}/{stage.rounding}"
