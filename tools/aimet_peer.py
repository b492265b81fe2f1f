"""Quantize an ONNX model with AIMET-ONNX's AdaRound; `compare_peer.py` runs it with the Python that has aimet-onnx.

aimet_peer.py MODEL CALIB.npz OUT.onnx [-w 4] [-a 8] [--iterations 500] [--eval FILE.npz --classes FILE.npy]

Every layer is quantized, weights per channel and symmetric, activations per tensor. Prints JSON: whether ONNX Runtime loads
the exported file; if not, the classes that AIMET's own simulation finds for the samples x of --eval are written to --classes,
and what that took is said, to be left out of the costs.
"""

import argparse
import contextlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import aimet_onnx
import numpy as np
import onnx
import onnxruntime as ort
from aimet_onnx import QuantizationSimModel, apply_adaround
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from aimet_onnx.common.defs import QuantScheme, qtype

PER_CHANNEL = Path(aimet_onnx.__file__).parent / "common" / "quantsim_config" / "default_config_per_channel.json"


def batches(path: Path, size: int) -> list[dict[str, np.ndarray]]:
    """The samples of a file of arrays by input name."""
    with np.load(path) as arrays:
        held = {name: arrays[name] for name in arrays}
    count = len(next(iter(held.values())))
    return [{name: array[i : i + size] for name, array in held.items()} for i in range(0, count, size)]


def simulate(options: argparse.Namespace, model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> Any:
    """AIMET's simulation with learned rounding."""
    fold_all_batch_norms_to_weight(model)
    sim = QuantizationSimModel(
        model,
        param_type=qtype.int(options.weight_bits),
        activation_type=qtype.int(options.act_bits),
        quant_scheme=QuantScheme.post_training_tf_enhanced,
        config_file=options.config,
        providers=["CPUExecutionProvider"],
        session_options_kwargs={"intra_op_num_threads": options.threads},
    )
    if options.iterations:
        apply_adaround(sim, feeds, num_iterations=options.iterations)
    sim.compute_encodings(feeds)
    return sim


def exported(sim: Any, out: Path) -> str:
    """Write the standard QDQ file; returns what is wrong with it, if anything."""
    try:
        onnx.save(sim.to_onnx_qdq(prequantize_constants=True), out)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        ort.InferenceSession(out, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of either library, in any class
        out.unlink(missing_ok=True)
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return ""


def classes(sim: Any, x: np.ndarray, size: int) -> np.ndarray:
    """What the simulation finds, from the first output."""
    name = sim.session.get_inputs()[0].name
    parts = [sim.session.run(None, {name: x[i : i + size]})[0] for i in range(0, len(x), size)]
    return np.concatenate([part.reshape(len(part), -1).argmax(1) for part in parts])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("-w", "--weight-bits", type=int, default=4)
    parser.add_argument("-a", "--act-bits", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=500, help="per layer; 0: no AdaRound")
    parser.add_argument("--config", default=str(PER_CHANNEL), help="AIMET's quantsim configuration")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--classes", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    model = onnx.load(options.model)
    first = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    size = first or options.batch
    with contextlib.redirect_stdout(sys.stderr):
        sim = simulate(options, model, batches(options.calib, size))
        problem = exported(sim, options.out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    began = time.process_time()
    if problem and options.eval:
        with np.load(options.eval) as arrays:
            np.save(options.classes, classes(sim, arrays["x"], size))
    print(json.dumps({"problem": problem, "peak_mb": peak, "scoring_s": time.process_time() - began}))


if __name__ == "__main__":
    main()
