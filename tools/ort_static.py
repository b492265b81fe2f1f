"""ONNX Runtime's own `quantize_static` on the tensors that onnx-eptq would calibrate with: the yardstick of the tools.

ort_static.py MODEL CALIB -o OUT [--weights int8|int4] [--feed image|batch|all] [--threads N] [preprocessing options]
"""

import argparse
import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from common import add_preprocessing, open_calibration
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

EVERYTHING = 2**31  # samples per batch that no calibration set reaches


class Reader(CalibrationDataReader):
    """Hands the batches to the calibrator, one per call."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def limit_threads(threads: int) -> None:
    """Give every session that follows this many threads: `quantize_static` takes no session options."""
    plain = ort.SessionOptions

    def limited() -> ort.SessionOptions:
        options = plain()
        options.intra_op_num_threads = threads
        return options

    ort.SessionOptions = limited


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--weights", choices=["int8", "int4"], default="int8")
    parser.add_argument("--feed", choices=["image", "batch", "all"], default="image", help="samples per run")
    parser.add_argument("--batch-size", type=int, default=32, help="of --feed batch")
    parser.add_argument("--per-tensor", action="store_true", help="one scale per weight instead of one per channel")
    parser.add_argument("--pre-process", action="store_true", help="run quant_pre_process before, as advised")
    parser.add_argument("--threads", type=int, default=0, help="0: the runtime's choice")
    add_preprocessing(parser)
    return parser.parse_args()


def prepared(options: argparse.Namespace, folder: Path) -> Path:
    """The model in a form that `quantize_static` can take."""
    model = options.model
    if _opset(model) < 13 and not options.per_tensor:  # it would write an `axis` that these opsets do not know
        converted = onnx.version_converter.convert_version(onnx.load(model), 13)
        model = folder / "opset13.onnx"
        onnx.save(converted, model)
    if options.pre_process:
        with contextlib.chdir(folder):  # it leaves files where it fails
            quant_pre_process(str(Path(model).resolve()), str(folder / "prepared.onnx"))
        model = folder / "prepared.onnx"
    return Path(model)


def _opset(model: Path) -> int:
    imports = onnx.load(model, load_external_data=False).opset_import
    return max(int(item.version) for item in imports if item.domain in ("", "ai.onnx"))


def main() -> None:
    options = arguments()
    logging.getLogger().setLevel(logging.ERROR)  # it warns once per tensor
    limit_threads(options.threads)
    size = {"image": 1, "batch": options.batch_size, "all": EVERYTHING}[options.feed]
    batches = open_calibration(options.model, options.calib, options, size)
    with tempfile.TemporaryDirectory() as folder:
        quantize_static(
            str(prepared(options, Path(folder))),
            str(options.out),
            Reader(iter(batches)),
            quant_format=QuantFormat.QDQ,
            per_channel=not options.per_tensor,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8 if options.weights == "int8" else QuantType.QInt4,
            calibrate_method=CalibrationMethod.MinMax,
        )


if __name__ == "__main__":
    main()
