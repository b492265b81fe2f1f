"""ONNX file <-> `onnx_graphsurgeon.Graph`: load, save, constants, sub-byte packing, shapes.

Graphsurgeon forgets model and node metadata, cannot write sub-byte constants once their values were read, and trusts
names to be unique. `load` keeps aside what it forgets (`graph.extras`), `to_model` puts everything back.
"""

import contextlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, TensorProto, ValueInfoProto, numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from onnx_eptq.errors import ModelError, OutputError

LOG = logging.getLogger(__name__)
OPSETS = range(7, 26)
# Younger than the opset that graphs are brought to; their parts are not.
_COMPOSED = ("Attention", "RMSNormalization", "RotaryEmbedding", "Swish")
# Of ai.onnx.ml; not Normalizer, which ONNX Runtime computes in place, wrongly, where it knows the shape.
_SHAPE_KEEPERS = ("Scaler", "Imputer", "Binarizer")
STANDARD_DOMAINS = (None, "", "ai.onnx")
HUGE = 1e3  # no score comes near: numbers of this size among small ones are a mask
PROTOBUF_LIMIT = 2**31 - 2**20  # protobuf refuses 2 GiB; the rest is room for the nodes
EXTERNAL_BYTES = 1024  # smaller constants stay in the model file: runtimes want to see shapes and axes early
PACKED_BITS = {
    getattr(TensorProto, name): bits
    for name, bits in {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}.items()
    if hasattr(TensorProto, name)  # 2-bit types are younger than the oldest onnx supported
}
_NATIVE_KINDS = "biufc"  # numpy kinds whose bytes are ONNX raw_data as they are
_SMALL = 1024  # elements; constants up to this size are shown to shape inference, which may need their values
_GS_ATTRIBUTES = {AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.TENSOR, AttributeProto.GRAPH}
_GS_LISTS = {AttributeProto.FLOATS: "floats", AttributeProto.INTS: "ints", AttributeProto.STRINGS: "strings"}
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint",
    b"\x89HDF": "an HDF5 file, perhaps a Keras model",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}


@dataclass
class NodeExtras:
    """What graphsurgeon drops from a node; the attributes belong to the operator the node was."""

    op: str
    doc_string: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    attributes: list[AttributeProto] = field(default_factory=list)


@dataclass
class Extras:
    """What graphsurgeon drops from a model; nodes and values by name, so it survives edits of the graph.

    `defaults`: inputs that are initializers, too, where not all initializers are listed so. `feeds_whole`: what the model is
    fed is one sample as it is, although the inputs' shapes could be taken for batches. `uneven`: inputs and outputs with columns
    that one grid does not serve (`columns`); `quantities`: outputs among them that cannot be scores. `unlike`: those whose
    samples differ so much in size that most would be lost.
    """

    domain: str = ""
    model_version: int = 0
    doc_string: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    graph_metadata: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, NodeExtras] = field(default_factory=dict)
    interface: dict[str, ValueInfoProto] = field(default_factory=dict)
    values: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    annotations: list[onnx.TensorAnnotation] = field(default_factory=list)
    defaults: list[str] = field(default_factory=list)
    feeds_whole: bool = False
    uneven: list[str] = field(default_factory=list)
    quantities: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------- loading


def load(source: str | os.PathLike[str] | onnx.ModelProto | gs.Graph) -> gs.Graph:
    """Return a graph of its own: the source is not modified and shares no editable part with it.

    Constant nodes become constants, model-local functions are inlined, nodes get unique names, and what graphsurgeon
    cannot hold is kept in `graph.extras`.

    Raises:
        ModelError: The source cannot be read, is empty, or its opset is outside 7 to 25.
    """
    if isinstance(source, gs.Graph):
        return copy(source)
    if isinstance(source, onnx.ModelProto):
        model, label = onnx.ModelProto(), "The model"
        model.CopyFrom(source)
        _refuse_external(model)
    elif isinstance(source, str | os.PathLike):
        model, label = _read(Path(source)), f"'{os.fspath(source)}'"
    else:
        raise ModelError(
            f"The model is a {type(source).__name__}; give the path of an .onnx file, an onnx.ModelProto or a graphsurgeon Graph."
        )
    _check(model, label)
    return _import(model)


def _read(path: Path) -> onnx.ModelProto:
    if not path.exists():
        raise ModelError(f"No file at '{path}'; give the path of an .onnx file.")
    if path.is_dir():
        found = sorted(p.name for p in path.glob("*.onnx"))
        hint = f"give one of the files in it ({', '.join(found[:5])})" if found else "it holds no .onnx file"
        raise ModelError(f"'{path}' is a folder, not an ONNX file; {hint}.")
    try:
        return onnx.load(path)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ModelError(_why_unreadable(path)) from error
    except PermissionError as error:
        raise ModelError(f"'{path}' cannot be opened: permission denied; check its access rights.") from error
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise ModelError(
            f"'{path}' keeps weights in an external data file that cannot be read ({_one_line(error)}); "
            "put that file beside the model."
        ) from error


def _why_unreadable(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(32)
    for signature, what in _SIGNATURES.items():
        if head.startswith(signature):
            return f"'{path}' is {what}, not an ONNX file; export the model to ONNX first."
    if head[:1] == b"\x08":  # field 1 of ModelProto, ir_version: every ONNX writer starts with it
        return f"'{path}' is a truncated or damaged ONNX file; copy or export it again."
    return f"'{path}' is not an ONNX file; export the model to ONNX first."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _refuse_external(model: onnx.ModelProto) -> None:
    outside = [tensor.name for tensor in _tensors(model.graph) if tensor.data_location == TensorProto.EXTERNAL]
    if outside:
        raise ModelError(
            f"The model's external data is not loaded ({len(outside)} weights, the first is '{outside[0]}'); "
            "give the path of the .onnx file, or load the model with its external data."
        )


def _check(model: onnx.ModelProto, label: str) -> None:
    if not model.graph.node:
        raise ModelError(f"{label} holds no nodes, so there is nothing to quantize; was the right file given?")
    if not model.graph.output:
        raise ModelError(f"{label} has no outputs, so it computes nothing; export the model again.")
    if _needs_standard_opset(model):
        found = {o.version for o in model.opset_import if o.domain in STANDARD_DOMAINS} or {1}
        if max(found) not in OPSETS:
            raise ModelError(
                f"{label} uses opset {max(found)}, but opset {OPSETS[0]} to {OPSETS[-1]} is wanted; "
                "export the model with an opset in that range, for example 17."
            )
    _check_wiring(model.graph, label)


def _needs_standard_opset(model: onnx.ModelProto) -> bool:
    declared = any(o.domain in STANDARD_DOMAINS for o in model.opset_import)
    return declared or any(n.domain in STANDARD_DOMAINS for n in model.graph.node)


def _check_wiring(graph: onnx.GraphProto, label: str) -> None:
    """Refuse a top-level graph that reads what nothing makes, or makes one value twice."""
    known = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    known |= {t.values.name for t in graph.sparse_initializer}
    made: set[str] = set()
    for node in graph.node:
        for name in filter(None, node.output):
            if name in made or name in known:
                raise ModelError(f"{label} makes the value '{name}' twice (node '{node.name}'); export it again.")
            made.add(name)
    for name in [n for node in graph.node for n in node.input if n] + [v.name for v in graph.output]:
        if name not in known and name not in made:
            raise ModelError(f"{label} reads the value '{name}', which nothing computes; export it again.")


def _import(model: onnx.ModelProto) -> gs.Graph:
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        _make_outputs(nodes)
    composed = {node.op_type for node in model.graph.node if node.domain in STANDARD_DOMAINS} & set(_COMPOSED)
    if model.functions or composed:
        model = _inline(model, composed)
    _fill_in(model.graph)
    _name_nodes(model.graph, set())
    extras = _harvest(model)
    _drop_untyped(model.graph)
    with G_LOGGER.suppress(G_LOGGER.CRITICAL):
        graph = gs.import_onnx(model)
    graph.opset = next((o.version for o in model.opset_import if o.domain in STANDARD_DOMAINS), 21)
    graph.import_domains = [onnx.helper.make_opsetid(o.domain, o.version) for o in model.opset_import]
    graph.extras = extras
    for scope in scopes(graph):
        _absorb_constant_nodes(scope)
    unique_names(graph)
    return graph


def notes_bytes(graph: gs.Graph) -> int:
    """Bytes, about, of what the exporter noted on the graph's nodes and values: doc strings and metadata."""
    found, live = extras(graph), {node.name for scope in scopes(graph) for node in scope.nodes}
    notes = [(entry.doc_string, entry.metadata) for name, entry in found.nodes.items() if name in live]
    notes += list(found.values.values())
    return sum(len(text) + sum(len(key) + len(value) for key, value in entries.items()) for text, entries in notes)


def strip_notes(graph: gs.Graph) -> None:
    """Forget what `notes_bytes` counts; what is noted on the model itself, such as names of classes, stays."""
    found = extras(graph)
    found.values.clear()
    for entry in found.nodes.values():
        entry.doc_string = ""
        entry.metadata.clear()


def _inline(model: onnx.ModelProto, composed: Collection[str]) -> onnx.ModelProto:
    """Write out the model's own functions, and these operators as the ONNX specification composes them of older ones."""
    import onnx.inliner  # rarely needed

    _spell_function_defaults(model)
    inlined: onnx.ModelProto = onnx.inliner.inline_local_functions(model, True) if model.functions else model
    if composed:
        typed = onnx.ModelProto()
        typed.CopyFrom(inlined)
        known = {value.name for value in (*typed.graph.input, *typed.graph.value_info)}
        typed.graph.value_info.extend(  # how an operator is composed depends on the types and shapes of what it reads
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in typed.graph.initializer
            if tensor.name not in known
        )
        for node in typed.graph.node:
            if node.op_type in composed and node.domain in STANDARD_DOMAINS:
                _spell_defaults(node, max(o.version for o in typed.opset_import if o.domain in STANDARD_DOMAINS))
        names = [("", name) for name in composed]
        try:
            inlined = onnx.inliner.inline_selected_functions(typed, names, inline_schema_functions=True)
        except RuntimeError:  # it knows no inputs that are left out; the runtime computes such nodes itself, then
            LOG.debug("%s: left as they are", ", ".join(composed))
    for entry in model.metadata_props:
        if not any(e.key == entry.key for e in inlined.metadata_props):
            inlined.metadata_props.append(entry)
    return inlined


def _spell_function_defaults(model: onnx.ModelProto) -> None:
    """Give calls of the model's own functions the attributes that they leave at the functions' defaults: inlining drops those."""
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    stack = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while stack:
        node = stack.pop()
        stack += [inner for subgraph in _subgraph_protos(node) for inner in subgraph.node]
        called = functions.get((node.domain, node.op_type, node.overload))
        given = {attribute.name for attribute in node.attribute}
        node.attribute.extend(a for a in (called.attribute_proto if called else ()) if a.name not in given)


def _spell_defaults(node: onnx.NodeProto, opset: int) -> None:
    """Write out the attributes that a node leaves at their defaults: what the inliner composes would lack their values."""
    given = {attribute.name for attribute in node.attribute}
    for name, attribute in onnx.defs.get_schema(node.op_type, opset, "").attributes.items():
        if name not in given and attribute.default_value.name:
            node.attribute.append(attribute.default_value)


def _subgraph_protos(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g


def _make_outputs(nodes: Iterable[onnx.NodeProto]) -> None:
    """Let nodes make what subgraphs return; graphsurgeon forgets an initializer that is an output."""
    for subgraph in (subgraph for node in nodes for subgraph in _subgraph_protos(node)):
        returned = {output.name for output in subgraph.output}
        kept = [tensor for tensor in subgraph.initializer if tensor.name not in returned]
        made = [
            onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
            for tensor in subgraph.initializer
            if tensor.name in returned
        ]
        if made:
            made += subgraph.node
            subgraph.ClearField("initializer")
            subgraph.ClearField("node")
            subgraph.initializer.extend(kept)
            subgraph.node.extend(made)
        _make_outputs(subgraph.node)


def _fill_in(graph: onnx.GraphProto) -> None:
    """Write sparse constants, which graphsurgeon reads as numbers of double precision, as dense ones of their own type."""
    graph.initializer.extend(_dense(tensor) for tensor in graph.sparse_initializer)
    graph.ClearField("sparse_initializer")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.SPARSE_TENSOR:
                attribute.CopyFrom(onnx.helper.make_attribute("value", _dense(attribute.sparse_tensor)))
        for subgraph in _subgraph_protos(node):
            _fill_in(subgraph)


def _dense(tensor: onnx.SparseTensorProto) -> TensorProto:
    """All elements of a sparse tensor, whose indices count through it or name its axes."""
    values, indices = (onnx.numpy_helper.to_array(part) for part in (tensor.values, tensor.indices))
    found = np.zeros(tuple(tensor.dims), values.dtype)
    found[np.unravel_index(indices, found.shape) if indices.ndim == 1 else tuple(indices.T)] = values
    return onnx.numpy_helper.from_array(found, tensor.values.name)


def _name_nodes(graph: onnx.GraphProto, taken: set[str]) -> None:
    for node in graph.node:
        node.name = fresh(node.name or node.op_type, taken)
        for subgraph in _subgraph_protos(node):
            _name_nodes(subgraph, taken)


def fresh(wanted: str, taken: set[str]) -> str:
    """Return `wanted`, or `wanted` with the first free number, and add it to `taken`."""
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name


def _props(entries: Iterable[onnx.StringStringEntryProto]) -> dict[str, str]:
    return {entry.key: entry.value for entry in entries}


def _harvest(model: onnx.ModelProto) -> Extras:
    """Copy out what graphsurgeon drops, and take out of `model` the attributes it cannot read."""
    graph = model.graph
    extras = Extras(
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        metadata=_props(model.metadata_props),
        graph_metadata=_props(getattr(graph, "metadata_props", ())),
        defaults=_defaults(graph),
        annotations=list(graph.quantization_annotation),
    )
    for value in [*graph.input, *graph.output]:
        extras.interface[value.name] = ValueInfoProto.FromString(value.SerializeToString())
    for value in graph.value_info:
        if value.doc_string or value.metadata_props:
            extras.values[value.name] = (value.doc_string, _props(value.metadata_props))
    _harvest_nodes(graph, extras)
    return extras


def _defaults(graph: onnx.GraphProto) -> list[str]:
    """Inputs that callers may leave out; none where an old exporter lists every initializer as an input."""
    held = {tensor.name for tensor in graph.initializer}
    found = [value.name for value in graph.input if value.name in held]
    return found if len(found) < len(held) else []


def _harvest_nodes(graph: onnx.GraphProto, extras: Extras) -> None:
    for node in graph.node:
        odd = [a for a in node.attribute if not _gs_reads(a)]
        if node.doc_string or node.metadata_props or odd:
            kept = []
            for attribute in odd:
                kept.append(AttributeProto.FromString(attribute.SerializeToString()))
                node.attribute.remove(attribute)
            extras.nodes[node.name] = NodeExtras(node.op_type, node.doc_string, _props(node.metadata_props), kept)
        for subgraph in _subgraph_protos(node):
            _harvest_nodes(subgraph, extras)


def _gs_reads(attribute: AttributeProto) -> bool:
    if attribute.type in _GS_LISTS:
        return len(getattr(attribute, _GS_LISTS[attribute.type])) > 0
    if attribute.type == AttributeProto.STRING:
        return _is_text(attribute.s)
    return attribute.type in _GS_ATTRIBUTES


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _drop_untyped(graph: onnx.GraphProto) -> None:
    """Clear the types graphsurgeon cannot hold (maps, optionals); those of inputs and outputs are in the extras."""
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.WhichOneof("value") not in ("tensor_type", "sequence_type"):
            value.ClearField("type")
    for node in graph.node:
        for subgraph in _subgraph_protos(node):
            _drop_untyped(subgraph)


def _absorb_constant_nodes(graph: gs.Graph) -> None:
    kept = []
    for node in graph.nodes:
        values = _constant_values(node) if is_op(node, "Constant") else None
        if values is None or any(node.outputs[0] is out for out in graph.outputs):
            kept.append(node)
            continue
        tensor = node.outputs[0]
        node.outputs.clear()
        tensor.to_constant(values)
    graph.nodes = kept


def _constant_values(node: gs.Node) -> Any:
    attrs = node.attrs
    if "value" in attrs:
        return attrs["value"]._values
    for key, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64)):
        if key in attrs:
            return np.array(attrs[key], dtype)
    return np.array(attrs["value_ints"], np.int64) if "value_ints" in attrs else None


# ------------------------------------------------------------------------------------------------- looking at a graph


def scopes(graph: gs.Graph) -> Iterator[gs.Graph]:
    """Yield the graph and every subgraph in it, outermost first."""
    yield graph
    yield from graph.subgraphs(recursive=True)


def nodes_within(node: gs.Node) -> Iterator[gs.Node]:
    """Yield the nodes of a node's subgraphs, at any depth."""
    for scope in node.subgraphs(recursive=True):
        yield from scope.nodes


def is_op(node: gs.Node, *ops: str) -> bool:
    """Tell whether the node is one of these operators of the standard domain."""
    return node.op in ops and node.domain in STANDARD_DOMAINS


def is_packed(tensor: gs.Tensor) -> bool:
    """Tell whether the tensor is a constant of a type numpy does not have, whose `.values` must not be read."""
    return (
        isinstance(tensor, gs.Constant)
        and np.dtype(tensor.dtype if not isinstance(tensor.dtype, int) else object).kind not in _NATIVE_KINDS
    )


def array(tensor: gs.Tensor) -> np.ndarray[Any, Any] | None:
    """Return the values of a constant of an ordinary numeric type, else None."""
    if not isinstance(tensor, gs.Constant) or is_packed(tensor):
        return None
    return np.asarray(tensor.values)


def is_mask(values: np.ndarray[Any, Any]) -> bool:
    """Whether an operand pushes elements out of a Softmax: negative numbers no score comes near, alone or among small ones.

    On one grid with such numbers, all real scores would fall on one step.
    """
    size = np.abs(values.astype(np.float64))
    if not values.size or np.isnan(size).any() or size.max() < HUGE or values.min() >= 0:
        return False
    top = size.max()
    if np.isinf(top):  # beside which other elements may be ruled out by a number
        rest = values[np.isfinite(size)]
        return bool(np.all(np.abs(rest) <= HUGE)) or is_mask(rest)
    return bool(np.all((size >= 0.5 * top) | (size <= 1e-3 * top)))


def ruled_out(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which elements a mask pushes out; none where the values are no mask."""
    found: np.ndarray[Any, Any] = np.isinf(values) & is_mask(values)
    rest = values[~np.isinf(values)]
    if is_mask(rest):
        size = np.abs(values.astype(np.float64))
        found |= size >= 0.5 * size[~np.isinf(values)].max()
    return found


def masks_sum(values: np.ndarray[Any, Any], total: gs.Tensor, outputs: Collection[int]) -> bool:
    """Whether one number per channel, added to what a layer computes, rules some channels out.

    Not before a Relu, or a Clip with a lower bound, that alone reads the sum: there it only means 0 or that bound.

    Args:
        values: the numbers.
        total: the sum.
        outputs: ids of the values that leave the graph.
    """
    out = ruled_out(values)
    return bool(out.any()) and not out.all() and not is_bounded_below(total, outputs)


def is_bounded_below(tensor: gs.Tensor, outputs: Collection[int]) -> bool:
    """Whether all that reads a value are Relus, or Clips with a lower bound; `outputs` as in `masks_sum`."""
    return bool(tensor.outputs) and id(tensor) not in outputs and all(map(_bounds_below, tensor.outputs))


def _bounds_below(node: gs.Node) -> bool:
    low = array(node.inputs[1]) if is_op(node, "Clip") and len(node.inputs) > 1 else None
    return is_op(node, "Relu") or (low is not None and low.size == 1 and abs(float(low.reshape(-1)[0])) < HUGE)


def extras(graph: gs.Graph) -> Extras:
    """Return the graph's `Extras`, made empty for a graph that was not loaded here."""
    if "extras" not in vars(graph):  # getattr on a gs.Graph prints an error for a missing attribute
        graph.extras = Extras()
    found: Extras = graph.extras
    return found


def copy(graph: gs.Graph) -> gs.Graph:
    """Return an independent graph, extras included; only the bytes of the weights are shared."""
    with G_LOGGER.suppress(G_LOGGER.CRITICAL):
        unique_names(graph)
        result = graph.copy()
    kinds = {t.name: t.type for scope in scopes(graph) for t in tensors_of(scope) if isinstance(t, gs.Variable)}
    for scope in scopes(result):
        for tensor in tensors_of(scope):
            if isinstance(tensor, gs.Variable):
                tensor.type = kinds.get(tensor.name, tensor.type)
                tensor.shape = None if tensor.shape is None else list(tensor.shape)
        for node in scope.nodes:
            node.attrs = {k: list(v) if isinstance(v, list) else v for k, v in node.attrs.items()}
    old = extras(graph)
    result.extras = Extras(**{**vars(old), "metadata": dict(old.metadata), "nodes": dict(old.nodes)})
    result.import_domains = list(graph.import_domains or [])
    result.name_idx = graph.name_idx
    return result


def tensors_of(scope: gs.Graph) -> Iterator[gs.Tensor]:
    """Yield every tensor that one graph names, once; not those of its subgraphs."""
    seen: set[int] = set()
    nodes = ([*node.inputs, *node.outputs] for node in scope.nodes)
    for group in (scope.inputs, scope.outputs, *nodes):
        for tensor in group:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


# ---------------------------------------------------------------------------------------------------------- constants


def constant(name: str, values: Any) -> gs.Constant:
    """Return a constant of a numpy array; strings and types numpy lacks are stored so that they export correctly."""
    values = np.asarray(values)
    if values.dtype.kind in _NATIVE_KINDS:
        return gs.Constant(name, np.ascontiguousarray(values).reshape(values.shape))
    return gs.Constant(name, LazyValues(numpy_helper.from_array(values, name)))


def packed_constant(name: str, codes: np.ndarray[Any, Any], onnx_dtype: int) -> gs.Constant:
    """Return an INT4, UINT4, INT2 or UINT2 constant holding the integer `codes` (int8 or uint8, any shape)."""
    bits = PACKED_BITS[onnx_dtype]
    signed = onnx_dtype in (TensorProto.INT4, getattr(TensorProto, "INT2", None))
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if codes.size and (codes.min() < low or codes.max() > high):
        raise ValueError(f"codes of '{name}' span {codes.min()}..{codes.max()}, outside {low}..{high}")
    proto = TensorProto(name=name, data_type=onnx_dtype, dims=codes.shape, raw_data=pack(codes, bits))
    return gs.Constant(name, LazyValues(proto))


def pack(codes: np.ndarray[Any, Any], bits: int) -> bytes:
    """Return the codes (flattened, the last byte padded with zero) as ONNX packs them: first code in the low bits."""
    per_byte = 8 // bits
    flat = codes.reshape(-1).astype(np.int16) & ((1 << bits) - 1)
    rows = np.pad(flat, (0, -flat.size % per_byte)).reshape(-1, per_byte)
    shifted: np.ndarray[Any, Any] = rows << (bits * np.arange(per_byte, dtype=np.int16))
    return bytes(shifted.sum(axis=1).astype(np.uint8))


def unpack(data: bytes, bits: int, shape: Iterable[int], signed: bool) -> np.ndarray[Any, Any]:
    """Return the codes that `pack` packed, as int8 (signed) or uint8, in the given shape."""
    shape = tuple(shape)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (np.frombuffer(data, np.uint8)[:, None] >> shifts) & ((1 << bits) - 1)
    codes = codes.reshape(-1)[: math.prod(shape)].reshape(shape)
    if not signed:
        return codes
    sign = 1 << (bits - 1)
    return ((codes.astype(np.int8) ^ sign) - sign).astype(np.int8)


# ------------------------------------------------------------------------------------------------------------ editing


def unique_names(graph: gs.Graph) -> None:
    """Give every node and value, also in subgraphs, a name of its own; the graph's inputs and outputs keep theirs."""
    tensors: dict[int, gs.Tensor] = {id(t): t for t in [*graph.inputs, *graph.outputs]}
    taken = {t.name for t in tensors.values()}
    nodes: set[str] = set()
    for scope in scopes(graph):
        for tensor in tensors_of(scope):
            if id(tensor) not in tensors and (tensor.name or (tensor.inputs and tensor.outputs)):
                tensors[id(tensor)] = tensor
                tensor.name = fresh(tensor.name or "value", taken)
        for node in scope.nodes:
            node.name = fresh(node.name or node.op, nodes)


def toposort(graph: gs.Graph) -> None:
    """Put the nodes in execution order, keeping the present order where it is already right.

    Raises:
        ModelError: The graph has a cycle.
    """
    order: list[gs.Node] = []
    state: dict[int, bool] = {}  # False while on the stack, True when placed
    local = {id(node) for node in graph.nodes}
    for root in graph.nodes:
        stack = [(root, iter(_producers(root)))] if id(root) not in state else []
        state.setdefault(id(root), False)
        while stack:
            node, producers = stack[-1]
            todo = next((p for p in producers if id(p) in local and not state.get(id(p), False)), None)
            if todo is None:
                stack.pop()
                state[id(node)] = True
                order.append(node)
            elif id(todo) in state:
                raise ModelError(f"The graph has a cycle through node '{todo.name}'; export the model again.")
            else:
                state[id(todo)] = False
                stack.append((todo, iter(_producers(todo))))
    graph.nodes = order
    for subgraph in graph.subgraphs():
        toposort(subgraph)


def _reads(node: gs.Node) -> list[gs.Tensor]:
    """Return what the node, or a subgraph inside it, reads; what is made inside too."""
    read = list(node.inputs)
    for subgraph in node.subgraphs(recursive=True):
        read += [t for inner in subgraph.nodes for t in inner.inputs] + subgraph.outputs
    return read


def _producers(node: gs.Node) -> list[gs.Node]:
    """Return the nodes that make what the node, or a subgraph inside it, reads."""
    return [producer for tensor in _reads(node) for producer in tensor.inputs]


def same_constants(a: gs.Graph, b: gs.Graph) -> bool:
    """Whether the constants of one graph and its copy still hold the same numbers."""
    others = b.tensors()
    mine = (tensor for tensor in a.tensors().values() if isinstance(tensor, gs.Constant))
    return all(np.array_equal(tensor.values, others[tensor.name].values) for tensor in mine)


def tensors_read(node: gs.Node) -> list[gs.Tensor]:
    """Return what the node reads from its own scope, each once: its inputs, and what its subgraphs capture."""
    inner = list(node.subgraphs(recursive=True))
    made = {id(t) for s in inner for t in (*s.inputs, *(t for n in s.nodes for t in n.outputs))}
    found = {t.name: t for t in _reads(node) if id(t) not in made and not t.is_empty()}
    return list(found.values())


def variables_read(node: gs.Node) -> list[gs.Variable]:
    """Return what the node reads from its own scope and is no constant."""
    return [t for t in tensors_read(node) if isinstance(t, gs.Variable)]


def node_model(node: gs.Node, graph: gs.Graph) -> onnx.ModelProto:
    """Return a model that computes one node: constants inside, inputs not declared yet, every output but empty ones."""
    constants = [_sealed(t) for t in tensors_read(node) if isinstance(t, gs.Constant)]
    for scope in node.subgraphs(recursive=True):
        for tensor in tensors_of(scope):
            if isinstance(tensor, gs.Constant):
                _seal(tensor)
    with G_LOGGER.suppress(G_LOGGER.CRITICAL):
        proto = OnnxExporter.export_node(node)
        initializers = [OnnxExporter.export_tensor_proto(t) for t in constants]
    _restore_node(proto, extras(graph))
    for subgraph in _subgraph_protos(proto):
        _drop_shadowing(subgraph, {t.name for t in constants})
    outputs = [ValueInfoProto(name=t.name) for t in node.outputs if not t.is_empty()]
    body = onnx.helper.make_graph([proto], "island", [], outputs, initializers)
    return onnx.helper.make_model(body, opset_imports=_opset_imports(graph, graph.opset), ir_version=10)


def remove_dead(graph: gs.Graph) -> int:
    """Remove the top-level nodes whose values nothing reads, and return how many they were."""
    outputs = {id(t) for scope in scopes(graph) for t in scope.outputs}
    doomed: set[int] = set()
    todo = list(graph.nodes)
    while todo:
        node = todo.pop()
        if id(node) in doomed or any(t.outputs or id(t) in outputs for t in node.outputs):
            continue
        doomed.add(id(node))
        todo += [n for n in _producers(node) if n is not node]
        for inner in [node, *nodes_within(node)]:
            inner.inputs.clear()
            inner.outputs.clear()
    graph.nodes = [node for node in graph.nodes if id(node) not in doomed]
    return len(doomed)


def skeleton(graph: gs.Graph) -> onnx.ModelProto:
    """Return the model without the bytes of its larger weights, which become inputs: cheap to hand to onnx's C++."""
    unique_names(graph)
    toposort(graph)
    inner = {id(t): t for s in graph.subgraphs(recursive=True) for t in tensors_of(s) if isinstance(t, gs.Constant)}
    constants = {id(t): t for t in tensors_of(graph) if isinstance(t, gs.Constant)} | inner
    small = [t for t in constants.values() if math.prod(t.shape) <= _SMALL and not isinstance(t._values, SparseValues)]
    kept = {id(t) for t in small}
    with G_LOGGER.suppress(G_LOGGER.CRITICAL):
        nodes = [OnnxExporter.export_node(node) for node in graph.nodes]
        inputs = [_value_info(t) for t in [*graph.inputs, *(t for t in constants.values() if id(t) not in kept)]]
        initializers = [OnnxExporter.export_tensor_proto(_sealed(t)) for t in small]
        outputs = [_value_info(t) for t in graph.outputs]
    proto = onnx.helper.make_graph(nodes, graph.name or "graph", inputs, outputs, initializers)
    for node in proto.node:
        for subgraph in _subgraph_protos(node):
            _drop_shadowing(subgraph, {t.name for t in constants.values()})
        _restore_attributes(node, extras(graph))
    return onnx.helper.make_model(proto, opset_imports=_opset_imports(graph, graph.opset), ir_version=10)


def _value_info(tensor: gs.Tensor) -> ValueInfoProto:
    return OnnxExporter.export_value_info_proto(tensor, False)


def infer_shapes(graph: gs.Graph) -> None:
    """Fill in the shapes and types of the values that nodes compute, as far as ONNX can tell; constants are not copied.

    What inference finds replaces what was there; the declared shapes of the graph's inputs and outputs stay.
    """
    _infer_shapes(graph)
    if sum(map(_keep_shape, graph.nodes)):
        _infer_shapes(graph)


def _keep_shape(node: gs.Node) -> bool:
    """Give the value of a scaler of tables the shape that it keeps, of which ONNX's inference says nothing."""
    if node.domain != "ai.onnx.ml" or node.op not in _SHAPE_KEEPERS or node.outputs[0].shape is not None:
        return False
    node.outputs[0].shape = node.inputs[0].shape
    node.outputs[0].dtype = np.float32 if node.op == "Scaler" else node.inputs[0].dtype
    return node.outputs[0].shape is not None and node.outputs[0].dtype is not None


def _infer_shapes(graph: gs.Graph) -> None:
    model = skeleton(graph)
    for value in model.graph.output:
        value.ClearField("type")  # exporters give unrelated outputs the same symbolic dimension
    model.graph.value_info.extend(_custom_value_info(graph))
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False, data_prop=True)
    except onnx.shape_inference.InferenceError as error:  # a graph may run although ONNX's rules contradict it
        LOG.warning("shapes are not inferred: %s", _one_line(error))
        return
    found = {value.name: value for value in [*inferred.graph.value_info, *inferred.graph.output]}
    declared = {id(t) for t in graph.inputs} | {id(t) for t in graph.outputs if t.shape is not None}
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name in found and id(tensor) not in declared:
                _set_type(tensor, found[tensor.name])
    for tensor in graph.outputs:
        if isinstance(tensor, gs.Variable) and tensor.shape is None and tensor.name in found:
            _set_type(tensor, found[tensor.name])


def _custom_value_info(graph: gs.Graph) -> list[ValueInfoProto]:
    """Return the declared types of what custom operators make: inference knows nothing of those."""
    tensors = [t for node in graph.nodes if node.domain not in STANDARD_DOMAINS for t in node.outputs]
    outputs = {id(t) for t in graph.outputs}
    return [_value_info(t) for t in tensors if t.name and t.dtype is not None and id(t) not in outputs]


def _set_type(tensor: gs.Variable, value: ValueInfoProto) -> None:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type" or not value.type.tensor_type.elem_type:
        return
    with G_LOGGER.suppress(G_LOGGER.CRITICAL):
        imported = gs.importers.onnx_importer.OnnxImporter.import_tensor(value)
    tensor.dtype = imported.dtype
    if imported.shape is not None:
        tensor.shape = imported.shape


# ------------------------------------------------------------------------------------------------------------- saving


def to_model(
    graph: gs.Graph, *, opset: int | None = None, ir_version: int = 10, metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """Return the graph as a checked ONNX model, with everything put back that graphsurgeon cannot hold.

    The graph's nodes are sorted and its names made unique on the way.

    Args:
        graph: The graph to export.
        opset: The standard opset the nodes are written for; nothing is converted. Default: the graph's own.
        ir_version: The IR version to declare; 2-bit types need 13.
        metadata: Entries to add to the model's metadata_props.

    Raises:
        ModelError: The graph is not a valid ONNX model.
    """
    if any(t.dtype is None or t.shape is None for t in graph.outputs):
        infer_shapes(graph)
    unique_names(graph)
    toposort(graph)
    for scope in scopes(graph):
        for tensor in tensors_of(scope):
            if isinstance(tensor, gs.Constant):
                _seal(tensor)
    with G_LOGGER.suppress(G_LOGGER.CRITICAL):
        proto = OnnxExporter.export_graph(graph, do_type_check=False)
    model = onnx.helper.make_model(
        proto, opset_imports=_opset_imports(graph, opset or graph.opset), ir_version=ir_version
    )
    _restore(model, graph, {**extras(graph).metadata, **(metadata or {})})
    # The checker wants a shape for every output; a runtime does not, and inference cannot always tell it.
    complete = all(t.dtype is not None and t.shape is not None for t in [*graph.inputs, *graph.outputs])
    if complete and _weight_bytes(model) < PROTOBUF_LIMIT:
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise ModelError(f"The graph is not a valid ONNX model: {_one_line(error)}.") from error
    return model


def _sealed(tensor: gs.Constant) -> gs.Constant:
    _seal(tensor)
    return tensor


def _seal(tensor: gs.Constant) -> None:
    """Store values numpy has no bytes for as a packed proto: graphsurgeon would write their memory as it lies."""
    if isinstance(tensor._values, np.ndarray) and tensor._values.dtype.kind not in _NATIVE_KINDS:
        tensor._values = LazyValues(numpy_helper.from_array(tensor._values, tensor.name))


def _opset_imports(graph: gs.Graph, opset: int) -> list[onnx.OperatorSetIdProto]:
    used = {node.domain for scope in scopes(graph) for node in scope.nodes} - set(STANDARD_DOMAINS)
    versions = {o.domain: o.version for o in graph.import_domains or []}
    custom = [onnx.helper.make_opsetid(domain, versions.get(domain, 1)) for domain in sorted(used)]
    return [onnx.helper.make_opsetid("", opset), *custom]


def _restore(model: onnx.ModelProto, graph: gs.Graph, metadata: dict[str, str]) -> None:
    kept = extras(graph)
    model.producer_name, model.producer_version = graph.producer_name, graph.producer_version
    model.domain, model.model_version, model.doc_string = kept.domain, kept.model_version, kept.doc_string
    onnx.helper.set_model_props(model, metadata)
    onnx.helper.set_metadata_props(model.graph, kept.graph_metadata)
    outer = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        _restore_node(node, kept)
        for subgraph in _subgraph_protos(node):
            _drop_shadowing(subgraph, outer)
    for value in [*model.graph.input, *model.graph.output]:
        _restore_interface(value, kept.interface.get(value.name))
    for value in model.graph.value_info:
        if value.name in kept.values:
            value.doc_string = kept.values[value.name][0]
            onnx.helper.set_metadata_props(value, kept.values[value.name][1])
    names = {name for node in model.graph.node for name in [*node.input, *node.output]}
    model.graph.quantization_annotation.extend(a for a in kept.annotations if a.tensor_name in names)


def _restore_node(node: onnx.NodeProto, kept: Extras) -> None:
    if node.name in kept.nodes:
        node.doc_string = kept.nodes[node.name].doc_string
        onnx.helper.set_metadata_props(node, kept.nodes[node.name].metadata)
    _restore_attributes(node, kept)
    for subgraph in _subgraph_protos(node):
        for inner in subgraph.node:
            _restore_node(inner, kept)


def _restore_attributes(node: onnx.NodeProto, kept: Extras) -> None:
    if node.name in kept.nodes and kept.nodes[node.name].op == node.op_type:
        present = {a.name for a in node.attribute}
        node.attribute.extend(a for a in kept.nodes[node.name].attributes if a.name not in present)


def _drop_shadowing(graph: onnx.GraphProto, outer: set[str]) -> None:
    """Remove the copies graphsurgeon writes into a subgraph of the outer constants that the subgraph reads."""
    kept = [t for t in graph.initializer if t.name not in outer]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        for subgraph in _subgraph_protos(node):
            _drop_shadowing(subgraph, outer | {t.name for t in kept})


def _restore_interface(value: ValueInfoProto, original: ValueInfoProto | None) -> None:
    if original is None:
        return
    kind = original.type.WhichOneof("value")
    if kind != "tensor_type" or _signature(value) == _signature(original):
        value.CopyFrom(original)


def _signature(value: ValueInfoProto) -> tuple[Any, ...]:
    kind = value.type.tensor_type
    dims = [d.dim_param or (d.dim_value if d.HasField("dim_value") else None) for d in kind.shape.dim]
    return kind.elem_type, kind.HasField("shape"), dims


def _weight_bytes(model: onnx.ModelProto) -> int:
    return sum(len(t.raw_data) for t in model.graph.initializer)


def model_bytes(model: onnx.ModelProto) -> int:
    """Return the size that the model's file will have, with its external data when `Staged.write` makes any."""
    if _weight_bytes(model) < PROTOBUF_LIMIT:
        return int(model.ByteSize())
    with staging() as staged:
        staged.write(model)
        return file_bytes(staged.path)


def file_bytes(path: Path) -> int:
    """Return the size of a model file and of the external data files that it names."""
    return sum(part.stat().st_size for part in [path, *data_files(path)])


@dataclass(frozen=True)
class Staged:
    """A model file in a temporary folder, to be looked at before it is moved to its place; `staging` makes it."""

    path: Path
    output: Path | None

    def write(self, model: onnx.ModelProto, *, limit: int | None = None) -> None:
        """Write the model; weights of `limit` bytes or more (default: what protobuf can hold) go to `<name>.data`.

        Raises:
            OutputError: The file cannot be written, here as in the other methods.
        """
        external = _weight_bytes(model) >= (PROTOBUF_LIMIT if limit is None else limit)
        with _output_errors(self.output):
            _write(model, self.path, external=external)

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Give the file these metadata_props; external data stays as it is."""
        with _output_errors(self.output):
            model = onnx.load(self.path, load_external_data=False)
            onnx.helper.set_model_props(model, dict(metadata))
            self.path.write_bytes(model.SerializeToString())

    def publish(self) -> None:
        """Move the file, and its external data, over what is at the output: both or none of them."""
        assert self.output is not None
        new, final, old = _data_path(self.path), _data_path(self.output), self.path.with_name("replaced")
        with _output_errors(self.output):
            if not new.exists():
                self.path.replace(self.output)
                return
            try:
                if final.exists():
                    final.replace(old)
                new.replace(final)
                self.path.replace(self.output)  # the model last: it names the data
            except BaseException:
                if self.path.exists() and not new.exists():
                    final.replace(new)
                if self.path.exists() and old.exists():
                    old.replace(final)
                raise


@contextlib.contextmanager
def staging(output: str | os.PathLike[str] | None = None) -> Iterator[Staged]:
    """Yield a place for a model file that nothing is left of unless it is published.

    It is beside the output, hence on the same disk, so that moving out of it is atomic; without an output it is in the
    system's temporary folder.

    Raises:
        OutputError: The folder cannot be made there.
    """
    path = None if output is None else Path(os.path.realpath(output))  # of a link, what it leads to is replaced
    with _output_errors(path):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}." if path else None, dir=path.parent if path else None))
    try:
        yield Staged(folder / (path.name if path else "model.onnx"), path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _output_errors(output: Path | None) -> Iterator[None]:
    """Tell of what the system refuses in the user's terms: the output, not the file that is staged for it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or _one_line(error)
        what = f"'{output}'" if output else f"A file in the temporary folder '{tempfile.gettempdir()}'"
        advice = "choose another place for the output" if output else "name another folder in TMPDIR"
        raise OutputError(f"{what} cannot be written: {reason}; {advice}.") from error


def data_files(model: Path) -> list[Path]:
    """The files of external data that a model file names; none where it cannot be read, of which `load` says more."""
    try:
        held = _tensors(onnx.load(model, load_external_data=False).graph)
    except (DecodeError, OSError, ValueError):
        return []
    outside = (tensor for tensor in held if onnx.external_data_helper.uses_external_data(tensor))
    return sorted({model.parent / onnx.external_data_helper.ExternalDataInfo(tensor).location for tensor in outside})


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All constants of a graph: initializers, attributes of nodes, and those of subgraphs."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from [attribute.t, *attribute.tensors]
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _data_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _write(model: onnx.ModelProto, path: Path, *, external: bool) -> None:
    if external:
        whole, model = model, onnx.ModelProto()
        model.CopyFrom(whole)
        _move_out(model, _data_path(path))
    path.write_bytes(model.SerializeToString())


def _move_out(model: onnx.ModelProto, path: Path) -> None:
    """Move the larger weights into a data file: onnx's own function fails where the working folder has such a file."""
    with path.open("wb") as file:
        for tensor in model.graph.initializer:
            data = tensor.raw_data
            if len(data) >= EXTERNAL_BYTES:
                onnx.external_data_helper.set_external_data(tensor, path.name, file.tell(), len(data))
                tensor.ClearField("raw_data")
                file.write(data)
