"""What the measuring tools share: preprocessing options, the two quantizers as commands, running a command measured."""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_eptq.data import Batches

HERE = Path(__file__).resolve().parent
PREPROCESSING = ("preset", "scale", "mean", "std", "resize", "crop", "color", "layout")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
RUN_CLI = "import sys; sys.argv[0] = 'onnx-eptq'; from onnx_eptq.cli import main; sys.exit(main())"


def add_preprocessing(parser: argparse.ArgumentParser) -> None:
    """Add the options of `onnx-eptq` that say how an image becomes an input."""
    group = parser.add_argument_group("preprocessing, as in onnx-eptq: (pixel * scale - mean) / std")
    for name in PREPROCESSING:
        group.add_argument(f"--{name}", type=float if name == "scale" else str)


def preprocessing_flags(options: argparse.Namespace) -> list[str]:
    """The given preprocessing options, spelled for a command line (values may start with a minus)."""
    given = {name: getattr(options, name) for name in PREPROCESSING}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def open_calibration(model: Path, source: Path, options: argparse.Namespace, batch_size: int) -> "Batches":
    """The batches that `onnx-eptq` would read from `source`."""
    import onnx

    from onnx_eptq.data import PRESETS, InputSpec, open_data

    graph = onnx.load(model, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [_spec(item, InputSpec, onnx) for item in graph.input if item.name not in constants]
    given = {name: getattr(options, name) for name in PREPROCESSING if getattr(options, name) is not None}
    for name in given.keys() & {"mean", "std"}:
        given[name] = tuple(map(float, given[name].split(",")))
    preprocess = replace(PRESETS[given.pop("preset", "unit")], **given)
    return open_data(source, inputs, preprocess, batch_size=batch_size)


def _spec(item: Any, make: Any, onnx: Any) -> Any:
    kind = item.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return make(item.name, shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))


def eptq_command(model: Path, calib: Path, out: Path, flags: Iterable[str]) -> list[str]:
    """Quantize with onnx-eptq."""
    return [sys.executable, "-c", RUN_CLI, str(model), str(calib), "-o", str(out), *flags]


def static_command(model: Path, calib: Path, out: Path, flags: Iterable[str]) -> list[str]:
    """Quantize with ONNX Runtime's `quantize_static`, reading the same tensors."""
    return [sys.executable, str(HERE / "ort_static.py"), str(model), str(calib), "-o", str(out), *flags]


@dataclass(frozen=True)
class Run:
    """A finished child process; CPU time is user + system of it and all its children."""

    code: int
    stdout: str
    stderr: str
    cpu_s: float
    wall_s: float
    peak_mb: float

    @property
    def complaint(self) -> str:
        """The last line of its error output."""
        lines = self.stderr.strip().splitlines()
        return f"exit {self.code}: {lines[-1] if lines else 'no message'}"


def run_measured(command: Sequence[str], threads: int) -> Run:
    """Run a command to its end with the thread pools of the usual libraries limited."""
    limits = dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=os.environ | limits)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        texts = [_text(file) for file in (out, err)]
    return Run(child.returncode, *texts, usage.ru_utime + usage.ru_stime, wall, _megabytes(usage))


def _text(file: Any) -> str:
    file.seek(0)
    text: str = file.read()
    return text


def _megabytes(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is shown as a dash."""
    lines = [list(header), ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value).replace("|", "/")
