"""Quantize every bed with onnx-eptq, score the written files, and print one Markdown table.

score_beds.py [--beds FOLDER] [--widths w8a8,w4a8] [--compressions 10.667,8] [--only BED,...] [--static] [--latency]
              [--limit N] [--json FILE]

A folder of beds holds `beds.json` (per bed: model, data folder, preprocessing) and `score.py BED MODEL`, which prints
accuracy as JSON. `--static` adds ONNX Runtime's `quantize_static` at the same widths; `--latency` times each file
against `quantize_static`'s int8 file, in turns, in one process. `--compressions` adds mixed precision: 32 / 3 is as many bytes
of weights as 3 bits everywhere.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from census import describe, session
from common import (
    add_preprocessing,
    eptq_command,
    markdown,
    open_calibration,
    run_measured,
    static_command,
)

Row = dict[str, Any]
IMAGES = 16  # samples that the latency is measured on
COLUMNS = {
    "bed": "bed",
    "widths": "widths",
    "tool": "tool",
    "float_top1": "float top-1",
    "top1": "top-1",
    "agreement": "agreement",
    "sqnr": "SQNR dB",
    "bytes": "bytes",
    "size_ratio": "size / allowed",
    "low_bit_share": "low-bit %",
    "domains": "domains",
    "loads": "loads at",
    "speed": "speed / static int8",
    "cpu_s": "CPU s",
    "peak_mb": "peak MB",
    "error": "error",
}


class Bed:
    """One entry of beds.json, as arguments for the quantizers."""

    def __init__(self, name: str, folder: Path, scratch: Path) -> None:
        self.name, self.folder, self.scratch = name, folder, scratch
        self.facts = json.loads((folder / "beds.json").read_text())[name]
        self.model = folder / self.facts["model"]

    def calibration(self) -> Path:
        """The folder or file to calibrate on; arrays are brought to the model's layout first."""
        data = self.folder / self.facts["data"]
        source = data / "calib" if (data / "calib").is_dir() else data
        packed = source / "calib.npz"
        if not packed.exists():
            return source
        return self._transposed(packed) if self.facts.get("layout") == "NHWC" else packed

    def _transposed(self, packed: Path) -> Path:
        with np.load(packed) as arrays:
            turned = {
                key: arrays[key].transpose(0, 2, 3, 1) if arrays[key].ndim == 4 else arrays[key] for key in arrays
            }
        path = self.scratch / f"{self.name}_calib.npz"
        np.savez(path, **turned)
        return path

    def flags(self) -> list[str]:
        """Preprocessing options: beds.json counts in 0..255, so the scale is 1."""
        if "color" not in self.facts:
            return []
        flags = ["--scale=1", *(f"--{key}={','.join(f'{v:g}' for v in self.facts[key])}" for key in ("mean", "std"))]
        if "resize" in self.facts:
            width, height = self.facts["resize"]
            flags.append(f"--resize={height}x{width}")
        if "size" in self.facts:
            flags.append(f"--crop={self.facts['size']}")
        return [*flags, f"--color={self.facts['color'].lower()}", f"--layout={self.facts['layout'].lower()}"]


class Bench:
    """Runs the quantizers and the scoring with one set of options."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch

    def rows(self, bed: Bed) -> list[Row]:
        """One row per width and tool."""
        rows = [self.ours(bed, widths) for widths in self.options.widths]
        rows += [self.mixed(bed, ratio) for ratio in self.options.compressions]
        rows += [self.static(bed, widths) for widths in self.options.widths if self.options.static]
        if self.options.latency:
            self.time(bed, rows)
        return rows

    def ours(self, bed: Bed, widths: tuple[int, int]) -> Row:
        out = self.options.keep / f"{bed.name}_w{widths[0]}a{widths[1]}.onnx"
        flags = ["-w", str(widths[0]), "-a", str(widths[1]), f"--method={self.options.method}", "--json"]
        flags += [f"--target={self.options.target}", f"--threads={self.options.threads}", *bed.flags()]
        command = eptq_command(bed.model, bed.calibration(), out, [*flags, *self.options.eptq_flag])
        return self.scored(bed, widths, "onnx-eptq", command, out)

    def mixed(self, bed: Bed, ratio: float) -> Row:
        out = self.options.keep / f"{bed.name}_x{ratio:g}.onnx"
        flags = [
            f"--compression={ratio}",
            f"--method={self.options.method}",
            f"--target={self.options.target}",
            "--json",
        ]
        flags += [f"--threads={self.options.threads}", *bed.flags(), *self.options.eptq_flag]
        row = self.scored(bed, (8, 8), "onnx-eptq", eptq_command(bed.model, bed.calibration(), out, flags), out)
        meant_for_one_width = ("size_ratio", "size_ratio_written", "low_bit_share")
        row = {key: value for key, value in row.items() if key not in meant_for_one_width}
        return row | {"widths": f"x{ratio:g}"}

    def static(self, bed: Bed, widths: tuple[int, int]) -> Row:
        out = self.options.keep / f"{bed.name}_w{widths[0]}a{widths[1]}_static.onnx"
        if widths not in ((8, 8), (4, 8)):
            return {**self.head(bed, widths, "quantize_static"), "error": "has no such width"}
        flags = [f"--weights=int{widths[0]}", f"--threads={self.options.threads}", *bed.flags()]
        command = static_command(bed.model, bed.calibration(), out, flags)
        return self.scored(bed, widths, "quantize_static", command, out)

    def head(self, bed: Bed, widths: tuple[int, int], tool: str) -> Row:
        return {"bed": bed.name, "widths": f"w{widths[0]}a{widths[1]}", "tool": tool}

    def scored(self, bed: Bed, widths: tuple[int, int], tool: str, command: list[str], out: Path) -> Row:
        """Quantize, then score and describe what was written; a failure becomes the row's `error`."""
        row = self.head(bed, widths, tool)
        print(f"{bed.name} {row['widths']} {tool}", file=sys.stderr)
        out.unlink(missing_ok=True)
        made = run_measured(command, self.options.threads)
        row |= {"cpu_s": round(made.cpu_s, 2), "wall_s": round(made.wall_s, 2), "peak_mb": round(made.peak_mb)}
        if made.code or not out.exists():
            return row | {"error": made.complaint}
        row |= {"file": str(out), "report": _json(made.stdout)}
        return row | describe(out, bed.model, widths[0]) | self.score(bed, out)

    def score(self, bed: Bed, out: Path) -> Row:
        limit = [f"--limit={self.options.limit}"] if self.options.limit else []
        command = [
            sys.executable,
            str(bed.folder / "score.py"),
            bed.name,
            str(out),
            f"--threads={self.options.threads}",
        ]
        found = run_measured([*command, *limit], self.options.threads)
        scores = _json(found.stdout)
        if found.code or not isinstance(scores, dict):
            return {"error": f"score.py: {found.complaint}"}
        kept = {key: scores[key] for key in ("n", "float_top1", "top1", "agreement", "float_bytes") if key in scores}
        return kept | {"sqnr_db": scores["sqnr_db"], "sqnr": min(scores["sqnr_db"])}

    def time(self, bed: Bed, rows: list[Row]) -> None:
        """Add to every row its speed relative to quantize_static's int8 file."""
        is_reference = [row["tool"] == "quantize_static" and row["widths"] == "w8a8" for row in rows]
        reference = rows[is_reference.index(True)] if any(is_reference) else self.static(bed, (8, 8))
        if "file" not in reference or not reference["loads"]["all"]:
            return
        samples = self.samples(bed)
        for row in rows:
            if "file" in row and row is not reference and row["loads"]["all"]:
                row["speed"], row["ms"] = speed(Path(row["file"]), Path(reference["file"]), samples, self.options.pairs)

    def samples(self, bed: Bed) -> list[dict[str, Any]]:
        parser = argparse.ArgumentParser()
        add_preprocessing(parser)
        batches = open_calibration(bed.model, bed.calibration(), parser.parse_args(bed.flags()), batch_size=1)
        return list(islice(batches, IMAGES))


def speed(path: Path, reference: Path, samples: list[dict[str, Any]], pairs: int) -> tuple[float, float]:
    """Median over pairs of (time of the reference / time of the file), and the file's median milliseconds."""
    ours, theirs = session(path), session(reference)
    times = []
    for index in range(pairs + 4):
        feed = samples[index % len(samples)]
        order = (ours, theirs) if index % 2 else (theirs, ours)  # whoever comes second finds warm caches
        taken = {id(one): _seconds(one, feed) for one in order}
        times.append((taken[id(ours)], taken[id(theirs)]))
    kept = times[4:]
    ratio = statistics.median(b / a for a, b in kept)
    return round(ratio, 3), round(1e3 * statistics.median(a for a, _ in kept), 3)


def _seconds(of: Any, feed: dict[str, Any]) -> float:
    started = time.perf_counter()
    of.run(None, feed)
    return time.perf_counter() - started


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _widths(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"w(\d)a(\d)", part) for part in text.split(",") if text]
    if not all(found):
        raise argparse.ArgumentTypeError(f"wanted widths such as w8a8,w4a8; found {text!r}")
    return [(int(match[1]), int(match[2])) for match in found if match]


def _ratios(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def shown(row: Row) -> list[object]:
    """The row's cells in the order of `COLUMNS`."""
    cells = dict(row)
    if "loads" in row:
        cells["loads"] = ", ".join(level for level, works in row["loads"].items() if works)
        cells["domains"] = ", ".join(row["domains"]) or "standard"
    return [cells.get(key) for key in COLUMNS]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", type=Path, default=os.environ.get("ONNX_EPTQ_BEDS"), help="default: $ONNX_EPTQ_BEDS")
    parser.add_argument("--widths", type=_widths, default="w8a8,w4a8", help="uniform ones; '' for none")
    parser.add_argument("--compressions", type=_ratios, default=[], help="mixed precision at these ratios to float32")
    parser.add_argument("--only", help="names of beds, separated by commas")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--eptq-flag", action="append", default=[], help="passed on to onnx-eptq; may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="score at most this many samples")
    parser.add_argument("--static", action="store_true", help="compare with quantize_static")
    parser.add_argument("--latency", action="store_true", help="compare speed with quantize_static's int8 file")
    parser.add_argument("--pairs", type=int, default=60, help="runs of each file for --latency")
    parser.add_argument("--keep", type=Path, help="folder for the written models; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    if options.beds is None or not (Path(options.beds) / "beds.json").exists():
        parser.error("no beds: give --beds or set ONNX_EPTQ_BEDS to a folder with beds.json and score.py")
    options.beds = Path(options.beds).resolve()
    return options


def chosen(options: argparse.Namespace) -> list[str]:
    """Names of the beds to run."""
    known = list(json.loads((options.beds / "beds.json").read_text()))
    wanted = options.only.split(",") if options.only else known
    if unknown := set(wanted) - set(known):
        sys.exit(f"no such bed: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [name for name in known if name in wanted]


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        options.keep = options.keep or Path(folder)
        options.keep.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, Path(folder))
        rows = [row for name in chosen(options) for row in bench.rows(Bed(name, options.beds, Path(folder)))]
    used = [any(row.get(key) is not None for row in rows) for key in COLUMNS]
    header = [title for title, use in zip(COLUMNS.values(), used, strict=True) if use]
    table = markdown(header, ([c for c, use in zip(shown(row), used, strict=True) if use] for row in rows))
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any("error" in row for row in rows if row["tool"] == "onnx-eptq"))


if __name__ == "__main__":
    main()
