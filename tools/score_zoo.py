"""Take every file of the zoo (`export_zoo.py`) through the whole of onnx-eptq, and tell how it fared.

score_zoo.py [--zoo FOLDER] [--only NAME ...] [--small] [--exporter E] [--opset N] [--steps 100] [--out FILE.jsonl] ...

Per file: plain rounding at W4A8, written and verified (coverage: share of the bytes of float constants and of the
multiplications whose operands are both quantized); the signal-to-noise ratio per output at W8A8 beside that of ONNX Runtime's
`quantize_static` (per channel, MinMax, after `quant_pre_process`) on the same samples. Per model, in the exporter's form
that comes up in turn (`--learn all`: in all of them): some steps of default learning, whether they lower the distance on
held-out samples, seconds per step and peak memory, in a process of its own. What is found in `--out` is not made again.
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import markdown, run_measured
from export_zoo import CACHE, FORMS, MODELS, Input, choose_forms, chosen, file_name, forms, samples

CALIBRATION, HELD = 64, 32  # samples
GOALS = {"cnn": 99.0, "other": 97.0}  # percent of bytes and multiplications in low bit
SLACK = 0.5  # dB that two ways of choosing ranges may differ by


def inputs_of(path: Path) -> tuple[list[Input], int | None]:
    """What the file is fed with, and the batch it fixes."""
    facts = json.loads(path.with_suffix(".json").read_text())
    return [Input(item["name"], item["kind"], tuple(item["shape"])) for item in facts["inputs"]], facts["batch"]


def calibration(path: Path) -> list[dict[str, Any]]:
    """Samples for the file, one dict each."""
    return _single(samples(inputs_of(path)[0], CALIBRATION, 2))


def held_out(path: Path) -> Iterator[dict[str, Any]]:
    """Samples that nothing is calibrated with, in batches that the file takes."""
    inputs, batch = inputs_of(path)
    arrays = samples(inputs, HELD, 3)
    for start in range(0, HELD, batch or 8):
        yield {name: array[start : start + (batch or 8)] for name, array in arrays.items()}


def _single(arrays: dict[str, Any]) -> list[dict[str, Any]]:
    count = len(next(iter(arrays.values())))
    return [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)]


# ------------------------------------------------------------------------------------------------------ parts of a score


def rounded(path: Path, weight_bits: int, threads: int) -> dict[str, Any]:
    """Plain rounding with 8-bit activations: coverage, parity, fidelity of the written file."""
    from onnx_eptq import pipeline, verify
    from onnx_eptq.outputs import selections
    from onnx_eptq.report import Phases

    phases = Phases()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "q.onnx"
        job = pipeline.begin(
            path, calibration(path), output, method="rtn", weight_bits=weight_bits, threads=threads, phases=phases
        )
        ready = pipeline.calibrated(job, phases)
        pipeline.finish(job, ready.student, output, phases)
        selected = selections(job.graph)
        fidelity = verify.measure_fidelity(path, output, held_out(path), threads, selected)
        size = output.stat().st_size
    report, parity = job.report, job.report.parity
    assert parity is not None
    coverage = report.coverage
    done, all_of_it = multiplications(ready, job.plan, next(held_out(path)))
    return {
        "bytes_percent": round(100 * coverage.quantized_bytes / max(coverage.bytes, 1), 2),
        "macs_percent": round(100 * done / max(all_of_it, 1), 2),
        "layers": f"{coverage.quantized_layers}/{coverage.layers}",
        "floats": {**coverage.float_values, **coverage.float_layers},
        "parity": {
            "float": [parity.float_differences, parity.float_elements],
            "integer": [parity.integer_differences, parity.integer_elements],
            "fused": [parity.fused_differences, parity.fused_elements, parity.fused_max_steps],
            "basic_equals_off": parity.basic_equals_off,
        },
        "sqnr_db": fidelity.sqnr_db,
        "ratio": round(report.float_bytes / size, 2),
        "seconds": {name: round(value, 1) for name, value in phases.seconds.items()},
    }


def multiplications(ready: Any, plan: Any, batch: dict[str, Any]) -> tuple[int, int]:
    """Multiplications of linear operators on one batch: those whose operands are both quantized, and all."""
    import onnx_graphsurgeon as gs
    import torch

    from onnx_eptq.calibrate import feed
    from onnx_eptq.mirror import Probe

    shapes: dict[str, tuple[int, ...]] = {}

    def see(value: str, x: Any) -> Any:
        shapes[value] = tuple(x.shape)
        return x

    with torch.no_grad():
        Probe(ready.teacher, see).run(*feed(ready.teacher, batch))
    done = total = 0
    for node in ready.graph.nodes:
        count = COUNTS.get(node.op)
        if count is None:
            continue
        sizes = [
            tuple(t.values.shape) if isinstance(t, gs.Constant) else shapes.get(t.name, ()) for t in node.inputs[:3]
        ]
        number = count(node, sizes, shapes[node.outputs[0].name])
        total += number
        done += number if all(tensor.name in plan for tensor in node.inputs[:2]) else 0
    return done, total


def _gemm(node: Any, inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    return math.prod(output) * inputs[0][0 if node.attrs.get("transA", 0) else 1]


def _einsum(node: Any, inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    terms = node.attrs["equation"].replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, inputs, strict=False):
        sizes |= dict(zip(term, shape, strict=True))
    return math.prod(sizes.values())


def _recurrent(node: Any, inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    return math.prod(inputs[0][:2]) * (math.prod(inputs[1]) + math.prod(inputs[2]))


COUNTS = {
    "Conv": lambda node, inputs, output: math.prod(output) * math.prod(inputs[1][1:]),
    "ConvTranspose": lambda node, inputs, output: math.prod(inputs[0]) * math.prod(inputs[1][1:]),
    "Gemm": _gemm,
    "MatMul": lambda node, inputs, output: math.prod(output) * inputs[0][-1],
    "Einsum": _einsum,
    "GRU": _recurrent,
    "LSTM": _recurrent,
}


def prepared_graph(path: Path) -> Any:
    """The graph that the file is planned on."""
    from onnx_eptq import graph as graphs
    from onnx_eptq.prepare import prepare

    graph = graphs.load(path)
    prepare(graph)
    return graph


def static(path: Path, threads: int) -> dict[str, Any]:
    """`quantize_static` on the same samples."""
    import logging

    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from ort_static import Reader, limit_threads

    from onnx_eptq import verify
    from onnx_eptq.outputs import selections

    logging.disable(logging.CRITICAL)  # it warns once per tensor
    limit_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        prepared, output = Path(folder) / "prepared.onnx", Path(folder) / "q.onnx"
        source = str(path.resolve())
        with contextlib.chdir(folder):  # where it fails, it leaves files
            try:
                quant_pre_process(source, str(prepared))
            except Exception:  # its symbolic shape inference does not know every graph
                quant_pre_process(source, str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(output),
            Reader(iter(calibration(path))),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        selected = selections(prepared_graph(path))
        return {"sqnr_db": verify.measure_fidelity(path, output, held_out(path), threads, selected).sqnr_db}


def learned(path: Path, steps: int, batch: int, threads: int) -> dict[str, Any]:
    """Default learning at W4A8: distances on held-out samples at the start and after the steps, seconds per step."""
    import resource

    from onnx_eptq import eptq, pipeline
    from onnx_eptq.report import Phases

    job = pipeline.begin(path, calibration(path), weight_bits=4, steps=steps, threads=threads)
    ready = pipeline.calibrated(job, Phases())
    problem = pipeline.learning_problem(job, ready)
    if not pipeline.has_fixed_batch(job):
        problem.effort = replace(problem.effort, batch=batch)
    learner = eptq.Learner(problem, ready.student)
    marks = [time.perf_counter()]
    for _ in learner:
        marks.append(time.perf_counter())
    distances = learner.learning.distances
    gaps = sorted(after - before for before, after in itertools.pairwise(marks))
    return {
        "distances": distances,
        "kept": learner.learning.kept,
        "steps": len(gaps),
        "s_per_step": round(gaps[len(gaps) // 2], 3) if gaps else None,
        "batch": problem.effort.batch,
        "learn_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


PARTS = {
    "w4a8": lambda path, options: rounded(path, 4, options.threads),
    "w8a8": lambda path, options: rounded(path, 8, options.threads),
    "static": lambda path, options: static(path, options.threads),
    "learned": lambda path, options: learned(path, options.steps, options.batch, options.threads),
}

# ---------------------------------------------------------------------------------------------------------------- verdicts


def complaints(row: dict[str, Any]) -> list[str]:
    """What the file misses."""
    found = []
    for part in PARTS:
        if "error" in row.get(part, {}) and part != "static":
            found.append(f"{part}: {row[part]['error']}")
    w4 = row.get("w4a8", {})
    goal = GOALS[row["family"]]
    for what in ("bytes_percent", "macs_percent"):
        if what in w4 and w4[what] < goal:
            found.append(f"{what} {w4[what]} < {goal:g}")
    ours, theirs = row.get("w8a8", {}).get("sqnr_db", {}), row.get("static", {}).get("sqnr_db", {})
    for name in ours.keys() & theirs.keys():
        if None not in (ours[name], theirs[name]) and ours[name] < theirs[name] - SLACK:
            found.append(f"{name}: {ours[name]} dB < quantize_static's {theirs[name]} dB")
    learning = row.get("learned", {})
    distances = learning.get("distances", {})
    if min(distances, key=distances.__getitem__, default="") == "rtn":
        found.append("learning found nothing better than rtn")
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """A Markdown table, a line per file."""
    header = ["model", "form", "bytes %", "MACs %", "off by one", "W8A8 dB", "quantize_static dB", "W4A8 dB",
              "held-out: rtn, start, learned", "s/step", "MB learning", "misses"]  # fmt: skip
    return markdown(header, [_line(row) for row in rows])


def _decibels(part: dict[str, Any]) -> str:
    if "error" in part:
        return "fails"
    return " / ".join("-" if value is None else f"{value:.1f}" for value in part.get("sqnr_db", {}).values())


def _line(row: dict[str, Any]) -> list[object]:
    w4, learning = row.get("w4a8", {}), row.get("learned", {})
    parity = w4.get("parity")
    distances = learning.get("distances", {})
    learned = {name: distance for name, distance in distances.items() if name[0].isdigit()}  # stages have numbers
    starts = {name: distance for name, distance in distances.items() if name != "rtn" and name not in learned}
    curve = [distances.get("rtn"), *(min(found.values(), default=None) for found in (starts, learned))]
    return [
        row["model"],
        f"{row['exporter']} {row['opset']}",
        w4.get("bytes_percent"),
        w4.get("macs_percent"),
        None if parity is None else f"{parity['float'][0]} of {parity['float'][1]:,}",
        _decibels(row.get("w8a8", {})),
        _decibels(row.get("static", {})),
        _decibels(w4),
        ", ".join("-" if value is None else f"{value:.3g}" for value in curve) if distances else None,
        learning.get("s_per_step"),
        learning.get("learn_mb"),
        "; ".join(complaints(row)) or "",
    ]


# -------------------------------------------------------------------------------------------------------------------- main


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=CACHE, help="the folder of export_zoo.py")
    choose_forms(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--forms", choices=["turn", "all"], default="all", help="of each model one form in turn, or all"
    )
    parser.add_argument("--learn", choices=["turn", "all"], default="turn", help="which of these forms learn")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="samples of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON lines; files found there with all their parts are left out")
    parser.add_argument("--child", nargs="+", metavar=("FILE", "PART"), help=argparse.SUPPRESS)
    return parser.parse_args()


def child(options: argparse.Namespace) -> int:
    """Make some parts, and print what they found as the last line."""
    path, *parts = options.child
    found: dict[str, Any] = {}
    for part in parts:
        started = time.perf_counter()
        try:
            found[part] = PARTS[part](Path(path), options)
        except Exception as error:
            traceback.print_exc()
            found[part] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:400]}"}
        found[part]["wall_s"] = round(time.perf_counter() - started, 1)
    print(json.dumps(found))
    return 0


def score(path: Path, parts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """The missing parts of one file; learning in a process of its own, whose memory is its."""
    found: dict[str, Any] = {}
    settings = [f"--{name}={getattr(options, name)}" for name in ("steps", "batch", "threads")]
    together = [part for part in parts if part != "learned"]
    for group in (together, [part for part in parts if part == "learned"]):
        if not group:
            continue
        ran = run_measured([sys.executable, __file__, *settings, "--child", str(path), *group], options.threads)
        lines = ran.stdout.strip().splitlines()
        broken = {part: {"error": ran.complaint} for part in group}
        found |= json.loads(lines[-1]) if ran.code == 0 and lines else broken
        if any("error" in found[part] for part in group if part != "static"):
            print(ran.stderr, file=sys.stderr)
    return found


def load(path: Path | None) -> dict[str, dict[str, Any]]:
    """Rows by file name; a later line adds to an earlier one."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path and path.exists() else []:
        row = json.loads(line)
        rows.setdefault(row["file"], {}).update(row)
    return rows


def main() -> int:
    options = arguments()
    if options.child:
        return child(options)
    rows, shown = load(options.out), []
    names = chosen(options)
    for index, name in enumerate(MODELS):
        if name not in names:
            continue
        for form in forms(options):
            path = options.zoo / file_name(name, *form)
            if not path.exists():
                continue
            turn = form == FORMS[index % len(FORMS)] or len(forms(options)) == 1
            wanted = [part for part in options.parts if part != "learned" or turn or options.learn == "all"]
            if options.forms == "turn" and not turn:
                continue
            row = rows.get(path.name, {"file": path.name, **json.loads(path.with_suffix(".json").read_text())})
            missing = [part for part in wanted if "error" in row.get(part, {"error": ""})]
            if missing:
                row = {**row, **score(path, missing, options)}
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                print(f"{path.name}: {'; '.join(complaints(row)) or 'good'}", file=sys.stderr, flush=True)
            shown.append(row)
    if not shown:
        print(f"no files of the zoo in {options.zoo}: make them with export_zoo.py")
        return 1
    print(table(shown))
    return 1 if any(complaints(row) for row in shown) else 0


if __name__ == "__main__":
    sys.exit(main())
