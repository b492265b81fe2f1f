"""onnx-eptq against a peer that learns rounding, AIMET-ONNX's AdaRound, on the same model and the same tensors.

compare_peer.py [MODEL CALIB] --peer-python PYTHON [--eval FILE.npz] [--bits 4/8,3/8] [--iterations 500]
                [--method eptq] [--eptq-flag=--effort=fast] [preprocessing options]

PYTHON is the interpreter of an environment of its own that holds the peer (python -m venv peer && peer/bin/pip install
aimet-onnx): the two need not agree on versions. Each runs as a child process, imports and file writing included. Ours is
always scored by the written file; the peer by its exported file where ONNX Runtime loads it, else by its own simulation.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    HERE,
    Run,
    add_demo,
    add_preprocessing,
    eptq_command,
    load_eval,
    markdown,
    open_calibration,
    predict,
    run_measured,
    scores,
)

Row = dict[str, Any]
COLUMNS = {
    "tool": "tool",
    "bits": "W/A",
    "top1": "top-1 %",
    "agreement": "agreement %",
    "cpu_s": "CPU s",
    "wall_s": "wall s",
    "peak_mb": "peak MB",
    "bytes": "bytes",
    "scored": "scored by",
}


class Comparison:
    """The tensors that both read, and what their results are measured against."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.calib, self.eval = scratch / "calib.npz", scratch / "eval.npz"
        parts = list(open_calibration(options.model, options.calib, options, 1))[: options.samples]
        np.savez(self.calib, **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        self.x, self.y = load_eval(options.eval, options.model, options)
        np.savez(self.eval, x=self.x)
        self.expected = predict(options.model, self.x, options.threads)

    def ours(self, bits: str) -> Row:
        """Quantize with onnx-eptq and score the written file."""
        out = self.scratch / "ours.onnx"
        weight, activation = bits.split("/")
        flags = ["-w", weight, "-a", activation, f"--method={self.options.method}", f"--threads={self.options.threads}"]
        run = run_measured(
            eptq_command(self.options.model, self.calib, out, [*flags, "--json", *self.options.eptq_flag]),
            self.options.threads,
        )
        row = {"tool": f"onnx-eptq {self.options.method}", "bits": bits, **costs(run)}
        return row | ({"scored": run.complaint} if run.code else self.scored(out))

    def peer(self, bits: str) -> Row:
        """Quantize with the peer and score what it has written, or its simulation."""
        out, found = self.scratch / "peer.onnx", self.scratch / "classes.npy"
        weight, activation = bits.split("/")
        command = [str(self.options.peer_python), str(HERE / "aimet_peer.py"), str(self.options.model), str(self.calib)]
        flags = [str(out), f"--eval={self.eval}", f"--classes={found}", f"--iterations={self.options.iterations}"]
        flags += ["-w", weight, "-a", activation, f"--threads={self.options.threads}"]
        run = run_measured([*command, *flags], self.options.threads)
        row = {"tool": f"aimet-onnx AdaRound, {self.options.iterations} per layer", "bits": bits, **costs(run)}
        if run.code:
            return row | {"scored": run.complaint}
        said = json.loads(run.stdout.strip().splitlines()[-1])
        if not said["problem"]:
            return row | self.scored(out)
        row |= {"cpu_s": round(run.cpu_s - said["scoring_s"], 1), "peak_mb": round(said["peak_mb"]), "wall_s": None}
        why = f"its own simulation ({said['problem']})"
        return row | scores(np.load(found), self.expected, self.y) | {"scored": why}

    def scored(self, out: Path) -> Row:
        """The scores and size of a written file."""
        found = scores(predict(out, self.x, self.options.threads), self.expected, self.y)
        return found | {"bytes": out.stat().st_size, "scored": "written file"}


def costs(run: Run) -> Row:
    """What a child process took."""
    return {"cpu_s": round(run.cpu_s, 1), "wall_s": round(run.wall_s, 1), "peak_mb": round(run.peak_mb)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_demo(parser)
    models = HERE.parent / "models"
    parser.add_argument("--peer-python", type=Path, required=True, help="interpreter of the peer's environment")
    parser.add_argument("--eval", type=Path, default=models / "digits_eval.npz", help="an .npz with x and y")
    parser.add_argument("--limit", type=int, help="score at most this many samples")
    parser.add_argument("--bits", default="4/8", help="weights/activations, separated by commas")
    parser.add_argument("--samples", type=int, help="calibration samples; default: all")
    parser.add_argument("--method", default="eptq", help="of onnx-eptq")
    parser.add_argument("--iterations", type=int, default=500, help="of the peer, per layer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eptq-flag", action="append", default=[], help="passed on to onnx-eptq; may be repeated")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    add_preprocessing(parser)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(options, Path(folder))
        rows = [make(bits) for bits in options.bits.split(",") for make in (comparison.ours, comparison.peer)]
        top1 = 100 * float((comparison.expected == comparison.y).mean())
    rows = [{"tool": "float", "top1": top1}, *rows]
    print(markdown(COLUMNS.values(), ([row.get(key) for key in COLUMNS] for row in rows)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any("top1" not in row for row in rows))


if __name__ == "__main__":
    main()
