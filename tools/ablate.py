"""Which part of learning earns what: runs over a grid of settings, judged on samples that no run has seen.

ablate.py [MODEL CALIB] [--eval FILE.npz] [--out FILE.jsonl] [--design each|product] [--weighting none,lfh,sla]
          [--rounding latent,off,soft,flex] [--kl 0.1,0,1] [--scope network,block,layer] [--start compensated,rtn]
          [--steps 60,240] [--samples 64,256] [--bits 3/8,4/4] [--seeds 0,1,2] [preprocessing options]

`--design each` varies one option at a time about the first value of every list; `product` runs all combinations. A third of
the calibration samples, the same in every run, is held out; distances of 0 mean "as the float model" (`eptq.Judge`). With
`--eval` (arrays x and y), the written file is run by ONNX Runtime too. Runs are `METHODS["eptq"]` with the settings put into
its first stage; the second, which learns with frozen codes, is left out where rounding is soft. rounding=off is the start
alone. A run that is found in `--out` is not made again.

Every piece of a scope learns for as many steps, so that runs by block or layer take longer: see the seconds.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from common import (
    add_demo,
    add_preprocessing,
    calibrated,
    chart,
    load_eval,
    markdown,
    open_calibration,
    predict,
    scores,
)

from onnx_eptq import eptq, pipeline
from onnx_eptq.methods import METHODS, Method, Stage
from onnx_eptq.outputs import learning_targets
from onnx_eptq.pipeline import Job, Ready
from onnx_eptq.write import write

GRID = {
    "bits": "3/8",
    "scope": "network,block,layer",
    "rounding": "latent,off,soft,flex",
    "weighting": "none,lfh,sla",
    "kl": "0.1,0,1",
    "start": "compensated,rtn",
    "steps": "120",
    "samples": "128",
}
NUMBERS = {"kl": float, "steps": int, "samples": int}
FIGURES = {"distance": "held-out distance", "top1": "top-1 %", "agreement": "agreement %", "cpu_s": "CPU s"}
HELD = 3  # one calibration sample in so many is held out
Setting = dict[str, Any]


def method(setting: Setting) -> Method:
    """`METHODS["eptq"]` with the setting in its place."""
    base = METHODS["eptq"]
    if setting["rounding"] == "off":
        return replace(base, stages=(), start=setting["start"])
    first, *others = base.stages
    shared = {"weighting": setting["weighting"], "kl": setting["kl"]}
    first = replace(first, scope=setting["scope"], rounding=setting["rounding"], **shared)
    others = [replace(stage, **shared) for stage in others]
    if setting["rounding"] == "soft":
        first, others = replace(_as_published(first), share=sum(stage.share for stage in base.stages)), []
    return Method((first, *others), setting["start"], base.ranges)


def _as_published(stage: Stage) -> Stage:
    """Soft rounding with the rates of the paper's first version: it needs others than latent weights do."""
    v1 = METHODS["eptq-v1"].stages[0]
    names = ("weight_rate", "scale_rate", "bias_rate", "constant", "regularizer", "optimizer")
    return replace(stage, **{name: getattr(v1, name) for name in names})


def canonical(setting: Setting) -> Setting:
    """The setting without what would change nothing; equal ones are run once."""
    unused = {"rounding": ("scope", "weighting", "kl", "steps")} if setting["rounding"] == "off" else {}
    if setting["scope"] != "network" and setting["rounding"] == "soft":  # no stage over the whole network is left
        unused = {"scope": ("weighting", "kl")}
    plain = {"scope": "network", "weighting": "none", "kl": 0.0, "steps": 0}
    return {**setting, **{name: plain[name] for names in unused.values() for name in names}}


def settings(options: argparse.Namespace) -> list[Setting]:
    """The settings to run, each once, in order."""
    lists = {name: [NUMBERS.get(name, str)(value) for value in getattr(options, name).split(",")] for name in GRID}
    if options.design == "product":
        chosen = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    else:
        base = {name: values[0] for name, values in lists.items()}
        chosen = [base, *({**base, name: value} for name, values in lists.items() for value in values[1:])]
    return [dict(key) for key in dict.fromkeys(tuple(canonical(setting).items()) for setting in chosen)]


@dataclass
class Data:
    """Samples to learn from, samples held out of every run, and what the written files are scored on."""

    pool: list[dict[str, np.ndarray]]
    held: list[dict[str, np.ndarray]]
    x: np.ndarray | None = None
    y: np.ndarray | None = None
    expected: np.ndarray | None = None

    @classmethod
    def load(cls, options: argparse.Namespace) -> "Data":
        """Read all of it; which samples are held out depends on their number alone."""
        batches = open_calibration(options.model, options.calib, options, 1)
        everything = list(batches)
        order = np.random.default_rng(0).permutation(len(everything))
        count = len(everything) // HELD
        data = cls([everything[i] for i in order[count:]], [everything[i] for i in order[:count]])
        if options.eval:
            data.x, data.y = load_eval(options.eval, options.model, options)
            data.expected = predict(options.model, data.x, options.threads)
        return data

    def drawn(self, count: int, seed: int) -> list[dict[str, np.ndarray]]:
        """Samples for a run."""
        order = np.random.default_rng(seed + 1).permutation(len(self.pool))
        return [self.pool[i] for i in order[:count]]


class Bench:
    """Runs settings; what depends on bits, samples and seed alone is calibrated once."""

    def __init__(self, options: argparse.Namespace, data: Data) -> None:
        self.options, self.data = options, data
        self.prepared = lru_cache(maxsize=1)(self._prepared)

    def _prepared(self, bits: str, samples: int, seed: int) -> tuple[Job, Ready]:
        weight, activation = map(int, bits.split("/"))
        chosen = self.data.drawn(samples, seed)
        widths = {"weight_bits": weight, "act_bits": activation}
        return calibrated(self.options.model, chosen, **widths, seed=seed, threads=self.options.threads)

    def run(self, setting: Setting, seed: int) -> dict[str, Any]:
        """Learn once, judge, and score the written file."""
        job, ready = self.prepared(setting["bits"], setting["samples"], seed)
        student = copy.deepcopy(ready.student)
        problem = pipeline.learning_problem(job, ready, method(setting))
        problem.effort = replace(problem.effort, steps=setting["steps"])
        torch.manual_seed(seed)
        began = time.process_time()
        learner = eptq.Learner(problem, student)
        for _ in learner:
            pass
        spent = time.process_time() - began
        learning = learner.learning
        found = {"distance": self.distance(problem, student), "cpu_s": spent, "kept": learning.kept}
        found |= {"undecided": learning.undecided, "gap": learning.gap, "learning_steps": learning.steps}
        return found | self.score(job, student)

    def distance(self, problem: eptq.Problem, student: Any) -> float:
        """Distance from the float model on the samples held out of every run."""
        names = [tensor.name for tensor in problem.graph.inputs]
        device = problem.samples[0].device
        held = [torch.from_numpy(np.concatenate([s[name] for s in self.data.held])).to(device) for name in names]
        judge = eptq.Judge(problem.teacher, problem.graph, learning_targets(problem.graph), held, problem.effort.batch)
        return judge.distance(student)

    def score(self, job: Job, student: Any) -> dict[str, float]:
        """Top-1 and agreement of the written file."""
        data, threads = self.data, self.options.threads
        if data.x is None or data.y is None or data.expected is None:
            return {}
        model = write(job.graph, job.plan, student.export(job.plan), job.target.storage, opset=job.config.opset)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(model, path)
            return scores(predict(path, data.x, threads), data.expected, data.y)


class Records:
    """Finished runs, one JSON line each."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        entries = [json.loads(line) for line in lines if _whole(line)]  # an interrupted write is made again
        self.done = {json.dumps(entry["run"], sort_keys=True): entry["found"] for entry in entries}

    def _key(self, setting: Setting, seed: int) -> dict[str, Any]:
        return {**self.about, **setting, "seed": seed}

    def find(self, setting: Setting, seed: int) -> dict[str, Any] | None:
        """What a run has found, if it was made."""
        return self.done.get(json.dumps(self._key(setting, seed), sort_keys=True))

    def add(self, setting: Setting, seed: int, found: dict[str, Any]) -> None:
        """Keep what a run has found."""
        key = self._key(setting, seed)
        self.done[json.dumps(key, sort_keys=True)] = found
        if self.path is not None:
            before = self.path.read_text() if self.path.exists() else ""
            cut = bool(before) and not before.endswith("\n")
            with self.path.open("a") as file:
                file.write("\n" * cut + json.dumps({"run": key, "found": found}) + "\n")


def _whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def run_all(options: argparse.Namespace, grid: list[Setting], records: Records) -> None:
    """Make the runs that are missing; those that share a calibration come one after another."""
    missing = [(s, seed) for s in grid for seed in options.seeds if records.find(s, seed) is None]
    if not missing:
        return
    bench = Bench(options, Data.load(options))
    missing.sort(key=lambda run: (run[0]["bits"], run[0]["samples"], run[1]))
    for index, (setting, seed) in enumerate(missing):
        found = bench.run(setting, seed)
        records.add(setting, seed, found)
        print(f"{index + 1} of {len(missing)}: {label(setting, list(setting))}, seed {seed}: "
              f"{found['distance']:.4g} in {found['cpu_s']:.1f} s", file=sys.stderr)  # fmt: skip


def label(setting: Setting, names: list[str]) -> str:
    """The setting in a few words."""
    return " ".join(f"{name}={setting[name]}" for name in names)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.4g}" if len(values) < 2 else f"{mean:.4g} ± {statistics.stdev(values):.2g}"


def table(grid: list[Setting], records: Records, seeds: list[int]) -> str:
    """A row per setting; what all share is said above."""
    varied = [name for name in GRID if len({setting[name] for setting in grid}) > 1]
    fixed = [name for name in GRID if name not in varied]
    found = [[records.find(setting, seed) or {} for seed in seeds] for setting in grid]
    shown = [figure for figure in FIGURES if all(figure in each for group in found for each in group)]
    rows = [
        [
            *(setting[name] for name in varied),
            *(spread([each[figure] for each in group]) for figure in shown),
            ", ".join(sorted({each["kept"] for each in group})),
        ]
        for setting, group in zip(grid, found, strict=True)
    ]
    head = f"{label(grid[0], fixed)}, {len(seeds)} seeds: mean ± standard deviation\n\n"
    return head + markdown([*varied, *(FIGURES[figure] for figure in shown), "kept"], rows)


def draw(path: Path, grid: list[Setting], records: Records, seeds: list[int]) -> None:
    """Held-out distances, and top-1 where it was measured, as a chart."""
    varied = [name for name in GRID if len({setting[name] for setting in grid}) > 1] or ["rounding"]
    found = [[records.find(setting, seed) or {} for seed in seeds] for setting in grid]
    figures = [f for f in ("distance", "top1") if all(f in each for group in found for each in group)]
    with chart(path, len(figures)) as axes:
        for axis, figure in zip(axes, figures, strict=True):
            values = [[each[figure] for each in group] for group in found]
            error = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            axis.barh(range(len(grid)), [statistics.fmean(v) for v in values], xerr=error)
            axis.set_yticks(range(len(grid)), [label(setting, varied) for setting in grid], fontsize=6)
            axis.invert_yaxis()
            axis.set_xlabel(FIGURES[figure])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_demo(parser)
    for name, values in GRID.items():
        parser.add_argument(f"--{name}", default=values, help=f"default: {values}")
    parser.add_argument("--seeds", default="0,1,2", help="default: 0,1,2")
    parser.add_argument("--design", choices=["each", "product"], default="each")
    parser.add_argument("--eval", type=Path, help="an .npz with x and y to score the written files on")
    parser.add_argument("--limit", type=int, help="score at most this many samples")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines of finished runs; an interrupted grid goes on from there")
    parser.add_argument("--chart", type=Path, help="draw the table into this file; needs matplotlib")
    add_preprocessing(parser)
    options = parser.parse_args()
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    return options


def main() -> None:
    options = arguments()
    grid = settings(options)
    about = {"model": options.model.name, "eval": options.eval and options.eval.name, "limit": options.limit}
    records = Records(options.out, about)
    run_all(options, grid, records)
    print(table(grid, records, options.seeds))
    if options.chart:
        draw(options.chart, grid, records, options.seeds)


if __name__ == "__main__":
    main()
