"""The network's outputs: what stands for them in learning, what they were picked from, and where their classes lie."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import onnx_graphsurgeon as gs

from onnx_eptq.graph import extras, is_op, variables_read
from onnx_eptq.ops import op_of
from onnx_eptq.plan import is_constant, is_float, masks, role_of

_DISTRIBUTES = ("Softmax", "LogSoftmax", "Hardmax")


def learning_targets(graph: gs.Graph) -> list[str]:
    """The float values that stand for the network's outputs.

    Behind them gradients vanish or end: a final Softmax, Sigmoid, ArgMax, TopK, NonMaxSuppression or detection decode is cut
    off (`Op.squashes`), and so is a mask, beside whose numbers no error counts.
    """
    return _ends(graph, lambda node: op_of(node).squashes or masks(node))


def judged_targets(graph: gs.Graph) -> list[str]:
    """The float values that students are judged by: as `learning_targets`, but behind a final Sigmoid, not before it.

    Distances need no gradient, and where most scores are near 0 (objects of a detector) it is the others that count.
    """
    return _ends(graph, lambda node: (op_of(node).squashes and not op_of(node).unary) or masks(node))


def moved_from(graph: gs.Graph, names: Iterable[str]) -> list[str]:
    """Values and what holds their elements before operators that only move them (Reshape, Transpose)."""
    tensors, found = graph.tensors(), list[str]()
    for name in names:
        tensor: gs.Tensor | None = tensors[name]
        while tensor is not None:
            found.append(tensor.name)
            moves = tensor.inputs and role_of(tensor.inputs[0]) == "same_grid"
            tensor = next(iter(_activations(tensor.inputs[0])), None) if moves else None
    return found


def _ends(graph: gs.Graph, squashes: Callable[[gs.Node], bool]) -> list[str]:
    """What the outputs come to, and what is selected by on the way to them."""
    tensors = graph.tensors()
    ends = [*graph.outputs, *(tensors[name] for name in decisions(graph))]
    return list(dict.fromkeys(name for tensor in ends for name in _before_squashing(tensor, squashes)))


def _activations(node: gs.Node) -> list[gs.Tensor]:
    return [tensor for tensor in variables_read(node) if not is_constant(tensor)]


def _squashed(tensor: gs.Tensor, known: dict[str, bool], squashes: Callable[[gs.Node], bool]) -> bool:
    """Whether an operator that squashes lies between the last linear operators and this value."""
    if tensor.name not in known:
        known[tensor.name] = any(
            squashes(node)
            or not is_float(tensor)
            or (role_of(node) != "linear" and any(_squashed(source, known, squashes) for source in _activations(node)))
            for node in tensor.inputs
        )
    return known[tensor.name]


def _before_squashing(tensor: gs.Tensor, squashes: Callable[[gs.Node], bool]) -> Iterator[str]:
    known: dict[str, bool] = {}
    stack, seen = [tensor], set()
    while stack:
        value = stack.pop()
        if value.name in seen or is_constant(value):
            continue
        seen.add(value.name)
        if not _squashed(value, known, squashes):
            if is_float(value) and value.inputs:
                yield value.name
            continue
        stack += reversed(_activations(value.inputs[0]))


def scores(graph: gs.Graph) -> list[str]:
    """The outputs that are scores between 0 and 1, each by itself (of a Sigmoid)."""
    ends = [tensor for tensor in graph.outputs if tensor.inputs and not is_constant(tensor)]
    return [t.name for t in ends if op_of(t.inputs[0]).unary and op_of(t.inputs[0]).bounds == (0.0, 1.0)]


def _is_rounded(node: gs.Node, before: Collection[str]) -> bool:
    """Whether what a node makes depends on numbers that quantization rounds: on values named, weights, or a float table."""
    looks_up = is_float(node.outputs[0]) and any(is_constant(tensor) and is_float(tensor) for tensor in node.inputs)
    return role_of(node) == "linear" or looks_up or any(tensor.name in before for tensor in variables_read(node))


def selections(graph: gs.Graph) -> dict[str, list[str]]:
    """For every output whose elements an operator selects: the float values that it, and what follows it, picks from.

    What is selected by shapes and integer inputs alone, such as the order of a padded sequence, is the same in both networks.
    """
    sources: dict[str, dict[str, None]] = {}  # of each value behind a selection
    known = {tensor.name for tensor in graph.inputs if is_float(tensor)}  # and what depends on them, or on weights
    for node in graph.nodes:
        read = variables_read(node)
        depends = _is_rounded(node, known)
        known |= {tensor.name for tensor in node.outputs if depends}
        if (op_of(node).selects and depends) or any(tensor.name in sources for tensor in read):
            found = {tensor.name: None for tensor in read if is_float(tensor) and tensor.name not in sources}
            for tensor in read:
                found |= sources.get(tensor.name, {})
            sources |= {tensor.name: found for tensor in node.outputs}
    return {tensor.name: list(sources[tensor.name]) for tensor in graph.outputs if tensor.name in sources}


def decisions(graph: gs.Graph) -> list[str]:
    """Integers and truth values that say what an operator selects (TopK, NonZero), where what is rounded has a say in them.

    Two networks that are fed each other's select the same elements, in the same order and number, and can be compared behind.
    """
    rounded = {tensor.name for tensor in graph.inputs if is_float(tensor)}  # and what depends on that, or on weights
    found: dict[str, None] = {}
    for node in graph.nodes:
        read = variables_read(node)
        if _is_rounded(node, rounded):
            rounded |= {tensor.name for tensor in node.outputs}
            if op_of(node).selects:
                chosen = [*node.outputs, *(tensor for tensor in read if tensor.name in rounded)]
                found |= {tensor.name: None for tensor in chosen if not tensor.is_empty() and not is_float(tensor)}
    return list(found)


def class_axes(graph: gs.Graph) -> dict[str, int]:
    """The axis along which an output, or scores that a TopK reads, hold one number per class, where the graph tells.

    That of the Softmax or linear operator it comes from, followed through what lies between. The first axis is that of the
    samples. Columns of different scale and the colours of a picture are no classes: such an output has none of its axes.
    """
    known: dict[str, int] = {}
    distributed: set[str] = set()
    for node in graph.nodes:
        shares = is_op(node, *_DISTRIBUTES) or any(tensor.name in distributed for tensor in variables_read(node))
        for tensor in node.outputs:
            axis = _axis_of(node, tensor, known)
            if axis is not None:
                known[tensor.name] = axis
                distributed |= {tensor.name} if shares else set()
    names = [tensor.name for tensor in graph.outputs]
    names += [node.inputs[0].name for node in graph.nodes if is_op(node, "TopK")]
    found = {name: known[name] for name in names if known.get(name)}
    whole = [tensor for tensor in graph.outputs if tensor.name in extras(graph).quantities]
    distributed |= {
        tensor.name for tensor in graph.outputs if any(is_op(n, *_DISTRIBUTES, "ArgMax") for n in tensor.outputs)
    }
    whole += [tensor for tensor in graph.outputs if tensor.name not in distributed and _is_picture(tensor, graph)]
    return found | {tensor.name: len(tensor.shape or ()) for tensor in whole}


def _is_picture(output: gs.Tensor, graph: gs.Graph) -> bool:
    """Whether an output has the three colours of an image that goes in, and at least its size: a cleaned or enlarged one."""
    return any(_is_drawn_of(output.shape or (), tensor.shape or ()) for tensor in graph.inputs)


def _is_drawn_of(output: Sequence[int | str | None], image: Sequence[int | str | None]) -> bool:
    """Whether shapes are those of two images of three colours, the first no smaller as far as sizes are known."""
    if len(output) != 4 or len(image) != 4:
        return False
    return any(
        output[colours] == image[colours] == 3 and all(map(_not_less, inner, outer))
        for colours, inner, outer in ((1, output[2:], image[2:]), (3, output[1:3], image[1:3]))
    )


def _not_less(size: int | str | None, than: int | str | None) -> bool:
    return size >= than if isinstance(size, int) and isinstance(than, int) else size != 1


def _axis_of(node: gs.Node, tensor: gs.Tensor, known: Mapping[str, int]) -> int | None:
    """Where the node's output `tensor` has its classes, given the axes of values before it."""
    if not tensor.shape:
        return None
    rank, op = len(tensor.shape), op_of(node)
    if is_op(node, *_DISTRIBUTES):
        return int(node.attrs.get("axis", -1)) % rank
    if role_of(node) == "linear":
        left = is_op(node, "MatMul") and is_constant(node.inputs[0])  # the weight has one row per channel then
        return (rank - 2 if left else op.output_axis) % rank
    for source in _activations(node):
        if source.name in known and source.shape is not None:
            if op.carries is not None:
                return op.carries(node.attrs, known[source.name], source.shape, tensor.shape)
            if len(source.shape) == rank:
                return known[source.name]
    return None


def distributed(graph: gs.Graph, targets: Iterable[str]) -> dict[str, int]:
    """Of the values named, those that a Softmax, ArgMax or the like reads: the axis along which it does.

    But for the first one, along which the values of several samples are joined.
    """
    tensors, found = graph.tensors(), {}
    for name in targets:
        for reader in tensors[name].outputs:
            if is_op(reader, *_DISTRIBUTES, "ArgMax") and tensors[name].shape is not None:
                default = 0 if reader.op == "ArgMax" else -1
                found[name] = int(reader.attrs.get("axis", default)) % len(tensors[name].shape)
    return {name: axis for name, axis in found.items() if axis}
