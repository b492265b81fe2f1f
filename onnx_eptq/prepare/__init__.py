"""Bring a float graph into the plain form that the rest of the package expects, without changing what it computes.

`prepare` raises the opset, then runs the rewrites of `PASSES` until none of them finds anything. Every pass takes a
graph whose shapes are inferred, edits it in place and returns how many changes it made. Names, shapes and types of the
graph's inputs and outputs never change. Only the top-level graph is rewritten, never the body of an If or a Loop, but
for the type that it computes in.
"""

import logging
import re
from collections.abc import Callable, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnx_eptq import graph as og
from onnx_eptq import islands
from onnx_eptq.graph import constant, is_op
from onnx_eptq.prepare import constants, layout, linear, normalization, patterns, precision, sequences
from onnx_eptq.prepare.edit import shorten
from onnx_eptq.prepare.opset import OPSET, to_opset

LOG = logging.getLogger(__name__)
Pass = Callable[[gs.Graph], int]
_ROUNDS = 20  # a bound on the repetitions; real models settle in two to four
_NUMBERED = re.compile(r"/\d+$")  # what `edit.fresh_name` puts behind a name
PASSES: dict[str, Pass] = {  # in the order in which they run
    function.__name__: function
    for function in (
        precision.use_float32,
        sequences.unpack_sequences,
        constants.remove_noops,
        constants.fold_constants,
        constants.fold_shapes,
        patterns.fuse_activations,
        normalization.fuse_normalizations,
        patterns.use_quotients,
        patterns.use_squares,
        patterns.sort_selected,
        layout.merge_reshapes,
        layout.use_flatten,
        layout.merge_transposes,
        layout.sink_transposes,
        layout.hoist_transposes,
        linear.explicit_padding,
        linear.drop_dilations,
        linear.merge_pads,
        linear.use_global_pool,
        linear.unfold_einsum,
        linear.fuse_gemm,
        linear.normalize_gemm,
        linear.fold_batchnorm,
        linear.fold_scale,
        linear.fold_factor,
        linear.use_products,
        linear.fold_bias,
        linear.split_masks,
        linear.fold_forward,
        linear.split_biases,
        linear.split_weights,
    )
}


def prepare(graph: gs.Graph, *, opset: int = OPSET) -> dict[str, int]:
    """Rewrite the graph in place and return how many changes each pass made.

    Raises:
        ModelError: The graph cannot be brought to the opset.
    """
    tensors = graph.tensors()
    named = {name for name, tensor in tensors.items() if isinstance(tensor, gs.Constant)}
    numbers = (match.group(0)[1:] for match in map(_NUMBERED.search, tensors) if match and len(match.group(0)) < 8)
    graph.name_idx = max(graph.name_idx, *map(int, numbers), 0)  # names to come are taken by none
    to_opset(graph, opset)
    og.remove_dead(graph)
    og.infer_shapes(graph)
    if islands.declare(graph):
        og.infer_shapes(graph)
    counts = dict.fromkeys(PASSES, 0)
    for _ in range(_ROUNDS):
        before = sum(counts.values())
        for name in PASSES:
            counts[name] += run_pass(name, graph)
        if sum(counts.values()) == before:
            break
    _restore_names(graph, named)
    return counts


def _restore_names(graph: gs.Graph, named: set[str]) -> None:
    """Give rewritten constants the names they came with, by which users know them, where one alone has taken the place."""
    taken = {tensor.name for scope in og.scopes(graph) for tensor in og.tensors_of(scope)}
    heirs: dict[str, list[gs.Tensor]] = {}
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and tensor.name not in named:
            origin = tensor.name
            while origin not in named and _NUMBERED.search(origin):
                origin = _NUMBERED.sub("", origin)
            heirs.setdefault(origin, []).append(tensor)
    for name, tensors in heirs.items():
        if name in named and name not in taken and len(tensors) == 1:
            tensors[0].name = name


def run_pass(name: str, graph: gs.Graph) -> int:
    """Run one pass on a graph with inferred shapes, tidy up after it, and return how many changes it made."""
    changes = PASSES[name](graph)
    if changes:
        LOG.info("%s: %d", name, changes)
        og.remove_dead(graph)
        og.infer_shapes(graph)
    return changes


def add_biases(graph: gs.Graph) -> int:
    """Give every Conv, ConvTranspose and Gemm without a bias one of zeros, for what bias correction will find.

    Not a pass: it makes the graph larger, so it runs only on demand.
    """
    added = 0
    taken = set(graph.tensors())
    for node in graph.nodes:
        if not is_op(node, "Conv", "ConvTranspose", "Gemm") or not isinstance(node.inputs[1], gs.Constant):
            continue
        if len(node.inputs) > 2 and not node.inputs[2].is_empty():
            continue
        shape = node.inputs[1].shape
        axis = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if node.attrs.get("transB", 0) else 1}[node.op]
        channels = shape[axis] * (node.attrs.get("group", 1) if node.op == "ConvTranspose" else 1)
        bias = constant(og.fresh(f"{node.inputs[1].name}_bias", taken), np.zeros(channels, np.float32))
        shorten(node.inputs, 2)
        node.inputs.append(bias)
        added += 1
    return added


def even_inputs(graph: gs.Graph, ranges: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> int:
    """Scale columns of inputs that differ to one size before the layers that read them; return how many inputs were scaled.

    The layers' weights take the factors, powers of two, back. A column that lies far from zero beside what varies in it is
    shifted, too, where the layers' biases can make up for it.

    Args:
        graph: prepared.
        ranges: lowest and highest value of every column, by input.
    """
    changes = 0
    for tensor in graph.inputs:
        if tensor.name in ranges:
            changes += linear.even_columns(graph, *linear.behind_affine(tensor, *ranges[tensor.name]))
    return changes


def free_batch(graph: gs.Graph) -> gs.Graph | None:
    """Return a copy whose mirror takes any multiple of the batch size that the graph fixes, or None where that is not known.

    Exports with a fixed batch size spell it in the targets of their Reshapes. Whether the copy computes the same is for
    the caller to try (`mirror.same_on_batches`): other operators may mix the samples.
    """
    sizes = {tensor.shape[0] if tensor.shape else None for tensor in graph.inputs}
    if len(sizes) != 1 or not all(isinstance(size, int) for size in sizes):
        return None
    copy = og.copy(graph)
    for node in copy.nodes:
        if is_op(node, "Reshape") and isinstance(node.inputs[1], gs.Constant):
            shape = node.outputs[0].shape
            if not shape or not all(isinstance(size, int) for size in shape):
                return None
            target = np.array([-1, *shape[1:]], np.int64)
            node.inputs[1] = gs.Constant(f"{node.name}_free_shape", target)
    return copy
