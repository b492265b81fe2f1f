"""The written file in ONNX Runtime against the mirror, node by node."""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, fx

from onnx_eptq.calibrate import Batch, apply_linear, feed
from onnx_eptq.columns import NOISE, as_rows
from onnx_eptq.data import no_batch_axis
from onnx_eptq.errors import VerificationError
from onnx_eptq.graph import ruled_out
from onnx_eptq.grid import Quantized, dequantize, quantize
from onnx_eptq.mirror import Mirror, Probe
from onnx_eptq.ops import bounds_of
from onnx_eptq.plan import Layer, Plan, role_of

Source: TypeAlias = onnx.ModelProto | str | PathLike[str]
RUNTIME = str(ort.__version__)
LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
MAX_SHARE = 1e-4  # of elements that may be one step off where the runtime computes in float
FLOAT_TOLERANCE = 1e-3  # of the largest magnitude, for outputs that no quantizer follows
MIXED = 1e-3  # of the largest magnitude: by more than that no float rounding lets a sample change another's outputs
KERNEL = 2.0**-22  # of the range of a Sigmoid, Softmax, ...: what ONNX Runtime's kernels are off near its ends
TIE = 2.0**-17  # of a value in steps: 64 units in the last place of float32
_AVERAGING = (
    "Resize", "Upsample", "AveragePool", "GlobalAveragePool", "Mean", "Sum", "ReduceMean", "ReduceSum", "GridSample"
)  # fmt: skip
OFF_GRID = 1e-3  # steps that a value which is only moved may lie beside its grid
PRODUCT_TOLERANCE = 1e-5  # of the largest magnitude, for float results of integer sums
LAST_BIT = 2.0**-22  # of a float32 result, and a little more
FREE = 2  # elements per value that may be: a single tie in a small tensor is no fault
FLOAT_LINEAR = {"Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits"}
INTEGER_LINEAR = {"QLinearConv", "QGemm", "QLinearMatMul"}
INTEGER_OTHER = {
    *("QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax"),
    *("QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean", "QLinearWhere"),
}


@dataclass
class Parity:
    """How the written file differs from the mirror, in quantization steps, each node fed with ONNX Runtime's own inputs.

    `float_*`: every quantized value with the runtime's optimisations off; of the differences, those are unexplained that are
    no means on the middle between two steps, where the last bit of a sum decides. `integer_*`: values that the runtime's integer
    kernels for Conv, Gemm and MatMul compute, against exact integer arithmetic. `fused_*`: values of its other integer
    kernels (Add, Concat, pooling, ...), against the mirror. `basic_equals_off`: network outputs bit for bit. `optimized_db`:
    signal-to-noise ratio of each float output at full optimisation, where the signal is that with optimisations off. `layers`
    counts the quantized ones; `float_layers` are those of them that the runtime computes in float, with the kernel's operator.
    """

    float_values: int = 0
    float_elements: int = 0
    float_differences: int = 0
    float_unexplained: int = 0
    integer_values: int = 0
    integer_elements: int = 0
    integer_differences: int = 0
    fused_values: int = 0
    fused_elements: int = 0
    fused_differences: int = 0
    fused_max_steps: int = 0
    basic_equals_off: bool = True
    optimized_db: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    layers: int = 0
    float_layers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fidelity:
    """Float against quantized model, both at full optimisation, per output.

    `sqnr_db` has the outputs of real numbers, in dB; `agreement` the share of positions, in %, where the largest class or an
    integer is the same. Outputs in `selected` hold what a TopK, NonMaxSuppression or the like has picked, in its order: element
    by element they cannot be compared, so the values that it picks from stand for them; `selected_db` (dB) and
    `selected_agreement` (%) tell of these outputs where the quantized model is made to pick what the float one does. `masked`
    says how much of an output, in %, holds the huge negative numbers of a mask on both sides, beside which no error would be
    one: it is left out. `worst` names the column (feature, channel; `columns.column_axis`) of an output whose error is largest
    beside its own spread, with the signal-to-noise ratio of what varies in it: a mean, or larger columns, hide nothing there.
    `broken` counts the elements of an output that are NaN or infinite where the float model's are numbers; no ratio holds them.
    """

    samples: int
    sqnr_db: dict[str, float]
    agreement: dict[str, float]
    selected: dict[str, list[str]] = field(default_factory=dict)
    masked: dict[str, float] = field(default_factory=dict)
    worst: dict[str, tuple[int, float]] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    selected_db: dict[str, float] = field(default_factory=dict)
    selected_agreement: dict[str, float] = field(default_factory=dict)


def session(
    model: Source, level: str = "all", threads: int = 0, *, folder: Path | None = None, save_to: Path | None = None
) -> ort.InferenceSession:
    """A CPU session; raises VerificationError when the runtime refuses the model.

    Args:
        model: a file, or a ModelProto, which protobuf limits to 2 GB.
        level: how much the runtime may optimise, a key of `LEVELS`.
        threads: 0 for one per core.
        folder: where the external data of a ModelProto is.
        save_to: where to write the optimized model, its larger weights as external data beside it.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if folder:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if save_to:
        options.optimized_model_filepath = str(save_to)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{save_to.name}.data"
        )
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else fspath(model)
    # Where a Loop has such operators, too, ONNX Runtime gives one name to several of the values that it makes, and what it
    # saves cannot be loaded again.
    disabled = ["GatherSliceToSplitFusion"] if save_to else []
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        reason = _reason(error)
        raise VerificationError(f"ONNX Runtime {RUNTIME} cannot load the model at level '{level}': {reason}") from error


def run(of: ort.InferenceSession, batch: Batch, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Outputs by name."""
    names = list(names) if names is not None else [output.name for output in of.get_outputs()]
    if not names:  # for which the runtime would return all of them
        return {}
    inputs = {item.name: np.asarray(batch[item.name]) for item in of.get_inputs()}
    try:
        return dict(zip(names, of.run(names, inputs), strict=True))
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise VerificationError(f"ONNX Runtime {RUNTIME} cannot run the model: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of a runtime's message, without the places in its source code and of a file that is soon gone."""
    return re.sub(r"/\S+\.(?:cc|h):\d+\s*|Load model from .* failed:\s*", "", str(error).strip().splitlines()[0])[:400]


def _opened(model: Source) -> tuple[onnx.ModelProto, Path | None]:
    """The model without its external data, and the folder where that is."""
    if isinstance(model, onnx.ModelProto):
        return model, None
    return onnx.load(model, load_external_data=False), Path(model).absolute().parent


def _exposing(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy whose intermediate values `names` are outputs too."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    known = {output.name for output in exposed.graph.output}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return exposed


def _codes_names(model: onnx.ModelProto) -> dict[str, str]:
    """For every DequantizeLinear of a computed value: its output's (or a network input's) name -> the integers' name."""
    constants = {tensor.name for tensor in model.graph.initializer}
    producer = {output: node for node in model.graph.node for output in node.output}
    names = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] in constants:
            continue
        origin = producer[node.input[0]]
        origin = producer[origin.input[0]] if origin.op_type == "Clip" else origin
        if origin.op_type == "QuantizeLinear":
            names[node.output[0]] = node.input[0]
            names[origin.input[0]] = node.input[0]  # a network input keeps its name on the float side
    return names


def _at_ties(position: Tensor, averaged: bool) -> Tensor:
    """Whether a value in steps lies within float rounding of the middle between two.

    One that is there itself must be rounded to the even side, unless it is a mean, whose last bit depends on the order.
    """
    distance = (position - position.floor() - 0.5).abs()
    return (distance <= TIE * position.abs().clamp(min=1)) & ((distance > 0) | averaged)


def _check_steps(
    value: str, producer: str, ours: Tensor, theirs: Tensor, position: Tensor, averaged: bool, slack: float = 0.0
) -> tuple[int, int]:
    """Count the differing elements, and those that no tie explains; raise when these are too many, or others too far off.

    Where an operator reads quantized values, its results are few and frequent: one that falls on a tie may tip thousands of
    elements at once, so those do not count against the share. `position` is the value in steps, before rounding; `slack` how
    many of them a kernel may be off by itself.
    """
    apart = ours.long() - theirs.long()
    steps, count = apart.abs(), int((apart != 0).sum())
    near = ((position - position.round() + apart).abs() <= 0.5 + slack) & (slack > 0)
    unexplained = int(((steps > 0) & ~near & ~_at_ties(position, averaged)).sum())
    if ((steps > 1) & ~near).any() or unexplained > max(FREE, 10 * MAX_SHARE * steps.numel()):
        raise VerificationError(
            f"node {producer}, value '{value}': the written file and the simulation differ in {count} of {steps.numel()} "
            f"elements by up to {int(steps.max())} steps; this is a bug, please report it with the model"
        )
    return count, unexplained


def _source(node: fx.Node) -> Any:
    """The node whose result a quantizer rounds; of other nodes, the node itself."""
    return node.args[0] if node.op == "call_module" and node.args else node


def _producers(student: Mirror) -> dict[str, str]:
    """For every value the quoted name of the ONNX node that computes it, or its own where it is a network input."""
    sources = {node.meta["value"]: _source(node) for node in student.graph.nodes if "value" in node.meta}
    return {value: f"'{source.meta.get('onnx', source.name)}'" for value, source in sources.items()}


def _averages(student: Mirror) -> set[str]:
    """Values that are means of others."""
    found = set()
    for node in student.graph.nodes:
        if "value" in node.meta and getattr(_source(node).target, "__name__", "") in _AVERAGING:
            found.add(node.meta["value"])
    return found


def _slack(student: Mirror) -> dict[str, float]:
    """How far kernels may be off that approximate a bounded function: by a part of its range, however small the value is."""
    found = {}
    for node in student.graph.nodes:
        island = node.op == "call_module" and "onnx" in node.meta  # which is no quantizer of what it reads
        bounds = None if island else bounds_of(_source(node).target)
        if "value" in node.meta and bounds is not None:
            found[node.meta["value"]] = KERNEL * (bounds[1] - bounds[0])
    return found


def _check_complete(model: onnx.ModelProto, student: Mirror, plan: Plan, found: Iterable[str]) -> None:
    """Raise when the file lacks a planned quantizer: an unread value, or a bias in float, differs too little to show."""
    unread = set(plan) - set(found)
    missing = [(_producers(student)[v], v) for v, p in plan.items() if p.role == "activation" and v in unread]
    floats = {tensor.name for tensor in model.graph.initializer} & set(plan)
    islands = {n.meta["onnx"] for n in student.graph.nodes if n.op == "call_module" and "onnx" in n.meta}
    readers = [node for node in model.graph.node if node.name not in islands]
    missing += [(f"'{node.name}'", name) for node in readers for name in node.input if name in floats]
    for node, value in missing[:1]:
        raise VerificationError(
            f"node {node}, value '{value}': the written file does not quantize it; this is a bug, please report it with the "
            "model"
        )


class _RawProbe(Probe):
    """A probe that remembers what the value at hand was before its quantizer; the value itself where it has none.

    And `sorted`: what the last TopK sorted, and along which axis.
    """

    raw: Tensor
    sorted: tuple[Tensor, int]

    def run_node(self, n: fx.Node) -> object:
        """Compute one node, then let the callback see the value it holds."""
        source = n.args[0] if n.args else None
        if isinstance(source, fx.Node) and n.op == "call_module":
            self.raw = self.env[source]
        elif isinstance(source, fx.Node) and _is_topk(n):
            self.sorted = self.env[source], cast(int, n.kwargs.get("axis", -1))
        return super().run_node(n)


def _is_topk(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "TopK"


def _tuple_of(node: fx.Node) -> fx.Node:
    """The node with several outputs of which this one is an output; of other nodes, the node itself."""
    return next(iter(node.all_input_nodes), node) if getattr(node.target, "__name__", "") == "_item" else node


def _check_decision(
    value: str, producer: str, ours: Tensor, theirs: Tensor, chosen_of: tuple[Tensor, int] | None
) -> None:
    """Raise where the runtime selects other elements than the mirror, unless they are as large but for float rounding.

    `chosen_of`: where a TopK decides, what it sorts and along which axis.
    """
    if chosen_of is not None and ours.shape == theirs.shape:
        x, axis = chosen_of
        _check_close(value, producer, x.gather(axis, ours), x.gather(axis, theirs).cpu().numpy())
    elif ours.shape != theirs.shape or int((ours != theirs).sum()) > max(FREE, 10 * MAX_SHARE * ours.numel()):
        raise VerificationError(
            f"node {producer}, value '{value}': the written file selects other elements than the simulation; this is a bug, "
            "please report it with the model"
        )


def _check_float(
    parity: Parity,
    student: Mirror,
    plan: Plan,
    batch: Batch,
    theirs: Mapping[str, Tensor],
    outputs: Mapping[str, np.ndarray],
    decided: Mapping[str, np.ndarray],
) -> None:
    """Every planned value against the runtime's, each computed from the runtime's own values before it.

    `theirs`: integers of planned values; `outputs`: the network's outputs, of which those left float are compared too;
    `decided`: what the runtime selects, which the last bit of a sum decides where values tie.
    """
    producer, averages, slack = _producers(student), _averages(student), _slack(student)
    sorting = {node.meta["value"] for node in student.graph.nodes if "value" in node.meta and _is_topk(_tuple_of(node))}

    def see(value: str, x: Tensor) -> Tensor:
        if value in decided:
            chosen = torch.from_numpy(decided[value]).to(x.device)
            _check_decision(value, producer[value], x, chosen, probe.sorted if value in sorting else None)
            return chosen
        if value in outputs and value not in plan and x.is_floating_point():
            _check_close(value, producer[value], x, outputs[value])
        if value not in theirs:
            return x
        point = plan[value]
        qparams = student.qparams_of(point)
        codes = quantize(x, qparams, point.grid)
        away = (dequantize(codes, qparams, point.grid) - x).abs().amax() if point.moved and x.numel() else 0.0
        if away > OFF_GRID * qparams.scale:  # the simulation would go on with values that the file rounds
            raise VerificationError(
                f"node {producer[value]}, value '{value}': the simulation takes it to be on the grid of '{point.tied_to}', and "
                "it is not; this is a bug, please report it with the model"
            )
        count, unexplained = _check_steps(
            value,
            producer[value],
            codes.cpu(),
            theirs[value],
            (x if point.moved else probe.raw).cpu() / qparams.scale.cpu(),
            value in averages,
            slack.get(value, 0.0) / float(qparams.scale),
        )
        parity.float_differences += count
        parity.float_unexplained += unexplained
        parity.float_values += 1
        parity.float_elements += x.numel()
        return dequantize(theirs[value].to(x.device), qparams, point.grid)

    probe = _RawProbe(student, see)
    probe.run(*feed(student, batch))


def complaint(model: Source, batch: Batch) -> str | None:
    """Why ONNX Runtime cannot run a model on a batch, in one line; None where it can."""
    try:
        run(session(model, "basic"), batch)
    except Exception as error:  # what the runtime raises has no common class
        return str(error).strip().splitlines()[-1]
    return None


def takes_batches(model: Source, first: Batch, second: Batch, picked: Collection[str] = ()) -> bool | None:
    """Whether a model computes of two samples, one behind the other along axis 0, what it computes of each alone.

    It does not where that axis holds steps of time, or is fixed within the graph. Integers and `picked` outputs (keys of
    `outputs.selections`), which may number samples, say nothing; None where nothing is computed of one sample.
    """
    of = session(model, "basic")
    try:
        alone = [run(of, sample) for sample in (first, second)]
    except VerificationError:
        return None
    try:
        both = run(of, {name: np.concatenate([first[name], second[name]]) for name in first})
    except VerificationError:
        return False
    telling = {name: values for name, values in both.items() if values.dtype.kind == "f" and name not in picked}
    found = [_joins(values, [outputs[name] for outputs in alone]) for name, values in telling.items()]
    return "mixed" not in found and (not found or set(found) != {"one"})


def _joins(both: np.ndarray, parts: Sequence[np.ndarray]) -> Literal["joined", "mixed", "one", "other"]:
    """How an output for two samples holds those for each: one behind the other; so by shape alone; as one; otherwise."""
    if all(part.shape == both.shape for part in parts):
        return "one"
    candidates = [_behind(parts, axis) for axis in range(both.ndim)]
    joined = [x for x in candidates if x is not None and x.shape == both.shape]
    size = float(np.abs(both[np.isfinite(both)]).max(initial=0.0))
    close = any(np.allclose(x, both, rtol=0, atol=MIXED * size, equal_nan=True) for x in joined)
    return "joined" if close else "mixed" if joined else "other"


def _behind(parts: Sequence[np.ndarray], axis: int) -> np.ndarray | None:
    """Arrays one behind the other along an axis, where they fit."""
    try:
        return np.concatenate(parts, axis)
    except ValueError:
        return None


def both_ruled_out(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Where both hold the huge negative numbers of a mask; nowhere in an output that holds nothing else."""
    out = ruled_out(expected)
    result: np.ndarray[Any, Any] = out & (found <= 0.5 * expected) & (not out.all())
    return result


def _check_close(value: str, producer: str, ours: Tensor, theirs: np.ndarray) -> None:
    """Raise when a value that both sides compute in float differs by more than float rounding explains."""
    expected = torch.from_numpy(theirs).to(ours.device)
    masked = torch.from_numpy(both_ruled_out(theirs, ours.cpu().numpy())).to(ours.device)
    finite = expected[expected.isfinite() & ~masked].abs()
    same = (ours == expected) | (ours.isnan() & expected.isnan()) | masked
    if bool(same.all()):  # also where nothing was selected
        return
    error = float(torch.where(same, 0.0, ours - expected).abs().max())
    size = float(finite.max()) if finite.numel() else 0.0
    if not error <= FLOAT_TOLERANCE * max(size, 1e-6):
        raise VerificationError(
            f"node {producer}, value '{value}': the written file and the simulation differ by {error:.3g} where values reach "
            f"{size:.3g}; this is a bug, please report it with the model"
        )


def _accumulate(
    layer: Layer, plan: Plan, quantized: Mapping[str, Quantized], inputs: Tensor, biased: bool = True
) -> tuple[Tensor, Tensor]:
    """What integer kernels sum up, in float64, and what one of it stands for (broadcasts against it).

    acc = sum (xq - zx) * wq + bias;  one of it is float32(s_x * s_w)
    """
    source = quantized[plan.root(layer.source.name).value].qparams
    weight = quantized[layer.weight.name]
    assert weight.integers is not None
    acc = apply_linear(layer, (inputs - source.zero_point).double(), weight.integers.double())
    shape = [1] * acc.ndim
    shape[layer.output_axis] = -1
    if biased and layer.bias is not None:
        codes = quantized[layer.bias.name].integers
        assert codes is not None
        acc = acc + codes.double().reshape(shape)
    step = source.scale * weight.qparams.scale
    return acc, step.reshape(shape) if step.ndim else step


def _simulate_integers(
    layer: Layer, value: str, plan: Plan, quantized: Mapping[str, Quantized], inputs: Tensor
) -> Tensor:
    """Exact integer arithmetic of QLinearConv, QGemm and QLinearMatMul with a float32 multiplier.

    yq = clamp(round_half_even(float32(acc) * (step / s_y)) + z_y), with `_accumulate`'s acc and step
    """
    output = quantized[plan.root(value).value]
    acc, step = _accumulate(layer, plan, quantized, inputs)
    result = torch.round(acc.float() * (step / output.qparams.scale)) + output.qparams.zero_point
    return torch.clamp(result, output.grid.qmin, output.grid.qmax)


def _layers_by_value(layers: Iterable[Layer], plan: Plan) -> dict[str, Layer]:
    """Layers by the quantized value they end in: their own output, or that of the Relu/Clip fused to it."""
    found = {}
    for layer in layers:
        output = layer.output
        if output.name not in plan and len(output.outputs) == 1 and role_of(output.outputs[0]) == "clamp":
            output = output.outputs[0].outputs[0]
        if output.name in plan and layer.weight.name in plan and layer.source.name in plan:
            found[output.name] = layer
    return found


def _check_integer(
    parity: Parity,
    layers: Mapping[str, Layer],
    plan: Plan,
    quantized: Mapping[str, Quantized],
    ran: _Optimized,
    batch: Batch,
) -> None:
    """Values that integer kernels computed, from the integers those kernels read."""
    values = ran.run(batch)
    for value, op in ran.producers.items():
        layer = layers.get(value)
        if op not in INTEGER_LINEAR or layer is None or layer.source.name not in values:
            continue
        ours = _simulate_integers(layer, value, plan, quantized, values[layer.source.name].int())
        _count_integers(parity, f"node '{layer.node.name}', value '{value}': {op}", ours != values[value])


def _count_integers(parity: Parity, kernel: str, different: Tensor) -> None:
    """Count the elements of an integer kernel; raise where it differs from exact integer arithmetic."""
    if bool(different.any()):
        raise VerificationError(
            f"{kernel} and exact integer arithmetic differ in {int(different.sum())} of {different.numel()} elements; this is a "
            "bug, please report it with the model"
        )
    parity.integer_values += 1
    parity.integer_elements += different.numel()


def _check_products(
    parity: Parity,
    layers: Mapping[str, Layer],
    plan: Plan,
    quantized: Mapping[str, Quantized],
    ran: _Optimized,
    batch: Batch,
) -> None:
    """Float values that integer kernels (MatMulIntegerToFloat) computed, from the integers those kernels read."""
    wanted = [(layers[name], node) for name, node in ran.products if name in layers]
    values = run(ran.session, batch, [name for _, node in wanted for name in (node.input[0], node.output[0])])
    for layer, node in wanted:
        codes = torch.from_numpy(values[node.input[0]]).int()
        acc, step = _accumulate(layer, plan, quantized, codes, biased=len(node.input) > 6 and bool(node.input[6]))
        expected, found = acc * step.double(), torch.from_numpy(values[node.output[0]]).double()
        largest = expected.abs().max() if expected.numel() else 0.0
        apart = (expected - found).abs() > PRODUCT_TOLERANCE * largest
        _count_integers(parity, f"node '{layer.node.name}': {node.op_type}", apart)


def _check_fused(parity: Parity, student: Mirror, plan: Plan, ran: _Optimized, batch: Batch) -> None:
    """Values of other integer kernels against the mirror: these kernels round on their own, so differences are reported."""
    values = ran.run(batch)

    def see(value: str, x: Tensor) -> Tensor:
        if value not in values:
            return x
        point = plan[value]
        qparams = student.qparams_of(point)
        if ran.producers.get(value) in INTEGER_OTHER:
            steps = (quantize(x, qparams, point.grid).cpu().long() - values[value].long()).abs()
            parity.fused_values += 1
            parity.fused_elements += x.numel()
            parity.fused_differences += int((steps > 0).sum())
            parity.fused_max_steps = max(parity.fused_max_steps, int(steps.max()) if steps.numel() else 0)
        return dequantize(values[value].to(x.device), qparams, point.grid)

    Probe(student, see).run(*feed(student, batch))


def _own_name(node: onnx.NodeProto, layers: Collection[str]) -> str:
    """The name that a node had before it was fused: a fusion calls it "fused NAME" or "NAME/MatMulAddFusion"."""
    return node.name if node.name in layers else re.sub(r"^fused |/MatMulAddFusion$", "", node.name)


class _Optimized:
    """The graph that ONNX Runtime really executes, with its integer values readable under their planned names."""

    def __init__(
        self, model: Source, names: Mapping[str, str], layers: Collection[str], threads: int, folder: Path | None
    ) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path = Path(scratch) / "optimized.onnx"
            session(model, "extended", threads, save_to=path)
            optimized = onnx.load(path, load_external_data=False)
            made = {output: node for node in optimized.graph.node for output in node.output}
            self.names = {value: codes for value, codes in names.items() if codes in made}
            nodes = [(_own_name(node, layers), node) for node in optimized.graph.node]
            self.float_linear = {name: node.op_type for name, node in nodes if node.op_type in FLOAT_LINEAR}
            self.products = [
                (name, node) for name, node in nodes if node.op_type == "MatMulIntegerToFloat" and node.input[0] in made
            ]
            more = {name for _, node in self.products for name in (node.input[0], node.output[0])}
            exposed = _exposing(optimized, sorted({*self.names.values(), *more}))
            self.session = session(exposed, "off", threads, folder=path.parent)
        self.producers = {}
        for value, codes in self.names.items():
            node = made[codes]
            node = made.get(node.input[0], node) if node.op_type == "Clip" else node  # narrow grids end in one
            self.producers[value] = node.op_type
        self.kernels: dict[str, int] = {}
        for node in optimized.graph.node:
            self.kernels[node.op_type] = self.kernels.get(node.op_type, 0) + 1

    def run(self, batch: Batch) -> dict[str, Tensor]:
        wanted = sorted(set(self.names.values()))
        codes = run(self.session, batch, wanted)
        return {value: torch.from_numpy(codes[name]) for value, name in self.names.items()}


def check_parity(
    written: Source,
    student: Mirror,
    plan: Plan,
    layers: Sequence[Layer],
    quantized: Mapping[str, Quantized],
    batches: Iterable[Batch],
    threads: int = 0,
    decisions: Collection[str] = (),
) -> Parity:
    """Compare the written model, a file or a ModelProto, with the mirror on the given batches.

    What the file selects (`decisions`, as `outputs.decisions` returns them) is checked by itself, and taken over behind it.

    Raises:
        VerificationError: with the node's name, where the two differ by more than float rounding explains: any difference
            where the runtime executes integers; where it executes float, one step in more than 1e-4 of all elements.
    """
    parity = Parity()
    model, folder = _opened(written)
    names = {value: codes for value, codes in _codes_names(model).items() if value in plan}
    _check_complete(model, student, plan, names)
    decided = sorted(_computed(model).intersection(decisions))
    wanted = sorted({*names.values(), *decided})
    off = session(_exposing(model, wanted), "off", threads, folder=folder)
    plain, basic, full = (session(written, level, threads) for level in ("off", "basic", "all"))
    noise = _Noise()
    by_name = {layer.node.name: layer for layer in layers if layer.weight.name in plan}
    optimized = _Optimized(written, names, by_name.keys(), threads, folder)
    parity.kernels = optimized.kernels
    parity.layers = len(by_name)
    parity.float_layers = {name: optimized.float_linear[name] for name in by_name if name in optimized.float_linear}
    ends = _layers_by_value(layers, plan)
    with torch.no_grad():
        for batch in batches:
            found = run(off, batch, wanted)
            theirs = {value: torch.from_numpy(found[name]) for value, name in names.items()}
            outputs = run(plain, batch)
            _check_float(parity, student, plan, batch, theirs, outputs, {name: found[name] for name in decided})
            _check_integer(parity, ends, plan, quantized, optimized, batch)
            _check_products(parity, by_name, plan, quantized, optimized, batch)
            _check_fused(parity, student, plan, optimized, batch)
            _check_basic(parity, outputs, run(basic, batch), plan)
            noise.add(outputs, run(full, batch))
    parity.optimized_db = noise.decibels()
    if parity.float_unexplained > max(FREE, MAX_SHARE * parity.float_elements):
        raise VerificationError(
            f"the written file and the simulation differ in {parity.float_unexplained} of {parity.float_elements} elements; "
            "this is a bug, please report it with the model"
        )
    return parity


def _check_basic(
    parity: Parity, off: Mapping[str, np.ndarray], basic: Mapping[str, np.ndarray], plan: Collection[str]
) -> None:
    """Outputs must be the same bits; those that are not quantized may differ in the last one, as vectorised kernels do."""
    for name, values in off.items():
        if name not in plan and values.dtype.kind == "f" and values.size:
            size = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
            if np.allclose(values, basic[name], rtol=0, atol=LAST_BIT * size, equal_nan=True):
                continue
        if not np.array_equal(values, basic[name], equal_nan=values.dtype.kind == "f"):
            parity.basic_equals_off = False
            raise VerificationError(
                f"output '{name}' changes when ONNX Runtime's basic optimisations are on; this is a bug, please report it with "
                "the model"
            )


def _watching(
    model: Source, wanted: Iterable[str], threads: int, level: str = "all"
) -> tuple[ort.InferenceSession, list[str]]:
    """A session whose outputs are the network's and those of the `wanted` values that it has."""
    opened, folder = _opened(model)
    names = [output.name for output in opened.graph.output]
    computed = _computed(opened)
    more = [name for name in dict.fromkeys(wanted) if name in computed and name not in names]
    return session(_exposing(opened, more) if more else model, level, threads, folder=folder), [*names, *more]


def _computed(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output}


def _told(model: onnx.ModelProto, decisions: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A copy that reads what it selects, `decisions`, as inputs; what a TopK picks is gathered where they say."""
    told = onnx.ModelProto()
    told.CopyFrom(model)
    for node in told.graph.node:
        if node.op_type == "TopK" and node.output[1] in decisions:
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), -1)
            gather = onnx.helper.make_node(
                "GatherElements", [node.input[0], node.output[1]], node.output[:1], axis=axis
            )
            node.CopyFrom(gather)
        node.output[:] = [f"{name}/own" if name in decisions else name for name in node.output]
    told.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), None)
        for name, array in decisions.items()
    )
    left = [output for output in told.graph.output if output.name not in decisions]
    del told.graph.output[:]
    told.graph.output.extend(left)
    return told


class _Selected:
    """Outputs that are selected, of the written model where it is told the `decisions` of the float one."""

    def __init__(
        self, written: Source, outputs: Iterable[str], decisions: Sequence[str], threads: int, level: str
    ) -> None:
        self.model, self.folder = _opened(written)
        self.decisions, self.threads, self.level = decisions, threads, level
        self.outputs = [name for name in outputs if name not in decisions]
        self.session: ort.InferenceSession | None = None
        self.noise, self.equal = _Noise(), _Shares()

    def add(self, batch: Batch, expected: Mapping[str, np.ndarray]) -> None:
        """Add one batch, with what the float model gives for the outputs and decides."""
        decided = {name: expected[name] for name in self.decisions}
        if self.session is None:
            self.session = session(_told(self.model, decided), self.level, self.threads, folder=self.folder)
        found = run(self.session, {**batch, **decided}, self.outputs)
        self.outputs = [name for name in self.outputs if found[name].shape == expected[name].shape]  # else more decides
        wanted = {name: expected[name] for name in self.outputs}
        self.noise.add(wanted, found)
        for name, a in wanted.items():
            if a.dtype.kind != "f":
                self.equal.add(name, a == found[name])

    def of(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The figures of those outputs whose elements were the same ones in every batch."""
        return {name: figure for name, figure in figures.items() if name in self.outputs}


class _Shares:
    """How much of something is so, over all batches, in %."""

    def __init__(self) -> None:
        self.found, self.total = Counter[str](), Counter[str]()

    def add(self, name: str, so: np.ndarray) -> None:
        self.found[name] += int(so.sum())
        self.total[name] += so.size

    def percent(self) -> dict[str, float]:
        return {name: round(100 * self.found[name] / total, 2) for name, total in self.total.items() if total}


def measure_fidelity(
    float_model: Source,
    written: Source,
    batches: Iterable[Batch],
    threads: int = 0,
    selected: Mapping[str, Sequence[str]] | None = None,
    axes: Mapping[str, int] | None = None,
    whole: bool = False,
    decisions: Sequence[str] = (),
    level: str = "all",
) -> Fidelity:
    """Signal-to-noise ratio (dB) and agreement (%) of every output, the float model at full optimisation.

    `level`: how much the runtime may optimise the written one, a key of `LEVELS`.

    Integers (of an ArgMax) agree where they are equal; scores where the largest one is the same along the axis that `axes`
    names for an output (as `outputs.class_axes` finds it), or else the last one of two, if that has at least two entries.
    Instead of the outputs that are keys of `selected` (as `outputs.selections` returns them) the values that they were picked
    from are compared, which have classes only where `axes` names them; and these outputs of a written model that picks what the
    float one does, if both compute the `decisions` (as `outputs.decisions` returns them). A batch is one sample where inputs
    have no batch axis in common, and where `whole` says so.
    """
    selected, axes = selected or {}, axes or {}
    inner = dict.fromkeys(name for names in selected.values() for name in names)
    ours, known = _watching(float_model, [*inner, *decisions], threads)
    theirs, found_too = _watching(written, inner, threads, level)
    names = [name for name in known if name in found_too and name not in selected]
    computed = _computed(_opened(written)[0])
    shared = all(name in known and name in computed for name in decisions)
    behind = _Selected(written, selected, decisions, threads, level) if selected and decisions and shared else None
    wanted = list(dict.fromkeys([*names, *(behind.outputs if behind else ()), *(decisions if behind else ())]))
    alone = whole or no_batch_axis(tensor.shape for tensor in ours.get_inputs())
    noise, agreeing, samples = _Noise(), _Shares(), 0
    for batch in batches:
        given = run(ours, batch, wanted)
        expected, found = {name: given[name] for name in names}, run(theirs, batch, names)
        samples += 1 if alone else len(next(iter(batch.values())))
        for name in names:
            if expected[name].shape != found[name].shape:
                raise VerificationError(
                    f"output '{name}' of the written file has the shape {found[name].shape} where the float model's has "
                    f"{expected[name].shape}; this is a bug, please report it with the model"
                )
        noise.add(expected, found)
        for name, a in expected.items():
            last = a.ndim if name in inner else 1 if a.ndim == 2 else a.ndim
            same = _agreeing(a, found[name], axes.get(name, last))
            if same is not None:
                agreeing.add(name, same)
        if behind:
            behind.add(batch, given)
    agreement = agreeing.percent() | dict.fromkeys(noise.silent(), 100.0)
    sources = {name: list(values) for name, values in selected.items()}
    fidelity = Fidelity(
        samples, noise.decibels(), agreement, sources, noise.masked(), noise.worst_columns(), noise.broken
    )
    if behind:
        fidelity.selected_db = behind.of(behind.noise.decibels())
        fidelity.selected_agreement = behind.of(behind.equal.percent())
    return fidelity


def distances(expected: Batch, found: Batch) -> dict[str, float]:
    """Signal-to-noise ratio (dB) of every float output of one batch; of those whose shapes differ there is none.

    It is -inf where one holds NaN or infinity in place of a number.
    """
    noise = _Noise()
    noise.add(expected, found)
    return noise.decibels() | dict.fromkeys(noise.broken, -math.inf)


def _agreeing(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray | None:
    """Where two outputs say the same: equal integers, or the same largest score along an axis, if there is one."""
    if a.dtype.kind != "f":
        return np.asarray(a == b)
    return a.argmax(axis) == b.argmax(axis) if axis < a.ndim and a.shape[axis] > 1 else None


class _Noise:
    """Power of outputs, and of what others differ from them, over all batches."""

    def __init__(self) -> None:
        self.signal: dict[str, float] = {}
        self.noise: dict[str, float] = {}
        self.broken: dict[str, int] = {}  # elements that are numbers on the first side alone
        self.left_out: dict[str, tuple[int, int]] = {}  # elements that are masked, of how many
        self.columns: dict[str, _Spreads] = {}

    def add(self, expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> None:
        """Add one batch of outputs by name; integers and those whose shapes differ (what a selection picks) have no noise."""
        for name, values in expected.items():
            if values.dtype.kind != "f" or values.shape != found[name].shape:
                continue
            a, b = np.asarray(values, np.float64), np.asarray(found[name], np.float64)
            masked = both_ruled_out(a, b)  # beside such numbers no error would be one
            some, total = self.left_out.get(name, (0, 0))
            self.left_out[name] = some + int(masked.sum()), total + masked.size
            numbers = np.isfinite(a) & np.isfinite(b)
            error = np.subtract(a, b, out=np.zeros_like(a), where=numbers & ~masked)
            if broken := int((np.isfinite(a) & ~numbers & ~masked).sum()):
                self.broken[name] = self.broken.get(name, 0) + broken
            self.signal[name] = self.signal.get(name, 0.0) + float((a[np.isfinite(a) & ~masked] ** 2).sum())
            self.noise[name] = self.noise.get(name, 0.0) + float((error**2).sum())
            self.columns.setdefault(name, _Spreads()).add(a, error, bool(masked.any()))

    def decibels(self) -> dict[str, float]:
        """Signal-to-noise ratio per output in dB: 0 where only the other one is not all zero, none where both are."""
        return {
            name: round(float(10 * np.log10(max(signal / max(self.noise[name], 1e-30), 1e-30))), 2) if signal else 0.0
            for name, signal in self.signal.items()
            if signal or self.noise[name]
        }

    def worst_columns(self) -> dict[str, tuple[int, float]]:
        """Per output, the column whose error is largest beside its spread, and the ratio of the two in dB."""
        found = {name: spreads.worst() for name, spreads in self.columns.items()}
        return {name: worst for name, worst in found.items() if worst is not None}

    def masked(self) -> dict[str, float]:
        """How much of an output is masked on both sides, in %; outputs without masks are left out."""
        return {name: round(100 * some / total, 1) for name, (some, total) in self.left_out.items() if some}

    def silent(self) -> list[str]:
        """Outputs that are all zero on both sides."""
        return [name for name, signal in self.signal.items() if not signal and not self.noise[name]]


class _Spreads:
    """Variance of an output's columns, and of their errors, over all batches."""

    def __init__(self) -> None:
        self.rows, self.origin = 0, np.zeros(0)
        self.sums = np.zeros((3, 0))  # of values less `origin`, their squares, squared errors
        self.known = True

    def add(self, values: np.ndarray, error: np.ndarray, masked: bool) -> None:
        if not values.size:
            return
        a, e = as_rows(values), as_rows(error)
        if not self.rows:
            self.origin, self.sums = a.mean(0), np.zeros((3, a.shape[1]))
        self.known = self.known and not masked and a.shape[1] == len(self.origin) and bool(np.isfinite(a).all())
        if self.known:
            away = a - self.origin  # squares of a large mean would leave nothing of a small spread
            self.rows += len(a)
            self.sums += np.stack([away.sum(0), (away**2).sum(0), (e**2).sum(0)])

    def worst(self) -> tuple[int, float] | None:
        if not self.known or self.rows < 2:
            return None
        total, squares, errors = self.sums / self.rows
        variances = squares - total**2
        varies = variances > (NOISE * np.abs(self.origin)) ** 2
        if not varies.any():
            return None
        ratios = np.where(varies, variances / np.maximum(errors, 1e-30), np.inf)
        index = int(ratios.argmin())
        return index, round(float(10 * np.log10(max(ratios[index], 1e-30))), 2)
