"""Mixed precision: budgets as the user says them in, widths and what they use out; as often as wanted once losses are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any

import onnx_graphsurgeon as gs

from onnx_eptq import resources
from onnx_eptq.allocate import SECONDS, Limit, Program, Solution
from onnx_eptq.errors import UsageError
from onnx_eptq.plan import Plan, linear_layers
from onnx_eptq.resources import CostRow, Resource, Sizes
from onnx_eptq.sensitivity import Losses
from onnx_eptq.widths import Choice, Group, with_widths

# Times the least loss. Estimates from 64 vectors err by as much, and what is learned varies by as much with the order of sums.
TELLING = 1.2


@dataclass
class Use:
    """How much of a resource is used, of how much."""

    used: float
    limit: float
    unit: str


@dataclass
class Allocation:
    """What was chosen: widths by layer and by activation, the loss to expect, and how much of each budget is used.

    `average_bits` counts every weight element with its layer's width; `optimal` is False when the solver's time was up.
    `least_loss` is the least that was found to be expected: below `expected_loss` where one width for all is level with it.
    """

    weights: dict[str, int]
    activations: dict[str, int]
    average_bits: float
    expected_loss: float
    sensitivity: str = ""
    budgets: dict[str, Use] = field(default_factory=dict)
    optimal: bool = True
    solver: str = ""
    solve_seconds: float = 0.0
    measure_seconds: float = 0.0
    least_loss: float = 0.0


@dataclass
class Point:
    """A point of the Pareto front: bytes of weights and of the file, and the allocation."""

    weight_bytes: int
    file_bytes: int
    allocation: Allocation
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the plan."""
        return {
            "weight_bytes": self.weight_bytes,
            "file_bytes": self.file_bytes,
            "allocation": asdict(self.allocation),
        }


@dataclass
class Mixed:
    """Everything that widths are chosen from.

    Attributes:
        graph: The prepared graph.
        plan: Where quantizers sit, at the widest allowed widths.
        groups: The quantizers that choose together.
        storage: From weight widths to storage forms.
        counts: Elements and bytes per element of each value of one sample (`resources.elements`).
        losses: Expected loss by group and width.
        metadata: What a file with some plan says of itself; it has a size, too.
        opset: Of the file.
        table: The user's costs, by unit and row.
        solver_seconds: How long the solver may take.
        sensitivity: How losses were measured.
        measure_seconds: How long it took.
    """

    graph: gs.Graph
    plan: Plan
    groups: Sequence[Group]
    storage: Mapping[int, str]
    counts: Mapping[str, tuple[float, int]]
    losses: Losses = field(default_factory=dict)
    metadata: Callable[[Plan], Mapping[str, str]] | None = None
    opset: int = 21
    table: tuple[str, Sequence[CostRow]] | None = None
    solver_seconds: float = SECONDS
    sensitivity: str = ""
    measure_seconds: float = 0.0

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes of weights and of the file."""
        return resources.sizes(
            self.graph, self.plan, self.groups, self.storage, opset=self.opset, metadata=self.metadata
        )

    @cached_property
    def activation_memory(self) -> Resource:
        """The most bytes of activations alive at once."""
        return resources.activation_memory(self.graph, self.plan, self.groups, self.counts)

    @cached_property
    def bops(self) -> Resource:
        """Bit operations of one sample."""
        return resources.bit_operations(self.graph, self.plan, self.groups, self.counts)

    @cached_property
    def cost(self) -> Resource:
        """The user's cost."""
        if self.table is None:
            raise UsageError("--max-cost needs a --cost-table that says what each layer costs at each width")
        unit, rows = self.table
        return resources.costs(self.graph, self.plan, self.groups, unit, rows)

    @cached_property
    def program(self) -> Program:
        """The integer program; without losses, one that only knows what fits."""
        losses = self.losses or {group.name: dict.fromkeys(group.widths, 0.0) for group in self.groups}
        return Program(self.groups, losses, self.solver_seconds)

    def limits(self, **budgets: float | None) -> list[Limit]:
        """The budgets as limits on resources; names as in `BUDGETS`, None: no such budget.

        Raises:
            UsageError: there is no budget of that name.
        """
        unknown = sorted(set(budgets) - set(BUDGETS))
        if unknown:
            raise UsageError(f"there is no budget '{unknown[0]}'; known: {', '.join(BUDGETS)}")
        return [BUDGETS[name](self, float(value)) for name, value in budgets.items() if value is not None]

    def check(self, **budgets: float | None) -> None:
        """Raise UsageError, which names the tightest budget, when no widths meet the budgets; needs no losses."""
        self.program.solve(self.limits(**budgets))

    def choose(self, **budgets: float | None) -> tuple[Plan, Allocation]:
        """The plan of least expected loss within the budgets; one width for all where that is level with it (`TELLING`).

        A gain too small to be told is none once weights are learned, and hardware likes layers of one width.

        Raises:
            UsageError: nothing is within them.
        """
        for name, amount in budgets.items():
            if amount is not None and not (isinstance(amount, Real) and 0 < amount < math.inf):
                raise UsageError(f"the budget {name} is a number above 0, not {amount!r}")
        limits = self.limits(**budgets)
        best = self.program.solve(limits)
        even = [choice for choice in self._even() if all(limit.resource.use(choice) <= limit.most for limit in limits)]
        choice = min(even, key=self.program.loss, default=best.choice)
        loss = self.program.loss(choice)
        found = replace(best, choice=choice, loss=loss) if loss <= TELLING * best.loss else best
        return self._chosen(found, limits, best.loss)

    def _even(self) -> Iterator[dict[str, int]]:
        """The choices of one width for all weights and one for all activations that may choose."""
        free = [group for group in self.groups if len(group.widths) > 1]
        widths = {
            role: sorted({bits for group in free if group.role == role for bits in group.widths}) or [0]
            for role in ("weight", "activation")
        }
        for weights, activations in itertools.product(widths["weight"], widths["activation"]):
            choice = {group.name: weights if group.role == "weight" else activations for group in free}
            if all(choice[group.name] in group.widths for group in free):
                yield {group.name: choice.get(group.name, group.widest) for group in self.groups}

    def evaluate(self, choice: Choice, **budgets: float | None) -> tuple[Plan, Allocation]:
        """The same for widths that were chosen otherwise (uniform ones, say)."""
        full = {group.name: choice.get(group.name, group.widest) for group in self.groups}
        loss = self.program.loss(full)
        return self._chosen(Solution(full, loss, False), self.limits(**budgets), loss)

    def _chosen(self, solution: Solution, limits: Sequence[Limit], least: float) -> tuple[Plan, Allocation]:
        choice = solution.choice
        plan = with_widths(self.plan, choice)
        layers = [layer for layer in linear_layers(self.graph) if layer.weight.name in plan]
        sizes = {layer.weight.name: layer.weight.values.size for layer in layers}
        total = sum(size * choice[name] for name, size in sizes.items())
        allocation = Allocation(
            {layer.node.name: choice[layer.weight.name] for layer in layers},
            {group.name: choice[group.name] for group in self.groups if group.role == "activation"},
            total / max(1, sum(sizes.values())),
            solution.loss,
            self.sensitivity,
            {limit.resource.name: Use(limit.resource.use(choice), limit.most, limit.resource.unit) for limit in limits},
            solution.optimal,
            solution.solver,
            solution.seconds,
            self.measure_seconds,
            least,
        )
        return plan, allocation

    def front(self, points: int = 12, **budgets: float | None) -> list[Point]:
        """The least expected loss at `points` sizes of the file, from the least to the most, within other budgets."""
        limits = self.limits(**budgets)
        size = self.sizes.file
        high = size.use(self.program.solve(limits).choice)  # says what is in the way if nothing fits
        low = self.program.least(size, limits) or 0.0
        found: list[Point] = []
        for index in range(points):
            share = (index / max(points - 1, 1)) ** 1.5  # small sizes are where it matters
            limit = Limit(size, max(low, low + (high - low) * share))
            solution = self.program.solve([*limits, limit])
            plan, allocation = self._chosen(solution, [*limits, limit], solution.loss)
            used = int(size.use(solution.choice))
            if not found or solution.loss < found[-1].allocation.expected_loss:
                found.append(Point(int(self.sizes.weights.use(solution.choice)), used, allocation, plan))
        return found


def _compression(mixed: Mixed, ratio: float) -> Limit:
    return Limit(mixed.sizes.weights, mixed.sizes.float_bytes / ratio, f"--compression {ratio:g}")


BUDGETS: dict[str, Callable[[Mixed, float], Limit]] = {
    "compression": _compression,
    "max_weight_bytes": lambda mixed, most: Limit(mixed.sizes.weights, most, "--max-weight-bytes"),
    "max_size": lambda mixed, most: Limit(mixed.sizes.file, most, "--max-size"),
    "max_activation_memory": lambda mixed, most: Limit(mixed.activation_memory, most, "--max-activation-memory"),
    "max_bops": lambda mixed, most: Limit(mixed.bops, most, "--max-bops"),
    "max_cost": lambda mixed, most: Limit(mixed.cost, most, "--max-cost"),
}
