"""A closed-form start for learning: layers are solved one after another, each making up for the errors before it.

For each layer, from the input on, the weights that best turn the *quantized* network's values into the *float* network's
output are found by ridge regression, and rounded column by column so that the columns still to come absorb each error
(GPTQ, arXiv 2210.17323, with the asymmetric target of GPTAQ, arXiv 2504.02692). The bias takes the mean that is left.
Positions that matter more to the network's outputs count more (after GuidedQuant, arXiv 2505.07004).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from onnx_eptq.calibrate import apply_linear
from onnx_eptq.grid import Grid, round_half_even
from onnx_eptq.mirror import Mirror, Quantizer
from onnx_eptq.ops import op_of
from onnx_eptq.plan import Layer, Plan

DAMPING = 0.03  # of the mean diagonal: how strongly solved weights are drawn to the float ones
FEW = 10.0  # how much more so when there are as few equations as unknowns
SHARES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)  # of the calibrated scale that compete per channel
LEAST_ROWS = 32768
ROWS = 64  # equations per unknown that are gathered where the data has them
MOST_ROWS = 65536  # but no more, as an equation costs the square of the unknowns;
NEEDED_ROWS = 4  # per unknown, whatever it costs
SWEEPS = 4  # of coordinate descent
BLOCK = 64  # columns between two updates of all that follow
# Second moments are summed in float32: from this multiple of the variances on, what is left of them is mostly rounding.
CANCELLING = 3000.0


@dataclass
class Moments:
    """Sums over all output positions of one layer: inputs (columns) x and float outputs y, per group.

    Shapes: xx [groups, K, K], yx [groups, R, K], x [groups, K], y [groups, R]; float64. `count` is the sum of what the
    positions count. All sums are of differences from `origin`, a pair shaped like x and y.
    """

    xx: Tensor
    yx: Tensor
    x: Tensor
    y: Tensor
    count: float = 0
    origin: tuple[Tensor, Tensor] | None = None

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Of columns and outputs."""
        x, y = self.x / self.count, self.y / self.count
        return (x, y) if self.origin is None else (x + self.origin[0], y + self.origin[1])

    @property
    def is_cancelling(self) -> bool:
        """Whether the columns' variances vanish beside the squares that they are a difference of."""
        squares = self.xx.diagonal(dim1=1, dim2=2) / self.count
        variances = squares - (self.x / self.count).square()
        return bool((squares.amax(1) > CANCELLING * variances.mean(1)).any())


def group_count(layer: Layer) -> int:
    """Groups of a convolution, 1 for any other layer."""
    return int(layer.node.attrs.get("group", 1))


def can_solve(layer: Layer) -> bool:
    """Whether the layer's weight is a matrix (per group) with one row per output channel."""
    return layer.axis is not None and (group_count(layer) == 1 or layer.axis == 0)


Thinned = Callable[..., Tensor]  # input, weight, group=
Importance = Mapping[str, Sequence[Tensor]]


def columns(layer: Layer, x: Tensor, weight: Tensor, apply: Thinned | None = None) -> Tensor:
    """What each output position reads, as [groups, K, positions]: the layer applied with unit weights.

    `apply` computes fewer positions, as `thinned` returns it. A convolution takes its input's channels one by one: as many
    multiplications less as there are channels.
    """
    assert layer.axis is not None
    groups, unit = group_count(layer), weight.movedim(layer.axis, 0)[0]
    repeats, changed, kernel = groups, {}, unit
    if op_of(layer.node).windows:
        repeats, changed, kernel = x.shape[1], {"group": x.shape[1]}, unit[:1]
    eye = torch.eye(kernel.numel(), dtype=x.dtype, device=x.device).reshape(-1, *kernel.shape)
    kernels = eye.repeat(repeats, *[1] * unit.ndim).movedim(0, layer.axis)
    out = (apply or partial(apply_linear, layer))(x, kernels, **changed)
    return out.movedim(layer.output_axis, 0).reshape(groups, unit.numel(), -1)


def thinned(layer: Layer, every: int, first: int) -> Thinned | None:
    """The layer at every `every`-th output position of each axis, from `first` on; None where it is no plain convolution."""
    attributes = layer.node.attrs
    if not op_of(layer.node).windows or attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    dims = len(layer.weight.shape) - 2
    strides, pads = list(attributes.get("strides") or [1] * dims), list(attributes.get("pads") or [0] * 2 * dims)
    begin = [pads[axis] - first * strides[axis] for axis in range(dims)]
    edges = [edge for axis in reversed(range(dims)) for edge in (begin[axis], pads[dims + axis])]
    changed = {
        "strides": tuple(stride * every for stride in strides),
        "dilations": tuple(attributes.get("dilations") or [1] * dims),
    }

    def apply(x: Tensor, weight: Tensor, *, group: int) -> Tensor:
        result: Tensor = op_of(layer.node).function(functional.pad(x, edges), weight, group=group, **changed)
        return result

    return apply


def as_rows(layer: Layer, weight: Tensor) -> Tensor:
    """The weight as [groups, R, K]."""
    assert layer.axis is not None
    moved = weight.movedim(layer.axis, 0)
    return moved.reshape(group_count(layer), len(moved) // group_count(layer), -1)


def from_rows(layer: Layer, rows: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `as_rows`, shaped like `weight`."""
    assert layer.axis is not None
    return rows.reshape(weight.movedim(layer.axis, 0).shape).movedim(0, layer.axis)


def gather(
    layer: Layer,
    pairs: Iterable[tuple[Tensor, Tensor]],
    weight: Tensor,
    samples: int,
    importance: Sequence[Tensor] | None = None,
    origin: tuple[Tensor, Tensor] | None = None,
) -> Moments:
    """Sum the moments over pairs (input of the quantized network, output of the float network without its bias).

    Of convolutions with more positions in all samples than equations are needed, only some are read, others in each batch.
    `importance`, per pair, is what each position counts, shaped like the output without its channels (by default 1).
    """
    groups, outputs, unknowns = as_rows(layer, weight).shape
    shapes = (groups, unknowns, unknowns), (groups, outputs, unknowns), (groups, unknowns), (groups, outputs)
    xx, yx, x_sum, y_sum = (torch.zeros(shape, dtype=torch.float64, device=weight.device) for shape in shapes)
    if origin is not None:  # as exact as what it is taken from
        origin = origin[0].float().double(), origin[1].float().double()
    moments = Moments(xx, yx, x_sum, y_sum, origin=origin)
    for index, (x, y) in enumerate(pairs):
        if not y.numel():  # nothing was selected
            continue
        wanted = min(max(ROWS * unknowns, LEAST_ROWS), max(MOST_ROWS, NEEDED_ROWS * unknowns))
        positions = y.numel() // y.shape[layer.output_axis] // len(y) * samples
        dims = y.ndim - 2
        root = (positions // wanted) ** (1 / dims) if positions > wanted and op_of(layer.node).windows else 1.0
        every = int(root + 1e-9)
        offset = index % every
        apply = thinned(layer, every, offset) if every > 1 and min(y.shape[2:]) > offset else None
        counts = None if importance is None else importance[index]
        if apply is not None:
            some = (slice(None), *[slice(offset, None, every)] * dims)
            y = y[(slice(None), *some)]
            counts = None if counts is None else counts[some]
        cols = columns(layer, x, weight, apply)
        target = y.movedim(layer.output_axis, 0).reshape(groups, outputs, -1)
        if origin is not None:
            cols, target = (v - o[:, :, None].float() for v, o in zip((cols, target), origin, strict=True))
        each = torch.ones_like(cols[0, 0]) if counts is None else counts.reshape(-1)
        weighted = cols if counts is None else cols * each
        moments.xx += (weighted @ cols.mT).double()
        moments.yx += (target @ weighted.mT).double()
        moments.x += (cols @ each).double()
        moments.y += (target @ each).double()
        moments.count += float(each.double().sum())
    return moments


def _sizes(layer: Layer) -> tuple[int, int, int]:
    """Groups, rows and unknowns of a layer that can be solved."""
    assert layer.axis is not None
    groups, channels = group_count(layer), int(layer.weight.shape[layer.axis])
    return groups, channels // groups, math.prod(layer.weight.shape) // channels


def solving_cost(layer: Layer) -> float:
    """Multiplications, about, that solving and rounding the layer takes once its moments are known; none if that is not done."""
    if not can_solve(layer):
        return 0.0
    groups, rows, unknowns = _sizes(layer)
    return float(groups * unknowns**2 * (unknowns + (len(SHARES) + 2 * SWEEPS + 1) * rows))


def solving_bytes(layer: Layer) -> int:
    """Bytes, about, that this takes: the moments and what they are factored into, and all shares of the rows three times."""
    if not can_solve(layer):
        return 0
    groups, rows, unknowns = _sizes(layer)
    return 8 * groups * unknowns * (6 * unknowns + 3 * len(SHARES) * rows)


def solve(rows: Tensor, moments: Moments, caution: float = 0.0) -> tuple[Tensor, Tensor]:
    """Ridge regression drawn to `rows`: the best weights [groups, R, K] and the damped covariance [groups, K, K].

    `caution`: by how many times more than usual it is drawn.
    """
    mean_x, mean_y = moments.x / moments.count, moments.y / moments.count
    xx = moments.xx / moments.count - mean_x[:, :, None] * mean_x[:, None, :]
    yx = moments.yx / moments.count - mean_y[:, :, None] * mean_x[:, None, :]
    size = xx.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    share = DAMPING * (1 + FEW * rows.shape[2] / moments.count + caution)
    damped = xx + (share * size)[:, None, None] * torch.eye(rows.shape[2], dtype=xx.dtype, device=xx.device)
    return rows + torch.linalg.solve(damped, (yx - rows @ xx).mT).mT, damped


def round_columns(rows: Tensor, covariance: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round [groups, R, K] column by column, later columns absorbing each error; returns (latent weights, error per row).

    The latent weights are what was rounded: they lie in the cells of the codes that were chosen.
    """
    unknowns = rows.shape[2]
    order = covariance.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    permuted = covariance.gather(1, order[:, :, None].expand_as(covariance)).gather(
        2, order[:, None, :].expand_as(covariance)
    )
    inverse = torch.cholesky_inverse(_factor(permuted))
    upper = _factor(inverse, upper=True)
    # [groups, K, R]: what is worked on together lies together
    work = rows.mT.gather(1, order[:, :, None].expand_as(rows.mT))
    latent, error = torch.empty_like(work), torch.zeros_like(scale)
    for start in range(0, unknowns, BLOCK):
        stop = min(start + BLOCK, unknowns)
        errors = torch.empty_like(work[:, start:stop])
        for j in range(start, stop):
            w = work[:, j]
            latent[:, j] = w
            code = torch.clamp(round_half_even(w / scale), grid.qmin, grid.qmax)
            e = (w - code * scale) / upper[:, j, j, None]
            errors[:, j - start] = e
            work[:, j + 1 : stop] -= upper[:, j, j + 1 : stop, None] * e[:, None]
        error += errors.square().sum(1)
        work[:, stop:] -= upper[:, start:stop, stop:].mT @ errors
    back = order.argsort(1)[:, :, None].expand_as(latent)
    return latent.gather(1, back).mT, error


def _factor(covariance: Tensor, *, upper: bool = False) -> Tensor:
    """The Cholesky factor, of a little more than the covariance where rounding has left it no positive one."""
    eye = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
    more = 1e-6 * covariance.diagonal(dim1=1, dim2=2).abs().mean(1).clamp(min=1e-30)
    found: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(covariance, upper=upper)
    while found[1].any() and more.isfinite().all():
        more = 10 * more
        added = torch.where(found[1] > 0, more, 0.0)
        found = torch.linalg.cholesky_ex(covariance + added[:, None, None] * eye, upper=upper)
    return found[0]


def best_scale(rows: Tensor, covariance: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Latent weights and scales [groups, R] of least error, row by row, among `SHARES` of `scale`."""
    groups, outputs, _ = rows.shape
    shares = torch.tensor(SHARES, dtype=rows.dtype, device=rows.device)
    scales = (scale[:, None, :] * shares[:, None]).reshape(groups, -1)
    latent, error = round_columns(rows.repeat(1, len(SHARES), 1), covariance, scales, grid)
    best = error.reshape(groups, len(SHARES), outputs).argmin(1)
    index = best * outputs + torch.arange(outputs, device=best.device)
    return latent.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2])), scales.gather(1, index)


def descend(latent: Tensor, target: Tensor, covariance: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Coordinate descent on the codes of `latent` and, between sweeps, on the scales; never raises the error.

    The error of a row is (w - s q) C (w - s q)', with w of `target` and C the covariance. Returns (latent weights, scales).
    """
    # [groups, K, R], as in `round_columns`; the covariance is symmetric
    codes = torch.clamp(round_half_even(latent.mT.contiguous() / scale[:, None]), grid.qmin, grid.qmax)
    diagonal = covariance.diagonal(dim1=1, dim2=2)[:, :, None].clamp(min=1e-30)
    product = covariance @ target.mT
    for _ in range(SWEEPS):
        response = covariance @ codes
        fitted = (codes * product).sum(1) / (codes * response).sum(1).clamp(min=1e-30)
        scale = torch.where(fitted > 0.5 * scale, fitted, scale)
        gradient = product / scale[:, None] - response
        changed = False
        for start in range(0, codes.shape[1], BLOCK):
            stop = min(start + BLOCK, codes.shape[1])
            steps = torch.zeros_like(codes[:, start:stop])
            for j in range(start, stop):
                old = codes[:, j]
                best = torch.clamp(round_half_even(old + gradient[:, j] / diagonal[:, j]), grid.qmin, grid.qmax)
                step = best - old
                if step.any():
                    steps[:, j - start] = step
                    codes[:, j] = best
                    gradient[:, start:stop] -= covariance[:, j, start:stop, None] * step[:, None]
                    changed = True
            if steps.any():
                gradient[:, :start] -= covariance[:, :start, start:stop] @ steps
                gradient[:, stop:] -= covariance[:, stop:, start:stop] @ steps
        if not changed:
            break
    lean = (gradient / diagonal).clamp(-0.49, 0.49)
    return ((codes + lean) * scale[:, None]).mT, scale


class Lockstep:
    """Runs an fx module node by node over many batches at once, so that a node can change before it is run.

    Args:
        module: what is run.
        batches: its inputs.
        decisions: values that another run takes over (`outputs.decisions`); they are kept.
        guide: the run that they are taken from, which is always ahead; None: they are computed.
    """

    def __init__(
        self,
        module: Mirror,
        batches: Sequence[Sequence[Tensor]],
        decisions: Collection[str] = (),
        guide: Lockstep | None = None,
    ) -> None:
        self.module, self.nodes, self.at = module, list(module.graph.nodes), 0
        self.decisions, self.guide = decisions, guide
        self.decided: list[dict[str, Any]] = [{} for _ in batches]
        self.constant = constant_nodes(module)
        self.last_use = last_uses(self.nodes, self.constant)
        places = [node for node in self.nodes if node.op == "placeholder"]
        self.environments: list[dict[fx.Node, Any]] = [dict(zip(places, batch, strict=True)) for batch in batches]
        self.by_name = {node.meta["onnx"]: node for node in self.nodes if "onnx" in node.meta}

    def source_of(self, name: str, index: int) -> fx.Node:
        """Run up to the ONNX node `name`; returns the fx node of its input `index`."""
        stop = self.by_name[name]
        self.until(stop)
        source = stop.args[index]
        assert isinstance(source, fx.Node)
        return source

    def value(self, node: fx.Node, environment: Mapping[fx.Node, Any]) -> Any:
        """A node's value in one batch; what depends on constants alone is computed anew, as it may have changed."""
        if node in environment:
            return environment[node]
        if node.op == "get_attr":
            return reduce(getattr, str(node.target).split("."), self.module)
        return self._execute(node, environment)

    def _execute(self, node: fx.Node, environment: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self.value(source, environment))
        function: Any = self.module.get_submodule(node.target) if isinstance(node.target, str) else node.target
        return function(*args, **kwargs)

    def until(self, stop: fx.Node) -> None:
        """Run every node before `stop` (in the module's order), batch by batch, and forget what no later node reads."""
        start, self.at = self.at, self.nodes.index(stop)
        nodes = [
            node
            for node in self.nodes[start : self.at]
            if node not in self.constant and node.op not in ("placeholder", "output")
        ]
        for index, environment in enumerate(self.environments):
            for node in nodes:
                value = node.meta.get("value")
                if value in self.decisions and self.guide is not None:
                    environment[node] = self.guide.decided[index][value]
                else:
                    environment[node] = self._execute(node, environment)
                if value in self.decisions:
                    self.decided[index][value] = environment[node]
                for source in node.all_input_nodes:
                    if self.last_use.get(source) is node:
                        del environment[source]


def constant_nodes(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes that no input reaches."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr" or (
            node.op not in ("placeholder", "output") and all(n in found for n in node.all_input_nodes)
        ):
            found.add(node)
    return found


@torch.no_grad()
def compensate(
    student: Mirror,
    teacher: Mirror,
    plan: Plan,
    layers: Sequence[Layer],
    batches: Sequence[Sequence[Tensor]],
    importance: Importance | None = None,
    decisions: Collection[str] = (),
    caution: float = 0.0,
) -> list[str]:
    """Set weights, weight scales and biases of the student layer by layer, from the input on.

    The weight constants become latent weights: numbers whose rounding gives the chosen codes. Weights that several layers
    share are solved for the first of them.

    Args:
        student: the quantized mirror; changed in place.
        teacher: the float mirror of the same graph.
        plan: where the student's quantizers sit.
        layers: the graph's linear layers, in execution order.
        batches: network inputs, one sequence of tensors per batch; all batches are held at once.
        importance: by layer output, what each of its positions counts, per batch: `hessian.position_importance`.
        decisions: values that the student takes over from the teacher: `outputs.decisions`.
        caution: as for `solve`.

    Returns:
        The names of the weights that were solved.
    """
    theirs = Lockstep(teacher, batches, decisions)
    ours = Lockstep(student, batches, decisions, theirs)
    solved: list[str] = []
    for layer in layers:
        if layer.weight.name in plan and layer.weight.name not in solved and can_solve(layer):
            weight = teacher.constant(layer.weight.name)
            counts = importance.get(layer.output.name) if importance else None
            sums = partial(gather, layer, weight=weight, samples=sum(len(x[0]) for x in batches), importance=counts)
            moments = sums(_pairs(layer, ours, theirs, weight))
            if not moments.count:
                continue
            if moments.is_cancelling:  # channels that hardly vary: once more, about their means
                moments = sums(_pairs(layer, ours, theirs, weight), origin=moments.means)
            _settle(layer, student, teacher, moments, caution)
            solved.append(layer.weight.name)
    return solved


def _pairs(layer: Layer, ours: Lockstep, theirs: Lockstep, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Per batch: what the layer reads in the quantized network, and its output in the float one, without its bias."""
    index = next(i for i, tensor in enumerate(layer.node.inputs) if tensor is layer.source)
    exact, quantized = (steps.source_of(layer.node.name, index) for steps in (theirs, ours))
    for mine, its in zip(ours.environments, theirs.environments, strict=True):
        yield ours.value(quantized, mine), apply_linear(layer, theirs.value(exact, its), weight)


def _settle(layer: Layer, student: Mirror, teacher: Mirror, moments: Moments, caution: float) -> None:
    """Solve and round one layer, and give its bias the mean error that is left."""
    weight, quantizer = teacher.constant(layer.weight.name), student.quantizer(layer.weight.name)
    assert isinstance(quantizer, Quantizer)
    grid = quantizer.point.grid
    rows, covariance = solve(as_rows(layer, weight).double(), moments, caution)
    start = quantizer.scale.double().expand(
        weight.shape[grid.axis] if grid.axis is not None else rows.shape[:2].numel()
    )
    latent, scale = best_scale(rows, covariance, start.reshape(rows.shape[:2]), grid)
    latent, scale = descend(latent, rows, covariance, scale, grid)
    student.constant(layer.weight.name).copy_(from_rows(layer, latent.float(), weight))
    quantizer.scale.copy_(scale.reshape(quantizer.scale.shape).float())
    if layer.bias is not None and layer.bias.name in student.quantizers:  # others are written as they are
        rounded = as_rows(layer, quantizer(student.constant(layer.weight.name))).double()
        mean_x, mean_y = moments.means
        shift = mean_y - (rounded @ mean_x[:, :, None])[:, :, 0]
        bias = student.constant(layer.bias.name)
        bias.copy_(teacher.constant(layer.bias.name) + shift.reshape(bias.shape).float())


def last_uses(nodes: Sequence[fx.Node], constant: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The last node, in order, that reads each value which depends on the inputs."""
    return {source: node for node in nodes for source in node.all_input_nodes if source not in constant}


@torch.no_grad()
def held_bytes(mirror: Mirror, layers: Sequence[Layer], inputs: Sequence[Tensor]) -> int:
    """Bytes per sample that `compensate` holds at most, in both mirrors: what is alive whenever a layer is solved."""
    steps = Lockstep(mirror, [inputs])
    most = 0
    for layer in layers:
        steps.until(steps.by_name[layer.node.name])
        alive = (x for x in steps.environments[0].values() if isinstance(x, Tensor))
        most = max(most, sum(x.numel() * x.element_size() for x in alive))
    return 2 * most // max(1, len(inputs[0]))
