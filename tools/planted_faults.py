"""Plant one fault after another in a copy of this checkout and see whether the tests notice.

planted_faults.py [--list] [--only NAME,...] [--whole-suite] [--json FILE]

Exit code 0: every fault was caught; 1: one was missed; 2: the check itself cannot run (a fault's text is gone from its
file, the tests fail without a fault, ...).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("onnx_eptq")
CAUGHT, MISSED, UNTESTED = "caught", "MISSED", "no tests yet"


@dataclass(frozen=True)
class Fault:
    """In `file`, `old` (which must occur exactly once) becomes `new`; `tests` names the test modules to run."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "rounding half away from zero",
        "grid.py",
        "if x.requires_grad else torch.round(x)",
        "if x.requires_grad else torch.trunc(x + 0.5 * torch.sign(x))",
        ("grid",),
    ),
    Fault(
        "bias left float in the file",
        "write.py",
        "            else:\n                writer.stored(item",
        '            elif item.role != "bias":\n                writer.stored(item',
        ("write", "verify"),
    ),
    Fault(
        "an input's standardisation folded away",
        "prepare/linear.py",
        "or _comes_from(before, uneven) or",
        "or",
        ("columns",),
    ),
    Fault(
        "raw columns scaled, their weights scaled the same way",
        "prepare/linear.py",
        "grouped / scale.reshape(wide)",
        "grouped * scale.reshape(wide)",
        ("columns",),
    ),
    Fault(
        "columns of an output judged together",
        "eptq.py",
        "            if target in self.factors:\n",
        "            if not expected.numel():\n",
        ("columns",),
    ),
    Fault(
        "biases learned in units of the whole output",
        "eptq.py",
        "return torch.minimum(whole, SPREADS * channels.std(1)).clamp(min=1e-9).reshape(bias.shape)",
        "return whole",
        ("columns",),
    ),
    Fault(
        "masks that the graph makes taken for values",
        "plan.py",
        'return is_op(node, *_MAKING, "Mul") and any(made)',
        "return False",
        ("odd_models",),
    ),
    Fault(
        "means on a tie held to one side",
        "verify.py",
        "((distance > 0) | averaged)",
        "(distance > 0)",
        ("verify", "odd_models"),
    ),
    Fault(
        "a constant named self",
        "mirror.py",
        '{"self", *dir(',
        "{*dir(",
        ("mirror",),
    ),
    Fault(
        "one table for the codes of two bits and the bits of three-bit ones",
        "write.py",
        'writer.common(f"table_{unit}", table)',
        'writer.common("table", table)',
        ("write",),
    ),
    Fault(
        "shared tables counted for every layer",
        "resources.py",
        "    file = Amount(single=own, shared=kept)\n",
        "    file = Amount(single=own)\n",
        ("resources",),
    ),
    Fault(
        "a budget for products of widths that is not bound to the widths",
        "allocate.py",
        "                self.problem += pulp.lpSum(table[i, j] for j in b) == self.x[pair[0], i]\n",
        "                pass\n",
        ("allocate",),
    ),
    Fault(
        "no quantizer behind Add in the plan",
        "plan.py",
        "if not is_float(tensor) or self.fused(tensor):",
        'if not is_float(tensor) or self.fused(tensor) or (tensor.inputs and tensor.inputs[0].op == "Add"):',
        ("plan",),
    ),
    Fault(
        "no Q/DQ behind Add in the file",
        "write.py",
        "        root = point.tied_to or point.value\n",
        '        if value.inputs and value.inputs[0].op == "Add":\n            return\n'
        "        root = point.tied_to or point.value\n",
        ("write", "verify"),
    ),
    Fault(
        "wrong channel axis on Gemm",
        "ops.py",
        '0 if attributes.get("transB", 0) else 1',
        '1 if attributes.get("transB", 0) else 0',
        ("ops", "plan"),
    ),
    Fault(
        "transposed depthwise weight",
        "write.py",
        "        codes = integers.numpy()\n",
        "        codes = integers.numpy()\n        if codes.ndim == 4 and codes.shape[1] == 1:\n"
        "            codes = codes.swapaxes(2, 3)\n",
        ("write", "verify"),
    ),
    Fault(
        "every weight scaled along axis 0 in the file",
        "write.py",
        '{"axis": grid.axis}',
        '{"axis": 0}',
        ("write", "verify"),
    ),
    Fault(
        "layers that stay float left to the runtime's own rounding",
        "write.py",
        'SHIELDED = ("Conv", "ConvTranspose", "Gemm")  #',
        "SHIELDED = ()  #",
        ("verify",),
    ),
    Fault(
        "constants of islands quantized in the file",
        "write.py",
        "if id(node) in self.simulated]",
        "if id(node)]",
        ("islands",),
    ),
    Fault(
        "float biases solved for but not written",
        "compensate.py",
        " and layer.bias.name in student.quantizers:",
        ":",
        ("compensate",),
    ),
    Fault(
        "several samples of a model without a batch axis fed together",
        "pipeline.py",
        "return mirror.feeds_whole(job.graph) or any(",
        "return any(tensor.shape and ",
        ("odd_models",),
    ),
    Fault(
        "steps of time taken for samples",
        "verify.py",
        'return "mixed" not in found and (not found or set(found) != {"one"})',
        "return True",
        ("odd_models", "verify"),
    ),
    Fault(
        "shared weights widened for the narrowest of their inputs",
        "calibrate.py",
        "needed = least / widest",
        "needed = least / min(float(student.scale(source)) for source in names)",
        ("odd_models",),
    ),
    Fault(
        "positions before a sine on a grid of 256 steps",
        "plan.py",
        "if self.counts(tensor) and tensor.outputs and all(",
        "if self.counts(tensor) and not tensor.outputs and all(",
        ("odd_models",),
    ),
    Fault(
        "no loss for layers whose gradients end at an island",
        "sensitivity.py",
        "hidden = _before_islands(setting.graph)",
        "hidden = set[str]()",
        ("sensitivity",),
    ),
    Fault(
        "weights beside the model left out of a checkpoint's mark",
        "pipeline.py",
        "return [model, *(np.ascontiguousarray(tensor.values).tobytes() for tensor in constants)]",
        "return [model]",
        ("pipeline",),
    ),
    Fault(
        "divergence along the first axis behind the samples, whatever holds the classes",
        "eptq.py",
        "(F.log_softmax(z.movedim(axis, -1).reshape(-1, z.shape[axis]), 1)",
        "(F.log_softmax(z.movedim(1, -1).reshape(-1, z.shape[1]), 1)",
        ("eptq",),
    ),
    Fault(
        "narrow activations not limited in the file",
        "write.py",
        "if point.grid.bits < 8:",
        "if point.grid.bits < 0:",
        ("write", "verify"),
    ),
    Fault(
        "BatchNormalization folded without its epsilon",
        "prepare/linear.py",
        'np.sqrt(variance + node.attrs.get("epsilon", 1e-5))',
        "np.sqrt(variance)",
        ("prepare",),
    ),
    Fault(
        "sum folded into a padded Conv behind it",
        "prepare/linear.py",
        'in ("NOTSET", "VALID") and not any(linear.attrs.get("pads", []))',
        'in ("NOTSET", "VALID")',
        ("prepare",),
    ),
    Fault(
        "padding with another value than zero keeps the grid",
        "plan.py",
        "_constant_scalar(fill) == 0 for fill in fills",
        "_constant_scalar(fill) is not None for fill in fills",
        ("plan",),
    ),
    Fault(
        "input of a Softmax may saturate",
        "plan.py",
        "if id(tensor) in self.outputs or any(op_of(reader).decides for reader in tensor.outputs):",
        "if id(tensor) in self.outputs:",
        ("plan",),
    ),
    Fault(
        "values tied to another are not quantized in the mirror",
        "mirror.py",
        "if point.moved:",
        "if point.tied_to:",
        ("mirror", "verify"),
    ),
    Fault(
        "bias left float in the mirror",
        "mirror.py",
        "return grids.fake_quantize_bias(bias, input_scale * weight_scale, self.point.grid)",
        "return bias",
        ("mirror", "verify"),
    ),
    Fault(
        "bias correction of the wrong sign",
        "calibrate.py",
        "apply_linear(layer, mean, weight - rounded)",
        "apply_linear(layer, mean, rounded - weight)",
        ("calibrate",),
    ),
    Fault(
        "histogram drops every other bin when it grows",
        "calibrate.py",
        "self.counts.reshape(half, 2).sum(1)",
        "self.counts.reshape(half, 2)[:, 0]",
        ("calibrate",),
    ),
    Fault(
        "large biases overflow int32",
        "calibrate.py",
        "MAX_BIAS = 2**30",
        "MAX_BIAS = 2**40",
        ("calibrate",),
    ),
    Fault(
        "differing integer layers pass verification",
        "verify.py",
        "ours != values[value])",
        "ours != ours)",
        ("verify",),
    ),
    Fault(
        "differing values pass verification",
        "verify.py",
        "apart = ours.long() - theirs.long()",
        "apart = 0 * (ours.long() - theirs.long())",
        ("verify",),
    ),
    Fault(
        "scales fall out of the gradient",
        "grid.py",
        "slope = _dot(gradient, out) - _dot(inner, x)",
        "slope = _dot(gradient, out)",
        ("grid",),
    ),
    Fault(
        "soft rounding hardens to the floor",
        "rounding.py",
        "return self.floor + (self.alpha.detach() >= 0)",
        "return self.floor",
        ("rounding", "eptq"),
    ),
    Fault(
        "annealing runs backwards",
        "rounding.py",
        "(1 - warm) * (last - first)",
        "(1 - warm) * (first - last)",
        ("rounding",),
    ),
    Fault(
        "the worst student is kept",
        "eptq.py",
        "errors=LUCK if replaces else 0.0) > 0:",
        "errors=LUCK if replaces else 0.0) < 0:",
        ("eptq",),
    ),
    Fault(
        "a lucky student replaces a start",
        "eptq.py",
        "errors=LUCK if replaces else 0.0)",
        "errors=0.0)",
        ("eptq",),
    ),
    Fault(
        "a resumed run forgets how good the best student was",
        "eptq.py",
        'self.best, self.losses = state.part("best."), state.tensors["losses"]',
        'self.best = state.part("best.")',
        ("eptq",),
    ),
    Fault(
        "finer grids learn faster",
        "eptq.py",
        "return 2.0 ** min(0, 4 - bits)",
        "return 2.0 ** max(0, bits - 4)",
        ("eptq",),
    ),
    Fault(
        "positions count in one half of the equations",
        "compensate.py",
        "(target @ weighted.mT).double()",
        "(target @ cols.mT).double()",
        ("compensate",),
    ),
    Fault(
        "all positions count alike",
        "hessian.py",
        "(1 - LEANING + LEANING / mean * part)",
        "(1 + 0 * part)",
        ("hessian",),
    ),
    Fault(
        "elements of an activation count alike",
        "calibrate.py",
        "self.leaning * self.importance",
        "self.leaning * self.counts / self.counts.sum()",
        ("calibrate",),
    ),
    Fault(
        "a range is weighed by another value",
        "hessian.py",
        "totals[root] += stats.histograms[root].tally(value, square)",
        "totals[root] += stats.histograms[root].tally(square, square)",
        ("hessian",),
    ),
    Fault(
        "learning sees what it is judged by",
        "heldout.py",
        "learned, held = order[~out], order[out]",
        "learned, held = order, order[out]",
        ("heldout",),
    ),
    Fault(
        "a resumed run starts its batches anew",
        "eptq.py",
        "        for _ in range(self.step):\n            order.next()\n",
        "",
        ("eptq",),
    ),
    Fault(
        "checkpoints without the optimiser",
        "eptq.py",
        "        if self.running is not None and self.running.optimizer is not None:\n",
        "        if False:\n",
        ("eptq",),
    ),
    Fault(
        "any checkpoint will do",
        "checkpoint.py",
        'if metadata.get("fingerprint") != fingerprint:',
        "if metadata.get(fingerprint) == fingerprint:",
        ("checkpoint",),
    ),
    Fault(
        "steps of a Softmax's output too fine for the integer kernel",
        "plan.py",
        "return min(1.0, 2 / size) if isinstance(size, int)",
        "return 0.0 if isinstance(size, int)",
        ("odd_models",),
    ),
    Fault(
        "outputs without rows of samples fill no row",
        "hessian.py",
        "F.pad(z.reshape(1, -1), (0, 0, 0, samples - 1))",
        "z.reshape(samples, -1)",
        ("odd_models",),
    ),
    Fault(
        "a mask in a bias stays there",
        "prepare/linear.py",
        "bias is None or bias.ndim != 1 or not node.outputs",
        "True",
        ("odd_models", "prepare"),
    ),
    Fault(
        "masked outputs are quantized",
        "plan.py",
        "id(tensor) in self.masked & self.outputs",
        "False",
        ("odd_models",),
    ),
    Fault(
        "channels that hardly vary are summed about zero",
        "compensate.py",
        "cols, target = (v - o[:, :, None].float() for v, o in zip((cols, target), origin, strict=True))",
        "pass",
        ("compensate",),
    ),
    Fault(
        "rounding errors are not passed on",
        "compensate.py",
        "work[:, stop:] -= upper[:, start:stop, stop:].mT @ errors",
        "pass",
        ("compensate",),
    ),
    Fault(
        "solved layers ignore the errors before them",
        "compensate.py",
        "yield ours.value(quantized, mine), apply_linear(layer, theirs.value(exact, its), weight)",
        "yield theirs.value(exact, its), apply_linear(layer, theirs.value(exact, its), weight)",
        ("compensate",),
    ),
    Fault(
        "Hutchinson vectors of one sign",
        "hessian.py",
        ".float() * 2 - 1) / probes**0.5",
        ".float() * 0 + 1) / probes**0.5",
        ("hessian",),
    ),
    Fault(
        "what is no normalization is taken for one",
        "prepare/normalization.py",
        "if not (fits.all() and",
        "if not (",
        ("prepare",),
    ),
    Fault(
        "transposes pass the Casts of float16 inputs",
        "prepare/layout.py",
        "return None if between else perm",
        "return perm",
        ("prepare",),
    ),
    Fault(
        "methods begin with plain rounding's ranges",
        "eptq.py",
        "if problem.begun is not None:",
        "if False:",
        ("eptq",),
    ),
    Fault(
        "divisors sit on grids",
        "plan.py",
        "if any(_divides_by(reader, tensor) for reader in tensor.outputs):",
        "if False:",
        ("odd_models",),
    ),
    Fault(
        "samples of every size share a grid",
        "plan.py",
        "self.scalers = _sample_scalers(graph) | _column_scalers(graph)",
        "self.scalers = _column_scalers(graph)",
        ("columns",),
    ),
    Fault(
        "constants folded alike whatever their attributes",
        "prepare/constants.py",
        "key = (node.op, len(node.outputs), *attributes, *(id(t)",
        "key = (node.op, len(node.outputs), *(id(t)",
        ("prepare",),
    ),
    Fault(
        "pads of computed values keep the grid",
        "plan.py",
        "if not is_constant(tensor) or np.size(tensor.values) == 1]",
        "if is_constant(tensor) and np.size(tensor.values) == 1]",
        ("plan",),
    ),
    Fault(
        "joins share the grid of what others read",
        "plan.py",
        "while len(self.readers(tensor)) == 1 and",
        "while",
        ("plan",),
    ),
    Fault(
        "inputs that are joined count as states though layers read them so",
        "plan.py",
        "id(reader.outputs[0]) in self.leaving",
        "True",
        ("plan",),
    ),
    Fault(
        "values that are only said to be moved pass verification",
        "verify.py",
        "if away > OFF_GRID * qparams.scale:",
        "if away > 1e9 * qparams.scale:",
        ("verify",),
    ),
    Fault(
        "activations with a cap far out lose it",
        "prepare/patterns.py",
        "_GRID = np.concatenate([-_FAR, np.linspace(-9, 9, 145), _FAR])",
        "_GRID = np.linspace(-9, 9, 145)",
        ("prepare",),
    ),
    Fault(
        "weights of 8 bits share their zero points",
        "write.py",
        "if grid.bits == 8 else self.zeros",
        "if grid.bits > 8 else self.zeros",
        ("write",),
    ),
    Fault(
        "GroupNormalization keeps scales of channels where they were those of groups",
        "prepare/opset.py",
        '"GroupNormalization": 21,',
        '"GroupNormalization": 18,',
        ("write",),
    ),
    Fault(
        "a prepared model is not held against its source",
        "pipeline.py",
        "if not decibel >= min(PREPARED_SQNR,",
        "if not decibel >= min(-PREPARED_SQNR,",
        ("pipeline",),
    ),
    Fault(
        "a model in memory is held against what became of it",
        "pipeline.py",
        "if isinstance(model, gs.Graph):\n            source =",
        "if not isinstance(model, str | Path):\n            source =",
        ("pipeline",),
    ),
    Fault(
        "statistics of channels that were evened out for other widths",
        "pipeline.py",
        "if not graphs.same_constants(job.graph, mixed.graph):",
        "if graphs.same_constants(job.graph, mixed.graph):",
        ("mixed",),
    ),
    Fault(
        "uneven widths for a gain that cannot be told",
        "mixed.py",
        "TELLING = 1.2",
        "TELLING = 1.0",
        ("mixed",),
    ),
    Fault(
        "one width for all beyond a limit",
        "mixed.py",
        "if all(limit.resource.use(choice) <= limit.most for limit in limits)]",
        "if all(limit.resource.use(choice) <= 2 * limit.most for limit in limits)]",
        ("mixed",),
    ),
    Fault(
        "parts of a Concat scaled by the first part's factors",
        "equalize.py",
        "first += part.shape[axis]",
        "first += 0",
        ("equalize",),
    ),
    Fault(
        "channels evened out for what no gradient answers to",
        "equalize.py",
        "if counts is not None:",
        "if counts is None:",
        ("equalize",),
    ),
    Fault(
        "defaults of functions are lost",
        "graph.py",
        "if a.name not in given)",
        "if a.name in given)",
        ("graph",),
    ),
    Fault(
        "what a branch returns is forgotten",
        "graph.py",
        "        _make_outputs(nodes)\n",
        "        pass\n",
        ("islands",),
    ),
    Fault(
        "verification forgives kernels whole steps",
        "verify.py",
        "<= 0.5 + slack) & (slack > 0)",
        "<= 1.5 + slack)",
        ("verify",),
    ),
    Fault(
        "values that are scaled on the way keep their names",
        "prepare/linear.py",
        'reader.inputs[index].name = fresh_name(graph, f"{reader.inputs[index].name}_scaled")',
        "pass",
        ("prepare", "odd_models"),
    ),
    Fault(
        "a sequence is erased at the wrong end",
        "prepare/sequences.py",
        "count if inserts else count - 1)",
        "count if inserts else 0)",
        ("prepare",),
    ),
    Fault(
        "sparse constants are transposed",
        "graph.py",
        "tuple(indices.T)] = values",
        "tuple(indices.T[::-1] % np.array(found.shape)[:, None])] = values",
        ("graph",),
    ),
    Fault(
        "a student is judged on what it selects itself",
        "eptq.py",
        "given = [] if deciding else [raw[name] for name in self.decisions]",
        "given: list[Any] = []",
        ("selected",),
    ),
    Fault(
        "a student selects by itself",
        "pieces.py",
        "ours = function(student, [*inputs[0], *given], outputs[0], mapped=mapped)",
        "ours = lambda *x: function(student, inputs[0], outputs[0])(*x[: len(inputs[0])])",
        ("selected",),
    ),
    Fault(
        "the start lets the student select",
        "compensate.py",
        "if value in self.decisions and self.guide is not None:",
        "if value in ():",
        ("selected",),
    ),
    Fault(
        "what crosses a piece is what the student selects",
        "eptq.py",
        "lambda *inputs: student(*inputs, *next(batches)), piece, ours, batch)",
        "pieces.function(self.student, places[0], ends[0]), piece, ours, batch)",
        ("selected",),
    ),
    Fault(
        "a bound of Clips that others read, too, is counted as theirs",
        "write.py",
        "return planned and [index for index, read in enumerate(node.inputs) if read is tensor] == [2]",
        "return True",
        ("resources",),
    ),
    Fault(
        "thinned convolutions are read twice as densely",
        "compensate.py",
        "root = (positions // wanted) ** (1 / dims)",
        "root = 0.5 * (positions // wanted) ** (1 / dims)",
        ("compensate",),
    ),
    Fault(
        "a Clip is opened although the grid reaches beyond it",
        "write.py",
        "and int(codes[1]) == grid.qmax",
        "and int(codes[1]) > 0",
        ("write",),
    ),
    Fault(
        "biases leave out their zero points",
        "write.py",
        'inputs = [self.constant(f"{value.name}_quantized", codes), scale, zero_point]\n        elif',
        'inputs = [self.constant(f"{value.name}_quantized", codes), scale]\n        elif',
        ("write",),
    ),
    Fault(
        "copies of a sample on both sides of the guard",
        "eptq.py",
        "heldout.split(scenes, problem.seed",
        "heldout.split(range(len(scenes)), problem.seed",
        ("heldout",),
    ),
    Fault(
        "quiet samples taken for copies of each other",
        "heldout.py",
        "(powers[rows, None] + powers[None, :upto]).clamp(max=usual)",
        "torch.full_like(apart, usual)",
        ("heldout",),
    ),
    Fault(
        "few samples learned from and judged by",
        "heldout.py",
        "max(units // SHARE_OF_HARDLY_ANY, min(LEAST_OF_HARDLY_ANY, units // 2), 1) * multiple\n",
        "count\n",
        ("heldout",),
    ),
    Fault(
        "hardly any judges trusted like many",
        "eptq.py",
        "and not self.sure:",
        "and not self.best:",
        ("heldout",),
    ),
    Fault(
        "a quantized model that is compared picks for itself",
        "verify.py",
        'f"{name}/own" if name in decisions else name for name in node.output',
        "name for name in node.output",
        ("selected",),
    ),
    Fault(
        "branches that select taken for others",
        "ops.py",
        "return SELECTING_ISLAND if any(",
        "return ISLAND if any(",
        ("selected",),
    ),
    Fault(
        "integer products with float results left unverified",
        "verify.py",
        '{node.op_type}", apart)',
        '{node.op_type}", apart & False)',
        ("report",),
    ),
    Fault(
        "layers in float kernels passed over",
        "verify.py",
        "for name, node in nodes if node.op_type in FLOAT_LINEAR}",
        "for name, node in nodes if node.op_type in INTEGER_LINEAR}",
        ("report",),
    ),
    Fault(
        "NaN of the written file passed over",
        "verify.py",
        "(np.isfinite(a) & ~numbers & ~masked).sum()",
        "(np.isfinite(a) & ~numbers & masked).sum()",
        ("report",),
    ),
    Fault(
        "float weights of recurrent cells and branches unnamed",
        "report.py",
        "weighted = graphs.is_op(node, *_WEIGHTED, *_RECURRENT) if within else _holds_weights(node)",
        "weighted = graphs.is_op(node, *_WEIGHTED) and not within",
        ("report",),
    ),
    Fault(
        "ranges told of the first samples alone",
        "pipeline.py",
        "    for batch in spread:\n",
        "    for batch in itertools.islice(job.batches, 1):\n",
        ("report",),
    ),
    Fault(
        "selections of the file not held against the simulation's",
        "verify.py",
        "_check_close(value, producer, x.gather(axis, ours), x.gather(axis, theirs).cpu().numpy())",
        "_check_close(value, producer, x.gather(axis, ours), x.gather(axis, ours).cpu().numpy())",
        ("selected",),
    ),
    Fault(
        "verification that selects by itself where values tie",
        "pipeline.py",
        "quantized, few, report.threads, decisions(job.graph)",
        "quantized, few, report.threads",
        ("selected",),
    ),
    Fault(
        "channels evened out through windows along their axis",
        "ops.py",
        "    return axis if axis < 2 else None",
        "    return axis",
        ("equalize",),
    ),
    Fault(
        "a Clip fused to an integer Softmax",
        "plan.py",
        "return not _shares(tensor.inputs[0]) or self.reason_to_stay_float(consumer.outputs[0]) is not None",
        "return True",
        ("odd_models",),
    ),
    Fault(
        "standardisation of inputs that brings nothing nearer kept float",
        "pipeline.py",
        "if columns.share(*behind) < columns.GAIN * columns.share(*ranges[tensor.name]):",
        "if columns.share(*behind) < 0:",
        ("columns",),
    ),
    Fault(
        "outputs far from zero on a grid",
        "columns.py",
        "covered.min() >= steps and covered.max() >= widest",
        "covered.min() >= steps",
        ("columns",),
    ),
    Fault(
        "numbers of any size compared as scores",
        "eptq.py",
        "return axis if float((first - second).median()) < NO_SCORES else None",
        "return axis",
        ("eptq",),
    ),
    Fault(
        "scales of blocks not carried to the biases behind",
        "prepare/linear.py",
        "        total = added * vector.reshape([-1 if axis == place else 1 for axis in where])",
        "        total = added * np.ones_like(vector).reshape([-1 if axis == place else 1 for axis in where])",
        ("prepare",),
    ),
    Fault(
        "optimised kernels that lose passed over",
        "remarks.py",
        "exact.sqnr_db.get(name, -math.inf) - RUNTIME_LOSS",
        "exact.sqnr_db.get(name, -math.inf) - 100 * RUNTIME_LOSS",
        ("pipeline",),
    ),
    Fault(
        "the colours of a picture taken for classes",
        "outputs.py",
        "output[colours] == image[colours] == 3",
        "output[colours] == image[colours] == 5",
        ("outputs",),
    ),
)


def copy_checkout(folder: Path) -> Path:
    """Copy what git tracks, and new files it does not ignore, into `folder`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # deleted files are still listed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def environment(checkout: Path) -> dict[str, str]:
    """The environment of the tests: the copy's package, no beds, no stale bytecode."""
    kept = {key: value for key, value in os.environ.items() if key != "ONNX_EPTQ_BEDS"}
    return kept | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def check_import(checkout: Path) -> None:
    """Refuse to run tests that would import another copy of the package."""
    command = [sys.executable, "-c", "import onnx_eptq; print(onnx_eptq.__file__)"]
    found = subprocess.run(command, cwd=checkout, env=environment(checkout), capture_output=True, text=True, check=True)
    if not Path(found.stdout.strip()).resolve().is_relative_to(checkout.resolve()):
        refuse([f"tests would import {found.stdout.strip()} instead of the copy in {checkout}"])


def refuse(problems: Sequence[str]) -> None:
    """End with exit code 2, saying why."""
    print("cannot run:\n  " + "\n  ".join(problems), file=sys.stderr)
    sys.exit(2)


def problems_of(faults: Sequence[Fault]) -> list[str]:
    """What keeps a fault from being planted: its text must occur exactly once."""
    found = []
    for fault in faults:
        path = ROOT / PACKAGE / fault.file
        count = path.read_text().count(fault.old) if path.exists() else 0
        if count != 1:
            shown = fault.old.strip().splitlines()[0]
            found.append(f"'{fault.name}': {PACKAGE / fault.file} holds its text {count} times, wanted once: {shown}")
    return found


def test_files(fault: Fault, checkout: Path, whole_suite: bool) -> list[str]:
    """The test modules to run; those not written yet are left out."""
    if whole_suite:
        return ["tests"]
    return [f"tests/test_{name}.py" for name in fault.tests if (checkout / f"tests/test_{name}.py").exists()]


def run_tests(checkout: Path, files: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Run pytest up to the first failure; return its exit code (None: it took too long) and what it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not beds"]
    try:
        done = subprocess.run(
            [*command, *files],
            cwd=checkout,
            env=environment(checkout),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def verdict(code: int | None, output: str) -> tuple[str, str]:
    """What a run of the tests says about a fault, and which test said it."""
    if code is None:
        return CAUGHT, "the tests did not end"
    if code == 0:
        return MISSED, ""
    named = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
    return CAUGHT, named[1] if named else f"pytest exit code {code}"


def plant(fault: Fault, checkout: Path, options: argparse.Namespace) -> tuple[str, str]:
    """Run the fault's tests with the fault in place, then restore the file."""
    files = test_files(fault, checkout, options.whole_suite)
    if not files:
        return UNTESTED, ", ".join(f"tests/test_{name}.py" for name in fault.tests)
    path = checkout / PACKAGE / fault.file
    sound = path.read_text()
    path.write_text(sound.replace(fault.old, fault.new))
    try:
        return verdict(*run_tests(checkout, files, options.timeout))
    finally:
        path.write_text(sound)


def check_baseline(faults: Sequence[Fault], checkout: Path, options: argparse.Namespace) -> None:
    """The tests must pass without a fault, or they would seem to catch every one."""
    files = sorted({file for fault in faults for file in test_files(fault, checkout, options.whole_suite)})
    code, output = run_tests(checkout, files, 20 * options.timeout) if files else (0, "")
    if code:
        refuse(["the tests fail without any fault", *output.strip().splitlines()[-5:]])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--only", help="names of faults, separated by commas; parts of names will do")
    parser.add_argument("--whole-suite", action="store_true", help="run all fast tests, not just those named")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the tests of one fault")
    parser.add_argument("--json", type=Path, help="write the outcome to this file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    wanted = options.only.split(",") if options.only else [""]
    faults = [fault for fault in FAULTS if any(part in fault.name for part in wanted)]
    if options.list:
        print("\n".join(f"{fault.name}  ({fault.file}; tests: {', '.join(fault.tests)})" for fault in faults))
        return
    if not faults:
        refuse([f"no fault is named like {options.only}"])
    if problems := problems_of(faults):
        refuse(problems)
    outcome = {}
    with tempfile.TemporaryDirectory() as folder:
        checkout = copy_checkout(Path(folder))
        check_import(checkout)
        check_baseline(faults, checkout, options)
        for fault in faults:
            started = time.perf_counter()
            outcome[fault.name] = plant(fault, checkout, options)
            said, detail = outcome[fault.name]
            print(f"{said:<12} {fault.name}  ({time.perf_counter() - started:.0f} s)  {detail}", flush=True)
    counts = {kind: sum(said == kind for said, _ in outcome.values()) for kind in (CAUGHT, MISSED, UNTESTED)}
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    if options.json:
        options.json.write_text(json.dumps(outcome, indent=1) + "\n")
    sys.exit(counts[MISSED] > 0)


if __name__ == "__main__":
    main()
