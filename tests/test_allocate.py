"""The integer program against brute force, for every kind of constraint."""

import itertools
import math
import time

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_eptq import allocate
from onnx_eptq.allocate import Limit, Program
from onnx_eptq.errors import UsageError
from onnx_eptq.resources import Amount, Resource
from onnx_eptq.widths import Group

WIDTHS = (2, 4, 8)


def group(name, widths=WIDTHS):
    return Group(name, "weight", (name,), widths)


def choices(groups):
    for widths in itertools.product(*(g.widths for g in groups)):
        yield {g.name: bits for g, bits in zip(groups, widths, strict=True)}


def sizes(draw, groups):
    """Bytes that rise with the width, as in a file."""
    return {g.name: {b: float(draw(st.integers(1, 1000)) + 1000 * b) for b in g.widths} for g in groups}


def total(draw, groups):
    return [Amount(float(draw(st.integers(0, 50))), sizes(draw, groups))]


def peak(draw, groups):
    parts = [draw(st.lists(st.sampled_from(groups), min_size=1, unique=True)) for _ in range(3)]
    return [Amount(single=sizes(draw, part)) for part in parts]


def product(draw, groups):
    pairs = {}
    for a, b in itertools.pairwise(groups):
        work = draw(st.integers(1, 100))
        pairs[a.name, b.name] = {(i, j): float(work * i * j) for i in a.widths for j in b.widths}
    return [Amount(single={groups[0].name: {b: float(b * b) for b in groups[0].widths}}, pairs=pairs)]


def table(draw, groups):
    """Costs in no order at all."""
    return [Amount(single={g.name: {b: draw(st.floats(0, 10)) for b in g.widths} for g in groups})]


def shared(draw, groups):
    users = [(g.name, g.widths[0]) for g in groups]
    return [Amount(single=sizes(draw, groups), shared=[(float(draw(st.integers(0, 4000))), frozenset(users))])]


KINDS = {"total": total, "peak": peak, "product": product, "table": table, "shared": shared}


@st.composite
def programs(draw, kinds):
    names = [f"g{i}" for i in range(draw(st.integers(2, 4)))]
    groups = [
        group(n, tuple(sorted(draw(st.sets(st.sampled_from((2, 3, 4, 8)), min_size=1, max_size=3))))) for n in names
    ]
    losses = {g.name: {b: draw(st.floats(1e-4, 1)) * 4.0**-b for b in g.widths} for g in groups}
    limits = []
    for kind in kinds:
        resource = Resource(kind, "bytes", KINDS[kind](draw, groups))
        reached = sorted(resource.use(choice) for choice in choices(groups))
        limits.append(Limit(resource, draw(st.sampled_from(reached)) - draw(st.sampled_from([0, 0, 0, 1]))))
    return Program(groups, losses), limits


def best(program, limits):
    """By trying everything."""
    allowed = [c for c in choices(program.groups) if all(x.resource.use(c) <= x.most for x in limits)]
    return min((program.loss(c) for c in allowed), default=None)


@pytest.mark.parametrize(
    "kinds", [*((kind,) for kind in KINDS), ("total", "peak"), ("shared", "product", "table")], ids=str
)
@settings(max_examples=12)
@given(data=st.data())
def test_no_choice_within_the_limits_is_better(kinds, data):
    program, limits = data.draw(programs(kinds))
    expected = best(program, limits)
    if expected is None:
        with pytest.raises(UsageError, match=r"no less than|no choice"):
            program.solve(limits)
        return
    found = program.solve(limits)
    assert all(limit.resource.use(found.choice) <= limit.most for limit in limits)
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert found.optimal


@pytest.mark.parametrize("most", [0.0, 1e-9, 1.5])
def test_a_budget_of_nothing_is_met_by_what_costs_nothing(most):
    program = Program([group("a"), group("b")], {name: {b: 1.0 / b for b in WIDTHS} for name in "ab"})
    costs = {"a": {2: 0.0, 4: 1.5, 8: 9.5}, "b": {2: 0.0, 4: 1.75, 8: 3.5}}
    found = program.solve([Limit(Resource("cost", "J", [Amount(single=costs)]), most)])
    assert found.choice == {"a": 2 if most < 1.5 else 4, "b": 2}


@settings(max_examples=8)
@given(data=st.data())
def test_a_larger_budget_never_loses_more(data):
    program, (limit,) = data.draw(programs(("total",)))
    reached = sorted({limit.resource.use(choice) for choice in choices(program.groups)})
    losses = [program.solve([Limit(limit.resource, most)]).loss for most in reached]
    assert losses == sorted(losses, reverse=True)


@settings(max_examples=8)
@given(data=st.data())
def test_the_smallest_reachable_value_is_named(data):
    program, (limit,) = data.draw(programs(("peak",)))
    least = min(limit.resource.use(choice) for choice in choices(program.groups))
    assert program.least(limit.resource) == least
    with pytest.raises(UsageError) as caught:
        program.solve([Limit(limit.resource, least - 1)])
    assert f"peak can be no less than {least:,.0f} bytes" in str(caught.value)


def test_the_tightest_of_several_budgets_is_named():
    groups = [group("a"), group("b")]
    losses = {g.name: {b: 1.0 / b for b in g.widths} for g in groups}
    small = Resource("small", "bytes", [Amount(single={g.name: {b: 100.0 * b for b in g.widths} for g in groups})])
    large = Resource("large", "", [Amount(single={g.name: {b: 1000.0 * b for b in g.widths} for g in groups})])
    with pytest.raises(UsageError, match=r"large can be no less than 4,000, and 40 "):
        Program(groups, losses).solve([Limit(small, 399), Limit(large, 40)])


def test_budgets_that_only_clash_together_are_told_apart():
    groups = [group("a", (2, 8))]
    rising = Resource("rising", "bytes", [Amount(single={"a": {2: 1000.0, 8: 4000.0}})])
    falling = Resource("falling", "bytes", [Amount(single={"a": {2: 900.0, 8: 100.0}})])
    with pytest.raises(
        UsageError, match=r"together: with the others met, falling can be no less than 900 bytes, and 200"
    ):
        Program(groups, {"a": {2: 1.0, 8: 0.5}}).solve([Limit(rising, 2000), Limit(falling, 200)])


def test_fewer_bits_are_never_free():
    program = Program([group("a"), group("b")], {"a": {2: 0.0, 4: 0.3, 8: 0.2}, "b": dict.fromkeys(WIDTHS, 0.0)})
    assert program.solve().choice == {"a": 8, "b": 8}
    assert list(program.terms["a"]) == [8, 4, 2]
    assert sorted(program.terms["a"].values()) == list(program.terms["a"].values())


def test_losses_that_are_no_numbers_are_the_worst():
    program = Program([group("a")], {"a": {2: math.inf, 4: 3.0, 8: 0.1}})
    assert math.isfinite(program.terms["a"][2])
    assert program.terms["a"][2] > program.terms["a"][4]


def test_what_the_solver_met_within_its_tolerance_only_is_tightened():
    """A file is a few bytes larger than its amounts say."""
    row = {2: 1e9, 4: 2e9, 8: 4e9}
    sloppy = Resource("file", "bytes", [Amount(single={"a": row, "b": row})])
    sloppy.exact = lambda choice: sloppy.amounts[0].of(choice) + 17
    program = Program([group("a"), group("b")], {"a": {2: 4.0, 4: 2.0, 8: 0.9}, "b": {2: 3.0, 4: 1.5, 8: 1.0}})
    assert program.solve([Limit(sloppy, 6e9 + 17)]).choice == {"a": 8, "b": 4}
    assert program.solve([Limit(sloppy, 6e9 + 16)]).choice == {"a": 4, "b": 4}
    with pytest.raises(UsageError, match=r"file can be no less than 2,000,000,017 bytes"):
        program.solve([Limit(sloppy, 2e9)])


def test_what_its_amounts_overstate_is_found_all_the_same():
    """A choice meets its limit to the byte, and the amounts say that it is above it."""
    row = {2: 100.0, 4: 200.0, 8: 400.0}
    vague = Resource("file", "bytes", [Amount(single={"a": row, "b": row})])
    vague.exact = lambda choice: vague.amounts[0].of(choice) - 5
    program = Program([group("a"), group("b")], {"a": {2: 4.0, 4: 2.0, 8: 0.9}, "b": {2: 3.0, 4: 1.5, 8: 1.0}})
    assert program.solve([Limit(vague, 195)]).choice == {"a": 2, "b": 2}
    with pytest.raises(
        UsageError, match=r"no choice .* file can be no less than 195 bytes, and 194 bytes are asked for"
    ):
        program.solve([Limit(vague, 194)])


@pytest.mark.parametrize("most", [0.3, 0.5])
def test_two_hundred_quantizers_are_solved_to_the_end(most):
    weights, values = [group(f"w{i}") for i in range(130)], [group(f"a{i}", (4, 6, 8)) for i in range(70)]
    work = {f"w{i}": 1000 * (1 + i * 7919 % 977) for i in range(130)}
    losses = {g.name: {b: (1 + hash_of(g.name)) * 4.0**-b for b in g.widths} for g in [*weights, *values]}
    memory = Resource("w", "", [Amount(single={n: {b: size * b / 8 for b in WIDTHS} for n, size in work.items()})])
    pairs = {
        (f"w{i}", f"a{i % 70}"): {(b, c): float(work[f"w{i}"] * b * c) for b in WIDTHS for c in (4, 6, 8)}
        for i in range(130)
    }
    operations = Resource("bops", "", [Amount(pairs=pairs)])
    program = Program([*weights, *values], losses)
    widest = {g.name: g.widest for g in program.groups}
    limits = [Limit(memory, most * memory.use(widest)), Limit(operations, most * operations.use(widest))]
    found = program.solve(limits)
    assert found.optimal
    assert all(limit.resource.use(found.choice) <= limit.most for limit in limits)
    assert max(limit.resource.use(found.choice) / limit.most for limit in limits) > 0.98


def hash_of(name):
    return sum(map(ord, name)) * 2654435761 % 1000


def test_the_best_answer_in_the_time_is_taken_and_called_so(monkeypatch):
    original = allocate._Model.run
    monkeypatch.setattr(allocate._Model, "run", lambda self, seconds: original(self, seconds) and "feasible")
    found = Program([group("a")], {"a": {2: 1.0, 4: 0.5, 8: 0.1}}).solve()
    assert found.choice == {"a": 8}
    assert not found.optimal


def test_a_time_limit_reaches_the_solver_and_no_answer_is_an_error(monkeypatch):
    seen = []

    def late(self, seconds):
        seen.append(seconds)
        time.sleep(0.6 * seconds)
        return "unknown"

    monkeypatch.setattr(allocate._Model, "run", late)
    with pytest.raises(UsageError, match="no choice of widths within 1 s"):
        Program([group("a")], {"a": {2: 1.0, 4: 0.5, 8: 0.1}}, seconds=1.0).solve()
    assert 0.5 < seen[0] <= 1
    assert all(solver.timeLimit == 7.0 for solver in allocate.solvers(7.0))


def test_a_solver_that_gives_up_at_once_has_found_no_choice(monkeypatch):
    run = allocate._Model.run

    def confused(self, seconds):
        found = run(self, seconds)
        return "unknown" if found == "infeasible" else found

    monkeypatch.setattr(allocate._Model, "run", confused)
    groups, losses = [group("a"), group("b")], {name: {2: 1.0, 4: 0.5, 8: 0.1} for name in "ab"}
    more, less = (
        {name: {bits: size(bits) for bits in (2, 4, 8)} for name in "ab"} for size in (float, lambda bits: 10.0 - bits)
    )
    limits = [
        Limit(Resource(what, "", [Amount(single=table)]), 7.0) for what, table in (("one", more), ("other", less))
    ]
    with pytest.raises(UsageError, match="each budget can be met alone, but not together"):
        Program(groups, losses, seconds=30.0).solve(limits)


def test_highs_is_preferred_where_it_is_installed(monkeypatch):
    class Found:
        name = "HiGHS"

        def available(self):
            return True

    monkeypatch.setattr(pulp, "getSolver", lambda name, **options: Found())
    assert [solver.name for solver in allocate.solvers(1.0)] == ["HiGHS"]
