"""`quantize`: the stages from a float ONNX model to a verified low-bit file, one line each."""

from __future__ import annotations

import functools
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

import onnx_eptq
from onnx_eptq import (
    calibrate,
    checkpoint,
    checks,
    columns,
    compensate,
    eptq,
    heldout,
    hessian,
    mirror,
    pieces,
    remarks,
    resources,
    sensitivity,
    threads,
    verify,
)
from onnx_eptq import data as sources
from onnx_eptq import graph as graphs
from onnx_eptq.columns import Columns
from onnx_eptq.config import Config
from onnx_eptq.equalize import equalize, find_places
from onnx_eptq.errors import CoverageError, DataError, ModelError, UsageError, VerificationError
from onnx_eptq.methods import EFFORTS, METHODS, Effort, Method
from onnx_eptq.mixed import Mixed
from onnx_eptq.outputs import class_axes, decisions, judged_targets, learning_targets, scores, selections
from onnx_eptq.plan import (
    Layer,
    Plan,
    Rules,
    check_ops,
    check_plan,
    explained,
    is_score,
    linear_layers,
    make_plan,
    open_shares,
    reach_open,
)
from onnx_eptq.prepare import add_biases, even_inputs, free_batch, prepare
from onnx_eptq.prepare.linear import behind_affine
from onnx_eptq.prepare.opset import lower_opset
from onnx_eptq.report import Phases, Report, find_islands, measure_coverage
from onnx_eptq.targets import TARGETS, Target
from onnx_eptq.views import count_views
from onnx_eptq.widths import DEFAULT_WEIGHT_WIDTHS, Asked, Group, candidates, with_widths
from onnx_eptq.write import write

WEIGHT_SAMPLES = 64  # samples on which weight scales compete; half of it for images, fewer of larger ones
EQUALIZE_SAMPLES = 64  # samples on which factors between channels are chosen: fewer do not show how far channels reach
FIT_SAMPLES = 256  # by which weights are rounded when sensitivities are measured
FIDELITY_SAMPLES, LEAST_FIDELITY = 256, 32  # how many are compared, and of large samples
PARITY_SAMPLES = 8
SMALL = 1024  # elements of a sample: of smaller ones, more are looked at where
FED_SAMPLES = 128  # whose range is told
COLUMN_SAMPLES, FEW_COLUMN_SAMPLES = 64, 16  # the columns of inputs and outputs are compared on so many samples
LEAST_COLUMN_SAMPLES = 4  # of very large ones
ALIKE = 8  # samples that are compared: if they are the same, so may be all
UNSEEN = 0.5  # a score of 0 to 1 whose largest one is below was calibrated on samples without what it looks for
SHAKEN = 1e-6  # what inputs are changed by, as a part of themselves, to see what last digits make of the outputs
SHAKY = 10.0  # dB that outputs may be nearer to the model's own after that than after preparation
PREPARED_SQNR = 30.0  # dB; below, it is not for rounding in another order that a prepared model differs from its source
USUAL = {"weight": 4, "activation": 8}  # bits that channels are evened out for before widths are chosen
MEASURED_WITH = ("sensitivity", "seed", "calibration", "bias_correction", "cache_mb", "batch_size")
GROUP = 16  # samples at a time, where the model itself fixes a smaller batch
MOST_TIMES = 2  # the steps, where batches are smaller than the effort's
LEARN_ELEMENTS = 8 * 3 * 224 * 224  # of a batch to learn from, unless one sample is larger
RANGE_BATCH, RANGE_BYTES = 8, 2**28  # samples that gradients of all activations are taken of together, and their memory
RANGE_COST = 12.0  # of weighing ranges, per sample; unit: a run of the float model
GRADIENT_BYTES = 24  # that this takes per quantized element
STEP_COST, START_COST = 1.5, 4.5  # of a step, and of a closed-form start, per sample; unit: a run of the float model
STEP_VALUES = 4  # times the values of a batch that a step holds, for both networks and the gradients
LEAST_SAMPLES = 32  # that layers are solved with, whatever the memory
IMAGE_ELEMENTS = 3 * 224 * 224  # a sample of this size is run in batches of 32
LARGEST = 16  # times its input that the largest activation of a sample is, before it is that which counts as its size
Model: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | gs.Graph


@dataclass
class Result:
    """A finished run: the written model, its plan, and the report."""

    model: onnx.ModelProto
    plan: Plan
    report: Report


@dataclass
class Job:
    """What is known before any long work: the prepared graph, where quantizers sit, what will be fed."""

    graph: gs.Graph
    source: onnx.ModelProto | Path
    plan: Plan
    layers: Sequence[Layer]
    target: Target
    batches: sources.Batches
    config: Config
    report: Report
    groups: Sequence[Group] = ()  # quantizers whose widths are still to be chosen
    is_equalized: bool = False  # channels have been evened out
    counts: Mapping[str, tuple[float, int]] = field(default_factory=dict)  # as `resources.elements`, of a sample
    pass_seconds: float = 0.0  # that one run of all samples took


@threads.restored()
@torch.inference_mode(False)
@torch.enable_grad()
def quantize(
    model: Model,
    data: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    config: Config | None = None,
    plan: Plan | None = None,
    strict: bool = False,
    resume: bool = False,
    phases: Phases | None = None,
    **settings: Any,
) -> Result:
    """Quantize a float ONNX model and verify the result in ONNX Runtime.

    Args:
        model: path, ModelProto or graphsurgeon Graph; never modified.
        data: calibration samples: a path (images, .npy, .npz, test_data_set folders), arrays, dicts by input name, any
            iterable of them, an ONNX Runtime CalibrationDataReader; None only with `random_calibration=True`.
        output: where to write the file; None keeps it in memory.
        config: all settings at once; or give single ones by name (`weight_bits=4`), which win.
        plan: where quantizers sit, as an earlier run returned it or `Plan.from_json` read it; by default made here.
        strict: refuse to go on when a layer with weights would stay float.
        resume: go on from the checkpoint that an interrupted run with the same output left, if there is one.
        phases: where progress is shown; by default nowhere.
        **settings: single settings of `Config`.

    Raises:
        EptqError: one of its kinds (`onnx_eptq.errors`); no model is written then.
    """
    phases = phases or Phases()
    job = begin(model, data, output, config=config, plan=plan, strict=strict, phases=phases, **settings)
    if resume and job.config.method == "rtn":
        raise UsageError("--resume goes on with learning, and --method rtn learns nothing; leave one of them out")
    saved = None if output is None else Path(f"{os.fspath(output)}.checkpoint")
    if resume and saved is not None and saved.exists():
        checkpoint.check_settings(saved, job.config.model_dump(mode="json"))
    with naming_samples(job):
        stats = None
        if job.groups:
            mixed, stats = explored(job, phases)
            job.plan, job.report.allocation = mixed.choose(**job.config.budgets)
            describe_plan(job)
            equalized(job, phases)
            if not graphs.same_constants(job.graph, mixed.graph):  # evened out otherwise, for these widths
                stats = None
        ready = calibrated(job, phases, stats)
        if job.config.method != "rtn":
            learned(job, ready, saved, resume, phases)
    written = finish(job, ready.student, output, phases)
    if saved is not None and job.config.method != "rtn":
        saved.unlink(missing_ok=True)
    job.report.seconds = phases.seconds
    return Result(written, job.plan, job.report)


@contextmanager
def naming_samples(job: Job) -> Iterator[None]:
    """Tell which samples the model cannot compute (a token beyond a table), if it is they that something failed by.

    Raises:
        DataError: There are some; that the first sample can be computed is known.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if _is_memory(error):
            raise
        teacher, count = mirror.build(job.graph).to(job.config.device), 0
        for batch in job.batches:
            last = count + (1 if mirror.feeds_whole(job.graph) else len(next(iter(batch.values()))))
            try:
                with torch.no_grad():
                    teacher(*calibrate.feed(teacher, batch))
            except (IndexError, RuntimeError) as found:
                if _is_memory(found):
                    raise error from None
                where = f"sample {count}" if last == count + 1 else f"samples {count} to {last - 1}"
                reason = str(found).splitlines()[0]
                raise DataError(
                    f"the model cannot compute {where} of those used: {reason}; check their values"
                ) from error
            count = last
        raise


def _is_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error)


def begin(
    model: Model,
    data: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    config: Config | None = None,
    plan: Plan | None = None,
    strict: bool = False,
    explore: bool = False,
    phases: Phases | None = None,
    **settings: Any,
) -> Job:
    """Check everything that can be checked before long work, and plan; arguments and errors as for `quantize`.

    With `explore`, widths are to be chosen even if no budget is set.
    """
    checks.check_kinds(
        config=(config, Config), plan=(plan, Plan), phases=(phases, Phases), output=(output, (str, os.PathLike))
    )
    phases = phases or Phases()
    config = Config.make(**{**(config.model_dump() if config else {}), **settings})
    if plan is not None and {"weight_bits", "act_bits"} & settings.keys():
        raise UsageError(
            "the plan that is given says every width already; edit it instead of giving weight_bits or act_bits"
        )
    if "weight_bits" in settings and not config.weight_choices and (config.budgets or explore):
        config = config.model_copy(update={"weight_choices": (config.weight_bits,)})
    mixes = checks.check_budgets(config, plan, explore)
    target = choose_target(config)
    checks.check_device(config)
    if output is not None:
        checks.check_output(output, model, data)
    with phases("prepare"):
        graph = graphs.load(model)
        source: onnx.ModelProto | Path  # as it came, so that it shows what importing changed
        if isinstance(model, gs.Graph):
            source = graphs.to_model(graphs.copy(graph))
        else:
            source = model if isinstance(model, onnx.ModelProto) else Path(model)
        if output is not None and isinstance(source, Path):
            checks.check_weights_kept(output, source)
        check_ops(graph)
        changes = prepare(graph)
        checks.check_values(graph)
        float_bytes = graphs.file_bytes(source) if isinstance(source, Path) else source.ByteSize()
        given, source = source, loadable(source, graph, changes)
        if config.opset < graph.opset:
            lower_opset(graphs.copy(graph), config.opset)  # only to hear now of what has no form there
    batches = open_batches(graph, data, config)
    with phases("plan"):
        uneven, unlike = find_uneven(graph, source, batches)
        while uneven:  # then what evens them out is needed, where it does
            other = graphs.load(model)
            graphs.extras(other).uneven = list(uneven)
            lost = [name for name, seen in uneven.items() if not seen.are_served(columns.OUTPUT_STEPS)]
            graphs.extras(other).quantities = lost
            other_changes = prepare(other)
            ranges = {name: (seen.low, seen.high) for name, seen in uneven.items()}
            idle = idle_inputs(other, ranges)
            if not idle:
                graph, changes = other, other_changes | {"even_inputs": even_inputs(other, ranges)}
                break
            uneven = {name: seen for name, seen in uneven.items() if name not in idle}
        graphs.extras(graph).unlike = unlike
        if config.strip_notes:
            graphs.strip_notes(graph)
        if config.bias_correction:
            add_biases(graph)
        groups: Sequence[Group] = ()
        if plan is not None:
            check_plan(graph, target, plan)
            plan = explained(plan, make_plan(graph, target))
        elif mixes:
            plan, groups = candidates(graph, target, Rules(keep_float=config.keep_float), asked(config))
        else:
            plan = make_plan(graph, target, rules(config))
    coverage = measure_coverage(graph, plan)
    if strict and not coverage.complete:
        left = coverage.float_layers | coverage.float_weights
        names = ", ".join(f"'{name}' ({reason})" for name, reason in left.items())
        of = coverage.layers + len(coverage.float_weights)
        raise CoverageError(f"{len(left)} of {of} layers would stay float: {names}")
    label = str(model) if isinstance(model, str | os.PathLike) else graph.name or "model"
    report = Report(onnx_eptq.__version__, label, config.model_dump(mode="json", exclude_defaults=True), coverage)
    report.islands = find_islands(graph)
    if not coverage.quantized_layers:
        report.warnings.append(
            "no layer is quantized, so the file gains nothing; what stays float is listed with its reason"
        )
    if defaults := graphs.extras(graph).defaults:
        names = ", ".join(f"'{name}'" for name in defaults[:3]) + (" and others" if len(defaults) > 3 else "")
        report.warnings.append(
            f"inputs with a default ({names}) become constants: the file takes no other values for them"
        )
    if source is not given and changes["use_float32"]:
        report.warnings.append(
            "ONNX Runtime does not load the model in its own precision; the result is compared with the same model in float32"
        )
    report.warnings += remarks.idle_settings(config)
    report.output = None if output is None else str(output)
    report.preparation = {name: count for name, count in changes.items() if count}
    report.notes_bytes = graphs.notes_bytes(graph)
    report.float_bytes = float_bytes
    job = Job(graph, source, plan, linear_layers(graph), target, batches, config, report, groups)
    check_batches(job)
    job.counts = measured(job)
    if config.batch_size is None:
        job.batches = job.batches.with_batch_size(batch_size_for(job))
    report.threads = min(config.threads, os.cpu_count() or 1) or threads.worthwhile(work_of_a_node(job))
    torch.set_num_threads(report.threads)
    check_sizes(job)
    if open_shares(graph, job.plan):
        job.plan = reach_open(graph, job.plan, first_shapes(job))
    describe_plan(job)
    describe_data(job)
    if groups:
        try:
            unmeasured(job).check(**config.budgets)
        except UsageError as error:
            if config.max_size is None or report.notes_bytes < remarks.MANY_NOTES * config.max_size:
                raise
            raise UsageError(f"{error}; {remarks.notes_of(report)}") from None
    return job


def describe_plan(job: Job) -> None:
    """Put into the report what the plan quantizes, and how it is stored."""
    job.report.coverage = measure_coverage(job.graph, job.plan)
    job.report.storage = {bits: job.target.storage[bits] for bits in job.report.coverage.layers_by_bits}


def asked(config: Config) -> Asked:
    """The widths that may be chosen: weights have a default unless they were given a width; activations keep theirs."""
    fixed = config.weight_bits != Config.model_fields["weight_bits"].default
    weights = config.weight_choices or ((config.weight_bits,) if fixed else DEFAULT_WEIGHT_WIDTHS)
    patterns = {name: widths if isinstance(widths, tuple) else (widths,) for name, widths in config.bits.items()}
    return Asked(tuple(sorted(set(weights))), tuple(sorted(set(config.act_choices or (config.act_bits,)))), patterns)


def rules(config: Config) -> Rules:
    """What a plan without choices is made by."""
    bits = {name: widths for name, widths in config.bits.items() if isinstance(widths, int)}
    return Rules(config.weight_bits, config.act_bits, bits, config.keep_float)


def choose_target(config: Config) -> Target:
    """The target record, with the storage form that the user asked for."""
    if config.target not in TARGETS:
        raise UsageError(f"there is no target '{config.target}'; known: {', '.join(TARGETS)}")
    target = TARGETS[config.target]
    if config.storage is None:
        storage = {
            b: "lut" if config.opset < 21 and form in ("int4", "cast") else form for b, form in target.storage.items()
        }
    elif config.opset < 21 and config.storage in ("int4", "cast"):
        raise UsageError(f"storage '{config.storage}' holds 4-bit tensors, which need opset 21, not {config.opset}")
    else:
        storage = {bits: config.storage if bits <= 4 else "int8" for bits in target.storage}
    return replace(target, storage=storage)


def loadable(source: onnx.ModelProto | Path, graph: gs.Graph, changes: Mapping[str, int]) -> onnx.ModelProto | Path:
    """The float model that the result is compared with: the source, or what became of it where only that can be loaded.

    A proto may lack what importing mends (unique names, versions). And exporters write nodes of float16 that ONNX Runtime does
    not take, while it lacks most operators in bfloat16: then it is the prepared graph, which replaces these types.

    Raises:
        ModelError: ONNX Runtime cannot load the float model.
    """
    forms: list[Callable[[], onnx.ModelProto | Path]] = [lambda: source]
    if isinstance(source, onnx.ModelProto):
        forms.append(lambda: graphs.to_model(graphs.load(source)))
    if changes["use_float32"]:
        forms.append(lambda: graphs.to_model(graphs.copy(graph)))
    why: list[VerificationError] = []
    for form in forms:
        found = form()
        try:
            verify.session(found, "basic")
        except VerificationError as error:
            why.append(error)
        else:
            return found
    raise ModelError(f"the float model does not load: {why[0]}") from why[0]


def input_specs(graph: gs.Graph) -> list[sources.InputSpec]:
    """The model's inputs as the data module wants them."""
    specs = []
    for tensor in graph.inputs:
        shape = tuple(size if isinstance(size, int) and size > 0 else None for size in tensor.shape or ())
        specs.append(sources.InputSpec(tensor.name, shape, np.dtype(tensor.dtype)))
    return specs


def open_batches(graph: gs.Graph, data: Any, config: Config) -> sources.Batches:
    """Open the calibration data, or make random samples when `data` is None."""
    specs = input_specs(graph)
    if config.preset not in sources.PRESETS:
        raise UsageError(f"there is no preset '{config.preset}'; known: {', '.join(sources.PRESETS)}")
    chosen = {name: getattr(config, name) for name in ("scale", "mean", "std", "resize", "crop", "color", "layout")}
    preset = replace(sources.PRESETS[config.preset], **{k: v for k, v in chosen.items() if v is not None})
    if data is None and not config.random_calibration:
        raise DataError("no calibration data is given; give samples, or ask for random_calibration to try things out")
    if data is not None and config.random_shapes:
        raise UsageError("sizes of random inputs are given beside calibration data; leave one of them out")
    if data is None:
        unknown = sorted(set(config.random_shapes) - {spec.name for spec in specs})
        if unknown:
            names = ", ".join(spec.name for spec in specs)
            raise UsageError(
                f"--random-shape names '{unknown[0]}', which is no input of the model; its inputs: {names}"
            )
        count, size = config.num_samples or 32, config.batch_size or 1
        return sources.random_data(specs, count, config.seed, batch_size=size, shapes=config.random_shapes)
    size = config.batch_size or 1
    return sources.open_data(data, specs, preset, num_samples=config.num_samples, seed=config.seed, batch_size=size)


def find_uneven(
    graph: gs.Graph, source: onnx.ModelProto | Path, batches: sources.Batches
) -> tuple[dict[str, Columns], list[str]]:
    """What one grid may lose the small ones of: values whose columns differ in scale, and names of such whose samples do.

    Of outputs that are shares or scores, small columns are what they should be; outputs that are read within have a grid in any
    case. Samples of outputs count where those of an input differ, too: a series that was brought to one size and is brought back.
    """
    found: tuple[dict[str, Columns], dict[str, Columns]] = {}, {}
    outputs = [tensor for tensor in graph.outputs if not is_score(tensor) and not tensor.outputs]
    names = [{tensor.name for tensor in some if np.dtype(tensor.dtype).kind == "f"} for some in (graph.inputs, outputs)]
    size = sum(array.size for array in next(batches.samples()).values())
    few = max(LEAST_COLUMN_SAMPLES, min(FEW_COLUMN_SAMPLES, FEW_COLUMN_SAMPLES * IMAGE_ELEMENTS // max(1, size)))
    try:
        of = verify.session(source, "basic", 1)
        for batch in batches.subset(COLUMN_SAMPLES if size <= SMALL else few):
            for values, kind, wanted in zip((batch, verify.run(of, batch)), found, names, strict=True):
                for name in wanted & values.keys():
                    kind.setdefault(name, Columns()).add(values[name])
    except VerificationError:  # of which `loadable` and `measured` will say more
        return {}, []
    ranks = {tensor.name: len(tensor.shape or ()) for tensor in (*graph.inputs, *graph.outputs)}
    uneven = {
        name: seen
        for kind, steps in zip(found, (steps_of_input, steps_of_output), strict=True)
        for name, seen in kind.items()
        if not seen.are_served(*steps(ranks[name], len(seen.low)))
    }
    unlike, behind = ([name for name, seen in kind.items() if seen.are_unlike] for kind in found)
    return uneven, [*unlike, *behind] if unlike else []


def steps_of_input(rank: int, _count: int) -> tuple[float, float]:
    """Steps that every column of an input, and the widest, should cover; the channels of images are alike enough."""
    return (columns.INPUT_STEPS if rank == 4 else columns.OWN_STEPS), 0.0


def steps_of_output(rank: int, count: int) -> tuple[float, float]:
    """As `steps_of_input`; what lies far from zero is no score where there is one column, or a row of them per sample."""
    return (columns.ROW_STEPS if rank <= 2 else columns.OUTPUT_STEPS), (
        columns.ROW_SPREAD if rank <= 2 or count == 1 else 0.0
    )


def idle_inputs(graph: gs.Graph, ranges: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """Inputs with columns that one grid serves, and that what the model does to them brings no nearer to each other."""
    found = []
    for tensor in graph.inputs:
        if tensor.name in ranges and columns.are_served(*ranges[tensor.name], columns.INPUT_STEPS):
            _, *behind = behind_affine(tensor, *ranges[tensor.name])
            if columns.share(*behind) < columns.GAIN * columns.share(*ranges[tensor.name]):
                found.append(tensor.name)
    return found


def describe_data(job: Job) -> None:
    """Put into the report what is fed, and warn about what looks wrong."""
    report = job.report
    report.data, report.samples = job.batches.describe(), job.batches.num_samples
    spread = job.batches.subset(max(8, min(FED_SAMPLES, 32 * IMAGE_ELEMENTS // sample_elements(job))), job.config.seed)
    arrays: dict[str, list[np.ndarray]] = {}
    for batch in spread:
        for name, array in batch.items():
            arrays.setdefault(name, []).append(array.reshape(-1))
    seen = {name: np.concatenate(parts) for name, parts in arrays.items()}
    some = list(itertools.islice(job.batches.samples(), ALIKE))
    if len(some) > 1 and all(np.array_equal(x, some[0][name]) for sample in some[1:] for name, x in sample.items()):
        report.warnings.append(
            f"the first {len(some)} samples are all the same: ranges and learning need what the model meets in use"
        )
    raw = (job.config.scale or sources.PRESETS[job.config.preset].scale) == 1
    for spec in input_specs(job.graph):
        if spec.name in seen and seen[spec.name].size:
            fed = sources.feed_range({spec.name: seen[spec.name]})[spec.name]
            report.fed[spec.name] = [float(number) for number in fed]
            hint = sources.implausible(spec, fed, raw=raw, arrays=not job.batches.are_images)
            if hint is None and spec.dtype.kind == "f" and fed.min == fed.max and report.samples > 1:
                hint = f"input '{spec.name}' was fed nothing but {fed.min:.4g}: its range is a guess; give samples that fill it"
            report.warnings += [hint] if hint else []
    if report.samples < 32:
        report.warnings.append(f"only {report.samples} calibration samples; a few hundred give better ranges")


def sample_elements(job: Job) -> int:
    """Size of one sample: elements of all inputs together, or of the activations, where these are larger than usual."""
    inputs = sum(array.size for array in next(job.batches.samples()).values())
    return max(1, inputs, int(max((count for count, _ in job.counts.values()), default=0)) // LARGEST)


def batch_size_for(job: Job) -> int:
    """Samples that are run at a time unless the user or the model says so."""
    return max(1, min(32, 32 * IMAGE_ELEMENTS // sample_elements(job)))


def wanted_samples(job: Job) -> int:
    """How many samples are enough to choose weight scales by: fewer large ones, which have more positions."""
    half, size = WEIGHT_SAMPLES // 2, sample_elements(job)
    return WEIGHT_SAMPLES if size < IMAGE_ELEMENTS else max(half // 4, min(half, 2 * half * IMAGE_ELEMENTS // size))


def weight_samples(job: Job) -> int:
    """How many samples choose the weight scales."""
    return min(wanted_samples(job), job.batches.num_samples)


def measuring_runs(job: Job) -> int:
    """How many runs of the float model measuring sensitivities is worth."""
    if not job.groups:
        return 0
    if job.config.sensitivity == "output":
        return sum(len(group.widths) for group in job.groups)
    return 2 * hessian.PROBES + 4 * max(len(group.widths) for group in job.groups)  # gradients, and rounding


def measured(job: Job) -> dict[str, tuple[float, int]]:
    """Elements and bytes per element of every value, on one sample or as many as the model fixes.

    Raises:
        DataError: The model cannot compute the first samples.
    """
    teacher, batch = mirror.build(job.graph).to(job.config.device), next(iter(job.batches.with_batch_size(1)))
    try:
        counts = resources.elements(teacher, calibrate.feed(teacher, batch))
    except (RuntimeError, IndexError, ValueError):
        problem = verify.complaint(job.source, batch)
        if problem is None:
            raise
        shapes = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in batch.items())
        raise DataError(
            f"the model cannot compute the first samples ({shapes}): {problem}; check their sizes (--resize, --crop) and values"
        ) from None
    job.report.warnings += changed_outputs(job, teacher, batch)
    return counts


def changed_outputs(job: Job, teacher: mirror.Mirror, batch: Mapping[str, np.ndarray]) -> list[str]:
    """A warning for every float output that the prepared graph computes otherwise than the model, before it is quantized.

    It should never come. But what is simulated and verified is the prepared graph, and only this holds it against the model.
    Outputs that last digits of the inputs change as much say nothing: what is normalized to a standard deviation of 0. Nor do
    scores that differ by less than kernels do.
    """
    draw = np.random.default_rng(0).uniform
    shaken = {
        name: (x * draw(1 - SHAKEN, 1 + SHAKEN, x.shape)).astype(x.dtype) if x.dtype.kind == "f" else x
        for name, x in batch.items()
    }
    try:
        of = verify.session(job.source, "basic", 1)
        expected, moved = verify.run(of, batch), verify.run(of, shaken)
    except VerificationError:  # which comparing the written file tells of
        return []
    with torch.no_grad():
        values = teacher(*calibrate.feed(teacher, batch))
    found = {name: value.cpu().numpy() for name, value in zip(teacher.output_names, values, strict=True)}
    picked, shaky = selections(job.graph), verify.distances(expected, moved)
    tiny = {
        name for name in scores(job.graph) if np.abs(found[name] - expected[name]).max(initial=0.0) <= verify.KERNEL
    }
    return [
        f"output '{name}' of the prepared float model is only {decibel} dB from the model's own, before anything is quantized: "
        "what is quantized is not quite your model; please report it with the model"
        for name, decibel in verify.distances(expected, found).items()
        if not decibel >= min(PREPARED_SQNR, shaky.get(name, PREPARED_SQNR) - SHAKY)
        and name not in picked
        and name not in tiny
    ]


def work_of_a_node(job: Job) -> float:
    """Multiplications of a node, on average, on the batches that most time is spent with."""
    size = sized_effort(job).batch if METHODS[job.config.method].stages else job.batches.batch_size
    return size * resources.all_macs(job.graph, job.counts) / len(job.graph.nodes)


def first_shapes(job: Job) -> dict[str, tuple[int, ...]]:
    """The shape of every value on the first batch."""
    teacher, shapes = mirror.build(job.graph).to(job.config.device), dict[str, tuple[int, ...]]()

    def see(value: str, x: torch.Tensor) -> torch.Tensor:
        shapes[value] = tuple(getattr(x, "shape", ()))
        return x

    with torch.no_grad():
        mirror.Probe(teacher, see).run(*calibrate.feed(teacher, next(iter(job.batches))))
    return shapes


def check_batches(job: Job) -> None:
    """Feed every array as it was given, for one sample, where the model cannot take samples together as its inputs promise."""
    if has_fixed_batch(job):
        return
    some = list(itertools.islice(job.batches.with_batch_size(1), 2))
    if len(some) < 2 or any(array.shape != some[1][name].shape for name, array in some[0].items()):
        return
    whole = job.batches.by_item(job.config.num_samples, job.config.seed)
    taken = verify.takes_batches(job.source, some[0], some[1], selections(job.graph))
    if taken is None:
        taken = verify.complaint(job.source, next(iter(whole))) is not None
    if not taken:
        graphs.extras(job.graph).feeds_whole = True
        job.batches = whole
        names = ", ".join(f"'{tensor.name}'" for tensor in job.graph.inputs)
        job.report.warnings.append(
            f"axis 0 of {names} is no batch axis: what lies along it is computed otherwise together than alone, if at all; "
            "every array is taken for one sample, as it was given"
        )


def check_sizes(job: Job) -> None:
    """Raise DataError where samples of several sizes, which a model with open dimensions takes, would have to run together."""
    together = METHODS[job.config.method].stages or job.groups or "hmse" in (
        job.config.calibration, job.config.weight_calibration
    )  # fmt: skip
    first = 0 if mirror.feeds_whole(job.graph) else 1
    if together and any(None in spec.shape[first:] for spec in input_specs(job.graph)):
        sizes = {tuple(array.shape for array in sample.values()) for sample in job.batches.samples()}
        if len(sizes) > 1:
            some = " and ".join("x".join(map(str, shapes[0])) for shapes in sorted(sizes)[:2])
            raise DataError(
                f"the samples have {len(sizes)} sizes ({some}, for example), which only --method rtn with --calibration mse "
                "and no budget takes; bring them to one: --resize HxW or --crop for images"
            )


def estimate(job: Job) -> dict[str, float]:
    """Seconds and peak memory (MB) that the whole run will take, extrapolated from one batch."""
    teacher = mirror.build(job.graph).to(job.config.device)
    batch = next(iter(job.batches))
    start = time.perf_counter()
    calibrate.observe(teacher, job.plan, job.layers, [batch])
    spent = time.perf_counter() - start
    rounds = -(-job.batches.num_samples // job.batches.batch_size)
    narrow = job.config.weight_bits < 7 or job.groups
    candidates = 2 + (len(calibrate.SHARES) if narrow else 0)
    weights = candidates * weight_samples(job) / job.batches.batch_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    model_mb = job.report.float_bytes / 2**20
    method, effort = METHODS[job.config.method], sized_effort(job)
    learning = learning_cost(job, method, effort) * spent / job.batches.batch_size if method.stages else 0.0
    held = learning_bytes(job, teacher, calibrate.feed(teacher, batch)) / 2**20 if method.stages else 0.0
    if job.config.calibration == "hmse":  # gradients of all activations, before anything is learned
        kept = sum(
            job.counts[value][0]
            for value, point in job.plan.items()
            if point.role == "activation" and value in job.counts
        )
        each = GRADIENT_BYTES * kept
        gradients = min(RANGE_BATCH, max(1, RANGE_BYTES // max(1, round(each)))) * each / 2**20
        held = max(held, gradients if gradients <= job.config.cache_mb else 0.0)
    held += min(calibrate.KEPT * 4 / 2**20, candidates * model_mb)
    some = weight_samples(job) / job.batches.batch_size
    ranges = RANGE_COST * some if job.config.calibration == "hmse" else 0.0
    return {
        "seconds": spent * (rounds + weights + ranges + some * measuring_runs(job) + 2) + learning + 1,
        "peak_mb": peak + 4 * model_mb + 60 + held,
    }


def learning_bytes(job: Job, teacher: mirror.Mirror, batch: Sequence[torch.Tensor]) -> float:
    """What learning holds at most: its samples, and what the start solves with or the teacher's values and those of a step."""
    method, effort, cache = METHODS[job.config.method], sized_effort(job), job.config.cache_mb * 2**20
    loaded = min(job.batches.num_samples, most_samples(job, method, effort))
    learned = max(1, loaded - loaded // heldout.SHARE)
    seen = learned * count_views([x[:1].expand(learned, *x.shape[1:]) for x in batch], job.config.views, cache)
    samples = sum(x[:1].numel() * x.element_size() for x in batch) * (loaded + seen)
    outputs = (job.counts.get(layer.output.name, (0.0, 0)) for layer in job.layers)
    kept = sum(count * size for count, size in outputs) * seen
    step = STEP_VALUES * effort.batch * sum(count * size for count, size in job.counts.values())
    start = 0.0
    if method.start == "compensated":
        start = min(cache, compensate.held_bytes(teacher, job.layers, batch) * min(effort.samples, learned))
        start += max((compensate.solving_bytes(layer) for layer in job.layers), default=0)
    return samples + max(start, (kept if kept <= cache else 0.0) + step)


@dataclass
class Feed:
    """Batches for a mirror, `group` of the model's own at a time."""

    batches: sources.Batches
    group: int = 1

    def __len__(self) -> int:
        return -(-self.batches.num_samples // (self.batches.batch_size * self.group))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield what the mirror takes in one run."""
        source = iter(self.batches)
        while group := list(itertools.islice(source, self.group)):
            yield (
                {name: np.concatenate([batch[name] for batch in group]) for name in group[0]} if group[1:] else group[0]
            )

    def subset(self, count: int, seed: int) -> Feed:
        """As `Batches.subset`."""
        return Feed(self.batches.subset(count, seed), self.group)


@dataclass
class Ready:
    """Float teacher and calibrated student, both mirrors of `graph`, and what to feed them."""

    graph: gs.Graph
    teacher: mirror.Mirror
    student: mirror.Mirror
    batches: Feed
    begun: eptq.Tensors | None = None  # the student's state that the method begins with, if that is another


def make_teacher(job: Job) -> tuple[mirror.Mirror, Feed, gs.Graph]:
    """The float mirror, what to feed it, and its graph.

    Models of a small fixed batch run in larger ones where that changes nothing.
    """
    teacher, alone = mirror.build(job.graph).to(job.config.device), Feed(job.batches)
    group = min(GROUP, batch_size_for(job)) // job.batches.batch_size
    free = free_batch(job.graph) if group > 1 else None
    first = [calibrate.feed(teacher, batch) for batch in itertools.islice(job.batches, 3)]
    if free is None or len(first) < 2:
        return teacher, alone, job.graph
    flexible = mirror.build(free).to(job.config.device)
    if mirror.same_on_batches(teacher, flexible, first):
        return flexible, Feed(job.batches, group), free
    return teacher, alone, job.graph


def observed(job: Job, teacher: mirror.Mirror, batches: Feed, graph: gs.Graph, phases: Phases) -> calibrate.Stats:
    """Statistics of all samples, whatever the widths, and on some of them how much the outputs answer to the activations."""
    seen, before = sources.Magnitudes(), phases.seconds.get("calibrate", 0.0)
    stats = calibrate.observe(
        teacher, job.plan, job.layers, seen.watch(phases.over("calibrate", batches, len(batches)), teacher.whole)
    )
    job.pass_seconds = phases.seconds["calibrate"] - before
    outliers = [
        f"{count} of {len(seen.largest[name])} samples of input '{name}' reach {ratio:.0f} times as far as most, and leave few "
        "steps to the others; take them out if the model meets none such in use"
        for name, (count, ratio) in seen.outliers().items()
        if name in job.plan
    ]
    empty = [value for value, histogram in stats.histograms.items() if histogram.min > histogram.max]
    outliers += [
        f"'{value}' is empty in every sample, so its range is a guess; calibrate on samples that fill it, too"
        for value in empty
    ]
    job.report.warn(*outliers)  # statistics may be taken twice, before and after widths are chosen
    if job.config.calibration == "hmse":
        samples, batch = range_samples(job, teacher, batches, graph, stats)
        wanted = batch * gradient_bytes(stats) / 2**20
        if wanted <= job.config.cache_mb:
            with phases("ranges"):
                hessian.weigh_ranges(teacher, graph, job.plan, stats, samples, batch=batch, seed=job.config.seed)
                choose_leaning(job, teacher, graph, stats, samples, batch)
        else:
            job.report.warn(
                f"activation ranges count all errors alike: gradients need {wanted:.0f} MB, more than --cache-mb allows"
            )
    return stats


def range_samples(
    job: Job, teacher: mirror.Mirror, batches: Feed, graph: gs.Graph, stats: calibrate.Stats
) -> tuple[list[torch.Tensor], int]:
    """The samples that activation ranges are weighed and judged on, and how many at a time."""
    samples = load_samples(teacher, batches.subset(weight_samples(job), job.config.seed))
    return samples, gradient_batch(job, graph, max(1, min(RANGE_BATCH, RANGE_BYTES // gradient_bytes(stats))))


def gradient_bytes(stats: calibrate.Stats) -> int:
    """What the gradients of all quantized activations of a sample take, about: values, what autograd keeps, squares."""
    elements = sum(float(histogram.counts.sum()) for histogram in stats.histograms.values())
    return max(1, round(GRADIENT_BYTES * elements / max(1, stats.samples)))


def choose_leaning(
    job: Job,
    teacher: mirror.Mirror,
    graph: gs.Graph,
    stats: calibrate.Stats,
    samples: list[torch.Tensor],
    batch: int,
) -> None:
    """Let elements count by their importance as far as the network with quantized activations comes closest to the float one.

    Gradients are a linear approximation, and tails are seen in few samples: what they say may be too much.
    """
    judge = eptq.Judge(teacher, graph, judged_targets(graph), samples, batch)
    points = Plan({value: point for value, point in job.plan.items() if point.role in ("activation", "constant")})
    readers = calibrate.elementwise_readers(job.graph)
    distances = {}
    for leaning in calibrate.LEANINGS:
        stats.lean(leaning)
        student = mirror.build(graph, points, calibrate.calibrate(points, stats, teacher, "hmse", readers))
        distances[leaning] = judge.distance(student.to(job.config.device))
    stats.lean(min(distances, key=distances.__getitem__))


def calibrated(job: Job, phases: Phases, stats: calibrate.Stats | None = None) -> Ready:
    """Ranges from all samples (`stats`, when they are known), weight scales by their output error, biases corrected."""
    config = job.config
    equalized(job, phases)
    teacher, batches, graph = make_teacher(job)
    if stats is None:
        stats = observed(job, teacher, batches, graph, phases)
    elif stats.is_weighed:  # it was with other widths that they were judged
        with phases("ranges"):
            choose_leaning(job, teacher, graph, stats, *range_samples(job, teacher, batches, graph, stats))
    qparams = calibrate.calibrate(
        job.plan, stats, teacher, config.calibration, calibrate.elementwise_readers(job.graph)
    )
    few = batches.subset(weight_samples(job), config.seed)

    def rounded(calibration: str) -> mirror.Mirror:
        """The student with the weight scales of a calibration, plainly rounded."""
        if calibration == "hmse":
            samples = load_samples(teacher, few)
            with phases("weights"):
                batch = len(calibrate.feed(teacher, next(iter(few)))[0])
                importance = hessian.weight_hessian(teacher, graph, job.layers, samples, batch=batch, seed=config.seed)
                scales = hessian.hmse_scales(job.plan, teacher, importance)
        else:
            scales = calibrate.choose_weight_scales(
                teacher, job.plan, job.layers, phases.over("weights", few, len(few)), calibration
            )
        student = mirror.build(graph, job.plan, qparams | scales).to(config.device)
        if config.bias_correction:
            calibrate.correct_biases(student, teacher, job.plan, job.layers, stats)
        calibrate.fit_biases(student, job.plan)
        return student

    job.report.warnings += saturated(job, stats)
    begun = None
    if METHODS[config.method].ranges == "hmse" != config.weight_calibration:
        begun = dict(rounded("hmse").state_dict())
    return Ready(graph, teacher, rounded(config.weight_calibration), batches, begun)


def saturated(job: Job, stats: calibrate.Stats) -> list[str]:
    """A warning for every score that no sample brought near 1: of what is larger than all that was seen nothing is kept."""
    largest = {
        value: stats.histograms[job.plan.root(value).value].max for value in scores(job.graph) if value in job.plan
    }
    return [
        f"output '{value}' is a score between 0 and 1, but no sample brings it above {most:.2g}, so the file will give none "
        "that is larger; calibrate on samples that the model scores high, too"
        for value, most in largest.items()
        if most < UNSEEN
    ]


def equalized(job: Job, phases: Phases) -> None:
    """Even out channels in the job's graph, once and unless unwanted, and say where."""
    if job.is_equalized or not job.config.equalize:
        return
    few = Feed(job.batches).subset(min(EQUALIZE_SAMPLES, wanted_samples(job)), job.config.seed)
    with phases("equalize"):
        teacher = mirror.build(job.graph).to(job.config.device)
        importance = {}
        readers = [layer for place in find_places(job.graph, job.layers, job.plan) for layer in place.readers]
        if readers and job.config.calibration == "hmse":
            importance = hessian.channel_importance(
                teacher,
                job.graph,
                readers,
                load_samples(teacher, few),
                batch=gradient_batch(job, job.graph, RANGE_BATCH),
                seed=job.config.seed,
            )
        job.report.equalized = equalize(job.graph, teacher, job.plan, job.layers, few, importance)
    job.is_equalized = True


def unmeasured(job: Job) -> Mixed:
    """What widths can be chosen from, without losses; enough to say what fits."""
    config = job.config
    return Mixed(
        job.graph,
        job.plan,
        job.groups,
        job.target.storage,
        job.counts,
        metadata=lambda plan: remarks.metadata(replace(job.report, coverage=measure_coverage(job.graph, plan))),
        opset=config.opset,
        table=None if config.cost_table is None else resources.read_costs(config.cost_table),
        solver_seconds=config.solver_seconds,
        sensitivity=config.sensitivity,
    )


def explored(job: Job, phases: Phases) -> tuple[Mixed, calibrate.Stats | None]:
    """Measure the loss of every width that may be chosen, or read what was measured before; and the statistics, if needed.

    Both are of a copy of the graph (`Mixed.graph`), whose channels are evened out for usual widths (`USUAL`): what evens them
    out best depends on the widths, which are not chosen yet.
    """
    usual = with_widths(job.plan, {group.name: USUAL[group.role] for group in job.groups})
    copy = graphs.copy(job.graph)
    measured = replace(job, graph=copy, layers=linear_layers(copy), plan=usual)
    equalized(measured, phases)
    measured.plan = job.plan
    mixed, config = unmeasured(measured), job.config
    start = time.perf_counter()
    folder = Path(config.sensitivity_cache) if config.sensitivity_cache else sensitivity.default_folder()
    cache = sensitivity.Cache(folder, sensitivity_key(measured))
    missing = cache.missing(job.groups)
    stats = None
    if missing:
        teacher, batches, graph = make_teacher(measured)
        stats = observed(measured, teacher, batches, graph, phases)
        job.pass_seconds = measured.pass_seconds
        batch = gradient_batch(measured, graph, 32)
        judged = weight_samples(job)
        some = batches.subset(min(job.batches.num_samples, judged + FIT_SAMPLES), config.seed)
        setting = sensitivity.Setting(
            graph,
            job.plan,
            linear_layers(graph),
            teacher,
            stats,
            *sensitivity.parted(load_samples(teacher, some), judged),
            batch,
            config.seed,
            config.cache_mb * 2**20,
            config.calibration,
            calibrate.elementwise_readers(copy),
        )
        measure = sensitivity.MEASURES[config.sensitivity]
        for name, row in phases.over("sensitivity", measure(setting, missing), len(missing)):
            cache.add(name, row)
    mixed.losses = cache.losses
    mixed.measure_seconds = time.perf_counter() - start
    return mixed, stats


def sensitivity_key(job: Job) -> str:
    """What measured losses belong to: model, data, where quantizers sit, and how it is measured; not the widths."""
    config = job.config
    plan = with_widths(job.plan, {group.name: 8 for group in job.groups})
    settings = {name: getattr(config, name) for name in MEASURED_WITH}
    parts: list[bytes | str] = [onnx_eptq.__version__, json.dumps(settings), plan.to_json()]
    for sample in job.batches.samples():
        parts += [np.ascontiguousarray(array).tobytes() for array in sample.values()]
    return checkpoint.fingerprint([*parts, *source_parts(job)])


def source_parts(job: Job) -> list[bytes]:
    """The float model as it came, with the constants that may lie beside it."""
    model = job.source.read_bytes() if isinstance(job.source, Path) else job.source.SerializeToString()
    constants = (tensor for tensor in job.graph.tensors().values() if isinstance(tensor, gs.Constant))
    return [model, *(np.ascontiguousarray(tensor.values).tobytes() for tensor in constants)]


@threads.restored()
@torch.inference_mode(False)
@torch.enable_grad()
def explore(
    model: Model, data: Any, *, config: Config | None = None, phases: Phases | None = None, **settings: Any
) -> Mixed:
    """Measure what every width of every quantizer would cost, to choose by: see `Mixed.front` and `Mixed.choose`.

    Args:
        model: as for `quantize`, as are all others.
        data: calibration samples.
        config: all settings at once.
        phases: where progress is shown.
        **settings: single settings; `weight_choices` and `act_choices` are the widths to look at.

    Raises:
        EptqError: as `quantize`.
    """
    phases = phases or Phases()
    return explored(begin(model, data, config=config, explore=True, phases=phases, **settings), phases)[0]


def load_samples(teacher: mirror.Mirror, batches: Feed) -> list[torch.Tensor]:
    """All samples, one tensor per network input, on the mirror's device; images channels last, which convolves faster."""
    parts = [
        [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in calibrate.feed(teacher, batch)]
        for batch in batches
    ]
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def fitted_batch(job: Job, most: int) -> int:
    """Samples to take gradients of together: at most so many, fewer large ones, and a multiple of what the model fixes."""
    fixed = job.batches.batch_size if has_fixed_batch(job) else 1
    return max(1, min(most, LEARN_ELEMENTS // sample_elements(job)) // fixed) * fixed


def runs_alone(job: Job, graph: gs.Graph) -> bool:
    """Whether mirrors of `graph`, the job's or the one freed of its batch, run one of the model's own batches at a time."""
    return has_fixed_batch(job) and graph is job.graph


def gradient_batch(job: Job, graph: gs.Graph, most: int) -> int:
    """Samples that a mirror of `graph` takes gradients of together: as `fitted_batch`, or what the model fixes."""
    return job.batches.batch_size if runs_alone(job, graph) else fitted_batch(job, most)


def sized_effort(job: Job) -> Effort:
    """The effort asked for, with batches fitted to a sample's size and to what the model fixes; smaller ones, more steps."""
    effort = EFFORTS[job.config.effort]
    batch = fitted_batch(job, effort.batch)
    steps = effort.steps * max(1, min(MOST_TIMES, round((effort.batch / batch) ** 0.5)))
    return replace(effort, steps=job.config.steps or steps, batch=batch)


def effort_for(job: Job, ready: Ready) -> Effort:
    """The sized effort, with as many samples for the closed-form start as the memory holds."""
    effort = sized_effort(job)
    first = calibrate.feed(ready.teacher, next(iter(ready.batches)))
    held = compensate.held_bytes(ready.teacher, linear_layers(ready.graph), first)
    fitting = job.config.cache_mb * 2**20 // max(1, held)
    return replace(effort, samples=max(min(effort.samples, LEAST_SAMPLES), min(effort.samples, fitting)))


def learning_cost(job: Job, method: Method, effort: Effort) -> float:
    """What learning costs, in runs of the float model on one sample."""
    steps = sum(max(1.0, effort.steps * stage.share) for stage in method.stages)
    cost = STEP_COST * steps * effort.batch
    if method.start == "compensated":
        algebra = sum(compensate.solving_cost(layer) for layer in job.layers if layer.weight.name in job.plan)
        alone = 2 * algebra / max(1.0, resources.all_macs(job.graph, job.counts))  # in double precision
        cost += effort.starts * (START_COST * effort.samples + alone)
    return cost


def has_fixed_batch(job: Job) -> bool:
    """Whether the model takes one number of samples at a time only."""
    return mirror.feeds_whole(job.graph) or any(isinstance(tensor.shape[0], int) for tensor in job.graph.inputs)


def can_map(job: Job, ready: Ready, samples: Sequence[torch.Tensor]) -> bool:
    """Whether learning may take several samples at once although the model takes one at a time."""
    teacher, graph = ready.teacher, ready.graph
    if job.batches.batch_size != 1 or job.config.compile:
        return False
    raw = pieces.raw_nodes(teacher)
    learned = [raw[name] for name in {*learning_targets(graph), *judged_targets(graph)}]
    if pieces.between(teacher, pieces.placeholders(teacher), learned, decisions(graph)):
        return False  # they may not come sample by sample
    return all(pieces.can_map(mirror, samples) for mirror in (teacher, ready.student))


def most_samples(job: Job, method: Method, effort: Effort) -> int:
    """Samples that learning and its judge can look at: more are not loaded."""
    drawn = sum(max(1, round(effort.steps * stage.share)) for stage in method.stages) * effort.batch
    return max(effort.samples, drawn) + heldout.most(sample_elements(job))


def learning_problem(job: Job, ready: Ready, method: Method | None = None) -> eptq.Problem:
    """What `eptq.Learner` learns from; `method` other than the one asked for is for experiments."""
    config, alone = job.config, runs_alone(job, ready.graph)
    method, effort = method or METHODS[config.method], effort_for(job, ready)
    samples = load_samples(ready.teacher, ready.batches.subset(most_samples(job, method, effort), config.seed))
    return eptq.Problem(
        ready.graph,
        job.plan,
        linear_layers(ready.graph),
        ready.teacher,
        samples,
        method,
        effort,
        seed=config.seed,
        judges=heldout.most(sample_elements(job)),
        multiple=job.batches.batch_size if has_fixed_batch(job) else 1,
        chunk=job.batches.batch_size if alone else 0,
        mapped=alone and can_map(job, ready, samples),
        begun=ready.begun,
        views=config.views,
        cache_bytes=config.cache_mb * 2**20,
        compile=config.compile,
        bf16=config.precision == "bfloat16",
    )


def learned(job: Job, ready: Ready, saved: Path | None, resume: bool, phases: Phases) -> None:
    """Learn the student's rounding, scales and biases; it stays as it is where nothing better is found."""
    problem = learning_problem(job, ready)
    count = len(problem.samples[0])
    parts: list[bytes | str] = [onnx_eptq.__version__, job.plan.to_json(), *source_parts(job)]
    rows = (row.cpu().contiguous().numpy().tobytes() for x in problem.samples for row in x)  # one copy at a time
    mark = checkpoint.mark(job.config.model_dump(mode="json"), itertools.chain(parts, rows))
    state = None
    if resume and saved is not None and saved.exists():
        state = checkpoint.load(saved, mark)
    elif resume:
        phases.note("no checkpoint to go on from: learning starts anew")
    elif saved is not None and saved.exists():
        phases.note(f"an earlier run left {saved}; without --resume it is replaced")
    learner = eptq.Learner(problem, ready.student, None if saved is None else (saved, mark), state)
    each = job.pass_seconds / job.report.samples
    seconds = learning_cost(job, problem.method, problem.effort) * each
    phases.note(f"learn      {learner.total} steps of {problem.effort.batch} samples, about {seconds:.0f} s")
    try:
        for _ in phases.over("learn", learner, learner.total):
            pass
    except KeyboardInterrupt:
        if saved is not None and saved.exists():
            phases.note("--resume goes on with what was learned so far")
        raise
    job.report.learning = learning = learner.learning
    job.report.warn(*remarks.judged_on_little(learning, count))
    if learner.learning.kept == "rtn":
        job.report.warnings.append(
            "learning found nothing better than plain rounding by more than chance; that is kept"
        )


def finish(job: Job, student: mirror.Mirror, output: str | os.PathLike[str] | None, phases: Phases) -> onnx.ModelProto:
    """Write, verify, and only then put the file in place."""
    report = job.report
    quantized = student.export(job.plan)
    written = write(job.graph, job.plan, quantized, job.target.storage, opset=job.config.opset)
    with graphs.staging(output) as staged:
        staged.write(written)
        with phases("verify"):
            count = max(1, min(PARITY_SAMPLES, PARITY_SAMPLES * IMAGE_ELEMENTS // sample_elements(job)))
            few = job.batches.subset(count, job.config.seed)
            report.parity = verify.check_parity(
                staged.path, student, job.plan, job.layers, quantized, few, report.threads, decisions(job.graph)
            )
        onnx.helper.set_model_props(written, {**remarks.properties(written), **remarks.metadata(report)})
        staged.set_metadata(remarks.properties(written))
        with phases("compare"):
            many = max(
                LEAST_FIDELITY, min(FIDELITY_SAMPLES, 2 * FIDELITY_SAMPLES * IMAGE_ELEMENTS // sample_elements(job))
            )
            some = job.batches.subset(many, job.config.seed)
            fidelity_at = functools.partial(
                verify.measure_fidelity,
                job.source,
                staged.path,
                some,
                report.threads,
                selections(job.graph),
                class_axes(job.graph),
                mirror.feeds_whole(job.graph),
                decisions(job.graph),
            )
            report.fidelity = fidelity_at()
            deviating = remarks.deviating(report.parity, report.fidelity)
            exact = fidelity_at(level="basic") if deviating else report.fidelity
        # The column of a rare class is small, as it should be.
        shares = {tensor.name for tensor in job.graph.outputs if is_score(tensor)}
        report.fidelity.worst = {name: found for name, found in report.fidelity.worst.items() if name not in shares}
        narrow = any(point.grid.bits < 8 for point in job.plan.values())
        losses = remarks.low_fidelity(
            report.fidelity, "try more bits" if narrow else remarks.AT_MOST, report.coverage.float_values
        )
        losses += remarks.runtime_losses(deviating, report.fidelity, exact)
        report.warnings[:0] = losses  # first, as only the first ones are printed
        report.bytes = graphs.file_bytes(staged.path)
        if report.notes_bytes > remarks.MANY_NOTES * report.bytes:
            report.warnings.append(remarks.notes_of(report))
        if output is not None:
            staged.publish()
    return written
