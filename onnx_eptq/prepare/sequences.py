"""Pass: sequences of tensors, which exporters write for lists, where it is known which tensors they hold."""

import numpy as np
import onnx_graphsurgeon as gs

from onnx_eptq.graph import is_op
from onnx_eptq.prepare.edit import const_at, fresh_name, input_at, mutate, new_constant, new_node, shape_of

Members = dict[int, list[gs.Tensor]]  # by the id of a sequence
_READERS = ("SequenceAt", "SequenceLength", "ConcatFromSequence")


def unpack_sequences(graph: gs.Graph) -> int:
    """Let nodes that read known members of a sequence read those tensors: parts of a split, or what was put together."""
    known: Members = {}
    changes = 0
    for node in list(graph.nodes):
        picks = node.op != "SequenceAt" or const_at(node, 1) is not None
        if is_op(node, *_READERS) and node.inputs and node.outputs and picks:
            members = _members(graph, node.inputs[0], known)
            changes += members is not None and _read(graph, node, members)
    return changes


def _read(graph: gs.Graph, node: gs.Node, members: list[gs.Tensor]) -> bool:
    """Turn the node into one that reads the members themselves; False where there is none that it asks for."""
    if node.op == "SequenceLength":
        mutate(node, "Identity", [new_constant(graph, node.outputs[0].name, np.array(len(members), np.int64))], {})
        return True
    if node.op == "SequenceAt":
        position = _position(node, 1, len(members))
        if position is None or not 0 <= position < len(members):
            return False
        mutate(node, "Identity", [members[position]], {})
        return True
    axis = int(node.attrs["axis"])
    if not members:
        return False
    if node.attrs.get("new_axis"):
        axes = new_constant(graph, f"{node.name}/axes", np.array([axis], np.int64))
        members = [new_node(graph, "Unsqueeze", [member, axes], node) for member in members]
    mutate(node, "Concat", members, {"axis": axis})
    return True


def _position(node: gs.Node, index: int, count: int, default: int = 0) -> int | None:
    """Which of `count` members an input names, from the front on; None where it is computed."""
    values = const_at(node, index)
    if values is None:
        return default if input_at(node, index) is None else None
    position = int(values.reshape(-1)[0])
    return position if position >= 0 else position + count


def _members(graph: gs.Graph, sequence: gs.Tensor, known: Members) -> list[gs.Tensor] | None:
    """The tensors that a sequence holds, or None where that depends on what is computed."""
    node = sequence.inputs[0] if sequence.inputs else None
    if node is None or id(sequence) in known:
        return known.get(id(sequence))
    found = None
    if is_op(node, "SequenceConstruct"):
        found = list(node.inputs)
    elif is_op(node, "SequenceEmpty"):
        found = []
    elif is_op(node, "SplitToSequence"):
        found = _parts(graph, node)
    elif is_op(node, "Identity", "SequenceInsert", "SequenceErase"):
        before = _members(graph, node.inputs[0], known)
        found = None if before is None else _edited(node, before)
    if found is not None:
        known[id(sequence)] = found
    return found


def _edited(node: gs.Node, members: list[gs.Tensor]) -> list[gs.Tensor] | None:
    """The members behind a node that hands a sequence on, puts one in (at the end by default) or takes one out (the last)."""
    if node.op == "Identity":
        return members
    inserts = node.op == "SequenceInsert"
    count = len(members)
    position = _position(node, 2 if inserts else 1, count, count if inserts else count - 1)
    if position is None or not 0 <= position < count + inserts:
        return None
    return [*members[:position], *([node.inputs[1]] if inserts else []), *members[position + (not inserts) :]]


def _parts(graph: gs.Graph, node: gs.Node) -> list[gs.Tensor] | None:
    """The parts of a SplitToSequence as outputs of a new Split; None where their number or sizes are not known."""
    source, shape = node.inputs[0], shape_of(node.inputs[0])
    if shape is None:
        return None
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    given, whole = const_at(node, 1), shape[axis]
    alone = input_at(node, 1) is None
    if given is None and not alone:
        return None
    if given is not None and given.ndim:
        sizes = [int(size) for size in given]
    elif isinstance(whole, int):
        size = 1 if given is None else int(given)
        sizes = [min(size, whole - start) for start in range(0, whole, size)]
    else:
        return None
    name = fresh_name(graph, node.name)
    parts: list[gs.Tensor] = [gs.Variable(f"{name}_part{i}") for i in range(len(sizes))]
    split = new_constant(graph, f"{name}/split", np.array(sizes, np.int64))
    graph.nodes.append(gs.Node("Split", name, {"axis": axis}, [source, split], parts))
    if alone and not node.attrs.get("keepdims", 1):
        axes = new_constant(graph, f"{name}/axes", np.array([axis], np.int64))
        parts = [new_node(graph, "Squeeze", [part, axes], node) for part in parts]
    return parts
