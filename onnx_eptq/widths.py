"""Which quantizers choose a width together, which widths they may choose, and a plan with the widths that were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

import onnx_graphsurgeon as gs

from onnx_eptq.errors import UsageError
from onnx_eptq.plan import Layer, Plan, Rules, linear_layers, make_plan
from onnx_eptq.targets import Target

DEFAULT_WEIGHT_WIDTHS = (2, 3, 4, 8)
Choice = Mapping[str, int]  # width in bits by the name of a group


@dataclass(frozen=True)
class Asked:
    """Widths that the user allows: for weights, for activations, and by name pattern (layers, tensors)."""

    weights: tuple[int, ...]
    activations: tuple[int, ...]
    patterns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def of(self, default: tuple[int, ...], *names: str) -> tuple[int, ...]:
        """The widths of the first pattern that one of the names matches."""
        for pattern, widths in self.patterns.items():
            if any(fnmatchcase(name, pattern) for name in names):
                return widths
        return default


@dataclass(frozen=True)
class Group:
    """Quantizers of one width: a weight, or an activation and all that is tied to it (moved values, Concat).

    `name` is the value that holds the parameters, `values` are all of them in walk order; `widths` ascend.
    """

    name: str
    role: Literal["weight", "activation"]
    values: tuple[str, ...]
    widths: tuple[int, ...]

    @property
    def widest(self) -> int:
        """The most bits it may have."""
        return self.widths[-1]


def candidates(graph: gs.Graph, target: Target, rules: Rules, asked: Asked) -> tuple[Plan, list[Group]]:
    """The plan at the widest allowed widths, and its groups.

    Values that keep 8 bits however narrow other activations are (`make_plan`) have no other choice, unless a pattern names them.

    Args:
        graph: the prepared graph.
        target: what it stores, and per operator.
        rules: what stays float; widths in it are not read.
        asked: what the user allows.

    Raises:
        UsageError: the target takes none of the widths that are asked for somewhere, or nothing is left to choose for.
    """
    _check(target, asked)
    free = replace(target, op_bits={})  # what an operator takes is settled per group
    widest = Rules(
        max(asked.weights),
        max(asked.activations),
        {pattern: max(widths) for pattern, widths in asked.patterns.items()},
        rules.keep_float,
    )
    plan = make_plan(graph, free, widest)
    narrow = make_plan(graph, free, replace(widest, act_bits=min(asked.activations), bits={}))
    wide = {name: point.grid.bits for name, point in narrow.items() if point.grid.bits > min(asked.activations)}
    layers: dict[str, list[Layer]] = {}
    for layer in linear_layers(graph):
        layers.setdefault(layer.weight.name, []).append(layer)
    members: dict[str, list[str]] = {}
    for value, point in plan.items():
        if point.role in ("weight", "activation"):
            members.setdefault(point.tied_to or value, []).append(value)
    groups = []
    for name, values in members.items():
        if plan[name].role == "weight":
            groups.append(Group(name, "weight", tuple(values), _weight_widths(layers[name], target, asked)))
        else:
            sets = [asked.of((wide[v],) if v in wide else asked.activations, v) for v in values]
            groups.append(Group(name, "activation", tuple(values), _common(values, sets, target)))
    if not groups:
        raise UsageError(
            "everything is kept float, so there are no bits to choose; keep less float or leave out the budget"
        )
    return with_widths(plan, {group.name: group.widest for group in groups}), groups


def _check(target: Target, asked: Asked) -> None:
    for widths, stored, what in (
        (asked.weights, target.weight_bits, "weights"),
        (asked.activations, target.activation_bits, "activations"),
    ):
        wrong = sorted(set(widths) - set(stored))
        if wrong:
            raise UsageError(
                f"target '{target.name}' stores {what} of {', '.join(map(str, sorted(stored)))} bits, not "
                f"{', '.join(map(str, wrong))}"
            )


def _weight_widths(layers: Sequence[Layer], target: Target, asked: Asked) -> tuple[int, ...]:
    wanted = asked.of(asked.weights, *(layer.node.name for layer in layers), layers[0].weight.name)
    taken = set(wanted).intersection(*(target.bits_of(layer.node.op) for layer in layers))
    if not taken:
        node = layers[0].node
        raise UsageError(
            f"layer '{node.name}' may have {_spell(wanted)} bits as asked, but target '{target.name}' takes "
            f"{_spell(target.bits_of(node.op))} bits for {node.op}; allow one of them"
        )
    return tuple(sorted(taken))


def _common(values: Sequence[str], sets: Sequence[tuple[int, ...]], target: Target) -> tuple[int, ...]:
    """The widths that all tied values may have."""
    common = set(target.activation_bits).intersection(*sets)
    if not common:
        raise UsageError(
            f"{', '.join(map(repr, values[:4]))} share one grid, but no width is allowed for all of them (asked: "
            f"{'; '.join(_spell(widths) for widths in dict.fromkeys(sets))} bits)"
        )
    return tuple(sorted(common))


def _spell(widths: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(widths)))


def with_widths(plan: Plan, choice: Choice) -> Plan:
    """The plan with other widths, by group name; what is tied follows, all else stays."""
    changed = {}
    for value, point in plan.items():
        bits = choice.get(point.tied_to or value)
        changed[value] = point if bits is None else replace(point, grid=point.grid.with_bits(bits))
    return Plan(changed, plan.floats)
