"""What one step of learning costs, against a step of float training on the same batch.

step_cost.py [MODEL CALIB] [-w 4] [-a 8] [--batch 32] [--threads 1] [--repeat 15] [--stage 0] [--profile] [preprocessing]

Learning is a stage of `METHODS[--method]` over the whole network, taken by the package's own code. Float training is what
any training loop does: the float teacher forward without gradients, the network forward and backward with all weights and
biases learning, and a step of Adam. Both run in turn in one process; ratios are medians over pairs. Peak memory is that of a
process which takes steps of one kind only, beside one that takes none.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import add_demo, add_preprocessing, calibrated, markdown, preprocessing_settings, run_measured

from onnx_eptq import eptq, mirror, pieces, pipeline
from onnx_eptq.methods import METHODS
from onnx_eptq.outputs import learning_targets

Step = Callable[[int], None]
SCHEDULE = 1000  # steps that the schedules believe in
WARM = 4  # compiling takes the first two
LEADERS = 12


def learning_step(problem: eptq.Problem, student: mirror.Mirror, stage: int) -> Step:
    """A step of one of the method's stages, over the whole network."""
    chosen = replace(problem.method.stages[stage], scope="network")
    (piece,) = pieces.pieces(problem.graph, problem.layers, "network", set())
    values = dict(zip((tensor.name for tensor in problem.graph.inputs), problem.samples, strict=True))
    running = eptq._Piece(problem, student, chosen, piece, True, values, values, set())
    order = eptq._Order(len(problem.samples[0]), problem.effort.batch, 0)

    def step(index: int) -> None:
        running.step(order.next(), index % SCHEDULE, SCHEDULE)

    return step


def training_step(problem: eptq.Problem) -> Step:
    """A step of float training towards the teacher's outputs."""
    net = mirror.build(problem.graph).to(problem.samples[0].device)
    names = dict.fromkeys(
        tensor.name for layer in problem.layers for tensor in (layer.weight, layer.bias) if tensor is not None
    )
    parameters = [net.constant(name).requires_grad_() for name in names if name in net.constants]
    optimizer = torch.optim.Adam(parameters, lr=1e-6)
    order = eptq._Order(len(problem.samples[0]), problem.effort.batch, 0)
    targets = learning_targets(problem.graph)
    student, teacher = (_until(each, targets) for each in (net, problem.teacher))

    def step(_index: int) -> None:
        chosen = order.next()
        batch = [x[chosen] for x in problem.samples]
        with torch.no_grad():
            expected = teacher(*batch)
        loss = sum(map(_distance, student(*batch), expected))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def _until(net: mirror.Mirror, targets: list[str]) -> pieces.Function:
    raw = pieces.raw_nodes(net)
    return pieces.function(net, pieces.placeholders(net), [raw[name] for name in targets])


def _distance(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    axis = eptq.distribution_axis(expected)
    return F.mse_loss(found, expected) if axis is None else eptq.divergence(found, expected, axis)


def steps(options: argparse.Namespace, kinds: tuple[str, ...]) -> dict[str, Step]:
    """The steps of the kinds asked for, ready to be taken."""
    settings = {"weight_bits": options.weight_bits, "act_bits": options.act_bits, "threads": options.threads}
    settings |= preprocessing_settings(options)
    settings |= {"method": options.method, "num_samples": options.samples, "compile": options.compile}
    job, ready = calibrated(options.model, options.calib, **settings)
    problem = pipeline.learning_problem(job, ready)
    problem.effort = replace(problem.effort, batch=options.batch or problem.effort.batch)
    makers = {
        "training": lambda: training_step(problem),
        "learning": lambda: learning_step(problem, ready.student, options.stage),
    }
    return {kind: makers[kind]() for kind in makers if kind in kinds}


def measure(both: dict[str, Step], repeat: int) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds of each kind, in turns."""
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in both}
    for index in range(-WARM, repeat):
        turn = list(both) if index % 2 else list(both)[::-1]
        for kind in turn:
            began = time.process_time(), time.perf_counter()
            both[kind](index + WARM)
            if index >= 0:
                taken[kind].append((time.process_time() - began[0], time.perf_counter() - began[1]))
    return taken


def peak(options: argparse.Namespace, kind: str) -> float | None:
    """Peak memory, in MB, of a process that takes steps of one kind."""
    found = run_measured([sys.executable, *sys.argv, f"--only={kind}"], options.threads)
    if found.code:
        print(f"{kind}: {found.complaint}", file=sys.stderr)
        return None
    return round(found.peak_mb)


def only(options: argparse.Namespace) -> None:
    """Take a few steps of one kind and end."""
    for step in steps(options, (options.only,)).values():
        for index in range(WARM):
            step(index)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def table(taken: dict[str, list[tuple[float, float]]], peaks: dict[str, float | None]) -> tuple[str, dict[str, Any]]:
    """What was measured, as a table and as data."""
    ratios = [
        statistics.median(a[i] / b[i] for a, b in zip(taken["learning"], taken["training"], strict=True))
        for i in (0, 1)
    ]
    median = {
        kind: [1e3 * statistics.median(pair[i] for pair in pairs) for i in (0, 1)] for kind, pairs in taken.items()
    }
    above = {kind: mb - peaks["none"] if mb and peaks["none"] else None for kind, mb in peaks.items()}
    rows: list[list[object]] = [["before any step", None, None, peaks["none"], None]]
    for kind, name in (("training", "float training step"), ("learning", "learning step")):
        rows.append([name, *(round(value, 1) for value in median[kind]), peaks[kind], above[kind]])
    rows.append(["ratio, learning / training", *(round(value, 3) for value in ratios), _ratio(peaks), _ratio(above)])
    facts = {"cpu_ratio": ratios[0], "wall_ratio": ratios[1], "peak_mb": peaks, "milliseconds": median}
    return markdown(["", "CPU ms", "wall ms", "peak MB", "above MB"], rows), facts


def _ratio(megabytes: dict[str, float | None]) -> float | None:
    ours, theirs = megabytes["learning"], megabytes["training"]
    return round(ours / theirs, 3) if ours and theirs else None


def profile(step: Step, kind: str, repeat: int) -> str:
    """The operators that take most of a step's time, per step."""
    step(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for index in range(repeat):
            step(index + 1)
    events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        [event.key, event.count / repeat, round(event.self_cpu_time_total / repeat / 1e3, 2),
         round(100 * event.self_cpu_time_total / total, 1)]
        for event in events[:LEADERS]
    ]  # fmt: skip
    return markdown([f"{kind}: operator", "calls / step", "self ms / step", "%"], rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_demo(parser)
    parser.add_argument("-w", "--weight-bits", type=int, default=4)
    parser.add_argument("-a", "--act-bits", type=int, default=8)
    parser.add_argument("--method", default="eptq", choices=[name for name, method in METHODS.items() if method.stages])
    parser.add_argument("--stage", type=int, default=0, help="which of the method's stages")
    parser.add_argument("--batch", type=int, help="samples per step; by default as many as learning would take")
    parser.add_argument("--samples", type=int, help="calibration samples to load; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="also list the most expensive operators")
    parser.add_argument("--compile", action="store_true", help="let torch.compile compile the learning step")
    parser.add_argument("--no-memory", action="store_true", help="do not start the processes that measure memory")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--only", choices=["none", "training", "learning"], help=argparse.SUPPRESS)
    add_preprocessing(parser)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.only:
        only(options)
        return
    kinds = ("none", "training", "learning")
    peaks = {kind: None if options.no_memory else peak(options, kind) for kind in kinds}
    both = steps(options, kinds)
    text, facts = table(measure(both, options.repeat), peaks)
    print(text)
    if options.profile:
        for kind, step in both.items():
            print(f"\n{profile(step, kind, 5)}")
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
