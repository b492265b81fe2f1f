"""What a run did, as data and as at most forty lines of text; and the progress it shows while it does it."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from onnx_eptq import graph as graphs
from onnx_eptq.eptq import Learning
from onnx_eptq.equalize import Equalized
from onnx_eptq.mixed import Allocation
from onnx_eptq.ops import op_name, op_of
from onnx_eptq.plan import DECODING, UNPLANNED, Plan, linear_layers
from onnx_eptq.verify import Fidelity, Parity

MAX_WIDTHS = 48  # that are spelled one by one; the JSON names their layers
MAX_REASONS, MAX_WARNINGS, MAX_INPUTS, MAX_OUTPUTS = 8, 4, 4, 6  # lines of each kind in the text; the JSON holds all
MAX_LINES = 28  # of the text; with a line for each phase, a run prints less than 40
MAX_NAMES = 4  # in one line
WEIGHTS = 256  # elements of a matrix from which on it counts as weights, whatever reads it
_RECURRENT = ("GRU", "LSTM", "RNN")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Gather", "GatherND", "GatherElements")


@dataclass
class Coverage:
    """How much of the model is quantized: weighted layers, bytes of float constants, and what stays float and why.

    `float_weights` are matrices that no layer has and that stay float: of recurrent cells, within an If, tables that are looked
    up. `constants_by_bits` counts the bytes, as float, of quantized constants that are no layer's weights (embeddings).
    """

    layers: int
    quantized_layers: int
    bytes: int
    quantized_bytes: int
    activations: int
    layers_by_bits: dict[int, int]
    float_layers: dict[str, str]
    float_values: dict[str, str]
    float_weights: dict[str, str] = field(default_factory=dict)
    activations_by_bits: dict[int, int] = field(default_factory=dict)
    constants_by_bits: dict[int, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every layer with weights is quantized, and whatever else holds matrices."""
        return self.layers == self.quantized_layers and not self.float_weights

    def __str__(self) -> str:
        """One line."""
        share = 100 * self.quantized_bytes / max(self.bytes, 1)
        beside = "".join(
            f" ({size:,} of them beside layers, at {bits} bit)" for bits, size in sorted(self.constants_by_bits.items())
        )
        several = f" ({_widths(self.activations_by_bits)})" if len(self.activations_by_bits) > 1 else ""
        return (
            f"{self.quantized_layers} of {self.layers} layers ({_widths(self.layers_by_bits) or 'none'}), {share:.1f} % of "
            f"{self.bytes:,} bytes of constants{beside}, {self.activations} activations{several}"
        )


def _widths(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{count} x {bits} bit" for bits, count in sorted(counts.items()))


def measure_coverage(graph: gs.Graph, plan: Plan) -> Coverage:
    """Count what the plan quantizes."""
    layers = linear_layers(graph)
    done = [layer for layer in layers if layer.weight.name in plan]
    left = [layer for layer in layers if layer.weight.name not in plan]
    tensors = itertools.chain.from_iterable(scope.tensors().values() for scope in graphs.scopes(graph))
    constants = {t.name: t for t in tensors if isinstance(t, gs.Constant) and t.dtype == np.float32}
    sizes = {name: 4 * int(np.prod(tensor.shape or (1,))) for name, tensor in constants.items()}
    activations = Counter(point.grid.bits for point in plan.values() if point.role == "activation")
    beside = Counter[int]()
    for point in plan.values():
        if point.role == "constant" and sizes.get(point.value, 0) >= 4 * WEIGHTS:
            beside[point.grid.bits] += sizes[point.value]
    of_layers = {part.name for layer in left for part in (layer.weight, layer.bias) if part is not None}
    return Coverage(
        layers=len(layers),
        quantized_layers=len(done),
        bytes=sum(sizes.values()),
        quantized_bytes=sum(size for name, size in sizes.items() if name in plan),
        activations=activations.total(),
        layers_by_bits=dict(Counter(plan[layer.weight.name].grid.bits for layer in done)),
        float_layers={layer.node.name: plan.floats.get(layer.weight.name, UNPLANNED) for layer in left},
        float_values={name: reason for name, reason in plan.floats.items() if name not in of_layers},
        float_weights=_float_weights(graph, plan, sizes, {layer.weight.name for layer in layers}),
        activations_by_bits=dict(activations),
        constants_by_bits=dict(beside),
    )


def _float_weights(graph: gs.Graph, plan: Plan, sizes: Mapping[str, int], layers: Collection[str]) -> dict[str, str]:
    """Matrices that stay float and belong to no layer, and what reads them; what a decoding looks up (anchors) is no weight."""
    found: dict[str, str] = {}
    inner = ((node, True) for outer in graph.nodes for node in graphs.nodes_within(outer))
    for node, within in itertools.chain(((node, False) for node in graph.nodes), inner):
        weighted = graphs.is_op(node, *_WEIGHTED, *_RECURRENT) if within else _holds_weights(node)
        if not weighted:
            continue
        if any(plan.floats.get(tensor.name, "").startswith(DECODING) for tensor in node.outputs):
            continue
        for tensor in node.inputs:
            large = (
                isinstance(tensor, gs.Constant) and sizes.get(tensor.name, 0) >= 4 * WEIGHTS and len(tensor.shape) > 1
            )
            if graphs.is_op(node, "Einsum") and not _is_summed(node, tensor):
                continue  # a mask
            if large and tensor.name not in plan and tensor.name not in layers:
                found[tensor.name] = f"{sizes[tensor.name]:,} bytes, read by {op_name(node)} '{node.name}'"
    return found


def _holds_weights(node: gs.Node) -> bool:
    return graphs.is_op(node, *_WEIGHTED) or op_of(node).island


def _is_summed(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether an Einsum sums over an axis of one of its inputs."""
    terms, arrow, result = str(node.attrs["equation"]).replace(" ", "").partition("->")
    term = terms.split(",")[next(i for i, read in enumerate(node.inputs) if read is tensor)]
    return not arrow or not set(term) <= set(result)


def find_islands(graph: gs.Graph) -> dict[str, str]:
    """Return the nodes that ONNX Runtime computes in the simulation too, by name, with their operators."""
    return {node.name: op_name(node) for node in graph.nodes if op_of(node).island}


@dataclass
class Report:
    """Everything a run has to say."""

    version: str
    model: str
    settings: dict[str, Any]
    coverage: Coverage
    storage: dict[int, str] = field(default_factory=dict)
    islands: dict[str, str] = field(default_factory=dict)
    output: str | None = None
    data: str = ""
    samples: int = 0
    fed: dict[str, list[float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    preparation: dict[str, int] = field(default_factory=dict)
    equalized: list[Equalized] = field(default_factory=list)
    threads: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    float_bytes: int = 0
    notes_bytes: int = 0
    bytes: int = 0
    parity: Parity | None = None
    fidelity: Fidelity | None = None
    learning: Learning | None = None
    estimate: dict[str, float] | None = None
    allocation: Allocation | None = None

    def warn(self, *warnings: str) -> None:
        """Add what the user is to be warned of, each once."""
        self.warnings += [text for text in dict.fromkeys(warnings) if text not in self.warnings]

    def to_json(self) -> str:
        """All fields as JSON text."""
        return json.dumps(_plain(asdict(self)), indent=1, allow_nan=False)

    def __str__(self) -> str:
        """At most `MAX_LINES` lines."""
        for most in range(MAX_REASONS, 0, -1):
            lines = list(self._lines(most))
            if len(lines) <= MAX_LINES:
                break
        return "\n".join([*lines[: MAX_LINES - 1], *lines[MAX_LINES - 1 :][-1:]])  # the last one says where the file is

    def _lines(self, most: int) -> Iterator[str]:
        """The text, with at most so many lines of a kind."""
        yield f"coverage   {self.coverage}"
        layers = self.coverage.float_layers
        values = self.coverage.float_values.items()
        weights = self.coverage.float_weights.items()
        reasons = [*layers.items(), *weights, *((name, reason) for name, reason in values if name not in layers)]
        for name, reason in reasons[:most]:
            yield f"  float    {name}: {reason}"
        yield from _rest("  float", len(reasons) - most, "values")
        if self.islands:
            names = [f"'{name}' {op}" for name, op in self.islands.items()]
            yield f"islands    {_some(names)}: left to ONNX Runtime in float, without gradients"
        if self.storage:
            yield "storage    " + ", ".join(
                f"{bits}-bit weights as {form}" for bits, form in sorted(self.storage.items())
            )
        if self.data:
            yield f"data       {self.data}"
        inputs = min(most, MAX_INPUTS)
        for name, (low, high, mean, std) in list(self.fed.items())[:inputs]:
            yield f"  fed      {name}: {low:.4g} to {high:.4g}, mean {mean:.4g}, standard deviation {std:.4g}"
        yield from _rest("  fed", len(self.fed) - inputs, "inputs")
        if self.equalized:
            least = min(self.equalized, key=lambda equalized: equalized.error)
            yield f"equalized  channels of {len(self.equalized)} values, error behind '{least.value}' x {least.error:.2g}"
        yield from (f"warning    {warning}" for warning in self.warnings[:MAX_WARNINGS])
        yield from _rest("warning", len(self.warnings) - MAX_WARNINGS, "warnings")
        if self.estimate:
            yield f"estimate   {self.estimate['seconds']:.0f} s, {self.estimate['peak_mb']:.0f} MB"
        yield from self._allocated()
        yield from self._learned()
        if self.seconds:
            spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
            yield f"time       {spent} ({self.threads} thread{'s' if self.threads > 1 else ''})"
        if self.bytes:
            ratio, word = self.float_bytes / self.bytes, "smaller"
            if ratio < 1:
                ratio, word = 1 / ratio, "larger"
            yield f"size       {self.float_bytes:,} -> {self.bytes:,} bytes ({ratio:.1f} x {word})"
        yield from self._verified(min(most, MAX_OUTPUTS))
        if self.output:
            yield f"written    {self.output}"

    def _allocated(self) -> Iterator[str]:
        found = self.allocation
        if found is None:
            return
        yield f"widths     weights {spell_widths(found.weights)} (average {found.average_bits:.2f} bits)"
        if found.activations:
            yield f"           activations {spell_widths(found.activations)} (those on one grid count once)"
        for name, use in found.budgets.items():
            yield f"budget     {name}: {use.used:,.10g} of {use.limit:,.10g} {use.unit}".rstrip()
        said = "proven best" if found.optimal else "the best found in the time it had, not proven"
        if found.expected_loss > found.least_loss:
            said = f"one width for all that choose; the least found is {found.least_loss:.4g}, too little less to tell"
        yield (
            f"           expected loss {found.expected_loss:.4g} ({found.sensitivity}, {found.measure_seconds:.1f} s); "
            f"{found.solver} {found.solve_seconds:.1f} s: {said}"
        )

    def _learned(self) -> Iterator[str]:
        learning = self.learning
        if learning is None:
            return
        steps = ", ".join(f"{name} {distance:.4g}" for name, distance in learning.distances.items())
        best = min(learning.distances, key=learning.distances.__getitem__, default=learning.kept)
        why = "" if best == learning.kept else f", as {best} may be better by chance alone"
        where = "held-out samples" if learning.held_out else "the samples learned from, as none could be held out"
        yield f"learned    distance from the float model on {where}: {steps}; kept: {learning.kept}{why}"
        yield (
            f"           {learning.steps} steps, {100 * learning.undecided:.1f} % of roundings undecided at the end, "
            f"{learning.gap:+.2g} by deciding them; targets: {_some(learning.targets)}"
        )

    def _verified(self, most: int) -> Iterator[str]:
        parity, fidelity = self.parity, self.fidelity
        if parity:
            slow = [f"'{name}' {op}" for name, op in parity.float_layers.items()]
            beside = f"; in float: {_some(slow)}" if slow else ""
            yield (
                f"kernels    {parity.layers - len(slow)} of {parity.layers} quantized layers in integer kernels of ONNX Runtime"
                f"{beside}"
            )
            yield (
                f"parity     {parity.float_differences} of {parity.float_elements:,} elements one step off in float kernels, "
                f"{parity.integer_differences} of {parity.integer_elements:,} in integer kernels"
            )
            yield (
                f"           {parity.fused_differences} of {parity.fused_elements:,} in pooling and elementwise kernels (at most "
                f"{parity.fused_max_steps} step); basic optimisations change nothing"
            )
        if fidelity:
            for name, sources in list(fidelity.selected.items())[:most]:
                before = ", ".join(s for s in sources if s in fidelity.sqnr_db) or "nothing that both models name"
                yield f"fidelity   {name}: selected, so judged before it is: {before}{_selected(fidelity, name)}"
            yield from _rest("fidelity", len(fidelity.selected) - most, "selected outputs")
            names = list(dict.fromkeys([*fidelity.sqnr_db, *fidelity.agreement]))
            for name in names[:most]:
                share, decibel = fidelity.agreement.get(name), fidelity.sqnr_db.get(name)
                agree = f", argmax agrees in {share} %" if share is not None else ""
                found = f"equal in {share} %" if decibel is None else f"SQNR {decibel} dB{agree}"
                masked = fidelity.masked.get(name)
                beside = f"{masked} % of it masked and left out, " if masked else ""
                yield f"fidelity   {name}: {found} ({beside}{fidelity.samples} calibration samples)"
            yield from _rest("fidelity", len(names) - most, "outputs")


def _selected(fidelity: Fidelity, name: str) -> str:
    """How far a selected output is from the float model's if both models select the same."""
    if name in fidelity.selected_db:
        return f"; SQNR {fidelity.selected_db[name]} dB where both select the same"
    if name in fidelity.selected_agreement:
        return f"; equal in {fidelity.selected_agreement[name]} % where both select the same"
    return ""


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _plain(data: Any) -> Any:
    """The data with null in place of the numbers that JSON has no word for."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _rest(label: str, count: int, what: str) -> Iterator[str]:
    """A line on what there is no room for."""
    if count > 0:
        yield f"{label:<11}and {count} more {what} (all of them in --json)"


def spell_widths(widths: Mapping[str, int]) -> str:
    """Widths in order, or how often each occurs where they are many or all the same."""
    if len(widths) <= MAX_WIDTHS and len(set(widths.values())) > 1:
        return " ".join(map(str, widths.values()))
    counts = sorted(Counter(widths.values()).items())
    return ", ".join(f"{count} x {bits} bit" for bits, count in counts)


class Phases:
    """Times the phases of a run and shows their progress: a bar on a terminal, else one line when a phase ends."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a phase that has no countable steps."""
        start = time.perf_counter()
        if self.console and self.console.is_terminal:
            with self.console.status(name):
                yield
        else:
            yield
        self._done(name, start)

    def over(self, name: str, items: Iterable[Any], total: int) -> Iterator[Any]:
        """Yield the items of a phase; `total` of them are expected."""
        start = time.perf_counter()
        if self.console and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as bar:
                task = bar.add_task(name, total=total)
                for item in items:
                    yield item
                    bar.advance(task)
        else:
            yield from items
        self._done(name, start)

    def note(self, text: str) -> None:
        """Say something in between."""
        if self.console:
            self.console.print(text, highlight=False)

    def _done(self, name: str, start: float) -> None:
        spent = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        if self.console:
            self.console.print(f"{name:<10} {spent:.1f} s", highlight=False)


def console(quiet: bool = False) -> Console | None:
    """The console progress goes to: standard error, or none."""
    return None if quiet else Console(file=sys.stderr)
