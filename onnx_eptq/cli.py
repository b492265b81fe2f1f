"""The command line: arguments in, a report and an exit code out."""

from __future__ import annotations

import inspect
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from onnx_eptq import __version__
from onnx_eptq.errors import EptqError, UsageError

EXIT_CODES = """Exit codes: 0 done; 2 wrong usage; 3 the model cannot be read or quantized; 4 the calibration data does not fit;
5 the output cannot be written; 6 the written file failed verification; 7 --strict and a layer would stay float; 130
interrupted (no model is written; --resume goes on with learning).

`onnx-eptq sensitivity MODEL DATA` shows size against expected loss, to choose a budget by."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
DATA, QUANT, BUDGET, RUN = "Calibration data", "Quantization", "Mixed precision", "Run"


def option(panel: str, text: str, *names: str, metavar: str | None = None) -> Any:
    """A typer option of one help panel."""
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onnx-eptq {__version__}")
        raise typer.Exit


@app.command(epilog=EXIT_CODES)
def quantize(
    model: Annotated[Path, typer.Argument(help="The float ONNX model", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Calibration samples: a folder of images (recursive), .npy, .npz, or ONNX test_data_set_* folders",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, option(RUN, "The file to write; MODEL with _int4, _int8, ... added by default", "-o", "--output")
    ] = None,
    weight_bits: Annotated[
        str | None,
        option(
            QUANT,
            "Bits per weight, 2 to 8, or several to choose from: 2,4,8 [8]",
            "-w",
            "--weight-bits",
            metavar="BITS",
        ),
    ] = None,
    act_bits: Annotated[
        str | None,
        option(
            QUANT, "Bits per activation, or several; inputs and outputs keep 8 [8]", "-a", "--act-bits", metavar="BITS"
        ),
    ] = None,
    method: Annotated[
        str | None,
        option(
            QUANT,
            "How weights are rounded: rtn (to the nearest integer), or learned: adaround, adaquant, brecq, qdrop, eptq-v1, "
            "eptq-v2, eptq [eptq]",
        ),
    ] = None,
    effort: Annotated[str | None, option(QUANT, "How long learning takes: fast, default, thorough [default]")] = None,
    steps: Annotated[int | None, option(QUANT, "Steps of learning per piece [by the effort]")] = None,
    target: Annotated[
        str | None,
        option(QUANT, "What the file is for: onnxruntime, or onnx for plain INT4 initializers [onnxruntime]"),
    ] = None,
    storage: Annotated[
        str | None, option(QUANT, "How weights of 4 bits and less are stored: int8, int4, cast, lut [the target's]")
    ] = None,
    opset: Annotated[
        int | None, option(QUANT, "Opset of the file, 13 to 21; below 21 without 4-bit tensors [21]")
    ] = None,
    strip_notes: Annotated[
        bool | None,
        option(
            QUANT,
            "Leave out what the exporter noted on nodes and values (metadata, doc strings) [keep]",
            "--strip-notes/--keep-notes",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        option(QUANT, "Activation ranges by: hmse (error weighted by LFH), mse, minmax, percentile, entropy [hmse]"),
    ] = None,
    weight_calibration: Annotated[
        str | None, option(QUANT, "Weight scales by: output (the layer's output error), absmax, mse, hmse [output]")
    ] = None,
    bias_correction: Annotated[
        bool | None,
        option(
            QUANT, "Add the mean error of rounded weights to the biases [on]", "--bias-correction/--no-bias-correction"
        ),
    ] = None,
    equalize: Annotated[
        bool | None,
        option(
            QUANT,
            "Even out channels between layers where that lowers the layers' error [on]",
            "--equalize/--no-equalize",
        ),
    ] = None,
    bits: Annotated[
        list[str] | None,
        option(
            QUANT,
            "Other bits for a layer or tensor (conv1=8, conv*=4,8), may be repeated; alone (2,4,8) the same as -w",
            "--bits",
            metavar="[PATTERN=]BITS",
        ),
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        option(
            QUANT, "A layer, operator type or tensor kept float, may be repeated", "--keep-float", metavar="PATTERN"
        ),
    ] = None,
    compression: Annotated[
        float | None, option(BUDGET, "How many times smaller than float32 the weights must become", metavar="RATIO")
    ] = None,
    max_weight_bytes: Annotated[
        str | None, option(BUDGET, "Bytes that the weights may take: 60000, 60KB, 58KiB", metavar="SIZE")
    ] = None,
    max_size: Annotated[str | None, option(BUDGET, "Bytes that the whole file may take: 300KB", metavar="SIZE")] = None,
    max_activation_memory: Annotated[
        str | None, option(BUDGET, "Bytes of activations that may be alive at once, for one sample", metavar="SIZE")
    ] = None,
    max_bops: Annotated[
        str | None,
        option(
            BUDGET, "Bit operations of one sample (weight bits x activation bits x products): 1.5G", metavar="NUMBER"
        ),
    ] = None,
    cost_table: Annotated[
        str | None, option(BUDGET, "JSON file of costs by operator, shape and bits; see the README", metavar="FILE")
    ] = None,
    max_cost: Annotated[
        float | None, option(BUDGET, "What all layers together may cost by that table", metavar="NUMBER")
    ] = None,
    sensitivity: Annotated[
        str | None,
        option(
            BUDGET,
            "What each width would lose: local (error of a layer, weighted by LFH), or output (of the network, slower) [local]",
        ),
    ] = None,
    sensitivity_cache: Annotated[
        str | None,
        option(BUDGET, "Folder where they are kept for the next budget [~/.cache/onnx-eptq]", metavar="FOLDER"),
    ] = None,
    solver_seconds: Annotated[
        float | None, option(BUDGET, "Time to choose in; the best choice found then is taken [60]")
    ] = None,
    plan_out: Annotated[Path | None, option(QUANT, "Write the plan (where quantizers sit) as JSON")] = None,
    plan_in: Annotated[Path | None, option(QUANT, "Use an edited plan instead of making one")] = None,
    num_samples: Annotated[int | None, option(DATA, "Use this many samples, chosen at random [all]")] = None,
    batch_size: Annotated[int | None, option(DATA, "Samples per batch [by their size, at most 32]")] = None,
    preset: Annotated[
        str | None,
        option(DATA, "Image preprocessing by name: imagenet, unit, raw, tf, caffe, clip, cifar10, ... [unit]"),
    ] = None,
    scale: Annotated[float | None, option(DATA, "x = (pixel * SCALE - mean) / std, pixels in 0..255 [1/255]")] = None,
    mean: Annotated[str | None, option(DATA, "Mean per channel, after the scale", metavar="A,B,C")] = None,
    std: Annotated[str | None, option(DATA, "Standard deviation per channel, after the scale", metavar="A,B,C")] = None,
    resize: Annotated[str | None, option(DATA, "256 for the short side, or HxW to stretch [the model's size]")] = None,
    crop: Annotated[str | None, option(DATA, "Centre crop: 224, or HxW")] = None,
    color: Annotated[str | None, option(DATA, "Channel order of the model: rgb or bgr [rgb]")] = None,
    layout: Annotated[str | None, option(DATA, "nchw or nhwc [read off the model's input]")] = None,
    views: Annotated[
        int | None, option(RUN, "Views of each colour image to learn from [1 to 4, by the number of images]")
    ] = None,
    cache_mb: Annotated[
        int | None,
        option(RUN, "Memory for the float model's outputs, its gradients, and for solving layers, in MB [1024]"),
    ] = None,
    compile: Annotated[bool | None, option(RUN, "Compile the learning step with torch.compile", "--compile")] = None,
    precision: Annotated[str | None, option(RUN, "Arithmetic of learning: float32 or bfloat16 [float32]")] = None,
    resume: Annotated[
        bool, option(RUN, "Go on where an interrupted run with the same output and settings stopped", "--resume")
    ] = False,
    random_calibration: Annotated[
        bool, option(DATA, "Calibrate on random numbers: for trying things out only", "--random-calibration")
    ] = False,
    random_shapes: Annotated[
        list[str] | None,
        option(
            DATA,
            "Size of an input's random numbers where the model leaves it open: image=1x3x224x224; may be repeated",
            "--random-shape",
            metavar="INPUT=DIMS",
        ),
    ] = None,
    dry_run: Annotated[bool, option(RUN, "Print plan, coverage and an estimate, then stop", "--dry-run")] = False,
    strict: Annotated[bool, option(RUN, "Fail when a layer with weights would stay float", "--strict")] = False,
    seed: Annotated[int | None, option(RUN, "Decides every random choice [0]")] = None,
    threads: Annotated[int | None, option(RUN, "CPU threads, 0 for one per core, fewer for small models [0]")] = None,
    device: Annotated[str | None, option(RUN, "Where the simulation runs: cpu, cuda, cuda:1 [cpu]")] = None,
    config: Annotated[Path | None, option(RUN, "Read settings from a YAML file; options win over it")] = None,
    save_config: Annotated[Path | None, option(RUN, "Write all settings as a YAML file")] = None,
    as_json: Annotated[bool, option(RUN, "Print the report as JSON", "--json")] = False,
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="More messages", rich_help_panel=RUN)] = 0,
    quiet: Annotated[bool, option(RUN, "Print nothing but errors, and what --json asks for", "-q", "--quiet")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Quantize a float ONNX MODEL to low-bit integers, calibrated on the samples in DATA, and verify the result.

    With a budget (--compression, --max-size, ...), every layer gets the bits that lose least.
    """
    _log(verbose, quiet)
    given = _given(locals())
    try:
        flags = _Flags(dry_run, strict, resume, as_json, quiet)
        _run(model, data, output, given, (plan_in, plan_out), config, save_config, flags)
    except KeyboardInterrupt:
        typer.echo("interrupted; no model was written", err=True)
        raise typer.Exit(130) from None


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The settings among the options of a command, as `Config` takes them."""
    found = {name: value for name, value in options.items() if value is not None and name in _settings()}
    for name, read in READERS.items():
        if name in found:
            found[name] = read(f"--{name.replace('_', '-')}", found[name])
    alone = [text for text in found.pop("bits", None) or () if "=" not in text]
    overrides = dict(_override(text) for text in options.get("bits") or () if "=" in text)
    if overrides:
        found["bits"] = overrides
    if len(alone) > 1 or (alone and "weight_bits" in found):
        raise UsageError("the bits of weights are given twice; give -w or --bits once without a pattern")
    if alone:
        found["weight_bits"] = _widths("--bits takes PATTERN=BITS, such as 'conv1=8'; without a pattern it", alone[0])
    from_file = _load(options["config"]) if options.get("config") else None
    if overrides and from_file:  # the first pattern that fits counts
        found["bits"] = {**overrides, **{name: bits for name, bits in from_file.bits.items() if name not in overrides}}
    budgets = any(found.get(name) is not None for name in _budgets()) or bool(from_file and from_file.budgets)
    for name, choices in (("weight_bits", "weight_choices"), ("act_bits", "act_choices")):
        widths = found.pop(name, None)
        if widths is not None and (len(widths) > 1 or budgets):
            found[choices] = widths
        elif widths is not None:
            found[name] = widths[0]
    for name in ("keep_float", "random_shapes"):
        if not found.get(name):
            found.pop(name, None)
    data, random = options.get("data"), options.get("random_calibration")
    if not random:
        found.pop("random_calibration", None)  # a config file may have asked for it
    if data is None and not random and not (from_file and from_file.random_calibration):
        raise UsageError(
            "give calibration samples (a folder of images, .npy or .npz), or --random-calibration to try out"
        )
    if data is not None and random:
        raise UsageError(f"--random-calibration and the data {data} exclude each other; give one of them")
    return found


def _load(path: Path) -> Any:
    from onnx_eptq.config import Config

    return Config.load(path)


class _Flags(NamedTuple):
    """What is asked of this run alone."""

    dry_run: bool
    strict: bool
    resume: bool
    as_json: bool
    quiet: bool


def _settings() -> set[str]:
    from onnx_eptq.config import Config

    return set(Config.model_fields)


def _run(
    model: Path,
    data: Path | None,
    output: Path | None,
    given: dict[str, Any],
    plans: tuple[Path | None, Path | None],
    config_file: Path | None,
    save_config: Path | None,
    flags: _Flags,
) -> None:
    """Import what is slow only when it is needed, so that help and wrong usage answer at once."""
    from onnx_eptq.config import Config

    config = Config.load(config_file, **given) if config_file else Config.make(**given)
    plan_in, plan_out = plans
    if plan_in and {"weight_bits", "act_bits"} & given.keys():
        raise UsageError("the plan that is given says every width already; edit it instead of giving -w or -a")
    kind = "quantized" if plan_in else "mixed" if config.budgets else f"int{config.weight_bits}"
    output = output or model.with_name(f"{model.stem}_{kind}.onnx")
    table = Path(config.cost_table) if config.cost_table else None
    texts = {"--plan-out": plan_out, "--save-config": save_config}
    written = {f"-o's {part}": Path(f"{output}.{part}") for part in ("checkpoint", "data")} | texts
    # That -o is neither the model nor the data is for `checks.check_output` to see.
    _check_files({"the model": model, "the data": data}, written)
    _check_files({"--plan-in": plan_in, "--config": config_file, "--cost-table": table}, {"-o": output} | written)
    _check_writable(texts)

    from onnx_eptq import graph, pipeline
    from onnx_eptq.plan import Plan
    from onnx_eptq.report import Phases, console

    plan = Plan.from_json(_read(plan_in)) if plan_in else None
    if any(texts.values()):
        _check_files({f"the model's weights {path.name}": path for path in graph.data_files(model)}, texts)
    if save_config:
        config.save(save_config)
    phases = Phases(console(flags.quiet))
    options: dict[str, Any] = {"config": config, "plan": plan, "strict": flags.strict, "phases": phases}
    if flags.dry_run:
        job = pipeline.begin(model, data, output, **options)
        job.report.estimate = pipeline.estimate(job)
        plan, report = job.plan, job.report
        report.output = None
        if job.groups:
            report.warnings.append("these are the widest bits allowed; a run chooses among them within the budget")
        if not flags.as_json and not flags.quiet:
            typer.echo(str(plan))
    else:
        result = pipeline.quantize(model, data, output, resume=flags.resume, **options)
        plan, report = result.plan, result.report
    if flags.as_json:
        typer.echo(report.to_json())
    elif not flags.quiet:
        typer.echo(str(report))
    if plan_out:
        _write(plan_out, plan.to_json())


def _log(verbose: int, quiet: bool) -> None:
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("onnx_eptq").setLevel(level)


def _budgets() -> tuple[str, ...]:
    from onnx_eptq.config import BUDGETS

    return BUDGETS


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{name} takes numbers with commas between them, such as 0.5,0.5,0.5, not {text!r}") from None


def _widths(name: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise UsageError(f"{name} takes a number of bits, or several with commas between them (2,4,8), not {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _override(text: str) -> tuple[str, int | tuple[int, ...]]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not all(part.isascii() and part.isdigit() for part in bits.split(",")):
        raise UsageError(f"--bits takes PATTERN=BITS, such as 'conv1=8' or 'conv*=4,8', not {text!r}")
    widths = _widths("--bits", bits)
    return pattern, widths[0] if len(widths) == 1 else widths


def _amount(name: str, text: str) -> float:
    from onnx_eptq.config import amount

    try:
        return amount(text)
    except ValueError as error:
        raise UsageError(f"{name}: {error}, not {text!r}") from None


def _shapes(_: str, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    found = [re.fullmatch(r"(.+)=([1-9][0-9]*(?:x[1-9][0-9]*)*)", text.strip()) for text in texts]
    if not all(found):
        wrong = next(text for text, match in zip(texts, found, strict=True) if not match)
        raise UsageError(f"--random-shape takes INPUT=DIMS, such as image=1x3x224x224, not {wrong!r}")
    return {match[1]: tuple(map(int, match[2].split("x"))) for match in found if match}


def _size(name: str, text: str) -> int:
    return int(_amount(name, text))


READERS: dict[str, Callable[[str, Any], Any]] = {
    "weight_bits": _widths,
    "act_bits": _widths,
    "mean": _numbers,
    "std": _numbers,
    "keep_float": lambda _, values: tuple(values),
    "random_shapes": _shapes,
    "max_weight_bytes": _size,
    "max_size": _size,
    "max_activation_memory": _size,
    "max_bops": _amount,
}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None


def _check_files(read: Mapping[str, Path | None], written: Mapping[str, Path | None]) -> None:
    """Raise UsageError where a file of the run would replace another one."""
    taken = {os.path.realpath(path): option for option, path in read.items() if path}
    for option, path in written.items():
        other = taken.setdefault(os.path.realpath(path), option) if path else option
        if other != option:
            raise UsageError(f"{option} and {other} name the same file {path}; choose another name")


def _check_writable(texts: Mapping[str, Path | None]) -> None:
    """Raise UsageError where a text file could not be written."""
    for path in filter(None, texts.values()):
        if path.is_dir():
            raise UsageError(f"cannot write {path}: it is a folder")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}: its folder does not exist")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise UsageError(f"cannot write {path}: no permission")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


explorer = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
SHARED = (  # options of `quantize` that decide what there is to choose from
    "model", "data", "weight_bits", "act_bits", "bits", "keep_float", "target", "storage", "opset", "calibration",
    "bias_correction", "compression", "max_weight_bytes", "max_size", "max_activation_memory", "max_bops", "cost_table",
    "max_cost", "sensitivity", "sensitivity_cache", "solver_seconds", "num_samples", "batch_size", "preset", "scale", "mean",
    "std", "resize", "crop", "color", "layout", "cache_mb", "random_calibration", "random_shapes", "seed", "threads", "device",
    "as_json", "verbose", "quiet",
)  # fmt: skip


def explore(
    *,
    points: Annotated[int, option(RUN, "How many sizes are tried [12]")] = 12,
    chart: Annotated[
        Path | None, option(RUN, "Draw the front into a file (.png, .svg, .pdf); needs matplotlib")
    ] = None,
    **options: Any,
) -> None:
    """Show what each width of each quantizer of MODEL would lose, and size against expected loss.

    Budgets hold for every row. Nothing is written but the chart; what was measured is kept
    for the next run, also of the other command.
    """
    _log(options["verbose"], options["quiet"])
    given = _given(options)
    if "weight_bits" in given:  # also one that is the default elsewhere
        given["weight_choices"] = (given.pop("weight_bits"),)
    from onnx_eptq import front, pipeline
    from onnx_eptq.config import Config
    from onnx_eptq.report import Phases, console

    if points < 2:
        raise UsageError(f"--points takes 2 or more, not {points}")
    if chart is not None:
        front.check_chart(chart)
    config = Config.make(**given)
    phases = Phases(console(options["quiet"]))
    try:
        mixed = pipeline.explore(options["model"], options["data"], config=config, phases=phases)
    except KeyboardInterrupt:
        typer.echo("interrupted; what was measured is kept for the next run", err=True)
        raise typer.Exit(130) from None
    found = mixed.front(points, **config.budgets)
    if chart is not None:
        front.chart(found, chart)
    if options["as_json"]:
        typer.echo(front.to_json(mixed, found))
    elif not options["quiet"]:
        front.show(mixed, found)


def _with_options_of_quantize(command: Callable[..., None]) -> Callable[..., None]:
    """Let the command take the options in `SHARED`, beside its own."""
    shared = inspect.signature(quantize, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [shared[name] for name in SHARED] + [p for p in own if p.kind is not p.VAR_KEYWORD]
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    command.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in keywords}
    return command


explorer.command(name="sensitivity", epilog=EXIT_CODES)(_with_options_of_quantize(explore))


def main() -> None:
    """Entry point: run the command, turn errors into one line and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing half-written stays behind then, either
    try:
        if sys.argv[1:2] == ["sensitivity"]:
            explorer(sys.argv[2:], prog_name="onnx-eptq sensitivity")
        app()
    except EptqError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        # A name is too long, for example; what fails at its work is caught where it does.
        typer.echo(f"error: {error.filename}: {error.strerror}", err=True)
        sys.exit(UsageError.exit_code)
