"""Parts of a mirror as functions: a whole network, its residual blocks or single layers, cut where few values cross.

Blocks are found from the graph: a cut lies wherever a single value connects what is before with what follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs
import torch
from torch import Tensor, fx

from onnx_eptq import graph as graphs
from onnx_eptq.errors import ModelError
from onnx_eptq.mirror import Mirror, same_values
from onnx_eptq.plan import Layer, role_of

Function = Callable[..., tuple[Tensor, ...]]
Scope = Callable[[gs.Graph, Sequence[Layer], "set[int]"], "list[int]"]
MIN_LAYERS = 2  # of a block; a lone stem joins the block behind it
MAX_LAYERS = 12  # a block that finds no single-value cut for so long is cut where any values cross

SCOPES: dict[str, Scope] = {}


def scope(name: str) -> Callable[[Scope], Scope]:
    """Register where a scope cuts: (graph, layers, allowed cuts) -> cuts; cut k lies before node k."""

    def register(function: Scope) -> Scope:
        SCOPES[name] = function
        return function

    return register


@dataclass(frozen=True)
class Piece:
    """A stretch of the graph's nodes.

    `inputs` and `outputs` name the values that cross its ends (outputs: those it makes itself, network outputs included);
    `layers` are the linear layers inside.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[Layer, ...]


def final_nodes(mirror: Mirror) -> dict[str, fx.Node]:
    """The fx node that holds each value as its readers see it (quantized, where planned)."""
    return {node.meta["value"]: node for node in mirror.graph.nodes if "value" in node.meta}


def raw_nodes(mirror: Mirror) -> dict[str, fx.Node]:
    """The fx node that holds each value before its own quantizer."""
    modules = set(mirror.quantizers.values())
    return {
        value: node.args[0] if node.op == "call_module" and node.target in modules else node  # type: ignore[misc]
        for value, node in final_nodes(mirror).items()
    }


def needed_nodes(inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that lead from `inputs` (not among them) to `outputs`."""
    needed: set[fx.Node] = set()
    stack = [node for node in outputs if node not in inputs]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += [source for source in node.all_input_nodes if source not in inputs]
    return needed


def between(mirror: Mirror, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], values: Iterable[str]) -> list[str]:
    """Those of the values that lie on the way from `inputs` to `outputs`."""
    needed, raw = needed_nodes(inputs, outputs), raw_nodes(mirror)
    return [name for name in values if raw.get(name) in needed]


def function(
    mirror: Mirror, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], *, mapped: bool = False
) -> Function:
    """A function of the values of `inputs` that returns those of `outputs`; it reads the mirror's modules as they are.

    A `mapped` function takes any number of samples of a mirror that takes one at a time, and returns what the mirror does of
    each, one behind the other along axis 0.
    """
    graph, copies = fx.Graph(), {}
    needed = needed_nodes(inputs, outputs)
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in mirror.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[node] for node in outputs))
    code = graph.python_code("self")
    scope: dict[str, Callable[..., tuple[Tensor, ...]]] = dict(code.globals)
    exec(code.src, scope)  # the code that fx itself would compile; a GraphModule would copy the parameters' owners
    forward = scope["forward"]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return forward(mirror, *values)

    def run_one(*values: Tensor) -> tuple[Tensor, ...]:
        return forward(mirror, *[value[None] for value in values])

    def run_each(*values: Tensor) -> tuple[Tensor, ...]:
        found = torch.func.vmap(run_one, randomness="different")(*values)
        return tuple(x.flatten(0, 1) if x.ndim > 1 else x for x in found)

    return run_each if mapped else run


def in_step(
    student: Mirror,
    teacher: Mirror,
    inputs: Sequence[Sequence[fx.Node]],
    outputs: Sequence[Sequence[fx.Node]],
    decisions: Iterable[str],
    *,
    mapped: bool = False,
) -> tuple[Function, Function, int]:
    """Functions of both networks, of which the student's selects what the teacher's did, and how many decisions that takes.

    The teacher's returns its decisions behind its outputs, the student's takes them behind its inputs. `inputs` and `outputs`:
    of the student and of the teacher, as for `function`.
    """
    names = between(teacher, inputs[1], outputs[1], decisions)
    given, deciding = ([raw_nodes(mirror)[name] for name in names] for mirror in (student, teacher))
    ours = function(student, [*inputs[0], *given], outputs[0], mapped=mapped)
    return ours, function(teacher, inputs[1], [*outputs[1], *deciding], mapped=mapped), len(names)


def can_map(mirror: Mirror, samples: Sequence[Tensor]) -> bool:
    """Whether a `mapped` function of a mirror that takes one sample at a time computes of several what the mirror does of each.

    Gradients are tried, too, of inputs and scales, as learning needs them.
    """
    inputs, raw = placeholders(mirror), raw_nodes(mirror)
    outputs = [raw[name] for name in mirror.output_names if name in raw]
    together, alone = (function(mirror, inputs, outputs, mapped=mapped) for mapped in (True, False))
    few = [x[:3].detach().clone() for x in samples]
    scales = [tensor for name, tensor in mirror.named_buffers() if name.endswith(".scale")]
    leaves = [x.requires_grad_() for x in (*few, *scales) if x.is_floating_point()]
    try:
        found = together(*few)
        ends = [x.sum() for x in found if x.requires_grad]
        if ends and leaves:
            torch.autograd.grad(sum(ends[1:], ends[0]), leaves, allow_unused=True)
    except (RuntimeError, IndexError, ValueError, TypeError, ModelError):  # an island, a value that Python needs, ...
        return False
    finally:
        for tensor in leaves:
            tensor.requires_grad_(False)
    with torch.no_grad():
        each = [alone(*[x[i : i + 1] for x in few]) for i in range(len(few[0]))]
        expected = [torch.cat([x if x.ndim else x[None] for x in parts]) for parts in zip(*each, strict=True)]
    return bool(outputs) and all(same_values(a.detach(), b) for a, b in zip(found, expected, strict=True))


def placeholders(mirror: Mirror) -> list[fx.Node]:
    """The nodes of the network's inputs, in their order."""
    return [node for node in mirror.graph.nodes if node.op == "placeholder"]


def input_nodes(mirror: Mirror, names: Sequence[str], first: bool) -> list[fx.Node]:
    """The nodes that a piece reads: the placeholders themselves for the first one, whose inputs are not quantized yet."""
    if first:
        return placeholders(mirror)
    finals = final_nodes(mirror)
    return [finals[name] for name in names]


def _variables(graph: gs.Graph) -> tuple[dict[str, int], dict[str, int]]:
    """Per value: the index of the node that makes it (-1: a network input), and of the last node that reads it."""
    made = {tensor.name: -1 for tensor in graph.inputs}
    read: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        made |= {tensor.name: index for tensor in node.outputs if not tensor.is_empty()}
        read |= {tensor.name: index for tensor in graphs.variables_read(node) if tensor.name in made}
    return made, read


def crossing(graph: gs.Graph) -> list[list[str]]:
    """Per cut (before node k, k from 0 to the number of nodes), the values that connect the two sides."""
    made, read = _variables(graph)
    cuts: list[list[str]] = [[] for _ in range(len(graph.nodes) + 1)]
    for name, start in made.items():
        for cut in range(start + 1, read.get(name, -1) + 1):
            cuts[cut].append(name)
    return cuts


@torch.no_grad()
def allowed_cuts(graph: gs.Graph, teacher: Mirror, samples: Sequence[Tensor], multiple: int = 1) -> set[int]:
    """Cuts across which only float values with one entry per sample go: those can be kept and fed again in any batch.

    `multiple`: the model takes multiples of so many samples.
    """
    finals = final_nodes(teacher)
    cuts = crossing(graph)
    names = sorted({name for cut in cuts for name in cut if name in finals})
    probe = function(teacher, input_nodes(teacher, (), True), [finals[name] for name in names])
    sizes = [min(len(samples[0]), size * multiple) for size in (2, 3)]
    whole, part = (probe(*[tensor[:size] for tensor in samples]) for size in sizes)
    good = {
        name
        for name, a, b in zip(names, whole, part, strict=True)
        if a.is_floating_point() and a.ndim and b.ndim and (len(a), len(b)) == tuple(sizes)
    }
    good -= {tensor.name for tensor in graph.inputs}  # before and behind their quantizers they differ
    return {index for index, cut in enumerate(cuts) if cut and good.issuperset(cut)}


def _layer_positions(graph: gs.Graph, layers: Sequence[Layer]) -> list[int]:
    ids = {id(layer.node) for layer in layers}
    return [index for index, node in enumerate(graph.nodes) if id(node) in ids]


@scope("network")
def _network(graph: gs.Graph, layers: Sequence[Layer], allowed: set[int]) -> list[int]:
    return []


@scope("layer")
def _by_layer(graph: gs.Graph, layers: Sequence[Layer], allowed: set[int]) -> list[int]:
    return [index for index in _layer_positions(graph, layers)[1:] if index in allowed]


@scope("block")
def _by_block(graph: gs.Graph, layers: Sequence[Layer], allowed: set[int]) -> list[int]:
    positions, crossings = set(_layer_positions(graph, layers)), crossing(graph)
    cuts: list[int] = []
    inside, left = 0, len(positions)
    for index in range(len(graph.nodes)):
        wide = (len(crossings[index]) == 1 and inside >= MIN_LAYERS) or inside >= MAX_LAYERS
        fused = role_of(graph.nodes[index]) == "clamp"  # a cut before it would split a layer from what is fused on it
        if wide and index in allowed and left and not fused:
            cuts.append(index)
            inside = 0
        if index in positions:
            inside, left = inside + 1, left - 1
    return cuts


def pieces(graph: gs.Graph, layers: Sequence[Layer], name: str, allowed: set[int]) -> list[Piece]:
    """The graph's pieces at a scope, in order."""
    cuts = [0, *SCOPES[name](graph, layers, allowed), len(graph.nodes)]
    crossings = crossing(graph)
    made, _ = _variables(graph)
    network_outputs = [tensor.name for tensor in graph.outputs if tensor.name in made]
    found = []
    for start, stop in itertools.pairwise(cuts):
        ids = {id(node) for node in graph.nodes[start:stop]}
        ends = [value for value in crossings[stop] if start <= made[value] < stop]
        ends += [value for value in network_outputs if start <= made[value] < stop and value not in ends]
        inside = tuple(layer for layer in layers if id(layer.node) in ids)
        found.append(Piece(tuple(crossings[start]), tuple(ends), inside))
    return found


def advance(piece: Function, names: Piece, kept: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Run a piece over all samples: what crosses its end joins what crosses it unchanged."""
    inputs = [kept[name] for name in names.inputs]
    parts = [piece(*[tensor[i : i + batch] for tensor in inputs]) for i in range(0, len(inputs[0]), batch)]
    return {
        **kept,
        **{name: torch.cat(tensors) for name, tensors in zip(names.outputs, zip(*parts, strict=True), strict=True)},
    }
