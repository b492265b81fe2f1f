"""Mixed precision as an integer program: one width per quantizer, the least expected loss that the budgets allow.

The variables are one binary per group and width; products of two widths (bit operations, costs) get one continuous variable
per pair of widths, whose sums over either side are the binaries; what several choices share (a table in the file) counts
when any of them is made. Solved by HiGHS when it is installed, else by CBC, which PuLP brings along.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pulp

from onnx_eptq.errors import UsageError
from onnx_eptq.resources import Amount, Resource
from onnx_eptq.sensitivity import Losses, monotone
from onnx_eptq.widths import Choice, Group

SECONDS = 60.0
STEP = 1e-9  # of the largest loss: how much more a narrower width costs at least
SCALE = 1e5  # of the largest loss in the objective: far above the solver's tolerances
LARGE = 1e7  # whole numbers below it are left as they are: CBC errs with limits that are nearly whole
NORMAL = 1e4  # what other limits are scaled to
VANISHING = 1e-6  # of the largest amount: limits below it, 0 among them, are scaled as if they were so large
SEEN = 1e-6  # of a limit: the least excess that a solver is sure to see
NEAR = 32.0  # bytes by which sums may exceed what a file takes: lengths of lengths do not add up
ROUNDS = 30  # of tightening a limit that the solver met within its tolerance only


@dataclass(frozen=True)
class Limit:
    """How much of a resource there is; `hint` says how the user asked for it."""

    resource: Resource
    most: float
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.hint or self.resource.name} ({self.resource.spell(self.most)})"


@dataclass
class Solution:
    """Widths by group, their expected loss, and whether it is proven that no choice is better."""

    choice: dict[str, int]
    loss: float
    optimal: bool = True
    solver: str = ""
    seconds: float = 0.0


@dataclass
class Program:
    """Groups and what each width of each is expected to lose; budgets may change from one `solve` to the next."""

    groups: Sequence[Group]
    losses: Losses
    seconds: float = SECONDS
    terms: dict[str, dict[int, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.terms = {}
        known = {g.name: {bits: self.losses[g.name][bits] for bits in g.widths} for g in self.groups}
        finite = [loss for row in known.values() for loss in row.values() if math.isfinite(loss)]
        most = max(finite, default=0.0)
        for name, row in known.items():
            sound = {bits: loss if math.isfinite(loss) else 10 * most + 1 for bits, loss in row.items()}
            self.terms[name] = monotone(sound, STEP * (most or 1.0))

    def loss(self, choice: Choice) -> float:
        """The expected loss of a choice."""
        return sum(row[choice[name]] for name, row in self.terms.items())

    def solve(self, limits: Sequence[Limit] = ()) -> Solution:
        """The choice of least expected loss within all limits.

        Raises:
            UsageError: no choice is within the limits; or none was found in the time there is.
        """
        started = time.perf_counter()
        found = self._within(self.terms, limits, self.seconds)
        seconds = time.perf_counter() - started
        if found is None:
            raise UsageError(self._why(limits))
        choice, optimal, solver = found
        return Solution(choice, self.loss(choice), optimal, solver, seconds)

    def least(self, resource: Resource, limits: Sequence[Limit] = ()) -> float | None:
        """The least that can be had of a resource within the limits; None: nothing is within them."""
        found = self._within(resource, limits, self.seconds)
        return None if found is None else resource.use(found[0])

    def _within(
        self, goal: Mapping[str, Mapping[int, float]] | Resource, limits: Sequence[Limit], seconds: float
    ) -> tuple[dict[str, int], bool, str] | None:
        """Solve until the choice is within the limits to the last unit.

        A choice that exceeds one tightens it; or is itself forbidden, where the excess is too small for the solver to see.
        Sums that only come near what a choice takes may exceed a limit that it meets: they get room once nothing is left.
        """
        slack, forbidden = [0.0] * len(limits), list[dict[str, int]]()
        room = [-NEAR if limit.resource.exact is not None else 0.0 for limit in limits]
        deadline = time.perf_counter() + seconds
        for _ in range(ROUNDS):
            tightened = [Limit(limit.resource, limit.most - less) for limit, less in zip(limits, slack, strict=True)]
            model = _Model(self.groups, goal, tightened, forbidden)
            status = model.run(max(deadline - time.perf_counter(), 0.0))
            if status == "infeasible" and any(room):
                slack, room = room, []
                continue
            if status == "infeasible":
                return None
            if status == "unknown":
                if time.perf_counter() < deadline - seconds / 2:  # nothing found, and not for want of time
                    return None
                break
            choice = model.choice()
            over = [limit.resource.use(choice) - limit.most for limit in limits]
            if all(excess <= 0 for excess in over):
                return choice, status == "optimal", model.solver
            if any(excess > SEEN * abs(limit.most) for excess, limit in zip(over, limits, strict=True)):
                slack = [less + max(excess, 0.0) for less, excess in zip(slack, over, strict=True)]
            else:
                forbidden.append(choice)
        raise UsageError(
            f"the solver found no choice of widths within {seconds:.0f} s; give it more (--solver-seconds), fewer widths or a "
            "wider budget"
        )

    def _why(self, limits: Sequence[Limit]) -> str:
        """What stands in the way: the tightest limit, and the least that could be reached."""
        tight: list[tuple[float, str]] = []
        for limit in limits:
            least = self.least(limit.resource)
            assert least is not None  # without limits every choice is allowed
            if least > limit.most:
                tight.append((least / max(limit.most, 1e-30), _shortage(limit, least)))
        if tight:
            return f"no choice of widths meets the budget: {max(tight)[1]}; allow narrower widths or a larger budget"
        for limit in limits:
            least = self.least(limit.resource, [other for other in limits if other is not limit])
            if least is not None:
                tight.append((least / max(limit.most, 1e-30), _shortage(limit, least)))
        if not tight:
            return f"no choice of widths meets any two of the budgets {', '.join(map(str, limits))}; widen one"
        return (
            f"each budget can be met alone, but not together: with the others met, {max(tight)[1]}; allow narrower widths or a "
            "larger budget"
        )


def _shortage(limit: Limit, least: float) -> str:
    resource = limit.resource
    return (
        f"{resource.name} can be no less than {resource.spell(least)}, and {resource.spell(limit.most)} are asked for"
    )


class _Model:
    """One integer program in PuLP's terms."""

    def __init__(
        self,
        groups: Sequence[Group],
        goal: Mapping[str, Mapping[int, float]] | Resource,
        limits: Sequence[Limit],
        forbidden: Sequence[Choice] = (),
    ) -> None:
        self.groups = groups
        self.problem = pulp.LpProblem("widths", pulp.LpMinimize)
        self.solver = ""
        self.count = 0
        self.x: dict[tuple[str, int], Any] = {}
        self.products: dict[tuple[str, str], dict[tuple[int, int], Any]] = {}
        for index, group in enumerate(groups):
            for bits in group.widths:
                self.x[group.name, bits] = self.problem.add_variable(f"x_{index}_{bits}", cat="Binary")
            self.problem += pulp.lpSum(self.x[group.name, bits] for bits in group.widths) == 1
        self._minimise(goal)
        for choice in forbidden:
            self.problem += pulp.lpSum(self.x[name, bits] for name, bits in choice.items()) <= len(choice) - 1
        for limit in limits:
            whole = all(map(_whole, limit.resource.amounts)) and limit.most < LARGE
            largest = max(map(_largest, limit.resource.amounts), default=1.0)
            scale = 1.0 if whole else NORMAL / max(abs(limit.most), VANISHING * largest)
            most = math.floor(limit.most) if whole else limit.most * scale
            for amount in limit.resource.amounts:
                self.problem += self._expression(amount, scale) <= most

    def _minimise(self, goal: Mapping[str, Mapping[int, float]] | Resource) -> None:
        if isinstance(goal, Resource):
            most = self._variable(None)
            scale = 1 / max((_largest(amount) for amount in goal.amounts), default=1.0)
            self.problem.setObjective(most * SCALE)
            for amount in goal.amounts:
                self.problem += self._expression(amount, scale) <= most
            return
        least = {name: min(row.values()) for name, row in goal.items()}
        largest = max((max(row.values()) - least[name] for name, row in goal.items()), default=0.0) or 1.0
        terms = [
            (loss - least[name]) / largest * SCALE * self.x[name, bits]
            for name, row in goal.items()
            for bits, loss in row.items()
        ]
        self.problem.setObjective(pulp.lpSum(terms))

    def _variable(self, upper: float | None = 1.0) -> Any:
        self.count += 1
        return self.problem.add_variable(f"z_{self.count}", 0, upper)

    def _expression(self, amount: Amount, scale: float) -> Any:
        terms = [
            size * scale * self.x[name, bits]
            for name, row in amount.single.items()
            for bits, size in row.items()
            if size
        ]
        for pair, table in amount.pairs.items():
            product = self._product(pair)
            terms += [size * scale * product[widths] for widths, size in table.items() if size]
        for size, users in amount.shared:
            there = self._variable()
            for name, bits in users:
                self.problem += there >= self.x[name, bits]
            terms.append(size * scale * there)
        return pulp.lpSum(terms) + amount.constant * scale

    def _product(self, pair: tuple[str, str]) -> dict[tuple[int, int], Any]:
        """Variables that are 1 where both widths are chosen."""
        if pair not in self.products:
            a, b = ([bits for name, bits in self.x if name == side] for side in pair)
            table = {(i, j): self._variable() for i in a for j in b}
            for i in a:
                self.problem += pulp.lpSum(table[i, j] for j in b) == self.x[pair[0], i]
            for j in b:
                self.problem += pulp.lpSum(table[i, j] for i in a) == self.x[pair[1], j]
            self.products[pair] = table
        return self.products[pair]

    def run(self, seconds: float) -> str:
        """Solve; returns optimal, feasible (the best that was found in the time), infeasible or unknown."""
        found = "infeasible"
        for solver in solvers(seconds):
            self.solver = str(solver.name).removesuffix("_CMD").replace("COIN", "CBC")
            self.problem.solve(solver)
            found = STATES.get(self.problem.sol_status, "unknown")
            if found in ("optimal", "feasible"):
                break
        return found

    def choice(self) -> dict[str, int]:
        """The widths that were chosen."""
        chosen = {}
        for group in self.groups:
            shares = {bits: self.x[group.name, bits].value() or 0.0 for bits in group.widths}
            chosen[group.name] = max(shares, key=shares.__getitem__)
        return chosen


def _whole(amount: Amount) -> bool:
    """Whether it can only be a whole number."""
    numbers = [amount.constant, *(size for size, _ in amount.shared)]
    numbers += [size for row in amount.single.values() for size in row.values()]
    numbers += [size for table in amount.pairs.values() for size in table.values()]
    return all(float(number).is_integer() for number in numbers)


def _largest(amount: Amount) -> float:
    total = amount.constant + sum(max(row.values()) for row in amount.single.values())
    total += sum(max(table.values()) for table in amount.pairs.values()) + sum(size for size, _ in amount.shared)
    return total or 1.0


STATES = {
    pulp.LpSolutionOptimal: "optimal",
    pulp.LpSolutionIntegerFeasible: "feasible",
    pulp.LpSolutionInfeasible: "infeasible",
}


def solvers(seconds: float) -> list[Any]:
    """HiGHS when it is installed, else the CBC that PuLP brings; the second is asked when the first says infeasible.

    CBC 2.10.3 runs without its preprocessing and its cuts: they lose choices that meet a limit exactly, and what is left is
    called optimal, or nothing feasible (comparison with brute force and with HiGHS finds such cases at once).
    """
    options: dict[str, Any] = {"msg": False, "timeLimit": seconds}
    for name in ("HiGHS", "HiGHS_CMD"):
        solver = pulp.getSolver(name, **options)
        if solver.available():
            return [solver]
    path = pulp.PULP_CBC_CMD.pulp_cbc_path
    return [pulp.COIN_CMD(path=path, options=more, **options) for more in (["preprocess off", "cuts off"], [])]
