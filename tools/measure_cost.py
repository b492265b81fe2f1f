"""CPU time and peak memory of quantizing: onnx-eptq against ONNX Runtime's `quantize_static`, on the same tensors.

measure_cost.py MODEL CALIB [-w 8] [-a 8] [--repeat 5] [--threads 1] [--feed image|batch|all] [preprocessing options]

Both run as child processes, in turn, imports and file writing included; medians and ratios are printed as a table, and
everything measured as JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from common import Run, add_preprocessing, eptq_command, markdown, preprocessing_flags, run_measured, static_command

FIGURES = {"cpu_s": "CPU s", "wall_s": "wall s", "peak_mb": "peak MB"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("-w", "--weight-bits", type=int, default=8)
    parser.add_argument("-a", "--act-bits", type=int, default=8)
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of both; 0: each its own choice")
    parser.add_argument("--feed", choices=["image", "batch", "all"], default="image", help="of quantize_static")
    parser.add_argument("--pre-process", action="store_true", help="count quantize_static's advised preparation too")
    parser.add_argument("--eptq-flag", action="append", default=[], help="passed on to onnx-eptq; may be repeated")
    parser.add_argument("--skip", choices=["onnx-eptq", "quantize_static"], help="measure only the other")
    parser.add_argument("--json", type=Path, help="write the JSON to this file instead of printing it")
    add_preprocessing(parser)
    return parser.parse_args()


def commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The two commands by name."""
    threads, images = f"--threads={options.threads}", preprocessing_flags(options)
    widths = ["-w", str(options.weight_bits), "-a", str(options.act_bits)]
    ours = [*widths, f"--method={options.method}", threads, *images, *options.eptq_flag]
    theirs = [f"--feed={options.feed}", threads, *images, *(["--pre-process"] if options.pre_process else [])]
    both = {
        "onnx-eptq": eptq_command(options.model, options.calib, folder / "ours.onnx", ours),
        "quantize_static": static_command(options.model, options.calib, folder / "theirs.onnx", theirs),
    }
    return {name: command for name, command in both.items() if name != options.skip}


def measure(options: argparse.Namespace) -> dict[str, list[Run]]:
    """All runs by name, taken in turn so that a busy machine disturbs both alike."""
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeat):
            for name, command in commands(options, Path(folder)).items():
                found = run_measured(command, options.threads)
                if found.code:
                    sys.exit(f"{name} failed\n{found.stderr.strip()}")
                runs.setdefault(name, []).append(found)
    return runs


def summary(runs: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    """Median of every figure by name, and the medians' ratio."""
    medians = {
        name: {figure: round(statistics.median(getattr(run, figure) for run in found), 3) for figure in FIGURES}
        for name, found in runs.items()
    }
    if len(medians) == 2:
        ours, theirs = medians["onnx-eptq"], medians["quantize_static"]
        medians["ratio"] = {figure: round(ours[figure] / theirs[figure], 3) for figure in FIGURES}
    return medians


def main() -> None:
    options = arguments()
    runs = measure(options)
    medians = summary(runs)
    rows = [[name, *(row[figure] for figure in FIGURES)] for name, row in medians.items()]
    print(markdown(["", *(f"{title}, median of {options.repeat}" for title in FIGURES.values())], rows))
    samples = {name: {f: [round(getattr(run, f), 3) for run in found] for f in FIGURES} for name, found in runs.items()}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    text = json.dumps({"settings": settings, "medians": medians, "runs": samples})
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
