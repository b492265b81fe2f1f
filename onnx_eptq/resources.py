"""What widths cost: bytes of weights and of the written file, memory of activations, bit operations, a table of the user's.

Every cost is a `Resource`: the largest of some `Amount`s, each linear in the choice of widths (and in products of two). The
program in `allocate` and anyone who checks it read the same amounts.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnx_eptq.errors import UsageError
from onnx_eptq.mirror import Mirror, Probe
from onnx_eptq.plan import Layer, Plan, is_constant, is_float, linear_layers, role_of
from onnx_eptq.widths import Choice, Group, with_widths
from onnx_eptq.write import Footprint, footprint

FLOAT_BITS = 32
Pairs = dict[tuple[str, str], dict[tuple[int, int], float]]


@dataclass
class Amount:
    """A number that the widths decide.

    Attributes:
        constant: What is there anyway.
        single: By group and width.
        pairs: By two groups and their two widths.
        shared: Amounts that are there once when any of the (group, width) is chosen.
    """

    constant: float = 0.0
    single: dict[str, dict[int, float]] = field(default_factory=dict)
    pairs: Pairs = field(default_factory=dict)
    shared: list[tuple[float, frozenset[tuple[str, int]]]] = field(default_factory=list)

    def of(self, choice: Choice) -> float:
        """The number at a choice of widths."""
        total = self.constant + sum(by_width[choice[name]] for name, by_width in self.single.items())
        total += sum(table[choice[a], choice[b]] for (a, b), table in self.pairs.items())
        return total + sum(size for size, users in self.shared if any(choice[name] == bits for name, bits in users))

    def add(self, name: str, by_width: Mapping[int, float]) -> None:
        """Add to a group's."""
        mine = self.single.setdefault(name, dict.fromkeys(by_width, 0.0))
        for width, number in by_width.items():
            mine[width] += number


@dataclass
class Resource:
    """A cost: `name` and `unit` as the user reads them; the largest of `amounts` counts.

    `exact` says what it really is, where the amounts leave out a few bytes (a text in the file that lists the widths).
    """

    name: str
    unit: str
    amounts: list[Amount]
    exact: Callable[[Choice], float] | None = None

    def use(self, choice: Choice) -> float:
        """How much of it a choice takes."""
        if self.exact is not None:
            return self.exact(choice)
        return max((amount.of(choice) for amount in self.amounts), default=0.0)

    def spell(self, number: float) -> str:
        """A number of it, for the user."""
        return f"{number:,.0f} {self.unit}" if self.unit and number >= 100 else f"{number:,.6g} {self.unit}".strip()


# Bytes


@dataclass
class Sizes:
    """Bytes of the stored weights, and of the file, by width; and the weights' bytes in float32."""

    weights: Resource
    file: Resource
    float_bytes: int


def sizes(
    graph: gs.Graph,
    plan: Plan,
    groups: Sequence[Group],
    storage_of: Mapping[int, str],
    *,
    opset: int = 21,
    metadata: Callable[[Plan], Mapping[str, str]] | None = None,
) -> Sizes:
    """Sizes as `write.write` makes them: one trial file per width; `metadata` is what a file of some plan says of itself."""

    def trial(choice: Choice) -> Footprint:
        chosen = with_widths(plan, choice)
        return footprint(graph, chosen, storage_of, opset=opset, metadata=metadata(chosen) if metadata else None)

    owner = {value: group.name for group in groups for value in group.values}
    runs: list[tuple[dict[str, int], Footprint]] = []
    for width in sorted({width for group in groups for width in group.widths}, reverse=True):
        choice = {group.name: width if width in group.widths else group.widest for group in groups}
        runs.append((choice, trial(choice)))
    own: dict[str, dict[int, float]] = {group.name: {} for group in groups}
    payload: dict[str, dict[int, float]] = {group.name: {} for group in groups if group.role == "weight"}
    shared: dict[str, tuple[int, set[tuple[str, int]]]] = {}
    for choice, found in runs:
        for group in groups:
            own[group.name][choice[group.name]] = sum(found.own[value] for value in group.values)
            if group.role == "weight":
                payload[group.name][choice[group.name]] = found.payload[group.name]
        for key, size in found.shared.items():
            users = {(owner[value], choice[owner[value]]) for value in found.readers[key] if value in owner}
            if len(users) == len({owner.get(value, value) for value in found.readers[key]}):  # groups alone read it
                shared.setdefault(key, (size, set()))[1].update(users)
    widths = {group.name: set(group.widths) for group in groups}
    kept = []
    for size, users in shared.values():
        always = any({bits for name, bits in users if name == group} == widths[group] for group, _ in users)
        if not always:
            kept.append((float(size), frozenset(users)))
    file = Amount(single=own, shared=kept)
    choice, found = runs[0]
    file.constant = found.total - file.of(choice)
    stored = Amount(single=payload)
    layers = {layer.weight.name: layer for layer in linear_layers(graph)}
    stored.constant = sum(4.0 * _count(layer.weight) for name, layer in layers.items() if name not in plan)
    total = sum(4 * _count(layer.weight) for layer in layers.values())
    return Sizes(
        Resource("weight memory", "bytes", [stored]),
        Resource("file size", "bytes", [file], lambda choice: trial(choice).total),
        total,
    )


def _count(tensor: gs.Tensor) -> int:
    return math.prod(map(int, tensor.shape))


# Activations


@torch.no_grad()
def elements(teacher: Mirror, inputs: Sequence[Tensor]) -> dict[str, tuple[float, int]]:
    """Per value: elements and bytes per element of one sample, as a run on a few shows them."""
    found: dict[str, tuple[float, int]] = {}
    samples = len(inputs[0]) if inputs[0].ndim else 1

    def see(value: str, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            per_sample = samples if x.ndim and len(x) == samples else 1
            found[value] = x.numel() / per_sample, x.element_size()
        return x

    Probe(teacher, see).run(*inputs)
    return found


def activation_memory(
    graph: gs.Graph, plan: Plan, groups: Sequence[Group], counts: Mapping[str, tuple[float, int]]
) -> Resource:
    """The most bytes of activations alive at once, one sample, in the order in which nodes are walked.

    A value lives from the node that makes it to the last that reads it; inputs from the start, outputs to the end.
    Quantized values count with their width, packed; values fused into the next operator do not exist; others count as they are.
    """
    group_of = {value: group for group in groups for value in group.values if group.role == "activation"}
    fused = {t.name for node in graph.nodes for t in node.outputs if is_float(t) and t.name not in plan}
    fused -= set(plan.floats) | {tensor.name for tensor in graph.outputs}
    last: dict[str, int] = {}
    born = {tensor.name: 0 for tensor in graph.inputs}
    for index, node in enumerate(graph.nodes):
        born |= {t.name: index for t in node.outputs if not t.is_empty() and t.name not in fused}
        last |= dict.fromkeys(_read(node, fused), index)
    last |= {tensor.name: len(graph.nodes) for tensor in graph.outputs}
    rows: dict[tuple[Any, ...], Amount] = {}
    for index in range(len(graph.nodes)):
        amount = Amount()
        for name, start in born.items():
            if not start <= index <= last.get(name, start):
                continue
            count, size = counts.get(name, (0.0, 0))
            if name in group_of:
                group = group_of[name]
                amount.add(group.name, {bits: float(math.ceil(count * bits / 8)) for bits in group.widths})
            else:
                amount.constant += math.ceil(count) * size
        rows[_key(amount)] = amount
    return Resource("activation memory", "bytes", _undominated(rows.values()))


def _read(node: gs.Node, fused: set[str]) -> Iterator[str]:
    """The values that a node needs, those behind fused values included."""
    for tensor in node.inputs:
        if tensor.name in fused and tensor.inputs:
            yield from _read(tensor.inputs[0], fused)
        elif not is_constant(tensor) and not tensor.is_empty():
            yield tensor.name


def _key(amount: Amount) -> tuple[Any, ...]:
    return amount.constant, *sorted((name, max(sizes.values())) for name, sizes in amount.single.items())


def _undominated(amounts: Iterable[Amount]) -> list[Amount]:
    """Without those that another is at least as large as at any widths."""
    found: list[Amount] = []
    for amount in sorted(amounts, key=lambda a: -len(a.single)):
        if not any(_covers(other, amount) for other in found):
            found.append(amount)
    return found


def _covers(large: Amount, small: Amount) -> bool:
    return large.constant >= small.constant and all(
        name in large.single and all(large.single[name][bits] >= size for bits, size in by_width.items())
        for name, by_width in small.single.items()
    )


# Work


def macs(node: gs.Node, layer: Layer | None, counts: Mapping[str, tuple[float, int]]) -> float:
    """Multiplications of one linear node on one sample; those with padded zeros are counted."""
    out = counts.get(node.outputs[0].name, (0.0, 0))[0]
    if layer is not None and layer.axis == 0:  # each output element reads one slice of the weight
        return out * _count(layer.weight) / int(layer.weight.shape[0])
    if layer is not None and (
        layer.axis is not None or layer.output_axis == 1
    ):  # each input element meets one (ConvTranspose)
        return counts.get(layer.source.name, (0.0, 0))[0] * _count(layer.weight) / int(layer.weight.shape[0])
    if layer is not None:
        shape = layer.weight.shape
        return out * int(shape[-1] if layer.node.inputs[0] is layer.weight or len(shape) == 1 else shape[-2])
    left = node.inputs[0]
    shared = left.shape[-2 if node.attrs.get("transA", 0) else -1] if left.shape else None
    return out * shared if isinstance(shared, int) else 0.0


def all_macs(graph: gs.Graph, counts: Mapping[str, tuple[float, int]]) -> float:
    """Multiplications of all linear nodes on one sample."""
    layers = {id(layer.node): layer for layer in linear_layers(graph)}
    return sum(macs(node, layers.get(id(node)), counts) for node in graph.nodes if role_of(node) == "linear")


def bit_operations(
    graph: gs.Graph, plan: Plan, groups: Sequence[Group], counts: Mapping[str, tuple[float, int]]
) -> Resource:
    """Bits of weight x bits of activation x multiplications, of all linear operators; float counts as 32 bits."""
    group_of = {value: group for group in groups for value in group.values}
    layers = {id(layer.node): layer for layer in linear_layers(graph)}
    amount = Amount()
    for node in graph.nodes:
        if role_of(node) != "linear":
            continue
        layer = layers.get(id(node))
        factors = [layer.weight, layer.source] if layer else node.inputs[:2]
        sides = [group_of.get(tensor.name) for tensor in factors]
        fixed = [plan[t.name].grid.bits if t.name in plan else FLOAT_BITS for t in factors]
        _multiply(amount, sides, fixed, macs(node, layer, counts))
    return Resource("bit operations", "", [amount])


def _multiply(amount: Amount, sides: Sequence[Group | None], fixed: Sequence[int], work: float) -> None:
    """Add work x width x width."""
    a, b = sides
    if a is None and b is None:
        amount.constant += work * fixed[0] * fixed[1]
    elif a is not None and b is not None and a is b:
        amount.add(a.name, {bits: work * bits * bits for bits in a.widths})
    elif a is not None and b is not None:
        table = amount.pairs.setdefault((a.name, b.name), {})
        for pair in itertools.product(a.widths, b.widths):
            table[pair] = table.get(pair, 0.0) + work * pair[0] * pair[1]
    else:
        group, other = (a, fixed[1]) if a is not None else (b, fixed[0])
        assert group is not None
        amount.add(group.name, {bits: work * bits * other for bits in group.widths})


@dataclass(frozen=True)
class CostRow:
    """A line of the user's table: the cost of nodes of an operator, by weight shape, layer name and widths (None: any)."""

    cost: float
    op: str | None = None
    shape: tuple[int | None, ...] | None = None
    layer: str | None = None
    weight_bits: int | None = None
    act_bits: int | None = None

    def fits(self, layer: Layer, weight_bits: int, act_bits: int) -> bool:
        """Whether the line speaks of this layer at these widths."""
        shape = tuple(layer.weight.shape)
        return (
            self.op in (None, layer.node.op)
            and (self.layer is None or fnmatchcase(layer.node.name, self.layer))
            and (
                self.shape is None
                or (
                    len(shape) == len(self.shape)
                    and all(w in (None, s) for w, s in zip(self.shape, shape, strict=True))
                )
            )
            and self.weight_bits in (None, weight_bits)
            and self.act_bits in (None, act_bits)
        )


def read_costs(path: str | Path) -> tuple[str, list[CostRow]]:
    """Read a cost table: `{"unit": "ms", "rows": [{"op": "Conv", "shape": [16, 3, 3, 3], "weight_bits": 4, "cost": 0.2}]}`.

    Raises:
        UsageError: it cannot be read, or has another form.
    """
    try:
        data = json.loads(Path(path).read_text())
        rows = []
        for row in data["rows"]:
            shape = row.get("shape")
            rows.append(
                CostRow(**{**row, "cost": float(row["cost"]), "shape": None if shape is None else tuple(shape)})
            )
            if not 0 <= rows[-1].cost < math.inf:
                raise ValueError(f"a cost is {row['cost']}, which is no amount")
        return str(data.get("unit", "")), rows
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the cost table {path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f'the cost table {path} is not {{"unit": ..., "rows": [{{"op", "shape", "layer", "weight_bits", "act_bits", '
            f'"cost"}}, ...]}}: {error}'
        ) from None


def costs(graph: gs.Graph, plan: Plan, groups: Sequence[Group], unit: str, rows: Sequence[CostRow]) -> Resource:
    """The sum of the table's costs over all layers with weights; the first row that fits a layer counts.

    Raises:
        UsageError: no row fits some layer at some of its widths.
    """
    group_of = {value: group for group in groups for value in group.values}
    amount, missing = Amount(), []
    for layer in linear_layers(graph):
        sides = [group_of.get(tensor.name) for tensor in (layer.weight, layer.source)]
        options = [side.widths if side else (FLOAT_BITS,) for side in sides]
        table: dict[tuple[int, int], float] = {}
        for pair in itertools.product(options[0], options[1]):
            row = next((row for row in rows if row.fits(layer, *pair)), None)
            if row is None:
                missing.append(
                    f"'{layer.node.name}' ({layer.node.op} {list(layer.weight.shape)}) at {pair[0]}/{pair[1]} bits"
                )
            else:
                table[pair] = row.cost
        if not missing:
            _spend(amount, sides, table)
    if missing:
        raise UsageError(
            f"the cost table has no row for {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            + "; add rows, or leave out op, shape or bits in one so that it fits all"
        )
    return Resource("cost", unit, [amount])


def _spend(amount: Amount, sides: Sequence[Group | None], table: Mapping[tuple[int, int], float]) -> None:
    weight, source = sides
    if weight is not None and source is not None:
        mine = amount.pairs.setdefault((weight.name, source.name), dict.fromkeys(table, 0.0))
        for pair, cost in table.items():
            mine[pair] += cost
    elif weight is not None:
        amount.add(weight.name, {pair[0]: cost for pair, cost in table.items()})
    elif source is not None:
        amount.add(source.name, {pair[1]: cost for pair, cost in table.items()})
    else:
        amount.constant += sum(table.values())
