"""What the measuring tools share: preprocessing options, the two quantizers as commands, running a command measured."""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from onnx_eptq.data import Batches
    from onnx_eptq.pipeline import Job, Ready

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


def preprocessing_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The given preprocessing options, as settings of `onnx_eptq.quantize`."""
    given = {name: getattr(options, name) for name in PREPROCESSING if getattr(options, name) is not None}
    for name in given.keys() & {"mean", "std"}:
        given[name] = tuple(map(float, given[name].split(",")))
    return given


def open_calibration(model: Path, source: Path, options: argparse.Namespace, batch_size: int) -> "Batches":
    """The batches that `onnx-eptq` would read from `source`."""
    from onnx_eptq.data import PRESETS, open_data

    given = preprocessing_settings(options)
    preprocess = replace(PRESETS[given.pop("preset", "unit")], **given)
    return open_data(source, input_specs(model), preprocess, batch_size=batch_size)


def input_specs(model: Path) -> list[Any]:
    """The model's inputs, as the package's data module wants them."""
    import onnx

    from onnx_eptq.data import InputSpec

    graph = onnx.load(model, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [_spec(item, InputSpec, onnx) for item in graph.input if item.name not in constants]


def load_eval(path: Path, model: Path, options: argparse.Namespace) -> "tuple[np.ndarray, np.ndarray]":
    """Inputs ready to be fed and labels, from the arrays `x` and `y`; x of uint8, NHWC, is taken for images."""
    import numpy as np

    from onnx_eptq.data import PRESETS

    limit = getattr(options, "limit", None)
    with np.load(path) as arrays:
        x, y = arrays["x"][:limit], arrays["y"][:limit].astype(np.int64)
    if x.dtype != np.uint8:
        return x, y
    given = {k: v for k, v in preprocessing_settings(options).items() if k not in ("preset", "resize", "crop")}
    how = replace(PRESETS[options.preset or "unit"], **given)
    values = x[..., ::-1] if how.color == "bgr" else x
    values = (values.astype(np.float32) * np.float32(how.scale) - np.float32(how.mean)) / np.float32(how.std)
    first = input_specs(model)[0].shape[1] in (1, 3) if how.layout is None else how.layout == "nchw"
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2)) if first else values, y


def predict(model: Path, x: "np.ndarray", threads: int) -> "np.ndarray":
    """The class that ONNX Runtime finds for each sample, from the model's first output."""
    import numpy as np
    from census import session

    ran = session(model, threads=threads)
    given = ran.get_inputs()[0]
    size = given.shape[0] if isinstance(given.shape[0], int) else 100
    name = ran.get_outputs()[0].name
    parts = [ran.run([name], {given.name: x[i : i + size]})[0] for i in range(0, len(x), size)]
    return np.concatenate([part.reshape(len(part), -1).argmax(1) for part in parts])


def scores(found: "np.ndarray", expected: "np.ndarray", labels: "np.ndarray") -> dict[str, float]:
    """Top-1 accuracy and agreement with the float model's classes, in percent."""
    return {"top1": 100 * float((found == labels).mean()), "agreement": 100 * float((found == expected).mean())}


def _spec(item: Any, make: Any, onnx: Any) -> Any:
    kind = item.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return make(item.name, shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Add model and calibration data, by default the demo's."""
    models = HERE.parent / "models"
    parser.add_argument("model", type=Path, nargs="?", default=models / "digits.onnx")
    parser.add_argument("calib", type=Path, nargs="?", default=models / "digits_calib")


def calibrated(model: Path, calib: Path, **settings: Any) -> "tuple[Job, Ready]":
    """The job and its calibrated student, as they are before learning begins."""
    from onnx_eptq import pipeline
    from onnx_eptq.report import Phases

    job = pipeline.begin(model, calib, **settings)
    return job, pipeline.calibrated(job, Phases())


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


@contextmanager
def chart(path: Path, panels: int) -> Iterator[Sequence[Any]]:
    """Yield the axes of a figure with some panels side by side, which is then written to `path`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit(f"{path} was not drawn: charts need matplotlib (pip install matplotlib)")
    figure = Figure(figsize=(6.0 * panels, 4.5), layout="constrained")
    yield figure.subplots(1, panels, squeeze=False)[0]
    figure.savefig(path)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is shown as a dash."""
    lines = [list(header), ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value).replace("|", "/")
